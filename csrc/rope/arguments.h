// SPDX-License-Identifier: Apache-2.0
// Arguments of the rotary ops as their kernels read them, and the checks before. For CPU and CUDA.
#pragma once
#include <string>

#include "../common/aten.h"
#include "rope.h"

namespace mmkernels::rope {

inline Heads heads_of(const Tensor& t) {  // [B, L, heads, d] or [T, heads, d]
  const int64_t n = t.dim();
  return {t.data_ptr(), t.size(n - 2), n == 4 ? t.stride(0) : 0, t.stride(n - 3), t.stride(n - 2)};
}

inline Tensor readable(const Tensor& t) {
  return t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1 ? torch::stable::contiguous(t) : t;
}

inline void check(const std::string& op, const Tensor& query, const Tensor& key, const Tensor& positions,
           const Tensor& inv_freq, const OptionalTensor& axis, int64_t dims) {
  if (query.dim() != dims || key.dim() != dims) fail(op, ": query and key must have ", dims, " dimensions");
  const int64_t d = query.size(dims - 1), r = inv_freq.dim() == 1 ? inv_freq.size(0) : -1;
  for (int64_t i = 0; i < dims; ++i)
    if (i != dims - 2 && query.size(i) != key.size(i)) fail(op, ": key must be as query but for its heads");
  if (key.scalar_type() != query.scalar_type()) fail(op, ": key must be of the dtype of query");
  if (r < 0 || r % 2 || r > d || inv_freq.scalar_type() != ScalarType::Float)
    fail(op, ": inv_freq must be float32 [r], r even and at most ", d);
  if (axis && (axis->dim() != 1 || axis->size(0) != r || axis->scalar_type() != ScalarType::Long))
    fail(op, ": axis must be int64 [", r, "]");
  bool fits = positions.dim() == dims - 1 && positions.scalar_type() == ScalarType::Long && positions.size(0) > 0;
  for (int64_t i = 0; fits && i + 2 < dims; ++i) fits = positions.size(i + 1) == query.size(i);
  if (!fits) fail(op, ": position_ids must be int64 [A, ", dims == 4 ? "B, L]" : "T]", " with A > 0");
}

inline Cache cache_of(const char* name, const Tensor& t, const Tensor& key, const Tensor& like) {
  bool fits = t.dim() == 4 && t.scalar_type() == like.scalar_type() && t.size(1) > 0 && t.size(2) == key.size(1) &&
              t.size(3) == key.size(2);
  for (int64_t i = 0; fits && i < 4; ++i) fits = t.size(i) == like.size(i);
  if (!fits) fail("rope_write_kv: ", name, " must be [pages, page_size, kv_heads, d], both caches of one shape and dtype");
  if (t.size(3) > 1 && t.stride(3) != 1) fail("rope_write_kv: ", name, " must be with its last dimension contiguous");
  return {t.data_ptr(), t.size(1), t.size(0) * t.size(1), t.stride(0), t.stride(1), t.stride(2)};
}

inline void check_written(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& slot_mapping,
                          const OptionalTensor& q_norm, const OptionalTensor& k_norm, const OptionalTensor& k_scale,
                          const OptionalTensor& v_scale) {
  bool fits = value.dim() == 3 && value.scalar_type() == key.scalar_type() && slot_mapping.dim() == 1 &&
              slot_mapping.size(0) == query.size(0);
  for (int64_t i = 0; fits && i < 3; ++i) fits = value.size(i) == key.size(i);
  for (const OptionalTensor* t : {&q_norm, &k_norm}) fits = fits && (!*t || (*t)->scalar_type() == key.scalar_type());
  if (!fits) fail("rope_write_kv: value must be as key, slot_mapping [T], norms of the dtype of query");
  if (slot_mapping.scalar_type() != ScalarType::Long && slot_mapping.scalar_type() != ScalarType::Int)
    fail("rope_write_kv: slot_mapping must be int64 or int32");
  for (const OptionalTensor* t : {&q_norm, &k_norm})
    if (*t && ((*t)->dim() != 1 || (*t)->size(0) != query.size(2)))
      fail("rope_write_kv: q_norm and k_norm must be [", query.size(2), "]");
  for (const OptionalTensor* t : {&k_scale, &v_scale})
    if (*t && ((*t)->dim() != 1 || (*t)->size(0) != key.size(1) || (*t)->scalar_type() != ScalarType::Float))
      fail("rope_write_kv: k_scale and v_scale must be float32 [", key.size(1), "]");
  if (k_scale.has_value() != v_scale.has_value()) fail("rope_write_kv: v_scale must be given with k_scale");
}

}  // namespace mmkernels::rope
