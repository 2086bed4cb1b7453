// SPDX-License-Identifier: Apache-2.0
// MiniCPM-V 4.7: a thumbnail and its slices lie on one canvas, their markers at its corners; canvas.py says how.
// Later pieces paint over earlier ones. Host; no torch.
#pragma once
#include "scan.h"

namespace mmkernels::mrope_positions {

template <class T>
class Canvas {
 public:
  Canvas(const Sample& sample, Media& media, const Rule& rule) : sample_(sample), media_(media), rule_(rule) {}

  Laid<T> lay() {
    int64_t done = 0;
    T at = 0;
    find_frames();
    for (const Frame& frame : frames_) {
      const int64_t start = frame.thumb.first - 1;
      if (start > done) {
        laid_.pieces.push_back(text_piece(done, start - done, at));
        at += static_cast<T>(start - done + (frame.begins ? 0 : 1));  // within a group, one step more
      }
      done = frame.end;
      at += lay_frame(frame, at);
    }
    laid_.pieces.push_back(text_piece(done, sample_.count - done, at));
    return std::move(laid_);
  }

 private:
  struct Frame {
    Run thumb;
    std::vector<Run> slices;
    bool begins;       // a group of frames with nothing but markers between them
    int64_t end = 0;   // behind the markers that follow
  };

  bool markers(int64_t first, int64_t end) const {
    for (; first < end; ++first)
      if (!rule_.is_marker(sample_.ids[first])) return false;
    return true;
  }
  void find_frames() {
    int64_t done = 0;
    for (const Run& run : sample_.runs) {
      if (run.kind == kText) continue;
      if (run.first == 0) refuse(sample_.name(), "a start token before an image", "an image token first");
      if (!frames_.empty() && sample_.ids[run.first - 1] == rule_.slice_start_id) {
        frames_.back().slices.push_back(run);
      } else {
        frames_.push_back({run, {}, frames_.empty() || !markers(done, run.first - 1)});
      }
      done = run.first + run.count;
      int64_t& end = frames_.back().end;
      for (end = done; end < sample_.count && rule_.is_marker(sample_.ids[end]);) ++end;
    }
  }

  // Slices in a row: up to the first gap wider than an end and a start token; one row if that does not divide.
  static int64_t columns_of(const std::vector<Run>& slices) {
    const int64_t n = static_cast<int64_t>(slices.size());
    for (int64_t k = 0; k + 1 < n; ++k)
      if (gap(slices, k) > 2) return n % (k + 1) == 0 ? k + 1 : n;
    return n;
  }
  static int64_t gap(const std::vector<Run>& slices, int64_t k) {
    return slices[k + 1].first - slices[k].first - slices[k].count;
  }

  void level(int64_t first, int64_t count, T time, T row, T column) {
    laid_.pieces.push_back({Brush::level, first, count, {time, row, column}});
  }
  void crop(const Run& run, const Picture& p, T at, T row, T column, int64_t high, int64_t wide) {
    Piece<T> piece = {Brush::grid, run.first, run.count, {at, row, column}, p, {}};
    piece.time.step = 0;
    piece.high = high, piece.wide = wide;
    laid_.pieces.push_back(piece);
  }

  // Lays the frame's tokens; returns how far text goes on.
  T lay_frame(const Frame& frame, T at) {
    const auto& [thumb, slices, begins, end] = frame;
    const int64_t n = static_cast<int64_t>(slices.size()), columns = columns_of(slices);
    const Picture whole = media_.next(thumb.kind, sample_, thumb.count);
    std::vector<Picture> crops;
    for (const Run& slice : slices) crops.push_back(media_.next(thumb.kind, sample_, slice.count));
    const int64_t h = n ? crops[0].h : whole.h, w = n ? crops[0].w : whole.w;
    const int64_t high = n ? n / columns * h : h, wide = n ? columns * w : w;
    const int64_t stop = thumb.first + thumb.count;
    level(thumb.first - 1, end - thumb.first + 1, at, at, at);
    const T before = at > T(1) ? at - T(1) : T(0);
    level(thumb.first - 1, 1, at, before, before);
    if (stop < end) level(stop, 1, at, at + static_cast<T>(high), at + static_cast<T>(wide));
    crop(thumb, whole, at, at, at, high, wide);
    for (int64_t k = 0; k < n; ++k) {
      const T row = at + static_cast<T>(k / columns * h), column = at + static_cast<T>(k % columns * w);
      const int64_t behind = slices[k].first + slices[k].count;
      level(slices[k].first - 1, 1, at, row, column);
      crop(slices[k], crops[k], at, row, column, 0, 0);
      if (behind < end)
        level(behind, 1, at, row + static_cast<T>(crops[k].h - 1), column + static_cast<T>(crops[k].w - 1));
      if (k + 1 < n && gap(slices, k) > 2)  // the newline that ends a row of slices
        level(behind + 1, gap(slices, k) - 2, at, at + static_cast<T>((k / columns + 1) * h - 1),
              at + static_cast<T>(columns * w));
    }
    return static_cast<T>(std::max(high, wide) + 1);
  }

  const Sample& sample_;
  Media& media_;
  const Rule& rule_;
  Laid<T> laid_;
  std::vector<Frame> frames_;
};

}  // namespace mmkernels::mrope_positions
