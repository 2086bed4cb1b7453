// SPDX-License-Identifier: Apache-2.0
// Rotary positions on CUDA: check shapes, allocate, launch on torch's current stream. Values are checked on the device.
#include "../common/cuda_stream.h"
#include "arguments.h"
#include "rope_cuda.h"

namespace mmkernels::rope {
namespace {

using torch::stable::accelerator::DeviceGuard;

Dtype dtype_of(const std::string& op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Double: return Dtype::kDouble;
    case ScalarType::BFloat16: return Dtype::kBfloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: fail(op, ": float64, float32, float16 and bfloat16 are supported, got another dtype");
  }
}

CacheDtype cache_dtype_of(const Tensor& cache, const Tensor& key, bool scaled) {
  const ScalarType dtype = cache.scalar_type();
  const bool needs = dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn;
  if (scaled != needs || (!needs && dtype != key.scalar_type()))
    fail("rope_write_kv: caches must be of the dtype of key, or int8 or float8_e4m3fn with scales");
  return !needs ? CacheDtype::kNoneOrSame : dtype == ScalarType::Char ? CacheDtype::kInt8 : CacheDtype::kFloat8;
}

// Whether every one of these element offsets and addresses allows accesses of `values` at once.
struct Alignment {
  int64_t values;
  bool holds = true;

  void elements(int64_t n) { holds = holds && n % values == 0; }
  void address(const void* p, int64_t element_size) {
    holds = holds && reinterpret_cast<uintptr_t>(p) % (values * element_size) == 0;
  }
  void heads(const Heads& h, int64_t element_size) {
    address(h.data, element_size), elements(h.stride_b), elements(h.stride_l), elements(h.stride_h);
  }
  void cache(const Cache& c, int64_t element_size) {
    address(c.data, element_size), elements(c.stride_page), elements(c.stride_offset), elements(c.stride_h);
  }
};

// All of a call but its outputs, caches and norms.
Args args_of(const std::string& op, const Tensor& query, const Tensor& key, const Tensor& positions,
             const Tensor& inv_freq, const OptionalTensor& axis, const std::string& pairing, double scaling) {
  if (pairing != "half" && pairing != "adjacent") fail(op, ": pairing must be half or adjacent, got ", pairing);
  const int64_t dims = query.dim(), last = positions.dim() - 1;
  Args a{};
  a.q = heads_of(query), a.k = heads_of(key);
  a.positions = data<int64_t>(positions);
  a.stride_a = positions.stride(0), a.stride_b = dims == 4 ? positions.stride(1) : 0, a.stride_l = positions.stride(last);
  a.A = positions.size(0), a.B = dims == 4 ? query.size(0) : 1, a.L = query.size(dims - 3);
  a.inv_freq = data<float>(inv_freq), a.axis = data<int64_t>(axis);
  a.pairs = {inv_freq.size(0) / 2, pairing == "adjacent"}, a.scaling = scaling, a.d = query.size(dims - 1);
  if (4 * a.pairs.count * 8 > 48 * 1024) fail(op, ": inv_freq must be at most 3072 channels on CUDA");
  return a;
}

Alignment alignment_of(const Args& a, int64_t element_size) {
  Alignment found{16 / element_size};
  found.elements(a.pairs.count), found.elements(a.d - 2 * a.pairs.count);
  found.heads(a.q, element_size), found.heads(a.k, element_size);
  found.address(a.q_out, element_size), found.address(a.k_out, element_size);
  return found;
}

std::tuple<Tensor, Tensor> rotate(const std::string& op, const Tensor& query_, const Tensor& key_,
                                  const Tensor& positions, const Tensor& inv_freq_, const OptionalTensor& axis_,
                                  const std::string& pairing, double scaling, bool transposed) {
  const DeviceGuard guard(query_.get_device_index());
  check(op, query_, key_, positions, inv_freq_, axis_, 4);
  const Tensor query = readable(query_), key = readable(key_), inv_freq = torch::stable::contiguous(inv_freq_);
  const OptionalTensor axis = contiguous(axis_);
  Args a = args_of(op, query, key, positions, inv_freq, axis, pairing, scaling);
  Tensor q_out = empty(query, {a.B, a.L, a.q.heads, a.d}), k_out = empty(query, {a.B, a.L, a.k.heads, a.d});
  a.q_out = q_out.data_ptr(), a.k_out = k_out.data_ptr(), a.transposed = transposed;
  a.packed = alignment_of(a, query.element_size()).holds;
  if (a.B * a.L > 0 && a.d > 0)
    check_cuda(op.c_str(), launch(a, dtype_of(op, query), CacheDtype::kNoneOrSame,
                                  current_stream(query.get_device_index())));
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> mrope(const Tensor& query, const Tensor& key, const Tensor& positions,
                                 const Tensor& inv_freq, const OptionalTensor& axis, std::string pairing,
                                 double scaling) {
  return rotate("mrope", query, key, positions, inv_freq, axis, pairing, scaling, false);
}
std::tuple<Tensor, Tensor> mrope_backward(const Tensor& query, const Tensor& key, const Tensor& positions,
                                          const Tensor& inv_freq, const OptionalTensor& axis, std::string pairing,
                                          double scaling) {
  return rotate("mrope_backward", query, key, positions, inv_freq, axis, pairing, scaling, true);
}

std::tuple<Tensor, Tensor> rope_write_kv(
    const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& slot_mapping, const Tensor& positions, const Tensor& inv_freq_, const OptionalTensor& axis_,
    std::string pairing, double scaling, const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps,
    const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const char* op = "rope_write_kv";
  const DeviceGuard guard(query_.get_device_index());
  check(op, query_, key_, positions, inv_freq_, axis_, 3);
  check_written(query_, key_, value_, slot_mapping, q_norm, k_norm, k_scale, v_scale);
  const Tensor query = readable(query_), key = readable(key_), value = readable(value_);
  const Tensor inv_freq = torch::stable::contiguous(inv_freq_), slots = torch::stable::contiguous(slot_mapping);
  const OptionalTensor axis = contiguous(axis_), q_weight = contiguous(q_norm), k_weight = contiguous(k_norm);
  const OptionalTensor k_by = contiguous(k_scale), v_by = contiguous(v_scale);
  Args a = args_of(op, query, key, positions, inv_freq, axis, pairing, scaling);
  a.v = heads_of(value);
  a.keys = cache_of("key_cache", key_cache, key_, key_cache);
  a.values = cache_of("value_cache", value_cache, key_, key_cache);
  const CacheDtype cache = cache_dtype_of(key_cache, key, k_scale.has_value());
  a.slots = slots.data_ptr(), a.slots_are_int64 = slots.scalar_type() == ScalarType::Long;
  a.q_weight = q_weight ? q_weight->data_ptr() : nullptr, a.k_weight = k_weight ? k_weight->data_ptr() : nullptr;
  a.k_scale = data<float>(k_by), a.v_scale = data<float>(v_by), a.eps = eps;
  Tensor q_out = empty(query, {a.L, a.q.heads, a.d}), k_out = empty(query, {a.L, a.k.heads, a.d});
  a.q_out = q_out.data_ptr(), a.k_out = k_out.data_ptr();
  Alignment alignment = alignment_of(a, query.element_size());
  alignment.heads(a.v, query.element_size());
  for (const void* weight : {a.q_weight, a.k_weight}) alignment.address(weight, query.element_size());
  for (const Cache* c : {&a.keys, &a.values}) alignment.cache(*c, key_cache.element_size());
  a.packed = alignment.holds;
  if (a.L > 0 && a.d > 0)
    check_cuda(op, launch(a, dtype_of(op, query), cache, current_stream(query.get_device_index())));
  return {q_out, k_out};
}

std::vector<int64_t> poll(int64_t device) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  std::vector<int64_t> found(4, 0);
  check_cuda("rope", take_error(found.data(), current_stream(static_cast<int32_t>(device))));
  return found;
}

}  // namespace
}  // namespace mmkernels::rope

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, m) {
  m.impl("mrope", TORCH_BOX(&mmkernels::rope::mrope));
  m.impl("mrope_backward", TORCH_BOX(&mmkernels::rope::mrope_backward));
  m.impl("rope_write_kv", TORCH_BOX(&mmkernels::rope::rope_write_kv));
}

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) { m.def("rope_poll(int device) -> int[]"); }
STABLE_TORCH_LIBRARY_IMPL(mmkernels, CompositeExplicitAutograd, m) {
  m.impl("rope_poll", TORCH_BOX(&mmkernels::rope::poll));
}
