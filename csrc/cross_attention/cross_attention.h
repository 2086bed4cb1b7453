// SPDX-License-Identifier: Apache-2.0
// Absorbed cross-attention: sizes, mask addressing and the softmax of one row. Host; no torch.
//
// B batch, Q queries, n context tokens with latents (own: without; of a packed context both are the most), X context
// width, A heads, d head width. The A·Q score rows of a sample are ordered head first: row = head·Q + query.
#pragma once
#include "../common/fast_exp.h"

namespace mmkernels::cross_attention {

struct Shape {
  int64_t B, Q, n, own, X, A, d;
  bool shared;  // one query block for the whole batch
  const int64_t* offsets;  // of a packed context's samples, [B + 1], or null

  int64_t rows() const { return A * Q; }
  int64_t first_of(int64_t b) const { return offsets ? offsets[b] : b * own; }  // row of the context
  int64_t own_of(int64_t b) const { return offsets ? offsets[b + 1] - offsets[b] : own; }
  int64_t latents() const { return n - own; }
  int64_t n_of(int64_t b) const { return own_of(b) + latents(); }
};

// A mask expanded to [B, A, Q, n]; strides in elements, 0 where it was broadcast.
struct Mask {
  enum Kind { kNone, kBool, kFloat, kDouble, kBfloat16, kHalf } kind = kNone;
  const void* data = nullptr;
  int64_t stride_b = 0, stride_a = 0, stride_q = 0, stride_n = 0;

  int64_t row(int64_t b, int64_t head, int64_t query) const {
    return b * stride_b + head * stride_a + query * stride_q;
  }
  double value(int64_t i) const {  // of an additive mask
    switch (kind) {
      case kFloat: return static_cast<const float*>(data)[i];
      case kDouble: return static_cast<const double*>(data)[i];
      case kBfloat16: return widen(static_cast<const bf16*>(data)[i]);
      case kHalf: return widen(static_cast<const f16*>(data)[i]);
      default: return 0;
    }
  }
  bool allows(int64_t i) const { return static_cast<const uint8_t*>(data)[i] != 0; }
  bool shows(int64_t i) const { return kind == kBool ? allows(i) : value(i) != -INFINITY; }

  // Which of `n` keys of sample b no query of any head may attend to: 1 in `hidden`; returns their count.
  int64_t find_hidden(uint8_t* hidden, int64_t b, int64_t heads, int64_t queries, int64_t n) const {
    for (int64_t j = 0; j < n; ++j) hidden[j] = 1;
    int64_t left = n;
    for (int64_t head = 0; head < (stride_a ? heads : 1); ++head)  // a broadcast row needs reading once
      for (int64_t query = 0; left && query < (stride_q ? queries : 1); ++query) {
        const int64_t first = row(b, head, query);
        for (int64_t j = 0; j < n; ++j)
          if (hidden[j] && shows(first + j * stride_n)) hidden[j] = 0, --left;
      }
    return left;
  }

  // Adds the mask to a row of scores; a forbidden key becomes -inf.
  template <class F>
  void add_to(F* scores, int64_t first, int64_t n) const {
    if (kind == kBool) {
      for (int64_t j = 0; j < n; ++j)
        if (!allows(first + j * stride_n)) scores[j] = -static_cast<F>(INFINITY);
    } else if (kind != kNone) {
      for (int64_t j = 0; j < n; ++j) scores[j] += static_cast<F>(value(first + j * stride_n));
    }
  }
};

// scores -> exp(scores - max); returns max in *max and the sum. -inf everywhere: zeros, sum 0.
template <class F>
MMK_INLINE F exp_row_body(F* scores, int64_t n, F* max_out) {
  constexpr int kLanes = 16;  // fixed, so that every instruction set adds in the same order
  F max = -static_cast<F>(INFINITY);
  bool nan = false;
  for (int64_t j = 0; j < n; ++j) {
    max = scores[j] > max ? scores[j] : max;
    nan |= scores[j] != scores[j];
  }
  *max_out = nan ? static_cast<F>(NAN) : max;
  const F shift = max == -static_cast<F>(INFINITY) ? F(0) : max;
  F lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const F e = fast_exp(scores[j + i] - shift);
      scores[j + i] = e;
      lanes[i] += e;
    }
  for (int i = 0; j < n; ++j, ++i) {
    scores[j] = fast_exp(scores[j] - shift);
    lanes[i] += scores[j];
  }
  F sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

}  // namespace mmkernels::cross_attention
