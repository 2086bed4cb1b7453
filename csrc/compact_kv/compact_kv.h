// SPDX-License-Identifier: Apache-2.0
// Compaction of pages: which slots move where, and who must not be written. Host; no torch.
#pragma once
#include <string>
#include <vector>

#include "../common/host_device.h"

namespace mmkernels::compact_kv {

struct Move {
  int64_t from_page, from_slot, to_page, to_slot;
  int64_t column;  // of the target table
};

// [rows, width]; the pages of a sequence in order.
struct Table {
  std::vector<int64_t> pages;
  int64_t width;
  int64_t at(int64_t b, int64_t i) const { return pages[b * width + i]; }
};

// Moves of one sequence, in order: no slot is written before all it held was read, as the i-th kept token lies in slot i
// or a later one.
inline std::vector<Move> moves_of(const Table& from, const Table& to, int64_t b, int64_t n, const uint8_t* keep,
                                  int64_t page_size) {
  std::vector<Move> moves;
  int64_t kept = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (!keep[j]) continue;
    const Move move{from.at(b, j / page_size), j % page_size, to.at(b, kept / page_size), kept % page_size,
                    kept / page_size};
    if (move.from_page != move.to_page || move.from_slot != move.to_slot) moves.push_back(move);
    ++kept;
  }
  return moves;
}

// Where pages are in use: nowhere, in one place (row, column) of both tables, or in several.
class Uses {
 public:
  explicit Uses(int64_t pages) : row_(pages, -1), column_(pages, -1), several_(pages, -1) {}
  void add(const Table& t, int64_t b, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t p = t.at(b, i);
      if (row_[p] < 0) row_[p] = b, column_[p] = i;
      else if (row_[p] != b || column_[p] != i) several_[p] = several_[p] < 0 ? b : several_[p];
    }
  }
  // Another row (or the same) that has this page elsewhere; -1: none.
  int64_t elsewhere(int64_t page, int64_t b, int64_t i) const {
    if (several_[page] < 0) return -1;
    return row_[page] == b && column_[page] == i ? several_[page] : row_[page];
  }

 private:
  std::vector<int64_t> row_, column_, several_;
};

}  // namespace mmkernels::compact_kv
