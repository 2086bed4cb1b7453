// SPDX-License-Identifier: Apache-2.0
// Python over the torch-free headers, for tests only: index maths, conversions, and the per-row bodies of the
// CUDA kernels run over all their lanes, as a GPU would run them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../common/gemm.h"
#include "../merge_embeddings/merge_embeddings.h"
#include "../patch_embed/patch_embed.h"
#include "../patch_embed/positions.h"
#include "../rope/rope.h"

namespace py = pybind11;
using namespace mmkernels;

// merge_row for every row of `source`, 32 lanes each, at any alignment of input and output.
static std::string merge_rows(const std::string& text, const std::vector<std::string>& features,
                              const std::vector<int64_t>& source, int64_t row_bytes, int64_t offset) {
  merge_embeddings::Sources s{};
  std::string text_at(offset, '\0'), out(offset + source.size() * row_bytes, '\xee');
  text_at += text;
  s.text = text_at.data() + offset;
  s.modalities = static_cast<int32_t>(features.size());
  s.row_bytes = row_bytes;
  for (size_t m = 0; m < features.size(); ++m) {
    s.features[m] = features[m].data();
    s.first[m + 1] = s.first[m] + static_cast<int64_t>(features[m].size()) / row_bytes;
  }
  for (size_t t = 0; t < source.size(); ++t)
    for (int64_t lane = 0; lane < 32; ++lane)
      merge_embeddings::merge_row<bf16>(out.data() + offset + t * row_bytes, s, source[t], false, 1.0, lane, 32);
  return out.substr(offset);
}

// The GEMM over whole arrays and element offsets into them; 16-bit types come as uint16.
template <class E>
static E* at(py::array& array, int64_t offset) { return static_cast<E*>(array.mutable_data()) + offset; }

template <class E>
static void bind_gemm(py::module_& m, const std::string& name) {
  m.def(("padded_k_" + name).c_str(), &gemm::padded_k<E>);
  m.def(("lda_" + name).c_str(), &gemm::lda<E>);
  m.def(("packed_elements_" + name).c_str(), &gemm::packed_elements<E>);
  m.def(("multiply_" + name).c_str(), [](py::array a, int64_t a_offset, int64_t lda, int64_t M, int64_t K,
                                         py::array packed, int64_t packed_offset, int64_t j, py::array c,
                                         int64_t c_offset, int64_t ldc, bool accumulate) {
    const E* block = gemm::packed_block<E>(at<E>(packed, packed_offset), K, j);
    gemm::multiply<E>(at<E>(a, a_offset), lda, M, K, block, at<acc_t<E>>(c, c_offset), ldc, accumulate);
  });
}

template <class E, class S>
static void bind_pack(py::module_& m, const std::string& name) {
  m.def(("pack_b_" + name).c_str(), [](py::array to, int64_t to_offset, py::array b, int64_t b_offset, int64_t N,
                                       int64_t K, int64_t stride_n, int64_t stride_k, int64_t first, int64_t last) {
    gemm::pack_b<E, S>(at<E>(to, to_offset), at<S>(b, b_offset), N, K, stride_n, stride_k, first, last);
  });
  m.def(("pack_a_" + name).c_str(), [](py::array to, int64_t to_offset, py::array from, int64_t from_offset,
                                       int64_t M, int64_t K, int64_t stride_m, int64_t stride_k) {
    gemm::pack_a<E, S>(at<E>(to, to_offset), at<S>(from, from_offset), M, K, stride_m, stride_k);
  });
}

// Images of one size, contiguous, cut by one patch: everything the kernels ask of the geometry.
static void patch_embed_bindings(py::module_& m) {
  using namespace patch_embed;
  py::class_<Patch>(m, "Patch")
      .def(py::init([](int64_t C, std::vector<int64_t> patch, std::vector<int64_t> stride, int64_t merge, int64_t R,
                       bool last) {
        return Patch{C, {patch[0], stride[0]}, {patch[1], stride[1]}, {patch[2], stride[2]}, merge, R, last};
      }))
      .def("k_of", &Patch::k_of);
  py::class_<Image>(m, "Image")
      .def(py::init([](std::vector<int64_t> size, std::vector<int64_t> grid, int64_t token, int64_t patch, bool rows) {
        const int64_t T = size[0], H = size[1], W = size[2];
        return Image{nullptr, T, H, W, T * H * W, H * W, W, 1, grid[0], grid[1], grid[2], token, patch, rows};
      }))
      .def("place", [](const Image& image, int64_t j, int64_t merge) {
        const Place at = image.place(j, merge);
        return std::vector<int64_t>{at.t, at.y, at.x};
      })
      .def("patches_from", &Image::patches_from)
      .def("prefix_from", &Image::prefix_from)
      .def("pixel_row", [](const Image& image, const Patch& p, int64_t c, int64_t t, int64_t pt, int64_t y, int64_t py) {
        return image.pixel_row(p, c, t, pt, y, py);
      });
  m.def("patch_count", [](int64_t size, int64_t patch, int64_t stride, int64_t edge) {
    return Axis{patch, stride}.count(size, static_cast<Edge>(edge));
  });
  // Of every unit its image, first patch, patches; of every panel its units and patches.
  m.def("patch_units", [](const Patch& p, const std::vector<Image>& images, int64_t limit) {
    const auto units = units_of(p, images, limit);
    std::vector<std::vector<int64_t>> found, panels;
    for (const Unit& u : units)
      found.push_back({u.image, u.first(p, images[u.image]), u.patches(p, images[u.image])});
    for (const Panel& panel : panels_of(p, images, units, limit)) panels.push_back({panel.begin, panel.end, panel.patches});
    return std::make_pair(found, panels);
  });
  m.def("axis_taps", [](int64_t n_out, int64_t n_in, int64_t mode, bool corners, bool antialias) {
    const Taps taps = axis_taps(n_out, n_in, static_cast<Mode>(mode), corners, antialias);
    return std::make_tuple(taps.count, taps.index, taps.weight);
  });
}

// A head as the CUDA kernel turns, norms and stores it: `lanes` of them, units of V. Empty: no weight, no output, no cache.
template <class T, class C, int V>
static void rope_head(py::array in, py::array out, py::array cache, py::array weight, std::vector<std::vector<float>> t,
                      bool adjacent, float scale, float eps, int64_t lanes) {
  const auto of = [](py::array& a, auto* tag) { return a.size() ? static_cast<decltype(tag)>(a.mutable_data()) : nullptr; };
  const rope::Row<T, C> row{of(in, (T*)nullptr), of(out, (T*)nullptr), of(cache, (C*)nullptr), of(weight, (T*)nullptr),
                            scale, in.size(), {static_cast<int64_t>(t[0].size()), adjacent}};
  float squares = 0;
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t u = lane; u < row.units(V); u += lanes) squares += rope::squares_of_unit<V>(row, u);
  const float r = row.weight ? 1 / std::sqrt(squares / row.d + eps) : 1;
  for (int64_t lane = lanes - 1; lane >= 0; --lane)
    for (int64_t u = lane; u < row.units(V); u += lanes)
      rope::turn_unit<V>(row, u, r, t[0].data(), t[1].data(), t[2].data(), t[3].data());
}

static void rope_bindings(py::module_& m) {
  m.def("rope_cos_sin", [](double angle) {
    const rope::CosSin t = rope::cos_sin(angle);
    return std::make_pair(t.cos, t.sin);
  });
  m.def("rope_int8", [](float x) { return rope::Stored<int8_t>::from(x); });
  m.def("rope_f8", [](float x) { return rope::Stored<rope::f8e4m3>::from(x).bits; });
  m.def("rope_head_f32_4", &rope_head<float, float, 4>);
  m.def("rope_head_f32_1", &rope_head<float, float, 1>);
  m.def("rope_head_bf16_8", &rope_head<bf16, bf16, 8>);
  m.def("rope_head_bf16_1", &rope_head<bf16, bf16, 1>);
  m.def("rope_head_f32_int8_4", &rope_head<float, int8_t, 4>);
  m.def("rope_head_f32_f8_1", &rope_head<float, rope::f8e4m3, 1>);
  m.def("rope_slot", [](int64_t page_size, std::vector<int64_t> strides, int64_t slot, int64_t h) {
    return rope::Cache{nullptr, page_size, 0, strides[0], strides[1], strides[2]}.row(slot, h);
  });
}

PYBIND11_MODULE(mmkernels_headers, m) {
  m.def("merge_rows", [](py::bytes text, std::vector<std::string> features, std::vector<int64_t> source,
                         int64_t row_bytes, int64_t offset) {
    return py::bytes(merge_rows(text, features, source, row_bytes, offset));
  });
  m.def("to_bf16", [](float x) { return Convert<bf16>::from(x).bits; });
  m.def("to_f16", [](float x) { return Convert<f16>::from(x).bits; });
  m.def("from_bf16", [](uint16_t bits) { return widen(bf16{bits}); });
  m.def("from_f16", [](uint16_t bits) { return widen(f16{bits}); });
  m.def("gemm_isa", [] { return static_cast<int>(gemm::isa()); });
  m.def("gemm_has_bf16", &gemm::has_bf16);
  bind_gemm<float>(m, "f32");
  bind_gemm<double>(m, "f64");
  bind_gemm<bf16>(m, "bf16");
  bind_pack<float, float>(m, "f32_from_f32");
  bind_pack<float, bf16>(m, "f32_from_bf16");
  bind_pack<float, f16>(m, "f32_from_f16");
  bind_pack<double, double>(m, "f64_from_f64");
  bind_pack<bf16, bf16>(m, "bf16_from_bf16");
  patch_embed_bindings(m);
  rope_bindings(m);
}
