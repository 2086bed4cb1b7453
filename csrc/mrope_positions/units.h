// SPDX-License-Identifier: Apache-2.0
// Omni models: units of a start token, a picture or audio, and an end token; audio in video interleaved. Host; no torch.
#pragma once
#include "scan.h"

namespace mmkernels::mrope_positions {

// A video's positions and an audio's, in the order of their tokens. Returns the largest of the last part, from where
// transformers goes on.
template <class T>
class Mixer {
 public:
  Mixer(const Piece<T>& video, int64_t sounds, T at, std::vector<T>& made)
      : v_(video.count), a_(sounds), at_(at), made_(made), first_(made.size()), frames_(3 * v_) {
    paint_grid(video, frames_.data(), v_);
    made_.resize(made_.size() + 3 * (v_ + a_));
  }

  // Merged by position in time, video first where they are equal.
  T by_position() {
    int64_t v = 0, a = 0;
    while (v < v_ && a < a_) frames_[v] <= sound(a) ? take_video(v, v + 1), ++v : (take_audio(a, a + 1), ++a);
    return v < v_ ? take_video(v, v_) : take_audio(a, a_);
  }

  // A chunk of video, the same seconds of audio, and so on.
  T by_chunk(int64_t chunk) {
    const auto video = chunks(v_, chunk, [&](int64_t i) { return frames_[i] - at_; });
    const auto audio = chunks(a_, chunk, [&](int64_t i) { return static_cast<T>(i); });
    T last = 0;
    for (size_t i = 1; i < std::max(video.size(), audio.size()); ++i) {
      if (i < video.size()) last = take_video(video[i - 1], video[i]);
      if (i < audio.size()) last = take_audio(audio[i - 1], audio[i]);
    }
    return last;
  }

  T largest() const { return largest_; }

 private:
  T sound(int64_t a) const { return static_cast<T>(a) + at_; }

  T put(int64_t axis, T value) {
    made_[first_ + axis * (v_ + a_) + done_] = value;
    largest_ = std::max(largest_, value);
    return value;
  }
  T take_video(int64_t begin, int64_t end) {
    T last = 0;
    for (int64_t i = begin; i < end; ++i, ++done_)
      for (int64_t axis = 0; axis < 3; ++axis) last = std::max(last, put(axis, frames_[axis * v_ + i]));
    return last;
  }
  T take_audio(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i, ++done_)
      for (int64_t axis = 0; axis < 3; ++axis) put(axis, sound(i));
    return sound(end - 1);
  }
  // Where chunks begin, and the end: one ends before the first token past its time, at most one a token.
  template <class After>
  std::vector<int64_t> chunks(int64_t n, int64_t chunk, const After& after) const {
    std::vector<int64_t> found = {0};
    for (int64_t i = 0; i < n; ++i)
      if (after(i) >= static_cast<T>(static_cast<int64_t>(found.size()) * chunk)) found.push_back(i);
    found.push_back(n);
    return found;
  }

  int64_t v_, a_, done_ = 0;
  T at_, largest_ = 0;
  std::vector<T>& made_;
  int64_t first_;
  std::vector<T> frames_;
};

template <class T>
class Units {
 public:
  Units(const Sample& sample, Media& media, const Rule& rule) : sample_(sample), media_(media), rule_(rule) {}

  Laid<T> lay() {
    int64_t first = 0, done = 0;
    while (first < sample_.count) {
      const int64_t kind = kind_of(first);
      if (kind == kText) {
        no_stray(first++);
        continue;
      }
      text_until(done, first);
      const int64_t markers = kind == kBoth ? 2 : 1;
      put_markers(first, markers);
      at_ += static_cast<T>(rule_.twin_markers ? 1 : markers);
      const int64_t content = first + markers, length = put_content(kind, content);
      if (content + length + markers > sample_.count)
        refuse(sample_.name(), "an end token after every image, video and audio", "its end");
      put_markers(content + length, markers);
      if (!rule_.twin_markers) at_ = static_cast<T>(markers - 1) + at_;
      at_ += static_cast<T>(1);
      first = done = content + length + markers;
    }
    text_until(done, sample_.count);
    return std::move(laid_);
  }

 private:
  int64_t id(int64_t i) const { return i < sample_.count ? sample_.ids[i] : -2; }

  int64_t kind_of(int64_t first) const {
    const int64_t after = id(first + 1);
    if (id(first) == rule_.start_id) {
      if (after == rule_.audio_start_id) return kBoth;
      return after == rule_.image_token_id ? kImage : after == rule_.video_token_id ? kVideo : kText;
    }
    return id(first) == rule_.audio_start_id && after == rule_.audio_token_id ? kAudio : kText;
  }
  void no_stray(int64_t at) const {
    const int64_t token = id(at);
    if (token == rule_.image_token_id || token == rule_.video_token_id || token == rule_.audio_token_id)
      refuse(sample_.name(), "image, video and audio tokens only after their start token",
             text("token ", token, " at ", at));
  }
  void text_until(int64_t done, int64_t end) {
    laid_.pieces.push_back(text_piece(done, end - done, at_));
    at_ += static_cast<T>(end - done);
  }
  void put_markers(int64_t first, int64_t count) {
    for (int64_t i = 0; i < (rule_.twin_markers ? count : 1); ++i)
      laid_.pieces.push_back(text_piece(first + i, rule_.twin_markers ? 1 : count, at_));
  }
  // Lays what is between the markers, moves at_ behind it, returns its tokens.
  int64_t put_content(int64_t kind, int64_t first) {
    const int64_t token = kind == kImage ? rule_.image_token_id : rule_.video_token_id;
    int64_t seen = 0, heard = 0;
    for (int64_t i = first; i < sample_.count; ++i) {
      const bool sound = id(i) == rule_.audio_token_id && (kind == kAudio || kind == kBoth);
      if (!sound && (id(i) != token || kind == kAudio)) break;
      sound ? ++heard : ++seen;
    }
    if (kind == kAudio || kind == kBoth) media_.next_audio(sample_, heard);
    if (kind == kAudio) {
      laid_.pieces.push_back(text_piece(first, heard, at_));
      at_ = laid_.pieces.back().largest() + static_cast<T>(1);
      return heard;
    }
    const int64_t modality = kind == kImage ? kImage : kVideo;
    const Picture p = media_.next(modality, sample_, seen);
    const Piece<T> picture = grid_piece(first, seen, at_, p, media_.time(modality, p));
    if (kind != kBoth) {
      laid_.pieces.push_back(picture);
      at_ = picture.largest() + static_cast<T>(1);
      return seen;
    }
    Piece<T> both = {Brush::copy, first, seen + heard, {}};
    both.other = static_cast<int64_t>(laid_.made.size());
    Mixer<T> mixer(picture, heard, at_, laid_.made);
    const T last = rule_.chunk_seconds ? mixer.by_chunk(rule_.rate * rule_.chunk_seconds) : mixer.by_position();
    both.at[0] = mixer.largest();
    laid_.pieces.push_back(both);
    at_ = last + static_cast<T>(1);
    return seen + heard;
  }

  const Sample& sample_;
  Media& media_;
  const Rule& rule_;
  Laid<T> laid_;
  T at_ = 0;
};

}  // namespace mmkernels::mrope_positions
