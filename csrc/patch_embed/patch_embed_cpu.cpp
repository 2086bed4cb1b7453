// SPDX-License-Identifier: Apache-2.0
// Patch embedding on CPU, forward. The weight is packed once; each thread packs a panel of patches from raw
// pixels, multiplies it and finishes its tokens, some columns at a time, while they are in its cache. No image-sized
// tensor but the output exists. Every token is one fixed sum, so its bits depend on neither threads nor panels.
#include <algorithm>

#include "fold.h"
#include "planes.h"

namespace mmkernels::patch_embed {

#define MMK_NORMALISE(T, E, Pixel)                                                                       \
  MMK_MULTIARCH void normalise(const T*, E* to, const Pixel* from, int64_t stride, int64_t n, const Affine& affine) { \
    normalise_body<T>(to, from, stride, n, affine);                                                      \
  }
MMK_NORMALISE_EACH(MMK_NORMALISE)
#undef MMK_NORMALISE

namespace {

// A panel and a few packed blocks of the weight fit in L2.
constexpr int64_t kPanelRows = 384, kPanelBytes = 450 << 10;
// Columns finished at a time: rows of the output lie far apart, so each should be worth a visit.
constexpr int64_t kColumns = 4 * gemm::kColumns;

// One block of columns of a panel's tokens: product + bias + position, rounded once.
template <class T>
struct Block {
  T* out;                 // column 0 of the block of token 0
  int64_t D, columns, rows;
  const int64_t* token;   // of each row
  const acc_t<T>* product;
  const acc_t<T>* bias;
  const T* const* tables;     // of each tap, its table from the block's first column
  const acc_t<T>* planes;     // what rows from first_plane_row on are rows of, from that column
  int64_t first_plane_row;
  const Tap<acc_t<T>>* taps;  // most_taps for each row, of which so many are there:
  const int64_t* n_taps;
  int64_t most_taps;
};

constexpr int64_t kChunk = 32;  // columns whose sums stay in registers

template <class T>
MMK_INLINE void finish_chunk(const Block<T>& b, int64_t r, int64_t first, const int64_t count) {
  using A = acc_t<T>;
  const A* __restrict product = b.product + r * kColumns + first;
  const A* __restrict bias = b.bias + first;
  T* __restrict out = b.out + b.token[r] * b.D + first;
  A sum[kChunk];
  for (int64_t i = 0; i < count; ++i) sum[i] = product[i] + bias[i];
  for (int64_t n = 0; n < b.n_taps[r]; ++n) {
    const Tap<A> tap = b.taps[r * b.most_taps + n];
    if (tap.row >= b.first_plane_row) {
      const A* __restrict row = b.planes + (tap.row - b.first_plane_row) * b.D + first;
      for (int64_t i = 0; i < count; ++i) sum[i] += row[i];
    } else {
      const T* __restrict row = b.tables[n] + tap.row * b.D + first;
      for (int64_t i = 0; i < count; ++i) sum[i] += tap.weight * widen(row[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) out[i] = Convert<T>::from(sum[i]);
}
// Rows lie too far apart for the hardware to see them coming.
template <class T>
MMK_INLINE void prefetch_row(const Block<T>& b, int64_t r) {
  if (r >= b.rows) return;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < b.columns; i += kLine) __builtin_prefetch(b.out + b.token[r] * b.D + i, 1);
  for (int64_t n = 0; n < b.n_taps[r]; ++n) {
    const int64_t row = b.taps[r * b.most_taps + n].row;
    for (int64_t i = 0; row < b.first_plane_row && i < b.columns; i += kLine)
      __builtin_prefetch(b.tables[n] + row * b.D + i);
  }
}
template <class T>
MMK_INLINE void finish_body(const Block<T> b) {
  constexpr int64_t kAhead = 6;
  for (int64_t r = 0; r < b.rows; ++r) {
    prefetch_row(b, r + kAhead);
    int64_t first = 0;
    for (; first + kChunk <= b.columns; first += kChunk) finish_chunk(b, r, first, kChunk);  // unrolled
    if (first < b.columns) finish_chunk(b, r, first, b.columns - first);
  }
}
MMK_MULTIARCH void finish(const Block<float>& b) { finish_body(b); }
MMK_MULTIARCH void finish(const Block<bf16>& b) { finish_body(b); }
void finish(const Block<f16>& b) { finish_body(b); }
void finish(const Block<double>& b) { finish_body(b); }

template <class T>
struct Rest {  // what is added to the product, and tokens that are none
  std::vector<acc_t<T>> bias;
  std::vector<const T*> tables;  // of each tap
  std::vector<acc_t<T>> planes;
  const T* prefix = nullptr;
};

template <class T, class E>
class Forward {
  using A = acc_t<T>;

 public:
  Forward(const Plan& plan, const Positions& positions, const Packer<T, E>& packer, const Rest<T>& rest,
          const E* weight, T* out, int64_t D)
      : plan_(plan), positions_(positions), packer_(packer), rest_(rest), weight_(weight), out_(out), D_(D) {}

  void run(const Tensor& like) const {
    const int64_t limit = panel_rows();
    const auto units = units_of(plan_.patch, plan_.images, limit);
    const auto panels = panels_of(plan_.patch, plan_.images, units, limit);
    int64_t rows = 0;
    for (const Panel& panel : panels) rows = std::max(rows, panel.patches);
    const int64_t lda = gemm::lda<E>(plan_.patch.K()), count = static_cast<int64_t>(panels.size());
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Tensor a = empty(like, {rows * lda}, dtype_of<E>()), c = empty(like, {rows * kColumns}, dtype_of<A>());
      for (int64_t i = begin; i < end; ++i)
        multiply(panels[i], units, mutable_data<E>(a), lda, mutable_data<A>(c));
    });
    write_prefixes();
  }

 private:
  // At most what L2 holds, and of whole bands so many that every thread has as many panels: the last one counts.
  int64_t panel_rows() const {
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    const int64_t most = std::clamp<int64_t>(kPanelBytes / (gemm::lda<E>(plan_.patch.K()) * sizeof(E)), 96, kPanelRows);
    const int64_t panels = threads * std::max<int64_t>(1, ceil_div(plan_.patches, most * threads));
    int64_t band = 1;
    for (const Image& image : plan_.images) band = std::max(band, image.rows ? 1 : image.w * plan_.patch.merge);
    return std::clamp(ceil_div(ceil_div(plan_.patches, panels), band) * band, int64_t{64}, most);
  }

  void multiply(const Panel& panel, const std::vector<Unit>& units, E* a, int64_t lda, A* c) const {
    const int64_t K = plan_.patch.K(), taps = positions_.taps();
    std::vector<E> line;
    std::vector<int64_t> token, n_taps;
    std::vector<Tap<A>> of_rows(panel.patches * taps);
    for (int64_t u = panel.begin; u < panel.end; ++u) {
      const Unit& unit = units[u];
      const Image& image = plan_.images[unit.image];
      packer_.pack(a + static_cast<int64_t>(token.size()) * lda, lda, unit, line);
      const int64_t first = unit.first(plan_.patch, image), count = unit.patches(plan_.patch, image);
      for (int64_t j = first; j < first + count; ++j) {
        n_taps.push_back(positions_.of(unit.image, j, of_rows.data() + token.size() * taps));
        token.push_back(image.patches_from(plan_.patch) + j);
      }
    }
    std::vector<const T*> tables(taps);
    for (int64_t column = 0; column < D_; column += kColumns) {
      const int64_t columns = min64(kColumns, D_ - column);
      for (int64_t j = 0; j < columns; j += gemm::kColumns)
        gemm::multiply(a, lda, panel.patches, K, gemm::packed_block(weight_, K, (column + j) / gemm::kColumns), c + j,
                       kColumns, false);
      for (int64_t n = 0; n < taps; ++n) tables[n] = rest_.tables[n] + column;
      finish(Block<T>{out_ + column, D_, columns, panel.patches, token.data(), c, rest_.bias.data() + column,
                      tables.data(), rest_.planes.data() + column, positions_.rows(), of_rows.data(), n_taps.data(),
                      taps});
    }
  }

  void write_prefixes() const {
    const int64_t R = plan_.patch.R, count = static_cast<int64_t>(plan_.images.size());
    if (R == 0) return;
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t placed = positions_.prefix_rows(i), first = positions_.first_prefix_row(i);
        for (int64_t r = 0; r < R; ++r) {
          T* to = out_ + (plan_.images[i].prefix_from(plan_.patch) + r) * D_;
          const T* from = rest_.prefix + r * D_;
          const T* position = r < placed ? rest_.tables[0] + (first + r) * D_ : nullptr;
          for (int64_t d = 0; d < D_; ++d)
            to[d] = position ? Convert<T>::from(widen(from[d]) + widen(position[d])) : from[d];
        }
      }
    });
  }

  const Plan& plan_;
  const Positions& positions_;
  const Packer<T, E>& packer_;
  const Rest<T>& rest_;
  const E* weight_;
  T* out_;
  int64_t D_;
};

struct Arguments {
  const std::vector<Tensor>& images;
  const Tensor &weight, &out;
  const OptionalTensor &bias, &prefix;
  const std::vector<Tensor>& tables;
  const std::vector<Affine>& affines;
};

template <class T>
Rest<T> rest_of(const Arguments& x, int64_t D) {
  Rest<T> rest;
  rest.bias.assign(D, 0);
  for (int64_t d = 0; x.bias && d < D; ++d) rest.bias[d] = widen(data<T>(x.bias)[d]);
  for (const Tensor& table : x.tables) rest.tables.push_back(data<T>(table));
  if (x.tables.size() == 2) rest.tables[1] -= x.tables[0].size(0) * D;  // rows are counted through both
  rest.prefix = data<T>(x.prefix);
  return rest;
}

template <class T, class E>
void embed(const Plan& plan_, const Positions& positions, const Arguments& x) {
  const ScalarType pixels = x.images.empty() ? ScalarType::Byte : x.images[0].scalar_type();
  const bool fold = may_fold(plan_, x.weight.scalar_type(), pixels, x.affines);
  const Plan plan = fold ? without_time(plan_) : plan_;
  Rest<T> rest = rest_of<T>(x, x.weight.size(0));
  std::vector<Centred> centred;
  std::vector<Affine> affines = x.affines;
  if (fold && sizeof(T) == 2)
    for (Affine& a : affines) centred.emplace_back(a), a = centred.back().pixels;
  const Tensor weight = fold ? summed_over_time<T, T>(x.weight, centred, rest.bias.data()) : x.weight;
  const int64_t D = weight.size(0), K = plan.patch.K(), blocks = ceil_div(D, gemm::kColumns);
  const Tensor packed = empty(x.weight, {gemm::packed_elements<E>(D, K)}, dtype_of<E>());
  torch::stable::parallel_for(0, plan.patches ? blocks : 0, 1, [&](int64_t begin, int64_t end) {
    gemm::pack_b(mutable_data<E>(packed), data<T>(weight), D, K, K, int64_t{1}, begin, end);
  });
  rest.tables.resize(std::max<int64_t>(positions.taps(), rest.tables.size()),
                     rest.tables.empty() ? nullptr : rest.tables[0]);
  rest.planes.resize(positions.plane_rows() * D);
  constexpr int64_t kWidth = 64;
  torch::stable::parallel_for(0, rest.planes.empty() ? 0 : ceil_div(D, kWidth), 1, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin * kWidth; d < min64(end * kWidth, D); d += kWidth)
      resample(positions, rest.tables[0], rest.planes.data(), D, d, min64(kWidth, D - d));
  });
  const Packer<T, E> packer(plan, affines, pixels);
  Forward<T, E>(plan, positions, packer, rest, data<E>(packed), mutable_data<T>(x.out), D).run(x.weight);
}

void check_rest(const Tensor& weight, const OptionalTensor& bias, const std::vector<Tensor>& tables,
                const OptionalTensor& prefix, Mode mode) {
  const int64_t D = weight.size(0);
  const auto fits = [&](const Tensor& t) {
    return t.dim() > 0 && t.size(t.dim() - 1) == D && t.scalar_type() == weight.scalar_type();
  };
  bool all = (!bias || (fits(*bias) && bias->dim() == 1)) && (!prefix || (fits(*prefix) && prefix->dim() == 2));
  for (const Tensor& table : tables)
    all = all && fits(table) && table.dim() == (mode == Mode::fixed || mode == Mode::factorised ? 2 : 3);
  if (!all) fail("patch_embed: bias [D], positions [..., D] and prefix_tokens [R, D] must fit weight [D, ...]");
}

Sizes shape_of(const std::vector<Tensor>& tables, Mode mode) {
  const size_t expected = mode == Mode::none ? 0 : mode == Mode::factorised ? 2 : 1;
  if (tables.size() != expected) fail("patch_embed: position_mode needs ", expected, " tables, got ", tables.size());
  Sizes shape;
  for (const Tensor& table : tables)
    for (int64_t i = 0; i + 1 < table.dim(); ++i) shape.push_back(table.size(i));
  return shape;
}

Tensor forward(std::vector<Tensor> images, const Tensor& weight_, const OptionalTensor& bias_,
               std::vector<Tensor> tables, const OptionalTensor& prefix_, const OptionalTensor& grid_thw,
               Numbers scale, Numbers shift, Sizes stride, Sizes sizes, std::string edge, int64_t merge_size,
               bool prefix_last, std::string mode, bool align_corners, bool antialias) {
  const Layout layout = layout_of(stride, sizes, edge, merge_size, prefix_last, mode, align_corners, antialias);
  const Plan plan = plan_of(images, weight_, prefix_ ? prefix_->size(0) : 0, grid_thw, layout);
  check_rest(weight_, bias_, tables, prefix_, layout.mode);
  const Positions positions(plan, shape_of(tables, layout.mode), layout);
  const auto affines = affines_of(plan.patch.C, scale, shift);
  const Tensor out = empty(weight_, {plan.tokens, weight_.size(0)});
  if (out.numel() == 0) return out;
  const Tensor weight = torch::stable::contiguous(weight_);
  const OptionalTensor bias = contiguous(bias_), prefix = contiguous(prefix_);
  for (Tensor& table : tables) table = torch::stable::contiguous(table);
  const Arguments x{images, weight, out, bias, prefix, tables, affines};
  for_product(weight.scalar_type(), [&](auto* t, auto* e) {
    embed<pointee<decltype(t)>, pointee<decltype(e)>>(plan, positions, x);
  });
  return out;
}

}  // namespace
}  // namespace mmkernels::patch_embed

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) { m.impl("patch_embed", TORCH_BOX(&mmkernels::patch_embed::forward)); }
