// SPDX-License-Identifier: Apache-2.0
// Patch embedding: sizes and all index maths. Host and device; no torch.
//
// B images, C channels, H×W pixels, P_h×P_w a patch, grid_h×grid_w patches an image (N), K = C·P_h·P_w
// values a patch, R prefix tokens. Tokens of an image: R prefix rows, then N patches in raster order.
// The unit of packing is a strip: one row of patches, grid_w tokens whose pixels lie on P_h pixel rows.
#pragma once
#include "../common/numeric.h"

namespace mmkernels::patch_embed {

struct Shape {
  int64_t B, C, H, W, P_h, P_w, R;
  int64_t stride_b, stride_c, stride_h, stride_w;  // of the pixels, in elements

  MMK_HD int64_t grid_h() const { return H / P_h; }
  MMK_HD int64_t grid_w() const { return W / P_w; }
  MMK_HD int64_t N() const { return grid_h() * grid_w(); }
  MMK_HD int64_t K() const { return C * P_h * P_w; }
  MMK_HD int64_t tokens() const { return R + N(); }

  // Strips of an image: its prefix rows count as one strip of R tokens, if there are any.
  MMK_HD int64_t strips() const { return grid_h() + (R > 0 ? 1 : 0); }
  MMK_HD bool is_prefix(int64_t strip) const { return R > 0 && strip % strips() == 0; }
  MMK_HD int64_t patch_row(int64_t strip) const { return strip % strips() - (R > 0 ? 1 : 0); }
  // First token (of all images') of a strip; strip = B·strips() gives the number of tokens.
  MMK_HD int64_t first_token(int64_t strip) const {
    if (strips() == 0) return 0;
    const int64_t b = strip / strips(), s = strip % strips();
    if (R == 0) return b * N() + s * grid_w();
    return b * tokens() + (s == 0 ? 0 : R + (s - 1) * grid_w());
  }
  // Offset of the pixel row that holds row py of the patches of (image b, channel c, patch row gy).
  MMK_HD int64_t pixel_row(int64_t b, int64_t c, int64_t gy, int64_t py) const {
    return b * stride_b + c * stride_c + (gy * P_h + py) * stride_h;
  }
  // Place in a patch's K values of its pixel row py in channel c.
  MMK_HD int64_t k_of(int64_t c, int64_t py) const { return (c * P_h + py) * P_w; }
};

// pixel · scale + shift, as if in higher precision: scale and shift are each a sum of two floats, so a
// pixel near the mean keeps its relative accuracy (their product's rounding would not cancel).
struct Affine {
  float scale_hi = 1, scale_lo = 0, shift_hi = 0, shift_lo = 0;
  double scale = 1, shift = 0;

  static Affine of(double scale, double shift) {
    Affine a;
    a.scale = scale, a.shift = shift;
    a.scale_hi = static_cast<float>(scale), a.scale_lo = static_cast<float>(scale - a.scale_hi);
    a.shift_hi = static_cast<float>(shift), a.shift_lo = static_cast<float>(shift - a.shift_hi);
    return a;
  }
  MMK_INLINE float apply(float x) const {
    return __builtin_fmaf(x, scale_hi, shift_hi) + __builtin_fmaf(x, scale_lo, shift_lo);
  }
  MMK_INLINE double apply(double x) const { return __builtin_fma(x, scale, shift); }
};

// One row of pixels, normalised and rounded to the dtype of the GEMM.
template <class T, class Pixel>
MMK_INLINE void normalise_row_body(T* to, const Pixel* from, int64_t stride, int64_t n, Affine affine) {
  using A = acc_t<T>;  // float, or double for a double weight
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = Convert<T>::from(affine.apply(static_cast<A>(widen(from[i]))));
  } else {
    for (int64_t i = 0; i < n; ++i)
      to[i] = Convert<T>::from(affine.apply(static_cast<A>(widen(from[i * stride]))));
  }
}

}  // namespace mmkernels::patch_embed
