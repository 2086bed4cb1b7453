// SPDX-License-Identifier: Apache-2.0
// Reads a call of patch_embed from its arguments and checks it; the errors are those of layout.py.
#include "plan.h"

namespace mmkernels::patch_embed {
namespace {

Edge edge_of(const std::string& name) {
  if (name == "exact") return Edge::exact;
  if (name == "pad") return Edge::pad;
  if (name == "crop") return Edge::crop;
  fail("patch_embed: edge must be exact, pad or crop, got ", name);
}

Mode mode_of(const std::string& name) {
  const std::map<std::string, Mode> modes = {
      {"none", Mode::none},         {"fixed", Mode::fixed},     {"nearest", Mode::nearest},
      {"bilinear", Mode::bilinear}, {"bicubic", Mode::bicubic}, {"factorised", Mode::factorised}};
  const auto found = modes.find(name);
  if (found == modes.end()) fail("patch_embed: position_mode is not known: ", name);
  return found->second;
}

std::string fitting(Axis axis) {
  std::ostringstream text;
  if (axis.patch == axis.stride) text << "a multiple of " << axis.patch;
  else text << axis.patch << " and a multiple of " << axis.stride;
  return text.str();
}

std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

// Reads the images one after the other and counts their tokens and patches.
class Reader {
 public:
  Reader(Plan& plan, const Layout& layout) : plan_(plan), layout_(layout) {}

  // One clip; a single frame repeats in time as often as the patch asks for.
  void add(const void* pixels, int64_t T, int64_t H, int64_t W, const Sizes& strides, bool single, size_t index,
           const std::string& shape) {
    const Patch& p = plan_.patch;
    const int64_t t = p.t.count(T, T == 1 ? Edge::pad : layout_.edge);
    const int64_t h = p.h.count(H, layout_.edge), w = p.w.count(W, layout_.edge);
    std::ostringstream name;
    if (single) name << "images[" << index << "]";
    else name << "pixel_values";
    const char* otherwise = " (or choose pad or crop)";
    if (t < 0)
      fail("patch_embed: ", name.str(), " must be ", fitting(p.t), " frames", otherwise, ", got ", T, " frames");
    if (h < 0 || w < 0)
      fail("patch_embed: ", name.str(), " must be ", fitting(p.h), " × ", fitting(p.w), " pixels", otherwise,
           ", got ", H, "×", W, " pixels");
    if (single && t * h * w == 0)
      fail("patch_embed: ", name.str(), " must be of at least one patch, got ", shape);
    if (h % p.merge || w % p.merge)
      fail("patch_embed: ", name.str(), " must be a multiple of merge_size ", p.merge,
           " patches a side, got ", h, "×", w, " patches");
    push({pixels, T, H, W, strides[0], strides[1], strides[2], strides[3], t, h, w, 0, 0, false});
  }

  void push(Image image) {
    image.first_token = plan_.tokens, image.first_patch = plan_.patches;
    plan_.tokens += plan_.patch.R + image.N(), plan_.patches += image.N();
    plan_.images.push_back(image);
  }

 private:
  Plan& plan_;
  const Layout& layout_;
};

const char* at(const Tensor& t, int64_t offset) {
  return static_cast<const char*>(t.data_ptr()) + offset * t.element_size();
}

void read_clips(Reader& reader, const std::vector<Tensor>& images, int64_t C) {
  for (size_t i = 0; i < images.size(); ++i) {
    const Tensor& x = images[i];
    const int64_t d = x.dim(), channel = d == 5 ? 1 : 0;
    if (d < 3 || d > 5 || x.size(channel) != C)
      fail("patch_embed: images[", i, "] must be of the ", C, " channels of weight, got ", shape_text(x));
    const Sizes strides = {x.stride(channel), d > 3 ? x.stride(d - 3) : 0, x.stride(d - 2), x.stride(d - 1)};
    const int64_t count = d == 5 ? x.size(0) : 1, T = d > 3 ? x.size(d - 3) : 1;
    for (int64_t b = 0; b < count; ++b)
      reader.add(at(x, d == 5 ? b * x.stride(0) : 0), T, x.size(d - 2), x.size(d - 1), strides, d < 5, i,
                 shape_text(x));
  }
}

void read_flat(Reader& reader, const Tensor& flat, int64_t C, const Sizes& sizes) {
  int64_t offset = 0;
  for (size_t i = 0; i + 2 < sizes.size(); i += 3) {
    const int64_t T = std::max<int64_t>(sizes[i], 1), H = sizes[i + 1], W = sizes[i + 2];
    // Sizes may be absurd: their product is only formed as far as the buffer reaches.
    int64_t values = 1;
    for (const int64_t n : {C, T, H, W}) values = values > 0 && n > flat.size(0) / values ? flat.size(0) + 1 : values * n;
    if (H < 1 || W < 1 || sizes[i] < 0 || values > flat.size(0) - offset)
      fail("patch_embed: image_sizes[", i / 3, "] must be positive and within the ", flat.size(0),
           " values of the buffer, got ", T, "×", H, "×", W, " after ", offset, " values");
    reader.add(at(flat, offset * flat.stride(0)), T, H, W,
               {T * H * W * flat.stride(0), H * W * flat.stride(0), W * flat.stride(0), flat.stride(0)},
               true, i / 3, "no pixels");
    offset += values;
  }
  if (offset != flat.size(0))
    fail("patch_embed: image_sizes must be of all ", flat.size(0), " values of the buffer, got ", offset);
}

void read_rows(Reader& reader, const Tensor& rows, int64_t K, const OptionalTensor& grid_thw, const Layout& layout) {
  if (rows.size(1) != K)
    fail("patch_embed: images[0] must have rows of the ", K, " values of weight, got ", shape_text(rows));
  int64_t row = 0;
  const auto add = [&](int64_t t, int64_t h, int64_t w) {
    reader.push({at(rows, row * rows.stride(0)), t, h, w, rows.stride(1), 0, 0, rows.stride(0), t, h, w, 0, 0, true});
    row += t * h * w;
  };
  if (!grid_thw) {
    if (layout.sizes.size() != 2 || layout.sizes[0] < 0 || layout.sizes[1] < 0 ||
        static_cast<__int128>(layout.sizes[0]) * layout.sizes[1] != rows.size(0))
      fail("patch_embed: rows without grid_thw need sizes = [patches, images] of all rows");
    for (int64_t i = 0; i < layout.sizes[1]; ++i) add(1, 1, layout.sizes[0]);
    return;
  }
  if (grid_thw->dim() != 2 || grid_thw->size(1) != 3)
    fail("patch_embed: grid_thw must be [images, 3], got ", shape_text(*grid_thw));
  const Tensor grid = torch::stable::contiguous(torch::stable::to(*grid_thw, ScalarType::Long));
  const int64_t *g = data<int64_t>(grid), m = layout.merge_size, images = grid.size(0);
  __int128 total = 0;
  for (int64_t i = 0; i < images; ++i) {
    const int64_t t = g[3 * i], h = g[3 * i + 1], w = g[3 * i + 2];
    if (t < 1 || h < 1 || w < 1 || h % m || w % m)
      fail("patch_embed: grid_thw must be at least 1 everywhere, h and w multiples of merge_size ", m, ", got [", t,
           ", ", h, ", ", w, "] in row ", i);
    total += static_cast<__int128>(h) * w > rows.size(0) ? rows.size(0) + 1 : static_cast<__int128>(t) * h * w;
  }
  if (total != rows.size(0))
    fail("patch_embed: grid_thw must be grids of the ", rows.size(0), " rows of patches given, got ",
         total > INT64_MAX ? INT64_MAX : static_cast<int64_t>(total), " patches");
  for (int64_t i = 0; i < images; ++i) add(g[3 * i], g[3 * i + 1], g[3 * i + 2]);
}

}  // namespace

Layout layout_of(Sizes stride, Sizes sizes, const std::string& edge, int64_t merge_size, bool prefix_last,
                 const std::string& mode, bool align_corners, bool antialias) {
  if (stride.size() != 3 || stride[0] < 1 || stride[1] < 1 || stride[2] < 1 || merge_size < 1)
    fail("patch_embed: stride must be three numbers of at least 1, merge_size at least 1");
  return {stride, sizes, edge_of(edge), merge_size, prefix_last, mode_of(mode), align_corners, antialias};
}

Plan plan_of(const std::vector<Tensor>& images, const Tensor& weight, int64_t prefix_rows,
             const OptionalTensor& grid_thw, const Layout& layout) {
  if (weight.dim() != 5 || weight.size(2) < 1 || weight.size(3) < 1 || weight.size(4) < 1)
    fail("patch_embed: weight must be [D, C, P_t, P_h, P_w], got ", shape_text(weight));
  for (const Tensor& image : images)
    if (image.scalar_type() != images[0].scalar_type() || image.dim() < 1)
      fail("patch_embed: images must be of one dtype, and not of no dimension");
  const Sizes& s = layout.stride;
  Plan plan;
  plan.patch = {weight.size(1), {weight.size(2), s[0]}, {weight.size(3), s[1]}, {weight.size(4), s[2]},
                layout.merge_size, prefix_rows, layout.prefix_last};
  Reader reader(plan, layout);
  if (images.size() == 1 && images[0].dim() == 1) read_flat(reader, images[0], plan.patch.C, layout.sizes);
  else if (images.size() == 1 && images[0].dim() == 2)
    read_rows(reader, images[0], plan.patch.K(), grid_thw, layout);
  else read_clips(reader, images, plan.patch.C);
  return plan;
}

Plan plan_over(const Plan& plan, const std::vector<Tensor>& images, const Tensor& weight, const Layout& layout) {
  if (images.empty() || images[0].dim() != 2) return plan_of(images, weight, plan.patch.R, std::nullopt, layout);
  Plan over = plan;  // grid_thw has been read
  for (Image& image : over.images) {
    image.pixels = at(images[0], image.first_patch * images[0].size(1));
    image.stride_c = 1, image.stride_w = images[0].size(1);
  }
  return over;
}

std::vector<Affine> affines_of(int64_t C, const Numbers& scale, const Numbers& shift) {
  std::vector<Affine> affines(C);
  if (scale && (static_cast<int64_t>(scale->size()) != C || !shift || shift->size() != scale->size()))
    fail("patch_embed: pixel_scale and pixel_shift must have one number for each of ", C, " channels");
  for (int64_t c = 0; scale && c < C; ++c) affines[c] = Affine::of((*scale)[c], (*shift)[c]);
  return affines;
}

Positions::Positions(const Plan& plan, const Sizes& shape, const Layout& layout) : plan_(plan), mode_(layout.mode) {
  if (mode_ == Mode::none) return;
  const bool fixed = mode_ == Mode::fixed, factorised = mode_ == Mode::factorised;
  if (shape.size() != (fixed ? 1u : 2u) || *std::min_element(shape.begin(), shape.end()) < (fixed ? 0 : 1))
    fail("patch_embed: the position tables do not fit position_mode");
  columns_ = fixed ? 1 : shape[1];
  rows_ = fixed ? shape[0] : factorised ? shape[0] + shape[1] : shape[0] * shape[1];
  taps_ = fixed ? 1 : factorised ? 2 : 0;
  if (taps_ == 0) resample_axes(layout, shape);
  for (const Image& image : plan.images) {
    const int64_t own = shape[0] - image.N(), R = plan.patch.R;
    if (fixed && own != 0 && R == 0)
      fail("patch_embed: position_embed must be ", image.N(), " rows (patches), got ", shape[0], " rows");
    if (fixed && (own < 0 || own > R))
      fail("patch_embed: position_embed must be ", image.N(), " (patches) to ", image.N() + R, " rows (with ", R,
           " prefix tokens), got ", shape[0], " rows");
    if (factorised && (image.h > shape[0] || image.w > shape[1]))
      fail("patch_embed: position_table must be at least ", image.h, " and ", image.w, ", got ", shape[0],
           " rows and ", shape[1], " columns");
  }
}

void Positions::resample_axes(const Layout& layout, const Sizes& shape) {
  constexpr int64_t kTaps = 16;  // bicubic's; where a position takes more, its plane is resampled beforehand
  std::map<std::pair<int64_t, int64_t>, int64_t> plane_of;
  const auto axis = [&](int64_t n_out, int64_t n_in) {
    const auto [entry, is_new] = known_.try_emplace({n_out, n_in});
    if (is_new) entry->second = axis_taps(n_out, n_in, mode_, layout.align_corners, layout.antialias);
    return &entry->second;  // a map's entries stay where they are
  };
  for (const Image& image : plan_.images) {
    Axes axes{axis(image.h, shape[0]), axis(image.w, shape[1]), -1};
    const int64_t taps = axes.y->count * axes.x->count;
    if (taps > kTaps) {
      const auto [entry, is_new] = plane_of.try_emplace({image.h, image.w}, planes_.size());
      if (is_new) {
        planes_.push_back({image.h, image.w, axes.y, axes.x, plane_rows_});
        plane_rows_ += image.h * image.w;
      }
      axes.plane = entry->second;
    }
    taps_ = std::max(taps_, taps > kTaps ? 1 : taps);
    axes_.push_back(axes);
  }
}

namespace {

constexpr int64_t kColumns = 16;  // of the table, for kernels on a device

void put_grids(const Plan& plan, int32_t* offsets, int64_t* grids) {
  offsets[0] = 0;
  for (const Image& image : plan.images) {
    if (plan.tokens > INT32_MAX) fail("patch_embed: images must give fewer than 2^31 tokens, got ", plan.tokens);
    *++offsets = static_cast<int32_t>(image.first_token + plan.patch.R + image.N());
    for (const int64_t n : {image.t, image.h, image.w}) *grids++ = n;
  }
}

Tensor on_cpu(const Sizes& sizes, ScalarType dtype) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU, 0);
  return torch::stable::empty(sizes, dtype, std::nullopt, cpu);
}

std::tuple<Tensor, Tensor> grids(const Tensor& weight, std::vector<Tensor> images, int64_t prefix_rows, Sizes stride,
                                 Sizes sizes, std::string edge, int64_t merge_size, bool prefix_last,
                                 std::string mode, bool align_corners, bool antialias) {
  const Layout layout =
      layout_of(stride, sizes, edge, merge_size, prefix_last, mode, align_corners, antialias);
  const Plan plan = plan_of(images, weight, prefix_rows, std::nullopt, layout);
  const int64_t n = static_cast<int64_t>(plan.images.size());
  const Tensor offsets = on_cpu({n + 1}, ScalarType::Int), grid = on_cpu({n, 3}, ScalarType::Long);
  put_grids(plan, mutable_data<int32_t>(offsets), mutable_data<int64_t>(grid));
  if (weight.is_cpu()) return {offsets, grid};
  return {torch::stable::to(offsets, weight.device(), true), torch::stable::to(grid, weight.device(), true)};
}

// Of each image its address, strides, sizes, grid, first token and patch: what a kernel on a device reads.
Tensor table(const Tensor& weight, std::vector<Tensor> images, int64_t prefix_rows, Sizes stride, Sizes sizes,
             std::string edge, int64_t merge_size, bool prefix_last, std::string mode, bool align_corners,
             bool antialias) {
  const Layout layout =
      layout_of(stride, sizes, edge, merge_size, prefix_last, mode, align_corners, antialias);
  const Plan plan = plan_of(images, weight, prefix_rows, std::nullopt, layout);
  const Tensor rows = on_cpu({static_cast<int64_t>(plan.images.size()), kColumns}, ScalarType::Long);
  int64_t* to = mutable_data<int64_t>(rows);
  const bool stills = !images.empty() && images[0].dim() == 3;
  for (size_t i = 0; i < plan.images.size(); ++i, to += kColumns) {
    const Image& x = plan.images[i];
    const int64_t row[kColumns] = {reinterpret_cast<int64_t>(x.pixels), x.stride_c, x.stride_t, x.stride_h,
                                   x.stride_w, x.T, x.H, x.W, x.t, x.h, x.w, x.first_token, x.first_patch, stills,
                                   static_cast<int64_t>(i), 0};
    std::copy(row, row + kColumns, to);
  }
  return rows;
}

}  // namespace
}  // namespace mmkernels::patch_embed

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "patch_embed_table(Tensor weight, Tensor[] images, int prefix_rows, SymInt[] stride, SymInt[] sizes,"
      " str edge, int merge_size, bool prefix_last, str position_mode, bool align_corners, bool antialias)"
      " -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("patch_embed_grids", TORCH_BOX(&mmkernels::patch_embed::grids));
  m.impl("patch_embed_table", TORCH_BOX(&mmkernels::patch_embed::table));
}
// Shapes are read on the host wherever the pixels lie.
STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, m) {
  m.impl("patch_embed_grids", TORCH_BOX(&mmkernels::patch_embed::grids));
  m.impl("patch_embed_table", TORCH_BOX(&mmkernels::patch_embed::table));
}
