// SPDX-License-Identifier: Apache-2.0
// Attention over pages on CPU. A thread takes a piece (rows of one key head against a span of keys, see
// paged_attention.h) and goes over it in blocks of keys with an online softmax, whose sums are in fp32 (fp64). Few rows
// meet the keys where they lie, all in fp32. Many rows meet them packed, in the GEMM: of bf16 where the CPU has it, so
// that the probabilities round to bf16 (as the sum they are divided by knows), else of fp32. Parts of a row are then
// merged in order.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "../common/fast_exp.h"
#include "../common/gemm.h"
#include "arguments.h"
#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MMK_X86 1
#include <immintrin.h>
#endif

namespace mmkernels::paged_attention {
namespace {

constexpr int64_t kFewRows = 16;    // up to here packing keys costs more than it saves
constexpr int64_t kFewKeys = 64;    // of a block of few rows
constexpr int64_t kManyKeys = 256;  // of a block of many: packed once for all rows of the piece
constexpr int64_t kTogether = 96;   // many rows whose scores are in cache at a time; whole tiles of every GEMM

MMK_MULTIARCH void dots(float* scores, int64_t ld, const float* q, int64_t ldq, int64_t rows, const float* const* k,
                        int64_t n, int64_t d) {
  dots_body(scores, ld, q, ldq, rows, k, n, d);
}
void dots(double* scores, int64_t ld, const double* q, int64_t ldq, int64_t rows, const double* const* k, int64_t n,
          int64_t d) {
  dots_body(scores, ld, q, ldq, rows, k, n, d);
}
MMK_MULTIARCH void add_values(float* out, int64_t ldo, const float* p, int64_t ld, int64_t rows, const float* const* v,
                              int64_t n, int64_t d) {
  add_values_body(out, ldo, p, ld, rows, v, n, d);
}
void add_values(double* out, int64_t ldo, const double* p, int64_t ld, int64_t rows, const double* const* v, int64_t n,
                int64_t d) {
  add_values_body(out, ldo, p, ld, rows, v, n, d);
}

// Rows of scores that become probabilities p (which may lie where the scores do), what each row sees (keys before its
// limit), and the row's maximum, sum and output so far.
template <class F, class E>
struct ScoredRows {
  int64_t rows;
  E* p;
  int64_t ldp;
  F* s;
  int64_t lds;
  const int64_t* limit;
  F *max, *sum, *out;
  int64_t ldo;
};
constexpr int64_t kStep = 16;  // scores at a time, fixed, so that every instruction set adds in the same order

namespace generic {
#define MMK_TARGET
constexpr int kVectorBytes = 16;
#include "softmax_step.h"
#undef MMK_TARGET
}  // namespace generic
#ifdef MMK_X86
namespace avx2 {
#define MMK_TARGET __attribute__((target("avx2,fma")))
constexpr int kVectorBytes = 32;
#include "softmax_step.h"
#undef MMK_TARGET
}  // namespace avx2
namespace avx512 {
#define MMK_TARGET __attribute__((target("avx512f")))
constexpr int kVectorBytes = 64;
#include "softmax_step.h"
#undef MMK_TARGET
}  // namespace avx512
namespace avx512_bf16 {
#define MMK_TARGET __attribute__((target("avx512f,avx512bf16")))
constexpr int kVectorBytes = 64;
#include "softmax_step.h"
#undef MMK_TARGET
}  // namespace avx512_bf16
#endif

template <class F, class E>
void softmax_steps(const ScoredRows<F, E>& x, int64_t first, int64_t keys, int64_t n, F scale) {
#ifdef MMK_X86
  if constexpr (!std::is_same_v<E, F>) return avx512_bf16::softmax_steps(x, first, keys, n, scale);
  else if (gemm::isa() >= gemm::Isa::avx512) return avx512::softmax_steps(x, first, keys, n, scale);
  else if (gemm::isa() >= gemm::Isa::avx2) return avx2::softmax_steps(x, first, keys, n, scale);
#endif
  if constexpr (std::is_same_v<E, F>) generic::softmax_steps(x, first, keys, n, scale);
}

#define MMK_CONVERT(To, From)                                                   \
  MMK_MULTIARCH void convert_row(To* to, const From* from, int64_t n) {         \
    for (int64_t i = 0; i < n; ++i) to[i] = Convert<To>::from(widen(from[i]));  \
  }
MMK_CONVERT(float, bf16)
MMK_CONVERT(float, f16)
#undef MMK_CONVERT
template <class To>
void convert_row(To* to, const int8_t* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = Convert<To>::from(static_cast<float>(from[i]));  // exact
}
template <class F>
void convert_row(F* to, const F* from, int64_t n) { memcpy(to, from, n * sizeof(F)); }

#define MMK_DIVIDE(To)                                                                                 \
  MMK_MULTIARCH void divide_row(To* to, const acc_t<To>* x, acc_t<To> by, acc_t<To> scale, int64_t n) {  \
    for (int64_t i = 0; i < n; ++i) to[i] = Convert<To>::from(by == 0 ? 0 : x[i] / by * scale);        \
  }
MMK_DIVIDE(float)
MMK_DIVIDE(bf16)
MMK_DIVIDE(f16)
MMK_DIVIDE(double)
#undef MMK_DIVIDE

// Memory of one thread, in cache lines.
template <class F, class E>
struct Scratch {
  Tensor memory;
  int64_t* limit;  // keys a row sees, counted as those of its piece
  F *out, *max, *sum, *scores, *few_q, *few_rows;
  E *q, *p, *rows, *keys, *values;
  int64_t ldo, lds, ldq, ldp;

  // For pieces of up to R rows.
  Scratch(const Tensor& like, int64_t R, int64_t d)
      : ldo(ceil_div(d, gemm::kColumns) * gemm::kColumns),
        lds(gemm::lda<F>(kManyKeys)),
        ldq(gemm::lda<E>(d)),
        ldp(gemm::lda<E>(kManyKeys)) {
    memory = empty(like, {static_cast<int64_t>(place(0, R, d)) + 64}, ScalarType::Byte);
    place(ceil_div(reinterpret_cast<uintptr_t>(memory.data_ptr()), 64) * 64, R, d);
  }

 private:
  uintptr_t place(uintptr_t at, int64_t R, int64_t d) {
    const auto take = [&](auto*& p, int64_t n) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(at);
      at += ceil_div(n * static_cast<int64_t>(sizeof(*p)), 64) * 64;
    };
    const int64_t few = std::min(R, kFewRows), many = R > kFewRows ? R : 0, together = std::min(many, kTogether);
    take(limit, R), take(out, R * ldo), take(max, R), take(sum, R);
    take(scores, std::max(few, together) * lds), take(few_q, few * d), take(few_rows, kFewKeys * d);
    take(q, many * ldq), take(p, together * ldp), take(rows, many ? kManyKeys * d : 0);
    take(keys, many ? gemm::packed_elements<E>(kManyKeys, d) : 0);
    take(values, many ? gemm::packed_elements<E>(d, kManyKeys) : 0);
    return at;
  }
};

// T: of query and output, C: of the caches, E: what many rows are multiplied in.
template <class T, class C, class E>
class Attention {
  using F = acc_t<T>;

 public:
  Attention(const Shape& s, const Plan& plan, Cache k, Cache v, const T* query, const C* keys, const C* values,
            const float* k_scale, const float* v_scale, double scale, T* out)
      : s_(s), plan_(plan), k_(k), v_(v), query_(query), keys_(keys), values_(values), k_scale_(k_scale),
        v_scale_(v_scale), scale_(static_cast<F>(scale)), out_(out) {}

  void run(const Tensor& like) {
    const ScalarType acc = std::is_same_v<F, double> ? ScalarType::Double : ScalarType::Float;
    const int64_t parts = plan_.first_part[s_.T], tasks = static_cast<int64_t>(plan_.pieces.size()) * s_.H;
    const Tensor partial = empty(like, {parts * s_.Hq * (s_.d + 2)}, acc);
    partial_ = mutable_data<F>(partial);
    int64_t most = 0;
    for (const Piece& p : plan_.pieces) most = std::max(most, rows_of(p));
    std::atomic<int64_t> next{0};  // pieces differ in size: whoever is free takes the next one
    const int64_t threads = torch::stable::get_num_threads();
    torch::stable::parallel_for(0, min64(tasks, threads), 1, [&](int64_t, int64_t) {
      Scratch<F, E> scratch(like, most, s_.d);
      for (int64_t i = tasks - 1 - next++; i >= 0; i = tasks - 1 - next++)  // last ones first: causal, they are longest
        attend(plan_.pieces[i / s_.H], i % s_.H, scratch);
    });
    torch::stable::parallel_for(0, s_.T, std::max<int64_t>(1, 16384 / (s_.Hq * s_.d)), [&](int64_t begin, int64_t end) {
      std::vector<F> sum(s_.d);
      for (int64_t t = begin; t < end; ++t)
        if (plan_.parts[t] != 1)
          for (int64_t head = 0; head < s_.Hq; ++head) merge(t, head, sum.data());
    });
  }

 private:
  int64_t rows_of(const Piece& p) const { return p.count * s_.G(); }
  // Row r of a piece: its token, and its values in the query.
  int64_t token(const Piece& p, int64_t r) const { return plan_.tokens[p.first + r / s_.G()]; }
  const T* row(const Piece& p, int64_t h, int64_t r) const {
    return query_ + (token(p, r) * s_.Hq + h * s_.G() + r % s_.G()) * s_.d;
  }

  void attend(const Piece& p, int64_t h, Scratch<F, E>& x) const {
    const int64_t R = rows_of(p), G = s_.G();
    for (int64_t r = 0; r < R; ++r) {
      x.limit[r] = p.own ? std::min(p.end, plan_.limit[token(p, r)]) : p.end;
      x.max[r] = -static_cast<F>(INFINITY), x.sum[r] = 0;
    }
    std::fill(x.out, x.out + R * x.ldo, F(0));
    const F scale = k_scale_ ? scale_ * static_cast<F>(k_scale_[h]) : scale_;
    R <= kFewRows ? few(p, h, R, scale, x) : many(p, h, R, scale, x);
    for (int64_t r = 0; r < R; ++r) finish(p, token(p, r), h * G + r % G, x.out + r * x.ldo, x.max[r], x.sum[r]);
  }

  void few(const Piece& p, int64_t h, int64_t R, F scale, Scratch<F, E>& x) const {
    const int64_t d = s_.d, end = x.limit[R - 1];  // the last row sees most
    for (int64_t r = 0; r < R; ++r) convert_row(x.few_q + r * d, row(p, h, r), d);
    const F* at[kFewKeys];
    for (int64_t j = p.begin; j < end; j += kFewKeys) {
      const int64_t n = min64(kFewKeys, end - j);
      find(at, keys_, k_, p.table, j, n, h, x.few_rows);
      dots(x.scores, x.lds, x.few_q, d, R, at, n, d);
      softmax_steps<F, F>({R, x.scores, x.lds, x.scores, x.lds, x.limit, x.max, x.sum, x.out, x.ldo}, j, n, n, scale);
      find(at, values_, v_, p.table, j, n, h, x.few_rows);
      add_values(x.out, x.ldo, x.scores, x.lds, R, at, n, d);
    }
  }

  void many(const Piece& p, int64_t h, int64_t R, F scale, Scratch<F, E>& x) const {
    const int64_t d = s_.d, end = x.limit[R - 1];
    for (int64_t r = 0; r < R; ++r) {
      convert_row(x.q + r * x.ldq, row(p, h, r), d);
      std::fill(x.q + r * x.ldq + d, x.q + (r + 1) * x.ldq, E{});
    }
    for (int64_t j = p.begin; j < end; j += kManyKeys) {
      const int64_t n = min64(kManyKeys, end - j);
      gather(keys_, k_, p.table, j, n, h, x.rows);
      gemm::pack_b<E, E>(x.keys, x.rows, n, d, d, 1, 0, ceil_div(n, gemm::kColumns));
      gather(values_, v_, p.table, j, n, h, x.rows);
      gemm::pack_b<E, E>(x.values, x.rows, d, n, 1, d, 0, ceil_div(d, gemm::kColumns));
      for (int64_t r = 0; r < R; r += kTogether) block(j, n, r, min64(kTogether, R - r), scale, x);
    }
  }

  // `rows` rows from `first` on against n packed keys from j on, but those that none of the rows sees.
  void block(int64_t j, int64_t n, int64_t first, int64_t rows, F scale, Scratch<F, E>& x) const {
    const int64_t seen = min64(n, x.limit[first + rows - 1] - j), stored = gemm::padded_k<E>(seen);
    if (seen <= 0) return;
    E* p = std::is_same_v<E, F> ? reinterpret_cast<E*>(x.scores) : x.p;
    const int64_t ldp = std::is_same_v<E, F> ? x.lds : x.ldp;
    for (int64_t c = 0; c < seen; c += gemm::kColumns)
      gemm::multiply<E>(x.q + first * x.ldq, x.ldq, rows, s_.d, gemm::packed_block<E>(x.keys, s_.d, c / gemm::kColumns),
                        x.scores + c, x.lds, false);
    F *max = x.max + first, *sum = x.sum + first, *out = x.out + first * x.ldo;
    softmax_steps<F, E>({rows, p, ldp, x.scores, x.lds, x.limit + first, max, sum, out, x.ldo}, j, seen, stored, scale);
    for (int64_t c = 0; c < s_.d; c += gemm::kColumns)
      gemm::multiply<E>(p, ldp, rows, seen, gemm::packed_block<E>(x.values, n, c / gemm::kColumns), out + c, x.ldo,
                        true);
  }

  // Where the rows of n keys lie, in F: in the cache or, converted, after each other in `rows`.
  void find(const F** at, const C* cache, const Cache& c, const int64_t* table, int64_t first, int64_t n, int64_t h,
            F* rows) const {
    for (int64_t j = 0; j < n; ++j) {
      const C* from = cache + c.at(table, first + j, h);
      if constexpr (std::is_same_v<C, F>) at[j] = from;
      else convert_row(rows + j * s_.d, from, s_.d), at[j] = rows + j * s_.d;
    }
  }
  void gather(const C* cache, const Cache& c, const int64_t* table, int64_t first, int64_t n, int64_t h,
              E* rows) const {
    for (int64_t j = 0, run; j < n; j += run) {
      run = min64(n - j, c.page_size - (first + j) % c.page_size);  // of one page
      const C* from = cache + c.at(table, first + j, h);
      for (int64_t i = 0; i < run; ++i) convert_row(rows + (j + i) * s_.d, from + i * c.stride_slot, s_.d);
    }
  }

  // The partial sums of a part of a row: [d] values, then max and sum.
  F* part(int64_t t, int64_t index, int64_t head) const {
    return partial_ + ((plan_.first_part[t] + index) * s_.Hq + head) * (s_.d + 2);
  }
  void finish(const Piece& p, int64_t t, int64_t head, const F* sums, F max, F sum) const {
    if (plan_.parts[t] == 1) return write(t, head, sums, sum);
    F* to = part(t, p.part, head);
    memcpy(to, sums, s_.d * sizeof(F));
    to[s_.d] = max, to[s_.d + 1] = sum;
  }
  void write(int64_t t, int64_t head, const F* sums, F sum) const {
    const F scale = v_scale_ ? static_cast<F>(v_scale_[head / s_.G()]) : F(1);
    divide_row(out_ + (t * s_.Hq + head) * s_.d, sums, sum, scale, s_.d);
  }
  void merge(int64_t t, int64_t head, F* sums) const {
    F max = -static_cast<F>(INFINITY), sum = 0;
    const int64_t parts = plan_.parts[t];
    for (int64_t i = 0; i < parts; ++i) max = std::max(max, part(t, i, head)[s_.d]);
    std::fill(sums, sums + s_.d, F(0));
    for (int64_t i = 0; i < parts; ++i) {
      const F* from = part(t, i, head);
      if (from[s_.d + 1] == 0) continue;  // no visible key
      const F weight = std::exp(from[s_.d] - (max == -static_cast<F>(INFINITY) ? from[s_.d] : max));
      sum += weight * from[s_.d + 1];
      for (int64_t c = 0; c < s_.d; ++c) sums[c] += weight * from[c];
    }
    write(t, head, sums, sum);
  }

  const Shape& s_;
  const Plan& plan_;
  const Cache k_, v_;
  const T* query_;
  const C *keys_, *values_;
  const float *k_scale_, *v_scale_;
  const F scale_;
  T* out_;
  F* partial_ = nullptr;
};

Tensor with_rows(const Tensor& cache) {
  return cache.stride(3) == 1 || cache.size(3) == 1 ? cache : torch::stable::contiguous(cache);
}
Cache strides_of(const Tensor& cache) { return {cache.size(1), cache.stride(0), cache.stride(1), cache.stride(2)}; }

Tensor forward(const Tensor& query_, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
               const Tensor& seq_lens, const OptionalTensor& cu_seqlens_q, const OptionalTensor& k_scale_,
               const OptionalTensor& v_scale_, const OptionalTensor& group_of_seq, const OptionalTensor& prefix_pages,
               const OptionalTensor& prefix_lens, bool causal, double scale) {
  const Shape s = shape_of(query_, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, k_scale_, v_scale_,
                           group_of_seq, prefix_pages, prefix_lens);
  const Call call = call_of(s, block_table, seq_lens, cu_seqlens_q, group_of_seq, prefix_pages, prefix_lens, causal);
  const Plan plan = plan_of(s, call);
  const Tensor query = torch::stable::contiguous(query_), keys = with_rows(key_cache), values = with_rows(value_cache);
  const OptionalTensor k_scale = contiguous(k_scale_), v_scale = contiguous(v_scale_);
  const Tensor out = empty(query, {s.T, s.Hq, s.d});
  if (out.numel() == 0) return out;
  dispatch_float("paged_attention", query.scalar_type(), [&](auto* tag) {
    using T = pointee<decltype(tag)>;
    const auto attend = [&](auto* cache_tag, auto* element_tag) {
      using C = pointee<decltype(cache_tag)>;
      Attention<T, C, pointee<decltype(element_tag)>>(s, plan, strides_of(keys), strides_of(values), data<T>(query),
                                                      data<C>(keys), data<C>(values), data<float>(k_scale),
                                                      data<float>(v_scale), scale, mutable_data<T>(out))
          .run(query);
    };
    const auto attend_in = [&](auto* element_tag) {
      if (keys.scalar_type() == ScalarType::Char) attend(static_cast<int8_t*>(nullptr), element_tag);
      else attend(tag, element_tag);
    };
    if constexpr (std::is_same_v<T, bf16>)
      if (gemm::has_bf16()) return attend_in(tag);
    attend_in(static_cast<acc_t<T>*>(nullptr));
  });
  return out;
}

}  // namespace
}  // namespace mmkernels::paged_attention

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) { m.impl("paged_attention", TORCH_BOX(&mmkernels::paged_attention::forward)); }
