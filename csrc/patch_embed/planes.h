// SPDX-License-Identifier: Apache-2.0
// Where a grid takes many table rows for a position (antialiasing a large table), the whole plane of positions is
// resampled once, along one axis after the other; its rows then count as table rows of their own.
#pragma once
#include "plan.h"

namespace mmkernels::patch_embed {

// planes[h·w, D] of every plane in `positions`, from the table, columns [d, d + width).
template <class T, class A>
void resample(const Positions& positions, const T* table, A* planes, int64_t D, int64_t d, int64_t width) {
  const int64_t columns = positions.columns();
  std::vector<A> along_y;
  for (const Plane& plane : positions.planes()) {
    along_y.assign(columns * width, A(0));
    for (int64_t y = 0; y < plane.h; ++y) {
      std::fill(along_y.begin(), along_y.end(), A(0));
      for (int64_t a = y * plane.y->count; a < (y + 1) * plane.y->count; ++a)
        for (int64_t x = 0; x < columns; ++x)
          for (int64_t i = 0; i < width; ++i)
            along_y[x * width + i] += static_cast<A>(plane.y->weight[a]) *
                                      widen(table[(plane.y->index[a] * columns + x) * D + d + i]);
      for (int64_t x = 0; x < plane.w; ++x) {
        A* to = planes + (plane.first_row + y * plane.w + x) * D + d;
        std::fill(to, to + width, A(0));
        for (int64_t b = x * plane.x->count; b < (x + 1) * plane.x->count; ++b)
          for (int64_t i = 0; i < width; ++i)
            to[i] += static_cast<A>(plane.x->weight[b]) * along_y[plane.x->index[b] * width + i];
      }
    }
  }
}

// Its transpose: adds the gradients of the planes to the table's.
template <class A>
void resample_backward(const Positions& positions, const A* planes, A* table, int64_t D, int64_t d, int64_t width) {
  const int64_t columns = positions.columns();
  std::vector<A> along_y;
  for (const Plane& plane : positions.planes())
    for (int64_t y = 0; y < plane.h; ++y) {
      along_y.assign(columns * width, A(0));
      for (int64_t x = 0; x < plane.w; ++x)
        for (int64_t b = x * plane.x->count; b < (x + 1) * plane.x->count; ++b)
          for (int64_t i = 0; i < width; ++i)
            along_y[plane.x->index[b] * width + i] +=
                static_cast<A>(plane.x->weight[b]) * planes[(plane.first_row + y * plane.w + x) * D + d + i];
      for (int64_t a = y * plane.y->count; a < (y + 1) * plane.y->count; ++a)
        for (int64_t x = 0; x < columns; ++x)
          for (int64_t i = 0; i < width; ++i)
            table[(plane.y->index[a] * columns + x) * D + d + i] +=
                static_cast<A>(plane.y->weight[a]) * along_y[x * width + i];
    }
}

}  // namespace mmkernels::patch_embed
