// SPDX-License-Identifier: Apache-2.0
// One frame under a temporal weight repeats, so its product is that with the taps summed over time: half the work
// of two frames. In 16 bits the sum rounds, which the repeated frame does not: it may take the place of the pixel's
// rounding, not join it. So bytes to be normalised are taken as whole numbers about their mean, exact in 16 bits, their scale goes
// into the summed weight before it rounds and the rest of the mean into the bias, in fp32. Others are not folded.
#pragma once
#include <cmath>

#include "pack.h"

namespace mmkernels::patch_embed {

// Whether every image is one frame under a weight of several.
inline bool repeats(const Plan& plan) {
  if (plan.patch.t.patch < 2 || plan.images.empty()) return false;
  for (const Image& image : plan.images)
    if (image.T != 1 || image.rows) return false;
  return true;
}

// Whether a patch sticks out of its image: what it takes there is 0 after normalising, which no whole number is.
inline bool padded(const Plan& plan) {
  for (const Image& image : plan.images)
    if ((image.h - 1) * plan.patch.h.stride + plan.patch.h.patch > image.H ||
        (image.w - 1) * plan.patch.w.stride + plan.patch.w.patch > image.W)
      return true;
  return false;
}

// Whether summing the weight adds no rounding.
inline bool may_fold(const Plan& plan, ScalarType weight, ScalarType pixels, const std::vector<Affine>& affines) {
  if (!repeats(plan)) return false;
  if (weight == ScalarType::Float || weight == ScalarType::Double) return true;
  return pixels == ScalarType::Byte && !affines.empty() && !affines[0].identity && !padded(plan);
}

inline Plan without_time(Plan plan) {
  plan.patch.t = {1, 1};
  return plan;
}

// Of a channel of bytes: pixel·scale + shift = (pixel − centre)·step · scale/step + rest.
struct Centred {
  double step = 1, of_weight = 1, rest = 0;
  Affine pixels;

  explicit Centred(const Affine& a) {
    if (a.scale != 0) step = std::ldexp(1.0, std::ilogb(a.scale));  // a power of two: the weight keeps its range
    const double centre = a.scale != 0 ? std::clamp(std::nearbyint(-a.shift / a.scale), 0.0, 255.0) : 0.0;
    of_weight = a.scale / step, rest = a.scale * centre + a.shift;
    pixels = Affine::of(step, -centre * step);
  }
};

// [D, C, 1, P_h, P_w]: of [D, C, P_t, P_h, P_w] the sum over time times of_channel[c], rounded once, to O. And of
// each (d, c) the unrounded sum of all times rest[c], added to bias[d].
template <class T, class O>
Tensor summed_over_time(const Tensor& weight, const std::vector<Centred>& centred, acc_t<T>* bias) {
  const int64_t D = weight.size(0), C = weight.size(1), taps = weight.size(2), area = weight.size(3) * weight.size(4);
  const ScalarType dtype = std::is_same_v<T, O> ? weight.scalar_type() : dtype_of<O>();
  const Tensor to = empty(weight, {D, C, 1, weight.size(3), weight.size(4)}, dtype);
  torch::stable::parallel_for(0, D, 16, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d)
      for (int64_t c = 0; c < C; ++c) {
        const T* from = data<T>(weight) + (d * C + c) * taps * area;
        O* sums = mutable_data<O>(to) + (d * C + c) * area;
        const double times = centred.empty() ? 1 : centred[c].of_weight;
        double all = 0;
        for (int64_t i = 0; i < area; ++i) {
          double sum = 0;
          for (int64_t t = 0; t < taps; ++t) sum += static_cast<double>(widen(from[t * area + i]));
          sums[i] = Convert<O>::from(static_cast<acc_t<O>>(sum * times));
          all += sum;
        }
        if (!centred.empty()) bias[d] += static_cast<acc_t<T>>(all * centred[c].rest);
      }
  });
  return to;
}

// The gradient of each tap from that of their sum.
inline Tensor repeated_over_time(const Tensor& grad, const Tensor& weight) {
  const Tensor to = empty(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3), weight.size(4)});
  const int64_t taps = weight.size(2), bytes = weight.size(3) * weight.size(4) * weight.element_size();
  for (int64_t i = 0; i < weight.size(0) * weight.size(1) * taps; ++i)
    memcpy(static_cast<char*>(to.data_ptr()) + i * bytes, static_cast<const char*>(grad.data_ptr()) + i / taps * bytes,
           bytes);
  return to;
}

}  // namespace mmkernels::patch_embed
