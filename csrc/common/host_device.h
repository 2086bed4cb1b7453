// SPDX-License-Identifier: Apache-2.0
// What host and device code share: function markers and integer helpers. No torch, no CUDA headers.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MMK_HD __host__ __device__ __forceinline__
#else
#define MMK_HD inline
#endif

// One body compiled for several instruction sets, chosen by CPU features when the library is loaded
// (arch=haswell would be chosen by vendor and model, so never on AMD).
// Not under ASan and TSan, before which the resolvers would run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define MMK_MULTIARCH \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MMK_MULTIARCH
#endif
#define MMK_INLINE inline __attribute__((always_inline))

namespace mmkernels {

MMK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MMK_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace mmkernels
