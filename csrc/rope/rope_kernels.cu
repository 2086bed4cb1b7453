// SPDX-License-Identifier: Apache-2.0
// Rotary positions on CUDA, with and without a paged cache, in one launch: a block takes a token, makes its cos and sin
// in shared memory, and a few lanes each take a head. A wrong slot or axis never leads out of range: the slot is not
// written, the axis turns by 0, and the first error waits in a device word.
#include "rope_cuda.h"

namespace mmkernels::rope {
namespace {

constexpr int kThreads = 128;

__device__ unsigned long long error_word[4];  // {kind, where, value, limit}; kind 0: none
__device__ unsigned int error_taken;

__device__ void latch(int64_t kind, int64_t where, int64_t value, int64_t limit) {
  if (atomicCAS(&error_taken, 0u, 1u) != 0u) return;
  error_word[1] = where, error_word[2] = value, error_word[3] = limit;
  __threadfence();
  error_word[0] = kind;
}

template <class F>
__device__ void angle_to(const Args& a, int64_t b, int64_t l, int64_t channel, F* cos_to, F* sin_to) {
  const int64_t axis = a.axis ? a.axis[channel] : 0;
  float angle = 0;
  if (axis < 0 || axis >= a.A) latch(2, channel, axis, a.A);
  else angle = angle_of(a.positions[axis * a.stride_a + b * a.stride_b + l * a.stride_l], a.inv_freq[channel]);
  const CosSin t = cos_sin(angle);
  *cos_to = static_cast<F>(t.cos * a.scaling);
  *sin_to = static_cast<F>((a.transposed ? -t.sin : t.sin) * a.scaling);
}

template <class T, class C>
__device__ Row<T, C> row_of(const Args& a, int64_t t, int64_t b, int64_t l, int64_t h, int64_t slot) {
  const T* none = nullptr;
  if (h < a.q.heads)
    return {static_cast<const T*>(a.q.data) + a.q.row(b, l, h), static_cast<T*>(a.q_out) + (t * a.q.heads + h) * a.d,
            nullptr, static_cast<const T*>(a.q_weight), 1, a.d, a.pairs};
  h -= a.q.heads;
  if (h < a.k.heads)
    return {static_cast<const T*>(a.k.data) + a.k.row(b, l, h), static_cast<T*>(a.k_out) + (t * a.k.heads + h) * a.d,
            slot < 0 ? nullptr : static_cast<C*>(a.keys.data) + a.keys.row(slot, h),
            static_cast<const T*>(a.k_weight), a.k_scale ? a.k_scale[h] : 1, a.d, a.pairs};
  h -= a.k.heads;
  return {static_cast<const T*>(a.v.data) + a.v.row(b, l, h), nullptr,
          slot < 0 ? nullptr : static_cast<C*>(a.values.data) + a.values.row(slot, h), none,
          a.v_scale ? a.v_scale[h] : 1, a.d, a.pairs};
}

template <class F>
__device__ F group_sum(F x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// `lanes`, a power of two of at most 32, share a head.
template <class T, class C, int V>
__global__ void __launch_bounds__(kThreads, 6) rope_kernel(const __grid_constant__ Args a, int lanes) {
  using F = acc_t<T>;
  extern __shared__ double shared[];
  const int64_t t = blockIdx.x, b = t / a.L, l = t % a.L, n = a.pairs.count;
  F *ca = reinterpret_cast<F*>(shared), *sa = ca + n, *cb = sa + n, *sb = cb + n;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    angle_to(a, b, l, a.pairs.first(i), ca + i, a.transposed ? sb + i : sa + i);
    angle_to(a, b, l, a.pairs.second(i), cb + i, a.transposed ? sa + i : sb + i);
  }
  int64_t slot = -1;
  if (a.slots) {
    slot = a.slots_are_int64 ? static_cast<const int64_t*>(a.slots)[t] : static_cast<const int32_t*>(a.slots)[t];
    if (slot < -1 || slot >= a.keys.slots) {
      if (threadIdx.x == 0) latch(1, t, slot, a.keys.slots);
      slot = -1;
    }
  }
  __syncthreads();
  const int64_t heads = a.q.heads + a.k.heads + (slot < 0 ? 0 : a.v.heads), groups = kThreads / lanes;
  const int64_t lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  for (int64_t base = 0; base < heads; base += groups) {  // all lanes of a warp stay for the shuffles
    const int64_t h = base + group;
    const bool mine = h < heads;
    const Row<T, C> row = row_of<T, C>(a, t, b, l, mine ? h : 0, slot);
    const int64_t units = mine ? row.units(V) : 0;
    F r = 1;
    if (a.q_weight || a.k_weight) {
      F squares = 0;
      if (row.weight)
        for (int64_t u = lane; u < units; u += lanes) squares += squares_of_unit<V>(row, u);
      squares = group_sum(squares, lanes);
      r = 1 / sqrt(squares / a.d + static_cast<F>(a.eps));
    }
    for (int64_t u = lane; u < units; u += lanes) turn_unit<V>(row, u, r, ca, sa, cb, sb);
  }
}

template <class T, class C, int V>
cudaError_t launch_packed(const Args& a, cudaStream_t stream) {
  const int64_t units = a.pairs.count / V + (a.d - 2 * a.pairs.count) / V;
  int lanes = 1;
  while (lanes < 32 && lanes < units) lanes *= 2;
  const size_t shared = 4 * a.pairs.count * sizeof(acc_t<T>);
  rope_kernel<T, C, V><<<static_cast<unsigned>(a.B * a.L), kThreads, shared, stream>>>(a, lanes);
  return cudaGetLastError();
}

template <class T, class C>
cudaError_t launch_of(const Args& a, cudaStream_t stream) {
  return a.packed ? launch_packed<T, C, 16 / sizeof(T)>(a, stream) : launch_packed<T, C, 1>(a, stream);
}

template <class T>
cudaError_t launch_cache(const Args& a, CacheDtype cache, cudaStream_t stream) {
  switch (cache) {
    case CacheDtype::kInt8: return launch_of<T, int8_t>(a, stream);
    case CacheDtype::kFloat8: return launch_of<T, f8e4m3>(a, stream);
    default: return launch_of<T, T>(a, stream);
  }
}

}  // namespace

cudaError_t launch(const Args& a, Dtype dtype, CacheDtype cache, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat: return launch_cache<float>(a, cache, stream);
    case Dtype::kDouble: return launch_cache<double>(a, cache, stream);
    case Dtype::kBfloat16: return launch_cache<bf16>(a, cache, stream);
    default: return launch_cache<f16>(a, cache, stream);
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

}  // namespace mmkernels::rope
