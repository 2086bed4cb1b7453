// SPDX-License-Identifier: Apache-2.0
// Multimodal positions on CPU: samples are read by many threads, laid out by one (their pictures follow each other; every
// value is checked here), and painted by many.
#include "../common/aten.h"
#include "canvas.h"
#include "units.h"

namespace mmkernels::mrope_positions {
namespace {

constexpr const char* kOp = "mrope_positions: ";

// Calls f with the values of a tensor of integers.
template <class F>
void with_integers(const char* name, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Long: return f(data<int64_t>(t));
    case ScalarType::Int: return f(data<int32_t>(t));
    case ScalarType::Bool: case ScalarType::Byte: return f(data<uint8_t>(t));
    default: fail(kOp, name, " must be int64, int32, uint8 or bool");
  }
}

std::optional<std::vector<int64_t>> values_of(const char* name, const OptionalTensor& t, int64_t columns) {
  if (!t) return std::nullopt;
  if (t->dim() != (columns > 1 ? 2 : 1) || (columns > 1 && t->size(1) != columns))
    fail(kOp, name, " must be [n", columns > 1 ? ", 3]" : "]");
  std::vector<int64_t> found(t->numel());
  with_integers(name, torch::stable::contiguous(*t), [&](const auto* p) {
    for (size_t i = 0; i < found.size(); ++i) found[i] = static_cast<int64_t>(p[i]);
  });
  return found;
}

std::optional<std::vector<double>> seconds_of(const OptionalTensor& t) {
  if (!t) return std::nullopt;
  const Tensor c = torch::stable::contiguous(*t);
  if (c.scalar_type() == ScalarType::Double) return std::vector<double>(data<double>(c), data<double>(c) + c.numel());
  if (c.scalar_type() != ScalarType::Float) fail(kOp, "second_per_grid_ts must be float32 or float64");
  return std::vector<double>(data<float>(c), data<float>(c) + c.numel());
}

Rule rule_of(const std::vector<int64_t>& family) {
  Rule rule;
  if (family.size() * sizeof(int64_t) != sizeof rule) fail(kOp, "family must be ", sizeof rule / 8, " numbers");
  memcpy(&rule, family.data(), sizeof rule);
  const bool known = rule.scan >= kRuns && rule.scan <= kCanvas && rule.advance >= kSide && rule.advance <= kIndex;
  const bool three = rule.axes == 3 || (rule.axes > 3 && rule.axes < 16 && rule.advance == kIndex && rule.scan == kRuns);
  if (!known || !three || std::min(rule.spatial_merge_size, rule.temporal_merge) < 1 || rule.newline < 0)
    fail(kOp, "family must be a row of families.py");
  return rule;
}

struct Call {
  Tensor input_ids;
  OptionalTensor types, mask;
  std::optional<std::vector<int64_t>> cu_seqlens;
  Rule rule;

  int64_t tokens() const { return input_ids.numel(); }
  int64_t length() const { return input_ids.size(input_ids.dim() - 1); }
  int64_t samples() const {
    if (cu_seqlens) return static_cast<int64_t>(cu_seqlens->size()) - 1;
    return input_ids.dim() == 1 ? 1 : input_ids.size(0);
  }
};

void check(const Call& call) {
  for (const OptionalTensor* t : {&call.types, &call.mask})
    if (*t && (*t)->numel() != call.tokens()) fail(kOp, "mm_token_type_ids and attention_mask must be as input_ids");
  if (!call.cu_seqlens) return;
  const auto& ends = *call.cu_seqlens;
  std::ostringstream got;
  for (size_t i = 0; i < ends.size(); ++i) got << (i ? ", " : "[") << ends[i];
  if (ends.empty() || ends[0] != 0 || ends.back() != call.tokens() || !std::is_sorted(ends.begin(), ends.end()))
    refuse("cu_seqlens", text("0 first, then never smaller, ", call.tokens(), " tokens last"), got.str() + "]");
}

// Which tokens of a row are no padding: those from the first to the last, if there are no others between.
template <class M>
void find_kept(const M* mask, int64_t begin, int64_t length, Sample& sample) {
  int64_t first = 0, last = length, count = 0;
  while (first < length && !mask[begin + first]) ++first;
  while (last > first && !mask[begin + last - 1]) --last;
  for (int64_t i = first; i < last; ++i) count += mask[begin + i] != 0;
  sample.first = begin + first, sample.count = count;
  if (count == last - first) return;
  for (int64_t i = first; i < last; ++i)
    if (mask[begin + i]) sample.places.push_back(begin + i);
}

Sample read_sample(const Call& call, int64_t b) {
  Sample sample;
  sample.number = b;
  if (call.cu_seqlens) {
    sample.first = (*call.cu_seqlens)[b], sample.count = (*call.cu_seqlens)[b + 1] - sample.first;
  } else {
    sample.first = b * call.length(), sample.count = call.length();
    if (call.mask)
      with_integers("attention_mask", *call.mask, [&](const auto* p) { find_kept(p, sample.first, sample.count, sample); });
  }
  if (call.rule.scan != kRuns || !call.types) {
    sample.ids.resize(sample.count);
    with_integers("input_ids", call.input_ids, [&](const auto* p) {
      for (int64_t i = 0; i < sample.count; ++i) sample.ids[i] = static_cast<int64_t>(p[sample.place(i)]);
    });
  }
  if (call.rule.scan == kSpans || call.rule.scan == kUnits) return sample;
  if (call.types) {
    with_integers("mm_token_type_ids", *call.types, [&](const auto* p) {
      find_runs(sample, [&](int64_t i) { return static_cast<int64_t>(p[sample.place(i)]); });
    });
  } else {
    TypeOf type{call.rule};
    find_runs(sample, [&](int64_t i) { return type(sample.ids[i]); });
  }
  return sample;
}

template <class T>
Laid<T> lay(const Sample& sample, Media& media, const Rule& rule, bool bare) {
  for (const Run& run : sample.runs)
    if (run.kind < kText || run.kind > kVideo)
      refuse(text("mm_token_type_ids of sample ", sample.number), "0 (text), 1 (image) or 2 (video)", text(run.kind));
  if (bare) return {{text_piece(0, sample.count, T(0))}, {}};
  switch (rule.scan) {
    case kSpans: return lay_spans<T>(sample, media, rule);
    case kUnits: return Units<T>(sample, media, rule).lay();
    case kCanvas: return Canvas<T>(sample, media, rule).lay();
    default: return lay_runs<T>(sample, media, rule);
  }
}

// Where pieces overlap, what counts is what can be seen in the end.
template <class T>
T largest_of(const Laid<T>& laid, const Rule& rule, const T* rows, int64_t stride, int64_t count) {
  T found = 0;
  if (rule.scan == kCanvas || rule.advance == kIndex) {
    for (int64_t a = 0; a < rule.axes; ++a)
      for (int64_t i = 0; i < count; ++i) found = std::max(found, rows[a * stride + i]);
    return found;
  }
  for (const Piece<T>& piece : laid.pieces)
    if (piece.count) found = std::max(found, piece.brush == Brush::copy ? piece.at[0] : piece.largest());
  return found;
}

template <class T>
struct Output {
  T *positions, *deltas;  // [axes (+ 1), tokens], [samples]
  int64_t pad;
  bool bare;
};

template <class T>
void paint_sample(const Call& call, const Sample& sample, const Laid<T>& laid, const Output<T>& out) {
  const int64_t N = call.tokens(), n = sample.count, axes = call.rule.axes, L = call.length();
  T* rows = out.positions + (call.cu_seqlens ? N : 0);
  if (call.cu_seqlens) ramp(out.positions + sample.first, n, T(0));
  std::vector<T> listed(sample.places.empty() ? 0 : axes * n);
  T* at = listed.empty() ? rows + sample.first : listed.data();
  const int64_t stride = listed.empty() ? N : n;
  for (const Piece<T>& piece : laid.pieces) paint(piece, laid.made, axes, at, stride);
  T largest = largest_of(laid, call.rule, at, stride, n);
  if (call.mask) {
    const int64_t begin = sample.number * L, end = begin + L, behind = sample.first + n;
    for (int64_t a = 0; a < axes; ++a) {
      T* row = rows + a * N;
      fill(row + begin, listed.empty() ? sample.first - begin : L, static_cast<T>(out.pad));
      if (listed.empty()) fill(row + behind, end - behind, static_cast<T>(out.pad));
      for (size_t i = 0; i < sample.places.size(); ++i) row[sample.places[i]] = listed[a * n + i];
    }
  }
  if (out.bare && n < L && call.mask) largest = std::max(largest, T(1));  // of the padding
  const bool none = call.rule.pictures_per_sample || (n == 0 && largest == 0);
  out.deltas[sample.number] = none ? T(0) : largest + T(1) - static_cast<T>(n);
}

template <class T>
std::tuple<Tensor, Tensor> run(const Call& call, Media& media) {
  const int64_t B = call.samples(), packed = call.cu_seqlens ? 1 : 0;
  const bool bare = call.rule.scan == kUnits && media.empty();  // transformers then counts the mask, padding at 1
  std::vector<Sample> samples(B);
  std::vector<Laid<T>> laid(B);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) samples[b] = read_sample(call, b);
  });
  for (int64_t b = 0; b < B; ++b) {
    media.begin(b, packed);
    laid[b] = lay<T>(samples[b], media, call.rule, bare);
  }
  media.end();
  Sizes shape(call.input_ids.sizes().begin(), call.input_ids.sizes().end());
  shape.insert(shape.begin(), call.rule.axes + packed);
  const ScalarType dtype = call.rule.fractional ? ScalarType::Float : ScalarType::Long;
  Tensor positions = empty(call.input_ids, shape, dtype), deltas = empty(call.input_ids, {B, 1}, dtype);
  const Output<T> out{mutable_data<T>(positions), mutable_data<T>(deltas), bare ? 1 : call.rule.pad, bare};
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) paint_sample(call, samples[b], laid[b], out);
  });
  return {positions, deltas};
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& input_ids, const OptionalTensor& types, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
    const OptionalTensor& image_grid, const OptionalTensor& video_grid, const OptionalTensor& seconds,
    const OptionalTensor& audio_seqlens, const OptionalTensor& images_per_sample, std::vector<int64_t> family) {
  const Call call{torch::stable::contiguous(input_ids), contiguous(types), contiguous(mask),
                  values_of("cu_seqlens", cu_seqlens, 1), rule_of(family)};
  check(call);
  Media media(call.rule);
  media.image.rows = values_of("image_grid_thw", image_grid, 3);
  media.video.rows = values_of("video_grid_thw", video_grid, 3);
  media.audio = values_of("audio_seqlens", audio_seqlens, 1);
  media.per_sample = values_of("images_per_sample", images_per_sample, 1);
  media.seconds = seconds_of(seconds);
  media.seconds_are_float = !seconds || seconds->scalar_type() == ScalarType::Float;
  media.check(call.samples());
  return call.rule.fractional ? run<float>(call, media) : run<int64_t>(call, media);
}

}  // namespace
}  // namespace mmkernels::mrope_positions

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("mrope_positions", TORCH_BOX(&mmkernels::mrope_positions::forward));
}
