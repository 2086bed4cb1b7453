// SPDX-License-Identifier: Apache-2.0
// Patches as rows of a product: normalised, rounded to the weight's dtype, in the form the product takes.
#pragma once
#include "../common/gemm.h"
#include "plan.h"

namespace mmkernels::patch_embed {

// Calls f with null pointers of the weight's dtype and of the type its products multiply.
template <class F>
void for_product(ScalarType dtype, const F& f) {
  dispatch_float("patch_embed", dtype, [&](auto* t) {
    using T = pointee<decltype(t)>;
    if constexpr (std::is_same_v<T, bf16>) {
      if (gemm::has_bf16()) f(t, static_cast<bf16*>(nullptr));
      else f(t, static_cast<float*>(nullptr));
    } else {
      f(t, static_cast<acc_t<T>*>(nullptr));
    }
  });
}

template <class T> constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  else if constexpr (std::is_same_v<T, bf16>) return ScalarType::BFloat16;
  else return ScalarType::Float;
}

template <class T, class E>
MMK_INLINE E rounded(acc_t<T> x) {
  if constexpr (std::is_same_v<T, E>) return Convert<T>::from(x);
  else return widen(Convert<T>::from(x));
}

// By value and restrict, or the compiler takes the pixels' bytes for the numbers of `affine`.
template <class T, class E, class Pixel>
MMK_INLINE void normalise_body(E* __restrict to, const Pixel* __restrict from, int64_t stride, int64_t n,
                               const Affine affine) {
  // In float, or double where the weight or the pixels are.
  using A = std::conditional_t<std::is_same_v<Pixel, double>, double, acc_t<T>>;
  if (affine.identity && stride == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = rounded<T, E>(static_cast<acc_t<T>>(widen(from[i])));
  else if (affine.identity)
    for (int64_t i = 0; i < n; ++i) to[i] = rounded<T, E>(static_cast<acc_t<T>>(widen(from[i * stride])));
  else if (stride == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = rounded<T, E>(static_cast<acc_t<T>>(affine.apply(static_cast<A>(widen(from[i])))));
  else
    for (int64_t i = 0; i < n; ++i) to[i] = rounded<T, E>(static_cast<acc_t<T>>(affine.apply(static_cast<A>(widen(from[i * stride])))));
}

// T the weight's dtype, E what the product multiplies: T itself, or float where T is 16 bits wide.
template <class T, class E>
class Packer {
 public:
  Packer(const Plan& plan, const std::vector<Affine>& affines, ScalarType pixels)
      : plan_(plan), affines_(affines), pixels_(pixels) {}

  // The patches of a unit as rows from `to`, lda apart, zero from K to padded_k; `line` is scratch.
  void pack(E* to, int64_t lda, const Unit& unit, std::vector<E>& line) const {
    const Image& image = plan_.images[unit.image];
    const auto run = [&](auto* tag) {
      using Pixel = pointee<decltype(tag)>;
      if (image.rows) pack_rows<Pixel>(to, lda, unit, image);
      else pack_band<Pixel>(to, lda, unit, image, line);
    };
    if (pixels_ == ScalarType::Byte) run(static_cast<uint8_t*>(nullptr));
    else dispatch_float("patch_embed", pixels_, run);
    const int64_t K = plan_.patch.K(), padded = gemm::padded_k<E>(K);
    for (int64_t r = 0, rows = unit.patches(plan_.patch, image); r < rows && K < padded; ++r)
      memset(static_cast<void*>(to + r * lda + K), 0, (padded - K) * sizeof(E));
  }

 private:
  template <class Pixel>
  void pack_band(E* to, int64_t lda, const Unit& unit, const Image& image, std::vector<E>& line) const;
  template <class Pixel>
  void pack_rows(E* to, int64_t lda, const Unit& unit, const Image& image) const;

  const Plan& plan_;
  const std::vector<Affine>& affines_;
  ScalarType pixels_;
};

// The types that matter are compiled per instruction set (patch_embed_cpu.cpp); the others take the plain loop.
#define MMK_NORMALISE_EACH(ROW) \
  ROW(float, float, uint8_t)    \
  ROW(float, float, float)      \
  ROW(bf16, bf16, uint8_t)      \
  ROW(bf16, bf16, float)        \
  ROW(bf16, bf16, bf16)         \
  ROW(bf16, float, uint8_t)     \
  ROW(bf16, float, float)
#define MMK_NORMALISE(T, E, Pixel) \
  void normalise(const T*, E* to, const Pixel* from, int64_t stride, int64_t n, const Affine& affine);
MMK_NORMALISE_EACH(MMK_NORMALISE)
#undef MMK_NORMALISE
template <class T, class E, class Pixel>
void normalise(const T*, E* to, const Pixel* from, int64_t stride, int64_t n, const Affine& affine) {
  normalise_body<T>(to, from, stride, n, affine);
}

// Copies runs of `n` values of the line, `step` values apart, to places `to_of(i)` with `room` values each: whole
// vectors where there is room, because what they write past a run is written again by the next run of that row.
constexpr int64_t kSlack = 64;  // bytes a line is readable past its end
template <class E, class To>
MMK_INLINE void copy_runs(const E* line, int64_t step, int64_t count, int64_t n, int64_t room, const To& to_of) {
  const int64_t bytes = n * sizeof(E), space = room * sizeof(E);
  if (bytes <= 32 && space >= 32)
    for (int64_t i = 0; i < count; ++i) memcpy(static_cast<void*>(to_of(i)), line + i * step, 32);
  else if (bytes <= 64 && space >= 64)
    for (int64_t i = 0; i < count; ++i) memcpy(static_cast<void*>(to_of(i)), line + i * step, 64);
  else
    for (int64_t i = 0; i < count; ++i) memcpy(static_cast<void*>(to_of(i)), line + i * step, bytes);
}

template <class T, class E>
template <class Pixel>
void Packer<T, E>::pack_band(E* to, int64_t lda, const Unit& unit, const Image& image, std::vector<E>& line) const {
  const Patch& p = plan_.patch;
  const int64_t m = p.merge, first_x = unit.begin * m, columns = (unit.end - unit.begin) * m;
  const int64_t first_pixel = first_x * p.w.stride, wide = (columns - 1) * p.w.stride + p.w.patch;
  const int64_t inside = std::max<int64_t>(0, min64(wide, image.W - first_pixel));
  line.resize(wide + kSlack / sizeof(E));
  std::fill(line.begin() + inside, line.end(), E{});  // beyond the image: 0 after normalising
  const Pixel* pixels = static_cast<const Pixel*>(image.pixels) + first_pixel * image.stride_w;
  for (int64_t my = 0; my < m; ++my) {
    const int64_t y = unit.band * m + my;
    for (int64_t c = 0; c < p.C; ++c)
      for (int64_t pt = 0; pt < p.t.patch; ++pt)
        for (int64_t py = 0; py < p.h.patch; ++py) {
          if (y * p.h.stride + py < image.H)
            normalise(static_cast<const T*>(nullptr), line.data(),
                      pixels + image.pixel_row(p, c, unit.t, pt, y, py), image.stride_w, inside, affines_[c]);
          else
            std::fill(line.begin(), line.begin() + inside, E{});
          const int64_t k = p.k_of(c, pt, py);
          E* chunk = to + k + my * m * lda;
          if (m == 1)
            copy_runs(line.data(), p.w.stride, columns, p.w.patch, lda - k,
                      [&](int64_t x) { return chunk + x * lda; });
          else
            copy_runs(line.data(), p.w.stride, columns, p.w.patch, lda - k,
                      [&](int64_t x) { return chunk + (x / m * m * m + x % m) * lda; });
        }
  }
}

template <class T, class E>
template <class Pixel>
void Packer<T, E>::pack_rows(E* to, int64_t lda, const Unit& unit, const Image& image) const {
  const int64_t K = plan_.patch.K();
  const T* tag = nullptr;
  for (int64_t j = unit.begin; j < unit.end; ++j, to += lda) {
    const Pixel* from = static_cast<const Pixel*>(image.pixels) + j * image.stride_w;
    if (affines_.empty() || affines_[0].identity) normalise(tag, to, from, image.stride_c, K, Affine{});
    else
      for (int64_t k = 0; k < K; ++k) normalise_body<T>(to + k, from + k * image.stride_c, 1, 1, affines_[k]);
  }
}

}  // namespace mmkernels::patch_embed
