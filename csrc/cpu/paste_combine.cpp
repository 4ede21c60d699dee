// Eq. 8 on the CPU. A pasted mask is separable, so each used mask is stretched along x once ([S, box width], small),
// and an image row inside the box is a blend of two of its rows. Work follows the areas of the boxes; zero assignments
// cost nothing.
#include "../paste_combine.h"
#include "rows.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

namespace dmm {
namespace {

constexpr int64_t kBandRows = 4;  // image rows that are cleared and then added to while they are in cache
constexpr int64_t kGroup = 5;     // proposals that go down a gradient together, its rows read once for all of them

#define DMM_ROW_LOOPS(T)                                                               \
  /* out += w0 * a + w1 * b */                                                         \
  DMM_ROW_LOOP void add_blend(T* out, T w0, const T* a, T w1, const T* b, int64_t n) { \
    for (int64_t x = 0; x < n; ++x) out[x] += w0 * a[x] + w1 * b[x];                   \
  }                                                                                    \
  DMM_ROW_LOOP void blend(T* out, T w0, const T* a, T w1, const T* b, int64_t n) {     \
    for (int64_t x = 0; x < n; ++x) out[x] = w0 * a[x] + w1 * b[x];                    \
  }                                                                                    \
  DMM_ROW_LOOP void add_scaled(T* out, T w, const T* a, int64_t n) {                   \
    for (int64_t x = 0; x < n; ++x) out[x] += w * a[x];                                \
  }                                                                                    \
  DMM_ROW_LOOP T dot(const T* a, const T* b, int64_t n) {                              \
    constexpr int kLanes = 32;                                                         \
    T lanes[kLanes] = {};                                                              \
    int64_t x = 0;                                                                     \
    for (; x + kLanes <= n; x += kLanes)                                               \
      for (int k = 0; k < kLanes; ++k) lanes[k] += a[x + k] * b[x + k];                \
    for (int k = 0; x < n; ++x, ++k) lanes[k] += a[x] * b[x];                          \
    for (int half = kLanes / 2; half > 0; half /= 2)                                   \
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];                      \
    return lanes[0];                                                                   \
  }
DMM_ROW_LOOPS(float)
DMM_ROW_LOOPS(double)
#undef DMM_ROW_LOOPS

// A mask stretched along x over the pixels its box touches.
template <typename T>
struct Stretched {
  PasteAxis<T> x, y;
  std::vector<Tap<T>> taps;                  // [width]
  std::unique_ptr<T[]> rows;                 // [S, width]
  std::vector<std::pair<int64_t, T>> users;  // the templates whose assignment is not 0, and that

  int64_t width() const { return x.end - x.begin; }
  const T* row(int cell) const { return rows.get() + cell * width(); }
  bool empty() const { return x.empty() || y.empty(); }

  Stretched(const T* box, const PasteInputs& in)
      : x(paste_axis(box[0], box[2], in.S, in.W)), y(paste_axis(box[1], box[3], in.S, in.H)) {}

  void find_users(const PasteInputs& in, int64_t j) {
    const T* assignment = static_cast<const T*>(in.assignment.data_ptr());
    for (int64_t i = 0; i < in.N; ++i)
      if (const T weight = assignment[i * in.M + j]; weight != 0) users.emplace_back(i, weight);
  }

  void stretch(const T* mask, int S) {
    taps.resize(width());
    for (int64_t k = 0; k < width(); ++k) taps[k] = x.tap(static_cast<int>(x.begin + k), S);
    rows.reset(new T[S * width()]);
    for (int s = 0; s < S; ++s, mask += S) {
      T* row = rows.get() + s * width();
      for (int64_t k = 0; k < width(); ++k)
        row[k] = taps[k].weight0 * mask[taps[k].cell0] + taps[k].weight1 * mask[taps[k].cell1];
    }
  }
};

// What one proposal adds to image row y, of every template that uses it; `image_row` is that row of template 0.
template <typename T>
void add_row(const PasteInputs& in, const Stretched<T>& mask, int64_t y, T* image_row, T* pasted) {
  const Tap<T> tap = mask.y.tap(static_cast<int>(y), in.S);
  const T *row0 = mask.row(tap.cell0), *row1 = mask.row(tap.cell1);
  const int64_t plane = in.H * in.W;
  T* at = image_row + mask.x.begin;
  if (mask.users.size() == 1) {
    const auto [i, weight] = mask.users[0];
    return add_blend(at + i * plane, weight * tap.weight0, row0, weight * tap.weight1, row1, mask.width());
  }
  blend(pasted, tap.weight0, row0, tap.weight1, row1, mask.width());
  for (const auto& [i, weight] : mask.users) add_scaled(at + i * plane, weight, pasted, mask.width());
}

template <typename T>
void forward(const PasteInputs& in, T* out) {
  const T* boxes = static_cast<const T*>(in.boxes.data_ptr());
  const T* masks = static_cast<const T*>(in.masks.data_ptr());
  std::vector<Stretched<T>> used;
  std::vector<int64_t> used_index;
  for (int64_t j = 0; j < in.M; ++j) {
    Stretched<T> mask(boxes + 4 * j, in);
    if (mask.empty()) continue;
    mask.find_users(in, j);
    if (mask.users.empty()) continue;
    used.push_back(std::move(mask));
    used_index.push_back(j);
  }
  const int64_t count = static_cast<int64_t>(used.size());
  torch::stable::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) used[k].stretch(masks + used_index[k] * in.S * in.S, in.S);
  });

  const int64_t bands = (in.H + kBandRows - 1) / kBandRows;
  torch::stable::parallel_for(0, bands, 2, [&](int64_t begin, int64_t end) {
    std::vector<T> pasted(in.W);
    for (int64_t top = begin * kBandRows; top < std::min(in.H, end * kBandRows); top += kBandRows) {
      const int64_t bottom = std::min(in.H, top + kBandRows);
      for (int64_t i = 0; i < in.N; ++i) std::fill(out + (i * in.H + top) * in.W, out + (i * in.H + bottom) * in.W, T(0));
      for (int64_t y = top; y < bottom; ++y)
        for (const Stretched<T>& mask : used)
          if (mask.y.begin <= y && y < mask.y.end) add_row(in, mask, y, out + y * in.W, pasted.data());
    }
  });
}

// The gradients of one proposal, row by row: its column of grad_assignment and, if any template uses it, grad_mask.
// With P the pasted mask:    dX_i = <dOut_i, P>        dMask = Ay^T (sum_i X_i dOut_i) Ax
template <typename T>
struct ProposalGradient {
  Stretched<T> mask;
  std::vector<T> pasted, combined, cells;  // [width], [width], [S, width]: Ay^T (sum_i X_i dOut_i)
  std::vector<double> column;              // [N]

  ProposalGradient(const PasteInputs& in, int64_t j)
      : mask(static_cast<const T*>(in.boxes.data_ptr()) + 4 * j, in), column(in.N) {
    if (mask.empty()) return;
    mask.find_users(in, j);
    mask.stretch(static_cast<const T*>(in.masks.data_ptr()) + j * in.S * in.S, in.S);
    pasted.resize(mask.width());
    if (mask.users.empty()) return;
    combined.resize(mask.width());
    cells.resize(in.S * mask.width());
  }

  // grad_row: row y of template 0.
  void add_row(const PasteInputs& in, int64_t y, const T* grad_row) {
    if (mask.empty() || y < mask.y.begin || y >= mask.y.end) return;
    const int64_t width = mask.width(), plane = in.H * in.W;
    const Tap<T> tap = mask.y.tap(static_cast<int>(y), in.S);
    const T* at = grad_row + mask.x.begin;
    blend(pasted.data(), tap.weight0, mask.row(tap.cell0), tap.weight1, mask.row(tap.cell1), width);
    for (int64_t i = 0; i < in.N; ++i) column[i] += dot(at + i * plane, pasted.data(), width);
    if (mask.users.empty()) return;
    std::fill(combined.begin(), combined.end(), T(0));
    for (const auto& [i, weight] : mask.users) add_scaled(combined.data(), weight, at + i * plane, width);
    add_scaled(cells.data() + tap.cell0 * width, tap.weight0, combined.data(), width);
    add_scaled(cells.data() + tap.cell1 * width, tap.weight1, combined.data(), width);
  }

  void finish(const PasteInputs& in, int64_t j, T* grad_assignment, T* grad_mask) const {
    for (int64_t i = 0; i < in.N; ++i) grad_assignment[i * in.M + j] = static_cast<T>(column[i]);
    std::fill_n(grad_mask, in.S * in.S, T(0));
    if (mask.empty() || mask.users.empty()) return;
    const int64_t width = mask.width();
    for (int64_t s = 0; s < in.S; ++s)
      for (int64_t k = 0; k < width; ++k) {
        const Tap<T>& tap = mask.taps[k];
        grad_mask[s * in.S + tap.cell0] += tap.weight0 * cells[s * width + k];
        grad_mask[s * in.S + tap.cell1] += tap.weight1 * cells[s * width + k];
      }
  }
};

template <typename T>
void backward(const PasteBackwardInputs& in, T* grad_assignment, T* grad_masks) {
  const T* grad = static_cast<const T*>(in.grad.data_ptr());
  const int64_t groups = (in.M + kGroup - 1) / kGroup;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kGroup, last = std::min(in.M, first + kGroup);
      std::vector<ProposalGradient<T>> proposals;
      proposals.reserve(last - first);
      int64_t top = in.H, bottom = 0;
      for (int64_t j = first; j < last; ++j) {
        const auto& mask = proposals.emplace_back(in, j).mask;
        if (mask.empty()) continue;
        top = std::min<int64_t>(top, mask.y.begin);
        bottom = std::max<int64_t>(bottom, mask.y.end);
      }
      for (int64_t y = top; y < bottom; ++y)
        for (auto& proposal : proposals) proposal.add_row(in, y, grad + y * in.W);
      for (int64_t j = first; j < last; ++j) proposals[j - first].finish(in, j, grad_assignment, grad_masks + j * in.S * in.S);
    }
  });
}

Tensor paste_combine(const Tensor& assignment, const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width) {
  PasteInputs in = check_paste("dmm::paste_combine", assignment, masks, boxes, height, width);
  const ScalarType type = assignment.scalar_type();
  in.assignment = to_compute(in.assignment);
  in.masks = to_compute(in.masks);
  Tensor out = torch::stable::new_empty(in.assignment, {in.N, in.H, in.W});
  if (type == ScalarType::Double)
    forward(in, static_cast<double*>(out.data_ptr()));
  else
    forward(in, static_cast<float*>(out.data_ptr()));
  return is_half(type) ? torch::stable::to(out, type) : out;
}

std::tuple<Tensor, Tensor> paste_combine_backward(const Tensor& grad, const Tensor& assignment, const Tensor& masks,
                                                  const Tensor& boxes) {
  PasteBackwardInputs in = check_paste_backward(grad, assignment, masks, boxes);
  const ScalarType type = assignment.scalar_type();
  in.grad = to_compute(in.grad);
  in.assignment = to_compute(in.assignment);
  in.masks = to_compute(in.masks);
  Tensor grad_assignment = torch::stable::new_empty(in.assignment, {in.N, in.M});
  Tensor grad_masks = torch::stable::new_empty(in.masks, {in.M, in.S, in.S});
  if (type == ScalarType::Double)
    backward(in, static_cast<double*>(grad_assignment.data_ptr()), static_cast<double*>(grad_masks.data_ptr()));
  else
    backward(in, static_cast<float*>(grad_assignment.data_ptr()), static_cast<float*>(grad_masks.data_ptr()));
  if (is_half(type)) return {torch::stable::to(grad_assignment, type), torch::stable::to(grad_masks, type)};
  return {grad_assignment, grad_masks};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmm, m) {
  m.def(kPasteCombineSchema);
  m.def(kPasteCombineBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(dmm, CPU, m) {
  m.impl("paste_combine", TORCH_BOX(&paste_combine));
  m.impl("paste_combine_backward", TORCH_BOX(&paste_combine_backward));
}

}  // namespace dmm
