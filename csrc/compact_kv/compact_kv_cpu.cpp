// SPDX-License-Identifier: Apache-2.0
// Compaction on CPU. Every move is found and checked first; then a thread moves the slots of one sequence in one layer,
// of keys or of values, in order.
#include <cstring>

#include "../common/aten.h"
#include "compact_kv.h"

namespace mmkernels::compact_kv {
namespace {

constexpr const char* kOp = "compact_kv: ";

std::vector<int64_t> numbers(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  std::vector<int64_t> found(dense.numel());
  for (size_t i = 0; i < found.size(); ++i)
    found[i] = dense.scalar_type() == ScalarType::Long ? data<int64_t>(dense)[i] : data<int32_t>(dense)[i];
  return found;
}

Table table_of(const Tensor& t) { return {numbers(t), t.size(1)}; }

bool is_index(const Tensor& t, int64_t dims, int64_t rows) {
  return t.dim() == dims && t.size(0) == rows &&
         (t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int);
}

void check_shapes(const Tensor& keys, const Tensor& values, const Tensor& table, const Tensor& target,
                  const Tensor& lens, const Tensor& keep) {
  if (keys.dim() != 5 || values.dim() != 5 || keys.scalar_type() != values.scalar_type() || keys.size(2) < 1)
    fail(kOp, "caches must be [layers, pages, page_size, H, d] of one dtype");
  for (int64_t i = 0; i < 5; ++i)
    if (keys.size(i) != values.size(i)) fail(kOp, "value_cache must have the shape of key_cache");
  const int64_t B = lens.numel();
  if (!is_index(lens, 1, B) || !is_index(table, 2, B) || !is_index(target, 2, B) || keep.dim() != 2 ||
      keep.size(0) != B || keep.scalar_type() != ScalarType::Bool)
    fail(kOp, "block_table and target_table must be [B, P], seq_lens [B], int32 or int64, and keep bool [B, L]");
}

void check_pages(const char* name, const Table& t, int64_t b, int64_t count, int64_t pages) {
  for (int64_t i = 0; i < count; ++i)
    if (const int64_t page = t.at(b, i); page < 0 || page >= pages)
      fail(kOp, name, "[", b, ", ", i, "] must be a page in [0, ", pages, "), got ", page);
}

// The bytes of one slot in a layer: one run, or one a head, or one a value.
struct Layout {
  char* memory;
  int64_t layer, page, slot;       // strides in bytes
  int64_t heads, head, values, value, size;  // of one run: heads × values runs of `size` bytes
  explicit Layout(const Tensor& t) : memory(mutable_data<char>(t)) {
    const int64_t bytes = t.element_size(), H = t.size(3), d = t.size(4);
    layer = t.stride(0) * bytes, page = t.stride(1) * bytes, slot = t.stride(2) * bytes;
    head = t.stride(3) * bytes, value = t.stride(4) * bytes;
    const bool rows = t.stride(4) == 1 || d == 1, whole = rows && (t.stride(3) == d || H == 1);
    heads = whole ? 1 : H, values = rows ? 1 : d, size = bytes * (whole ? H * d : rows ? d : 1);
  }
  void move(int64_t l, const Move& m) const {
    const char* from = memory + l * layer + m.from_page * page + m.from_slot * slot;
    char* to = memory + l * layer + m.to_page * page + m.to_slot * slot;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t v = 0; v < values; ++v) memcpy(to + h * head + v * value, from + h * head + v * value, size);
  }
};

Tensor forward(const Tensor& keys, const Tensor& values, const Tensor& block_table, const Tensor& target_table,
               const Tensor& seq_lens, const Tensor& keep_) {
  check_shapes(keys, values, block_table, target_table, seq_lens, keep_);
  const int64_t B = seq_lens.numel(), L = keep_.size(1), pages = keys.size(1), page_size = keys.size(2);
  const Table from = table_of(block_table), to = table_of(target_table);
  const std::vector<int64_t> lens = numbers(seq_lens);
  const Tensor keep = torch::stable::contiguous(keep_), new_lens = empty(keep, {B}, ScalarType::Long);
  int64_t* kept = mutable_data<int64_t>(new_lens);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t room = min64(from.width * page_size, L), target_room = to.width * page_size;
    if (lens[b] < 0 || lens[b] > room)
      fail(kOp, "seq_lens[", b, "] must be in [0, ", room, "], what block_table and keep can hold, got ", lens[b]);
    kept[b] = 0;
    for (int64_t j = 0; j < lens[b]; ++j) kept[b] += data<uint8_t>(keep)[b * L + j] != 0;
    if (kept[b] > target_room)
      fail(kOp, "target_table[", b, "] must be room for ", kept[b], " tokens, got room for ", target_room);
  }
  Uses uses(pages);
  for (int64_t b = 0; b < B; ++b) check_pages("block_table", from, b, ceil_div(lens[b], page_size), pages);
  for (int64_t b = 0; b < B; ++b) check_pages("target_table", to, b, ceil_div(kept[b], page_size), pages);
  for (int64_t b = 0; b < B; ++b) uses.add(from, b, ceil_div(lens[b], page_size));
  for (int64_t b = 0; b < B; ++b) uses.add(to, b, ceil_div(kept[b], page_size));
  std::vector<std::vector<Move>> moves(B);
  for (int64_t b = 0; b < B; ++b) {
    moves[b] = moves_of(from, to, b, lens[b], data<uint8_t>(keep) + b * L, page_size);
    for (const Move& m : moves[b])
      if (const int64_t other = uses.elsewhere(m.to_page, b, m.column); other >= 0)
        fail(kOp, "target_table[", b, ", ", m.column, "] must be a page of its own (copy a shared one first, as "
             "PagedKVCache.compact does), got ", m.to_page, ", also in row ", other);
  }
  const Layout layouts[2] = {Layout(keys), Layout(values)};
  const int64_t layers = keys.size(0);
  torch::stable::parallel_for(0, 2 * layers * B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (const Move& m : moves[i % B]) layouts[i / B % 2].move(i / B / 2, m);
  });
  return new_lens;
}

}  // namespace
}  // namespace mmkernels::compact_kv

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) { m.impl("compact_kv", TORCH_BOX(&mmkernels::compact_kv::forward)); }
