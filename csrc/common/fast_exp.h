// SPDX-License-Identifier: Apache-2.0
// The exponential of a softmax. Host; no torch.
#pragma once
#include "numeric.h"

namespace mmkernels {

// exp to 1 ulp for x <= 0 (and NaN for NaN), written so that the compiler vectorises it.
MMK_INLINE float fast_exp(float x) {
  const float clamped = x < -104.0f ? -104.0f : x;
  const float k = __builtin_rintf(clamped * 1.44269504f);
  float r = __builtin_fmaf(k, -0.693359375f, clamped);
  r = __builtin_fmaf(k, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r + 1.0f);
  // 2^k in two steps, so that a subnormal result is rounded and not flushed.
  const int32_t e = static_cast<int32_t>(k), half = e / 2;
  const float a = bits_float(static_cast<uint32_t>(half + 127) << 23);
  const float b = bits_float(static_cast<uint32_t>(e - half + 127) << 23);
  const float y = p * a * b;
  return x != x ? x : (x < -104.0f ? 0.0f : y);
}
MMK_INLINE double fast_exp(double x) { return __builtin_exp(x); }

}  // namespace mmkernels
