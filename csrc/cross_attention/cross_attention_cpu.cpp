// SPDX-License-Identifier: Apache-2.0
// Absorbed cross-attention on CPU: q' = q·W_k, S = q'·Xᵀ, Z = softmax(S)·X, out = Z·W_vᵀ. Neither K nor V is
// formed. One sample at a time, so that S, Z and X stay in cache; products by torch's GEMM in fp32 (fp64
// for float64), so q' and Z never round to 16 bits. Work is split by row: same bits for any thread count.
#include <algorithm>

#include "../common/aten.h"
#include "cross_attention.h"

namespace mmkernels::cross_attention {
namespace {

using torch::stable::narrow;
using torch::stable::parallel_for;
using torch::stable::select;
using torch::stable::transpose;
using torch::stable::view;

MMK_MULTIARCH float exp_row(float* scores, int64_t n, float* max) { return exp_row_body(scores, n, max); }
MMK_MULTIARCH void exp_row_with_lse(float* s, int64_t n, float lse) { exp_row_with_lse_body(s, n, lse); }
double exp_row(double* scores, int64_t n, double* max) { return exp_row_body(scores, n, max); }
void exp_row_with_lse(double* s, int64_t n, double lse) { exp_row_with_lse_body(s, n, lse); }

Shape shape_of(const Tensor& query, const Tensor& context, const Tensor& w_k, const Tensor& w_v, int64_t A) {
  const bool shared = query.dim() == 2;
  if (context.dim() != 3 || (query.dim() != 3 && !shared) || A < 1)
    fail("cross_attention: query must be [B, Q, A·d] or [Q, A·d] and context [B, n, X]");
  const int64_t width = query.size(query.dim() - 1), X = context.size(2);
  const auto fits = [&](const Tensor& w) { return w.dim() == 2 && w.size(0) == width && w.size(1) == X; };
  if (width % A || width == 0 || !fits(w_k) || !fits(w_v) || (!shared && query.size(0) != context.size(0)))
    fail("cross_attention: weights must be [A·d, X] for query width ", width, ", context width ", X);
  for (const Tensor* t : {&context, &w_k, &w_v})
    if (t->scalar_type() != query.scalar_type())
      fail("cross_attention: query, context and weights must share one dtype");
  return {context.size(0), query.size(query.dim() - 2), context.size(1), X, A, width / A, shared};
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

Tensor widened(const Tensor& t, ScalarType acc) {
  return torch::stable::contiguous(t.scalar_type() == acc ? t : torch::stable::to(t, acc));
}

// rows [Q, A·d] as heads [A, Q, d], and weights [A·d, X] as [A, d, X].
Tensor heads(const Tensor& rows, const Shape& s) { return transpose(view(rows, {s.Q, s.A, s.d}), 0, 1); }
Tensor by_head(const Tensor& weight, const Shape& s) { return view(weight, {s.A, s.d, s.X}); }

// What every sample needs, in the accumulation type F.
template <class F>
struct Sample {
  const Shape& s;
  Mask mask;
  Tensor query;       // scaled, [B or 1, Q, A·d]
  Tensor w_k, w_v;    // [A·d, X]
  Tensor absorbed;    // q' of the current sample, [A·Q, X]

  Tensor context(const Tensor& all, int64_t b) const {
    return widened(select(all, 0, b), query.scalar_type());
  }
  Tensor query_of(int64_t b) const { return select(query, 0, s.shared ? 0 : b); }

  void absorb(int64_t b) {
    if (s.shared && b > 0) return;
    bmm_out(heads(query_of(b), s), by_head(w_k, s), view(absorbed, {s.A, s.Q, s.X}));
  }
  // Scores [A·Q, n] of sample b, masked.
  void score(const Tensor& x, int64_t b, const Tensor& scores) const {
    mm_out(absorbed, transpose(x, 0, 1), scores);
    if (mask.kind == Mask::kNone) return;
    F* p = mutable_data<F>(scores);
    parallel_for(0, s.rows(), 8, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) mask.add_to(p + r * s.n, mask.row(b, r / s.Q, r % s.Q), s.n);
    });
  }
};

template <class F>
Sample<F> prepare(const Shape& s, const Tensor& query, const Tensor& w_k, const Tensor& w_v,
                  const OptionalTensor& mask, double scale, ScalarType acc) {
  const Tensor source = widened(query, acc);
  Tensor scaled = empty(source, {s.shared ? 1 : s.B, s.Q, s.A * s.d});
  const F* from = data<F>(source);
  F* to = mutable_data<F>(scaled);
  for (int64_t i = 0; i < scaled.numel(); ++i) to[i] = from[i] * static_cast<F>(scale);
  return {s, mask_of(mask, s), scaled, widened(w_k, acc), widened(w_v, acc), empty(scaled, {s.rows(), s.X})};
}

// Softmax of every row in place; a row with no key becomes zeros with lse -inf.
template <class F>
void softmax(const Tensor& scores, F* lse) {
  const int64_t rows = scores.size(0), n = scores.size(1);
  F* p = mutable_data<F>(scores);
  parallel_for(0, rows, 8, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      F max, *row = p + r * n;
      const F sum = exp_row(row, n, &max);
      const bool forbidden = n == 0 || max == -static_cast<F>(INFINITY);
      const F scale = forbidden ? F(0) : F(1) / sum;
      for (int64_t j = 0; j < n; ++j) row[j] = forbidden ? F(0) : row[j] * scale;
      lse[r] = forbidden ? -static_cast<F>(INFINITY) : max + std::log(sum);
    }
  });
}

// out[q, head·d + c] = heads[head, q, c] + b_v, except in rows that attended to nothing.
template <class T, class F>
void store_out(T* out, const F* heads_AQd, const T* value_bias, const F* lse, const Shape& s) {
  for (int64_t h = 0; h < s.A; ++h)
    for (int64_t q = 0; q < s.Q; ++q) {
      const bool forbidden = lse[h * s.Q + q] == -static_cast<F>(INFINITY);
      const F* from = heads_AQd + (h * s.Q + q) * s.d;
      T* to = out + q * s.A * s.d + h * s.d;
      for (int64_t c = 0; c < s.d; ++c) {
        const F bias = value_bias && !forbidden ? widen(value_bias[h * s.d + c]) : F(0);
        to[c] = Convert<T>::from(forbidden ? F(0) : from[c] + bias);
      }
    }
}

template <class T>
void forward_samples(const Shape& s, const Tensor& query, const Tensor& context, const Tensor& w_k,
                     const Tensor& w_v, const OptionalTensor& value_bias, const OptionalTensor& mask,
                     double scale, const Tensor& out, const Tensor& lse) {
  using F = acc_t<T>;
  const ScalarType acc = lse.scalar_type();
  Sample<F> sample = prepare<F>(s, query, w_k, w_v, mask, scale, acc);
  const Tensor scores = empty(lse, {s.rows(), s.n}), z = empty(lse, {s.rows(), s.X});
  const Tensor out_heads = empty(lse, {s.A, s.Q, s.d});
  const Tensor w_v_heads = transpose(by_head(sample.w_v, s), 1, 2);
  for (int64_t b = 0; b < s.B; ++b) {
    F* lse_b = mutable_data<F>(lse) + b * s.rows();
    const Tensor x = sample.context(context, b);
    sample.absorb(b);
    sample.score(x, b, scores);
    softmax(scores, lse_b);
    mm_out(scores, x, z);
    bmm_out(view(z, {s.A, s.Q, s.X}), w_v_heads, out_heads);
    store_out(mutable_data<T>(out) + b * s.rows() * s.d, data<F>(out_heads), data<T>(value_bias), lse_b, s);
  }
}

ScalarType accumulation(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& context, const Tensor& w_k,
                                   const Tensor& w_v, const OptionalTensor& /*key_bias: cancels*/,
                                   const OptionalTensor& value_bias, const OptionalTensor& mask,
                                   int64_t num_heads, double scale) {
  const Shape s = shape_of(query, context, w_k, w_v, num_heads);
  Tensor out = empty(query, {s.B, s.Q, s.A * s.d});
  Tensor lse = empty(query, {s.B, s.A, s.Q}, accumulation(query));
  if (out.numel() == 0) return {out, lse};
  dispatch_float("cross_attention", query.scalar_type(), [&](auto* tag) {
    using T = pointee<decltype(tag)>;
    forward_samples<T>(s, query, context, w_k, w_v, contiguous(value_bias), mask, scale, out, lse);
  });
  return {out, lse};
}

// In: row r of both holds S (masked) and dP. Out: P and dS = P ∘ (dP - Σ P ∘ dP).
template <class F>
void score_gradients(F* p, F* d_scores, const F* lse, const Shape& s) {
  parallel_for(0, s.rows(), 8, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      F *prob = p + r * s.n, *grad = d_scores + r * s.n;
      exp_row_with_lse(prob, s.n, lse[r]);
      F delta = 0;
      for (int64_t j = 0; j < s.n; ++j) delta += prob[j] * grad[j];
      for (int64_t j = 0; j < s.n; ++j) grad[j] = prob[j] * (grad[j] - delta);
    }
  });
}

// Sums over samples of rows_bᵀ · wide_b for every head: the gradient of a weight. Samples are gathered in
// groups of fixed size so that the products are large; groups add up in order.
template <class F>
class WeightGradient {
 public:
  WeightGradient(const Shape& s, const Tensor& like, bool wanted) : s_(s), wanted_(wanted) {
    if (!wanted) return;
    sum_ = torch::stable::new_zeros(like, Sizes{s.A, s.d, s.X});
    part_ = empty(like, {s.A, s.d, s.X});
    rows_ = empty(like, {s.A, kGroup * s.Q, s.d});
    wide_ = empty(like, {s.A, kGroup * s.Q, s.X});
  }
  // rows [Q, A, d] and wide [A, Q, X] of one sample.
  void add(const F* rows, const F* wide) {
    if (!wanted_) return;
    F *to = mutable_data<F>(*rows_), *to_wide = mutable_data<F>(*wide_);
    for (int64_t h = 0; h < s_.A; ++h) {
      const int64_t first = (h * kGroup + filled_) * s_.Q;
      for (int64_t q = 0; q < s_.Q; ++q)
        memcpy(to + (first + q) * s_.d, rows + (q * s_.A + h) * s_.d, s_.d * sizeof(F));
      memcpy(to_wide + first * s_.X, wide + h * s_.Q * s_.X, s_.Q * s_.X * sizeof(F));
    }
    if (++filled_ == kGroup) flush();
  }
  void store(const Tensor& gradient, F scale) {
    if (!wanted_) return;
    if (filled_) flush();
    dispatch_float("cross_attention", gradient.scalar_type(), [&](auto* tag) {
      using T = pointee<decltype(tag)>;
      const F* from = data<F>(*sum_);
      for (int64_t i = 0; i < gradient.numel(); ++i)
        mutable_data<T>(gradient)[i] = Convert<T>::from(from[i] * scale);
    });
  }

 private:
  static constexpr int64_t kGroup = 8;
  void flush() {
    Tensor rows = narrow(*rows_, 1, 0, filled_ * s_.Q), wide = narrow(*wide_, 1, 0, filled_ * s_.Q);
    bmm_out(transpose(rows, 1, 2), wide, *part_);
    F* sum = mutable_data<F>(*sum_);
    const F* part = data<F>(*part_);
    parallel_for(0, sum_->numel(), 65536, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) sum[i] += part[i];
    });
    filled_ = 0;
  }
  Shape s_;
  bool wanted_;
  int64_t filled_ = 0;
  OptionalTensor sum_, part_, rows_, wide_;
};

template <class T, class F>
void round_to(T* to, const F* from, int64_t n, F scale) {
  for (int64_t i = 0; i < n; ++i) to[i] = Convert<T>::from(from[i] * scale);
}

// Gradient of a group of queries [A, Q, d] laid out as [Q, A·d], times scale, added to `sum`.
template <class F>
void add_heads(F* sum, const F* heads_AQd, const Shape& s, F scale) {
  for (int64_t h = 0; h < s.A; ++h)
    for (int64_t q = 0; q < s.Q; ++q)
      for (int64_t c = 0; c < s.d; ++c)
        sum[(q * s.A + h) * s.d + c] += heads_AQd[(h * s.Q + q) * s.d + c] * scale;
}

template <class T>
void backward_samples(const Shape& s, const Tensor& grad, const Tensor& query, const Tensor& context,
                      const Tensor& w_k, const Tensor& w_v, const OptionalTensor& mask, const Tensor& lse,
                      double scale, const std::vector<bool>& needs, const std::vector<Tensor>& grads) {
  using F = acc_t<T>;
  const ScalarType acc = lse.scalar_type();
  const bool need_q = needs[0], need_x = needs[1], need_k = needs[2], need_v = needs[3], need_b = needs[4];
  Sample<F> sample = prepare<F>(s, query, w_k, w_v, mask, scale, acc);
  const Tensor grad_wide = widened(grad, acc);
  // Stacked halves [P; dS] and [dZ; q'], so that one product gives both [Z; dq'] and dX.
  Tensor p_ds = empty(lse, {2 * s.rows(), s.n}), dz_q = empty(lse, {2 * s.rows(), s.X});
  const Tensor z_dq = empty(lse, {2 * s.rows(), s.X}), d_query = empty(lse, {s.A, s.Q, s.d});
  const Tensor probs = narrow(p_ds, 0, 0, s.rows()), d_scores = narrow(p_ds, 0, s.rows(), s.rows());
  const Tensor dz = narrow(dz_q, 0, 0, s.rows());
  sample.absorbed = narrow(dz_q, 0, s.rows(), s.rows());
  const F *z = data<F>(z_dq), *dq_wide = z + s.rows() * s.X;
  WeightGradient<F> dw_k(s, lse, need_k), dw_v(s, lse, need_v);
  std::vector<F> shared_dq(need_q && s.shared ? s.Q * s.A * s.d : 0, F(0)), d_bias(s.A * s.d, F(0));
  const Tensor dx = empty(lse, {need_x ? s.n : 0, s.X});
  const int64_t block = s.rows() * s.d;  // values of grad and query in a sample

  for (int64_t b = 0; b < s.B; ++b) {
    const F *lse_b = data<F>(lse) + b * s.rows(), *grad_b = data<F>(grad_wide) + b * block;
    const Tensor x = sample.context(context, b), d_out = select(grad_wide, 0, b);
    sample.absorb(b);
    sample.score(x, b, probs);
    bmm_out(heads(d_out, s), by_head(sample.w_v, s), view(dz, {s.A, s.Q, s.X}));
    mm_out(dz, transpose(x, 0, 1), d_scores);
    score_gradients(mutable_data<F>(probs), mutable_data<F>(d_scores), lse_b, s);
    if (need_q || need_k || need_v) mm_out(p_ds, x, z_dq);
    dw_v.add(grad_b, z);
    dw_k.add(data<F>(sample.query_of(b)), dq_wide);
    if (need_q) {
      Tensor wide = z_dq;
      bmm_out(view(narrow(wide, 0, s.rows(), s.rows()), {s.A, s.Q, s.X}),
              transpose(by_head(sample.w_k, s), 1, 2), d_query);
      std::vector<F> one(s.shared ? 0 : block, F(0));
      add_heads(s.shared ? shared_dq.data() : one.data(), data<F>(d_query), s, static_cast<F>(scale));
      if (!s.shared) round_to(mutable_data<T>(grads[0]) + b * block, one.data(), block, F(1));
    }
    if (need_x) {
      mm_out(transpose(p_ds, 0, 1), dz_q, dx);
      round_to(mutable_data<T>(grads[1]) + b * s.n * s.X, data<F>(dx), s.n * s.X, F(1));
    }
    for (int64_t h = 0; need_b && h < s.A; ++h)
      for (int64_t q = 0; q < s.Q; ++q)
        if (lse_b[h * s.Q + q] != -static_cast<F>(INFINITY))
          for (int64_t c = 0; c < s.d; ++c) d_bias[h * s.d + c] += grad_b[(q * s.A + h) * s.d + c];
  }
  dw_k.store(grads[2], F(1));
  dw_v.store(grads[3], F(1));
  if (need_q && s.shared) round_to(mutable_data<T>(grads[0]), shared_dq.data(), block, F(1));
  if (need_b) round_to(mutable_data<T>(grads[4]), d_bias.data(), s.A * s.d, F(1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& query, const Tensor& context, const Tensor& w_k, const Tensor& w_v,
    const OptionalTensor& /*value_bias*/, const OptionalTensor& mask, const Tensor& /*out*/,
    const Tensor& lse, int64_t num_heads, double scale, std::vector<bool> needs) {
  const Shape s = shape_of(query, context, w_k, w_v, num_heads);
  const auto zeros = [&](size_t i, const Tensor& like) {
    const Sizes sizes(like.sizes().begin(), like.sizes().end());
    return torch::stable::new_zeros(query, needs[i] ? sizes : Sizes{0});
  };
  Tensor d_bias = torch::stable::new_zeros(query, needs[4] ? Sizes{s.A * s.d} : Sizes{0});
  const std::vector<Tensor> grads = {zeros(0, query), zeros(1, context), zeros(2, w_k), zeros(3, w_v), d_bias};
  if (s.B * s.Q * s.n * s.X != 0)
    dispatch_float("cross_attention", query.scalar_type(), [&](auto* tag) {
      using T = pointee<decltype(tag)>;
      backward_samples<T>(s, grad, query, context, w_k, w_v, mask, lse, scale, needs, grads);
    });
  return {grads[0], grads[1], grads[2], grads[3], grads[4]};
}

}  // namespace
}  // namespace mmkernels::cross_attention

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("cross_attention", TORCH_BOX(&mmkernels::cross_attention::forward));
  m.impl("cross_attention_backward", TORCH_BOX(&mmkernels::cross_attention::backward));
}
