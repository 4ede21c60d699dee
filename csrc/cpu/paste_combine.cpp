// Eq. 8 on the CPU. A pasted mask is separable, so each used mask is stretched along x once ([S, box width], small), and an
// image row inside the box is a blend of two of its rows. Work follows the areas of the boxes; zero assignments cost nothing.
#include "../paste_combine.h"

#include <algorithm>
#include <memory>
#include <vector>

// The row loops below are plain; the compiler vectorises them once per instruction set and the loader picks.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define DMM_ROW_LOOP __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define DMM_ROW_LOOP
#endif

namespace dmm {
namespace {

constexpr int64_t kBandRows = 16;  // image rows that one task writes: 54 KB of a float image 854 wide

#define DMM_ROW_LOOPS(T)                                                                                       \
  /* out += w0 * a + w1 * b */                                                                                 \
  DMM_ROW_LOOP void add_blend(T* out, T w0, const T* a, T w1, const T* b, int64_t n) {                         \
    for (int64_t x = 0; x < n; ++x) out[x] += w0 * a[x] + w1 * b[x];                                           \
  }                                                                                                            \
  DMM_ROW_LOOP void blend(T* out, T w0, const T* a, T w1, const T* b, int64_t n) {                             \
    for (int64_t x = 0; x < n; ++x) out[x] = w0 * a[x] + w1 * b[x];                                            \
  }                                                                                                            \
  DMM_ROW_LOOP void add_scaled(T* out, T w, const T* a, int64_t n) {                                           \
    for (int64_t x = 0; x < n; ++x) out[x] += w * a[x];                                                        \
  }                                                                                                            \
  DMM_ROW_LOOP double dot(const T* a, const T* b, int64_t n) {                                                 \
    constexpr int kLanes = 32;                                                                                 \
    T lanes[kLanes] = {};                                                                                      \
    int64_t x = 0;                                                                                             \
    for (; x + kLanes <= n; x += kLanes)                                                                       \
      for (int k = 0; k < kLanes; ++k) lanes[k] += a[x + k] * b[x + k];                                        \
    double sum = 0;                                                                                            \
    for (; x < n; ++x) sum += a[x] * b[x];                                                                     \
    for (int k = 0; k < kLanes; ++k) sum += lanes[k];                                                          \
    return sum;                                                                                                \
  }
DMM_ROW_LOOPS(float)
DMM_ROW_LOOPS(double)
#undef DMM_ROW_LOOPS

// A mask stretched along x over the pixels its box touches.
template <typename T>
struct Stretched {
  PasteAxis<T> x, y;
  std::vector<Tap<T>> taps;   // [width]
  std::unique_ptr<T[]> rows;  // [S, width]

  int64_t width() const { return x.end - x.begin; }
  const T* row(int cell) const { return rows.get() + cell * width(); }
  bool empty() const { return x.empty() || y.empty(); }

  Stretched(const T* box, const PasteInputs& in)
      : x(paste_axis(box[0], box[2], in.S, in.W)), y(paste_axis(box[1], box[3], in.S, in.H)) {}

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

template <typename T>
void forward(const PasteInputs& in, T* out) {
  const T* assignment = static_cast<const T*>(in.assignment.data_ptr());
  const T* masks = static_cast<const T*>(in.masks.data_ptr());
  const T* boxes = static_cast<const T*>(in.boxes.data_ptr());
  std::vector<Stretched<T>> stretched;
  stretched.reserve(in.M);

  std::vector<int64_t> used;                     // proposals that appear at all
  std::vector<std::vector<int64_t>> parts(in.N);  // those of each template
  for (int64_t j = 0; j < in.M; ++j) {
    stretched.emplace_back(boxes + 4 * j, in);
    bool any = false;
    for (int64_t i = 0; i < in.N && !stretched[j].empty(); ++i)
      if (assignment[i * in.M + j] != 0) {
        parts[i].push_back(j);
        any = true;
      }
    if (any) used.push_back(j);
  }
  torch::stable::parallel_for(0, used.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) stretched[used[k]].stretch(masks + used[k] * in.S * in.S, in.S);
  });

  const int64_t bands = (in.H + kBandRows - 1) / kBandRows;
  torch::stable::parallel_for(0, in.N * bands, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / bands, top = task % bands * kBandRows, bottom = std::min(in.H, top + kBandRows);
      T* image = out + i * in.H * in.W;
      std::fill(image + top * in.W, image + bottom * in.W, T(0));
      for (int64_t j : parts[i]) {
        const Stretched<T>& mask = stretched[j];
        const T weight = assignment[i * in.M + j];
        for (int64_t y = std::max<int64_t>(top, mask.y.begin); y < std::min<int64_t>(bottom, mask.y.end); ++y) {
          const Tap<T> tap = mask.y.tap(static_cast<int>(y), in.S);
          add_blend(image + y * in.W + mask.x.begin, weight * tap.weight0, mask.row(tap.cell0), weight * tap.weight1,
                    mask.row(tap.cell1), mask.width());
        }
      }
    }
  });
}

// One proposal: its column of grad_assignment, and grad_mask if any template uses it. P = the pasted mask:
//     dX_i = <dOut_i, P>        dMask = Ay^T (sum_i X_i dOut_i) Ax
template <typename T>
void backward_of(const PasteInputs& in, int64_t j, const T* grad, Stretched<T>& mask, T* grad_assignment, T* grad_mask) {
  const T* assignment = static_cast<const T*>(in.assignment.data_ptr());
  mask.stretch(static_cast<const T*>(in.masks.data_ptr()) + j * in.S * in.S, in.S);
  const int64_t width = mask.width();
  std::vector<int64_t> users;
  for (int64_t i = 0; i < in.N; ++i)
    if (assignment[i * in.M + j] != 0) users.push_back(i);

  std::vector<T> pasted(width), combined(width), cells(users.empty() ? 0 : in.S * width);
  std::vector<double> column(in.N);
  for (int y = mask.y.begin; y < mask.y.end; ++y) {
    const Tap<T> tap = mask.y.tap(y, in.S);
    blend(pasted.data(), tap.weight0, mask.row(tap.cell0), tap.weight1, mask.row(tap.cell1), width);
    const T* grad_row = grad + y * in.W + mask.x.begin;  // of template 0
    for (int64_t i = 0; i < in.N; ++i) column[i] += dot(grad_row + i * in.H * in.W, pasted.data(), width);
    if (users.empty()) continue;
    std::fill(combined.begin(), combined.end(), T(0));
    for (int64_t i : users) add_scaled(combined.data(), assignment[i * in.M + j], grad_row + i * in.H * in.W, width);
    add_scaled(cells.data() + tap.cell0 * width, tap.weight0, combined.data(), width);
    add_scaled(cells.data() + tap.cell1 * width, tap.weight1, combined.data(), width);
  }
  for (int64_t i = 0; i < in.N; ++i) grad_assignment[i * in.M + j] = static_cast<T>(column[i]);
  if (users.empty()) return;
  for (int64_t s = 0; s < in.S; ++s)
    for (int64_t k = 0; k < width; ++k) {
      const Tap<T>& tap = mask.taps[k];
      grad_mask[s * in.S + tap.cell0] += tap.weight0 * cells[s * width + k];
      grad_mask[s * in.S + tap.cell1] += tap.weight1 * cells[s * width + k];
    }
}

template <typename T>
void backward(const PasteBackwardInputs& in, T* grad_assignment, T* grad_masks) {
  std::fill_n(grad_assignment, in.N * in.M, T(0));
  std::fill_n(grad_masks, in.M * in.S * in.S, T(0));
  const T* grad = static_cast<const T*>(in.grad.data_ptr());
  const T* boxes = static_cast<const T*>(in.boxes.data_ptr());
  torch::stable::parallel_for(0, in.M, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      Stretched<T> mask(boxes + 4 * j, in);
      if (!mask.empty()) backward_of(in, j, grad, mask, grad_assignment, grad_masks + j * in.S * in.S);
    }
  });
}

bool is_half(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

// Half types are stored, never computed in.
Tensor to_compute(const Tensor& tensor) { return is_half(tensor.scalar_type()) ? torch::stable::to(tensor, ScalarType::Float) : tensor; }

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
