// SPDX-License-Identifier: Apache-2.0
// A call of patch_embed, read from its arguments and checked: how patches are cut, and of which images.
#pragma once
#include <map>
#include <string>

#include "../common/aten.h"
#include "patch_embed.h"
#include "positions.h"

namespace mmkernels::patch_embed {

using Numbers = std::optional<std::vector<double>>;

// The arguments of the op that are not tensors.
struct Layout {
  Sizes stride, sizes;
  Edge edge;
  int64_t merge_size;
  bool prefix_last;
  Mode mode;
  bool align_corners, antialias;
};

struct Plan {
  Patch patch;
  std::vector<Image> images;
  int64_t tokens = 0, patches = 0;
};

Layout layout_of(Sizes stride, Sizes sizes, const std::string& edge, int64_t merge_size, bool prefix_last,
                 const std::string& mode, bool align_corners, bool antialias);

// Throws where an image does not fit; reads shapes, strides and grid_thw, never pixels.
Plan plan_of(const std::vector<Tensor>& images, const Tensor& weight, int64_t prefix_rows,
             const OptionalTensor& grid_thw, const Layout& layout);
// The same images over other memory, contiguous: their gradients.
Plan plan_over(const Plan& plan, const std::vector<Tensor>& images, const Tensor& weight, const Layout& layout);

std::vector<Affine> affines_of(int64_t C, const Numbers& scale, const Numbers& shift);

// A table row that a patch's position takes, times a weight; tables are counted through.
template <class A>
struct Tap { int64_t row; A weight; };

// Positions of a whole grid h×w, resampled beforehand; rows [first_row, first_row + h·w) of all planes.
struct Plane {
  int64_t h, w;
  const Taps *y, *x;
  int64_t first_row;
};

// Which table rows make the position of each patch. Throws where the tables do not reach over a grid.
class Positions {
 public:
  Positions(const Plan& plan, const Sizes& shape, const Layout& layout);
  int64_t taps() const { return taps_; }  // of a patch, at most
  int64_t rows() const { return rows_; }  // of all tables; rows from here on are those of planes
  int64_t columns() const { return columns_; }
  const std::vector<Plane>& planes() const { return planes_; }
  int64_t plane_rows() const { return plane_rows_; }
  // Of image i: how many of its prefix tokens have a position, and the table row of its first.
  int64_t prefix_rows(int64_t i) const { return mode_ == Mode::fixed ? rows_ - plan_.images[i].N() : 0; }
  int64_t first_prefix_row(int64_t i) const { return plan_.patch.prefix_last ? plan_.images[i].N() : 0; }
  // Writes the taps of patch j of image i and returns how many there are.
  template <class A>
  int64_t of(int64_t i, int64_t j, Tap<A>* to) const;

 private:
  void resample_axes(const Layout& layout, const Sizes& shape);

  struct Axes { const Taps *y, *x; int64_t plane; };  // of an image; plane -1: its taps are taken one by one
  const Plan& plan_;
  Mode mode_;
  int64_t taps_ = 0, rows_ = 0, columns_ = 0, plane_rows_ = 0;
  std::map<std::pair<int64_t, int64_t>, Taps> known_;  // of every (grid, table) size that occurs
  std::vector<Axes> axes_;
  std::vector<Plane> planes_;
};

template <class A>
int64_t Positions::of(int64_t i, int64_t j, Tap<A>* to) const {
  if (mode_ == Mode::none) return 0;
  const Image& image = plan_.images[i];
  const Place at = image.place(j, plan_.patch.merge);
  if (mode_ == Mode::fixed) {
    to[0] = {(plan_.patch.prefix_last ? 0 : prefix_rows(i)) + image.raster(at), A(1)};
    return 1;
  }
  if (mode_ == Mode::factorised) {
    to[0] = {at.y, A(1)}, to[1] = {rows_ - columns_ + at.x, A(1)};
    return 2;
  }
  const Axes& axes = axes_[i];
  if (axes.plane >= 0) {
    to[0] = {rows_ + planes_[axes.plane].first_row + at.y * image.w + at.x, A(1)};
    return 1;
  }
  const Taps &y = *axes.y, &x = *axes.x;
  int64_t n = 0;
  for (int64_t a = at.y * y.count; a < (at.y + 1) * y.count; ++a)
    for (int64_t b = at.x * x.count; b < (at.x + 1) * x.count; ++b) {
      const A weight = static_cast<A>(y.weight[a] * x.weight[b]);
      if (weight != 0) to[n++] = {y.index[a] * columns_ + x.index[b], weight};  // 0 · a row of infinities is no 0
    }
  return n;
}

}  // namespace mmkernels::patch_embed
