// SPDX-License-Identifier: Apache-2.0
// Absorbed cross-attention of bf16 tensors where the CPU multiplies bf16 alone fast (AMX). What is fp32 between two
// products (q', P, Z) is split into bf16 hi + lo, exact to 2^-17 of each value; context and weights are never widened.
// Every row has the same bits alone and beside others, as those of gemm.h have. Host; no torch.
//
// X context width, d head width, n context tokens of a sample; B[k][n] is the right side of a product.
#pragma once
#include <algorithm>
#include <cstring>

#include "../common/gemm.h"

namespace mmkernels::cross_attention {

MMK_MULTIARCH void split_row(bf16* hi, bf16* lo, const float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = x[i] * factor;
    hi[i] = Convert<bf16>::from(value);
    const float rest = value - widen(hi[i]);
    lo[i] = Convert<bf16>::from(rest == rest ? rest : 0);  // of infinity there is none
  }
}
MMK_MULTIARCH void transpose_block(float* to, const float* from, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j) to[r * n + j] = from[j * gemm::kColumns + r];
}

// The products of up to `rows` rows at a time. `memory` is a thread's, of `floats()`.
class Halves {
 public:
  Halves(int64_t rows, int64_t n, int64_t X, int64_t d, bool copies)
      : X_(X), d_(d), rows_(rows), n_(n), copies_(copies || X % 32 != 0) {}

  int64_t floats() const { return (copied() + 2 * half() + packed()) / 2 + std::max(n_, rows_) * gemm::kColumns; }

  // Of a head's parts of W_k [d, X] and W_v [d, X]: for absorb and project.
  int64_t key_elements() const { return gemm::packed_elements<bf16>(X_, d_); }
  int64_t value_elements() const { return gemm::packed_elements<bf16>(d_, X_); }
  void pack_key(bf16* to, const bf16* w) const {
    gemm::pack_b<bf16, bf16>(to, w, X_, d_, 1, X_, 0, ceil_div(X_, gemm::kColumns));
  }
  void pack_value(bf16* to, const bf16* w) const {
    gemm::pack_b<bf16, bf16>(to, w, d_, X_, X_, 1, 0, ceil_div(d_, gemm::kColumns));
  }

  // The rows of a sample's context, [n, context_stride()]: as they lie or, where latents follow or rows are no whole
  // steps, put together by the caller here, with zeros behind each.
  bool copies() const { return copies_; }
  int64_t context_stride() const { return copies_ ? gemm::lda<bf16>(X_) : X_; }
  bf16* copy(float* memory) const { return reinterpret_cast<bf16*>(memory); }

  // q' [rows, X] = q [rows, d] · W_k
  void absorb(float* to, int64_t ld, const bf16* q, int64_t stride, int64_t rows, const bf16* key, float* memory) const {
    const Parts m = parts(memory);
    if (d_ % 32) gemm::pack_a<bf16, bf16>(m.hi, q, rows, d_, stride, 1), q = m.hi, stride = gemm::lda<bf16>(d_);
    for (int64_t c = 0; c < X_; c += gemm::kColumns)
      columns(to, ld, rows, c, X_, m.products, [&](float* block, int64_t ldc) {
        gemm::multiply<bf16>(q, stride, rows, d_, gemm::packed_block(key, d_, c / gemm::kColumns), block, ldc, false);
      });
  }
  // S [rows, n] = scale · q' · xᵀ. The context is the left side, where it needs no packing.
  void scores(float* s, const float* q, int64_t rows, float scale, const bf16* x, int64_t n, float* memory) const {
    const Parts m = parts(memory);
    for (int64_t r = 0; r < rows; ++r) split_row(m.hi + r * X_, m.lo + r * X_, q + r * X_, X_, scale);
    for (int64_t r = 0; r < rows; r += gemm::kColumns) {
      const int64_t count = min64(gemm::kColumns, rows - r);
      for (const bf16* half : {m.hi, m.lo}) {
        gemm::pack_b<bf16, bf16>(m.packed, half + r * X_, count, X_, X_, 1, 0, 1);
        gemm::multiply<bf16>(x, context_stride(), n, X_, m.packed, m.products, gemm::kColumns, half == m.lo);
      }
      transpose_block(s + r * n, m.products, count, n);
    }
  }
  // Z [rows, X] = P [rows, n] · x
  void values(float* z, const float* p, int64_t rows, const bf16* x, int64_t n, float* memory) const {
    const Parts m = parts(memory);
    const int64_t ld = split(m, p, n, rows, n);
    for (int64_t c = 0; c < X_; c += gemm::kColumns) {
      gemm::pack_b<bf16, bf16>(m.packed, x + c, min64(gemm::kColumns, X_ - c), n, 1, context_stride(), 0, 1);
      columns(z, X_, rows, c, X_, m.products, [&](float* block, int64_t ldc) {
        for (const bf16* half : {m.hi, m.lo})
          gemm::multiply<bf16>(half, ld, rows, n, m.packed, block, ldc, half == m.lo);
      });
    }
  }
  // out [rows, d] = Z [rows, X] · W_vᵀ
  void project(float* to, const float* z, int64_t stride, int64_t rows, const bf16* value, float* memory) const {
    const Parts m = parts(memory);
    const int64_t ld = split(m, z, stride, rows, X_);
    for (int64_t c = 0; c < d_; c += gemm::kColumns)
      columns(to, d_, rows, c, d_, m.products, [&](float* block, int64_t ldc) {
        for (const bf16* half : {m.hi, m.lo})
          gemm::multiply<bf16>(half, ld, rows, X_, gemm::packed_block(value, X_, c / gemm::kColumns), block, ldc,
                               half == m.lo);
      });
  }

 private:
  struct Parts {
    bf16 *hi, *lo, *packed;
    float* products;
  };
  static int64_t lines(int64_t values) { return ceil_div(values, 32) * 32; }  // of bf16, to whole cache lines
  int64_t copied() const { return copies_ ? lines(n_ * gemm::lda<bf16>(X_)) : 0; }
  int64_t half() const { return rows_ * gemm::lda<bf16>(std::max(X_, std::max(n_, d_))); }
  int64_t packed() const { return gemm::packed_elements<bf16>(1, std::max(X_, n_)); }
  Parts parts(float* memory) const {
    bf16* const hi = copy(memory) + copied();
    bf16* const behind = hi + 2 * half();
    return {hi, hi + half(), behind, reinterpret_cast<float*>(behind + packed())};
  }
  // Rows of `width` values as hi and lo with zeros behind; returns their stride.
  int64_t split(const Parts& m, const float* from, int64_t stride, int64_t rows, int64_t width) const {
    const int64_t ld = gemm::lda<bf16>(width), stored = gemm::padded_k<bf16>(width);
    for (int64_t r = 0; r < rows; ++r) {
      split_row(m.hi + r * ld, m.lo + r * ld, from + r * stride, width, 1);
      for (bf16* half : {m.hi, m.lo}) std::fill(half + r * ld + width, half + r * ld + stored, bf16{});
    }
    return ld;
  }
  // Columns [c, c + 32) of `to` [rows, width], by `product` straight into it or, at its edge, through `block`.
  template <class F>
  static void columns(float* to, int64_t ld, int64_t rows, int64_t c, int64_t width, float* block, const F& product) {
    if (c + gemm::kColumns <= width) return product(to + c, ld);
    product(block, gemm::kColumns);
    for (int64_t r = 0; r < rows; ++r)
      memcpy(to + r * ld + c, block + r * gemm::kColumns, (width - c) * sizeof(float));
  }

  int64_t X_, d_, rows_, n_;
  bool copies_;
};

}  // namespace mmkernels::cross_attention
