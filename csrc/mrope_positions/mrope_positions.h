// SPDX-License-Identifier: Apache-2.0
// Multimodal positions: the rule of a family, and the pieces a sample's positions are painted with. Host; no torch.
//
// A piece covers `count` tokens from `first` on. Arithmetic is in T: int64_t, or float for the family whose time has
// fractions; there every sum is one of transformers'.
#pragma once
#include <cstring>
#include <vector>

#include "../common/numeric.h"

namespace mmkernels::mrope_positions {

enum Scan : int64_t { kRuns, kSpans, kUnits, kCanvas };
enum Advance : int64_t { kSide, kBlock, kIndex };
enum Kind : int64_t { kText, kImage, kVideo, kAudio, kBoth };

// A row of families.py, in its order.
struct Rule {
  int64_t scan, advance, axes, frames, newline, temporal_merge, rate, fractional, pad, pictures_per_sample,
      twin_markers, chunk_seconds, audio_window, spatial_merge_size, image_token_id, video_token_id, audio_token_id,
      start_id, end_id, audio_start_id, video_start_id, video_end_id, slice_start_id, slice_end_id, newline_id;

  bool is_marker(int64_t id) const {
    return id == slice_start_id || id == slice_end_id || id == start_id || id == end_id || id == newline_id;
  }
};

// An image, a video or one of its frames: tokens along time, height and width (a newline among them), its grid's row.
struct Picture { int64_t t, h, w, row; };

// What the audio encoder's convolutions leave of so many frames.
inline int64_t audio_tokens(int64_t length, int64_t window) {
  const auto halved = [](int64_t n) { return (n - (n < 0)) / 2; };  // towards minus infinity, as Python's n // 2
  if (window == 0) return halved(halved(length - 1) + 1 - 2) + 1;
  const int64_t chunk = window * 2, whole = length / chunk, rest = length % chunk;
  return halved(halved(halved(rest - 1) + 1 - 1) + 1 - 1) + 1 + whole * 13;
}

// A product that is rounded before anything is added to it: inlined, the compiler might fuse the two.
template <class F>
__attribute__((noinline)) F product(F a, F b) { return a * b; }

// Where along time frame k is: k·step; in float or double as the seconds came, (k·step)·rate in units.
struct Time {
  enum Precision { whole, in_float, in_double } precision = whole;
  double step = 1;
  int64_t rate = 1;

  template <class T>
  T of(int64_t k) const {
    if (precision == whole) return static_cast<T>(k * static_cast<int64_t>(step));
    if (precision == in_double) return static_cast<T>(static_cast<double>(k) * step);
    const float seconds = product(static_cast<float>(k), static_cast<float>(step));
    return static_cast<T>(rate == 1 ? seconds : product(seconds, static_cast<float>(rate)));
  }
};

// Place i of n spread evenly over `over` places, rounded half to even, as torch.linspace(0, over - 1, n).round().
inline int64_t spread(int64_t i, int64_t n, int64_t over) {
  if (n < 2 || n == over) return i;
  const float end = static_cast<float>(over - 1), step = end / static_cast<float>(n - 1);
  const float at = i < n / 2 ? product(step, static_cast<float>(i)) : end - product(step, static_cast<float>(n - i - 1));
  return static_cast<int64_t>(std::nearbyint(at));
}

// ramp: one more each token, on every axis. grid: time, row, column. index: a ramp whose inner tokens have column, row
// and number on the last three axes. level: the same for every token. copy: positions made elsewhere, [3, count].
enum class Brush { ramp, grid, index, level, copy };

template <class T>
struct Piece {
  Brush brush;
  int64_t first, count;
  T at[3];
  Picture picture = {};
  Time time = {};
  int64_t block = 0;           // grid: positions on all axes from one frame to the next
  int64_t high = 0, wide = 0;  // grid: where they are not 0, rows and columns are spread over so many
  int64_t other = 0;           // index: number of the picture; copy: where its positions begin

  T last_time() const {
    const T end = time.of<T>(picture.t - 1);
    return end > T(0) ? end : T(0);
  }
  // The largest position of a ramp or a grid.
  T largest() const {
    if (brush == Brush::ramp) return static_cast<T>(count - 1) + at[0];
    T found = block ? static_cast<T>((picture.t - 1) * block) + at[0] : last_time() + at[0];
    const int64_t behind = block * (picture.t - 1);
    for (const T side : {static_cast<T>(picture.h - 1 + behind) + at[1], static_cast<T>(picture.w - 1 + behind) + at[2]})
      found = side > found ? side : found;
    return found;
  }
};

template <class T>
void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}
template <class T>
void ramp(T* to, int64_t count, T start) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(i) + start;
}

// Rows of positions: axis a of token i is at rows[a * stride + i].
template <class T>
void paint_grid(const Piece<T>& piece, T* rows, int64_t stride) {
  const Picture& p = piece.picture;
  T *time = rows, *row = rows + stride, *column = rows + 2 * stride;
  for (int64_t k = 0; k < p.t; ++k) {
    const int64_t behind = k * piece.block, frame = p.h * p.w;
    fill(time, frame, (piece.block ? static_cast<T>(behind) : piece.time.template of<T>(k)) + piece.at[0]);
    for (int64_t y = 0; y < p.h; ++y) {
      const int64_t place = piece.high ? spread(y, p.h, piece.high) : y;
      fill(row + y * p.w, p.w, static_cast<T>(place + behind) + piece.at[1]);
    }
    for (int64_t x = 0; x < p.w; ++x)
      column[x] = static_cast<T>((piece.wide ? spread(x, p.w, piece.wide) : x) + behind) + piece.at[2];
    for (int64_t y = 1; y < p.h; ++y) memcpy(column + y * p.w, column, p.w * sizeof(T));
    time += frame, row += frame, column += frame;
  }
}

template <class T>
void paint(const Piece<T>& piece, const std::vector<T>& made, int64_t axes, T* rows, int64_t stride) {
  rows += piece.first;
  const int64_t n = piece.count;
  if (piece.brush == Brush::ramp || piece.brush == Brush::index)
    for (int64_t a = 0; a < axes; ++a) ramp(rows + a * stride, n, piece.at[0]);
  if (piece.brush == Brush::grid) paint_grid(piece, rows, stride);
  if (piece.brush == Brush::level)
    for (int64_t a = 0; a < 3; ++a) fill(rows + a * stride, n, piece.at[a]);
  if (piece.brush == Brush::copy)
    for (int64_t a = 0; a < 3; ++a) memcpy(rows + a * stride, made.data() + piece.other + a * n, n * sizeof(T));
  if (piece.brush != Brush::index) return;
  const int64_t h = piece.picture.h, w = piece.picture.w;
  T* column = rows + (axes - 3) * stride + (n - h * w) / 2;  // within a start and an end token, if they are there
  for (int64_t y = 0; y < h; ++y) {
    ramp(column + y * w, w, T(0));
    fill(column + stride + y * w, w, static_cast<T>(y));
    fill(column + 2 * stride + y * w, w, static_cast<T>(piece.other));
  }
}

}  // namespace mmkernels::mrope_positions
