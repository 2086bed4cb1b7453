// SPDX-License-Identifier: Apache-2.0
// Rotary positions and the paged write: angles, pairs of channels, slots, what a cache holds. Host and device; no torch.
//
// A pair of channels turns together: (i, i + r/2) or (2i, 2i + 1). Its channels have an angle each, of their own axis
// and frequency; in most models the two are equal.
#pragma once
#include "../common/numeric.h"

namespace mmkernels::rope {

struct f8e4m3 { uint8_t bits; };

struct Pairs {
  int64_t count;  // r/2
  bool adjacent;

  MMK_HD int64_t first(int64_t i) const { return adjacent ? 2 * i : i; }
  MMK_HD int64_t second(int64_t i) const { return adjacent ? 2 * i + 1 : i + count; }
};

// transformers' angle: position and product in fp32.
MMK_HD float angle_of(int64_t position, float inv_freq) { return static_cast<float>(position) * inv_freq; }

struct CosSin { double cos, sin; };

constexpr double kLargestAngle = 4.0e8;  // beyond it the reduction on the host has no exact first part

// Good to 2^-34 of each value, so that one rounding to fp32 follows. Reduction and polynomials are those of FreeBSD's
// msun (k_sinf.c, k_cosf.c, e_rem_pio2f.c; Sun Microsystems 1993); without a branch, so that compilers vectorise it.
MMK_HD CosSin cos_sin(double angle) {
  const double shifted = angle * 6.36619772367581382433e-01 + 6755399441055744.0;  // 2/π; 1.5 · 2^52 rounds
  const double n = shifted - 6755399441055744.0;
  uint64_t quadrant;
  memcpy(&quadrant, &shifted, 8);
#ifdef __CUDA_ARCH__  // products of any size, exact: good to 10^15
  const double x = fma(-n, 6.123233995736766e-17, fma(-n, 1.5707963267948966, angle)), z = x * x, w = z * z;
#else
  const double x = (angle - n * 1.57079631090164184570) - n * 1.58932547735281966916e-08, z = x * x, w = z * z;
#endif
  const double sine = (x + z * x * (-0.16666666641626524 + z * 0.008333329385889463)) +
                      z * x * w * (-0.00019839334836096632 + z * 2.718311493989822e-06);
  const double cosine = ((1.0 + z * -0.499999997251031) + w * 0.04166662332373906) +
                        w * z * (-0.001388676377460993 + z * 2.439044879627741e-05);
  const bool swapped = quadrant & 1;
  const double c = swapped ? sine : cosine, s = swapped ? cosine : sine;
  CosSin found;
  uint64_t c_bits, s_bits;
  memcpy(&c_bits, &c, 8), memcpy(&s_bits, &s, 8);
  c_bits ^= ((quadrant + 1) & 2) << 62, s_bits ^= (quadrant & 2) << 62;
  memcpy(&found.cos, &c_bits, 8), memcpy(&found.sin, &s_bits, 8);
  return found;
}

// The pair (a, b) turned; ca, sa of the angle of a, cb, sb of that of b.
template <class F> struct Pair { F a, b; };
template <class F>
MMK_HD Pair<F> turned(F a, F b, F ca, F sa, F cb, F sb) { return {a * ca - b * sa, b * cb + a * sb}; }

// What a cache holds of x, the quotient with its scale.
template <class C> struct Stored {
  template <class F> MMK_HD static C from(F x) { return Convert<C>::from(static_cast<float>(x)); }
};
template <> struct Stored<double> { template <class F> MMK_HD static double from(F x) { return x; } };
template <> struct Stored<int8_t> {
  MMK_HD static int8_t from(float x) {
    const float clamped = x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x;
    const float whole = (clamped + 12582912.0f) - 12582912.0f;  // 1.5 · 2^23: ties to even
    return static_cast<int8_t>(whole == whole ? whole : 0.0f);
  }
};
template <> struct Stored<f8e4m3> {
  MMK_HD static f8e4m3 from(float x) {
    const uint32_t u = float_bits(x), sign = (u >> 24) & 0x80u, size = u & 0x7fffffffu;
    if (size > 0x7f800000u) return {static_cast<uint8_t>(sign | 0x7fu)};
    const float clamped = bits_float(size) > 448.0f ? 448.0f : bits_float(size);
    const uint32_t c = float_bits(clamped);
    const uint32_t normal = ((c + 0x7ffffu + ((c >> 20) & 1u)) >> 20) - (120u << 3);
    const uint32_t tiny = float_bits(clamped + 16384.0f) - float_bits(16384.0f);  // counts of 2^-9
    return {static_cast<uint8_t>(sign | (clamped < 0.015625f ? tiny : normal))};
  }
};

// V values read or written at once.
template <class T, int V> struct alignas(sizeof(T) * V) Pack { T x[V]; };
template <int V, class T> MMK_HD Pack<T, V> load_pack(const T* p) { return *reinterpret_cast<const Pack<T, V>*>(p); }
template <int V, class T> MMK_HD void store_pack(T* p, const Pack<T, V>& v) { *reinterpret_cast<Pack<T, V>*>(p) = v; }

// A head on a GPU: units of V pairs, then units of V channels that do not turn; a lane takes some of them.
template <class T, class C> struct Row {
  const T* in;
  T* out;           // null: a value, which is only stored
  C* cache;         // null: no slot
  const T* weight;  // [d], or null: no norm
  float scale;      // of the cache, if it is int8 or f8e4m3
  int64_t d;
  Pairs pairs;

  MMK_HD int64_t pair_units(int V) const { return out ? pairs.count / V : 0; }
  MMK_HD int64_t units(int V) const { return out ? pair_units(V) + (d - 2 * pairs.count) / V : d / V; }
  // The first channels of a unit's one or two packs.
  MMK_HD int64_t first(int64_t unit, int V) const {
    if (unit >= pair_units(V)) return (out ? 2 * pairs.count : 0) + (unit - pair_units(V)) * V;
    return pairs.adjacent ? 2 * unit * V : unit * V;
  }
  MMK_HD int64_t second(int64_t unit, int V) const { return first(unit, V) + (pairs.adjacent ? V : pairs.count); }
};

template <class C> struct IsScaled { static constexpr bool value = false; };
template <> struct IsScaled<int8_t> { static constexpr bool value = true; };
template <> struct IsScaled<f8e4m3> { static constexpr bool value = true; };

template <int V, class T, class C>
MMK_HD acc_t<T> squares_of_unit(const Row<T, C>& row, int64_t unit) {
  acc_t<T> sum = 0;
  const Pack<T, V> a = load_pack<V>(row.in + row.first(unit, V));
  for (int j = 0; j < V; ++j) sum += widen(a.x[j]) * widen(a.x[j]);
  if (unit >= row.pair_units(V)) return sum;
  const Pack<T, V> b = load_pack<V>(row.in + row.second(unit, V));
  for (int j = 0; j < V; ++j) sum += widen(b.x[j]) * widen(b.x[j]);
  return sum;
}

template <int V, class T, class C>
MMK_HD void write_pack(const Row<T, C>& row, int64_t channel, const acc_t<T>* x) {
  if (row.out) {
    Pack<T, V> rounded;
    for (int j = 0; j < V; ++j) rounded.x[j] = Convert<T>::from(x[j]);
    store_pack<V>(row.out + channel, rounded);
  }
  if (!row.cache) return;
  Pack<C, V> kept;
  for (int j = 0; j < V; ++j)
    kept.x[j] = Stored<C>::from(IsScaled<C>::value ? static_cast<acc_t<T>>(static_cast<float>(x[j]) / row.scale) : x[j]);
  store_pack<V>(row.cache + channel, kept);
}

// The tables are of pairs; r is 1 without a norm.
template <int V, class T, class C, class F = acc_t<T>>
MMK_HD void turn_unit(const Row<T, C>& row, int64_t unit, F r, const F* ca, const F* sa, const F* cb, const F* sb) {
  F x[2 * V], y[2 * V];
  const bool turns = unit < row.pair_units(V);
  for (int side = 0; side < 2; ++side) {
    if (side && !turns) break;
    const int64_t channel = side ? row.second(unit, V) : row.first(unit, V);
    const Pack<T, V> in = load_pack<V>(row.in + channel);
    for (int j = 0; j < V; ++j) x[side * V + j] = widen(in.x[j]);
    if (!row.weight) continue;
    const Pack<T, V> weight = load_pack<V>(row.weight + channel);
    for (int j = 0; j < V; ++j) x[side * V + j] = x[side * V + j] * r * widen(weight.x[j]);
  }
  if (!turns) return write_pack<V>(row, row.first(unit, V), x);
  const int64_t i = unit * V;
  if (row.pairs.adjacent) {
    for (int j = 0; j < V; ++j) {
      const Pair<F> p = turned(x[2 * j], x[2 * j + 1], ca[i + j], sa[i + j], cb[i + j], sb[i + j]);
      y[2 * j] = p.a, y[2 * j + 1] = p.b;
    }
  } else {
    for (int j = 0; j < V; ++j) {
      const Pair<F> p = turned(x[j], x[V + j], ca[i + j], sa[i + j], cb[i + j], sb[i + j]);
      y[j] = p.a, y[V + j] = p.b;
    }
  }
  write_pack<V>(row, row.first(unit, V), y);
  write_pack<V>(row, row.second(unit, V), y + V);
}

// Where heads lie: [tokens or batch × length, heads, d], in elements; d is contiguous.
struct Heads {
  const void* data;
  int64_t heads, stride_b, stride_l, stride_h;

  MMK_HD int64_t row(int64_t b, int64_t l, int64_t h) const { return b * stride_b + l * stride_l + h * stride_h; }
};

// A paged cache [pages, page_size, kv_heads, d]; slot = page · page_size + offset.
struct Cache {
  void* data;
  int64_t page_size, slots, stride_page, stride_offset, stride_h;

  MMK_HD int64_t row(int64_t slot, int64_t h) const {
    return slot / page_size * stride_page + slot % page_size * stride_offset + h * stride_h;
  }
};

}  // namespace mmkernels::rope
