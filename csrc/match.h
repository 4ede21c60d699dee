// The matching problem as every backend sees it, and the checks none of them can be entered without.
//
// minimise Tr(C X^T)  over  X 1 = 1 (one proposal per template), X^T 1 <= 1, X >= 0, by projected gradient (Algorithm 1).
// The kernels use the dual form derived in docs/matching.md: after any number of Dykstra rounds from y0,
//     x[r, c] = relu(y0[r, c] - u[r] - v[c]).
#pragma once

#include "check.h"
#include "match_problem.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

namespace dmm {

inline constexpr const char* kMatchSchema =
    "match(Tensor cost, Tensor? init=None, Tensor? num_templates=None, Tensor? num_proposals=None, Tensor? lr_tensor=None, "
    "int n_grad=40, int n_proj=5, float lr=0.1, bool carry=False, bool last=False, Tensor? unmatched_cost=None) -> Tensor";
inline constexpr const char* kMatchBackwardSchema =
    "match_backward(Tensor grad, Tensor cost, Tensor? init, Tensor? num_templates, Tensor? num_proposals, Tensor? lr_tensor, "
    "int n_grad, int n_proj, float lr, bool carry, bool last, Tensor? unmatched_cost=None) "
    "-> (Tensor grad_cost, Tensor grad_init, Tensor grad_lr)";

// Checked, contiguous inputs. `cost` is [B, N, M] or [N, M] (then B = 1).
struct MatchInputs {
  Tensor cost;
  std::optional<Tensor> init, num_templates, num_proposals, lr;
  int64_t B, N, M;
  MatchOptions options;
  std::optional<Tensor> unmatched;  // [N] or [B, N]

  bool empty() const { return B == 0 || N == 0 || M == 0; }
  int64_t lr_stride() const { return lr && lr->dim() == 1 ? 1 : 0; }
  int64_t unmatched_stride() const { return unmatched && unmatched->dim() == 2 ? N : 0; }
};

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
}

// torch::stable::empty_like goes through the dispatcher, which costs more than a small problem's first gradient step.
inline Tensor new_like(const Tensor& contiguous) {
  const auto sizes = contiguous.sizes();
  const auto strides = contiguous.strides();
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(contiguous.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(contiguous.get(), &device_type));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, contiguous.get_device_index(), &result));
  return Tensor(result);
}

inline MatchInputs check_match(const char* op, const Tensor& cost, const std::optional<Tensor>& init,
                               const std::optional<Tensor>& num_templates, const std::optional<Tensor>& num_proposals,
                               const std::optional<Tensor>& lr_tensor, MatchOptions options,
                               const std::optional<Tensor>& unmatched_cost) {
  const int64_t dim = cost.dim();
  DMM_CHECK(dim == 2 || dim == 3, op, ": cost must have shape [B, N, M] or [N, M], got ", shape_of(cost));
  const ScalarType type = cost.scalar_type();
  DMM_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16,
            op, ": cost must be float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(type));
  const int64_t B = dim == 3 ? cost.size(0) : 1;
  if (init) {
    DMM_CHECK(same_shape(*init, cost), op, ": init must have the shape of cost ", shape_of(cost), ", got ", shape_of(*init));
    check_dtype(op, "init", *init, type);
    check_same_device(op, "init", *init, "cost", cost);
  }
  auto check_counts = [&](const char* name, const std::optional<Tensor>& counts) {
    if (!counts) return;
    DMM_CHECK(counts->dim() == 1 && counts->size(0) == B, op, ": ", name, " must have shape [", B, "], got ",
              shape_of(*counts));
    check_dtype(op, name, *counts, ScalarType::Long);
    check_same_device(op, name, *counts, "cost", cost);
  };
  check_counts("num_templates", num_templates);
  check_counts("num_proposals", num_proposals);
  if (lr_tensor) {
    DMM_CHECK(lr_tensor->dim() == 0 || (lr_tensor->dim() == 1 && lr_tensor->size(0) == B), op,
              ": lr_tensor must have shape [] or [", B, "], got ", shape_of(*lr_tensor));
    check_dtype(op, "lr_tensor", *lr_tensor, accumulate_type(type));
    check_same_device(op, "lr_tensor", *lr_tensor, "cost", cost);
  }
  DMM_CHECK(lr_tensor || (options.lr > 0 && std::isfinite(options.lr)), op, ": lr must be positive and finite, got ",
            options.lr);
  DMM_CHECK(options.n_grad >= 1, op, ": n_grad must be at least 1, got ", options.n_grad);
  DMM_CHECK(options.n_proj >= 1, op, ": n_proj must be at least 1, got ", options.n_proj);
  const int64_t N = cost.size(dim - 2), M = cost.size(dim - 1);
  if (unmatched_cost) {
    const Tensor& given = *unmatched_cost;
    const bool each = given.dim() == 2 && dim == 3 && given.size(0) == B && given.size(1) == N;
    DMM_CHECK((given.dim() == 1 && given.size(0) == N) || each, op, ": unmatched_cost must have shape [", N, "] or [", B, ", ",
              N, "], got ", shape_of(given));
    check_dtype(op, "unmatched_cost", given, accumulate_type(type));
    check_same_device(op, "unmatched_cost", given, "cost", cost);
  }
  return {as_contiguous(cost),
          as_contiguous(init),
          as_contiguous(num_templates),
          as_contiguous(num_proposals),
          as_contiguous(lr_tensor),
          B,
          N,
          M,
          options,
          as_contiguous(unmatched_cost)};
}

inline Tensor check_match_grad(const char* op, const Tensor& grad, const Tensor& cost) {
  DMM_CHECK(same_shape(grad, cost), op, ": grad must have the shape of cost ", shape_of(cost), ", got ", shape_of(grad));
  check_dtype(op, "grad", grad, cost.scalar_type());
  check_same_device(op, "grad", grad, "cost", cost);
  return as_contiguous(grad);
}

template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

template <typename T, typename Acc = T>
MatchProblem<T, Acc> problem_of(const MatchInputs& in) {
  return {static_cast<const T*>(in.cost.data_ptr()),
          data_of<T>(in.init),
          data_of<int64_t>(in.num_templates),
          data_of<int64_t>(in.num_proposals),
          data_of<Acc>(in.lr),
          in.lr_stride(),
          data_of<Acc>(in.unmatched),
          in.unmatched_stride(),
          in.B,
          in.N,
          in.M,
          in.options};
}

}  // namespace dmm
