// SPDX-License-Identifier: Apache-2.0
// The torch-free headers under ThreadSanitizer (`make sanitize`): every lane of a GPU body is a thread of its own, and
// the GEMM's panels and column blocks are dealt to threads, as the kernels deal them. A program that returns 0.
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include "../common/gemm.h"
#include "../merge_embeddings/merge_embeddings.h"
#include "../rope/rope.h"

using namespace mmkernels;

namespace {

constexpr int64_t kLanes = 8;

void on_lanes(const std::function<void(int64_t)>& body) {
  std::vector<std::thread> lanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes.emplace_back(body, lane);
  for (std::thread& t : lanes) t.join();
}

// Rows of 33 values: no lane has as many as another, none begins on a word.
void merge() {
  constexpr int64_t D = 33, T = 40;
  std::vector<bf16> text(5 * D), image(7 * D), out(T * D), grad(T * D), table(5 * D);
  merge_embeddings::Sources s{};
  s.text = reinterpret_cast<const char*>(text.data());
  s.features[0] = reinterpret_cast<const char*>(image.data());
  s.first[1] = 7, s.modalities = 1, s.row_bytes = D * sizeof(bf16);
  std::vector<int64_t> order(T);
  for (int64_t t = 0; t < T; ++t) order[t] = t;
  on_lanes([&](int64_t lane) {
    for (int64_t t = 0; t < T; ++t)
      merge_embeddings::merge_row<bf16>(reinterpret_cast<char*>(&out[t * D]), s, t % 12 < 5 ? t % 12 : 4 - t % 12,
                                        t % 2, 2.0, lane, kLanes);
    for (int64_t row = 0; row < 5; ++row)
      merge_embeddings::sum_rows<bf16>(&table[row * D], grad.data(), order.data(), 8 * row, 8 * row + 8, D, 1.0, lane,
                                       kLanes);
  });
}

// In place, into the output and the cache at once.
template <class C, int V>
void turn(bool adjacent) {
  constexpr int64_t d = 96, r = 64;
  alignas(64) static float x[d], angles[4][r / 2];
  alignas(64) static C cache[d];
  const rope::Row<float, C> row{x, x, cache, nullptr, 1.0f, d, {r / 2, adjacent}};
  on_lanes([&](int64_t lane) {
    for (int64_t u = lane; u < row.units(V); u += kLanes)
      rope::turn_unit<V>(row, u, 1.0f, angles[0], angles[1], angles[2], angles[3]);
  });
}

// The first use decides the instruction set: by whichever thread is first.
template <class E>
void multiply() {
  constexpr int64_t M = 50, N = 70, K = 45, kBlocks = (N + gemm::kColumns - 1) / gemm::kColumns;
  const int64_t lda = gemm::lda<E>(K), ldc = kBlocks * gemm::kColumns;
  std::vector<E> a(M * lda), b(N * K), packed(gemm::packed_elements<E>(N, K));
  std::vector<acc_t<E>> c(M * ldc);
  on_lanes([&](int64_t lane) {
    for (int64_t j = lane; j < kBlocks; j += kLanes) gemm::pack_b<E, E>(packed.data(), b.data(), N, K, K, 1, j, j + 1);
  });
  on_lanes([&](int64_t lane) {
    const int64_t first = M * lane / kLanes, rows = M * (lane + 1) / kLanes - first;
    for (int64_t j = 0; j < kBlocks; ++j)
      gemm::multiply<E>(&a[first * lda], lda, rows, K, gemm::packed_block<E>(packed.data(), K, j),
                        &c[first * ldc + j * gemm::kColumns], ldc, false);
  });
}

}  // namespace

int main() {
  multiply<float>();
  multiply<double>();
  if (gemm::has_bf16()) multiply<bf16>();
  merge();
  for (bool adjacent : {false, true}) {
    turn<float, 4>(adjacent);
    turn<int8_t, 4>(adjacent);
    turn<rope::f8e4m3, 1>(adjacent);
  }
  std::puts("races: no report");
}
