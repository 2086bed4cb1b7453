// SPDX-License-Identifier: Apache-2.0
// What a batch holds: the tokens of its samples, and the pictures and audio they stand for, one after the other. Every
// value is checked here, before a position is written. Host; no torch.
#pragma once
#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "mrope_positions.h"

namespace mmkernels::mrope_positions {

template <class... Args>
std::string text(const Args&... args) {
  std::ostringstream out;
  ((out << args), ...);
  return out.str();
}
[[noreturn]] inline void refuse(const std::string& argument, const std::string& expected, const std::string& got) {
  throw std::runtime_error("mrope_positions: " + argument + " must be " + expected + ", got " + got);
}

constexpr int64_t kLargest = 1 << 20;  // of a grid: t·h·w must not overflow

struct Run { int64_t kind, first, count; };

// The tokens that are not padding: places first, first + 1, …, or those listed.
struct Sample {
  int64_t number = 0, first = 0, count = 0;
  std::vector<int64_t> places, ids;  // ids only where the rule asks for them
  std::vector<Run> runs;

  int64_t place(int64_t i) const { return places.empty() ? first + i : places[i]; }
  std::string name() const { return text("input_ids of sample ", number); }
};

struct Grid {
  const char *name, *argument;
  std::optional<std::vector<int64_t>> rows;  // [n, 3]
  std::vector<Picture> pictures;
  size_t at = 0;

  int64_t size() const { return rows ? static_cast<int64_t>(rows->size()) / 3 : 0; }
  std::string row(int64_t i) const {
    return text("[", (*rows)[3 * i], ", ", (*rows)[3 * i + 1], ", ", (*rows)[3 * i + 2], "]");
  }
};

class Media {
 public:
  Grid image{"image", "image_grid_thw", {}, {}}, video{"video", "video_grid_thw", {}, {}};
  std::optional<std::vector<int64_t>> audio, per_sample;
  std::optional<std::vector<double>> seconds;
  bool seconds_are_float = true;
  int64_t number = 0;  // of the next picture

  explicit Media(const Rule& rule) : rule_(rule) {}
  bool empty() const { return !image.rows && !video.rows; }
  Grid& of(int64_t kind) { return kind == kImage ? image : video; }

  void check(int64_t samples) {
    check_grid(image, 1, 0);
    check_grid(video, rule_.temporal_merge, rule_.frames);
    check_per_sample(samples);
    for (const double s : seconds.value_or(std::vector<double>{}))
      if (!(std::abs(s) < 1e9)) refuse("second_per_grid_ts", "finite numbers", text(s));
    if (video.rows && seconds && static_cast<int64_t>(seconds->size()) != video.size())
      refuse("second_per_grid_ts", text(video.size(), " numbers, one a video"), text(seconds->size()));
  }

  // Before a sample: packed ones start their pictures' numbers anew; GLM-Image's rows are counted by sample.
  void begin(int64_t sample, bool packed) {
    if (packed) number = 0;
    if (rule_.scan != kSpans) return;
    image.at = 0;
    limit_ = image.pictures.size();
    if (!per_sample) return;
    for (int64_t i = 0; i < sample; ++i) image.at += (*per_sample)[i];
    limit_ = image.at + (*per_sample)[sample];
  }

  // The next picture, of `tokens` tokens or `markers` more.
  Picture next(int64_t kind, const Sample& sample, int64_t tokens, int64_t markers = 0) {
    Grid& grid = of(kind);
    if (grid.at >= (rule_.scan == kSpans ? limit_ : grid.pictures.size()))
      refuse(grid.argument, text("a row for every ", grid.name, " (sample ", sample.number, " has one more)"),
             grid.rows ? text(grid.size(), " rows") : "None");
    const Picture p = grid.pictures[grid.at++];
    const int64_t expected = p.t * p.h * p.w;
    if (tokens != expected && tokens != expected + markers)
      refuse(sample.name(), text(expected, " ", grid.name, " tokens in a row (", grid.argument, "[", p.row, "] = ",
                                 grid.row(p.row), ")"), text(tokens));
    ++number;
    return p;
  }

  Time time(int64_t kind, const Picture& p) const {
    Time time;
    if (rule_.scan == kUnits) {
      if (kind == kVideo && !seconds) refuse("second_per_grid_ts", "one number a video", "None");
      time.step = static_cast<double>(rule_.rate);
      if (kind == kVideo) time = {Time::in_float, (*seconds)[p.row], rule_.rate};
    } else if (kind == kVideo && rule_.rate) {
      time.step = static_cast<double>(rule_.rate);
      if (seconds) time = {seconds_are_float ? Time::in_float : Time::in_double, (*seconds)[p.row], 1};
    }
    return time;
  }

  // Checks the tokens of the next audio.
  void next_audio(const Sample& sample, int64_t tokens) {
    if (!audio || audio_at_ >= audio->size())
      refuse("audio_seqlens", text("a number for every audio (sample ", sample.number, " has one more)"),
             audio ? text(audio->size(), " numbers") : "None");
    const std::string name = text("audio_seqlens[", audio_at_, "]");
    const int64_t length = (*audio)[audio_at_++], expected = audio_tokens(length, rule_.audio_window);
    if (length < 0 || length >= int64_t{1} << 31 || expected < 1)
      refuse(name, "long enough for a token, below 2^31", text(length));
    if (tokens != expected)
      refuse(sample.name(), text(expected, " audio tokens in a row (", name, " = ", length, ")"), text(tokens));
  }

  // Every row was taken, but for those of images yet to be generated.
  void end() const {
    if (rule_.pictures_per_sample || (rule_.scan == kUnits && empty())) return;
    for (const Grid* grid : {&image, &video}) {
      if (grid->at == grid->pictures.size()) continue;
      const int64_t taken = grid->at ? grid->pictures[grid->at - 1].row + 1 : 0;
      refuse(grid->argument, text("as many as input_ids has ", grid->name, "s, ", taken, " rows"), text(grid->size()));
    }
    if (audio && rule_.scan == kUnits && audio_at_ != audio->size())
      refuse("audio_seqlens", text("as many as input_ids has audios, ", audio_at_, " numbers"), text(audio->size()));
  }

 private:
  void check_per_sample(int64_t samples) const {
    if (!per_sample || rule_.scan != kSpans) return;
    int64_t sum = 0;
    for (const int64_t n : *per_sample) {
      if (n < 0 || n > image.size()) refuse("images_per_sample", text("numbers of at most ", image.size()), text(n));
      sum += n;
    }
    if (static_cast<int64_t>(per_sample->size()) != samples || sum != image.size())
      refuse("images_per_sample", text(samples, " numbers, ", image.size(), " rows of image_grid_thw in all"),
             text(per_sample->size(), " numbers, ", sum, " in all"));
  }
  void check_grid(Grid& grid, int64_t every, bool frames) {
    const int64_t m = rule_.spatial_merge_size;
    for (int64_t i = 0; i < grid.size(); ++i) {
      const int64_t *row = grid.rows->data() + 3 * i, t = row[0], h = row[1], w = row[2];
      if (std::min({t, h, w}) < 1 || std::max({t, h, w}) > kLargest || h % m || w % m || t % every)
        refuse(text(grid.argument, "[", i, "]"),
               text("t, h, w from 1 to 2^20, h and w multiples of ", m, ", t of ", every), grid.row(i));
      const Picture p = {frames || rule_.advance == kIndex ? 1 : t / every, h / m, w / m + rule_.newline, i};
      grid.pictures.insert(grid.pictures.end(), frames ? t / every : 1, p);
    }
  }

  const Rule& rule_;
  size_t limit_ = 0, audio_at_ = 0;
};

}  // namespace mmkernels::mrope_positions
