// dmm::decode_runs on CUDA tensors: the current stream, one launch, no wait for the device.
#include "../decode_runs.h"
#include "current_stream.h"
#include "decode_runs.cuh"

#include <torch/csrc/stable/ops.h>

namespace dmm {
namespace {

Tensor decode_runs(const Tensor& runs, int64_t height, int64_t width, int64_t rows, int64_t columns) {
  constexpr const char* op = "dmm::decode_runs";
  const DecodeRunsInputs in = check_decode_runs(runs, height, width, rows, columns);
  const CurrentStream current(runs);
  Tensor share = in.new_result();
  if (share.numel() == 0) return share;
  constexpr int64_t limit = 65535;
  DMM_CHECK(in.M <= limit && rows <= limit * grid::kRunRows && in.R < 1 << 30, op, ": M must be at most ", limit,
            ", rows at most ", limit * grid::kRunRows, " and R below 2^30 on CUDA, got [M, rows, columns] = ", shape_of(share),
            " and R = ", in.R);
  const grid::RunsProblem p{static_cast<const int32_t*>(in.runs.data_ptr()), in.M, static_cast<int>(in.R), in.y, in.x};
  grid::decode_runs(op, p, static_cast<float*>(share.data_ptr()), current.stream);
  return share;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmm, CUDA, m) { m.impl("decode_runs", TORCH_BOX(&decode_runs)); }

}  // namespace dmm
