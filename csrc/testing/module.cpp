// SPDX-License-Identifier: Apache-2.0
// Python over the torch-free headers, for tests only: index maths, conversions, and the per-row bodies of the
// CUDA kernels run over all their lanes, as a GPU would run them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../merge_embeddings/merge_embeddings.h"
#include "../patch_embed/patch_embed.h"

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

PYBIND11_MODULE(mmkernels_headers, m) {
  m.def("merge_rows", [](py::bytes text, std::vector<std::string> features, std::vector<int64_t> source,
                         int64_t row_bytes, int64_t offset) {
    return py::bytes(merge_rows(text, features, source, row_bytes, offset));
  });
  m.def("to_bf16", [](float x) { return Convert<bf16>::from(x).bits; });
  m.def("to_f16", [](float x) { return Convert<f16>::from(x).bits; });
  m.def("from_bf16", [](uint16_t bits) { return widen(bf16{bits}); });
  m.def("from_f16", [](uint16_t bits) { return widen(f16{bits}); });
  py::class_<patch_embed::Shape>(m, "PatchShape")
      .def(py::init([](int64_t B, int64_t C, int64_t H, int64_t W, int64_t P_h, int64_t P_w, int64_t R) {
        return patch_embed::Shape{B, C, H, W, P_h, P_w, R, C * H * W, H * W, W, 1};
      }))
      .def("strips", &patch_embed::Shape::strips)
      .def("is_prefix", &patch_embed::Shape::is_prefix)
      .def("patch_row", &patch_embed::Shape::patch_row)
      .def("first_token", &patch_embed::Shape::first_token)
      .def("pixel_row", &patch_embed::Shape::pixel_row)
      .def("k_of", &patch_embed::Shape::k_of);
}
