// SPDX-License-Identifier: Apache-2.0
// A step of the online softmax. No include guard: paged_attention_cpu.cpp includes it once for each instruction set,
// inside a namespace with MMK_TARGET and kVectorBytes, as gemm_cpu.cpp does gemm_tile.h.

template <class T>
struct Lanes {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using lanes = typename Lanes<T>::type;
#define MMK_LOCAL MMK_TARGET MMK_INLINE

// fast_exp, lane by lane. What is below -104 becomes 0 by itself, and NaN stays NaN.
template <class V>
MMK_LOCAL void exp_of(V& x) {
  typedef lanes<int32_t> I;
  const V lowest = V{} - 104.0f, round = V{} + 12582912.0f;  // 1.5 · 2^23: what it is added to becomes whole
  x = lowest > x ? lowest : x;
  const V k = (x * 1.44269504f + round) - round;
  const V r = x - k * 0.693359375f + k * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  if constexpr (sizeof(V) == 64) {
    x = _mm512_maskz_scalef_ps(0xffff, p, k);
  } else {
    const I e = __builtin_convertvector(k, I), half = e >> 1;  // 2^k in two steps: subnormals round
    x = p * reinterpret_cast<V>((half + 127) << 23) * reinterpret_cast<V>((e - half + 127) << 23);
  }
}
template <>
MMK_LOCAL void exp_of(lanes<double>& x) {
  for (size_t i = 0; i < kVectorBytes / sizeof(double); ++i) x[i] = std::exp(x[i]);
}

// to[0 …] = x as it is stored there, and x becomes that.
template <class E, class V>
MMK_LOCAL void put(E* to, V& x) { *reinterpret_cast<V*>(to) = x; }
#ifdef MMK_X86
template <class V>
MMK_LOCAL void put(bf16* to, V& x) {
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  x = reinterpret_cast<V>(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16));
}
#endif

// The sum and the maximum of kStep lanes, in halves: the same order in every instruction set.
template <class F>
MMK_LOCAL F sum_of(const lanes<F>* parts) {
  F x[kStep];
  memcpy(x, parts, sizeof x);
  for (int i = 0; i < 8; ++i) x[i] += x[i + 8];
  for (int i = 0; i < 4; ++i) x[i] += x[i + 4];
  return (x[0] + x[2]) + (x[1] + x[3]);
}
template <class F>
MMK_LOCAL F max_of(const lanes<F>* parts) {
  F x[kStep];
  memcpy(x, parts, sizeof x);
  for (int i = 0; i < 8; ++i) x[i] = x[i] > x[i + 8] ? x[i] : x[i + 8];
  for (int i = 0; i < 4; ++i) x[i] = x[i] > x[i + 4] ? x[i] : x[i + 4];
  const F a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}

// Scales the first `visible` scores of a row, and those up to a whole step, which become -inf; returns the largest.
template <class F>
MMK_LOCAL F scale_scores(F* s, int64_t visible, F scale) {
  typedef lanes<F> V;
  constexpr int64_t kLanes = kVectorBytes / sizeof(F), kParts = kStep / kLanes;
  const int64_t end = ceil_div(visible, kStep) * kStep;
  for (int64_t j = visible; j < end; ++j) s[j] = s[0];  // which changes no maximum
  V highs[kParts];
  for (int64_t i = 0; i < kParts; ++i) highs[i] = V{} - static_cast<F>(INFINITY);
  for (int64_t j = 0; j < end; j += kStep)
    for (int64_t i = 0; i < kParts; ++i) {
      V& score = *reinterpret_cast<V*>(s + j + i * kLanes);
      score *= scale;
      highs[i] = score > highs[i] ? score : highs[i];
    }
  for (int64_t j = visible; j < end; ++j) s[j] = -static_cast<F>(INFINITY);
  return max_of<F>(highs);
}

// p = exp(score - shift) for the first `visible` ones, to a whole step, then 0 up to n. Returns the sum of what p
// holds: where all probabilities round to one side, so does it.
template <class F, class E>
MMK_LOCAL F exp_scores(E* p, const F* s, int64_t visible, int64_t n, F shift) {
  typedef lanes<F> V;
  constexpr int64_t kLanes = kVectorBytes / sizeof(F), kParts = kStep / kLanes;
  V sums[kParts];
  for (int64_t i = 0; i < kParts; ++i) sums[i] = V{};
  int64_t j = 0;
  for (; j < visible; j += kStep)
    for (int64_t i = 0; i < kParts; ++i) {
      V x = *reinterpret_cast<const V*>(s + j + i * kLanes) - shift;
      exp_of(x);
      put(p + j + i * kLanes, x);
      sums[i] += x;
    }
  for (; j < n; ++j) p[j] = E{};
  return sum_of<F>(sums);
}

// The scores of n keys from `first` on, of which a row sees those before its limit, become probabilities; what the rows
// have so far moves on. Maxima of several rows come first, as a row's exponentials would wait for its own.
template <class F, class E>
MMK_TARGET void softmax_steps(const ScoredRows<F, E>& x, int64_t first, int64_t keys, int64_t n, F scale) {
  constexpr int64_t kRowsAhead = 8;
  const F lowest = -static_cast<F>(INFINITY);
  int64_t visible[kRowsAhead];
  F highs[kRowsAhead];
  for (int64_t begin = 0; begin < x.rows; begin += kRowsAhead) {
    const int64_t end = min64(begin + kRowsAhead, x.rows);
    for (int64_t r = begin; r < end; ++r) {
      visible[r - begin] = x.limit[r] <= first ? 0 : min64(x.limit[r] - first, keys);
      highs[r - begin] = scale_scores(x.s + r * x.lds, visible[r - begin], scale);
    }
    for (int64_t r = begin; r < end; ++r) {
      const F was = x.max[r], high = highs[r - begin] > was ? highs[r - begin] : was;
      const F shift = high == lowest ? F(0) : high;  // no score, or every score NaN or -inf
      const F added = exp_scores(x.p + r * x.ldp, x.s + r * x.lds, visible[r - begin], n, shift);
      x.max[r] = high;
      if (high == was) {
        x.sum[r] += added;
        continue;
      }
      const F before = was == lowest ? F(0) : fast_exp(was - high);
      x.sum[r] = x.sum[r] * before + added;
      for (int64_t c = 0; c < x.ldo; c += kVectorBytes / sizeof(F))
        *reinterpret_cast<lanes<F>*>(x.out + r * x.ldo + c) *= before;
    }
  }
}
#undef MMK_LOCAL
