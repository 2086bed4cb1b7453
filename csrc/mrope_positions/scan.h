// SPDX-License-Identifier: Apache-2.0
// How the tokens of a sample become pieces: runs of token types, or spans between token ids. Host; no torch.
#pragma once
#include "media.h"

namespace mmkernels::mrope_positions {

template <class T>
struct Laid {
  std::vector<Piece<T>> pieces;
  std::vector<T> made;  // positions of the pieces that are copied
};

// Types by token id, as a processor gives them; between a video's two tokens an image token is a video's.
struct TypeOf {
  const Rule& rule;
  int64_t inside = 0;
  int64_t operator()(int64_t id) {
    if (rule.video_start_id >= 0) inside += (id == rule.video_start_id) - (id == rule.video_end_id);
    if (id == rule.image_token_id) return inside > 0 ? kVideo : kImage;
    return id == rule.video_token_id ? kVideo : kText;
  }
};

template <class Type>
void find_runs(Sample& sample, Type&& type) {
  for (int64_t i = 0; i < sample.count; ++i) {
    const int64_t kind = type(i);
    if (sample.runs.empty() || sample.runs.back().kind != kind) sample.runs.push_back({kind, i, 0});
    ++sample.runs.back().count;
  }
}

template <class T>
Piece<T> text_piece(int64_t first, int64_t count, T at) {
  return {Brush::ramp, first, count, {at, at, at}};
}
template <class T>
Piece<T> grid_piece(int64_t first, int64_t count, T at, const Picture& picture, const Time& time) {
  return {Brush::grid, first, count, {at, at, at}, picture, time};
}

template <class T>
Laid<T> lay_indexed(const Sample& sample, Media& media) {
  Laid<T> laid;
  for (const Run& run : sample.runs) {
    laid.pieces.push_back(text_piece(run.first, run.count, static_cast<T>(run.first)));
    if (run.kind != kImage || !media.image.rows) continue;
    Piece<T>& piece = laid.pieces.back();
    piece.brush = Brush::index;
    piece.other = media.number;
    piece.picture = media.next(kImage, sample, run.count, 2);
  }
  return laid;
}

template <class T>
Laid<T> lay_runs(const Sample& sample, Media& media, const Rule& rule) {
  if (rule.advance == kIndex) return lay_indexed<T>(sample, media);
  Laid<T> laid;
  T at = 0;
  for (const Run& run : sample.runs) {
    if (run.kind == kText) {
      laid.pieces.push_back(text_piece(run.first, run.count, at));
      at += static_cast<T>(run.count);
      continue;
    }
    const Picture p = media.next(run.kind, sample, run.count);
    const int64_t side = std::max(p.h, p.w);
    laid.pieces.push_back(grid_piece(run.first, run.count, at, p, media.time(run.kind, p)));
    if (rule.advance == kBlock) laid.pieces.back().block = side;
    at += static_cast<T>(rule.advance == kBlock ? p.t * side : side);
  }
  return laid;
}

template <class T>
Laid<T> lay_spans(const Sample& sample, Media& media, const Rule& rule) {
  Laid<T> laid;
  T at = 0;
  int64_t done = 0, start = 0, end = 0;
  const auto find = [&](int64_t from, int64_t id) {
    while (from < sample.count && sample.ids[from] != id) ++from;
    return from;
  };
  if (media.image.rows)
    for (start = find(0, rule.start_id) + 1, end = find(0, rule.end_id); start <= sample.count && end < sample.count;
         start = find(start, rule.start_id) + 1, end = find(end + 1, rule.end_id)) {
      if (start < done || end < start)
        refuse(sample.name(), "images' start and end tokens in turn", text("tokens ", start - 1, " and ", end));
      laid.pieces.push_back(text_piece(done, start - done, at));
      at += static_cast<T>(start - done);
      const Picture p = media.next(kImage, sample, end - start);
      laid.pieces.push_back(grid_piece(start, end - start, at, p, media.time(kImage, p)));
      at += static_cast<T>(std::max(p.h, p.w));
      done = end;
    }
  laid.pieces.push_back(text_piece(done, sample.count - done, at));
  return laid;
}

}  // namespace mmkernels::mrope_positions
