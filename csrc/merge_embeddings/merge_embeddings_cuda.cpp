// SPDX-License-Identifier: Apache-2.0
// Merging on CUDA: check shapes, allocate, launch on torch's current stream. Values are checked on the device.
#include "../common/cuda_stream.h"
#include "arguments.h"
#include "merge_embeddings_cuda.h"

namespace mmkernels::merge_embeddings {
namespace {

using torch::stable::accelerator::DeviceGuard;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Double: return Dtype::kDouble;
    case ScalarType::BFloat16: return Dtype::kBfloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: fail("merge_embeddings: float64, float32, float16 and bfloat16 are supported, got another dtype");
  }
}

// Where rows come from; keeps what it casts and makes contiguous.
struct Rows {
  Tensor text;
  std::vector<Tensor> features;
  Sources sources{};

  Rows(const Tensor& table, const std::vector<Tensor>& from) : text(torch::stable::contiguous(table)) {
    sources.text = data<char>(text), sources.modalities = static_cast<int32_t>(from.size());
    sources.row_bytes = width() * static_cast<int64_t>(text.element_size());
    for (size_t m = 0; m < from.size(); ++m) {
      const bool cast = from[m].scalar_type() != text.scalar_type();  // a pass of its own; the CPU kernel needs none
      features.push_back(torch::stable::contiguous(cast ? torch::stable::to(from[m], text.scalar_type()) : from[m]));
      sources.features[m] = data<char>(features[m]);
      sources.first[m + 1] = sources.first[m] + features[m].size(0);
    }
  }
  int64_t width() const { return text.size(text.dim() - 1); }
};

void write_rows(const Tensor& to, const Rows& rows, const Tensor& source, int64_t text_rows,
                std::optional<double> embed_scale, cudaStream_t stream) {
  const MergeArgs args{rows.sources, data<int64_t>(source), mutable_data<char>(to), source.numel(), text_rows,
                       rows.sources.first[rows.features.size()], embed_scale.has_value(), embed_scale.value_or(1.0)};
  if (source.numel() && rows.width()) check_cuda("merge_embeddings", launch_merge(args, dtype_of(rows.text), stream));
}

// To `out`, or to a new tensor.
std::tuple<Tensor, Tensor> merge(
    const OptionalTensor& out, const Tensor& input_ids, const OptionalTensor& embed_weight,
    const OptionalTensor& inputs_embeds, const std::vector<Tensor>& features, const std::vector<int64_t>& token_ids,
    std::vector<Tensor> feature_rows, const std::optional<Sizes>& counts, std::optional<double> embed_scale) {
  const DeviceGuard guard(input_ids.get_device_index());
  const cudaStream_t stream = current_stream(input_ids.get_device_index());
  const Tensor& table = check_text(input_ids, embed_weight, inputs_embeds);
  check_features("merge_embeddings: ", table, features, feature_rows.empty() ? token_ids.size() : feature_rows.size());
  check_places(input_ids, features, feature_rows, counts);
  const Rows rows(table, features);
  Sizes shape(input_ids.sizes().begin(), input_ids.sizes().end());
  shape.push_back(rows.width());
  if (out) check_out(*out, table, shape);
  const Tensor ids = torch::stable::contiguous(input_ids);
  const int64_t T = ids.numel();

  PlanArgs plan{};
  plan.ids = ids.data_ptr(), plan.ids_are_int64 = ids.scalar_type() == ScalarType::Long;
  plan.T = T, plan.vocab = inputs_embeds ? 0 : table.size(0);
  plan.modalities = static_cast<int32_t>(features.size()), plan.by_row = !feature_rows.empty();
  for (size_t m = 0; m < features.size(); ++m) {
    plan.first[m + 1] = rows.sources.first[m + 1];
    if (plan.by_row) feature_rows[m] = torch::stable::contiguous(feature_rows[m]);
    if (plan.by_row) plan.rows[m] = data<int64_t>(feature_rows[m]);
    else plan.token_ids[m] = token_ids[m];
  }
  Tensor source = empty(rows.text, {T}, ScalarType::Long);
  plan.source = mutable_data<int64_t>(source);
  const Tensor merged = out ? *out : empty(rows.text, shape);
  if (T) check_cuda("merge_embeddings", launch_plan(plan, stream));
  write_rows(merged, rows, source, INT64_MAX, embed_scale, stream);  // the plan's text rows are in range
  return {merged, source};
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& input_ids, const OptionalTensor& embed_weight, const OptionalTensor& inputs_embeds,
    std::vector<Tensor> features, std::vector<int64_t> token_ids, std::vector<Tensor> feature_rows,
    std::optional<Sizes> counts /*of their values on CUDA only totals are checked*/,
    std::optional<double> embed_scale, std::optional<int64_t> /*padding_idx: backward only*/) {
  return merge(std::nullopt, input_ids, embed_weight, inputs_embeds, features, token_ids, feature_rows, counts,
               embed_scale);
}

Tensor forward_out(
    const Tensor& out, const Tensor& input_ids, const OptionalTensor& embed_weight,
    const OptionalTensor& inputs_embeds, std::vector<Tensor> features, std::vector<int64_t> token_ids,
    std::vector<Tensor> feature_rows, std::optional<Sizes> counts,
    std::optional<double> embed_scale) {
  return std::get<1>(
      merge(out, input_ids, embed_weight, inputs_embeds, features, token_ids, feature_rows, counts, embed_scale));
}

// A plan made elsewhere: what is out of range becomes a row of zeros and an error to poll.
Tensor pack(const Tensor& row_source, const Tensor& embed_weight, std::vector<Tensor> features,
            std::optional<double> embed_scale, std::optional<int64_t> /*padding_idx: backward only*/) {
  const DeviceGuard guard(row_source.get_device_index());
  if (embed_weight.dim() != 2 || !is_a(row_source, ScalarType::Long))
    fail("pack_embeddings: embed_weight must be [V, D] and row_source int64 [T]");
  check_features("pack_embeddings: ", embed_weight, features, features.size());
  const Rows rows(embed_weight, features);
  const Tensor source = torch::stable::contiguous(row_source);
  Tensor packed = empty(rows.text, {source.numel(), rows.width()});
  write_rows(packed, rows, source, rows.text.size(0), embed_scale, current_stream(row_source.get_device_index()));
  return packed;
}

// Tokens sorted by their row: aten::sort.stable
std::tuple<Tensor, Tensor> sort_stable(const Tensor& t) {
  StableIValue stack[4] = {boxed(t), boxed(std::optional<bool>(true)), boxed(int64_t{0}), boxed(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

std::tuple<Tensor, std::vector<Tensor>> backward(
    const Tensor& grad_, const Tensor& row_source_, int64_t vocab, std::vector<int64_t> lengths,
    std::optional<double> embed_scale, std::optional<int64_t> padding_idx, std::vector<bool> needs) {
  check_gradient(grad_, row_source_, vocab, lengths, needs);
  const Tensor row_source = torch::stable::contiguous(row_source_);
  const DeviceGuard guard(grad_.get_device_index());
  const cudaStream_t stream = current_stream(grad_.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_);
  const int64_t D = grad.size(grad.dim() - 1), T = row_source.numel();
  const auto zeros = [&](bool need, int64_t rows) {  // features nobody placed have no gradient
    return torch::stable::new_zeros(grad, need ? Sizes{rows, D} : Sizes{0});
  };
  Tensor d_text = zeros(needs[0], vocab ? vocab : T);
  std::vector<Tensor> d_features;
  BackwardArgs args{};
  args.modalities = static_cast<int32_t>(lengths.size());
  for (size_t m = 0; m < lengths.size(); ++m) {
    d_features.push_back(zeros(needs[1 + m], lengths[m]));
    args.features[m] = needs[1 + m] ? mutable_data<char>(d_features[m]) : nullptr;
    args.first[m + 1] = args.first[m] + lengths[m];
  }
  if (T * D == 0) return {d_text, d_features};
  std::optional<std::tuple<Tensor, Tensor>> sorted;
  if (needs[0] && vocab) {
    sorted = sort_stable(row_source);
    args.sorted = data<int64_t>(std::get<0>(*sorted)), args.order = data<int64_t>(std::get<1>(*sorted));
    args.table = mutable_data<char>(d_text);
  } else if (needs[0]) {
    args.embeds = mutable_data<char>(d_text);
  }
  args.grad = data<char>(grad), args.source = data<int64_t>(row_source);
  args.T = T, args.D = D, args.vocab = vocab;
  args.padding = padding_idx.value_or(-1), args.scale = embed_scale.value_or(1.0);
  check_cuda("merge_embeddings_backward", launch_backward(args, dtype_of(grad), stream));
  return {d_text, d_features};
}

std::vector<int64_t> poll(int64_t device) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  std::vector<int64_t> found(4, 0);
  check_cuda("merge_embeddings", take_error(found.data(), current_stream(static_cast<int32_t>(device))));
  return found;
}

}  // namespace
}  // namespace mmkernels::merge_embeddings

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, m) {
  m.impl("merge_embeddings", TORCH_BOX(&mmkernels::merge_embeddings::forward));
  m.impl("merge_embeddings_out", TORCH_BOX(&mmkernels::merge_embeddings::forward_out));
  m.impl("merge_embeddings_backward", TORCH_BOX(&mmkernels::merge_embeddings::backward));
  m.impl("pack_embeddings", TORCH_BOX(&mmkernels::merge_embeddings::pack));
  m.impl("pack_embeddings_backward", TORCH_BOX(&mmkernels::merge_embeddings::backward));
}

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) { m.def("merge_embeddings_poll(int device) -> int[]"); }
STABLE_TORCH_LIBRARY_IMPL(mmkernels, CompositeExplicitAutograd, m) {
  m.impl("merge_embeddings_poll", TORCH_BOX(&mmkernels::merge_embeddings::poll));
}
