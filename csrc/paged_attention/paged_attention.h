// SPDX-License-Identifier: Apache-2.0
// Attention over pages: how a call falls into pieces, and where a slot lies. Host; no torch.
//
// A piece is up to kRows query rows of one sequence (or of all sequences of a group) against one span of keys of one
// table. What a sequence's own pieces cover follows from the sequence alone, so neither the batch nor the number of
// threads changes its bits.
#pragma once
#include <vector>

#include "../common/host_device.h"

namespace mmkernels::paged_attention {

constexpr int64_t kRows = 288;       // query rows of a piece: tokens × G
constexpr int64_t kSpan = 1024;      // keys of a piece where rows are few: then keys are what threads can share
constexpr int64_t kSpreadRows = 512; // more rows than these are work enough

struct Shape {
  int64_t B, T, Hq, H, d, pages, page_size;
  int64_t G() const { return Hq / H; }
};

// Of [pages, page_size, H, d] with a contiguous last dimension; strides in elements.
struct Cache {
  int64_t page_size, stride_page, stride_slot, stride_head;
  int64_t at(const int64_t* table, int64_t key, int64_t head) const {
    return table[key / page_size] * stride_page + key % page_size * stride_slot + head * stride_head;
  }
};

// The numbers of a call, checked: what fits in its tables and names pages that exist.
struct Call {
  std::vector<int64_t> lens, starts, table;
  std::vector<int64_t> groups, prefix_lens, prefix_table;  // group of each sequence, -1: none
  int64_t width, prefix_width;                             // of the tables
  bool causal;
};

struct Piece {
  int64_t first, count;  // of Plan::tokens
  const int64_t* table;
  int64_t begin, end;    // keys
  int64_t part;          // its place among the parts of its tokens
  bool own;              // only keys below Plan::limit are visible; of a prefix, all
};

struct Plan {
  std::vector<int64_t> tokens;      // 0 … T-1, then those of each group
  std::vector<int64_t> limit;       // own keys a token sees
  std::vector<int64_t> parts;       // pieces along the keys a token has
  std::vector<int64_t> first_part;  // of tokens with several parts, where those lie; [T + 1]
  std::vector<Piece> pieces;

  // `count` tokens from `first` on against n keys of a table; the new parts come after those they have.
  void add(int64_t first, int64_t count, int64_t G, const int64_t* table, int64_t n, bool own) {
    if (count == 0 || n == 0) return;
    const int64_t before = parts[tokens[first]], span = count * G <= kSpreadRows ? kSpan : n;
    const int64_t tile = G < kRows ? kRows / G : 1;
    for (int64_t t = 0; t < count; t += tile)
      for (int64_t k = 0; k < n; k += span)
        pieces.push_back({first + t, min64(tile, count - t), table, k, min64(n, k + span), before + k / span, own});
    for (int64_t t = first; t < first + count; ++t) parts[tokens[t]] += ceil_div(n, span);
  }
};

inline Plan plan_of(const Shape& s, const Call& c) {
  Plan plan;
  plan.limit.resize(s.T), plan.parts.assign(s.T, 0), plan.first_part.assign(s.T + 1, 0);
  for (int64_t t = 0; t < s.T; ++t) plan.tokens.push_back(t);
  for (size_t g = 0; g < c.prefix_lens.size(); ++g) {
    const int64_t first = static_cast<int64_t>(plan.tokens.size());
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t t = c.starts[b]; c.groups[b] == static_cast<int64_t>(g) && t < c.starts[b + 1]; ++t)
        plan.tokens.push_back(t);
    const int64_t count = static_cast<int64_t>(plan.tokens.size()) - first;
    plan.add(first, count, s.G(), c.prefix_table.data() + g * c.prefix_width, c.prefix_lens[g], false);
  }
  for (int64_t b = 0; b < s.B; ++b) {
    const int64_t first = c.starts[b], m = c.starts[b + 1] - first, n = c.lens[b];
    for (int64_t i = 0; i < m; ++i) plan.limit[first + i] = c.causal ? n - m + i + 1 : n;
    plan.add(first, m, s.G(), c.table.data() + b * c.width, n, true);
  }
  for (int64_t t = 0; t < s.T; ++t) plan.first_part[t + 1] = plan.first_part[t] + (plan.parts[t] > 1 ? plan.parts[t] : 0);
  return plan;
}

}  // namespace mmkernels::paged_attention
