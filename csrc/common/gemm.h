// SPDX-License-Identifier: Apache-2.0
// C = A · B on one CPU thread, B packed once by the caller. No torch, no threads: callers thread over row panels
// of A and column blocks of B.
//
// E is float, double or bf16; sums run in acc_t<E>. Every element of C is one sum over k in increasing order
// (float and double in parts of fixed length, AMX and AVX512-BF16 in pairs), whatever M, its row and the tile it
// falls into: a row has the same bits alone and in any panel.
#pragma once
#include "numeric.h"

namespace mmkernels::gemm {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx_bf16 };

// The best of this CPU, decided once. The environment's MMKERNELS_ISA, one of these names, caps it.
Isa isa();
// Whether E = bf16 may be used; if not, pack bf16 into float.
bool has_bf16();

constexpr int64_t kColumns = 32;  // of a packed block of B, and of the block of C it gives

// How many k a row of A and a packed block hold: zeros from K on, in both.
template <class E>
int64_t padded_k(int64_t K) { return K; }
template <>
inline int64_t padded_k<bf16>(int64_t K) { return ceil_div(K, 32) * 32; }

// A leading dimension for A: whole cache lines, and an odd number of them, so that the rows of a tile never
// fall into few sets of the cache. Any other one >= padded_k is correct too.
template <class E>
int64_t lda(int64_t K) {
  constexpr int64_t kLine = 64 / sizeof(E);
  return (ceil_div(padded_k<E>(K), kLine) | 1) * kLine;
}

template <class E>
int64_t packed_elements(int64_t N, int64_t K) { return ceil_div(N, kColumns) * kColumns * padded_k<E>(K); }
template <class E>
const E* packed_block(const E* packed, int64_t K, int64_t j) { return packed + j * kColumns * padded_k<E>(K); }

// Column blocks [first, last) of ceil(N / 32) from B[k][n] = b[n * stride_n + k * stride_k]; columns beyond N are
// zero. `to` is the start of the whole packed B. S is E, or bf16 or f16 when E is float. Fast where a stride is 1.
template <class E, class S>
void pack_b(E* to, const S* b, int64_t N, int64_t K, int64_t stride_n, int64_t stride_k, int64_t first,
            int64_t last);

// to[m][k] = from[m * stride_m + k * stride_k], row-major with lda<E>(K), zero in [K, padded_k). Fast where a
// stride is 1.
template <class E, class S>
void pack_a(E* to, const S* from, int64_t M, int64_t K, int64_t stride_m, int64_t stride_k);

// c[m * ldc + i] = sum over k of a[m * lda + k] * B[k][32 j + i] for m < M and i < 32, on top of what is there if
// `accumulate`. block is packed_block(packed, K, j).
template <class E>
void multiply(const E* a, int64_t lda, int64_t M, int64_t K, const E* block, acc_t<E>* c, int64_t ldc,
              bool accumulate);

}  // namespace mmkernels::gemm
