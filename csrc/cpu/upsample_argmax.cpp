// Labels from small logits on the CPU. A row of pixels is interpolated along y only at the columns of the logits. Between
// two columns every logit is linear: where the same one is highest at both it is so in between, and the row is filled; only
// where they differ are pixels looked at one by one. Threads take different rows.
#include "../upsample_argmax.h"
#include "rows.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace dmm {
namespace {

constexpr int kPixels = 64;  // labelled together

#define DMM_ROW_LOOPS(T)                                                                                                   \
  /* values = w0 * a + w1 * b; where that is above the highest so far, it is and its label takes the place */              \
  DMM_ROW_LOOP void contend(T* values, T* highest, int32_t* labels, T w0, const T* a, T w1, const T* b, int32_t label,     \
                            int64_t n) {                                                                                   \
    for (int64_t x = 0; x < n; ++x) {                                                                                      \
      const T value = w0 * a[x] + w1 * b[x];                                                                               \
      values[x] = value;                                                                                                   \
      labels[x] = value > highest[x] ? label : labels[x];                                                                  \
      highest[x] = value > highest[x] ? value : highest[x];                                                                \
    }                                                                                                                      \
  }                                                                                                                        \
  /* labels of n <= kPixels pixels between two columns, at which logit k has the values ends[k * w] and ends[k * w + 1] */ \
  DMM_ROW_LOOP void decide(uint8_t* labels, const T* weight, const T* ends, int64_t w, const int32_t* used, int64_t count, \
                           int64_t n) {                                                                                    \
    T highest[kPixels];                                                                                                    \
    int32_t best[kPixels];                                                                                                 \
    for (int64_t x = 0; x < n; ++x) highest[x] = 0, best[x] = 0;                                                           \
    for (int64_t k = 0; k < count; ++k, ends += w) {                                                                       \
      const T first = ends[0], second = ends[1];                                                                           \
      const int32_t label = used[k];                                                                                       \
      for (int64_t x = 0; x < n; ++x) {                                                                                    \
        const T value = (T(1) - weight[x]) * first + weight[x] * second;                                                   \
        best[x] = value > highest[x] ? label : best[x];                                                                    \
        highest[x] = value > highest[x] ? value : highest[x];                                                              \
      }                                                                                                                    \
    }                                                                                                                      \
    for (int64_t x = 0; x < n; ++x) labels[x] = static_cast<uint8_t>(best[x]);                                             \
  }
DMM_ROW_LOOPS(float)
DMM_ROW_LOOPS(double)
#undef DMM_ROW_LOOPS

template <typename T>
struct Labeller {
  const UpsampleInputs& in;
  std::vector<int32_t> order;        // of the logits: of equal values the first wins
  std::vector<char> positive;        // [N, h]: whether a row of logits has a value above 0
  std::vector<int64_t> first_pixel;  // [w + 1]: of those between columns i and i + 1
  std::vector<T> weight;             // [W]: of column i + 1

  explicit Labeller(const UpsampleInputs& in)
      : in(in), order(in.N), positive(in.N * in.h), first_pixel(in.w + 1, in.W), weight(in.W) {
    const auto* rank = static_cast<const int64_t*>(in.rank.data_ptr());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return rank[a] > rank[b]; });
    torch::stable::parallel_for(0, in.N * in.h, 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        positive[row] = std::any_of(logits(row), logits(row) + in.w, [](T value) { return value > T(0); });
    });
    for (int64_t x = in.W - 1; x >= 0; --x) {
      const Between<T> place = between<T>(x, in.w, in.W);
      weight[x] = place.weight;
      first_pixel[place.first] = x;
    }
    for (int64_t i = in.w - 1; i >= 0; --i) first_pixel[i] = std::min(first_pixel[i], first_pixel[i + 1]);
  }

  const T* logits(int64_t row) const { return static_cast<const T*>(in.logits.data_ptr()) + row * in.w; }
};

template <typename T>
struct Row {  // what a thread needs for one row of pixels
  const Labeller<T>& labeller;
  std::vector<T> values, highest;  // [N, w] of the logits that have a chance, [w]
  std::vector<int32_t> used;       // their labels
  std::vector<int32_t> best;       // [w]: the label at each column

  explicit Row(const Labeller<T>& labeller)
      : labeller(labeller), values(labeller.in.N * labeller.in.w), highest(labeller.in.w), best(labeller.in.w) {}

  void label(int64_t y, uint8_t* labels) {
    const UpsampleInputs& in = labeller.in;
    const Between<T> place = between<T>(y, in.h, in.H);
    used.clear();
    for (int32_t n : labeller.order) {
      const int64_t first = n * in.h + place.first, second = n * in.h + place.second;
      if (!labeller.positive[first] && !labeller.positive[second]) continue;
      if (used.empty()) {
        std::fill(highest.begin(), highest.end(), T(0));
        std::fill(best.begin(), best.end(), 0);
      }
      contend(values.data() + used.size() * in.w, highest.data(), best.data(), T(1) - place.weight, labeller.logits(first),
              place.weight, labeller.logits(second), n + 1, in.w);
      used.push_back(n + 1);
    }
    if (used.empty()) return static_cast<void>(std::memset(labels, 0, in.W));
    int64_t filled = 0;
    for (int64_t i = 0; i < in.w; ++i) {
      if (i + 1 < in.w && best[i] == best[i + 1]) continue;  // the row goes on with this label
      const int64_t begin = labeller.first_pixel[i], end = labeller.first_pixel[i + 1];
      // Up to this column it is best[i]; beyond the last column that stays.
      std::memset(labels + filled, best[i], (i + 1 < in.w ? begin : end) - filled);
      if (i + 1 < in.w) between_columns(i, begin, end, labels);
      filled = end;
    }
  }

  // Pixels [begin, end), between columns i and i + 1.
  void between_columns(int64_t i, int64_t begin, int64_t end, uint8_t* labels) const {
    const int64_t w = labeller.in.w;
    for (int64_t x = begin; x < end; x += kPixels) {
      const int64_t n = std::min<int64_t>(kPixels, end - x);
      decide(labels + x, labeller.weight.data() + x, values.data() + i, w, used.data(), used.size(), n);
    }
  }
};

template <typename T>
void label_all(const UpsampleInputs& in, uint8_t* labels) {
  const Labeller<T> labeller(in);
  torch::stable::parallel_for(0, in.H, 16, [&](int64_t begin, int64_t end) {
    Row<T> row(labeller);
    for (int64_t y = begin; y < end; ++y) row.label(y, labels + y * in.W);
  });
}

Tensor upsample_argmax(const Tensor& logits, const Tensor& rank, int64_t height, int64_t width) {
  UpsampleInputs in = check_upsample_argmax(logits, rank, height, width);
  in.logits = to_compute(in.logits);
  Tensor labels = in.new_result();
  if (labels.numel() == 0) return labels;
  if (in.logits.scalar_type() == ScalarType::Double)
    label_all<double>(in, static_cast<uint8_t*>(labels.data_ptr()));
  else
    label_all<float>(in, static_cast<uint8_t*>(labels.data_ptr()));
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmm, m) { m.def(kUpsampleArgmaxSchema); }

STABLE_TORCH_LIBRARY_IMPL(dmm, CPU, m) { m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax)); }

}  // namespace dmm
