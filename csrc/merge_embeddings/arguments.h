// SPDX-License-Identifier: Apache-2.0
// Merging: the checks of shapes and dtypes that stand between a caller of the raw ops and a pointer. For CPU and CUDA.
#pragma once
#include "../common/aten.h"
#include "merge_embeddings.h"

namespace mmkernels::merge_embeddings {

inline void check_features(const char* op, const Tensor& text, const std::vector<Tensor>& features, size_t places) {
  if (features.size() > kMaxModalities)
    fail(op, "features must be at most ", kMaxModalities, " modalities, got ", features.size());
  if (places != features.size())
    fail(op, "features must have one token id or one tensor of rows each, got ", places, " for ", features.size());
  for (const Tensor& f : features)
    if (f.dim() != 2 || f.size(1) != text.size(text.dim() - 1))
      fail(op, "features must be [n, D] with the D of the embeddings");
}

// Returns what text rows come from: [V, D], or inputs_embeds of the shape of the output.
inline const Tensor& check_text(const Tensor& input_ids, const OptionalTensor& embed_weight,
                                const OptionalTensor& inputs_embeds) {
  if (input_ids.dim() < 1 || !(is_a(input_ids, ScalarType::Long) || is_a(input_ids, ScalarType::Int)))
    fail("merge_embeddings: input_ids must be int64 or int32 [..., L]");
  if (!embed_weight && !inputs_embeds) fail("merge_embeddings: embed_weight must be given unless inputs_embeds is");
  if (inputs_embeds) {
    Sizes shape(input_ids.sizes().begin(), input_ids.sizes().end());
    shape.push_back(inputs_embeds->dim() ? inputs_embeds->size(inputs_embeds->dim() - 1) : 0);
    if (!is_a(*inputs_embeds, inputs_embeds->scalar_type(), shape))
      fail("merge_embeddings: inputs_embeds must be [*input_ids.shape, D]");
  } else if (embed_weight->dim() != 2 || embed_weight->size(0) == 0) {
    fail("merge_embeddings: embed_weight must be [V, D] with V > 0");
  }
  return inputs_embeds ? *inputs_embeds : *embed_weight;
}

inline void check_places(const Tensor& input_ids, const std::vector<Tensor>& features,
                         const std::vector<Tensor>& feature_rows, const std::optional<Sizes>& counts) {
  for (size_t m = 0; m < feature_rows.size(); ++m)
    if (!is_a(feature_rows[m], ScalarType::Long, {features[m].size(0)}))
      fail("merge_embeddings: feature_rows[", m, "] must be int64 [", features[m].size(0), "]");
  int64_t samples = 1;
  for (int64_t i = 0; i + 1 < input_ids.dim(); ++i) samples *= input_ids.size(i);
  const int64_t expected = samples * static_cast<int64_t>(features.size());
  if (counts && static_cast<int64_t>(counts->size()) != expected)
    fail("merge_embeddings: feature_counts must be ", expected, " numbers, of each sample for each modality, got ",
         counts->size());
}

inline void check_out(const Tensor& out, const Tensor& text, const Sizes& shape) {
  if (!is_a(out, text.scalar_type(), shape) || !out.is_contiguous())
    fail("merge_embeddings: out must be contiguous [*input_ids.shape, D] in the dtype of the embeddings");
}

inline void check_gradient(const Tensor& grad, const Tensor& row_source, int64_t vocab, const Sizes& lengths,
                           const std::vector<bool>& needs) {
  if (!is_a(row_source, ScalarType::Long) || grad.dim() < 1)
    fail("merge_embeddings_backward: row_source must be int64 [T] and grad [..., D]");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < grad.dim(); ++i) rows *= grad.size(i);
  if (rows != row_source.numel())
    fail("merge_embeddings_backward: grad must have a row for each of ", row_source.numel(), " tokens, got ", rows);
  if (lengths.size() > kMaxModalities || needs.size() != lengths.size() + 1 || vocab < 0)
    fail("merge_embeddings_backward: needs must be one answer for the text and one for each of at most ",
         kMaxModalities, " modalities, got ", needs.size(), " for ", lengths.size());
  for (int64_t n : lengths)
    if (n < 0) fail("merge_embeddings_backward: feature_lengths must be at least 0, got ", n);
}

}  // namespace mmkernels::merge_embeddings
