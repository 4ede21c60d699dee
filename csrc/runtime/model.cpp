#include "model.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "dmm/error.h"

namespace dmm {
namespace {

namespace fs = std::filesystem;

bool registered(const std::string& op) { return c10::Dispatcher::singleton().findSchema({op, ""}).has_value(); }

void load_library(const std::string& path) {
  if (!dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) fail("the library ", path, " does not load: ", dlerror());
}

/// The folder of the program or library that this code is in.
fs::path here() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&here), &info);
  std::error_code none;
  const fs::path path = fs::canonical(info.dli_fname ? info.dli_fname : "", none);
  return none ? fs::canonical("/proc/self/exe").parent_path() : path.parent_path();
}

/// Where the op library is: as given, else $DMM_OPS, else beside this program.
fs::path op_library(const std::string& given) {
  const char* environment = std::getenv("DMM_OPS");
  fs::path path = !given.empty() ? given : environment ? environment : "";
  if (path.empty()) {
    for (const char* near : {".", "..", "../lib"}) {
      if (fs::exists(here() / near / "libdmm_cpu.so")) return here() / near / "libdmm_cpu.so";
    }
    fail("the op library libdmm_cpu.so is not beside this program (", here().string(),
         "); name it (--ops, Options::ops or $DMM_OPS): it is in dmm_fast/lib of the Python package");
  }
  if (fs::is_directory(path)) path /= "libdmm_cpu.so";
  if (!fs::exists(path)) fail("no op library at ", path.string());
  return path;
}

void load_ops(const Manifest& manifest, at::Device device, const std::string& given) {
  const auto missing = [&] { return std::find_if_not(manifest.ops.begin(), manifest.ops.end(), registered); };
  if (device.is_cuda()) load_library("libtorch_cuda.so");
  if (manifest.kind == "pt2") load_library("libtorch.so");  // its code asks for it by name, but does not know where it is
  if (missing() == manifest.ops.end()) return;
  const fs::path path = op_library(given);
  load_library(path.string());
  if (device.is_cuda()) load_library((path.parent_path() / "libdmm_cuda.so").string());
  if (missing() != manifest.ops.end()) {
    fail(path.string(), ": has no op ", excerpt(*missing()), ", which ", manifest.folder,
         " needs: a library of another version");
  }
}

at::Device parse_device(const std::string& name) {
  try {
    at::Device device(name);
    if (device.is_cuda() && !device.has_index()) device.set_index(0);
    if (device.is_cpu() || device.is_cuda()) return device;
  } catch (const c10::Error&) {
  }
  fail("device must be cpu, cuda or cuda:N, got ", excerpt(name));
}

at::ScalarType dtype(const std::string& name) {
  static const std::map<std::string, at::ScalarType> kKnown = {
      {"bool", at::kBool}, {"uint8", at::kByte}, {"int32", at::kInt}, {"int64", at::kLong}};
  const auto found = kKnown.find(name);
  return found == kKnown.end() ? at::kFloat : found->second;
}

std::string text(const std::vector<Extent>& shape) {
  std::string result;
  for (const Extent& extent : shape) {
    result += (result.empty() ? "" : ", ") + (extent.size < 0 ? extent.name : std::to_string(extent.size));
  }
  return "[" + result + "]";
}

/// Run `work`, telling torch's errors without the backtrace.
template <class Work>
auto in_words(const std::string& what, const Work& work) {
  try {
    return work();
  } catch (const c10::Error& error) {
    fail(what, ": ", error.what_without_backtrace());
  } catch (const Error&) {
    throw;
  } catch (const std::runtime_error& error) {  // AOTInductor's
    fail(what, ": ", error.what());
  }
}

}  // namespace

Model::Model(Manifest manifest, const std::string& device, const std::string& ops)
    : manifest_(std::move(manifest)), device_(parse_device(device)) {
  for (const char* name : {"start", "step"}) {
    if (!manifest_.files.count(name)) fail(manifest_.folder, ": has no function ", excerpt(name));
  }
  const auto& inputs = manifest_.files.at("step").inputs;
  if (inputs.size() < 8 || inputs[2].shape.size() != 1 || inputs[4].shape.size() != 1) {
    fail(manifest_.folder, ": its step does not take a frame, proposals and a state");
  }
  const std::string type = device_.is_cuda() ? "cuda" : "cpu";
  if (manifest_.device != "any" && manifest_.device != type) {
    fail(manifest_.folder, ": was exported for ", excerpt(manifest_.device), ", not for ", type);
  }
  load_ops(manifest_, device_, ops);
  if (device_.is_cuda() && !at::globalContext().hasCUDA()) fail("device ", excerpt(device), ": torch finds no GPU here");
  program_ = in_words(manifest_.folder + ": cannot be loaded", [&]() -> std::unique_ptr<Program> {
    if (manifest_.kind == "torchscript") return open_torchscript(manifest_, device_);
    if (manifest_.kind == "pt2") return open_package(manifest_, device_);
    fail(manifest_.folder, ": kind must be torchscript or pt2, got ", excerpt(manifest_.kind));
  });
}

Tensors Model::call(const std::string& function, Tensors inputs) {
  const c10::InferenceMode guard;
  const Function& entry = manifest_.files.at(function);
  for (at::Tensor& input : inputs) input = input.to(device_);
  check(function, entry.inputs, inputs);
  Tensors outputs = in_words(function, [&] { return program_->run(function, std::move(inputs)); });
  check(function, entry.outputs, outputs);
  return outputs;
}

std::string mask_kind(const at::Tensor& masks) {
  return masks.is_floating_point() ? "soft" : masks.scalar_type() == at::kBool ? "full" : "runs";
}

std::pair<int64_t, int64_t> Model::limits(const std::string& function, size_t input, size_t axis) const {
  const Extent& extent = manifest_.files.at(function).inputs.at(input).shape.at(axis);
  if (extent.size >= 0) return {extent.size, extent.size};
  const auto found = manifest_.dynamic.find(extent.name);
  return found == manifest_.dynamic.end() ? std::pair<int64_t, int64_t>{0, INT64_MAX} : found->second;
}

void Model::check(const std::string& function, const std::vector<TensorSpec>& specs, const Tensors& tensors) const {
  if (tensors.size() != specs.size()) {
    fail(function, ": manifest.json lists ", specs.size(), " tensors, got ", tensors.size());
  }
  std::map<std::string, int64_t> sizes;
  for (size_t k = 0; k < specs.size(); ++k) {
    const TensorSpec& spec = specs[k];
    const at::Tensor& tensor = tensors[k];
    const auto wrong = [&](const std::string& why) {
      fail(function, ": ", spec.name, " must be ", spec.dtype, " ", text(spec.shape), why, ", got ",
           c10::toString(tensor.scalar_type()), " ", tensor.sizes());
    };
    if (spec.name == "proposals.masks" && tensor.scalar_type() != dtype(spec.dtype) &&
        manifest_.masks.count(mask_kind(tensor))) {
      continue;  // of a kind that the manifest lists, but not in this place
    }
    if (tensor.dim() != int64_t(spec.shape.size())) wrong("");
    if (tensor.scalar_type() != dtype(spec.dtype)) wrong("");
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
      const int64_t size = tensor.size(axis);
      const Extent& extent = spec.shape[axis];
      if (extent.size >= 0 ? size != extent.size : sizes.emplace(extent.name, size).first->second != size) wrong("");
      const auto range = manifest_.dynamic.find(extent.name);
      if (extent.size < 0 && range != manifest_.dynamic.end() && (size < range->second.first || size > range->second.second)) {
        wrong(" with " + extent.name + " in " + std::to_string(range->second.first) + ".." +
              std::to_string(range->second.second));
      }
    }
  }
}

}  // namespace dmm
