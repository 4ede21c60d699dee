// How much of each cell of a grid a mask in run-length code covers, exactly and without the full-size mask.
// What every backend is given, and the checks none of them can be entered without.
#pragma once

#include "cell_geometry.h"
#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace dmm {

inline constexpr const char* kDecodeRunsSchema =
    "decode_runs(Tensor runs, SymInt height, SymInt width, SymInt rows, SymInt columns) -> Tensor";

struct DecodeRunsInputs {
  Tensor runs;  // [M, R], contiguous
  int64_t M, R;
  CellAxis y, x;

  Tensor new_result() const { return torch::stable::new_empty(runs, {M, y.cells, x.cells}, ScalarType::Float); }
};

inline DecodeRunsInputs check_decode_runs(const Tensor& runs, int64_t height, int64_t width, int64_t rows, int64_t columns) {
  constexpr const char* op = "dmm::decode_runs";
  DMM_CHECK(runs.dim() == 2, op, ": runs must have shape [M, R], got ", shape_of(runs));
  check_dtype(op, "runs", runs, ScalarType::Int);
  constexpr int64_t limit = int64_t{1} << 16;
  DMM_CHECK(0 < height && height < limit && 0 < width && width < limit && height * width < int64_t(1) << 31, op,
            ": height and width must be in [1, 2^16), their product below 2^31, got ", height, " and ", width);
  DMM_CHECK(0 <= rows && rows < limit && 0 <= columns && columns < limit, op, ": rows and columns must be in [0, 2^16), got ",
            rows, " and ", columns);
  return {torch::stable::contiguous(runs), runs.size(0), runs.size(1), {height, rows}, {width, columns}};
}

}  // namespace dmm
