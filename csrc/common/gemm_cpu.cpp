// SPDX-License-Identifier: Apache-2.0
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#define MMK_X86 1
#include <immintrin.h>
#endif
#if defined(MMK_X86) && defined(__linux__)
#define MMK_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mmkernels::gemm {
namespace {

Isa best_of_cpu() {
#ifdef MMK_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::generic;
  if (!__builtin_cpu_supports("avx512f")) return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
#ifdef MMK_AMX
  // Linux hands out the tile registers on request only; a container's filter may refuse.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
      syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0)
    return Isa::amx_bf16;
#endif
  return Isa::avx512_bf16;
#else
  return Isa::generic;
#endif
}

Isa cap() {
  const char* name = std::getenv("MMKERNELS_ISA");
  if (!name || !*name) return Isa::amx_bf16;
  const char* names[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
  for (int i = 0; i < 5; ++i)
    if (!strcmp(name, names[i])) return static_cast<Isa>(i);
  throw std::runtime_error("MMKERNELS_ISA: expected generic, avx2, avx512, avx512_bf16 or amx_bf16, got " +
                           std::string(name));
}

}  // namespace

Isa isa() {
  static const Isa best = [] {
    const Isa most = cap(), cpu = best_of_cpu();
    return most < cpu ? most : cpu;
  }();
  return best;
}

bool has_bf16() { return isa() >= Isa::avx512_bf16; }

namespace {

constexpr int64_t kSumLength = 128;

namespace generic {
#define MMK_TARGET
constexpr int kVectorBytes = 16, kTileRows = 4;
#include "gemm_tile.h"
#undef MMK_TARGET
}  // namespace generic

#ifdef MMK_X86
namespace avx2 {
#define MMK_TARGET __attribute__((target("avx2,fma")))
constexpr int kVectorBytes = 32, kTileRows = 6;
#include "gemm_tile.h"
#undef MMK_TARGET
}  // namespace avx2

namespace avx512 {
#define MMK_TARGET __attribute__((target("avx512f")))
constexpr int kVectorBytes = 64, kTileRows = 12;
#include "gemm_tile.h"
#undef MMK_TARGET
}  // namespace avx512

// Pairs of k: a pair of A against all columns' pairs of B, which lie side by side ([K / 2][32][2]).
namespace avx512_bf16 {
#define MMK_TARGET __attribute__((target("avx512f,avx512bf16")))

template <int rows>
MMK_TARGET void tile(const bf16* a, int64_t lda, int64_t K, const bf16* block, float* c, int64_t ldc,
                     bool accumulate) {
  __m512 sum[rows][2];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < 2; ++v)
      sum[r][v] = _mm512_maskz_loadu_ps(accumulate ? 0xffff : 0, c + r * ldc + v * 16);
  for (int64_t k = 0; k < K; k += 2) {
    const __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(block + k * kColumns));
    const __m512bh b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(block + k * kColumns + 32));
    for (int r = 0; r < rows; ++r) {
      int32_t pair;
      memcpy(&pair, a + r * lda + k, 4);
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, b0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, b1);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + r * ldc + v * 16, sum[r][v]);
}

template <int rows = 12>
MMK_TARGET void multiply(const bf16* a, int64_t lda, int64_t M, int64_t K, const bf16* block, float* c, int64_t ldc,
                         bool accumulate) {
  int64_t m = 0;
  for (; m + rows <= M; m += rows) tile<rows>(a + m * lda, lda, K, block, c + m * ldc, ldc, accumulate);
  if constexpr (rows > 1)
    if (m < M) multiply<rows - 1>(a + m * lda, lda, M - m, K, block, c + m * ldc, ldc, accumulate);
}
#undef MMK_TARGET
}  // namespace avx512_bf16
#endif

#ifdef MMK_AMX
namespace amx_bf16 {
#define MMK_TARGET __attribute__((target("amx-tile,amx-bf16")))

// The intrinsics do not tell the compiler which memory they touch.
MMK_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

// Sums in tiles 0-3 (upper left, upper right, lower left, lower right), A in 4 and 5, B in 6 and 7: `rows`, at
// most 32, of them in two tiles' height.
MMK_TARGET void configure(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } tiles;
  const uint8_t upper = rows < 16 ? rows : 16, lower = rows - upper;
  const uint8_t heights[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int t = 0; t < 8; ++t) tiles.rows[t] = heights[t], tiles.row_bytes[t] = heights[t] ? 64 : 0;
  memory_barrier();
  _tile_loadconfig(&tiles);
}

// `steps` of 32 k. Between them, fetches `lines` cache lines a step of what is needed next into L2.
template <bool lower>
MMK_TARGET void tile(const bf16* a, int64_t lda, int64_t steps, const bf16* block, float* c, int64_t ldc,
                     bool accumulate, const char* next, int64_t lines) {
  const int64_t c_bytes = ldc * 4, a_bytes = lda * 2, b_bytes = kColumns * 4;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if (lower) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if (lower) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (lower) _tile_zero(2);
    if (lower) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += 32, block += 32 * kColumns) {
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    _tile_loadd(6, block, b_bytes);
    _tile_stream_loadd(4, a, a_bytes);  // used once a block: leaves L1 to B, which every tile reads again
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, block + 32, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if (lower) _tile_stream_loadd(5, a + 16 * lda, a_bytes);
    if (lower) _tile_dpbf16ps(2, 5, 6);
    if (lower) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if (lower) _tile_stored(2, c + 16 * ldc, c_bytes);
  if (lower) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

// In chunks of K whose B (40 KB at most) stays in L1; C waits in memory in between, which rounds nothing. The
// next chunk, or the next column block, is fetched meanwhile: from L3 it would take as long as the products.
// Loads and releases the configuration itself: oneDNN multiplies with other ones in the same thread.
MMK_TARGET void multiply(const bf16* a, int64_t lda, int64_t M, int64_t K, const bf16* block, float* c, int64_t ldc,
                         bool accumulate) {
  constexpr int64_t kMostSteps = 20, kBytesOfStep = 32 * kColumns * 2;
  const int64_t all = ceil_div(K, 32), chunks = ceil_div(all, kMostSteps), chunk = chunks ? ceil_div(all, chunks) : 0;
  const int64_t lines = M < 128 ? 0 : ceil_div(kBytesOfStep / 64 * 32, M);
  int64_t configured = 0, first = 0;
  do {  // once even if K is 0
    const int64_t steps = min64(chunk, all - first);
    const bf16* b = block + first * 32 * kColumns;
    const char* next = reinterpret_cast<const char*>(b) + steps * kBytesOfStep;
    for (int64_t m = 0; m < M; m += 32, next += steps * lines * 64) {
      const int64_t rows = min64(32, M - m);
      if (rows != configured) configure(rows);
      configured = rows;
      const auto of = rows > 16 ? tile<true> : tile<false>;
      of(a + m * lda + first * 32, lda, steps, b, c + m * ldc, ldc, accumulate || first > 0, next, lines);
    }
    first += chunk;
  } while (first < all);
  _tile_release();
  memory_barrier();
}
#undef MMK_TARGET
}  // namespace amx_bf16
#endif

}  // namespace

template <class E>
void multiply(const E* a, int64_t lda, int64_t M, int64_t K, const E* block, acc_t<E>* c, int64_t ldc,
              bool accumulate) {
  if constexpr (std::is_same_v<E, bf16>) {
#ifdef MMK_AMX
    if (isa() == Isa::amx_bf16) return amx_bf16::multiply(a, lda, M, K, block, c, ldc, accumulate);
#endif
#ifdef MMK_X86
    if (has_bf16()) return avx512_bf16::multiply(a, lda, M, K, block, c, ldc, accumulate);
#endif
    throw std::logic_error("gemm: this CPU has no bf16 products; ask has_bf16() first");
  } else {
#ifdef MMK_X86
    if (isa() >= Isa::avx512) return avx512::multiply(a, lda, M, K, block, c, ldc, accumulate);
    if (isa() >= Isa::avx2) return avx2::multiply(a, lda, M, K, block, c, ldc, accumulate);
#endif
    generic::multiply(a, lda, M, K, block, c, ldc, accumulate);
  }
}
template void multiply(const float*, int64_t, int64_t, int64_t, const float*, float*, int64_t, bool);
template void multiply(const double*, int64_t, int64_t, int64_t, const double*, double*, int64_t, bool);
template void multiply(const bf16*, int64_t, int64_t, int64_t, const bf16*, float*, int64_t, bool);

namespace {

constexpr int64_t kStage = 32;  // packing goes through squares of 32 x 32 in L1, which take care of all edges

template <class E, class S>
MMK_INLINE E converted(S x) {
  if constexpr (std::is_same_v<E, S>) return x;
  else return Convert<E>::from(widen(x));
}

// stage[r][c] = from[r * row_stride + c * column_stride], zero from `rows` and `columns` on.
template <class E, class S>
void gather(E (*stage)[kStage], const S* from, int64_t rows, int64_t columns, int64_t row_stride,
            int64_t column_stride) {
  if (rows < kStage || columns < kStage) memset(static_cast<void*>(stage), 0, kStage * kStage * sizeof(E));
  for (int64_t r = 0; r < rows && r < kStage; ++r, from += row_stride) {
    if (columns >= kStage && column_stride == 1)  // a count known here is what makes it vector code
      for (int64_t c = 0; c < kStage; ++c) stage[r][c] = converted<E>(from[c]);
    else
      for (int64_t c = 0; c < columns && c < kStage; ++c) stage[r][c] = converted<E>(from[c * column_stride]);
  }
}

// to[i * to_stride + r] = from[r * from_stride + i] for a square whose rows are 16 bytes.
#ifdef MMK_X86
MMK_INLINE __m128i low_halves(__m128i a, __m128i b, uint16_t) { return _mm_unpacklo_epi16(a, b); }
MMK_INLINE __m128i low_halves(__m128i a, __m128i b, uint32_t) { return _mm_unpacklo_epi32(a, b); }
MMK_INLINE __m128i low_halves(__m128i a, __m128i b, uint64_t) { return _mm_unpacklo_epi64(a, b); }
MMK_INLINE __m128i high_halves(__m128i a, __m128i b, uint16_t) { return _mm_unpackhi_epi16(a, b); }
MMK_INLINE __m128i high_halves(__m128i a, __m128i b, uint32_t) { return _mm_unpackhi_epi32(a, b); }
MMK_INLINE __m128i high_halves(__m128i a, __m128i b, uint64_t) { return _mm_unpackhi_epi64(a, b); }

template <class U>
MMK_INLINE void transpose_square(U* to, int64_t to_stride, const U* from, int64_t from_stride) {
  constexpr int n = 16 / sizeof(U);
  __m128i row[n], next[n];
  for (int i = 0; i < n; ++i) row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
  for (int step = 1; step < n; step *= 2) {  // log2(n) perfect shuffles
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = low_halves(row[i], row[i + n / 2], U{});
      next[2 * i + 1] = high_halves(row[i], row[i + n / 2], U{});
    }
    for (int i = 0; i < n; ++i) row[i] = next[i];
  }
  for (int i = 0; i < n; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), row[i]);
}
#else
template <class U>
MMK_INLINE void transpose_square(U* to, int64_t to_stride, const U* from, int64_t from_stride) {
  constexpr int n = 16 / sizeof(U);
  for (int i = 0; i < n; ++i)
    for (int r = 0; r < n; ++r) to[i * to_stride + r] = from[r * from_stride + i];
}
#endif

// `rows` rows of `to`, `columns` wide, from the columns of a stage seen as units U.
template <class U>
void transpose(void* to_, int64_t to_stride, const void* stage_, int64_t stage_stride, int64_t rows,
               int64_t columns) {
  constexpr int64_t n = 16 / sizeof(U);
  U* to = static_cast<U*>(to_);
  const U* stage = static_cast<const U*>(stage_);
  for (int64_t i = 0; i < rows; i += n)
    for (int64_t r = 0; r < columns; r += n) {
      if (i + n <= rows) {
        transpose_square(to + i * to_stride + r, to_stride, stage + r * stage_stride + i, stage_stride);
        continue;
      }
      U edge[n * n];
      transpose_square(edge, n, stage + r * stage_stride + i, stage_stride);
      for (int64_t e = 0; i + e < rows; ++e) memcpy(to + (i + e) * to_stride + r, edge + e * n, 16);
    }
}

// A row of a packed block from a row of the stage, or from two of them, side by side.
template <class E>
void put_row(E* to, const E (*stage)[kStage]) {
  memcpy(to, stage[0], kColumns * sizeof(E));
}
template <>
void put_row(bf16* to, const bf16 (*stage)[kStage]) {
  uint32_t pairs[kColumns];
  for (int64_t c = 0; c < kColumns; ++c)
    pairs[c] = stage[0][c].bits | static_cast<uint32_t>(stage[1][c].bits) << 16;
  memcpy(static_cast<void*>(to), pairs, sizeof pairs);
}

// A square of a packed block straight from rows of B: no stage, where nothing is at an edge.
MMK_MULTIARCH void interleave(bf16* to, const bf16* from, int64_t stride) {
  for (int64_t k = 0; k < kStage; k += 2, from += 2 * stride, to += 2 * kColumns) {
    uint32_t pairs[kColumns];
    for (int64_t c = 0; c < kColumns; ++c)
      pairs[c] = from[c].bits | static_cast<uint32_t>(from[stride + c].bits) << 16;
    memcpy(static_cast<void*>(to), pairs, sizeof pairs);
  }
}

template <class E> struct Unit { using type = uint32_t; };  // float; bf16 in B is moved in pairs
template <> struct Unit<double> { using type = uint64_t; };

}  // namespace

template <class E, class S>
void pack_b(E* to, const S* b, int64_t N, int64_t K, int64_t stride_n, int64_t stride_k, int64_t first,
            int64_t last) {
  using U = typename Unit<E>::type;
  constexpr int64_t kTogether = sizeof(U) / sizeof(E);  // how many k of a column lie side by side
  const int64_t stored = padded_k<E>(K);
  const bool by_k = stride_n == 1 && stride_k != 1;  // rows of the source are rows of B
  alignas(64) E stage[kStage][kStage];
  const auto pack = [&](int64_t j, int64_t k) {
    const S* from = b + j * kColumns * stride_n + k * stride_k;
    E* block = to + (j * stored + k) * kColumns;
    const int64_t columns = N - j * kColumns, rows = min64(kStage, stored - k);
    if constexpr (std::is_same_v<E, bf16>)
      if (by_k && columns >= kColumns && K - k >= kStage) return interleave(block, from, stride_k);
    if (by_k) {
      gather(stage, from, K - k, columns, stride_k, stride_n);
      for (int64_t r = 0; r < rows; r += kTogether) put_row(block + r * kColumns, stage + r);
    } else {
      gather(stage, from, columns, K - k, stride_n, stride_k);
      transpose<U>(block, kColumns, stage, kStage / kTogether, rows / kTogether, kColumns);
    }
  };
  if (by_k) {  // along the source's rows either way
    for (int64_t k = 0; k < stored; k += kStage)
      for (int64_t j = first; j < last; ++j) pack(j, k);
  } else {
    for (int64_t j = first; j < last; ++j)
      for (int64_t k = 0; k < stored; k += kStage) pack(j, k);
  }
}

template <class E, class S>
void pack_a(E* to, const S* from, int64_t M, int64_t K, int64_t stride_m, int64_t stride_k) {
  using U = std::conditional_t<sizeof(E) == 2, uint16_t, typename Unit<E>::type>;
  constexpr int64_t kLine = 64 / sizeof(E);
  const int64_t stored = ceil_div(padded_k<E>(K), kLine) * kLine, row = lda<E>(K);
  if (stride_k == 1) {  // rows already
    for (int64_t m = 0; m < M; ++m, from += stride_m, to += row) {
      for (int64_t k = 0; k < K; ++k) to[k] = converted<E>(from[k]);
      std::fill(to + K, to + stored, E{});
    }
    return;
  }
  alignas(64) E stage[kStage][kStage];
  for (int64_t k = 0; k < stored; k += kStage)
    for (int64_t m = 0; m < M; m += kStage) {
      gather(stage, from + m * stride_m + k * stride_k, K - k, M - m, stride_k, stride_m);
      transpose<U>(to + m * row + k, row, stage, kStage, min64(kStage, M - m), min64(kStage, stored - k));
    }
}

#define MMK_PACK(E, S)                                                                                       \
  template void pack_b<E, S>(E*, const S*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);             \
  template void pack_a<E, S>(E*, const S*, int64_t, int64_t, int64_t, int64_t);
MMK_PACK(float, float)
MMK_PACK(float, bf16)
MMK_PACK(float, f16)
MMK_PACK(double, double)
MMK_PACK(bf16, bf16)
#undef MMK_PACK

}  // namespace mmkernels::gemm
