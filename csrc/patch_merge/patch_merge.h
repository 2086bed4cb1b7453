// SPDX-License-Identifier: Apache-2.0
// Patch merging: J rows of C features side by side in one, a norm before (over each C) or after (over J·C).
// Host; no torch.
#pragma once
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

// A sum whose error does not grow with n: lanes of 128 / 16 values each, added up in double.
template <class F, class Term>
MMK_INLINE double sum_of(int64_t n, const Term& term) {
  constexpr int64_t kPart = 128, kLanes = 16;
  double sum = 0;
  int64_t i = 0;
  for (; i + kPart <= n; i += kPart) {
    F lanes[kLanes] = {};
    for (int64_t j = 0; j < kPart; j += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += term(i + j + l);
    for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  }
  for (; i < n; ++i) sum += term(i);
  return sum;
}

template <class F> struct Stats { F mean, r; };  // r = 1 / sqrt(variance + eps)

template <class F>
MMK_INLINE Stats<F> stats_of(const F* __restrict x, int64_t n, NormKind norm, double eps) {
  const F mean = norm == NormKind::layer ? static_cast<F>(sum_of<F>(n, [&](int64_t i) { return x[i]; }) / n) : F(0);
  const double squares = sum_of<F>(n, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  return {mean, static_cast<F>(1 / __builtin_sqrt(squares / n + eps))};
}

// x -> (x - mean) r weight + bias
template <class F>
MMK_INLINE void normalise_body(F* __restrict x, int64_t n, NormKind norm, double eps, const F* weight, const F* bias) {
  const Stats<F> s = stats_of(x, n, norm, eps);
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - s.mean) * s.r;
  if (weight)
    for (int64_t i = 0; i < n; ++i) x[i] *= weight[i];
  if (bias)
    for (int64_t i = 0; i < n; ++i) x[i] += bias[i];
}

// g, the gradient of the normalised x, becomes that of x; those of weight and bias are added to theirs, if any.
template <class F>
MMK_INLINE void backward_body(F* __restrict g, F* __restrict x, int64_t n, NormKind norm, double eps, const F* weight,
                              F* d_weight, F* d_bias) {
  const Stats<F> s = stats_of(x, n, norm, eps);
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - s.mean) * s.r;  // y
  if (d_bias)
    for (int64_t i = 0; i < n; ++i) d_bias[i] += g[i];
  if (d_weight)
    for (int64_t i = 0; i < n; ++i) d_weight[i] += g[i] * x[i];
  if (weight)
    for (int64_t i = 0; i < n; ++i) g[i] *= weight[i];
  const F mean = norm == NormKind::layer ? static_cast<F>(sum_of<F>(n, [&](int64_t i) { return g[i]; }) / n) : F(0);
  const F along = static_cast<F>(sum_of<F>(n, [&](int64_t i) { return g[i] * x[i]; }) / n);
  for (int64_t i = 0; i < n; ++i) g[i] = (g[i] - mean - x[i] * along) * s.r;
}

}  // namespace mmkernels::patch_merge
