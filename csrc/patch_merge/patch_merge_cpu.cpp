// SPDX-License-Identifier: Apache-2.0
// Patch merging on CPU. A thread gathers the neighbours of a merged row into its cache, normalises them there and
// writes the row once. Backward: the same rows again, in blocks whose number depends on the shape alone; each block
// sums its share of the norm's gradients, and the shares are added in order.
#include <algorithm>
#include <string>

#include "../common/aten.h"
#include "patch_merge.h"

namespace mmkernels::patch_merge {
namespace {

constexpr int64_t kBlocks = 32;  // of merged rows, in the backward

#define MMK_NORMALISE(F, T)                                                                               \
  MMK_MULTIARCH void normalise(T* to, const F* x, int64_t n, NormKind norm, double eps, const F* w, const F* b) { \
    normalise_body(to, x, n, norm, eps, w, b);                                                            \
  }
MMK_NORMALISE(float, float)
MMK_NORMALISE(float, bf16)
MMK_NORMALISE(float, f16)
#undef MMK_NORMALISE
void normalise(double* to, const double* x, int64_t n, NormKind norm, double eps, const double* w, const double* b) {
  normalise_body(to, x, n, norm, eps, w, b);
}
MMK_MULTIARCH void through_norm(float* g, float* x, int64_t n, NormKind norm, double eps, const float* weight,
                                float* d_weight, float* d_bias) {
  backward_body(g, x, n, norm, eps, weight, d_weight, d_bias);
}
void through_norm(double* g, double* x, int64_t n, NormKind norm, double eps, const double* weight, double* d_weight,
                  double* d_bias) {
  backward_body(g, x, n, norm, eps, weight, d_weight, d_bias);
}

template <class F, class T>
MMK_INLINE void convert_body(F* __restrict to, const T* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
template <class F, class T>
MMK_INLINE void round_body(T* __restrict to, const F* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = Convert<T>::from(from[i]);
}
MMK_MULTIARCH void convert(float* to, const float* from, int64_t n) { convert_body(to, from, n); }
MMK_MULTIARCH void convert(float* to, const bf16* from, int64_t n) { convert_body(to, from, n); }
MMK_MULTIARCH void convert(float* to, const f16* from, int64_t n) { convert_body(to, from, n); }
void convert(double* to, const double* from, int64_t n) { convert_body(to, from, n); }
MMK_MULTIARCH void round_to(float* to, const float* from, int64_t n) { round_body(to, from, n); }
MMK_MULTIARCH void round_to(bf16* to, const float* from, int64_t n) { round_body(to, from, n); }
MMK_MULTIARCH void round_to(f16* to, const float* from, int64_t n) { round_body(to, from, n); }
void round_to(double* to, const double* from, int64_t n) { round_body(to, from, n); }

// [J, C] <-> [C, J]
template <class T>
void transpose(T* to, const T* from, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

NormKind norm_of(const std::string& name) {
  if (name == "none") return NormKind::none;
  if (name == "layer") return NormKind::layer;
  if (name == "rms") return NormKind::rms;
  fail("patch_merge: norm must be none, layer or rms, got ", name);
}

Shape shape_of(const Tensor& features, const OptionalTensor& index, const OptionalTensor& weight,
               const OptionalTensor& bias, int64_t group, const std::string& norm, bool after, bool channels_first,
               double eps) {
  if (features.dim() != 2 || group < 1) fail("patch_merge: features must be [N, C] and group at least 1");
  const int64_t N = features.size(0), C = features.size(1);
  if (index && (index->dim() != 2 || index->size(1) != group || index->scalar_type() != ScalarType::Long))
    fail("patch_merge: index must be int64 [M, ", group, "]");
  if (!index && N % group) fail("patch_merge: features must be a multiple of ", group, " rows, got ", N);
  const Shape s{N, C, group, index ? index->size(0) : N / group, norm_of(norm), after, channels_first, eps};
  for (const OptionalTensor* t : {&weight, &bias})
    if (*t && ((*t)->dim() != 1 || (*t)->size(0) != s.normed() || (*t)->scalar_type() != features.scalar_type()))
      fail("patch_merge: weight and bias of the norm must be [", s.normed(), "] in the dtype of features");
  return s;
}

// Every row once at most: then its gradient is one row's, and rows can be written in any order.
// Returns how many rows it names.
int64_t check(const Shape& s, const int64_t* index) {
  std::vector<char> taken(s.N, 0);
  int64_t count = 0;
  for (int64_t i = 0; i < s.M * s.J; ++i) {
    if (index[i] < -1 || index[i] >= s.N)
      fail("patch_merge: index must be -1 or a row of ", s.N, ", got ", index[i], " at ", i);
    if (index[i] < 0) continue;
    if (taken[index[i]]) fail("patch_merge: index must name every row at most once, got ", index[i], " again at ", i);
    taken[index[i]] = 1, ++count;
  }
  return count;
}

// A vector of the norm, or `otherwise` n times.
template <class T>
std::vector<acc_t<T>> widened(const OptionalTensor& t, int64_t n, acc_t<T> otherwise) {
  std::vector<acc_t<T>> found(n, otherwise);
  for (int64_t i = 0; t && i < n; ++i) found[i] = widen(data<T>(*t)[i]);
  return found;
}

template <class T>
class Merge {
  using F = acc_t<T>;

 public:
  Merge(const Shape& s, const Tensor& features, const OptionalTensor& index, const OptionalTensor& weight,
        const OptionalTensor& bias)
      : s_(s), x_(data<T>(features)), index_(index ? data<int64_t>(*index) : nullptr),
        weight_(widened<T>(weight, s.normed(), 1)), bias_(widened<T>(bias, s.normed(), 0)) {}

  void forward(T* out) const {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, s_.width()));
    torch::stable::parallel_for(0, s_.M, grain, [&](int64_t begin, int64_t end) {
      std::vector<F> row(s_.width()), turned(s_.width());
      std::vector<T> copy(s_.width());
      for (int64_t m = begin; m < end; ++m) {
        T* to = out + m * s_.width();
        if (s_.norm == NormKind::none) copy_row(to, copy.data(), m);
        else if (s_.after) norm_after(to, row.data(), turned.data(), m);
        else norm_before(to, row.data(), copy.data(), m);
      }
    });
  }

  void backward(const T* grad, T* d_features, T* d_weight, T* d_bias) const {
    const int64_t n = s_.normed(), rows = std::max<int64_t>(1, ceil_div(s_.M, kBlocks)), blocks = ceil_div(s_.M, rows);
    std::vector<F> sums_w(d_weight ? blocks * n : 0), sums_b(d_bias ? blocks * n : 0);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<F> g(s_.width()), x(s_.width()), turned(s_.width());
      for (int64_t b = begin; b < end; ++b)
        for (int64_t m = b * rows; m < min64((b + 1) * rows, s_.M); ++m)
          backward_row(grad + m * s_.width(), m, g.data(), x.data(), turned.data(), d_features,
                       d_weight ? sums_w.data() + b * n : nullptr, d_bias ? sums_b.data() + b * n : nullptr);
    });
    add_up(d_weight, sums_w, blocks, n);
    add_up(d_bias, sums_b, blocks, n);
  }

 private:
  int64_t source(int64_t m, int64_t j) const { return index_ ? index_[m * s_.J + j] : m * s_.J + j; }

  void copy_row(T* to, T* copy, int64_t m) const {
    T* rows = s_.channels_first ? copy : to;
    for (int64_t j = 0; j < s_.J; ++j) {
      const int64_t from = source(m, j);
      T* row = rows + j * s_.C;
      if (from < 0) std::fill(row, row + s_.C, Convert<T>::from(F(0)));
      else memcpy(static_cast<void*>(row), x_ + from * s_.C, s_.C * sizeof(T));
    }
    if (s_.channels_first) transpose(to, copy, s_.J, s_.C);
  }

  // Neighbour j of row m in F: in place, or widened into `scratch`.
  const F* neighbour(int64_t m, int64_t j, F* scratch) const {
    const int64_t from = source(m, j);
    if (from < 0) return std::fill(scratch, scratch + s_.C, F(0)), scratch;
    if constexpr (std::is_same_v<T, F>) return x_ + from * s_.C;
    return convert(scratch, x_ + from * s_.C, s_.C), scratch;
  }
  // The neighbours of row m, [J, C].
  void gather(F* rows, int64_t m) const {
    for (int64_t j = 0; j < s_.J; ++j) {
      F* to = rows + j * s_.C;
      const F* x = neighbour(m, j, to);
      if (x != to) memcpy(to, x, s_.C * sizeof(F));
    }
  }

  void norm_before(T* to, F* scratch, T* copy, int64_t m) const {
    T* rows = s_.channels_first ? copy : to;
    for (int64_t j = 0; j < s_.J; ++j) {
      T* row = rows + j * s_.C;
      if (source(m, j) < 0) std::fill(row, row + s_.C, Convert<T>::from(F(0)));
      else normalise(row, neighbour(m, j, scratch), s_.C, s_.norm, s_.eps, weight_.data(), bias_.data());
    }
    if (s_.channels_first) transpose(to, copy, s_.J, s_.C);
  }
  void norm_after(T* to, F* row, F* turned, int64_t m) const {
    gather(row, m);
    if (s_.channels_first) transpose(turned, row, s_.J, s_.C), row = turned;
    normalise(to, row, s_.width(), s_.norm, s_.eps, weight_.data(), bias_.data());
  }

  void backward_row(const T* grad, int64_t m, F* g, F* x, F* turned, T* d_features, F* d_weight, F* d_bias) const {
    if (s_.norm == NormKind::none && !s_.channels_first) return scatter(grad, m, d_features);
    convert(g, grad, s_.width());
    if (s_.norm != NormKind::none) gather(x, m);
    if (s_.after && s_.norm != NormKind::none) {
      if (s_.channels_first) transpose(turned, x, s_.J, s_.C), std::swap(x, turned);
      through_norm(g, x, s_.width(), s_.norm, s_.eps, weight_.data(), d_weight, d_bias);
    }
    if (s_.channels_first) transpose(turned, g, s_.C, s_.J), std::swap(g, turned);
    for (int64_t j = 0; j < s_.J; ++j) {
      const int64_t to = source(m, j);
      if (to < 0) continue;
      if (!s_.after && s_.norm != NormKind::none)
        through_norm(g + j * s_.C, x + j * s_.C, s_.C, s_.norm, s_.eps, weight_.data(), d_weight, d_bias);
      if (d_features) round_to(d_features + to * s_.C, g + j * s_.C, s_.C);
    }
  }

  void scatter(const T* grad, int64_t m, T* d_features) const {
    for (int64_t j = 0; d_features && j < s_.J; ++j)
      if (source(m, j) >= 0)
        memcpy(static_cast<void*>(d_features + source(m, j) * s_.C), grad + j * s_.C, s_.C * sizeof(T));
  }

  static void add_up(T* to, const std::vector<F>& sums, int64_t blocks, int64_t n) {
    for (int64_t i = 0; to && i < n; ++i) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += sums[b * n + i];
      to[i] = Convert<T>::from(static_cast<F>(sum));
    }
  }

  const Shape& s_;
  const T* x_;
  const int64_t* index_;
  std::vector<F> weight_, bias_;
};

Tensor forward(const Tensor& features_, const OptionalTensor& index_, const OptionalTensor& weight_,
               const OptionalTensor& bias_, int64_t group, std::string norm, bool after, bool channels_first, double eps) {
  const Shape s = shape_of(features_, index_, weight_, bias_, group, norm, after, channels_first, eps);
  const Tensor features = torch::stable::contiguous(features_);
  const OptionalTensor index = contiguous(index_), weight = contiguous(weight_), bias = contiguous(bias_);
  if (index) check(s, data<int64_t>(*index));
  const Tensor out = empty(features, {s.M, s.width()});
  if (out.numel())
    dispatch_float("patch_merge", features.scalar_type(), [&](auto* tag) {
      using T = pointee<decltype(tag)>;
      Merge<T>(s, features, index, weight, bias).forward(mutable_data<T>(out));
    });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& features_, const OptionalTensor& index_,
                                            const OptionalTensor& weight_, const OptionalTensor& bias_, int64_t group,
                                            std::string norm, bool after, bool channels_first, double eps,
                                            std::vector<bool> needs) {
  const Shape s = shape_of(features_, index_, weight_, bias_, group, norm, after, channels_first, eps);
  if (grad_.dim() != 2 || grad_.size(0) != s.M || grad_.size(1) != s.width() ||
      grad_.scalar_type() != features_.scalar_type() || needs.size() != 3)
    fail("patch_merge_backward: grad must be [", s.M, ", ", s.width(), "] in the dtype of features");
  const Tensor features = torch::stable::contiguous(features_), grad = torch::stable::contiguous(grad_);
  const OptionalTensor index = contiguous(index_), weight = contiguous(weight_), bias = contiguous(bias_);
  const bool covered = !index || check(s, data<int64_t>(*index)) == s.N;
  const auto zeros = [&](bool need, const Sizes& sizes) {
    return mmkernels::zeros(features, need ? sizes : Sizes{0});
  };
  const Tensor d_features = covered ? empty(features, needs[0] ? Sizes{s.N, s.C} : Sizes{0})
                                    : zeros(needs[0], {s.N, s.C});
  const Tensor d_weight = zeros(needs[1], {s.normed()}), d_bias = zeros(needs[2], {s.normed()});
  if (grad.numel())
    dispatch_float("patch_merge", features.scalar_type(), [&](auto* tag) {
      using T = pointee<decltype(tag)>;
      const auto at = [&](size_t i, const Tensor& t) { return needs[i] ? mutable_data<T>(t) : nullptr; };
      Merge<T>(s, features, index, weight, bias)
          .backward(data<T>(grad), at(0, d_features), at(1, d_weight), at(2, d_bias));
    });
  return {d_features, d_weight, d_bias};
}

}  // namespace
}  // namespace mmkernels::patch_merge

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("patch_merge", TORCH_BOX(&mmkernels::patch_merge::forward));
  m.impl("patch_merge_backward", TORCH_BOX(&mmkernels::patch_merge::backward));
}
