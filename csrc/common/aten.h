// SPDX-License-Identifier: Apache-2.0
// torch through its stable ABI: dtype dispatch, pointers, and the few ATen calls our kernels build on.
//
// Worker threads do not inherit inference mode: there, ATen only allocates scratch and multiplies through views
// (below). An error inside such a call loses its message at this ABI target, so arguments are checked before.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "numeric.h"

namespace mmkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// The message is the whole what(): one line that names op, argument, got and expected.
template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  ((text << args), ...);
  throw std::runtime_error(text.str());
}

// What a kernel must know of a tensor before it reads through its pointer.
inline bool is_a(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype; }
inline bool is_a(const Tensor& t, ScalarType dtype, const Sizes& sizes) {
  bool same = is_a(t, dtype) && t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(static_cast<int64_t>(i)) == sizes[i];
  return same;
}

template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }
template <class T> const T* data(const OptionalTensor& t) { return t ? data<T>(*t) : nullptr; }
template <class T> T* mutable_data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

// Memory of many megabytes is new from the system each time, and a fault for every 4 kB takes longer than writing it.
// Linux gives 2 MB at once to who asks, where it is set to `madvise` (most distributions).
inline void ask_for_huge_pages(void* p, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20, kLeast = 4 * kHuge;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (bytes >= static_cast<int64_t>(kLeast)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A block of malloc's, 64 bytes behind its beginning at least and aligned to a cache line; the beginning lies before it.
inline void* aligned_block(int64_t bytes) {
  constexpr uintptr_t kLine = 64;
  void* const block = std::malloc(static_cast<size_t>(bytes) + 2 * kLine);
  if (!block) throw std::bad_alloc();
  void** const from = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(block) + 2 * kLine - 1) & ~(kLine - 1));
  from[-1] = block;
  return from;
}
inline void free_block(void* p) { std::free(static_cast<void**>(p)[-1]); }

inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: case ScalarType::Long: return 8;
    case ScalarType::Float: case ScalarType::Int: return 4;
    case ScalarType::Half: case ScalarType::BFloat16: return 2;
    default: return 1;
  }
}

// Blocks of megabytes on CPU come from malloc: torch's allocator calls posix_memalign, which in glibc before 2.38 may
// never take a freed one again (bug 14581): then every call grows the process, or maps and faults its output anew.
inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  constexpr int64_t kOwn = 1 << 20;
  Sizes strides(sizes.size());
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  const int64_t bytes = count * bytes_of(dtype);
  if (!like.is_cpu() || bytes < kOwn) return torch::stable::new_empty(like, sizes, dtype);
  void* const block = aligned_block(bytes);
  ask_for_huge_pages(block, bytes);
  return torch::stable::from_blob(block, sizes, strides, like.device(), dtype, &free_block);
}
inline Tensor empty(const Tensor& like, const Sizes& sizes) { return empty(like, sizes, like.scalar_type()); }
inline Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  const Tensor made = empty(like, sizes, dtype);
  char* const first = mutable_data<char>(made);
  const int64_t bytes = made.numel() * bytes_of(dtype), part = 1 << 20;
  torch::stable::parallel_for(0, bytes, part, [&](int64_t begin, int64_t end) { memset(first + begin, 0, end - begin); });
  return made;
}
inline Tensor zeros(const Tensor& like, const Sizes& sizes) { return zeros(like, sizes, like.scalar_type()); }
inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

template <class T> StableIValue boxed(const T& value) { return torch::stable::detail::from(value); }

// A tensor over memory owned elsewhere. GEMMs below run in worker threads, which know neither inference
// mode nor "below autograd"; through such a view they may write where the caller may.
inline Tensor blob(const void* p, const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(p), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU, 0), dtype);
}
inline Tensor rows_blob(const void* p, int64_t rows, int64_t cols, ScalarType dtype) {
  return blob(p, {rows, cols}, {cols, 1}, dtype);
}

// While it lives, MKL (torch's GEMM on Intel) plans for one thread on this one: inside a worker it uses no more
// anyway, but how it sums follows the number it could have had. Absent from a torch without MKL.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int);
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;

 private:
  int before_;
};

// Runs f(i, scratch) for i in [0, count), each wholly in one thread. A GEMM inside stays in that thread,
// so its bits do not depend on the number of threads, as they would if the GEMM itself were split.
// Never fewer than two items: a single one would run outside a parallel region, with all threads.
template <class MakeScratch, class F>
void for_each_block(int64_t count, const MakeScratch& make_scratch, const F& f) {
  const int64_t items = count < 2 ? 2 : count;
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    if (begin >= count) return;
    const OneThread one;
    auto scratch = make_scratch();
    for (int64_t i = begin; i < (end < count ? end : count); ++i) f(i, scratch);
  });
}

// out = a · b, of matrices ("aten::mm") or batches of them ("aten::bmm")
inline void matmul_out(const char* op, const Tensor& a, const Tensor& b, const Tensor& out) {
  StableIValue stack[3] = {boxed(a), boxed(b), boxed(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}
// A sum over very many k is one of parts: where torch's GEMM adds up one value after the other (MKL, few rows) its
// error would grow with all of them. Widths of real models stay below and go to torch whole.
constexpr int64_t kLongSum = 4096, kPartLength = 512;

template <class F>
void mm_in_parts(const Tensor& a, const Tensor& b, const Tensor& out) {
  const int64_t M = out.size(0), N = out.size(1), K = a.size(1);
  std::vector<F> part(M * N);
  for (int64_t k = 0; k < K; k += kPartLength) {
    const int64_t length = min64(kPartLength, K - k);
    const Tensor of_a = blob(data<F>(a) + k * a.stride(1), {M, length}, {a.stride(0), a.stride(1)}, a.scalar_type());
    const Tensor of_b = blob(data<F>(b) + k * b.stride(0), {length, N}, {b.stride(0), b.stride(1)}, a.scalar_type());
    matmul_out("aten::mm", of_a, of_b, rows_blob(part.data(), M, N, a.scalar_type()));
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        F& sum = mutable_data<F>(out)[m * out.stride(0) + n * out.stride(1)];
        sum = k == 0 ? part[m * N + n] : sum + part[m * N + n];
      }
  }
}
// Of float or double.
inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (a.size(1) <= kLongSum) matmul_out("aten::mm", a, b, out);
  else if (a.scalar_type() == ScalarType::Double) mm_in_parts<double>(a, b, out);
  else mm_in_parts<float>(a, b, out);
}
inline void bmm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (a.size(2) <= kLongSum) return matmul_out("aten::bmm", a, b, out);
  const auto entry = [](const Tensor& t, int64_t i) {
    return blob(data<char>(t) + i * t.stride(0) * t.element_size(), {t.size(1), t.size(2)}, {t.stride(1), t.stride(2)},
                t.scalar_type());
  };
  for (int64_t i = 0; i < out.size(0); ++i) mm_out(entry(a, i), entry(b, i), entry(out, i));
}

// out [M, N] (contiguous) = a · b, a given as pointer and strides so that aᵀ is one too; fixed blocks of rows.
inline void mm_blocked(const void* a, int64_t M, int64_t K, int64_t row_stride, int64_t col_stride,
                       const Tensor& b, void* out, ScalarType dtype, int64_t element_size) {
  constexpr int64_t kBlock = 128;
  const int64_t N = b.size(1);
  for_each_block(ceil_div(M, kBlock), [] { return 0; }, [&](int64_t i, int) {
    const int64_t first = i * kBlock, rows = min64(kBlock, M - first);
    const char* from = static_cast<const char*>(a) + first * row_stride * element_size;
    char* to = static_cast<char*>(out) + first * N * element_size;
    mm_out(blob(from, {rows, K}, {row_stride, col_stride}, dtype),
           blob(b.data_ptr(), {K, N}, {b.stride(0), b.stride(1)}, dtype), rows_blob(to, rows, N, dtype));
  });
}

// Contiguous and aligned to a cache line, where a GEMM always takes the same path.
inline Tensor aligned(const Tensor& t) {
  const Tensor c = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(c.data_ptr()) % 64 == 0 ? c : torch::stable::clone(c);
}

// Calls f with a null pointer of the C++ type of `dtype`: for (auto* tag) { using T = ...*tag; }
template <class F>
void dispatch_float(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: f(static_cast<float*>(nullptr)); return;
    case ScalarType::Double: f(static_cast<double*>(nullptr)); return;
    case ScalarType::BFloat16: f(static_cast<bf16*>(nullptr)); return;
    case ScalarType::Half: f(static_cast<f16*>(nullptr)); return;
    default: fail(op, ": float64, float32, float16 and bfloat16 are supported, got another dtype");
  }
}
template <class P> using pointee = std::remove_pointer_t<P>;

}  // namespace mmkernels
