// SPDX-License-Identifier: Apache-2.0
// Merging on CPU. Every value is checked while the row sources are found, before any row is written.
#include <algorithm>
#include <numeric>

#include "arguments.h"

namespace mmkernels::merge_embeddings {
namespace {

constexpr const char* kOp = "merge_embeddings: ";

struct Plan {
  const Tensor& input_ids;
  const std::vector<int64_t>& lengths;
  const std::vector<int64_t>& token_ids;
  const std::optional<std::vector<int64_t>>& counts;
  int64_t vocab;  // 0: inputs_embeds, ids are only compared

  int64_t T() const { return input_ids.numel(); }
  int64_t L() const { return input_ids.size(input_ids.dim() - 1); }
  int64_t samples() const {
    int64_t product = 1;
    for (int64_t i = 0; i + 1 < input_ids.dim(); ++i) product *= input_ids.size(i);
    return product;
  }
  std::string place(int64_t t) const {
    return input_ids.dim() == 1 ? std::to_string(t)
                                : std::to_string(t / L()) + ", " + std::to_string(t % L());
  }
};

void check_counts(const Plan& plan, const std::vector<int64_t>& got) {
  const int64_t B = plan.samples(), M = plan.lengths.size();
  for (int64_t m = 0; m < M; ++m) {
    int64_t total = 0;
    std::ostringstream by_sample;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t have = got[m * B + b];
      const int64_t want = plan.counts ? (*plan.counts)[m * B + b] : have;
      if (want != have)
        fail(kOp, "sample ", b, " has ", have, " placeholders of features[", m, "] (token id ",
             plan.token_ids[m], "), expected ", want);
      if (b < 8) by_sample << (b ? ", " : "") << have;
      total += have;
    }
    if (total != plan.lengths[m])
      fail(kOp, "features[", m, "] has ", plan.lengths[m], " rows, but input_ids has ", total,
           " placeholders of token id ", plan.token_ids[m], " (by sample: ", by_sample.str(),
           B > 8 ? ", ..." : "", ")");
  }
}

template <class Id>
void find_by_id(const Plan& plan, const Id* ids, int64_t* source) {
  const int64_t B = plan.samples(), L = plan.L(), M = plan.lengths.size();
  std::vector<int64_t> got(M * B, 0), next(M, 0);
  for (int64_t m = 0, first = 0; m < M; first += plan.lengths[m++]) next[m] = first;
  int64_t bad = -1;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = b * L; t < (b + 1) * L; ++t) {
      const int64_t id = ids[t];
      int64_t m = 0;
      while (m < M && plan.token_ids[m] != id) ++m;
      if (m < M) {
        source[t] = -1 - next[m]++;
        ++got[m * B + b];
      } else {
        source[t] = plan.vocab ? id : t;
        if (plan.vocab && (id < 0 || id >= plan.vocab) && bad < 0) bad = t;
      }
    }
  check_counts(plan, got);
  if (bad >= 0)
    fail(kOp, "input_ids[", plan.place(bad), "] is ", static_cast<int64_t>(ids[bad]),
         ", expected an id in [0, ", plan.vocab, ") or a feature token id");
}

template <class Id>
void find_by_row(const Plan& plan, const Id* ids, const std::vector<Tensor>& rows, int64_t* source) {
  const int64_t T = plan.T();
  for (int64_t t = 0; t < T; ++t) source[t] = t;
  std::vector<bool> placed(T, false);
  int64_t k = 0;
  for (size_t m = 0; m < rows.size(); ++m) {
    const Tensor flat = torch::stable::contiguous(rows[m]);
    for (int64_t i = 0; i < plan.lengths[m]; ++i, ++k) {
      const int64_t t = data<int64_t>(flat)[i];
      if (t < 0 || t >= T)
        fail(kOp, "feature_rows[", m, "][", i, "] is ", t, ", expected a token index in [0, ", T, ")");
      if (placed[t])
        fail(kOp, "feature_rows[", m, "][", i, "] is ", t, ", a token that already has a feature");
      placed[t] = true;
      source[t] = -1 - k;
    }
  }
  if (!plan.vocab) return;
  for (int64_t t = 0; t < T; ++t) {
    if (placed[t]) continue;
    source[t] = ids[t];
    if (ids[t] < 0 || ids[t] >= plan.vocab)
      fail(kOp, "input_ids[", plan.place(t), "] is ", static_cast<int64_t>(ids[t]),
           ", expected an id in [0, ", plan.vocab, ") or a feature token id");
  }
}

void find_sources(const Plan& plan, const std::vector<Tensor>& rows, int64_t* source) {
  const Tensor ids = torch::stable::contiguous(plan.input_ids);
  auto find = [&](const auto* p) {
    rows.empty() ? find_by_id(plan, p, source) : find_by_row(plan, p, rows, source);
  };
  ids.scalar_type() == ScalarType::Long ? find(data<int64_t>(ids)) : find(data<int32_t>(ids));
}

// Where rows come from; keeps what it makes contiguous.
struct Rows {
  Tensor text;
  std::vector<Tensor> features;
  Sources sources{};
  std::vector<int64_t> lengths, feature_bytes;  // rows, and bytes of one, of each modality: of any dtype

  Rows(const Tensor& table, const std::vector<Tensor>& from) : text(torch::stable::contiguous(table)) {
    sources.text = data<char>(text);
    sources.modalities = static_cast<int32_t>(from.size());
    sources.row_bytes = width() * static_cast<int64_t>(text.element_size());
    for (size_t m = 0; m < from.size(); ++m) {
      features.push_back(torch::stable::contiguous(from[m]));
      sources.features[m] = data<char>(features[m]);
      lengths.push_back(features[m].size(0));
      feature_bytes.push_back(width() * static_cast<int64_t>(features[m].element_size()));
      sources.first[m + 1] = sources.first[m] + lengths[m];
    }
  }
  int64_t width() const { return text.size(text.dim() - 1); }
};

// As torch casts: what narrows from float64 goes through float.
#define MMK_CONVERT(To, From)                                                                                 \
  MMK_MULTIARCH void convert_row(To* to, const From* from, int64_t n) {                                       \
    for (int64_t i = 0; i < n; ++i) to[i] = Convert<To>::from(static_cast<acc_t<To>>(widen(from[i])));        \
  }
MMK_CONVERT(float, double)
MMK_CONVERT(float, bf16)
MMK_CONVERT(float, f16)
MMK_CONVERT(double, float)
MMK_CONVERT(double, bf16)
MMK_CONVERT(double, f16)
MMK_CONVERT(bf16, float)
MMK_CONVERT(bf16, double)
MMK_CONVERT(bf16, f16)
MMK_CONVERT(f16, float)
MMK_CONVERT(f16, double)
MMK_CONVERT(f16, bf16)
#undef MMK_CONVERT

using ConvertRow = void (*)(void* to, const void* from, int64_t n);
template <class To, class From>
void convert_any(void* to, const void* from, int64_t n) {
  convert_row(static_cast<To*>(to), static_cast<const From*>(from), n);
}
// Of rows of `from` to those of To; null where they are of one dtype and copied.
template <class To>
ConvertRow conversion(ScalarType from) {
  ConvertRow found = nullptr;
  dispatch_float("merge_embeddings", from, [&](auto* tag) {
    using From = pointee<decltype(tag)>;
    if constexpr (!std::is_same_v<To, From>) found = convert_any<To, From>;
  });
  return found;
}

void write_rows(const Tensor& to, const Rows& rows, const Tensor& source, std::optional<double> embed_scale) {
  dispatch_float("merge_embeddings", rows.text.scalar_type(), [&](auto* tag) {
    using S = pointee<decltype(tag)>;
    const Sources& sources = rows.sources;
    const int64_t* from = data<int64_t>(source);
    char* first = mutable_data<char>(to);
    std::vector<ConvertRow> convert;
    for (const Tensor& f : rows.features) convert.push_back(conversion<S>(f.scalar_type()));
    torch::stable::parallel_for(0, source.numel(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        char* row = first + t * sources.row_bytes;
        const int64_t k = -1 - from[t];
        const int m = k < 0 ? 0 : sources.modality(k);
        if (k >= 0 && convert[m])
          convert[m](row, sources.features[m] + (k - sources.first[m]) * rows.feature_bytes[m], rows.width());
        else if (embed_scale)
          merge_row<S>(row, sources, from[t], true, *embed_scale, 0, 1);
        else
          memcpy(row, sources.row(from[t]), sources.row_bytes);  // the widest copy this CPU has
      }
    });
  });
}

// Checks all, then writes to `out`, or to a new tensor.
std::tuple<Tensor, Tensor> merge(
    const OptionalTensor& out, const Tensor& input_ids, const OptionalTensor& embed_weight,
    const OptionalTensor& inputs_embeds, const std::vector<Tensor>& features, const std::vector<int64_t>& token_ids,
    const std::vector<Tensor>& feature_rows, const std::optional<std::vector<int64_t>>& counts,
    std::optional<double> embed_scale) {
  const Tensor& table = check_text(input_ids, embed_weight, inputs_embeds);
  check_features(kOp, table, features, feature_rows.empty() ? token_ids.size() : feature_rows.size());
  check_places(input_ids, features, feature_rows, counts);
  const Rows rows(table, features);
  Sizes shape(input_ids.sizes().begin(), input_ids.sizes().end());
  shape.push_back(rows.width());
  if (out) check_out(*out, table, shape);
  Tensor source = empty(rows.text, {input_ids.numel()}, ScalarType::Long);
  const Plan plan{input_ids, rows.lengths, token_ids, counts, inputs_embeds ? 0 : table.size(0)};
  find_sources(plan, feature_rows, mutable_data<int64_t>(source));
  const Tensor merged = out ? *out : empty(rows.text, shape);
  write_rows(merged, rows, source, embed_scale);
  return {merged, source};
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& input_ids, const OptionalTensor& embed_weight, const OptionalTensor& inputs_embeds,
    std::vector<Tensor> features, std::vector<int64_t> token_ids, std::vector<Tensor> feature_rows,
    std::optional<std::vector<int64_t>> counts, std::optional<double> embed_scale,
    std::optional<int64_t> /*padding_idx: backward only*/) {
  return merge(std::nullopt, input_ids, embed_weight, inputs_embeds, features, token_ids, feature_rows, counts,
               embed_scale);
}

Tensor forward_out(
    const Tensor& out, const Tensor& input_ids, const OptionalTensor& embed_weight,
    const OptionalTensor& inputs_embeds, std::vector<Tensor> features, std::vector<int64_t> token_ids,
    std::vector<Tensor> feature_rows, std::optional<std::vector<int64_t>> counts, std::optional<double> embed_scale) {
  return std::get<1>(merge(out, input_ids, embed_weight, inputs_embeds, features, token_ids, feature_rows, counts,
                           embed_scale));
}

// A plan made elsewhere: in range, and no feature placed twice, whose gradient would need a sum.
// Returns how many have one.
int64_t check_sources(const char* op, const Tensor& source, int64_t vocab, int64_t features) {
  std::vector<bool> placed(features, false);
  const int64_t* from = data<int64_t>(source);
  int64_t count = 0;
  for (int64_t t = 0; t < source.numel(); ++t) {
    if (from[t] >= vocab || from[t] < -features)
      fail(op, "row_source[", t, "] is ", from[t], ", expected an id in [0, ", vocab,
           ") or -1 - k of a feature row k in [0, ", features, ")");
    if (from[t] >= 0) continue;
    if (placed[-1 - from[t]]) fail(op, "row_source[", t, "] is ", from[t], ", a feature row that already has a place");
    placed[-1 - from[t]] = true, ++count;
  }
  return count;
}

Tensor pack(const Tensor& row_source, const Tensor& embed_weight, std::vector<Tensor> features,
            std::optional<double> embed_scale, std::optional<int64_t> /*padding_idx: backward only*/) {
  if (embed_weight.dim() != 2 || !is_a(row_source, ScalarType::Long))
    fail("pack_embeddings: embed_weight must be [V, D] and row_source int64 [T]");
  check_features("pack_embeddings: ", embed_weight, features, features.size());
  const Rows rows(embed_weight, features);
  const Tensor source = torch::stable::contiguous(row_source);
  check_sources("pack_embeddings: ", source, rows.text.size(0), rows.sources.first[features.size()]);
  const Tensor packed = empty(rows.text, {source.numel(), rows.width()});
  write_rows(packed, rows, source, embed_scale);
  return packed;
}

// Tokens grouped by the row they looked up: order[starts[i], starts[i+1]) all have ids[i].
struct Groups {
  std::vector<int64_t> order, starts, ids;
};

Groups group_by_row(const int64_t* source, int64_t T, std::optional<int64_t> skip) {
  Groups groups;
  for (int64_t t = 0; t < T; ++t)
    if (source[t] >= 0 && !(skip && source[t] == *skip)) groups.order.push_back(t);
  std::sort(groups.order.begin(), groups.order.end(), [&](int64_t a, int64_t b) {
    return source[a] != source[b] ? source[a] < source[b] : a < b;
  });
  for (size_t k = 0; k < groups.order.size(); ++k) {
    const int64_t id = source[groups.order[k]];
    if (groups.ids.empty() || groups.ids.back() != id) {
      groups.ids.push_back(id);
      groups.starts.push_back(static_cast<int64_t>(k));
    }
  }
  groups.starts.push_back(static_cast<int64_t>(groups.order.size()));
  return groups;
}

template <class T>
MMK_INLINE void add_row_body(row_sum_t<T>* sum, const T* row, int64_t D) {
  for (int64_t i = 0; i < D; ++i) sum[i] += widen(row[i]);
}
MMK_MULTIARCH void add_row(double* sum, const float* row, int64_t D) { add_row_body(sum, row, D); }
MMK_MULTIARCH void add_row(float* sum, const bf16* row, int64_t D) { add_row_body(sum, row, D); }
void add_row(float* sum, const f16* row, int64_t D) { add_row_body(sum, row, D); }
void add_row(double* sum, const double* row, int64_t D) { add_row_body(sum, row, D); }

template <class T>
void sum_by_row(const Groups& groups, const T* grad, T* table, int64_t D, double scale) {
  const int64_t n = static_cast<int64_t>(groups.ids.size());
  torch::stable::parallel_for(0, n, 8, [&](int64_t begin, int64_t end) {
    std::vector<row_sum_t<T>> sum(D);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sum.begin(), sum.end(), row_sum_t<T>(0));
      for (int64_t k = groups.starts[i]; k < groups.starts[i + 1]; ++k)
        add_row(sum.data(), grad + groups.order[k] * D, D);
      T* to = table + groups.ids[i] * D;
      for (int64_t c = 0; c < D; ++c)
        to[c] = Convert<T>::from(static_cast<acc_t<T>>(sum[c] * static_cast<row_sum_t<T>>(scale)));
    }
  });
}

// Of merging and of packing, which may leave features without a place.
std::tuple<Tensor, std::vector<Tensor>> backward(
    const Tensor& grad_, const Tensor& row_source_, int64_t vocab, std::vector<int64_t> lengths,
    std::optional<double> embed_scale, std::optional<int64_t> padding_idx, std::vector<bool> needs) {
  check_gradient(grad_, row_source_, vocab, lengths, needs);
  const Tensor row_source = torch::stable::contiguous(row_source_);
  const Tensor grad = torch::stable::contiguous(grad_);
  const int64_t D = grad.size(grad.dim() - 1), T = row_source.numel();
  const int64_t* source = data<int64_t>(row_source);
  const int64_t count = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  const bool all_placed = check_sources("merge_embeddings_backward: ", row_source, vocab ? vocab : T, count) == count;
  Tensor d_text = needs[0] && vocab ? mmkernels::zeros(grad, Sizes{vocab, D})
                                    : empty(grad, needs[0] ? Sizes{T, D} : Sizes{0});
  std::vector<Tensor> d_features;
  std::vector<char*> to;
  for (size_t m = 0; m < lengths.size(); ++m) {
    const Sizes sizes = needs[1 + m] ? Sizes{lengths[m], D} : Sizes{0};
    d_features.push_back(all_placed ? empty(grad, sizes) : mmkernels::zeros(grad, sizes));
    to.push_back(needs[1 + m] ? mutable_data<char>(d_features[m]) : nullptr);
  }
  dispatch_float("merge_embeddings", grad.scalar_type(), [&](auto* tag) {
    using S = pointee<decltype(tag)>;
    const int64_t row_bytes = D * static_cast<int64_t>(sizeof(S));
    const char* from = data<char>(grad);
    char* embeds = needs[0] && !vocab ? mutable_data<char>(d_text) : nullptr;
    torch::stable::parallel_for(0, T, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (embeds && source[t] >= 0) memcpy(embeds + t * row_bytes, from + t * row_bytes, row_bytes);
        if (embeds && source[t] < 0) memset(embeds + t * row_bytes, 0, row_bytes);
        if (source[t] >= 0) continue;
        int64_t k = -1 - source[t];
        size_t m = 0;
        while (k >= lengths[m]) k -= lengths[m++];
        if (to[m]) memcpy(to[m] + k * row_bytes, from + t * row_bytes, row_bytes);
      }
    });
    if (needs[0] && vocab)
      sum_by_row(group_by_row(source, T, padding_idx), data<S>(grad), mutable_data<S>(d_text), D,
                 embed_scale.value_or(1.0));
  });
  return {d_text, d_features};
}

}  // namespace
}  // namespace mmkernels::merge_embeddings

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("merge_embeddings", TORCH_BOX(&mmkernels::merge_embeddings::forward));
  m.impl("merge_embeddings_out", TORCH_BOX(&mmkernels::merge_embeddings::forward_out));
  m.impl("merge_embeddings_backward", TORCH_BOX(&mmkernels::merge_embeddings::backward));
  m.impl("pack_embeddings", TORCH_BOX(&mmkernels::merge_embeddings::pack));
  m.impl("pack_embeddings_backward", TORCH_BOX(&mmkernels::merge_embeddings::backward));
}
