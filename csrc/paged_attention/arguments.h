// SPDX-License-Identifier: Apache-2.0
// Arguments of paged_attention as its CPU kernel reads them, and the checks before.
#pragma once
#include <string>

#include "../common/aten.h"
#include "paged_attention.h"

namespace mmkernels::paged_attention {

constexpr const char* kOp = "paged_attention: ";

inline std::vector<int64_t> numbers(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  std::vector<int64_t> found(dense.numel());
  for (size_t i = 0; i < found.size(); ++i)
    found[i] = dense.scalar_type() == ScalarType::Long ? data<int64_t>(dense)[i] : data<int32_t>(dense)[i];
  return found;
}

// Lengths fit their row of the table; pages in use exist.
inline void check_pages(const Shape& s, const char* lens_name, const char* table_name, const std::vector<int64_t>& lens,
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

inline void check_starts(const Shape& s, const std::vector<int64_t>& starts) {
  if (starts.front() != 0 || starts.back() != s.T)
    fail(kOp, "cu_seqlens_q must be 0 … ", s.T, ", the queries given, got ", starts.front(), " … ", starts.back());
  for (int64_t b = 0; b < s.B; ++b)
    if (starts[b + 1] < starts[b])
      fail(kOp, "cu_seqlens_q[", b + 1, "] must be at least ", starts[b], ", the one before, got ", starts[b + 1]);
}

inline Call call_of(const Shape& s, const Tensor& table, const Tensor& lens, const OptionalTensor& starts,
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

inline bool is_index(const Tensor& t, int64_t dims, int64_t rows) {
  return t.dim() == dims && (rows < 0 || t.size(0) == rows) &&
         (t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int);
}

inline Shape shape_of(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& table, const Tensor& lens,
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

}  // namespace mmkernels::paged_attention
