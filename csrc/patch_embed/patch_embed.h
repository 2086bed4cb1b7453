// SPDX-License-Identifier: Apache-2.0
// Patch embedding: sizes and all index maths. No torch.
//
// An image is a clip of T×H×W pixels in C channels, cut into N patches on a grid t×h×w: patches of
// P_t×P_h×P_w pixels, S_t, S_h, S_w apart; K = C·P_t·P_h·P_w values a patch, in that order. Its tokens are R
// prefix tokens and N patches: raster, or the patches of each m×m block one after the other. Patches already
// cut (rows) are an image of N patches whose K values lie side by side.
// The unit of packing is a piece of a band: whole m×m blocks side by side, of one time step.
#pragma once
#include <vector>

#include "../common/numeric.h"

namespace mmkernels::patch_embed {

enum class Edge { exact, pad, crop };

struct Axis {
  int64_t patch, stride;

  // Patches along `size` pixels; -1 if it leaves a rest that `edge` does not allow.
  int64_t count(int64_t size, Edge edge) const {
    if (size == 0) return 0;
    if (edge == Edge::pad) return (size > patch ? ceil_div(size - patch, stride) : 0) + 1;
    if (edge == Edge::exact && (size < patch || (size - patch) % stride)) return -1;
    return size < patch ? 0 : (size - patch) / stride + 1;
  }
};

struct Patch {
  int64_t C;
  Axis t, h, w;
  int64_t merge;  // m
  int64_t R;
  bool prefix_last;

  int64_t K() const { return C * t.patch * h.patch * w.patch; }
  // Place in a patch's K values of its pixel row py in frame pt and channel c.
  int64_t k_of(int64_t c, int64_t pt, int64_t py) const {
    return ((c * t.patch + pt) * h.patch + py) * w.patch;
  }
  bool overlaps() const { return t.stride < t.patch || h.stride < h.patch || w.stride < w.patch; }
};

struct Place { int64_t t, y, x; };  // of a patch on its grid

struct Image {
  const void* pixels;
  int64_t T, H, W;
  int64_t stride_c, stride_t, stride_h, stride_w;  // of the pixels, in elements; of rows, stride_w and stride_c
  int64_t t, h, w;                                 // the grid
  int64_t first_token, first_patch;                // counted through all images
  bool rows;

  int64_t N() const { return t * h * w; }
  int64_t patches_from(const Patch& p) const { return first_token + (p.prefix_last ? 0 : p.R); }
  int64_t prefix_from(const Patch& p) const { return first_token + (p.prefix_last ? N() : 0); }
  Place place(int64_t j, int64_t m) const {
    const int64_t step = j / (h * w), r = j % (h * w), band = r / (m * w), in_band = r % (m * w);
    return {step, band * m + in_band % (m * m) / m, in_band / (m * m) * m + in_band % m};
  }
  int64_t raster(const Place& at) const { return (at.t * h + at.y) * w + at.x; }
  // Offset of pixel row py, frame pt, channel c of the patches at (t, y): the first pixel of column 0.
  int64_t pixel_row(const Patch& p, int64_t c, int64_t step, int64_t pt, int64_t y, int64_t py) const {
    const int64_t frame = min64(step * p.t.stride + pt, T - 1);  // time is padded by its last frame
    return c * stride_c + frame * stride_t + (y * p.h.stride + py) * stride_h;
  }
};

// Blocks [begin, end) of band `band` (m rows of patches) at time step t of an image; of rows, patches [begin, end).
struct Unit {
  int64_t image, t, band, begin, end;

  int64_t patches(const Patch& p, const Image& image) const {
    return (end - begin) * (image.rows ? 1 : p.merge * p.merge);
  }
  // Its first patch within the image.
  int64_t first(const Patch& p, const Image& image) const {
    return image.rows ? begin : ((t * image.h + band * p.merge) * image.w + begin * p.merge * p.merge);
  }
};

// Every patch of all images once, in order, in units of at most about `limit` patches.
inline std::vector<Unit> units_of(const Patch& p, const std::vector<Image>& images, int64_t limit) {
  std::vector<Unit> units;
  for (size_t i = 0; i < images.size(); ++i) {
    const Image& image = images[i];
    const int64_t m = image.rows ? 1 : p.merge, blocks = image.rows ? image.N() : image.w / m;
    const int64_t step = ceil_div(limit, m * m), bands = image.rows ? 1 : image.h / m;
    for (int64_t t = 0; t < (image.rows ? 1 : image.t); ++t)
      for (int64_t band = 0; band < bands; ++band)
        for (int64_t begin = 0; begin < blocks; begin += step)
          units.push_back({static_cast<int64_t>(i), t, band, begin, min64(begin + step, blocks)});
  }
  return units;
}

// Units [begin, end) are multiplied together: `patches` rows of the product.
struct Panel { int64_t begin, end, patches; };

inline std::vector<Panel> panels_of(const Patch& p, const std::vector<Image>& images,
                                    const std::vector<Unit>& units, int64_t limit) {
  std::vector<Panel> panels;
  for (size_t i = 0; i < units.size(); ++i) {
    const int64_t count = units[i].patches(p, images[units[i].image]), at = static_cast<int64_t>(i);
    if (panels.empty() || panels.back().patches + count > limit) panels.push_back({at, at, 0});
    panels.back().end = at + 1, panels.back().patches += count;
  }
  return panels;
}

// pixel · scale + shift, as if in higher precision: scale and shift are each a sum of two floats, so a
// pixel near the mean keeps its relative accuracy (their product's rounding would not cancel).
struct Affine {
  float scale_hi = 1, scale_lo = 0, shift_hi = 0, shift_lo = 0;
  double scale = 1, shift = 0;
  bool identity = true;

  static Affine of(double scale, double shift) {
    Affine a;
    a.scale = scale, a.shift = shift, a.identity = false;
    a.scale_hi = static_cast<float>(scale), a.scale_lo = static_cast<float>(scale - a.scale_hi);
    a.shift_hi = static_cast<float>(shift), a.shift_lo = static_cast<float>(shift - a.shift_hi);
    return a;
  }
  MMK_INLINE float apply(float x) const {
    const float hi = __builtin_fmaf(x, scale_hi, shift_hi), lo = __builtin_fmaf(x, scale_lo, shift_lo);
    return hi - hi == 0 ? hi + lo : hi;  // an infinite pixel stays infinite: its lo may be NaN
  }
  MMK_INLINE double apply(double x) const { return __builtin_fma(x, scale, shift); }
};

}  // namespace mmkernels::patch_embed
