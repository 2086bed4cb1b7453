// SPDX-License-Identifier: Apache-2.0
// Patch merging: J rows of C features side by side in one, a norm before (over each C) or after (over J·C).
// Host; no torch.
#pragma once
#include "../common/numeric.h"
#include "../common/sum.h"

namespace mmkernels::patch_merge {

enum class NormKind { none, layer, rms };

struct Shape {
  int64_t N, C, J, M;  // rows of features; their width; neighbours; merged rows
  NormKind norm;
  bool after, channels_first;
  double eps;

  int64_t width() const { return J * C; }
  int64_t normed() const { return after ? J * C : C; }  // values of one norm
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
