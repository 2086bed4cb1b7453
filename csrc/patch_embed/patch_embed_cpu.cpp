// SPDX-License-Identifier: Apache-2.0
// Patch embedding on CPU. Each thread packs a panel of patches from raw pixels, multiplies it with torch's
// GEMM and finishes its rows while they are in its cache. No image-sized float tensor exists in the forward.
#include <algorithm>

#include "../common/aten.h"
#include "patch_embed.h"

namespace mmkernels::patch_embed {
namespace {

constexpr int64_t kPanelRows = 384;  // enough for the GEMM to run at full speed, small enough for L2

// The four pairs that matter are compiled per instruction set; the others take the plain loop.
#define MMK_ROW(T, Pixel)                                                                        \
  MMK_MULTIARCH void normalise_row(T* to, const Pixel* from, int64_t stride, int64_t n, Affine a) { \
    normalise_row_body(to, from, stride, n, a);                                                  \
  }
MMK_ROW(float, uint8_t)
MMK_ROW(float, float)
MMK_ROW(bf16, uint8_t)
MMK_ROW(bf16, float)
#undef MMK_ROW
template <class T, class Pixel>
void normalise_row(T* to, const Pixel* from, int64_t stride, int64_t n, Affine a) {
  normalise_row_body(to, from, stride, n, a);
}

template <class F>
void dispatch_pixels(const Tensor& pixels, const F& f) {
  if (pixels.scalar_type() == ScalarType::Byte)
    f(static_cast<uint8_t*>(nullptr));
  else
    dispatch_float("patch_embed", pixels.scalar_type(), f);
}

Shape shape_of(const Tensor& pixels, const Tensor& weight, int64_t R) {
  if (pixels.dim() != 4 || weight.dim() != 4 || pixels.size(1) != weight.size(1) ||
      weight.size(2) < 1 || weight.size(3) < 1 || pixels.size(2) % weight.size(2) ||
      pixels.size(3) % weight.size(3))
    fail("patch_embed: pixel_values must be [B, C, H, W] in multiples of the patch of weight [D, C, P, P]");
  return {pixels.size(0),   pixels.size(1),   pixels.size(2),   pixels.size(3),  weight.size(2),
          weight.size(3),   R,                pixels.stride(0), pixels.stride(1), pixels.stride(2),
          pixels.stride(3)};
}

using Numbers = std::optional<std::vector<double>>;

std::vector<Affine> affines_of(const Shape& s, const Numbers& scale, const Numbers& shift) {
  std::vector<Affine> affines(s.C);
  if (scale && (static_cast<int64_t>(scale->size()) != s.C || !shift || shift->size() != scale->size()))
    fail("patch_embed: pixel_scale and pixel_shift must have one number for each of ", s.C, " channels");
  for (int64_t c = 0; scale && c < s.C; ++c) affines[c] = Affine::of((*scale)[c], (*shift)[c]);
  return affines;
}

// The patches of one strip: [grid_w, K].
template <class T, class Pixel>
void pack_strip(T* to, const Pixel* pixels, const Shape& s, int64_t strip,
                const std::vector<Affine>& affines, T* line) {
  const int64_t b = strip / s.strips(), gy = s.patch_row(strip), K = s.K();
  for (int64_t c = 0; c < s.C; ++c)
    for (int64_t py = 0; py < s.P_h; ++py) {
      normalise_row(line, pixels + s.pixel_row(b, c, gy, py), s.stride_w, s.W, affines[c]);
      T* chunk = to + s.k_of(c, py);
      for (int64_t gx = 0; gx < s.grid_w(); ++gx)
        memcpy(chunk + gx * K, line + gx * s.P_w, s.P_w * sizeof(T));
    }
}

// Strips [begin, end) as GEMM rows; prefix tokens take rows of zeros so that token rows stay contiguous.
template <class T, class Pixel>
void pack_strips(T* panel, const Pixel* pixels, const Shape& s, int64_t begin, int64_t end,
                 const std::vector<Affine>& affines) {
  std::vector<T> line(s.W);
  for (int64_t strip = begin; strip < end; ++strip) {
    T* rows = panel + (s.first_token(strip) - s.first_token(begin)) * s.K();
    if (s.is_prefix(strip))
      memset(static_cast<void*>(rows), 0, s.R * s.K() * sizeof(T));
    else
      pack_strip(rows, pixels, s, strip, affines, line.data());
  }
}

template <class T>
void pack(T* panel, const Tensor& pixels, const Shape& s, int64_t begin, int64_t end,
          const std::vector<Affine>& affines) {
  dispatch_pixels(pixels, [&](auto* p) {
    pack_strips(panel, data<pointee<decltype(p)>>(pixels), s, begin, end, affines);
  });
}

template <class T>
MMK_INLINE void add_row_body(T* to, const T* from, const T* more, int64_t D) {
  for (int64_t i = 0; i < D; ++i) to[i] = Convert<T>::from(widen(from[i]) + widen(more[i]));
}
MMK_MULTIARCH void add_row(float* to, const float* a, const float* b, int64_t D) { add_row_body(to, a, b, D); }
MMK_MULTIARCH void add_row(bf16* to, const bf16* a, const bf16* b, int64_t D) { add_row_body(to, a, b, D); }
void add_row(f16* to, const f16* a, const f16* b, int64_t D) { add_row_body(to, a, b, D); }
void add_row(double* to, const double* a, const double* b, int64_t D) { add_row_body(to, a, b, D); }

// Writes the prefix rows and adds the position rows to tokens [begin, end) of all images.
template <class T>
void finish_rows(T* out, const Shape& s, int64_t begin, int64_t end, int64_t D, const T* position,
                 int64_t position_rows, const T* prefix) {
  const int64_t positioned = position_rows - s.N();  // prefix tokens that have a position
  for (int64_t token = begin; token < end; ++token) {
    const int64_t r = token % s.tokens();
    T* row = out + token * D;
    const T* source = r < s.R ? prefix + r * D : row;
    const int64_t p = r < s.R ? r : r - s.R + positioned;
    if (position && (r >= s.R || r < positioned))
      add_row(row, source, position + p * D, D);
    else if (r < s.R)
      memcpy(static_cast<void*>(row), source, D * sizeof(T));
  }
}

void check_rows(const Shape& s, const Tensor& weight, const OptionalTensor& bias,
                const OptionalTensor& position, const OptionalTensor& prefix) {
  const int64_t D = weight.size(0);
  const auto fits = [&](const OptionalTensor& t, int64_t dims) {
    return !t || (t->dim() == dims && t->size(dims - 1) == D && t->scalar_type() == weight.scalar_type());
  };
  if (!fits(bias, 1) || !fits(position, 2) || !fits(prefix, 2))
    fail("patch_embed: bias [D], position_embed [rows, D] and prefix_tokens [R, D] must fit weight");
  if (position && (position->size(0) < s.N() || position->size(0) > s.tokens()))
    fail("patch_embed: position_embed must have ", s.N(), " to ", s.tokens(), " rows, got ",
         position->size(0));
}

// How many strips make a panel, and how many rows it then has at most.
int64_t panel_strips(const Shape& s) {
  return std::max<int64_t>(1, kPanelRows / std::max<int64_t>(1, s.grid_w()));
}

template <class T>
void embed(const Shape& s, const Tensor& pixels, const Tensor& weight, const OptionalTensor& bias,
           const OptionalTensor& position, const OptionalTensor& prefix,
           const std::vector<Affine>& affines, const Tensor& out) {
  const int64_t D = weight.size(0), K = s.K(), strips = s.B * s.strips(), step = panel_strips(s);
  const int64_t rows = std::min(s.B * s.tokens(), step * std::max(s.grid_w(), s.R));
  const ScalarType dtype = weight.scalar_type();
  T* tokens = mutable_data<T>(out);
  const auto scratch = [&] { return empty(weight, {rows, K}); };
  for_each_block(ceil_div(strips, step), scratch, [&](int64_t i, const Tensor& panel) {
    const int64_t begin = i * step, end = std::min(begin + step, strips);
    const int64_t first = s.first_token(begin), count = s.first_token(end) - first;
    pack(mutable_data<T>(panel), pixels, s, begin, end, affines);
    linear_out(rows_blob(panel.data_ptr(), count, K, dtype), rows_blob(weight.data_ptr(), D, K, dtype),
               bias ? OptionalTensor(blob(bias->data_ptr(), {D}, {1}, dtype)) : std::nullopt,
               rows_blob(tokens + first * D, count, D, dtype));
    if (position || prefix)
      finish_rows(tokens, s, first, first + count, D, data<T>(position),
                  position ? position->size(0) : 0, data<T>(prefix));
  });
}

Tensor forward(const Tensor& pixels, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& position, const OptionalTensor& prefix, Numbers scale,
               Numbers shift) {
  const Shape s = shape_of(pixels, weight, prefix ? prefix->size(0) : 0);
  check_rows(s, weight, bias, position, prefix);
  Tensor out = empty(weight, {s.B, s.tokens(), weight.size(0)});
  if (out.numel() == 0) return out;
  const auto affines = affines_of(s, scale, shift);
  dispatch_float("patch_embed", weight.scalar_type(), [&](auto* tag) {
    embed<pointee<decltype(tag)>>(s, pixels, aligned(weight), contiguous(bias), contiguous(position),
                                  contiguous(prefix), affines, out);
  });
  return out;
}

template <class T>
MMK_INLINE void accumulate_body(acc_t<T>* sum, const T* row, int64_t D) {
  for (int64_t i = 0; i < D; ++i) sum[i] += widen(row[i]);
}
MMK_MULTIARCH void accumulate(float* sum, const float* row, int64_t D) { accumulate_body(sum, row, D); }
MMK_MULTIARCH void accumulate(float* sum, const bf16* row, int64_t D) { accumulate_body(sum, row, D); }
void accumulate(float* sum, const f16* row, int64_t D) { accumulate_body(sum, row, D); }
void accumulate(double* sum, const double* row, int64_t D) { accumulate_body(sum, row, D); }

// dbias, dposition and dprefix from one reading of grad: first the sum over images for every token of an
// image (its rows are dposition and dprefix), then the sum of the patch rows (dbias). Fixed order.
template <class T>
void sum_tokens(const T* grad, const Shape& s, int64_t D, int64_t position_rows, const Tensor& d_bias,
                const Tensor& d_position, const Tensor& d_prefix) {
  using A = acc_t<T>;
  const bool bias = d_bias.numel(), position = d_position.numel(), prefix = d_prefix.numel();
  const int64_t positioned = position_rows - s.N(), block = 16;
  std::vector<A> partial(bias ? ceil_div(s.tokens(), block) * D : 0, A(0));
  torch::stable::parallel_for(0, ceil_div(s.tokens(), block), 1, [&](int64_t from, int64_t to) {
    std::vector<A> sum(D);
    for (int64_t i = from; i < to; ++i)
      for (int64_t r = i * block; r < std::min((i + 1) * block, s.tokens()); ++r) {
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t b = 0; b < s.B; ++b) accumulate(sum.data(), grad + (b * s.tokens() + r) * D, D);
        const auto store = [&](T* row) {
          for (int64_t c = 0; c < D; ++c) row[c] = Convert<T>::from(sum[c]);
        };
        if (prefix && r < s.R) store(mutable_data<T>(d_prefix) + r * D);
        if (position && r < s.R && r < positioned) store(mutable_data<T>(d_position) + r * D);
        if (position && r >= s.R) store(mutable_data<T>(d_position) + (r - s.R + positioned) * D);
        if (bias && r >= s.R)
          for (int64_t c = 0; c < D; ++c) partial[i * D + c] += sum[c];
      }
  });
  if (!bias) return;
  std::vector<A> sum(D, A(0));
  for (size_t i = 0; i < partial.size(); ++i) sum[i % D] += partial[i];
  for (int64_t c = 0; c < D; ++c) mutable_data<T>(d_bias)[c] = Convert<T>::from(sum[c]);
}

// grad without its prefix rows, [B·N, D].
Tensor patch_grads(const Tensor& grad, const Shape& s, int64_t D) {
  if (s.R == 0) return torch::stable::view(grad, {s.B * s.N(), D});
  Tensor patches = empty(grad, {s.B * s.N(), D});
  const int64_t bytes = D * grad.element_size();
  torch::stable::parallel_for(0, s.B, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      memcpy(mutable_data<char>(patches) + b * s.N() * bytes,
             data<char>(grad) + (b * s.tokens() + s.R) * bytes, s.N() * bytes);
  });
  return patches;
}

// dpixels = scale · (grad · weight) laid back into the image.
template <class T, class Pixel>
void unpack_strips(Pixel* to, const T* rows, const Shape& s, const std::vector<Affine>& affines) {
  const int64_t K = s.K();
  torch::stable::parallel_for(0, s.B * s.grid_h(), 1, [&](int64_t from, int64_t end) {
    for (int64_t strip = from; strip < end; ++strip)
      for (int64_t c = 0; c < s.C; ++c)
        for (int64_t py = 0; py < s.P_h; ++py) {
          const int64_t b = strip / s.grid_h(), gy = strip % s.grid_h();
          Pixel* line = to + ((b * s.C + c) * s.H + gy * s.P_h + py) * s.W;
          const T* chunk = rows + strip * s.grid_w() * K + s.k_of(c, py);
          for (int64_t gx = 0; gx < s.grid_w(); ++gx)
            for (int64_t px = 0; px < s.P_w; ++px)
              line[gx * s.P_w + px] = Convert<Pixel>::from(static_cast<acc_t<Pixel>>(
                  widen(chunk[gx * K + px]) * static_cast<acc_t<T>>(affines[c].scale)));
        }
  });
}

// All patches [B·N, K]: what the weight gradient multiplies.
template <class T>
void pack_all(T* panel, const Tensor& pixels, const Shape& s, const std::vector<Affine>& affines) {
  torch::stable::parallel_for(0, s.B * s.strips(), 1, [&](int64_t begin, int64_t end) {
    pack(panel + s.first_token(begin) * s.K(), pixels, s, begin, end, affines);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_, const Tensor& pixels, const Tensor& weight, Numbers scale, Numbers shift,
    int64_t prefix_rows, int64_t position_rows, std::vector<bool> needs) {
  Shape s = shape_of(pixels, weight, prefix_rows);
  const int64_t D = weight.size(0), K = s.K(), rows = s.B * s.N();
  const Tensor grad = aligned(grad_);
  const auto affines = affines_of(s, scale, shift);
  const auto zeros = [&](bool need, Sizes sizes) {  // zero-size inputs leave the sums at 0
    return torch::stable::new_zeros(weight, need ? sizes : Sizes{0});
  };
  Tensor d_pixels = empty(pixels, needs[0] ? Sizes{s.B, s.C, s.H, s.W} : Sizes{0});
  Tensor d_weight = zeros(needs[1], {D, s.C, s.P_h, s.P_w}), d_bias = zeros(needs[2], {D});
  Tensor d_position = zeros(needs[3], {position_rows, D}), d_prefix = zeros(needs[4], {prefix_rows, D});
  if (grad.numel() && (needs[2] || needs[3] || needs[4]))
    dispatch_float("patch_embed", grad.scalar_type(), [&](auto* tag) {
      using T = pointee<decltype(tag)>;
      sum_tokens(data<T>(grad), s, D, position_rows, d_bias, d_position, d_prefix);
    });
  if (rows == 0 || D == 0 || K == 0 || !(needs[0] || needs[1])) {
    if (needs[0]) torch::stable::zero_(d_pixels);
    return {d_pixels, d_weight, d_bias, d_position, d_prefix};
  }
  const Tensor patches = patch_grads(grad, s, D), panel = empty(weight, {rows, K});
  s.R = 0;  // from here on only patches
  dispatch_float("patch_embed", weight.scalar_type(), [&](auto* t) {
    using T = pointee<decltype(t)>;
    if (needs[1]) {
      pack_all(mutable_data<T>(panel), pixels, s, affines);
      mm_blocked(patches.data_ptr(), D, rows, 1, D, panel, d_weight.data_ptr(), weight.scalar_type(), sizeof(T));
    }
    if (!needs[0]) return;
    const Tensor w = torch::stable::view(aligned(weight), {D, K});
    mm_blocked(patches.data_ptr(), rows, D, D, 1, w, panel.data_ptr(), weight.scalar_type(), sizeof(T));
    dispatch_float("patch_embed", pixels.scalar_type(), [&](auto* p) {
      unpack_strips(mutable_data<pointee<decltype(p)>>(d_pixels), data<T>(panel), s, affines);
    });
  });
  return {d_pixels, d_weight, d_bias, d_position, d_prefix};
}

}  // namespace
}  // namespace mmkernels::patch_embed

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&mmkernels::patch_embed::forward));
  m.impl("patch_embed_backward", TORCH_BOX(&mmkernels::patch_embed::backward));
}
