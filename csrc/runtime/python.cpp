// dmm_fast.runtime: dmm::Segmenter for Python, on numpy arrays. What C++ programs link, under test from pytest.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <ATen/Functions.h>
#include <torch/version.h>

#include <filesystem>
#include <optional>
#include <tuple>

#include "dmm/segmenter.h"

namespace py = pybind11;
using Path = std::filesystem::path;

namespace {

/// A copy of an array, whatever its strides.
at::Tensor tensor(const py::array& given) {
  const py::array array = py::array::ensure(given, py::array::c_style);
  const auto type = array.dtype();
  const auto is = [&type](const py::dtype& other) { return type.equal(other); };
  const at::ScalarType kind = is(py::dtype::of<uint8_t>())   ? at::kByte
                              : is(py::dtype::of<bool>())    ? at::kBool
                              : is(py::dtype::of<int32_t>()) ? at::kInt
                              : is(py::dtype::of<float>())   ? at::kFloat
                              : is(py::dtype::of<double>())  ? at::kDouble
                                                             : at::ScalarType::Undefined;
  if (kind == at::ScalarType::Undefined)
    dmm::fail("an array must be uint8, bool, int32, float32 or float64, got ", py::str(type).cast<std::string>());
  const std::vector<int64_t> shape(array.shape(), array.shape() + array.ndim());
  return at::from_blob(const_cast<void*>(array.data()), shape, kind).clone();
}

template <class T>
py::array_t<T> array(const at::Tensor& given) {
  const at::Tensor tensor = given.cpu().contiguous();
  return py::array_t<T>(tensor.sizes().vec(), static_cast<const T*>(tensor.const_data_ptr()));
}

/// [H, W, 3], as images are in Python, to [3, H, W].
at::Tensor frame(const py::array& given) {
  const at::Tensor image = tensor(given);
  if (image.dim() != 3 || image.size(2) != 3) dmm::fail("Segmenter: frame must be uint8 [H, W, 3], got ", image.sizes());
  return image.permute({2, 0, 1});
}

using Arrays = std::tuple<py::array, py::array, py::array>;  // boxes, scores, masks

}  // namespace

PYBIND11_MODULE(_runtime, module) {
  py::register_exception<dmm::Error>(module, "RuntimeFault", PyExc_ValueError);
  module.attr("torch") = TORCH_VERSION;

  py::class_<dmm::ObjectResult>(module, "ObjectResult")
      .def_readonly("id", &dmm::ObjectResult::id)
      .def_property_readonly(
          "proposal", [](const dmm::ObjectResult& o) { return o.proposal < 0 ? std::nullopt : std::optional(o.proposal); })
      .def_readonly("score", &dmm::ObjectResult::score)
      .def_readonly("runner_up", &dmm::ObjectResult::runner_up)
      .def_readonly("lost", &dmm::ObjectResult::lost);

  py::class_<dmm::FrameResult>(module, "FrameResult")
      .def_property_readonly("ids", [](const dmm::FrameResult& r) { return array<uint8_t>(r.ids); })
      .def_readonly("objects", &dmm::FrameResult::objects);

  py::class_<dmm::Segmenter>(module, "Segmenter")
      .def(py::init([](const Path& folder, const std::string& device, const std::string& ops, int slots) {
             return dmm::Segmenter(folder.string(), {device, ops, slots});
           }),
           py::arg("folder"), py::kw_only(), py::arg("device") = "cpu", py::arg("ops") = "", py::arg("slots") = 1)
      .def_static(
          "load",
          [](const Path& path, const Path& folder, const std::string& device, const std::string& ops) {
            return dmm::Segmenter::load(path.string(), folder.string(), {device, ops, 1});
          },
          py::arg("path"), py::arg("folder"), py::kw_only(), py::arg("device") = "cpu", py::arg("ops") = "")
      .def(
          "start",
          [](dmm::Segmenter& s, const py::array& image, const py::array& ids) { return s.start(frame(image), tensor(ids)); },
          py::arg("frame"), py::arg("ids"))
      .def(
          "step",
          [](dmm::Segmenter& s, const py::array& image, const std::optional<Arrays>& given) {
            const at::Tensor next = frame(image);
            std::optional<dmm::Proposals> proposals;
            if (given) proposals = {tensor(std::get<0>(*given)), tensor(std::get<1>(*given)), tensor(std::get<2>(*given))};
            const py::gil_scoped_release release;
            return proposals ? s.step(next, *proposals) : s.step(next);
          },
          py::arg("frame"), py::arg("proposals") = py::none())
      .def(
          "propose",
          [](dmm::Segmenter& s, const py::array& image) {
            const auto found = s.propose(frame(image));
            const bool full = found.masks.scalar_type() == at::kBool;
            return Arrays(array<float>(found.boxes), array<float>(found.scores),
                          full ? py::array(array<bool>(found.masks)) : py::array(array<float>(found.masks)));
          },
          py::arg("frame"))
      .def(
          "add", [](dmm::Segmenter& s, const py::array& ids) { return s.add(tensor(ids)); }, py::arg("ids"))
      .def("drop", &dmm::Segmenter::drop, py::arg("ids"))
      .def(
          "save", [](const dmm::Segmenter& s, const Path& path, const std::string& last) { s.save(path.string(), last); },
          py::arg("path"), py::arg("last_frame") = "")
      .def_property_readonly("object_ids", &dmm::Segmenter::object_ids)
      .def_property_readonly("proposes", &dmm::Segmenter::proposes)
      .def_property_readonly("last_frame", &dmm::Segmenter::last_frame);

  module.def(
      "read_proposals",
      [](const Path& path, const std::string& stem, int height, int width, int top) {
        const auto p = dmm::to_tensors(dmm::ProposalFile(path.string(), top).frame(stem, height, width));
        return Arrays(array<float>(p.boxes), array<float>(p.scores), array<int32_t>(p.masks));
      },
      py::arg("path"), py::arg("stem"), py::arg("height"), py::arg("width"), py::arg("top") = 50);
  module.def("read_frame", [](const Path& path) {
    return array<uint8_t>(dmm::to_tensor(dmm::read_frame(path.string())).permute({1, 2, 0}));
  });
  module.def("read_mask", [](const Path& path, int height, int width) {
    return array<uint8_t>(dmm::to_tensor(dmm::read_mask(path.string(), height, width)));
  });
}
