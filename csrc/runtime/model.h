// An export at work: its functions on flat lists of tensors, in the manifest's order.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "dmm/manifest.h"

namespace dmm {

using Tensors = std::vector<at::Tensor>;

/// Which kind of proposals' masks these are, by dtype: "full", "runs" or "soft" (see Proposals).
std::string mask_kind(const at::Tensor& masks);

class Program {
 public:
  virtual ~Program() = default;
  virtual Tensors run(const std::string& function, Tensors inputs) = 0;
};

/// What one format takes to run; throws Error or c10::Error.
std::unique_ptr<Program> open_torchscript(const Manifest& manifest, at::Device device);
std::unique_ptr<Program> open_package(const Manifest& manifest, at::Device device);

class Model {
 public:
  Model(Manifest manifest, const std::string& device, const std::string& ops);

  /// Run a function; what goes in and comes out is checked against the manifest.
  Tensors call(const std::string& function, Tensors inputs);

  const Manifest& manifest() const { return manifest_; }
  at::Device device() const { return device_; }

  /// Smallest and largest value of the size `axis` of an input.
  std::pair<int64_t, int64_t> limits(const std::string& function, size_t input, size_t axis) const;

 private:
  void check(const std::string& function, const std::vector<TensorSpec>& specs, const Tensors& tensors) const;

  Manifest manifest_;
  at::Device device_;
  std::unique_ptr<Program> program_;
};

}  // namespace dmm
