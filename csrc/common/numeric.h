// SPDX-License-Identifier: Apache-2.0
// bfloat16 and float16 as bits, and their conversions, for host and device. No torch.
#pragma once
#include <cmath>
#include <cstring>

#include "host_device.h"

namespace mmkernels {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

MMK_HD uint32_t float_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
MMK_HD float bits_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

template <class To> struct Convert;  // Convert<T>::from(float): round to nearest even
template <> struct Convert<float> { MMK_HD static float from(float x) { return x; } };
template <> struct Convert<double> { MMK_HD static double from(double x) { return x; } };
template <> struct Convert<bf16> {
  MMK_HD static bf16 from(float x) {
    const uint32_t u = float_bits(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
  }
};
template <> struct Convert<f16> {
  // Adding a power of two far above x lets the fp32 adder do the rounding (as in Marat Dukhan's FP16).
  MMK_HD static f16 from(float x) {
    const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, shifted = u + u;
    float base = (bits_float(u & 0x7fffffffu) * bits_float(0x77800000u)) * bits_float(0x08800000u);
    const uint32_t exponent = shifted & 0xff000000u, bias = exponent < 0x71000000u ? 0x71000000u : exponent;
    base = bits_float((bias >> 1) + 0x07800000u) + base;
    const uint32_t r = float_bits(base);
    const uint32_t magnitude = ((r >> 13) & 0x7c00u) + (r & 0x0fffu), is_nan = 0u - (shifted > 0xff000000u);
    return {static_cast<uint16_t>(sign | (0x7e00u & is_nan) | (magnitude & ~is_nan))};
  }
};

MMK_HD float widen(float x) { return x; }
MMK_HD double widen(double x) { return x; }
MMK_HD float widen(uint8_t x) { return static_cast<float>(x); }
MMK_HD float widen(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
MMK_HD float widen(f16 x) {
  const uint32_t w = static_cast<uint32_t>(x.bits) << 16, sign = w & 0x80000000u, two_w = w + w;
  const float normal = bits_float((two_w >> 4) + (0xe0u << 23)) * bits_float(0x07800000u);
  const float tiny = bits_float((two_w >> 17) | (126u << 23)) - 0.5f;
  const uint32_t is_tiny = 0u - (two_w < (1u << 27));  // a mask, as compilers do not vectorise the choice of a float
  return bits_float(sign | (float_bits(tiny) & is_tiny) | (float_bits(normal) & ~is_tiny));
}

// The type sums of T run in.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <class T> using acc_t = typename Accumulate<T>::type;

}  // namespace mmkernels
