// SPDX-License-Identifier: Apache-2.0
// Sums of a row whose error does not grow with its length. Host; no torch.
#pragma once
#include <cstring>

#include "host_device.h"

namespace mmkernels {

// Vectors by hand: compilers keep an array of lanes in memory, and so they do vectors of 64 bytes where registers have
// 32 (4 times the time of a row).
template <class F> struct Vector;
template <> struct Vector<float> { typedef float type __attribute__((vector_size(32))); };
template <> struct Vector<double> { typedef double type __attribute__((vector_size(32))); };

template <class F>
MMK_INLINE typename Vector<F>::type load(const F* p) {
  typename Vector<F>::type v;
  memcpy(&v, p, sizeof v);
  return v;
}

// 4 vectors of 8 values a lane, added up in double.
template <class F, class Term>
MMK_INLINE double sum_of(int64_t n, const Term& term) {
  using V = typename Vector<F>::type;
  constexpr int64_t kLanes = sizeof(V) / sizeof(F), kPart = 4 * kLanes * 8;
  double sum = 0;
  int64_t i = 0;
  while (i + kLanes <= n) {
    V a = {}, b = {}, c = {}, d = {};
    const int64_t end = min64(n, i + kPart);
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      a += term.vector(i), b += term.vector(i + kLanes);
      c += term.vector(i + 2 * kLanes), d += term.vector(i + 3 * kLanes);
    }
    for (; i + kLanes <= end; i += kLanes) a += term.vector(i);  // at most 3
    const V all = (a + b) + (c + d);
    for (int64_t l = 0; l < kLanes; ++l) sum += all[l];
  }
  for (; i < n; ++i) sum += term.value(i);
  return sum;
}

template <class F> struct Value {
  const F* x;
  MMK_INLINE typename Vector<F>::type vector(int64_t i) const { return load(x + i); }
  MMK_INLINE F value(int64_t i) const { return x[i]; }
};
template <class F> struct SquareAround {
  const F* x;
  F mean;
  MMK_INLINE typename Vector<F>::type vector(int64_t i) const {
    const auto v = load(x + i) - mean;
    return v * v;
  }
  MMK_INLINE F value(int64_t i) const { return (x[i] - mean) * (x[i] - mean); }
};
template <class F> struct Product {
  const F *x, *y;
  MMK_INLINE typename Vector<F>::type vector(int64_t i) const { return load(x + i) * load(y + i); }
  MMK_INLINE F value(int64_t i) const { return x[i] * y[i]; }
};

}  // namespace mmkernels
