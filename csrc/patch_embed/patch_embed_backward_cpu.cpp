// SPDX-License-Identifier: Apache-2.0
// Patch embedding on CPU, backward. Panels of patches of a fixed size follow each other: each is packed once, then
// every thread adds the panel's share to columns of its own of all gradients that are sums. So nothing is larger
// than a panel and the gradients themselves, the gradient of the tokens is read once, and no bit depends on the
// number of threads. Gradients of pixels take panels of their own.
#include <algorithm>

#include "fold.h"
#include "planes.h"

namespace mmkernels::patch_embed {
namespace {

constexpr int64_t kColumns = gemm::kColumns;
constexpr int64_t kPanelRows = 1024;  // amortises adding to the weight's gradient
constexpr int64_t kWidth = 64;        // of D, for one thread at a time

template <class S, class T>
MMK_INLINE void add_body(S* sum, const T* row, S weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * widen(row[i]);
}
MMK_MULTIARCH void add(float* sum, const float* row, float weight, int64_t n) { add_body(sum, row, weight, n); }
MMK_MULTIARCH void add(float* sum, const bf16* row, float weight, int64_t n) { add_body(sum, row, weight, n); }
MMK_MULTIARCH void add(double* sum, const float* row, double weight, int64_t n) { add_body(sum, row, weight, n); }
MMK_MULTIARCH void add(double* sum, const bf16* row, double weight, int64_t n) { add_body(sum, row, weight, n); }
template <class S, class T>
void add(S* sum, const T* row, S weight, int64_t n) {
  add_body(sum, row, weight, n);
}

struct Needs { bool images, weight, bias, positions, prefix; };

struct Arguments {
  const Plan& plan;
  const Positions& positions;
  const std::vector<Affine>& affines;
  const Tensor &grad, &weight;
  ScalarType pixels;
  Needs needs;
  int64_t D, K;
};

template <class T>
void store(const Tensor& to, const acc_t<T>* from, int64_t rows, int64_t columns, int64_t ld) {
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < columns; ++c)
        mutable_data<T>(to)[r * columns + c] = Convert<T>::from(from[r * ld + c]);
  });
}

// The gradients that sum over patches: of weight, bias, positions and prefix tokens.
template <class T, class E>
class Sums {
  using A = acc_t<T>;

 public:
  explicit Sums(const Arguments& x)
      : x_(x), packer_(x.plan, x.affines, x.pixels), ldw_(ceil_div(x.K, kColumns) * kColumns) {
    units_ = units_of(x.plan.patch, x.plan.images, kPanelRows / 4);
    panels_ = panels_of(x.plan.patch, x.plan.images, units_, kPanelRows);
    const auto sums = [&](bool need, int64_t rows, int64_t columns) {
      return mmkernels::zeros(x.weight, {need ? rows * columns : 0}, dtype_of<A>());
    };
    d_weight_ = sums(x.needs.weight, x.D, ldw_), d_bias_ = sums(x.needs.bias, 1, x.D);
    d_tables_ = sums(x.needs.positions, x.positions.rows() + x.positions.plane_rows(), x.D);
    d_prefix_ = sums(true, x.plan.patch.R, x.D);
  }

  void run() {
    int64_t most = 0;
    for (const Panel& panel : panels_) most = std::max(most, panel.patches);
    const int64_t ldx = gemm::lda<E>(x_.K);
    if (x_.needs.weight) {
      x_panel_ = empty(x_.weight, {most * ldx}, dtype_of<E>());
      packed_ = empty(x_.weight, {gemm::packed_elements<E>(x_.K, most)}, dtype_of<E>());
    }
    grad_panel_ = empty(x_.weight, {most * x_.D});
    for (size_t i = 0; i < panels_.size(); ++i) {
      pack(panels_[i], ldx);
      each_width([&](int64_t d, int64_t width) { add_panel(panels_[i], i > 0, d, width); });
    }
    each_width([&](int64_t d, int64_t width) { add_prefixes(d, width); });
  }

  void store_all(const Tensor& weight, const Tensor& bias, const std::vector<Tensor>& tables, const Tensor& prefix) {
    const int64_t D = x_.D;
    if (x_.needs.weight) store<T>(weight, data<A>(d_weight_), D, x_.K, ldw_);
    if (x_.needs.bias) store<T>(bias, data<A>(d_bias_), 1, D, D);
    const A* rows = data<A>(d_tables_);
    for (const Tensor& table : tables) {
      store<T>(table, rows, table.numel() / D, D, D);
      rows += table.numel();
    }
    if (x_.needs.prefix) store<T>(prefix, data<A>(d_prefix_), x_.plan.patch.R, D, D);
  }

 private:
  template <class F>
  void each_width(const F& f) {
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    const int64_t step = std::clamp(ceil_div(x_.D, threads), int64_t{16}, kWidth);  // columns are independent
    torch::stable::parallel_for(0, ceil_div(x_.D, step), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i * step, min64(step, x_.D - i * step));
    });
  }

  // A panel's patches as B of the product, its gradients row by row, its table rows.
  void pack(const Panel& panel, int64_t ldx) {
    const int64_t taps = x_.positions.taps();
    std::vector<int64_t> first = {0};
    for (int64_t u = panel.begin; u < panel.end; ++u)
      first.push_back(first.back() + units_[u].patches(x_.plan.patch, x_.plan.images[units_[u].image]));
    taps_.resize(panel.patches * taps), n_taps_.resize(panel.patches);
    torch::stable::parallel_for(panel.begin, panel.end, 1, [&](int64_t begin, int64_t end) {
      std::vector<E> line;
      for (int64_t u = begin; u < end; ++u) {
        const Unit& unit = units_[u];
        const Image& image = x_.plan.images[unit.image];
        const int64_t row = first[u - panel.begin], j = unit.first(x_.plan.patch, image);
        const int64_t count = first[u - panel.begin + 1] - row;
        const T* grad = data<T>(x_.grad) + (image.patches_from(x_.plan.patch) + j) * x_.D;
        memcpy(static_cast<void*>(mutable_data<T>(grad_panel_) + row * x_.D), grad, count * x_.D * sizeof(T));
        for (int64_t r = 0; r < count; ++r)
          n_taps_[row + r] = x_.positions.of(unit.image, j + r, taps_.data() + (row + r) * taps);
        if (x_.needs.weight) packer_.pack(mutable_data<E>(x_panel_) + row * ldx, ldx, unit, line);
      }
    });
    if (!x_.needs.weight) return;
    torch::stable::parallel_for(0, ldw_ / kColumns, 1, [&](int64_t begin, int64_t end) {
      gemm::pack_b(mutable_data<E>(packed_), data<E>(x_panel_), x_.K, panel.patches, int64_t{1}, ldx, begin, end);
    });
  }

  void add_panel(const Panel& panel, bool accumulate, int64_t d, int64_t width) {
    const int64_t rows = panel.patches, taps = x_.positions.taps();
    const T* grad = data<T>(grad_panel_) + d;
    if (x_.needs.weight) {
      const int64_t lda = gemm::lda<E>(rows);
      const Tensor a = empty(x_.weight, {width * lda}, dtype_of<E>());
      gemm::pack_a(mutable_data<E>(a), grad, width, rows, int64_t{1}, x_.D);
      for (int64_t j = 0; j < ldw_ / kColumns; ++j)
        gemm::multiply(data<E>(a), lda, width, rows, gemm::packed_block(data<E>(packed_), rows, j),
                       mutable_data<A>(d_weight_) + d * ldw_ + j * kColumns, ldw_, accumulate);
    }
    if (x_.needs.bias) {
      double sum[kWidth] = {};  // a plain sum: there is no product that would be as inexact
      for (int64_t r = 0; r < rows; ++r) add(sum, grad + r * x_.D, 1.0, width);
      for (int64_t i = 0; i < width; ++i) mutable_data<A>(d_bias_)[d + i] += sum[i];
    }
    if (!x_.needs.positions) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < n_taps_[r]; ++n) {
        const Tap<A> tap = taps_[r * taps + n];
        add(mutable_data<A>(d_tables_) + tap.row * x_.D + d, grad + r * x_.D, tap.weight, width);
      }
  }

  void add_prefixes(int64_t d, int64_t width) {
    const int64_t R = x_.plan.patch.R, D = x_.D;
    A *sums = mutable_data<A>(d_prefix_), *tables = mutable_data<A>(d_tables_);
    for (size_t i = 0; i < x_.plan.images.size(); ++i) {
      const Image& image = x_.plan.images[i];
      const int64_t placed = x_.needs.positions ? x_.positions.prefix_rows(i) : 0;
      for (int64_t r = 0; r < R; ++r) {
        const T* grad = data<T>(x_.grad) + (image.prefix_from(x_.plan.patch) + r) * D + d;
        add(sums + r * D + d, grad, A(1), width);
        if (r < placed) add(tables + (x_.positions.first_prefix_row(i) + r) * D + d, grad, A(1), width);
      }
    }
    if (x_.needs.positions && x_.positions.plane_rows())
      resample_backward(x_.positions, tables + x_.positions.rows() * D, tables, D, d, width);
  }

  const Arguments& x_;
  Packer<T, E> packer_;
  int64_t ldw_;
  std::vector<Unit> units_;
  std::vector<Panel> panels_;
  std::vector<Tap<A>> taps_;  // of the rows of the panel
  std::vector<int64_t> n_taps_;
  Tensor x_panel_, packed_, grad_panel_;
  Tensor d_weight_, d_bias_, d_tables_, d_prefix_;  // in acc_t<T>
};

// Gradients of pixels: grad · weight, laid back into images over `plan`, times the scale of the channel. W is the
// weight's dtype: T, or float where a sum over time would have to round to it.
template <class T, class E, class W, class Pixel>
class Pixels {
  using A = acc_t<T>;

 public:
  Pixels(const Arguments& x, const Plan& over) : x_(x), over_(over) {
    const Patch& p = over.patch;
    for (int64_t c = 0; c < p.C; ++c)
      for (int64_t pt = 0; pt < p.t.patch; ++pt)
        for (int64_t py = 0; py < p.h.patch; ++py)
          for (int64_t px = 0; px < p.w.patch; ++px) of_k_.push_back({c, pt, py, px});
    units_ = units_of(p, over.images, kPanelRows / 4);
    lda_ = gemm::lda<E>(x.D);
  }

  void run() {
    packed_ = empty(x_.weight, {gemm::packed_elements<E>(x_.K, x_.D)}, dtype_of<E>());
    torch::stable::parallel_for(0, ceil_div(x_.K, kColumns), 1, [&](int64_t begin, int64_t end) {
      gemm::pack_b(mutable_data<E>(packed_), data<W>(x_.weight), x_.K, x_.D, int64_t{1}, x_.K, begin, end);
    });
    const auto shared = [&](const Image& image) {
      return !image.rows && (over_.patch.overlaps() || (image.t - 1) * over_.patch.t.stride + over_.patch.t.patch > image.T);
    };
    if (std::any_of(over_.images.begin(), over_.images.end(), shared)) return add_up();
    torch::stable::parallel_for(0, static_cast<int64_t>(units_.size()), 1, [&](int64_t begin, int64_t end) {
      const Scratch s(*this, begin, end);
      for (int64_t u = begin; u < end; ++u)
        multiply(units_[u], s, [&](const Image& image, int64_t offset, int64_t c, A value) {
          put(image, offset, value * static_cast<A>(x_.affines[c].scale));
        });
    });
  }

 private:
  struct Scratch {
    Scratch(const Pixels& p, int64_t begin, int64_t end) {
      int64_t rows = 0;
      for (int64_t u = begin; u < end; ++u)
        rows = std::max(rows, p.units_[u].patches(p.over_.patch, p.over_.images[p.units_[u].image]));
      a = empty(p.x_.weight, {rows * p.lda_}, dtype_of<E>());
      c = empty(p.x_.weight, {rows * kColumns}, dtype_of<A>());
    }
    Tensor a, c;
  };
  struct OfK { int64_t c, pt, py, px; };

  static void put(const Image& image, int64_t offset, A value) {
    static_cast<Pixel*>(const_cast<void*>(image.pixels))[offset] = Convert<Pixel>::from(static_cast<acc_t<Pixel>>(value));
  }

  // Several patches share a pixel: an image at a time, its sums in full precision, patches in order.
  void add_up() {
    std::vector<int64_t> first(over_.images.size() + 1, static_cast<int64_t>(units_.size()));
    for (int64_t u = static_cast<int64_t>(units_.size()) - 1; u >= 0; --u) first[units_[u].image] = u;
    for (int64_t i = static_cast<int64_t>(first.size()) - 2; i >= 0; --i)
      if (over_.images[i].N() == 0) first[i] = first[i + 1];
    torch::stable::parallel_for(0, static_cast<int64_t>(over_.images.size()), 1, [&](int64_t begin, int64_t end) {
      const Scratch s(*this, first[begin], first[end]);
      std::vector<A> sums;
      for (int64_t i = begin; i < end; ++i) {
        const Image& image = over_.images[i];
        const int64_t plane = image.T * image.H * image.W;
        sums.assign(over_.patch.C * plane, A(0));
        for (int64_t u = first[i]; u < first[i + 1]; ++u)
          multiply(units_[u], s, [&](const Image&, int64_t offset, int64_t, A value) { sums[offset] += value; });
        for (int64_t n = 0; n < over_.patch.C * plane; ++n)
          put(image, n, sums[n] * static_cast<A>(x_.affines[n / plane].scale));
      }
    });
  }

  template <class Put>
  void multiply(const Unit& unit, const Scratch& s, const Put& put_value) const {
    const Image& image = over_.images[unit.image];
    const int64_t rows = unit.patches(over_.patch, image), first = unit.first(over_.patch, image);
    const T* grad = data<T>(x_.grad) + (image.patches_from(over_.patch) + first) * x_.D;
    gemm::pack_a(mutable_data<E>(s.a), grad, rows, x_.D, x_.D, int64_t{1});
    for (int64_t j = 0; j < ceil_div(x_.K, kColumns); ++j) {
      A* c = mutable_data<A>(s.c);
      gemm::multiply(data<E>(s.a), lda_, rows, x_.D, gemm::packed_block(data<E>(packed_), x_.D, j), c, kColumns, false);
      const int64_t k = j * kColumns, end = min64(k + kColumns, x_.K);
      for (int64_t r = 0; r < rows; ++r) scatter(image, first + r, k, end, c + r * kColumns, put_value);
    }
  }

  template <class Put>
  void scatter(const Image& image, int64_t j, int64_t k, int64_t end, const A* values, const Put& put_value) const {
    if (image.rows) {
      for (; k < end; ++k) put_value(image, j * image.stride_w + k * image.stride_c, k, *values++);
      return;
    }
    const Patch& p = over_.patch;
    const Place at = image.place(j, p.merge);
    for (; k < end; ++k, ++values) {
      const OfK of = of_k_[k];
      const int64_t y = at.y * p.h.stride + of.py, x = at.x * p.w.stride + of.px;
      if (y < image.H && x < image.W)  // else a pixel that was padded
        put_value(image, image.pixel_row(p, of.c, at.t, of.pt, at.y, of.py) + x * image.stride_w, of.c, *values);
    }
  }

  const Arguments& x_;
  const Plan& over_;
  std::vector<OfK> of_k_;
  std::vector<Unit> units_;
  int64_t lda_;
  Tensor packed_;
};

template <class T, class E, class W>
void grad_images(const Arguments& x, const std::vector<Tensor>& d_images, const Plan& over) {
  for (Tensor d : d_images) torch::stable::zero_(d);  // pixels no patch takes
  if (x.plan.patches == 0 || x.K == 0 || x.D == 0) return;
  dispatch_float("patch_embed", x.pixels, [&](auto* tag) { Pixels<T, E, W, pointee<decltype(tag)>>(x, over).run(); });
}

std::vector<Tensor> zeros_of_tables(const Tensor& weight, const Sizes& shape, Mode mode, bool need) {
  if (!need || mode == Mode::none) return {};
  const int64_t D = weight.size(0);
  const auto zeros = [&](Sizes sizes) {
    sizes.push_back(D);
    return mmkernels::zeros(weight, sizes);
  };
  if (mode == Mode::factorised) return {zeros({shape[0]}), zeros({shape[1]})};
  return {zeros(shape)};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, std::vector<Tensor>, Tensor> backward(
    const Tensor& grad_, std::vector<Tensor> images, const Tensor& weight_, const OptionalTensor& grid_thw,
    Numbers scale, Numbers shift, int64_t prefix_rows, Sizes position_shape, std::vector<bool> needed, Sizes stride,
    Sizes sizes, std::string edge, int64_t merge_size, bool prefix_last, std::string mode, bool align_corners,
    bool antialias) {
  const Layout layout = layout_of(stride, sizes, edge, merge_size, prefix_last, mode, align_corners, antialias);
  if (needed.size() != 5) fail("patch_embed_backward: needs must be 5 answers, got ", needed.size());
  const Plan whole = plan_of(images, weight_, prefix_rows, grid_thw, layout);
  const bool fold = repeats(whole);
  const Plan plan = fold ? without_time(whole) : whole;
  const Positions positions(plan, position_shape, layout);
  const auto affines = affines_of(plan.patch.C, scale, shift);
  const Tensor grad = torch::stable::contiguous(grad_), unfolded = torch::stable::contiguous(weight_);
  Tensor weight = unfolded;
  if (fold)
    dispatch_float("patch_embed", weight.scalar_type(), [&](auto* tag) {
      using T = pointee<decltype(tag)>;
      weight = summed_over_time<T, T>(unfolded, {}, nullptr);
    });
  const int64_t D = weight.size(0), K = plan.patch.K();
  if (grad.dim() != 2 || grad.size(0) != plan.tokens || grad.size(1) != D || grad.scalar_type() != weight.scalar_type())
    fail("patch_embed_backward: grad must be [", plan.tokens, ", ", D, "] in the dtype of weight");
  const ScalarType pixels = images.empty() ? ScalarType::Byte : images[0].scalar_type();
  const Needs needs{needed[0], needed[1], needed[2], needed[3], needed[4]};
  const auto zeros = [&](bool need, const Sizes& sizes) {
    return mmkernels::zeros(weight, need ? sizes : Sizes{0});
  };
  std::vector<Tensor> d_images;
  for (const Tensor& image : images) {
    Sizes shape = {0};
    if (needs.images) shape.clear();
    for (int64_t i = 0; needs.images && i < image.dim(); ++i) shape.push_back(image.size(i));
    d_images.push_back(empty(image, shape));
  }
  const Tensor d_weight = zeros(needs.weight, {D, plan.patch.C, weight.size(2), weight.size(3), weight.size(4)});
  const Tensor d_bias = zeros(needs.bias, {D}), d_prefix = zeros(needs.prefix, {prefix_rows, D});
  const std::vector<Tensor> d_tables = zeros_of_tables(weight, position_shape, layout.mode, needs.positions);
  const Arguments x{plan, positions, affines, grad, weight, pixels, needs, D, K};
  const Plan over = needs.images ? plan_over(plan, d_images, weight, layout) : Plan{};
  for_product(weight.scalar_type(), [&](auto* t, auto* e) {
    using T = pointee<decltype(t)>;
    using E = pointee<decltype(e)>;
    using A = acc_t<T>;
    if (grad.numel() && (needs.weight || needs.bias || needs.positions || needs.prefix)) {
      Sums<T, E> sums(x);
      sums.run();
      sums.store_all(d_weight, d_bias, d_tables, d_prefix);
    }
    // Gradients of pixels finer than the weight would show that its sum was rounded.
    if (needs.images && fold && sizeof(T) == 2 && pixels != weight.scalar_type()) {
      const Tensor exact = summed_over_time<T, A>(unfolded, {}, nullptr);
      grad_images<T, A, A>({plan, positions, affines, grad, exact, pixels, needs, D, K}, d_images, over);
    } else if (needs.images) {
      grad_images<T, E, T>(x, d_images, over);
    }
  });
  return {d_images, fold && needs.weight ? repeated_over_time(d_weight, unfolded) : d_weight, d_bias, d_tables, d_prefix};
}

}  // namespace
}  // namespace mmkernels::patch_embed

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("patch_embed_backward", TORCH_BOX(&mmkernels::patch_embed::backward));
}
