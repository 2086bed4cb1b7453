// SPDX-License-Identifier: Apache-2.0
// Absorbed cross-attention on CPU: q' = q·W_k, S = q'·Xᵀ, Z = softmax(S)·X, out = Z·W_vᵀ. Neither K nor V is
// formed. A thread takes one group of heads of one sample from end to end, so q', S and Z stay in its cache; where a
// head has few queries, what multiplies with weights (q', out) is one product for many samples instead. Products by
// torch's GEMM in fp32 (fp64 for float64), so q' and Z never round to 16 bits; a forward in bf16 on AMX splits them into
// two halves (halves.h).
#include <algorithm>

#include "../common/aten.h"
#include "cross_attention.h"
#include "halves.h"

namespace mmkernels::cross_attention {
namespace {

constexpr int64_t kGroupRows = 64;  // score rows of a group of heads: enough for the GEMM, small for the cache
constexpr int64_t kHalvesRows = 192;  // the same for halves, which pack the context once for each group
constexpr int64_t kFewQueries = 16;  // below, weights are read once for many samples
constexpr int64_t kTogetherBytes = 8 << 20;  // of q' or Z of the samples of one such product

MMK_MULTIARCH float exp_row(float* scores, int64_t n, float* max) { return exp_row_body(scores, n, max); }
double exp_row(double* scores, int64_t n, double* max) { return exp_row_body(scores, n, max); }

// The offsets of a packed context as int64: from 0 on, never falling, at most `longest` apart, up to its last token.
OptionalTensor offsets_of(const OptionalTensor& cu_seqlens, const Tensor& context, int64_t longest) {
  if (!cu_seqlens) return std::nullopt;
  if (cu_seqlens->dim() != 1 || cu_seqlens->numel() < 1 ||
      (cu_seqlens->scalar_type() != ScalarType::Long && cu_seqlens->scalar_type() != ScalarType::Int))
    fail("cross_attention: cu_seqlens must be int32 or int64 [B + 1]");
  const Tensor found = torch::stable::contiguous(torch::stable::to(*cu_seqlens, ScalarType::Long));
  const int64_t *at = data<int64_t>(found), B = found.numel() - 1;
  for (int64_t b = 0; b < B; ++b)
    if (at[b + 1] < at[b] || at[b + 1] - at[b] > longest)
      fail("cross_attention: cu_seqlens must never fall nor grow by more than max_seqlen ", longest, ", got ", at[b],
           " and ", at[b + 1], " at ", b);
  if (at[0] != 0 || at[B] != context.size(0))
    fail("cross_attention: cu_seqlens must go from 0 to ", context.size(0), ", got ", at[0], " and ", at[B]);
  return found;
}

Shape shape_of(const Tensor& query, const Tensor& context, const OptionalTensor& latents, const Tensor& w_k,
               const Tensor& w_v, int64_t A, const OptionalTensor& offsets, int64_t longest) {
  const bool shared = query.dim() == 2;
  if (context.dim() != (offsets ? 2 : 3) || (query.dim() != 3 && !shared) || A < 1)
    fail("cross_attention: query must be [B, Q, A·d] or [Q, A·d] and context [B, n, X], or [T, X] with cu_seqlens");
  const int64_t width = query.size(query.dim() - 1), X = context.size(context.dim() - 1);
  const int64_t B = offsets ? offsets->numel() - 1 : context.size(0);
  const auto fits = [&](const Tensor& w) { return w.dim() == 2 && w.size(0) == width && w.size(1) == X; };
  if (width % A || width == 0 || !fits(w_k) || !fits(w_v) || (!shared && query.size(0) != B))
    fail("cross_attention: weights must be [A·d, X] for query width ", width, ", context width ", X);
  for (const Tensor* t : {&context, &w_k, &w_v, latents ? &*latents : &context})
    if (t->scalar_type() != query.scalar_type())
      fail("cross_attention: query, context, latents and weights must share one dtype");
  if (latents && (latents->dim() != 3 || latents->size(0) != B || latents->size(2) != X))
    fail("cross_attention: latents must be [", B, ", L, ", X, "]");
  const int64_t own = offsets ? longest : context.size(1), n = own + (latents ? latents->size(1) : 0);
  return {B, query.size(query.dim() - 2), n, own, X, A, width / A, shared, data<int64_t>(offsets)};
}

Mask mask_of(const OptionalTensor& mask, const Shape& s) {
  if (!mask) return {};
  if (mask->dim() != 4 || mask->size(0) != s.B || mask->size(1) != s.A || mask->size(2) != s.Q ||
      mask->size(3) != s.n)
    fail("cross_attention: attention_mask must be expanded to [B, A, Q, n]");
  Mask::Kind kind = Mask::kBool;
  switch (mask->scalar_type()) {
    case ScalarType::Bool: kind = Mask::kBool; break;
    case ScalarType::Float: kind = Mask::kFloat; break;
    case ScalarType::Double: kind = Mask::kDouble; break;
    case ScalarType::BFloat16: kind = Mask::kBfloat16; break;
    case ScalarType::Half: kind = Mask::kHalf; break;
    default: fail("cross_attention: attention_mask must be bool or float");
  }
  return {kind, mask->data_ptr(), mask->stride(0), mask->stride(1), mask->stride(2), mask->stride(3)};
}

// Of [B, A, Q, n], bool: True = kept.
Mask dropout_of(const OptionalTensor& mask, const Shape& s) {
  const Mask found = mask_of(mask, s);
  if (mask && found.kind != Mask::kBool) fail("cross_attention: dropout_mask must be bool");
  return found;
}

ScalarType accumulation(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor widened(const Tensor& t, ScalarType acc) {
  return aligned(t.scalar_type() == acc ? t : torch::stable::to(t, acc));
}

MMK_MULTIARCH void add_to(float* sum, const float* part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += part[i];
}
void add_to(double* sum, const double* part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += part[i];
}
template <class F>
void widen_row(F* to, const F* from, int64_t n) {
  if (n) memcpy(to, from, n * sizeof(F));  // of nothing the pointers may be null, which memcpy forbids
}
MMK_MULTIARCH void widen_row(float* to, const bf16* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
void widen_row(float* to, const f16* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

// Whether a row could spoil what it is multiplied by 0 in: NaN, Inf, or so large that its products overflow.
template <class T>
bool spoils(const T* row, int64_t n) {
  bool found = false;
  for (int64_t i = 0; i < n; ++i) found |= !(std::abs(static_cast<double>(widen(row[i]))) <= 1e15);
  return found;
}

// Keys that no query may attend to count for nothing, whatever they hold. Where one could spoil a product, this is
// [B, own + 1]: 1 for each such key to be read as 0, and last whether the sample has one. Mostly there is none.
template <class T>
OptionalTensor spoiled_of(const Mask& mask, const Shape& s, const Tensor& context) {
  if (mask.kind == Mask::kNone || s.offsets || s.B * s.own == 0) return std::nullopt;
  const Tensor found = empty(context, {s.B, s.own + 1}, ScalarType::Byte);
  torch::stable::parallel_for(0, s.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      uint8_t* const hidden = mutable_data<uint8_t>(found) + b * (s.own + 1);
      hidden[s.own] = 0;
      if (mask.find_hidden(hidden, b, s.A, s.Q, s.own) == 0) continue;
      for (int64_t j = 0; j < s.own && !hidden[s.own]; ++j)
        hidden[s.own] = hidden[j] && spoils(data<T>(context) + (b * s.own + j) * s.X, s.X);
    }
  });
  for (int64_t b = 0; b < s.B; ++b)
    if (data<uint8_t>(found)[b * (s.own + 1) + s.own]) return found;
  return std::nullopt;
}

// What all tasks share, in the accumulation type F.
template <class T>
struct Problem {
  using F = acc_t<T>;
  Shape s;
  Mask mask, dropout;
  F kept;            // what dropout multiplies the probabilities it keeps by
  ScalarType acc;
  Tensor context, latents;  // [B, own, X] or [T, X] and, perhaps, [B, n - own, X], in their own dtype
  OptionalTensor spoiled;  // keys to be read as 0
  Tensor shares;     // with dropout of a bias: what is left of the sum of each row's probabilities, [B, A, Q]
  bool halves;       // products by halves.h: w_k, w_v packed by head, query as given
  Tensor w_k, w_v;   // [A·d, X]
  Tensor query;      // scaled, [B or 1, Q, A·d]
  F scale;           // what scores are still to be multiplied by
  int64_t heads;     // in a group

  Problem(const Shape& shape, const Tensor& q, const Tensor& x, const OptionalTensor& more, const Tensor& key_weight,
          const Tensor& value_weight, const OptionalTensor& value_bias, const OptionalTensor& m,
          const OptionalTensor& dropout_mask, double factor, double dropout_p, bool forward)
      : s(shape),
        mask(mask_of(m, s)),
        dropout(dropout_of(dropout_mask, s)),
        kept(static_cast<F>(1 / (1 - dropout_p))),
        acc(accumulation(q)),
        context(aligned(x)),
        latents(more ? torch::stable::contiguous(*more) : context),
        spoiled(spoiled_of<T>(mask, s, context)),
        shares(empty(q, {value_bias && dropout_mask ? s.B * s.rows() : 0}, acc)),
        halves(forward && std::is_same_v<T, bf16> && gemm::isa() == gemm::Isa::amx_bf16),
        w_k(halves ? packed(key_weight, true) : widened(key_weight, acc)),
        w_v(halves ? packed(value_weight, false) : widened(value_weight, acc)),
        query(halves ? torch::stable::contiguous(q) : torch::stable::clone(widened(q, acc))),
        scale(static_cast<F>(halves ? factor : 1)),
        heads(std::max<int64_t>(1, std::min(s.A, group_rows() / std::max<int64_t>(1, s.Q)))) {
    F* p = mutable_data<F>(query);
    for (int64_t i = 0; !halves && i < query.numel(); ++i) p[i] *= static_cast<F>(factor);
  }

  // Halves give a row the same bits in any group: theirs may be large where enough are left for all threads.
  int64_t group_rows() const { return halves && s.B * s.rows() >= 8 * kHalvesRows ? kHalvesRows : kGroupRows; }
  int64_t groups() const { return ceil_div(s.A, heads); }
  // Samples whose products with the weights are done together: enough to be more rows than a head's queries are.
  int64_t together() const {
    const int64_t bytes = std::max<int64_t>(1, s.rows() * s.X * static_cast<int64_t>(sizeof(F)));
    return std::max<int64_t>(1, std::min(s.B, kTogetherBytes / bytes));
  }
  bool few_queries(int64_t samples) const { return s.Q < kFewQueries && samples > s.Q; }
  int64_t heads_in(int64_t g) const { return std::min(heads, s.A - g * heads); }
  int64_t block() const { return s.Q * s.A * s.d; }  // values of query, grad and out in a sample

  // Rows of sample b of a [B, Q, A·d] tensor as [heads of g, Q, d].
  Tensor heads_of(const F* rows, int64_t b, int64_t g) const {
    return blob(rows + b * block() + g * heads * s.d, {heads_in(g), s.Q, s.d}, {s.d, s.A * s.d, 1}, acc);
  }
  Tensor query_of(int64_t b, int64_t g) const { return heads_of(data<F>(query), s.shared ? 0 : b, g); }
  Tensor weight_of(const Tensor& w, int64_t g) const {  // [heads of g, d, X]
    return blob(data<F>(w) + g * heads * s.d * s.X, {heads_in(g), s.d, s.X}, {s.d * s.X, s.X, 1}, acc);
  }
  Tensor weight_of_transposed(const Tensor& w, int64_t g) const {
    return blob(data<F>(w) + g * heads * s.d * s.X, {heads_in(g), s.X, s.d}, {s.d * s.X, 1, s.X}, acc);
  }
  // [heads of g, Q, cols] over rows [heads·Q, cols].
  Tensor by_head(const F* rows, int64_t g, int64_t cols) const {
    return blob(rows, {heads_in(g), s.Q, cols}, {s.Q * cols, cols, 1}, acc);
  }
  // Head h of `rows` [samples, Q, A·d] through its part of w: to row h·Q + q of each sample, rows of X.
  void widen_together(const F* rows, const Tensor& w, int64_t samples, int64_t h, F* to, int64_t sample_stride) const {
    for (int64_t q = 0; q < s.Q; ++q)
      mm_out(blob(rows + (q * s.A + h) * s.d, {samples, s.d}, {block(), 1}, acc),
             matrix(data<F>(w) + h * s.d * s.X, s.d, s.X),
             blob(to + (h * s.Q + q) * s.X, {samples, s.X}, {sample_stride, 1}, acc));
  }
  Tensor matrix(const F* p, int64_t rows, int64_t cols) const { return rows_blob(p, rows, cols, acc); }
  Tensor transposed(const F* p, int64_t rows, int64_t cols) const {
    return blob(p, {cols, rows}, {1, cols}, acc);
  }

  // Context of sample b in F: in place, or widened into `scratch`, latents after it.
  const F* context_of(int64_t b, F* scratch) const {
    const T* x = data<T>(context) + s.first_of(b) * s.X;
    const uint8_t* const hidden = hidden_of(b);
    if constexpr (std::is_same_v<T, F>)
      if (s.own == s.n && !hidden) return x;
    const int64_t own = s.own_of(b) * s.X, more = s.latents() * s.X;
    widen_row(scratch, x, own);
    if (more) widen_row(scratch + own, data<T>(latents) + b * more, more);
    for (int64_t j = 0; hidden && j < s.own; ++j)
      if (hidden[j]) std::fill(scratch + j * s.X, scratch + (j + 1) * s.X, F(0));
    return scratch;
  }
  int64_t context_scratch() const { return std::is_same_v<T, F> && s.own == s.n && !spoiled ? 0 : s.n * s.X; }
  // Keys of sample b to be read as 0, [own], or null.
  const uint8_t* hidden_of(int64_t b) const {
    const uint8_t* const found = spoiled ? data<uint8_t>(*spoiled) + b * (s.own + 1) : nullptr;
    return found && found[s.own] ? found : nullptr;
  }

  Halves halves_of(int64_t rows) const { return {rows, s.n, s.X, s.d, s.own != s.n || spoiled}; }
  int64_t halves_scratch(int64_t rows) const { return halves ? halves_of(rows).floats() : 0; }
  Tensor packed(const Tensor& weight, bool of_keys) const {
    const Halves h = halves_of(0);
    const Tensor w = torch::stable::contiguous(weight);
    const int64_t size = of_keys ? h.key_elements() : h.value_elements();
    const Tensor to = empty(w, {s.A, size});
    torch::stable::parallel_for(0, s.A, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        bf16* const at = mutable_data<bf16>(to) + head * size;
        const bf16* const from = data<bf16>(w) + head * s.d * s.X;
        of_keys ? h.pack_key(at, from) : h.pack_value(at, from);
      }
    });
    return to;
  }
  const bf16* packed_of(const Tensor& w, int64_t head) const { return data<bf16>(w) + head * w.size(1); }
  // Context of sample b as halves read it.
  const bf16* halves_context_of(const Halves& h, int64_t b, float* memory) const {
    const bf16* x = data<bf16>(context) + s.first_of(b) * s.X;
    if (!h.copies()) return x;
    bf16* const to = h.copy(memory);
    const int64_t ld = h.context_stride(), own = s.own_of(b);
    const uint8_t* const hidden = hidden_of(b);
    for (int64_t j = 0; j < s.n_of(b); ++j) {
      if (hidden && j < own && hidden[j]) {
        std::fill(to + j * ld, to + (j + 1) * ld, bf16{});
        continue;
      }
      const bf16* from = j < own ? x + j * s.X : data<bf16>(latents) + (b * s.latents() + j - own) * s.X;
      memcpy(static_cast<void*>(to + j * ld), from, s.X * sizeof(bf16));
      std::fill(to + j * ld + s.X, to + (j + 1) * ld, bf16{});
    }
    return to;
  }
  // q' of `rows` queries of head h, from value `first` of the query on and `stride` apart.
  void absorb_halves(F* to, int64_t ld, int64_t first, int64_t stride, int64_t rows, int64_t h, F* memory) const {
    if constexpr (std::is_same_v<T, bf16>)
      halves_of(rows).absorb(to, ld, data<bf16>(query) + first, stride, rows, packed_of(w_k, h), memory);
  }
  // The output of `rows` rows of Z of head h.
  void project_halves(F* to, const F* z, int64_t stride, int64_t rows, int64_t h, F* memory) const {
    if constexpr (std::is_same_v<T, bf16>) halves_of(rows).project(to, z, stride, rows, packed_of(w_v, h), memory);
  }

  // Masked scores of the group's rows: scores [heads·Q, n] = q' · Xᵀ.
  void score(F* scores, const F* absorbed, const F* x, int64_t b, int64_t g) const {
    const int64_t rows = heads_in(g) * s.Q, n = s.n_of(b);
    mm_out(matrix(absorbed, rows, s.X), transposed(x, n, s.X), matrix(scores, rows, n));
    add_mask(scores, b, g);
  }
  void add_mask(F* scores, int64_t b, int64_t g) const {
    const int64_t rows = heads_in(g) * s.Q, n = s.n_of(b);
    for (int64_t r = 0; mask.kind != Mask::kNone && r < rows; ++r)
      mask.add_to(scores + r * n, mask.row(b, g * heads + r / s.Q, r % s.Q), n);
  }
  // Row r of a group: probabilities, or their gradients, after dropout.
  void drop(F* row, int64_t b, int64_t g, int64_t r) const {
    if (dropout.kind == Mask::kNone) return;
    const int64_t first = dropout.row(b, g * heads + r / s.Q, r % s.Q), own = s.own_of(b);
    for (int64_t j = 0; j < s.n_of(b); ++j) {
      const int64_t at = j < own ? j : j + s.own - own;  // latents come after the longest sample
      row[j] = dropout.allows(first + at * dropout.stride_n) ? row[j] * kept : F(0);
    }
  }
  // Row r of a group of dropped probabilities: its sum, for where b_v is added or has its gradient.
  void keep_share(const F* row, int64_t b, int64_t g, int64_t r) const {
    if (shares.numel() == 0) return;
    double sum = 0;
    for (int64_t j = 0; j < s.n_of(b); ++j) sum += row[j];
    mutable_data<F>(shares)[b * s.rows() + g * heads * s.Q + r] = static_cast<F>(sum);
  }
  F share_of(int64_t b, int64_t row) const { return data<F>(shares)[b * s.rows() + row]; }
};

// Memory of one thread, one tensor cut into pieces that start on cache lines.
template <class F>
struct Scratch {
  Tensor memory;
  std::vector<F*> at;
  Scratch(const Tensor& like, ScalarType acc, const Sizes& pieces) {
    const auto padded = [](int64_t n) { return ceil_div(n, 16) * 16; };
    int64_t total = 0;
    for (int64_t n : pieces) total += padded(n);
    memory = empty(like, {total}, acc);
    F* p = mutable_data<F>(memory);
    for (int64_t n : pieces) at.push_back(p), p += padded(n);
  }
};

// Softmax of a row in place, returns its log-sum-exp; a row with no key becomes zeros with lse -inf.
template <class F>
F softmax_row(F* row, int64_t n) {
  F max;
  const F sum = exp_row(row, n, &max);
  const bool forbidden = max == -static_cast<F>(INFINITY);
  const F scale = forbidden ? F(0) : F(1) / sum;
  for (int64_t j = 0; j < n; ++j) row[j] *= scale;
  return forbidden ? max : max + std::log(sum);
}

// out[b, q, head·d + c] = row[c] + ΣP · b_v (ΣP is 1 but with dropout), and 0 in rows that attended to nothing.
template <class T, class F>
void store_row(const Tensor& out, int64_t b, int64_t head, int64_t q, const F* row, const T* value_bias,
               const Tensor& lse, const Problem<T>& p) {
  const Shape& s = p.s;
  const bool forbidden = data<F>(lse)[b * s.rows() + head * s.Q + q] == -static_cast<F>(INFINITY);
  T* to = mutable_data<T>(out) + b * p.block() + (q * s.A + head) * s.d;
  const F share = p.shares.numel() ? p.share_of(b, head * s.Q + q) : F(1);
  for (int64_t c = 0; c < s.d; ++c) {
    const F bias = value_bias ? share * static_cast<F>(widen(value_bias[head * s.d + c])) : F(0);
    to[c] = Convert<T>::from(forbidden ? F(0) : row[c] + bias);
  }
}

// Z of one group of heads of one sample, from its q'; scratch: context (and what halves need), scores.
template <class T, class F>
void attend(const Problem<T>& p, int64_t b, int64_t g, const F* q, F* z, F* lse, Scratch<F>& memory) {
  const Shape& s = p.s;
  const int64_t count = p.heads_in(g) * s.Q, n = s.n_of(b);
  F* scores = memory.at[1];
  const auto probabilities = [&] {
    for (int64_t r = 0; r < count; ++r) {
      lse[r] = softmax_row(scores + r * n, n);
      p.drop(scores + r * n, b, g, r);
      p.keep_share(scores + r * n, b, g, r);
    }
  };
  if constexpr (std::is_same_v<T, bf16>)
    if (p.halves) {
      const Halves halves = p.halves_of(p.heads * s.Q);
      const bf16* x = p.halves_context_of(halves, b, memory.at[0]);
      halves.scores(scores, q, count, p.scale, x, n, memory.at[0]);
      p.add_mask(scores, b, g);
      probabilities();
      return halves.values(z, scores, count, x, n, memory.at[0]);
    }
  const F* x = p.context_of(b, memory.at[0]);
  p.score(scores, q, x, b, g);
  probabilities();
  mm_out(p.matrix(scores, count, n), p.matrix(x, n, s.X), p.matrix(z, count, s.X));
}
template <class T>
int64_t attend_scratch(const Problem<T>& p) {
  return p.halves ? p.halves_scratch(p.heads * p.s.Q) : p.context_scratch();
}

// q' of one group of heads of one sample.
template <class T, class F>
void absorb(const Problem<T>& p, int64_t b, int64_t g, F* to, F* memory) {
  const Shape& s = p.s;
  if (!p.halves) return bmm_out(p.query_of(b, g), p.weight_of(p.w_k, g), p.by_head(to, g, s.X));
  for (int64_t k = 0; k < p.heads_in(g); ++k) {
    const int64_t h = g * p.heads + k;
    p.absorb_halves(to + k * s.Q * s.X, s.X, b * p.block() + h * s.d, s.A * s.d, s.Q, h, memory);
  }
}
// Its output, [heads, Q, d], from its Z.
template <class T, class F>
void project(const Problem<T>& p, int64_t g, const F* z, F* to, F* memory) {
  const Shape& s = p.s;
  if (!p.halves) return bmm_out(p.by_head(z, g, s.X), p.weight_of_transposed(p.w_v, g), p.by_head(to, g, s.d));
  for (int64_t k = 0; k < p.heads_in(g); ++k)
    p.project_halves(to + k * s.Q * s.d, z + k * s.Q * s.X, s.X, s.Q, g * p.heads + k, memory);
}

template <class T>
Tensor absorb_shared(const Problem<T>& p, const Tensor& like) {
  using F = acc_t<T>;
  const Tensor absorbed = empty(like, {p.s.rows(), p.s.X});
  const auto scratch = [&] { return Scratch<F>(like, p.acc, {p.halves_scratch(p.s.Q)}); };
  for_each_block(p.groups(), scratch, [&](int64_t g, Scratch<F>& memory) {
    absorb(p, 0, g, mutable_data<F>(absorbed) + g * p.heads * p.s.Q * p.s.X, memory.at[0]);
  });
  return absorbed;
}

template <class T>
void forward_groups(const Problem<T>& p, const OptionalTensor& value_bias, const Tensor& out, const Tensor& lse) {
  using F = acc_t<T>;
  const Shape& s = p.s;
  const int64_t rows = p.heads * s.Q;
  const auto scratch = [&] {
    return Scratch<F>(out, p.acc, {attend_scratch(p), rows * s.n, rows * s.X, rows * s.X, rows * s.d});
  };
  const Tensor absorbed = s.shared ? absorb_shared(p, lse) : lse;
  for_each_block(s.B * p.groups(), scratch, [&](int64_t i, Scratch<F>& memory) {
    const int64_t b = i / p.groups(), g = i % p.groups();
    F *q = memory.at[2], *z = memory.at[3], *heads = memory.at[4];
    F* lse_g = mutable_data<F>(lse) + b * s.rows() + g * rows;
    if (!s.shared) absorb(p, b, g, q, memory.at[0]);
    attend(p, b, g, s.shared ? data<F>(absorbed) + g * rows * s.X : q, z, lse_g, memory);
    project(p, g, z, heads, memory.at[0]);
    for (int64_t r = 0; r < p.heads_in(g) * s.Q; ++r)
      store_row(out, b, g * p.heads + r / s.Q, r % s.Q, heads + r * s.d, data<T>(value_bias), lse, p);
  });
}

// The same for few queries a head: (1) q' of some samples, a thread a head; (2) their Z, a thread a group of heads of a
// sample; (3) their output, a thread a head. A weight is read once for all of them.
template <class T>
void forward_together(const Problem<T>& p, const OptionalTensor& value_bias, const Tensor& out, const Tensor& lse) {
  using F = acc_t<T>;
  const Shape& s = p.s;
  const int64_t rows = p.heads * s.Q, wide = s.rows() * s.X, most = p.together();
  const Tensor absorbed = s.shared ? absorb_shared(p, lse) : empty(lse, {most, s.rows(), s.X});
  const Tensor z = empty(lse, {most, s.rows(), s.X});
  const auto attending = [&] { return Scratch<F>(out, p.acc, {attend_scratch(p), rows * s.n}); };
  const auto of_heads = [&] { return Scratch<F>(out, p.acc, {most * s.d, p.halves_scratch(most)}); };
  for (int64_t first = 0; first < s.B; first += most) {
    const int64_t count = std::min(most, s.B - first);
    if (!s.shared)
      for_each_block(s.A, of_heads, [&](int64_t h, Scratch<F>& memory) {
        F* const to = mutable_data<F>(absorbed);
        if (!p.halves) return p.widen_together(data<F>(p.query) + first * p.block(), p.w_k, count, h, to, wide);
        for (int64_t q = 0; q < s.Q; ++q)
          p.absorb_halves(to + (h * s.Q + q) * s.X, wide, first * p.block() + (q * s.A + h) * s.d, p.block(), count, h,
                          memory.at[1]);
      });
    for_each_block(count * p.groups(), attending, [&](int64_t i, Scratch<F>& memory) {
      const int64_t sample = i / p.groups(), g = i % p.groups(), b = first + sample, at = g * rows * s.X;
      const F* q = data<F>(absorbed) + (s.shared ? 0 : sample * wide) + at;
      attend(p, b, g, q, mutable_data<F>(z) + sample * wide + at, mutable_data<F>(lse) + b * s.rows() + g * rows,
             memory);
    });
    for_each_block(s.A, of_heads, [&](int64_t h, Scratch<F>& memory) {
      for (int64_t q = 0; q < s.Q; ++q) {
        const F* const rows_of_z = data<F>(z) + (h * s.Q + q) * s.X;
        if (p.halves)
          p.project_halves(memory.at[0], rows_of_z, wide, count, h, memory.at[1]);
        else
          mm_out(blob(rows_of_z, {count, s.X}, {wide, 1}, p.acc),
                 p.transposed(data<F>(p.w_v) + h * s.d * s.X, s.d, s.X), p.matrix(memory.at[0], count, s.d));
        for (int64_t i = 0; i < count; ++i)
          store_row(out, first + i, h, q, memory.at[0] + i * s.d, data<T>(value_bias), lse, p);
      }
    });
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& context, const OptionalTensor& latents,
                                   const Tensor& w_k, const Tensor& w_v, const OptionalTensor& /*key_bias: cancels*/,
                                   const OptionalTensor& value_bias, const OptionalTensor& mask,
                                   const OptionalTensor& dropout, const OptionalTensor& cu_seqlens, int64_t longest,
                                   int64_t num_heads, double scale, double dropout_p) {
  const OptionalTensor offsets = offsets_of(cu_seqlens, context, longest);
  const Shape s = shape_of(query, context, latents, w_k, w_v, num_heads, offsets, longest);
  if (value_bias && !is_a(*value_bias, query.scalar_type(), {s.A * s.d}))
    fail("cross_attention: value_bias must be [", s.A * s.d, "] in the dtype of query");
  Tensor out = empty(query, {s.B, s.Q, s.A * s.d});
  Tensor lse = empty(query, {s.B, s.A, s.Q}, accumulation(query));
  if (out.numel() == 0) return {out, lse};
  dispatch_float("cross_attention", query.scalar_type(), [&](auto* tag) {
    using T = pointee<decltype(tag)>;
    const Problem<T> problem(s, query, context, latents, w_k, w_v, value_bias, mask, dropout, scale, dropout_p, true);
    const auto run = problem.few_queries(problem.together()) ? forward_together<T> : forward_groups<T>;
    run(problem, contiguous(value_bias), out, lse);
  });
  return {out, lse};
}

// In: P and dP. Out: dS = P ∘ (dP - Σ P ∘ dP).
template <class F>
void score_gradient(const F* p, F* d_scores, int64_t n) {
  double delta = 0;  // rows of dS must sum to 0, or dW_k picks up the mean of the context
  for (int64_t j = 0; j < n; ++j) delta += static_cast<double>(p[j]) * d_scores[j];
  for (int64_t j = 0; j < n; ++j) d_scores[j] = static_cast<F>(p[j] * (d_scores[j] - delta));
}

template <class T, class F>
void round_to(const Tensor& to, int64_t first, const F* from, int64_t n, F scale) {
  T* p = mutable_data<T>(to) + first;
  for (int64_t i = 0; i < n; ++i) p[i] = Convert<T>::from(from[i] * scale);
}

// Gradients, a chunk of samples at a time: (1) a thread takes a group of heads of one sample and keeps its
// P, dS, dZ, q', Z and dq'; (2) dX of each sample, a sum over all its heads; (3) a thread takes a group of
// heads and adds the chunk to that group's rows of the weight gradients, in the order of the samples.
template <class T>
class Backward {
  using F = acc_t<T>;

 public:
  Backward(const Problem<T>& p, const Tensor& grad, const OptionalTensor& bias, const Tensor& lse, double scale,
           const std::vector<bool>& needs, const std::vector<Tensor>& grads)
      : p_(p), s_(p.s), R_(p.s.rows()), lse_(lse), scale_(static_cast<F>(scale)), needs_(needs), grads_(grads),
        chunk_(chunk_size(p.s)),
        grad_(widened(grad, p.acc)),
        bias_(p.shares.numel() ? widened(*bias, p.acc) : lse),
        p_ds_(empty(lse, {chunk_, 2 * R_, s_.n})),
        dz_q_(empty(lse, {chunk_, 2 * R_, s_.X})),
        z_(empty(lse, {s_.A, chunk_ * s_.Q, s_.X})),
        dq_(empty(lse, {s_.A, chunk_ * s_.Q, s_.X})),
        grad_rows_(empty(lse, {s_.A, chunk_ * s_.Q, s_.d})),
        query_rows_(empty(lse, {s_.A, chunk_ * s_.Q, s_.d})),
        d_query_(mmkernels::zeros(lse, Sizes{s_.Q, s_.A * s_.d})),
        dw_k_(mmkernels::zeros(lse, Sizes{needs[3] ? s_.A * s_.d : 0, s_.X})),
        dw_v_(mmkernels::zeros(lse, Sizes{needs[4] ? s_.A * s_.d : 0, s_.X})),
        d_bias_(s_.A * s_.d, 0.0) {}

  void run() {
    const int64_t rows = p_.heads * s_.Q;
    const auto scratch = [&] {
      return Scratch<F>(lse_, p_.acc, {p_.context_scratch(), 2 * rows * s_.n, 2 * rows * s_.X});
    };
    const auto part = [&] {
      return Scratch<F>(lse_, p_.acc, {std::max(p_.heads * s_.d * s_.X, chunk_ * s_.Q * s_.d)});
    };
    const auto sample = [&] { return Scratch<F>(lse_, p_.acc, {s_.n * s_.X}); };
    for (int64_t first = 0; first < s_.B; first += chunk_) {
      const int64_t count = std::min(chunk_, s_.B - first);
      if (p_.few_queries(chunk_))
        for_each_block(s_.A, [] { return 0; }, [&](int64_t h, int) { widen(first, count, h); });
      for_each_block(count * p_.groups(), scratch, [&](int64_t i, Scratch<F>& memory) {
        group(first, i / p_.groups(), i % p_.groups(), memory);
      });
      if ((needs_[1] || needs_[2]) && count == 1) context_gradient_of_one(first);
      else if (needs_[1] || needs_[2])
        for_each_block(count, sample, [&](int64_t i, Scratch<F>& memory) { context_gradient(first, i, memory.at[0]); });
      for_each_block(p_.groups(), part, [&](int64_t g, Scratch<F>& memory) { sums(first, count, g, memory.at[0]); });
    }
    if (needs_[0] && s_.shared) round_to<T>(grads_[0], 0, data<F>(d_query_), p_.block(), scale_);
    if (needs_[3]) round_to<T>(grads_[3], 0, data<F>(dw_k_), dw_k_.numel(), F(1));
    if (needs_[4]) round_to<T>(grads_[4], 0, data<F>(dw_v_), dw_v_.numel(), F(1));
    for (int64_t i = 0; needs_[5] && i < s_.A * s_.d; ++i)
      mutable_data<T>(grads_[5])[i] = Convert<T>::from(static_cast<F>(d_bias_[i]));
  }

 private:
  // As many samples as keep the intermediates near 48 MB: large products for dW, little memory.
  static int64_t chunk_size(const Shape& s) {
    const int64_t bytes = s.rows() * (2 * s.n + 4 * s.X + 2 * s.d) * static_cast<int64_t>(sizeof(F));
    return std::max<int64_t>(1, std::min<int64_t>(s.B, (48 << 20) / std::max<int64_t>(1, bytes)));
  }
  // Rows of head h and sample i of a [A, chunk·Q, width] tensor.
  F* slot(const Tensor& t, int64_t h, int64_t i, int64_t width) const {
    return mutable_data<F>(t) + (h * chunk_ + i) * s_.Q * width;
  }
  void scatter_heads(const Tensor& to, int64_t i, int64_t g, const F* from, int64_t width) const {
    for (int64_t k = 0; k < p_.heads_in(g); ++k)
      memcpy(slot(to, g * p_.heads + k, i, width), from + k * s_.Q * width, s_.Q * width * sizeof(F));
  }
  // The same from rows [Q, A·d] of a sample.
  void scatter_rows(const Tensor& to, int64_t i, int64_t g, const F* sample) const {
    for (int64_t k = g * p_.heads; k < g * p_.heads + p_.heads_in(g); ++k)
      for (int64_t q = 0; q < s_.Q; ++q)
        memcpy(slot(to, k, i, s_.d) + q * s_.d, sample + (q * s_.A + k) * s_.d, s_.d * sizeof(F));
  }

  void group(int64_t first_sample, int64_t i, int64_t g, Scratch<F>& memory) {
    const int64_t b = first_sample + i, count = p_.heads_in(g) * s_.Q, first = g * p_.heads * s_.Q, n = s_.n_of(b);
    const F* x = p_.context_of(b, memory.at[0]);
    F *p = memory.at[1], *ds = p + count * n, *z = memory.at[2], *dq = z + count * s_.X;
    F* dz = mutable_data<F>(dz_q_) + (i * 2 * R_ + first) * s_.X;  // kept for dX, with q' after all of them
    F* q = dz + R_ * s_.X;
    if (!p_.few_queries(chunk_)) {
      bmm_out(p_.query_of(b, g), p_.weight_of(p_.w_k, g), p_.by_head(q, g, s_.X));
      bmm_out(p_.heads_of(data<F>(grad_), b, g), p_.weight_of(p_.w_v, g), p_.by_head(dz, g, s_.X));
    }
    p_.score(p, q, x, b, g);
    mm_out(p_.matrix(dz, count, s_.X), p_.transposed(x, n, s_.X), p_.matrix(ds, count, n));
    for (int64_t r = 0; r < count; ++r) {
      F *p_r = p + r * n, *ds_r = ds + r * n;
      // P anew from S, not from the saved lse: a rounded lse would put one relative error on the whole row.
      softmax_row(p_r, n);
      add_bias_to(ds_r, b, g, r);
      p_.drop(ds_r, b, g, r);
      score_gradient(p_r, ds_r, n);
      p_.drop(p_r, b, g, r);
      p_.keep_share(p_r, b, g, r);
    }
    if (needs_[6]) memcpy(mutable_data<F>(grads_[6]) + (b * R_ + first) * n, ds, count * n * sizeof(F));
    if (needs_[1] || needs_[2]) {
      F* keep = mutable_data<F>(p_ds_) + i * 2 * R_ * s_.n + first * n;
      memcpy(keep, p, count * n * sizeof(F));
      memcpy(keep + R_ * n, ds, count * n * sizeof(F));
    }
    if (!(needs_[0] || needs_[3] || needs_[4])) return;
    mm_out(p_.matrix(p, 2 * count, n), p_.matrix(x, n, s_.X), p_.matrix(z, 2 * count, s_.X));
    scatter_heads(z_, i, g, z, s_.X);
    scatter_heads(dq_, i, g, dq, s_.X);
    scatter_rows(grad_rows_, i, g, data<F>(grad_) + b * p_.block());
    scatter_rows(query_rows_, i, g, data<F>(p_.query) + (s_.shared ? 0 : b * p_.block()));
  }

  // A dropped probability takes its share of b_v along: dP of row r gains dO · b_v. Without dropout that cancels.
  void add_bias_to(F* dp, int64_t b, int64_t g, int64_t r) const {
    if (p_.shares.numel() == 0) return;
    const int64_t head = g * p_.heads + r / s_.Q, q = r % s_.Q;
    const F *row = data<F>(grad_) + b * p_.block() + (q * s_.A + head) * s_.d, *bias = data<F>(bias_) + head * s_.d;
    double sum = 0;
    for (int64_t c = 0; c < s_.d; ++c) sum += static_cast<double>(row[c]) * bias[c];
    for (int64_t j = 0; j < s_.n_of(b); ++j) dp[j] += static_cast<F>(sum);
  }

  // q' and dZ of the chunk, of one head.
  void widen(int64_t first, int64_t count, int64_t h) {
    F* dz = mutable_data<F>(dz_q_);
    F* q = dz + R_ * s_.X;
    const int64_t sample = 2 * R_ * s_.X;
    p_.widen_together(data<F>(grad_) + first * p_.block(), p_.w_v, count, h, dz, sample);
    if (!s_.shared) return p_.widen_together(data<F>(p_.query) + first * p_.block(), p_.w_k, count, h, q, sample);
    p_.widen_together(data<F>(p_.query), p_.w_k, 1, h, q, sample);
    for (int64_t i = 1; i < count; ++i)
      memcpy(q + i * sample + h * s_.Q * s_.X, q + h * s_.Q * s_.X, s_.Q * s_.X * sizeof(F));
  }

  // dq = scale · dq' · W_kᵀ, of the chunk.
  void query_gradient(int64_t first, int64_t count, int64_t g, F* part) {
    for (int64_t h = g * p_.heads; h < g * p_.heads + p_.heads_in(g); ++h) {
      mm_out(p_.matrix(slot(dq_, h, 0, s_.X), count * s_.Q, s_.X),
             p_.transposed(data<F>(p_.w_k) + h * s_.d * s_.X, s_.d, s_.X), p_.matrix(part, count * s_.Q, s_.d));
      for (int64_t r = 0; r < count * s_.Q; ++r)
        round_to<T>(grads_[0], ((first * s_.Q + r) * s_.A + h) * s_.d, part + r * s_.d, s_.d, scale_);
    }
  }

  void store_context(int64_t b, const F* dx) const {
    const int64_t own = s_.own_of(b) * s_.X, more = s_.latents() * s_.X;
    if (needs_[1]) round_to<T>(grads_[1], s_.first_of(b) * s_.X, dx, own, F(1));
    if (needs_[2]) round_to<T>(grads_[2], b * more, dx + own, more, F(1));
  }
  // dX = [P; dS]ᵀ · [dZ; q'], samples in parallel, or one sample by blocks of its rows.
  void context_gradient(int64_t first, int64_t i, F* dx) {
    const int64_t n = s_.n_of(first + i);
    mm_out(p_.transposed(data<F>(p_ds_) + i * 2 * R_ * s_.n, 2 * R_, n),
           p_.matrix(data<F>(dz_q_) + i * 2 * R_ * s_.X, 2 * R_, s_.X), p_.matrix(dx, n, s_.X));
    store_context(first + i, dx);
  }
  void context_gradient_of_one(int64_t b) {
    const int64_t n = s_.n_of(b);
    const Tensor dx = empty(lse_, {n, s_.X});
    mm_blocked(p_ds_.data_ptr(), n, 2 * R_, 1, n, torch::stable::view(dz_q_, {chunk_ * 2 * R_, s_.X}), dx.data_ptr(), p_.acc,
               sizeof(F));
    store_context(b, data<F>(dx));
  }

  // What is summed over samples, for one group of heads.
  void sums(int64_t first, int64_t count, int64_t g, F* part) {
    if (needs_[5]) bias_gradient(first, count, g);
    if (needs_[3]) weight_gradient(dw_k_, query_rows_, dq_, count, g, part);
    if (needs_[4]) weight_gradient(dw_v_, grad_rows_, z_, count, g, part);
    if (needs_[0] && s_.shared) shared_query_gradient(count, g, part);
    if (needs_[0] && !s_.shared) query_gradient(first, count, g, part);
  }

  // dW_h += rows_hᵀ · wide_h
  void weight_gradient(const Tensor& sum, const Tensor& rows, const Tensor& wide, int64_t count, int64_t g, F* part) {
    const int64_t h = g * p_.heads, size = s_.d * s_.X, k = count * s_.Q, all = chunk_ * s_.Q;
    bmm_out(blob(slot(rows, h, 0, s_.d), {p_.heads_in(g), s_.d, k}, {all * s_.d, 1, s_.d}, p_.acc),
            blob(slot(wide, h, 0, s_.X), {p_.heads_in(g), k, s_.X}, {all * s_.X, s_.X, 1}, p_.acc),
            blob(part, {p_.heads_in(g), s_.d, s_.X}, {size, s_.X, 1}, p_.acc));
    add_to(mutable_data<F>(sum) + h * size, part, p_.heads_in(g) * size);
  }

  // Queries shared by the batch: sum dq' over the samples, then through W_k once.
  void shared_query_gradient(int64_t count, int64_t g, F* part) {
    for (int64_t k = 0; k < p_.heads_in(g); ++k) {
      const int64_t h = g * p_.heads + k;
      F* sum = slot(dq_, h, 0, s_.X);
      for (int64_t i = 1; i < count; ++i) add_to(sum, slot(dq_, h, i, s_.X), s_.Q * s_.X);
      mm_out(p_.matrix(sum, s_.Q, s_.X), p_.transposed(data<F>(p_.w_k) + h * s_.d * s_.X, s_.d, s_.X),
             p_.matrix(part, s_.Q, s_.d));
      for (int64_t q = 0; q < s_.Q; ++q)
        add_to(mutable_data<F>(d_query_) + (q * s_.A + h) * s_.d, part + q * s_.d, s_.d);
    }
  }

  void bias_gradient(int64_t first, int64_t count, int64_t g) {
    for (int64_t b = first; b < first + count; ++b)
      for (int64_t r = 0; r < p_.heads_in(g) * s_.Q; ++r) {
        const int64_t head = g * p_.heads + r / s_.Q, q = r % s_.Q;
        if (data<F>(lse_)[b * R_ + head * s_.Q + q] == -static_cast<F>(INFINITY)) continue;
        const F* row = data<F>(grad_) + b * p_.block() + (q * s_.A + head) * s_.d;
        const F share = p_.shares.numel() ? p_.share_of(b, head * s_.Q + q) : F(1);
        for (int64_t c = 0; c < s_.d; ++c) d_bias_[head * s_.d + c] += share * row[c];
      }
  }

  const Problem<T>& p_;
  const Shape& s_;
  int64_t R_;
  Tensor lse_;
  F scale_;
  const std::vector<bool>& needs_;
  const std::vector<Tensor>& grads_;
  int64_t chunk_;
  Tensor grad_, bias_, p_ds_, dz_q_, z_, dq_, grad_rows_, query_rows_, d_query_, dw_k_, dw_v_;
  std::vector<double> d_bias_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& query, const Tensor& context, const OptionalTensor& latents, const Tensor& w_k,
    const Tensor& w_v, const OptionalTensor& value_bias, const OptionalTensor& mask, const OptionalTensor& dropout,
    const OptionalTensor& cu_seqlens, const Tensor& /*out*/, const Tensor& lse, int64_t longest, int64_t num_heads,
    double scale, double dropout_p, std::vector<bool> needs) {
  const OptionalTensor offsets = offsets_of(cu_seqlens, context, longest);
  const Shape s = shape_of(query, context, latents, w_k, w_v, num_heads, offsets, longest);
  if (!is_a(grad, grad.scalar_type(), {s.B, s.Q, s.A * s.d}) || !is_a(lse, accumulation(query), {s.B, s.A, s.Q}))
    fail("cross_attention_backward: grad must be [", s.B, ", ", s.Q, ", ", s.A * s.d, "] and lse [", s.B, ", ", s.A,
         ", ", s.Q, "], float32 (float64 of float64 queries)");
  if (value_bias && !is_a(*value_bias, query.scalar_type(), {s.A * s.d}))
    fail("cross_attention_backward: value_bias must be [", s.A * s.d, "] in the dtype of query");
  if (needs.size() != 7) fail("cross_attention_backward: needs must be 7 answers, got ", needs.size());
  const auto zeros = [&](size_t i, Sizes sizes) {
    return mmkernels::zeros(query, needs[i] ? sizes : Sizes{0});
  };
  const Sizes weight = {s.A * s.d, s.X};
  const std::vector<Tensor> grads = {
      zeros(0, s.shared ? Sizes{s.Q, s.A * s.d} : Sizes{s.B, s.Q, s.A * s.d}), zeros(1, {context.sizes().begin(), context.sizes().end()}),
      zeros(2, {s.B, s.n - s.own, s.X}), zeros(3, weight), zeros(4, weight), zeros(5, {s.A * s.d}),
      mmkernels::zeros(lse, needs[6] ? Sizes{s.B, s.A, s.Q, s.n} : Sizes{0})};
  if (s.B * s.Q * s.n != 0)
    dispatch_float("cross_attention", query.scalar_type(), [&](auto* tag) {
      using T = pointee<decltype(tag)>;
      const Problem<T> problem(s, query, context, latents, w_k, w_v, value_bias, mask, dropout, scale, dropout_p, false);
      Backward<T>(problem, grad, value_bias, aligned(lse), scale, needs, grads).run();
    });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6]};
}

}  // namespace
}  // namespace mmkernels::cross_attention

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("cross_attention", TORCH_BOX(&mmkernels::cross_attention::forward));
  m.impl("cross_attention_backward", TORCH_BOX(&mmkernels::cross_attention::backward));
}
