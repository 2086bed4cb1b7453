// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of merging take and how they are launched. No torch, so that nvcc is quick.
#pragma once
#include <cuda_runtime.h>

#include "merge_embeddings.h"

namespace mmkernels::merge_embeddings {

enum class Dtype : int32_t { kFloat, kDouble, kBfloat16, kHalf };

struct PlanArgs {
  const void* ids;  // [T], int64 or int32
  bool ids_are_int64;
  int64_t T, vocab;  // vocab 0: inputs_embeds
  int32_t modalities;
  bool by_row;
  int64_t token_ids[kMaxModalities];
  const int64_t* rows[kMaxModalities];    // by_row: token index of every feature
  int64_t first[kMaxModalities + 1];      // features before each modality
  int64_t* source;                        // [T], out
};

struct MergeArgs {
  Sources sources;
  const int64_t* source;  // [T]
  char* out;              // [T, D]
  int64_t T;
  int64_t text_rows;      // a source from here on is an error of the caller's plan; INT64_MAX: planned here
  int64_t available;      // feature rows there are, all modalities
  bool scaled;
  double scale;
};

struct BackwardArgs {
  const char* grad;       // [T, D]
  const int64_t* source;  // [T]
  int64_t T, D, vocab, first[kMaxModalities + 1];
  char* features[kMaxModalities];  // null: not needed
  int32_t modalities;
  char* embeds;           // [T, D] for inputs_embeds, or null
  char* table;            // [V, D] zeroed, or null
  const int64_t *sorted, *order;  // source sorted by value, and the tokens in that order
  int64_t padding;        // row without gradient, or -1
  double scale;
};

cudaError_t launch_plan(const PlanArgs&, cudaStream_t);
cudaError_t launch_merge(const MergeArgs&, Dtype, cudaStream_t);
cudaError_t launch_backward(const BackwardArgs&, Dtype, cudaStream_t);

// The first value error since the last call: {kind, where, value, limit}, kind 0 = none; resets it. Syncs.
cudaError_t take_error(int64_t out[4], cudaStream_t);

}  // namespace mmkernels::merge_embeddings
