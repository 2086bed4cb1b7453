// SPDX-License-Identifier: Apache-2.0
// Merging: where each row comes from, and the body that moves one row. Host and device; no torch.
//
// T tokens, V vocabulary rows, M modalities. row_source[t] >= 0 is a row of the text table (row t of
// inputs_embeds), row_source[t] < 0 is feature row -1 - row_source[t] counted through the modalities.
#pragma once
#include "../common/numeric.h"

namespace mmkernels::merge_embeddings {

constexpr int kMaxModalities = 8;

struct Sources {
  const char* text;                          // [V or T, D]
  const char* features[kMaxModalities];      // [n_m, D] each
  int64_t first[kMaxModalities + 1];         // first[m]: features before modality m; the last: all
  int32_t modalities;
  int64_t row_bytes;

  MMK_HD int modality(int64_t k) const {  // of feature row k
    int m = 0;
    while (m + 1 < modalities && k >= first[m + 1]) ++m;
    return m;
  }
  MMK_HD const char* row(int64_t source) const {
    if (source >= 0) return text + source * row_bytes;
    const int m = modality(-1 - source);
    return features[m] + (-1 - source - first[m]) * row_bytes;
  }
};

struct alignas(16) Bytes16 { uint64_t low, high; };

// Copies a row with `lanes` workers, of which this is `lane`: 16 bytes at a time where both ends allow,
// 2 bytes (the smallest element) otherwise and in the tail.
MMK_HD void copy_row(char* to, const char* from, int64_t bytes, int64_t lane, int64_t lanes) {
  int64_t done = 0;
  if (((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15) == 0) {
    const int64_t words = bytes / 16;
    for (int64_t i = lane; i < words; i += lanes)
      reinterpret_cast<Bytes16*>(to)[i] = reinterpret_cast<const Bytes16*>(from)[i];
    done = words * 16;
  }
  for (int64_t i = done / 2 + lane; i < bytes / 2; i += lanes)
    reinterpret_cast<uint16_t*>(to)[i] = reinterpret_cast<const uint16_t*>(from)[i];
}

MMK_HD void zero_row(char* to, int64_t bytes, int64_t lane, int64_t lanes) {
  for (int64_t i = lane; i < bytes / 2; i += lanes) reinterpret_cast<uint16_t*>(to)[i] = 0;
}

template <class T>
MMK_HD void scale_row(T* to, const T* from, int64_t D, double scale, int64_t lane, int64_t lanes) {
  for (int64_t i = lane; i < D; i += lanes)
    to[i] = Convert<T>::from(widen(from[i]) * static_cast<acc_t<T>>(scale));
}

// One output row: a text row (scaled if asked) or a feature row.
template <class T>
MMK_HD void merge_row(char* to, const Sources& sources, int64_t source, bool scaled, double scale,
                      int64_t lane, int64_t lanes) {
  const char* from = sources.row(source);
  if (scaled && source >= 0) {
    scale_row(reinterpret_cast<T*>(to), reinterpret_cast<const T*>(from),
              sources.row_bytes / static_cast<int64_t>(sizeof(T)), scale, lane, lanes);
  } else {
    copy_row(to, from, sources.row_bytes, lane, lanes);
  }
}

// What the gradients of one id are summed in. Equal ones, as of a mean, all round to the same side: in fp32 their error
// would grow with their number, not its root. fp32 holds a sum of 16-bit values well enough.
template <class T> struct RowSum { using type = acc_t<T>; };
template <> struct RowSum<float> { using type = double; };
template <class T> using row_sum_t = typename RowSum<T>::type;

// One row of the embedding gradient: the gradients of the tokens order[begin, end), which all looked up
// this row, summed in token order and rounded once. Each lane owns its columns.
template <class T>
MMK_HD void sum_rows(T* to, const T* grad, const int64_t* order, int64_t begin, int64_t end, int64_t D,
                     double scale, int64_t lane, int64_t lanes) {
  for (int64_t i = lane; i < D; i += lanes) {
    row_sum_t<T> sum = 0;
    for (int64_t k = begin; k < end; ++k) sum += widen(grad[order[k] * D + i]);
    to[i] = Convert<T>::from(static_cast<acc_t<T>>(sum * static_cast<row_sum_t<T>>(scale)));
  }
}

}  // namespace mmkernels::merge_embeddings
