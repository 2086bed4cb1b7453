// SPDX-License-Identifier: Apache-2.0
// Patch merging: J rows of C features side by side in one, a norm before (over each C) or after (over J·C).
// Host; no torch.
#pragma once
#include <cstring>

#include "../common/numeric.h"

namespace mmkernels::patch_merge {

enum class NormKind { none, layer, rms };

struct Shape {
  int64_t N, C, J, M;  // rows of features; their width; neighbours; merged rows
  NormKind norm;
  bool after, channels_first;
  double eps;

  int64_t width() const { return J * C; }
  int64_t normed() const { return after ? J * C : C; }  // values of one norm
  int64_t norms() const { return after ? 1 : J; }       // of a merged row
};

// A sum whose error does not grow with n: 64 lanes of 8 values each, added up in double. Vectors by hand: compilers keep
// an array of lanes in memory.
template <class F> struct Vector;
template <> struct Vector<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct Vector<double> { typedef double type __attribute__((vector_size(64))); };

template <class F, class Term>
MMK_INLINE double sum_of(int64_t n, const Term& term) {
  using V = typename Vector<F>::type;
  constexpr int64_t kLanes = sizeof(V) / sizeof(F), kPart = 4 * kLanes * 8;
  double sum = 0;
  int64_t i = 0;
  while (i + 4 * kLanes <= n) {
    V a = {}, b = {}, c = {}, d = {};
    for (const int64_t end = min64(n, i + kPart); i + 4 * kLanes <= end; i += 4 * kLanes) {
      a += term.vector(i), b += term.vector(i + kLanes);
      c += term.vector(i + 2 * kLanes), d += term.vector(i + 3 * kLanes);
    }
    const V all = (a + b) + (c + d);
    for (int64_t l = 0; l < kLanes; ++l) sum += all[l];
  }
  for (; i < n; ++i) sum += term.value(i);
  return sum;
}

template <class F>
MMK_INLINE typename Vector<F>::type load(const F* p) {
  typename Vector<F>::type v;
  memcpy(&v, p, sizeof v);
  return v;
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

template <class F> struct Stats { F mean, r; };  // r = 1 / sqrt(variance + eps)

template <class F>
MMK_INLINE Stats<F> stats_of(const F* __restrict x, int64_t n, NormKind norm, double eps) {
  const F mean = norm == NormKind::layer ? static_cast<F>(sum_of<F>(n, Value<F>{x}) / n) : F(0);
  const double squares = sum_of<F>(n, SquareAround<F>{x, mean});
  return {mean, static_cast<F>(1 / __builtin_sqrt(squares / n + eps))};
}

// to = (x - mean) r weight + bias; weight and bias are there, if need be as ones and zeros.
template <class F, class T>
MMK_INLINE void normalise_body(T* __restrict to, const F* __restrict x, int64_t n, NormKind norm, double eps,
                               const F* __restrict weight, const F* __restrict bias) {
  const Stats<F> s = stats_of(x, n, norm, eps);
  for (int64_t i = 0; i < n; ++i) to[i] = Convert<T>::from((x[i] - s.mean) * s.r * weight[i] + bias[i]);
}

// g, the gradient of the normalised x, becomes that of x; those of weight and bias are added to theirs, if any.
template <class F>
MMK_INLINE void backward_body(F* __restrict g, F* __restrict x, int64_t n, NormKind norm, double eps,
                              const F* __restrict weight, F* __restrict d_weight, F* __restrict d_bias) {
  const Stats<F> s = stats_of(x, n, norm, eps);
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - s.mean) * s.r;  // y
  if (d_bias)
    for (int64_t i = 0; i < n; ++i) d_bias[i] += g[i];
  if (d_weight)
    for (int64_t i = 0; i < n; ++i) d_weight[i] += g[i] * x[i];
  for (int64_t i = 0; i < n; ++i) g[i] *= weight[i];
  const F mean = norm == NormKind::layer ? static_cast<F>(sum_of<F>(n, Value<F>{g}) / n) : F(0);
  const F along = static_cast<F>(sum_of<F>(n, Product<F>{g, x}) / n);
  for (int64_t i = 0; i < n; ++i) g[i] = (g[i] - mean - x[i] * along) * s.r;
}

}  // namespace mmkernels::patch_merge
