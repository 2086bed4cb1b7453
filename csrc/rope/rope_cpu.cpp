// SPDX-License-Identifier: Apache-2.0
// Rotary positions on CPU, with and without a paged cache. A thread takes whole tokens: cos and sin once for all heads,
// then each head is read, normed, turned, rounded and written, to the cache from the same core's registers or L1.
// Slots and axes are checked before the first write.
#include <algorithm>
#include <string>

#include "../common/aten.h"
#include "../common/sum.h"
#include "arguments.h"

namespace mmkernels::rope {
namespace {

// A token's cos and sin by pair, of its first and its second channel.
template <class F> struct Rotation {
  Pairs pairs;
  const F *cos_a, *sin_a, *cos_b, *sin_b;
};

template <class F, class Load, class Store>
MMK_INLINE void turn_pairs(const Rotation<F>& t, const Load& load, const Store& store) {
  const F *__restrict ca = t.cos_a, *__restrict sa = t.sin_a, *__restrict cb = t.cos_b, *__restrict sb = t.sin_b;
  const int64_t n = t.pairs.count;
  if (t.pairs.adjacent) {
#pragma GCC ivdep  // nothing overlaps, but so many pointers are more than compilers check
    for (int64_t i = 0; i < n; ++i) {
      const Pair<F> p = turned(load(2 * i), load(2 * i + 1), ca[i], sa[i], cb[i], sb[i]);
      store(2 * i, p.a), store(2 * i + 1, p.b);
    }
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const Pair<F> p = turned(load(i), load(i + n), ca[i], sa[i], cb[i], sb[i]);
      store(i, p.a), store(i + n, p.b);
    }
  }
}

// The pairs, and the channels beyond them as they are.
template <class F, class Load, class Store>
MMK_INLINE void turn_all(const Rotation<F>& t, int64_t d, const Load& load, const Store& store) {
  turn_pairs<F>(t, load, store);
  for (int64_t c = 2 * t.pairs.count; c < d; ++c) store(c, load(c));
}

// One head as it is: read, turned, rounded, written.
template <class T, class F = acc_t<T>>
MMK_INLINE void head_body(T* __restrict out, const T* __restrict in, int64_t d, const Rotation<F>& t) {
  turn_pairs<F>(t, [=](int64_t c) { return widen(in[c]); }, [=](int64_t c, F x) { out[c] = Convert<T>::from(x); });
  for (int64_t c = 2 * t.pairs.count; c < d; ++c) out[c] = in[c];
}

// One head that is normed (with a weight) or wanted unrounded too (in y, if there is one).
template <class T, class F = acc_t<T>>
MMK_INLINE void wide_head_body(T* __restrict out, F* __restrict y, F* __restrict x, const T* __restrict in, int64_t d,
                               const Rotation<F>& t, const F* __restrict weight, double eps) {
  for (int64_t c = 0; c < d; ++c) x[c] = widen(in[c]);
  const F r = weight ? 1 / std::sqrt(static_cast<F>(sum_of<F>(d, Product<F>{x, x}) / d + eps)) : F(1);
  const auto normed = [=](int64_t c) { return x[c] * r * weight[c]; };
  const auto both = [=](int64_t c, F value) { y[c] = value, out[c] = Convert<T>::from(value); };
  if (y && weight) turn_all(t, d, normed, both);
  else if (y) turn_all(t, d, [=](int64_t c) { return x[c]; }, both);
  else turn_all(t, d, normed, [=](int64_t c, F value) { out[c] = Convert<T>::from(value); });
}

template <class T, class F = acc_t<T>>
MMK_INLINE void widen_body(F* __restrict x, const T* __restrict in, int64_t d) {
  for (int64_t c = 0; c < d; ++c) x[c] = widen(in[c]);
}

template <class C, class F>
MMK_INLINE void store_body(C* __restrict to, const F* __restrict x, int64_t d) {
  for (int64_t c = 0; c < d; ++c) to[c] = Stored<C>::from(x[c]);
}
template <class C, class F>
MMK_INLINE void quantise_body(C* __restrict to, const F* __restrict x, int64_t d, float scale) {
  for (int64_t c = 0; c < d; ++c) to[c] = Stored<C>::from(static_cast<float>(x[c]) / scale);
}

MMK_INLINE void rotation_body(float* __restrict cos, float* __restrict sin, const float* __restrict angle, int64_t n,
                              double scale, double sign) {
  for (int64_t i = 0; i < n; ++i) {
    const CosSin t = cos_sin(angle[i]);
    cos[i] = static_cast<float>(t.cos * scale), sin[i] = static_cast<float>(t.sin * sign * scale);
  }
}

#define MMK_HEADS(MULTIARCH, T)                                                                                      \
  MULTIARCH void head(T* out, const T* in, int64_t d, const Rotation<acc_t<T>>& t) { head_body(out, in, d, t); }     \
  MULTIARCH void wide_head(T* out, acc_t<T>* y, acc_t<T>* x, const T* in, int64_t d, const Rotation<acc_t<T>>& t,    \
                           const acc_t<T>* weight, double eps) {                                                     \
    wide_head_body(out, y, x, in, d, t, weight, eps);                                                                \
  }                                                                                                                  \
  MULTIARCH void widen_row(acc_t<T>* x, const T* in, int64_t d) { widen_body(x, in, d); }
#define MMK_STORES(MULTIARCH, F)                                                                                     \
  MULTIARCH void store(float* to, const F* x, int64_t d, float) { store_body(to, x, d); }                            \
  MULTIARCH void store(bf16* to, const F* x, int64_t d, float) { store_body(to, x, d); }                             \
  MULTIARCH void store(f16* to, const F* x, int64_t d, float) { store_body(to, x, d); }                              \
  MULTIARCH void store(int8_t* to, const F* x, int64_t d, float scale) { quantise_body(to, x, d, scale); }           \
  MULTIARCH void store(f8e4m3* to, const F* x, int64_t d, float scale) { quantise_body(to, x, d, scale); }
MMK_HEADS(MMK_MULTIARCH, float)
MMK_HEADS(MMK_MULTIARCH, bf16)
MMK_HEADS(MMK_MULTIARCH, f16)
MMK_HEADS(, double)
MMK_STORES(MMK_MULTIARCH, float)
MMK_STORES(, double)
void store(double* to, const float* x, int64_t d, float) { store_body(to, x, d); }
MMK_MULTIARCH void rotation_of(float* cos, float* sin, const float* angle, int64_t n, double scale, double sign) {
  rotation_body(cos, sin, angle, n, scale, sign);
}

// Of angles too far for cos_sin, and in fp64: libm's.
template <class F>
void rotation_by_libm(F* cos, F* sin, const float* angle, int64_t n, double scale, double sign) {
  for (int64_t i = 0; i < n; ++i) {
    cos[i] = static_cast<F>(std::cos(static_cast<double>(angle[i])) * scale);
    sin[i] = static_cast<F>(std::sin(static_cast<double>(angle[i])) * sign * scale);
  }
}
void rotation_of(double* cos, double* sin, const float* angle, int64_t n, double scale, double sign) {
  rotation_by_libm(cos, sin, angle, n, scale, sign);
}

// Which angle each pair turns by, from the call's table; `transposed` for the gradient.
class Table {
 public:
  Table(const std::string& op, const Tensor& positions, const Tensor& inv_freq, const OptionalTensor& axis,
        const std::string& pairing, double scaling, bool transposed)
      : positions_(data<int64_t>(positions)), strides_{positions.stride(0), positions.dim() == 3 ? positions.stride(1) : 0,
                                                          positions.stride(positions.dim() - 1)},
        A_(positions.size(0)), scaling_(scaling), transposed_(transposed) {
    if (pairing != "half" && pairing != "adjacent") fail(op, ": pairing must be half or adjacent, got ", pairing);
    const int64_t r = inv_freq.size(0);
    pairs_ = {r / 2, pairing == "adjacent"};
    const Tensor freq = torch::stable::contiguous(inv_freq);
    const OptionalTensor rows = contiguous(axis);
    const float* f = data<float>(freq);
    const int64_t* row = data<int64_t>(rows);
    for (int64_t c = 0; row && c < r; ++c)
      if (row[c] < 0 || row[c] >= A_)
        fail(op, ": axis[", c, "] is ", row[c], ", expected a row of position_ids in [0, ", A_, ")");
    for (int side = 0; side < 2; ++side) {
      freq_[side].resize(pairs_.count), axis_[side].resize(pairs_.count);
      for (int64_t i = 0; i < pairs_.count; ++i) {
        const int64_t c = side ? pairs_.second(i) : pairs_.first(i);
        freq_[side][i] = f[c], axis_[side][i] = row ? static_cast<int32_t>(row[c]) : 0;
      }
    }
    twins_ = freq_[0] == freq_[1] && axis_[0] == axis_[1];
  }

  // cos and sin of a token, in the memory of scratch.
  template <class F> Rotation<F> of(int64_t b, int64_t l, std::vector<F>& scratch, std::vector<float>& angles) const {
    const int64_t n = pairs_.count;
    scratch.resize(4 * n), angles.resize(n + A_);
    F* p = scratch.data();
    if (twins_) {
      fill(0, b, l, p, p + n, angles.data());
      return {pairs_, p, p + n, p, p + n};
    }
    // The transpose turns b back by the angle of a, and a by that of b.
    fill(0, b, l, p, transposed_ ? p + 3 * n : p + n, angles.data());
    fill(1, b, l, p + 2 * n, transposed_ ? p + n : p + 3 * n, angles.data());
    return {pairs_, p, p + n, p + 2 * n, p + 3 * n};
  }

 private:
  template <class F> void fill(int side, int64_t b, int64_t l, F* cos, F* sin, float* angle) const {
    const int64_t n = pairs_.count;
    float* at = angle + n;  // the token's position on each axis
    for (int64_t a = 0; a < A_; ++a)
      at[a] = static_cast<float>(positions_[a * strides_[0] + b * strides_[1] + l * strides_[2]]);
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      angle[i] = at[axis_[side][i]] * freq_[side][i];
      largest = std::max(largest, std::fabs(angle[i]));
    }
    const double sign = transposed_ ? -1 : 1;
    if (largest < kLargestAngle) rotation_of(cos, sin, angle, n, scaling_, sign);
    else rotation_by_libm(cos, sin, angle, n, scaling_, sign);
  }

  const int64_t* positions_;
  int64_t strides_[3];  // of axes, batch, tokens
  int64_t A_;
  double scaling_;
  bool transposed_, twins_ = false;
  Pairs pairs_{};
  std::vector<float> freq_[2];
  std::vector<int32_t> axis_[2];
};

int64_t grain(int64_t row) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row)); }

template <class T>
void turn_heads(T* out, const Heads& from, int64_t b, int64_t l, int64_t d, const Rotation<acc_t<T>>& t) {
  for (int64_t h = 0; h < from.heads; ++h) head(out + h * d, static_cast<const T*>(from.data) + from.row(b, l, h), d, t);
}

std::tuple<Tensor, Tensor> rotate(const std::string& op, const Tensor& query_, const Tensor& key_,
                                  const Tensor& positions, const Tensor& inv_freq, const OptionalTensor& axis,
                                  const std::string& pairing, double scaling, bool transposed) {
  check(op, query_, key_, positions, inv_freq, axis, 4);
  const Table table(op, positions, inv_freq, axis, pairing, scaling, transposed);
  const Tensor query = readable(query_), key = readable(key_);
  const int64_t B = query.size(0), L = query.size(1), d = query.size(3);
  const Heads q = heads_of(query), k = heads_of(key);
  Tensor q_out = empty(query, {B, L, q.heads, d}), k_out = empty(query, {B, L, k.heads, d});
  dispatch_float(op.c_str(), query.scalar_type(), [&](auto* tag) {
    using T = pointee<decltype(tag)>;
    T *to_q = mutable_data<T>(q_out), *to_k = mutable_data<T>(k_out);
    torch::stable::parallel_for(0, B * L, grain((q.heads + k.heads) * d), [&](int64_t begin, int64_t end) {
      std::vector<acc_t<T>> scratch;
      std::vector<float> angles;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / L, l = i % L;
        const auto t = table.of(b, l, scratch, angles);
        turn_heads(to_q + i * q.heads * d, q, b, l, d, t);
        turn_heads(to_k + i * k.heads * d, k, b, l, d, t);
      }
    });
  });
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

// Of int64 or int32, whatever the strides.
std::vector<int64_t> numbers_of(const Tensor& t) {
  const Tensor flat = torch::stable::contiguous(t);
  std::vector<int64_t> found(t.numel());
  if (t.scalar_type() == ScalarType::Long) std::copy_n(data<int64_t>(flat), found.size(), found.begin());
  else std::copy_n(data<int32_t>(flat), found.size(), found.begin());
  return found;
}

// -1 or a slot, and no slot twice: an open-addressed set of twice the tokens, as the cache may be far larger.
void check_slots(const std::vector<int64_t>& slots, int64_t count) {
  const int64_t T = static_cast<int64_t>(slots.size());
  for (int64_t t = 0; t < T; ++t)
    if (slots[t] < -1 || slots[t] >= count)
      fail("rope_write_kv: slot_mapping[", t, "] is ", slots[t], ", expected a slot in [0, ", count, ") or -1 (skipped)");
  int64_t places = 2;
  while (places < 2 * T) places *= 2;
  std::vector<int64_t> taken(places, -1);  // tokens
  for (int64_t t = 0; t < T; ++t) {
    if (slots[t] < 0) continue;
    int64_t at = static_cast<int64_t>(static_cast<uint64_t>(slots[t]) * 0x9e3779b97f4a7c15u >> 32) & (places - 1);
    for (; taken[at] >= 0; at = (at + 1) & (places - 1))
      if (slots[taken[at]] == slots[t])
        fail("rope_write_kv: slot_mapping[", t, "] is ", slots[t], ", expected a slot of its own (slot_mapping[",
             taken[at], "] has it)");
    taken[at] = t;
  }
}

// Calls f with a null pointer of what the caches hold.
template <class F>
void dispatch_cache(const Tensor& cache, bool scaled, const F& f) {
  const ScalarType dtype = cache.scalar_type();
  const bool needs = dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn;
  if (scaled != needs) fail("rope_write_kv: caches must be int8 or float8_e4m3fn with scales, floats without");
  if (dtype == ScalarType::Char) f(static_cast<int8_t*>(nullptr));
  else if (needs) f(static_cast<f8e4m3*>(nullptr));
  else dispatch_float("rope_write_kv", dtype, f);
}

template <class T>
std::vector<acc_t<T>> weights_of(const OptionalTensor& t, int64_t d) {
  if (!t) return {};
  const Tensor flat = torch::stable::contiguous(*t);
  std::vector<acc_t<T>> found(d);
  for (int64_t c = 0; c < d; ++c) found[c] = widen(data<T>(flat)[c]);
  return found;
}

std::vector<float> scales_of(const OptionalTensor& t, int64_t heads) {
  if (!t) return std::vector<float>(heads, 1.0f);
  const Tensor flat = torch::stable::contiguous(*t);
  return {data<float>(flat), data<float>(flat) + heads};
}

// Query, key and value of a call in T; key and value go to caches of C.
template <class T, class C> struct Write {
  using F = acc_t<T>;
  Heads q, k, v;
  T *q_out, *k_out;
  Cache keys, values;
  std::vector<F> q_weight, k_weight;  // empty: no norm
  std::vector<float> k_scale, v_scale;
  double eps;
  int64_t d;

  static const T* row(const Heads& from, int64_t t, int64_t h) {
    return static_cast<const T*>(from.data) + from.row(0, t, h);
  }
  static C* place(const Cache& cache, int64_t slot, int64_t h) {
    return static_cast<C*>(cache.data) + cache.row(slot, h);
  }

  void token(int64_t t, int64_t slot, const Rotation<F>& rotation, F* x) const {
    for (int64_t h = 0; h < q.heads; ++h) {
      T* out = q_out + (t * q.heads + h) * d;
      if (q_weight.empty()) head(out, row(q, t, h), d, rotation);
      else wide_head(out, static_cast<F*>(nullptr), x + d, row(q, t, h), d, rotation, q_weight.data(), eps);
    }
    F* const unrounded = std::is_same_v<T, C> ? nullptr : x;  // else the cache holds the bits of the output
    for (int64_t h = 0; h < k.heads; ++h) {
      T* out = k_out + (t * k.heads + h) * d;
      const F* weight = k_weight.empty() ? nullptr : k_weight.data();
      if (!weight && !unrounded) head(out, row(k, t, h), d, rotation);
      else wide_head(out, unrounded, x + d, row(k, t, h), d, rotation, weight, eps);
      if (slot < 0) continue;
      C* to = place(keys, slot, h);
      if constexpr (std::is_same_v<T, C>) memcpy(static_cast<void*>(to), out, d * sizeof(T));
      else store(to, x, d, k_scale[h]);
    }
    for (int64_t h = 0; slot >= 0 && h < v.heads; ++h) {
      C* to = place(values, slot, h);
      if constexpr (std::is_same_v<T, C>) memcpy(static_cast<void*>(to), row(v, t, h), d * sizeof(T));
      else widen_row(x, row(v, t, h), d), store(to, x, d, v_scale[h]);
    }
  }

  void all(const Table& table, const std::vector<int64_t>& slots) const {
    const int64_t T_ = static_cast<int64_t>(slots.size());
    torch::stable::parallel_for(0, T_, grain((q.heads + 2 * k.heads) * d), [&](int64_t begin, int64_t end) {
      std::vector<F> scratch, x(2 * d);
      std::vector<float> angles;
      for (int64_t t = begin; t < end; ++t) token(t, slots[t], table.of(0, t, scratch, angles), x.data());
    });
  }
};

std::tuple<Tensor, Tensor> rope_write_kv(
    const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& slot_mapping, const Tensor& positions, const Tensor& inv_freq, const OptionalTensor& axis,
    std::string pairing, double scaling, const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps,
    const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  check("rope_write_kv", query_, key_, positions, inv_freq, axis, 3);
  check_written(query_, key_, value_, slot_mapping, q_norm, k_norm, k_scale, v_scale);
  const Cache keys = cache_of("key_cache", key_cache, key_, key_cache);
  const Cache values = cache_of("value_cache", value_cache, key_, key_cache);
  const Table table("rope_write_kv", positions, inv_freq, axis, pairing, scaling, false);
  const std::vector<int64_t> slots = numbers_of(slot_mapping);
  check_slots(slots, keys.slots);
  const Tensor query = readable(query_), key = readable(key_), value = readable(value_);
  const int64_t T_ = query.size(0), d = query.size(2);
  const Heads q = heads_of(query), k = heads_of(key), v = heads_of(value);
  Tensor q_out = empty(query, {T_, q.heads, d}), k_out = empty(query, {T_, k.heads, d});
  dispatch_float("rope_write_kv", query.scalar_type(), [&](auto* t) {
    using T = pointee<decltype(t)>;
    dispatch_cache(key_cache, k_scale.has_value(), [&](auto* c) {
      const Write<T, pointee<decltype(c)>> write{
          q, k, v, mutable_data<T>(q_out), mutable_data<T>(k_out), keys, values, weights_of<T>(q_norm, d),
          weights_of<T>(k_norm, d), scales_of(k_scale, k.heads), scales_of(v_scale, k.heads), eps, d};
      write.all(table, slots);
    });
  });
  return {q_out, k_out};
}

}  // namespace
}  // namespace mmkernels::rope

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("rope_write_kv", TORCH_BOX(&mmkernels::rope::rope_write_kv));
  m.impl("mrope", TORCH_BOX(&mmkernels::rope::mrope));
  m.impl("mrope_backward", TORCH_BOX(&mmkernels::rope::mrope_backward));
}
