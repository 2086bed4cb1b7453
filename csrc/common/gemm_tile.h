// SPDX-License-Identifier: Apache-2.0
// The float and double kernel. No include guard: gemm_cpu.cpp includes it once for each instruction set, inside a
// namespace with MMK_TARGET, kVectorBytes and kTileRows. GCC splits wide vectors before it inlines, so a body
// shared by functions of several targets would be compiled for the smallest.

// `rows` rows of C, two vectors of columns at a time. Sums stay in registers for kSumLength k and are then added to
// C: one long chain of equal terms rounds to the same side every time, and its error grows with K, not its root.
template <class T, int rows>
MMK_TARGET void tile(const T* a, int64_t lda, int64_t K, const T* block, T* c, int64_t ldc, bool accumulate) {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  constexpr int64_t kLanes = kVectorBytes / sizeof(T), kAhead = 8;
  for (int64_t column = 0; column < kColumns; column += 2 * kLanes) {
    int64_t k = 0;
    do {
      const bool onto = accumulate || k > 0;
      Vector sum[rows][2];
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < 2; ++v) sum[r][v] = Vector{};
      for (const int64_t end = min64(k + kSumLength, K); k < end; ++k) {
        const T* b = block + k * kColumns + column;
        const Vector b0 = *reinterpret_cast<const Vector*>(b), b1 = *reinterpret_cast<const Vector*>(b + kLanes);
        __builtin_prefetch(b + kAhead * kColumns);  // B does not fit in L1 and comes from L2 for every tile
        if constexpr (kVectorBytes == 64) __builtin_prefetch(b + kAhead * kColumns + kLanes);
        for (int r = 0; r < rows; ++r) {
          const T x = a[r * lda + k];
          sum[r][0] += x * b0;
          sum[r][1] += x * b1;
        }
      }
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < 2; ++v) {
          Vector& total = *reinterpret_cast<Vector*>(c + r * ldc + column + v * kLanes);
          total = onto ? total + sum[r][v] : sum[r][v];
        }
    } while (k < K);
  }
}

template <class T, int rows = kTileRows>
MMK_TARGET void multiply(const T* a, int64_t lda, int64_t M, int64_t K, const T* block, T* c, int64_t ldc,
                         bool accumulate) {
  int64_t m = 0;
  for (; m + rows <= M; m += rows) tile<T, rows>(a + m * lda, lda, K, block, c + m * ldc, ldc, accumulate);
  if constexpr (rows > 1)  // what is left is one tile of fewer rows
    if (m < M) multiply<T, rows - 1>(a + m * lda, lda, M - m, K, block, c + m * ldc, ldc, accumulate);
}
