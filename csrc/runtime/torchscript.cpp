// TorchScript: functions are methods of a module; their tuples and lists of tensors are packed from flat lists.
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <map>

#include "dmm/error.h"
#include "model.h"

namespace dmm {
namespace {

/// Take as many tensors from `at` on as a value of this type holds; a list takes all that are left.
c10::IValue pack(const c10::TypePtr& type, const Tensors& flat, size_t& at) {
  if (auto tuple = type->cast<c10::TupleType>()) {
    std::vector<c10::IValue> elements;
    for (const auto& element : tuple->elements()) elements.push_back(pack(element, flat, at));
    return c10::ivalue::Tuple::createNamed(std::move(elements), tuple);
  }
  if (type->cast<c10::ListType>()) {
    c10::List<at::Tensor> list;
    while (at < flat.size()) list.push_back(flat[at++]);
    return list;
  }
  if (at >= flat.size()) fail("a function takes more tensors than manifest.json lists");
  return flat[at++];
}

void unpack(const c10::IValue& value, Tensors& flat) {
  if (value.isTensor()) {
    flat.push_back(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorList().vec()) flat.push_back(tensor);
  } else if (value.isTuple()) {
    for (const auto& element : value.toTupleRef().elements()) unpack(element, flat);
  } else {
    fail("a function gives a ", value.tagKind(), ", not tensors alone");
  }
}

class TorchScript : public Program {
 public:
  TorchScript(const Manifest& manifest, at::Device device) {
    std::map<std::string, torch::jit::Module> modules;  // by file
    for (const auto& [name, function] : manifest.files) {
      auto found = modules.find(function.file);
      if (found == modules.end()) {
        found = modules.emplace(function.file, torch::jit::load(manifest.path(function), device)).first;
        found->second.eval();
      }
      auto method = found->second.find_method(name);
      if (!method) method = found->second.find_method("forward");  // of a file that holds this function alone
      if (!method) fail(manifest.path(function), ": has no method ", excerpt(name));
      methods_.emplace(name, *method);
    }
  }

  Tensors run(const std::string& function, Tensors inputs) override {
    const torch::jit::Method& method = methods_.at(function);
    const auto& arguments = method.function().getSchema().arguments();
    std::vector<c10::IValue> stack;
    size_t at = 0;
    for (size_t k = 1; k < arguments.size(); ++k) stack.push_back(pack(arguments[k].type(), inputs, at));  // 0 is the module
    if (at != inputs.size()) fail(function, ": takes fewer tensors than manifest.json lists");
    Tensors flat;
    unpack(method(std::move(stack)), flat);
    return flat;
  }

 private:
  std::map<std::string, torch::jit::Method> methods_;  // by function; each keeps its module alive
};

}  // namespace

std::unique_ptr<Program> open_torchscript(const Manifest& manifest, at::Device device) {
  return std::make_unique<TorchScript>(manifest, device);
}

}  // namespace dmm
