// SPDX-License-Identifier: Apache-2.0
// A call of patch_embed, read from its arguments and checked: how patches are cut, and of which images.
#pragma once
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

// Which table rows make the position of each patch. Throws where the tables do not reach over a grid.
class Positions {
 public:
  Positions(const Plan& plan, const Sizes& shape, const Layout& layout);
  int64_t taps() const { return taps_; }        // of a patch
  int64_t rows() const { return rows_; }        // of all tables
  int64_t rows_of_prefix() const { return own_; }
  // Of prefix token r (< rows_of_prefix()), its table row.
  int64_t prefix_row(int64_t r) const { return first_of_prefix_ + r; }
  // Writes taps() of patch j of image i.
  template <class A>
  void of(int64_t i, int64_t j, Tap<A>* to) const;

 private:
  const Plan& plan_;
  Mode mode_;
  int64_t taps_ = 0, rows_ = 0, own_ = 0, first_of_prefix_ = 0, first_of_patches_ = 0, columns_ = 0;
  std::vector<Taps> axes_;                               // of every size that occurs
  std::vector<std::pair<int64_t, int64_t>> image_axes_;  // of each image, in axes_
};

template <class A>
void Positions::of(int64_t i, int64_t j, Tap<A>* to) const {
  if (mode_ == Mode::none) return;
  const Image& image = plan_.images[i];
  const Place at = image.place(j, plan_.patch.merge);
  if (mode_ == Mode::fixed) {
    to[0] = {first_of_patches_ + image.raster(at), A(1)};
  } else if (mode_ == Mode::factorised) {
    to[0] = {at.y, A(1)}, to[1] = {first_of_patches_ + at.x, A(1)};
  } else {
    const Taps &y = axes_[image_axes_[i].first], &x = axes_[image_axes_[i].second];
    int64_t n = 0;
    for (int64_t a = at.y * y.count; a < (at.y + 1) * y.count; ++a)
      for (int64_t b = at.x * x.count; b < (at.x + 1) * x.count; ++b)
        to[n++] = {y.index[a] * columns_ + x.index[b], static_cast<A>(y.weight[a] * x.weight[b])};
    for (; n < taps_; ++n) to[n] = {to[0].row, A(0)};  // another image of the call needs more
  }
}

}  // namespace mmkernels::patch_embed
