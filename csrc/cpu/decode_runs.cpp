// Run-length codes to cells on the CPU. A walk along the runs writes down, in whole units, where the coverage of a column
// of cells rises and falls; sums down the rows make shares of it. Threads take different masks.
#include "../decode_runs.h"
#include "rows.h"

#include <algorithm>
#include <vector>

namespace dmm {
namespace {

// share = float(sum += rise) / area; rise is left 0.
DMM_ROW_LOOP void add_down(uint32_t* sum, uint32_t* rise, float* share, double per_unit, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    sum[c] += rise[c];
    rise[c] = 0;
    share[c] = static_cast<float>(static_cast<int32_t>(sum[c]) * per_unit);  // at most height * width units
  }
}

struct Rise {  // the cell where a pixel begins along y, and the units of that cell from there on
  int64_t cell;
  uint32_t units;
};

struct Decoder {
  const DecodeRunsInputs& in;
  std::vector<Rise> rises;          // [height + 1]
  std::vector<int64_t> first_cell;  // [width + 1], along x

  explicit Decoder(const DecodeRunsInputs& in) : in(in), rises(in.y.pixels + 1), first_cell(in.x.pixels + 1) {
    for (int64_t pixel = 0; pixel <= in.y.pixels; ++pixel) {
      const int64_t cell = in.y.cell_at(pixel);
      rises[pixel] = {cell, static_cast<uint32_t>((cell + 1) * in.y.pixels - pixel * in.y.cells)};
    }
    for (int64_t pixel = 0; pixel <= in.x.pixels; ++pixel) first_cell[pixel] = in.x.cell_at(pixel);
  }
};

// The rises of one mask, [rows, columns] modulo 2^32: the sum down to a cell is what the mask has of it. Reused, 0 between.
struct Canvas {
  const Decoder& decoder;
  std::vector<uint32_t> rise, sum;       // [rows, columns], [columns]
  int64_t left = 0, right = 0, top = 0;  // of the cells touched

  explicit Canvas(const Decoder& decoder)
      : decoder(decoder), rise(decoder.in.y.cells * decoder.in.x.cells), sum(decoder.in.x.cells) {}

  // The mask begins (or, with the negative weight, ends) at pixel row y of a column of which a cell has `weight` units.
  void add(int64_t y, int64_t column, uint32_t weight) {
    const Rise& at = decoder.rises[y];
    const int64_t rows = decoder.in.y.cells, columns = decoder.in.x.cells;
    if (at.cell >= rows) return;
    uint32_t* cell = rise.data() + at.cell * columns + column;
    *cell += weight * at.units;
    if (at.cell + 1 < rows) cell[columns] += weight * (static_cast<uint32_t>(decoder.in.y.pixels) - at.units);
  }

  // Pixels [begin, end) of pixel column x.
  void add_column(int64_t x, int64_t begin, int64_t end) {
    const CellAxis& axis = decoder.in.x;
    top = std::min(top, decoder.rises[begin].cell);
    for (int64_t c = decoder.first_cell[x]; c * axis.pixels < (x + 1) * axis.cells; ++c) {
      const auto weight = static_cast<uint32_t>(axis.shared(x, x + 1, c));
      add(begin, c, weight);
      add(end, c, 0 - weight);
    }
  }

  void decode(const int32_t* runs, float* share) {
    const DecodeRunsInputs& in = decoder.in;
    const int64_t height = in.y.pixels, area = height * in.x.pixels, rows = in.y.cells, columns = in.x.cells;
    left = columns, right = 0, top = rows;
    int64_t before = 0;  // positions never descend, whatever the runs say
    for (int64_t k = 0; k < in.R; k += 2) {
      const int64_t begin = std::clamp<int64_t>(runs[k], before, area);
      const int64_t end = k + 1 < in.R ? std::clamp<int64_t>(runs[k + 1], begin, area) : area;
      before = end;
      if (begin == area) break;
      if (begin == end) continue;
      const int64_t x0 = begin / height, x1 = (end - 1) / height;
      for (int64_t x = x0; x <= x1; ++x) add_column(x, x == x0 ? begin - x0 * height : 0, x == x1 ? end - x1 * height : height);
      left = std::min(left, decoder.first_cell[x0]);
      right = std::max(right, std::min(columns, decoder.first_cell[x1 + 1] + 1));
    }
    std::fill_n(share, rows * columns, 0.0f);
    if (left >= right) return;
    std::fill(sum.begin() + left, sum.begin() + right, 0);
    for (int64_t r = top; r < rows; ++r)
      add_down(sum.data() + left, rise.data() + r * columns + left, share + r * columns + left, 1.0 / static_cast<double>(area),
               right - left);
  }
};

Tensor decode_runs(const Tensor& runs, int64_t height, int64_t width, int64_t rows, int64_t columns) {
  const DecodeRunsInputs in = check_decode_runs(runs, height, width, rows, columns);
  Tensor share = in.new_result();
  if (share.numel() == 0) return share;
  const Decoder decoder(in);
  torch::stable::parallel_for(0, in.M, 1, [&](int64_t begin, int64_t end) {
    Canvas canvas(decoder);
    for (int64_t j = begin; j < end; ++j)
      canvas.decode(static_cast<const int32_t*>(in.runs.data_ptr()) + j * in.R,
                    static_cast<float*>(share.data_ptr()) + j * rows * columns);
  });
  return share;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmm, m) { m.def(kDecodeRunsSchema); }

STABLE_TORCH_LIBRARY_IMPL(dmm, CPU, m) { m.impl("decode_runs", TORCH_BOX(&decode_runs)); }

}  // namespace dmm
