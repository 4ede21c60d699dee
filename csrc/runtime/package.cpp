// .pt2: one AOTInductor package a function.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include <cstdlib>
#include <tuple>

#include "dmm/error.h"
#include "model.h"

namespace dmm {
namespace {

/// A package's code calls into torch: one of a later torch may ask for what this one does not have.
void check_torch(const Manifest& manifest) {
  char* rest = nullptr;
  const long major = std::strtol(manifest.torch.c_str(), &rest, 10);
  const long minor = *rest == '.' ? std::strtol(rest + 1, nullptr, 10) : 0;
  if (std::tuple(major, minor) > std::tuple(long(TORCH_VERSION_MAJOR), long(TORCH_VERSION_MINOR))) {
    fail(manifest.folder, ": was exported with torch ", manifest.torch, ", this program has ", TORCH_VERSION,
         ": export it again, or build against a newer torch");
  }
}

class Package : public Program {
 public:
  Package(const Manifest& manifest, at::Device device) {
    check_torch(manifest);
    for (const auto& [name, function] : manifest.files) {
      loaders_[name] = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
          manifest.path(function), "model", false, 1, device.is_cpu() ? c10::DeviceIndex(-1) : device.index());
    }
  }

  Tensors run(const std::string& function, Tensors inputs) override {
    for (at::Tensor& input : inputs) input = input.contiguous();  // compiled for these strides, and not checked there
    return loaders_.at(function)->boxed_run(std::move(inputs));
  }

 private:
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> loaders_;
};

}  // namespace

std::unique_ptr<Program> open_package(const Manifest& manifest, at::Device device) {
  return std::make_unique<Package>(manifest, device);
}

}  // namespace dmm
