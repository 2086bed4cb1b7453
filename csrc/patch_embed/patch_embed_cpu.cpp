// SPDX-License-Identifier: Apache-2.0
// Patch embedding on CPU: pack a panel of patches from raw pixels, multiply it with torch's GEMM, finish
// its rows while they are in cache. No image-sized float tensor exists in the forward.
#include <algorithm>

#include "../common/aten.h"
#include "patch_embed.h"

namespace mmkernels::patch_embed {
namespace {

constexpr int64_t kPanelRows = 1152;  // enough for the GEMM to run at full speed, small enough for L2/L3

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
void pack_panel(T* panel, const Pixel* pixels, const Shape& s, int64_t begin, int64_t end,
                const std::vector<Affine>& affines) {
  const int64_t first = s.first_token(begin), K = s.K();
  torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
    std::vector<T> line(s.W);
    for (int64_t strip = from; strip < to; ++strip) {
      T* rows = panel + (s.first_token(strip) - first) * K;
      if (s.is_prefix(strip))
        memset(static_cast<void*>(rows), 0, s.R * K * sizeof(T));
      else
        pack_strip(rows, pixels, s, strip, affines, line.data());
    }
  });
}

void pack(const Tensor& panel, const Tensor& pixels, const Shape& s, int64_t begin, int64_t end,
          const std::vector<Affine>& affines) {
  dispatch_float("patch_embed", panel.scalar_type(), [&](auto* t) {
    dispatch_pixels(pixels, [&](auto* p) {
      using T = pointee<decltype(t)>;
      using Pixel = pointee<decltype(p)>;
      pack_panel(mutable_data<T>(panel), data<Pixel>(pixels), s, begin, end, affines);
    });
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
  torch::stable::parallel_for(begin, end, 64, [&](int64_t from, int64_t to) {
    for (int64_t token = from; token < to; ++token) {
      const int64_t r = token % s.tokens();
      T* row = out + token * D;
      const T* source = r < s.R ? prefix + r * D : row;
      const int64_t p = r < s.R ? r : r - s.R + positioned;
      if (position && (r >= s.R || r < positioned))
        add_row(row, source, position + p * D, D);
      else if (r < s.R)
        memcpy(static_cast<void*>(row), source, D * sizeof(T));
    }
  });
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

Tensor forward(const Tensor& pixels, const Tensor& weight_, const OptionalTensor& bias,
               const OptionalTensor& position_, const OptionalTensor& prefix_, Numbers scale,
               Numbers shift) {
  const Shape s = shape_of(pixels, weight_, prefix_ ? prefix_->size(0) : 0);
  check_rows(s, weight_, bias, position_, prefix_);
  const int64_t D = weight_.size(0), K = s.K(), strips = s.B * s.strips();
  const OptionalTensor position = contiguous(position_), prefix = contiguous(prefix_);
  Tensor out = empty(weight_, {s.B, s.tokens(), D});
  if (out.numel() == 0) return out;
  const auto affines = affines_of(s, scale, shift);
  const Tensor weight = torch::stable::reshape(weight_, {D, K});
  Tensor rows = torch::stable::view(out, {s.B * s.tokens(), D});

  const int64_t step = std::max<int64_t>(1, kPanelRows / std::max<int64_t>(1, s.grid_w()));
  const Tensor panel = empty(weight, {std::min(s.B * s.tokens(), step * std::max(s.grid_w(), s.R)), K});
  for (int64_t strip = 0; strip < strips; strip += step) {
    const int64_t end = std::min(strip + step, strips);
    const int64_t first = s.first_token(strip), count = s.first_token(end) - first;
    Tensor a = panel;
    pack(panel, pixels, s, strip, end, affines);
    linear_out(torch::stable::narrow(a, 0, 0, count), weight, bias,
               torch::stable::narrow(rows, 0, first, count));
    if (!position && !prefix) continue;
    dispatch_float("patch_embed", weight.scalar_type(), [&](auto* tag) {
      using T = pointee<decltype(tag)>;
      finish_rows(mutable_data<T>(out), s, first, first + count, D, data<T>(position),
                  position ? position->size(0) : 0, data<T>(prefix));
    });
  }
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_, const Tensor& pixels, const Tensor& weight, Numbers scale, Numbers shift,
    int64_t prefix_rows, int64_t position_rows, std::vector<bool> needs) {
  Shape s = shape_of(pixels, weight, prefix_rows);
  const int64_t D = weight.size(0), K = s.K(), rows = s.B * s.N();
  const Tensor grad = torch::stable::contiguous(grad_);
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
  if (needs[1]) {
    pack(panel, pixels, s, 0, s.B * s.strips(), affines);
    mm_out(torch::stable::transpose(patches, 0, 1), panel, torch::stable::view(d_weight, {D, K}));
  }
  if (needs[0]) {
    mm_out(patches, torch::stable::reshape(weight, {D, K}), panel);
    dispatch_float("patch_embed", weight.scalar_type(), [&](auto* t) {
      dispatch_float("patch_embed", pixels.scalar_type(), [&](auto* p) {
        using T = pointee<decltype(t)>;
        using Pixel = pointee<decltype(p)>;
        unpack_strips(mutable_data<Pixel>(d_pixels), data<T>(panel), s, affines);
      });
    });
  }
  return {d_pixels, d_weight, d_bias, d_position, d_prefix};
}

}  // namespace
}  // namespace mmkernels::patch_embed

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&mmkernels::patch_embed::forward));
  m.impl("patch_embed_backward", TORCH_BOX(&mmkernels::patch_embed::backward));
}
