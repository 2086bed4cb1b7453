// SPDX-License-Identifier: Apache-2.0
// Positions of patches as weighted sums of table rows: what F.interpolate does along an axis. No torch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mmkernels::patch_embed {

enum class Mode { none, fixed, nearest, bilinear, bicubic, factorised };

// Of every position along an axis, `count` rows of the table and their weights.
struct Taps {
  int64_t count = 0;
  std::vector<int64_t> index;
  std::vector<double> weight;
};

// Keys' cubic convolution; torch takes a = -0.75, and -0.5 with antialiasing (as Pillow).
inline double cubic(double x, double a) {
  x = std::fabs(x);
  if (x <= 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a : 0;
}
inline double triangle(double x) { return std::max(0.0, 1 - std::fabs(x)); }

// The source place of position i, in table rows.
inline double source_of(int64_t i, int64_t n_out, int64_t n_in, bool align_corners) {
  if (align_corners) return n_out > 1 ? i * (static_cast<double>(n_in - 1) / (n_out - 1)) : 0;
  return (i + 0.5) * n_in / n_out - 0.5;
}

// Where a table is larger than the grid, every position averages all the rows it stands for.
inline Taps antialiased_taps(int64_t n_out, int64_t n_in, bool is_cubic) {
  const double scale = static_cast<double>(n_in) / n_out, stretch = std::max(scale, 1.0);
  const double support = (is_cubic ? 2 : 1) * stretch;
  const auto center = [&](int64_t i) { return scale * (i + 0.5); };
  const auto first = [&](int64_t i) {
    return std::max<int64_t>(0, static_cast<int64_t>(center(i) - support + 0.5));
  };
  const auto end = [&](int64_t i) {
    return std::min<int64_t>(n_in, static_cast<int64_t>(center(i) + support + 0.5));
  };
  Taps taps;
  for (int64_t i = 0; i < n_out; ++i) taps.count = std::max(taps.count, end(i) - first(i));
  for (int64_t i = 0; i < n_out; ++i) {
    std::vector<double> weights(taps.count, 0.0);
    double total = 0;
    for (int64_t j = 0; j < end(i) - first(i); ++j) {
      const double x = (j + first(i) - center(i) + 0.5) / stretch;
      total += weights[j] = is_cubic ? cubic(x, -0.5) : triangle(x);
    }
    for (int64_t j = 0; j < taps.count; ++j) {
      taps.index.push_back(std::min(first(i) + j, n_in - 1));
      taps.weight.push_back(weights[j] / total);
    }
  }
  return taps;
}

inline Taps axis_taps(int64_t n_out, int64_t n_in, Mode mode, bool align_corners, bool antialias) {
  if (antialias) return antialiased_taps(n_out, n_in, mode == Mode::bicubic);
  Taps taps;
  taps.count = mode == Mode::nearest ? 1 : mode == Mode::bilinear ? 2 : 4;
  for (int64_t i = 0; i < n_out; ++i) {
    if (mode == Mode::nearest) {
      taps.index.push_back(i * n_in / n_out), taps.weight.push_back(1);
      continue;
    }
    const double source = source_of(i, n_out, n_in, align_corners), floor = std::floor(source);
    for (int64_t j = 0; j < taps.count; ++j) {
      const int64_t row = static_cast<int64_t>(floor) + j - (mode == Mode::bicubic ? 1 : 0);
      const double distance = source - row;
      taps.index.push_back(std::clamp<int64_t>(row, 0, n_in - 1));  // the border goes on
      taps.weight.push_back(mode == Mode::bicubic ? cubic(distance, -0.75) : triangle(distance));
    }
  }
  return taps;
}

}  // namespace mmkernels::patch_embed
