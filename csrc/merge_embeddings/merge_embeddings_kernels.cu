// SPDX-License-Identifier: Apache-2.0
// Merging on CUDA: one block finds where each row comes from, then one warp moves each row, 16 bytes a lane.
// A wrong value never leads out of range: its row is zero and the first error waits in a device word.
#include "merge_embeddings_cuda.h"

namespace mmkernels::merge_embeddings {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kRowThreads = 256;  // 8 rows a block
constexpr int64_t kZeroRow = INT64_MIN;  // source of a row with a wrong value

__device__ unsigned long long error_word[4];  // {kind, where, value, limit}; kind 0: none
__device__ unsigned int error_taken;

__device__ void latch(int64_t kind, int64_t where, int64_t value, int64_t limit) {
  if (atomicCAS(&error_taken, 0u, 1u) != 0u) return;
  error_word[1] = where, error_word[2] = value, error_word[3] = limit;
  __threadfence();
  error_word[0] = kind;
}

__device__ int64_t id_at(const PlanArgs& a, int64_t t) {
  return a.ids_are_int64 ? static_cast<const int64_t*>(a.ids)[t] : static_cast<const int32_t*>(a.ids)[t];
}

__device__ int64_t text_source(const PlanArgs& a, int64_t t) {
  if (!a.vocab) return t;
  const int64_t id = id_at(a, t);
  if (id >= 0 && id < a.vocab) return id;
  return kZeroRow;
}

// Inclusive sum over the block of one 0/1 flag a thread.
__device__ int block_count(bool flag, int* warps) {
  const unsigned ballot = __ballot_sync(0xffffffffu, flag);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int inside = __popc(ballot & (0xffffffffu >> (31 - lane)));
  if (lane == 31) warps[warp] = inside;
  __syncthreads();
  if (warp == 0) {
    int sum = warps[lane];
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    warps[lane] = sum;
  }
  __syncthreads();
  const int before = warp ? warps[warp - 1] : 0;
  __syncthreads();
  return before + inside;
}

// One block walks all tokens and numbers the placeholders of each modality in order.
__global__ void plan_by_id_kernel(const __grid_constant__ PlanArgs a) {
  __shared__ int warps[32];
  __shared__ int64_t seen[kMaxModalities];
  if (threadIdx.x < kMaxModalities) seen[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t base = 0; base < a.T; base += kPlanThreads) {
    const int64_t t = base + threadIdx.x;
    const int64_t id = t < a.T ? id_at(a, t) : 0;
    bool placed = t >= a.T;
    for (int m = 0; m < a.modalities; ++m) {
      const bool mine = t < a.T && id == a.token_ids[m];
      const int rank = block_count(mine, warps);
      const int64_t k = seen[m] + rank - 1;
      if (mine) {
        placed = true;
        a.source[t] = k < a.first[m + 1] - a.first[m] ? -1 - (a.first[m] + k) : kZeroRow;
      }
      __syncthreads();
      if (threadIdx.x == kPlanThreads - 1) seen[m] += rank;
      __syncthreads();
    }
    if (placed) continue;
    a.source[t] = text_source(a, t);
    if (a.source[t] == kZeroRow) latch(1, t, id, a.vocab);
  }
  if (threadIdx.x == 0)
    for (int m = 0; m < a.modalities; ++m)
      if (seen[m] != a.first[m + 1] - a.first[m]) latch(2, m, seen[m], a.first[m + 1] - a.first[m]);
}

// By row: every token is text, then the features claim theirs. Claiming twice is an error.
__global__ void plan_text_kernel(const __grid_constant__ PlanArgs a) {
  const int64_t t = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (t < a.T) a.source[t] = text_source(a, t);
}
__global__ void plan_rows_kernel(const __grid_constant__ PlanArgs a) {
  const int64_t k = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (k >= a.first[a.modalities]) return;
  int m = 0;
  while (k >= a.first[m + 1]) ++m;
  const int64_t t = a.rows[m][k - a.first[m]];
  if (t < 0 || t >= a.T) return latch(3, k, t, a.T);
  const auto was = static_cast<int64_t>(
      atomicExch(reinterpret_cast<unsigned long long*>(a.source + t), static_cast<unsigned long long>(-1 - k)));
  if (was < 0 && was != kZeroRow) latch(3, k, t, a.T);
}
__global__ void plan_check_kernel(const __grid_constant__ PlanArgs a) {
  const int64_t t = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (t < a.T && a.source[t] == kZeroRow) latch(1, t, id_at(a, t), a.vocab);
}

template <class T>
__global__ void merge_kernel(const __grid_constant__ MergeArgs a) {
  const int64_t t = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / 32;
  if (t >= a.T) return;
  const int64_t source = a.source[t], lane = threadIdx.x & 31;
  char* row = a.out + t * a.sources.row_bytes;
  const bool bad = source >= a.text_rows || (source < 0 && -1 - source >= a.available);
  if (bad && a.text_rows != INT64_MAX && lane == 0) latch(4, t, source, a.text_rows);
  if (bad)
    zero_row(row, a.sources.row_bytes, lane, 32);
  else
    merge_row<T>(row, a.sources, source, a.scaled, a.scale, lane, 32);
}

template <class T>
__global__ void feature_grad_kernel(const __grid_constant__ BackwardArgs a) {
  const int64_t t = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / 32;
  if (t >= a.T) return;
  const int64_t source = a.source[t], lane = threadIdx.x & 31, bytes = a.D * sizeof(T);
  const char* from = a.grad + t * bytes;
  if (a.embeds) {
    if (source >= 0) copy_row(a.embeds + t * bytes, from, bytes, lane, 32);
    else zero_row(a.embeds + t * bytes, bytes, lane, 32);
  }
  const int64_t k = -1 - source;
  if (source >= 0 || k >= a.first[a.modalities]) return;
  int m = 0;
  while (k >= a.first[m + 1]) ++m;
  if (a.features[m]) copy_row(a.features[m] + (k - a.first[m]) * bytes, from, bytes, lane, 32);
}

// One block for each run of equal ids in sorted order; its first token sums the run.
template <class T>
__global__ void embed_grad_kernel(const __grid_constant__ BackwardArgs a) {
  const int64_t i = blockIdx.x;
  const int64_t id = a.sorted[i];
  if (id < 0 || id >= a.vocab || id == a.padding || (i > 0 && a.sorted[i - 1] == id)) return;
  int64_t end = i + 1;
  while (end < a.T && a.sorted[end] == id) ++end;
  sum_rows(reinterpret_cast<T*>(a.table) + id * a.D, reinterpret_cast<const T*>(a.grad), a.order, i, end, a.D,
           a.scale, threadIdx.x, blockDim.x);
}

unsigned blocks(int64_t items, int64_t per_block) { return static_cast<unsigned>(ceil_div(items, per_block)); }

template <class T>
cudaError_t merge(const MergeArgs& a, cudaStream_t stream) {
  merge_kernel<T><<<blocks(a.T, kRowThreads / 32), kRowThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T>
cudaError_t backward(const BackwardArgs& a, cudaStream_t stream) {
  feature_grad_kernel<T><<<blocks(a.T, kRowThreads / 32), kRowThreads, 0, stream>>>(a);
  if (a.table) embed_grad_kernel<T><<<blocks(a.T, 1), 128, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_plan(const PlanArgs& a, cudaStream_t stream) {
  if (!a.by_row) {
    plan_by_id_kernel<<<1, kPlanThreads, 0, stream>>>(a);
    return cudaGetLastError();
  }
  plan_text_kernel<<<blocks(a.T, 256), 256, 0, stream>>>(a);
  if (const int64_t k = a.first[a.modalities]) plan_rows_kernel<<<blocks(k, 256), 256, 0, stream>>>(a);
  plan_check_kernel<<<blocks(a.T, 256), 256, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_merge(const MergeArgs& a, Dtype dtype, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat: return merge<float>(a, stream);
    case Dtype::kDouble: return merge<double>(a, stream);
    case Dtype::kBfloat16: return merge<bf16>(a, stream);
    default: return merge<f16>(a, stream);
  }
}

cudaError_t launch_backward(const BackwardArgs& a, Dtype dtype, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat: return backward<float>(a, stream);
    case Dtype::kDouble: return backward<double>(a, stream);
    case Dtype::kBfloat16: return backward<bf16>(a, stream);
    default: return backward<f16>(a, stream);
  }
}

cudaError_t take_error(int64_t out[4], cudaStream_t stream) {
  const unsigned long long none[4] = {0, 0, 0, 0};
  const unsigned int open = 0;
  cudaError_t e = cudaMemcpyFromSymbolAsync(out, error_word, 32, 0, cudaMemcpyDeviceToHost, stream);
  if (e == cudaSuccess) e = cudaStreamSynchronize(stream);
  if (e != cudaSuccess || out[0] == 0) return e;
  e = cudaMemcpyToSymbolAsync(error_word, none, 32, 0, cudaMemcpyHostToDevice, stream);
  if (e == cudaSuccess) e = cudaMemcpyToSymbolAsync(error_taken, &open, 4, 0, cudaMemcpyHostToDevice, stream);
  return e == cudaSuccess ? cudaStreamSynchronize(stream) : e;
}

}  // namespace mmkernels::merge_embeddings
