// SPDX-License-Identifier: Apache-2.0
// torch through its stable ABI: dtype dispatch, pointers, and the few ATen calls our kernels build on.
//
// ATen is called from the calling thread only: worker threads do not inherit inference mode. An error
// inside such a call loses its message at this ABI target, so arguments are checked before.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }
template <class T> const T* data(const OptionalTensor& t) { return t ? data<T>(*t) : nullptr; }
template <class T> T* mutable_data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}
inline Tensor empty(const Tensor& like, const Sizes& sizes) {
  return torch::stable::new_empty(like, sizes, like.scalar_type());
}
inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

template <class T> StableIValue boxed(const T& value) { return torch::stable::detail::from(value); }

// out = input · weightᵀ + bias
inline void linear_out(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       const Tensor& out) {
  StableIValue stack[4] = {boxed(input), boxed(weight), boxed(bias), boxed(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = a · b, of matrices ("aten::mm") or batches of them ("aten::bmm")
inline void matmul_out(const char* op, const Tensor& a, const Tensor& b, const Tensor& out) {
  StableIValue stack[3] = {boxed(a), boxed(b), boxed(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}
inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  matmul_out("aten::mm", a, b, out);
}
inline void bmm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  matmul_out("aten::bmm", a, b, out);
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
