// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a block of few rows: products with keys and values where they lie. Host; no torch. Lanes are fixed,
// so a row has the same bits beside any other rows.
#pragma once
#include <cstring>

#include "../common/host_device.h"

namespace mmkernels::paged_attention {

template <class F> struct Lanes;
template <> struct Lanes<float> { typedef float type __attribute__((vector_size(32))); };
template <> struct Lanes<double> { typedef double type __attribute__((vector_size(32))); };
template <class F> using lanes_t = typename Lanes<F>::type;
template <class F> constexpr int64_t kLanes = 32 / sizeof(F);

template <class F>
MMK_INLINE lanes_t<F> load(const F* p) {
  lanes_t<F> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class F>
MMK_INLINE F sum_of(lanes_t<F> v) {
  F half[kLanes<F> / 2], sum = 0;
  for (int64_t i = 0; i < kLanes<F> / 2; ++i) half[i] = v[i] + v[i + kLanes<F> / 2];
  for (int64_t i = 0; i < kLanes<F> / 2; ++i) sum += half[i];
  return sum;
}

// scores[r * ld + j] = q[r] · k[j] for R rows and J keys
template <int R, int J, class F>
MMK_INLINE void dot_tile(F* scores, int64_t ld, const F* q, int64_t ldq, const F* const* k, int64_t d) {
  lanes_t<F> sum[R][J] = {};
  int64_t c = 0;
  for (; c + kLanes<F> <= d; c += kLanes<F>) {
    lanes_t<F> key[J];
    for (int j = 0; j < J; ++j) key[j] = load(k[j] + c);
    for (int r = 0; r < R; ++r) {
      const lanes_t<F> row = load(q + r * ldq + c);
      for (int j = 0; j < J; ++j) sum[r][j] += row * key[j];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) {
      F rest = 0;
      for (int64_t i = c; i < d; ++i) rest += q[r * ldq + i] * k[j][i];
      scores[r * ld + j] = sum_of<F>(sum[r][j]) + rest;
    }
}

template <int J, class F>
MMK_INLINE void dot_rows(F* scores, int64_t ld, const F* q, int64_t ldq, int64_t rows, const F* const* k, int64_t d) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot_tile<4, J>(scores + r * ld, ld, q + r * ldq, ldq, k, d);
  for (; r < rows; ++r) dot_tile<1, J>(scores + r * ld, ld, q + r * ldq, ldq, k, d);
}

template <class F>
MMK_INLINE void dots_body(F* scores, int64_t ld, const F* q, int64_t ldq, int64_t rows, const F* const* k, int64_t n,
                          int64_t d) {
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) dot_rows<2>(scores + j, ld, q, ldq, rows, k + j, d);
  for (; j < n; ++j) dot_rows<1>(scores + j, ld, q, ldq, rows, k + j, d);
}

// out[r] += p[r][0] v[0] + … + p[r][J-1] v[J-1]
template <int J, class F>
MMK_INLINE void add_tile(F* out, int64_t ldo, const F* p, int64_t ld, int64_t rows, const F* const* v, int64_t d) {
  int64_t c = 0;
  for (; c + kLanes<F> <= d; c += kLanes<F>) {
    lanes_t<F> value[J];
    for (int j = 0; j < J; ++j) value[j] = load(v[j] + c);
    for (int64_t r = 0; r < rows; ++r) {
      lanes_t<F> sum = load(out + r * ldo + c);
      for (int j = 0; j < J; ++j) sum += p[r * ld + j] * value[j];
      memcpy(out + r * ldo + c, &sum, sizeof sum);
    }
  }
  for (; c < d; ++c)
    for (int64_t r = 0; r < rows; ++r)
      for (int j = 0; j < J; ++j) out[r * ldo + c] += p[r * ld + j] * v[j][c];
}

template <class F>
MMK_INLINE void add_values_body(F* out, int64_t ldo, const F* p, int64_t ld, int64_t rows, const F* const* v,
                                int64_t n, int64_t d) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) add_tile<4>(out, ldo, p + j, ld, rows, v + j, d);
  for (; j < n; ++j) add_tile<1>(out, ldo, p + j, ld, rows, v + j, d);
}

}  // namespace mmkernels::paged_attention
