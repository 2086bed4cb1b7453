// SPDX-License-Identifier: Apache-2.0
// torch's current CUDA stream, looked up at run time: the same library loads where torch has no CUDA.
#pragma once
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "aten.h"

namespace mmkernels {

inline cudaStream_t current_stream(int32_t device) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!lookup) fail("mmkernels: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(lookup(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) fail(op, ": ", cudaGetErrorString(error));
}

}  // namespace mmkernels
