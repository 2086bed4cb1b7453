// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernel of rotary positions takes and how it is launched. No torch, so that nvcc is quick.
#pragma once
#include <cuda_runtime.h>

#include "rope.h"

namespace mmkernels::rope {

enum class Dtype : int32_t { kFloat, kDouble, kBfloat16, kHalf };
enum class CacheDtype : int32_t { kNoneOrSame, kInt8, kFloat8 };  // "same" as query

struct Args {
  Heads q, k, v;  // v without a cache: no heads
  void *q_out, *k_out;
  Cache keys, values;  // null without a cache
  const void* slots;   // [T]
  bool slots_are_int64;
  const int64_t* positions;
  int64_t stride_a, stride_b, stride_l, A, B, L;  // of positions, and their sizes
  const float* inv_freq;
  const int64_t* axis;  // or null: axis 0
  Pairs pairs;
  double scaling;
  bool transposed;
  const void *q_weight, *k_weight;
  const float *k_scale, *v_scale;
  double eps;
  int64_t d;
  bool packed;  // 16-byte accesses: every pointer, stride and part of a head is a multiple of them
};

cudaError_t launch(const Args&, Dtype, CacheDtype, cudaStream_t);

// The first value error since the last call: {kind, where, value, limit}, kind 0 = none; resets it. Syncs.
cudaError_t take_error(int64_t out[4], cudaStream_t);

}  // namespace mmkernels::rope
