// Pasted, thresholded and counted per cell on the CPU. Each mask is stretched along x once ([S, box width], small); a row
// of sample points inside the box is a blend of two of its rows. Threads take different masks; work follows their boxes.
#include "../paste_masks.h"
#include "rows.h"

#include <algorithm>
#include <vector>

namespace dmm {
namespace {

#define DMM_ROW_LOOPS(T)                                                                       \
  /* counts += w0 * a + w1 * b > 1/2 */                                                        \
  DMM_ROW_LOOP void count_above(T* counts, T w0, const T* a, T w1, const T* b, int64_t n) {    \
    for (int64_t x = 0; x < n; ++x) counts[x] += w0 * a[x] + w1 * b[x] > T(0.5) ? T(1) : T(0); \
  }                                                                                            \
  DMM_ROW_LOOP void divide(T* counts, T by, int64_t n) {                                       \
    for (int64_t x = 0; x < n; ++x) counts[x] /= by;                                           \
  }
DMM_ROW_LOOPS(float)
DMM_ROW_LOOPS(double)
#undef DMM_ROW_LOOPS

// cover [rows, columns] of mask j, all 0 before. stretched: scratch.
template <typename T>
void paste(const PasteMasksInputs& in, int64_t j, T* cover, std::vector<T>& stretched) {
  const int S = static_cast<int>(in.S), samples = static_cast<int>(in.samples);
  const T* box = static_cast<const T*>(in.boxes.data_ptr()) + 4 * j;
  const T* mask = static_cast<const T*>(in.masks.data_ptr()) + j * in.S * in.S;
  const T scale = static_cast<T>(samples);
  const PasteAxis<T> x = paste_axis(box[0] * scale, box[2] * scale, S, in.columns * samples);
  const PasteAxis<T> y = paste_axis(box[1] * scale, box[3] * scale, S, in.rows * samples);
  if (x.empty() || y.empty()) return;
  const int left = x.begin / samples, right = (x.end - 1) / samples + 1;
  const int top = y.begin / samples, bottom = (y.end - 1) / samples + 1;

  // [S, samples, width]: the k-th points of all cells side by side, so that counts add up without shuffling.
  const int64_t width = right - left;
  stretched.resize(S * samples * width);
  const auto row = [&](int cell, int k) { return stretched.data() + (cell * static_cast<int64_t>(samples) + k) * width; };
  for (int k = 0; k < samples; ++k)
    for (int64_t c = 0; c < width; ++c) {
      const Tap<T> tap = x.tap(static_cast<int>((left + c) * samples + k), S);
      for (int s = 0; s < S; ++s)
        row(s, k)[c] = tap.weight0 * mask[s * in.S + tap.cell0] + tap.weight1 * mask[s * in.S + tap.cell1];
    }
  for (int r = top; r < bottom; ++r) {
    T* counts = cover + r * in.columns + left;
    for (int k = 0; k < samples; ++k) {
      const Tap<T> tap = y.tap(r * samples + k, S);
      for (int kx = 0; kx < samples; ++kx)
        count_above(counts, tap.weight0, row(tap.cell0, kx), tap.weight1, row(tap.cell1, kx), width);
    }
    divide(counts, scale * scale, width);
  }
}

template <typename T>
void paste_all(const PasteMasksInputs& in, T* cover) {
  const int64_t plane = in.rows * in.columns;
  torch::stable::parallel_for(0, in.M, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> stretched;
    for (int64_t j = begin; j < end; ++j) {
      std::fill_n(cover + j * plane, plane, T(0));
      paste(in, j, cover + j * plane, stretched);
    }
  });
}

Tensor paste_masks(const Tensor& masks, const Tensor& boxes, int64_t rows, int64_t columns, int64_t samples) {
  PasteMasksInputs in = check_paste_masks(masks, boxes, rows, columns, samples);
  const ScalarType type = masks.scalar_type();
  in.masks = to_compute(in.masks);
  Tensor cover = torch::stable::new_empty(in.masks, {in.M, rows, columns});
  if (type == ScalarType::Double)
    paste_all(in, static_cast<double*>(cover.data_ptr()));
  else
    paste_all(in, static_cast<float*>(cover.data_ptr()));
  return is_half(type) ? torch::stable::to(cover, type) : cover;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmm, m) { m.def(kPasteMasksSchema); }

STABLE_TORCH_LIBRARY_IMPL(dmm, CPU, m) { m.impl("paste_masks", TORCH_BOX(&paste_masks)); }

}  // namespace dmm
