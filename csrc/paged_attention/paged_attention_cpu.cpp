// SPDX-License-Identifier: Apache-2.0
// Attention over pages on CPU. A thread takes a piece (rows of one key head against a span of keys, see
// paged_attention.h) and goes over it in blocks of keys with an online softmax, everything in fp32 (fp64). Few rows
// meet the keys where they lie; many rows meet them packed, in the GEMM. Parts of a row are then merged in order.
#include <algorithm>
#include <atomic>
#include <string>

#include "../common/aten.h"
#include "../common/gemm.h"
#include "paged_attention.h"
#include "rows.h"

namespace mmkernels::paged_attention {
namespace {

constexpr const char* kOp = "paged_attention: ";
constexpr int64_t kFewRows = 16;  // up to here packing keys costs more than it saves

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
MMK_MULTIARCH float softmax_step(float* s, int64_t n, int64_t visible, float scale, float* max, float* sum) {
  return softmax_step_body(s, n, visible, scale, max, sum);
}
double softmax_step(double* s, int64_t n, int64_t visible, double scale, double* max, double* sum) {
  return softmax_step_body(s, n, visible, scale, max, sum);
}

#define MMK_WIDEN(S)                                                   \
  MMK_MULTIARCH void widen_row(float* to, const S* from, int64_t n) {  \
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);            \
  }
MMK_WIDEN(bf16)
MMK_WIDEN(f16)
#undef MMK_WIDEN
MMK_MULTIARCH void widen_row(float* to, const int8_t* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}
void widen_row(double* to, const int8_t* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
template <class F>
void widen_row(F* to, const F* from, int64_t n) { memcpy(to, from, n * sizeof(F)); }

// Memory of one thread; pieces start on cache lines.
template <class F>
struct Scratch {
  Tensor memory;
  F *q, *scores, *out, *rows, *packed, *max, *sum;
  int64_t ldq, lds, ldo;
  Scratch(const Tensor& like, ScalarType acc, int64_t R, int64_t d)
      : ldq(gemm::lda<F>(d)), lds(gemm::lda<F>(kKeys)), ldo(ceil_div(d, gemm::kColumns) * gemm::kColumns) {
    const int64_t packed_size = std::max(gemm::packed_elements<F>(kKeys, d), gemm::packed_elements<F>(d, kKeys));
    const Sizes sizes{R * ldq, R * lds, R * ldo, kKeys * d, packed_size, R, R};
    int64_t total = 16;
    for (int64_t n : sizes) total += ceil_div(n, 16) * 16;
    memory = empty(like, {total}, acc);
    F* p = mutable_data<F>(memory);
    p += (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(F);
    size_t i = 0;
    for (F** at : {&q, &scores, &out, &rows, &packed, &max, &sum}) *at = p, p += ceil_div(sizes[i++], 16) * 16;
  }
};

// T: of query and output, C: of the caches.
template <class T, class C>
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
    std::atomic<int64_t> next{0};  // pieces differ in size: whoever is free takes the next one
    torch::stable::parallel_for(0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
      Scratch<F> scratch(like, acc, std::max(kRows, s_.G()), s_.d);
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
  // Row r of a piece: its token, and its head.
  int64_t token(const Piece& p, int64_t r) const { return plan_.tokens[p.first + r / s_.G()]; }

  void attend(const Piece& p, int64_t h, Scratch<F>& x) const {
    const int64_t R = rows_of(p), d = s_.d, G = s_.G();
    for (int64_t r = 0; r < R; ++r) {
      widen_row(x.q + r * x.ldq, query_ + (token(p, r) * s_.Hq + h * G + r % G) * d, d);
      std::fill(x.q + r * x.ldq + d, x.q + (r + 1) * x.ldq, F(0));
      std::fill(x.out + r * x.ldo, x.out + (r + 1) * x.ldo, F(0));
      x.max[r] = -static_cast<F>(INFINITY), x.sum[r] = 0;
    }
    const F scale = k_scale_ ? scale_ * static_cast<F>(k_scale_[h]) : scale_;
    const int64_t end = p.own ? min64(p.end, plan_.limit[token(p, R - 1)]) : p.end;
    const F* at[kKeys];
    for (int64_t j = p.begin; j < end; j += kKeys) {
      const int64_t n = min64(kKeys, end - j);
      gather(at, keys_, k_, p.table, j, n, h, x.rows, R);
      multiply_keys(x, at, R, n);
      for (int64_t r = 0; r < R; ++r) {
        const int64_t visible = p.own ? std::clamp<int64_t>(plan_.limit[token(p, r)] - j, 0, n) : n;
        const F before = softmax_step(x.scores + r * x.lds, n, visible, scale, x.max + r, x.sum + r);
        for (int64_t c = 0; before != 1 && c < d; ++c) x.out[r * x.ldo + c] *= before;
      }
      gather(at, values_, v_, p.table, j, n, h, x.rows, R);
      multiply_values(x, at, R, n);
    }
    for (int64_t r = 0; r < R; ++r) finish(p, token(p, r), h * G + r % G, x.out + r * x.ldo, x.max[r], x.sum[r]);
  }

  // Where the rows of n keys lie, in F: in the cache, or, converted or to be packed, after each other in `rows`.
  void gather(const F** at, const C* cache, const Cache& c, const int64_t* table, int64_t first, int64_t n, int64_t h,
              F* rows, int64_t R) const {
    for (int64_t j = 0; j < n; ++j) {
      const C* from = cache + c.at(table, first + j, h);
      if constexpr (std::is_same_v<C, F>)
        if (R <= kFewRows) {
          at[j] = from;
          continue;
        }
      widen_row(rows + j * s_.d, from, s_.d);
      at[j] = rows + j * s_.d;
    }
  }

  void multiply_keys(Scratch<F>& x, const F* const* at, int64_t R, int64_t n) const {
    if (R <= kFewRows) return dots(x.scores, x.lds, x.q, x.ldq, R, at, n, s_.d);
    const int64_t blocks = ceil_div(n, gemm::kColumns);
    gemm::pack_b<F, F>(x.packed, x.rows, n, s_.d, s_.d, 1, 0, blocks);
    for (int64_t b = 0; b < blocks; ++b)
      gemm::multiply<F>(x.q, x.ldq, R, s_.d, gemm::packed_block<F>(x.packed, s_.d, b), x.scores + b * gemm::kColumns,
                        x.lds, false);
  }
  void multiply_values(Scratch<F>& x, const F* const* at, int64_t R, int64_t n) const {
    if (R <= kFewRows) return add_values(x.out, x.ldo, x.scores, x.lds, R, at, n, s_.d);
    const int64_t blocks = ceil_div(s_.d, gemm::kColumns);
    gemm::pack_b<F, F>(x.packed, x.rows, s_.d, n, 1, s_.d, 0, blocks);
    for (int64_t b = 0; b < blocks; ++b)
      gemm::multiply<F>(x.scores, x.lds, R, n, gemm::packed_block<F>(x.packed, n, b), x.out + b * gemm::kColumns, x.ldo,
                        true);
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
    T* to = out_ + (t * s_.Hq + head) * s_.d;
    for (int64_t c = 0; c < s_.d; ++c) to[c] = Convert<T>::from(sum == 0 ? F(0) : sums[c] / sum * scale);
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

std::vector<int64_t> numbers(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  std::vector<int64_t> found(dense.numel());
  for (size_t i = 0; i < found.size(); ++i)
    found[i] = dense.scalar_type() == ScalarType::Long ? data<int64_t>(dense)[i] : data<int32_t>(dense)[i];
  return found;
}

// Lengths fit their row of the table; pages in use exist.
void check_pages(const Shape& s, const char* lens_name, const char* table_name, const std::vector<int64_t>& lens,
                 const std::vector<int64_t>& table, int64_t width) {
  for (size_t b = 0; b < lens.size(); ++b) {
    if (lens[b] < 0 || lens[b] > width * s.page_size)
      fail(kOp, lens_name, "[", b, "] must be in [0, ", width * s.page_size, "], what ", table_name, " can hold, got ",
           lens[b]);
    for (int64_t i = 0; i < ceil_div(lens[b], s.page_size); ++i)
      if (const int64_t page = table[b * width + i]; page < 0 || page >= s.pages)
        fail(kOp, table_name, "[", b, ", ", i, "] must be a page in [0, ", s.pages, "), got ", page);
  }
}

void check_starts(const Shape& s, const std::vector<int64_t>& starts) {
  if (starts.front() != 0 || starts.back() != s.T)
    fail(kOp, "cu_seqlens_q must be 0 … ", s.T, ", the queries given, got ", starts.front(), " … ", starts.back());
  for (int64_t b = 0; b < s.B; ++b)
    if (starts[b + 1] < starts[b])
      fail(kOp, "cu_seqlens_q[", b + 1, "] must be at least ", starts[b], ", the one before, got ", starts[b + 1]);
}

Call call_of(const Shape& s, const Tensor& table, const Tensor& lens, const OptionalTensor& starts,
             const OptionalTensor& groups, const OptionalTensor& prefix_pages, const OptionalTensor& prefix_lens,
             bool causal) {
  Call c{numbers(lens), {}, numbers(table), {}, {}, {}, table.size(1), 0, causal};
  if (starts) c.starts = numbers(*starts);
  else for (int64_t b = 0; b <= s.B; ++b) c.starts.push_back(b);
  check_starts(s, c.starts);
  check_pages(s, "seq_lens", "block_table", c.lens, c.table, c.width);
  if (!groups) return c;
  c.groups = numbers(*groups), c.prefix_lens = numbers(*prefix_lens), c.prefix_table = numbers(*prefix_pages);
  c.prefix_width = prefix_pages->size(1);
  const int64_t G = static_cast<int64_t>(c.prefix_lens.size());
  for (int64_t b = 0; b < s.B; ++b)
    if (c.groups[b] < -1 || c.groups[b] >= G)
      fail(kOp, "shared_prefix group_of_seq[", b, "] must be in [-1, ", G, "), got ", c.groups[b]);
  check_pages(s, "shared_prefix lens", "shared_prefix pages", c.prefix_lens, c.prefix_table, c.prefix_width);
  return c;
}

bool is_index(const Tensor& t, int64_t dims, int64_t rows) {
  return t.dim() == dims && (rows < 0 || t.size(0) == rows) &&
         (t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int);
}

Shape shape_of(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& table, const Tensor& lens,
               const OptionalTensor& starts, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
               const OptionalTensor& groups, const OptionalTensor& prefix_pages, const OptionalTensor& prefix_lens) {
  if (query.dim() != 3 || keys.dim() != 4 || values.dim() != 4)
    fail(kOp, "query must be [T, Hq, d] and caches [pages, page_size, H, d]");
  const Shape s{lens.numel(),  query.size(0), query.size(1), keys.size(2), keys.size(3), keys.size(0), keys.size(1)};
  const bool bytes = keys.scalar_type() == ScalarType::Char;
  for (int64_t i = 0; i < 4; ++i)
    if (values.size(i) != keys.size(i)) fail(kOp, "value_cache must have the shape of key_cache");
  if (s.H < 1 || s.page_size < 1 || s.d < 1 || s.Hq < 1 || s.Hq % s.H || query.size(2) != s.d)
    fail(kOp, "query must be [T, Hq, ", s.d, "] with Hq a multiple of ", s.H);
  if (values.scalar_type() != keys.scalar_type() || (!bytes && keys.scalar_type() != query.scalar_type()))
    fail(kOp, "caches must have the dtype of query, or be int8");
  for (const OptionalTensor* scale : {&k_scale, &v_scale})
    if (scale->has_value() != bytes || (bytes && ((*scale)->numel() != s.H || (*scale)->scalar_type() != ScalarType::Float)))
      fail(kOp, "k_scale and v_scale must be float32 [", s.H, "] with int8 caches, else None");
  if (!is_index(lens, 1, s.B) || !is_index(table, 2, s.B) || (starts && !is_index(*starts, 1, s.B + 1)) ||
      (!starts && s.T != s.B))
    fail(kOp, "block_table [B, P], seq_lens [B] and cu_seqlens_q [B + 1] must be int32 or int64");
  if (groups.has_value() != prefix_pages.has_value() || groups.has_value() != prefix_lens.has_value() ||
      (groups && (!is_index(*groups, 1, s.B) || !is_index(*prefix_pages, 2, prefix_lens->numel()) ||
                  !is_index(*prefix_lens, 1, -1))))
    fail(kOp, "shared_prefix must be group_of_seq [B], pages [G, P] and lens [G], int32 or int64");
  return s;
}

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
    const auto attend = [&](auto* cache_tag) {
      using C = pointee<decltype(cache_tag)>;
      Attention<T, C>(s, plan, strides_of(keys), strides_of(values), data<T>(query), data<C>(keys), data<C>(values),
                      data<float>(k_scale), data<float>(v_scale), scale, mutable_data<T>(out))
          .run(query);
    };
    if (keys.scalar_type() == ScalarType::Char) attend(static_cast<int8_t*>(nullptr));
    else attend(tag);
  });
  return out;
}

}  // namespace
}  // namespace mmkernels::paged_attention

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) { m.impl("paged_attention", TORCH_BOX(&mmkernels::paged_attention::forward)); }
