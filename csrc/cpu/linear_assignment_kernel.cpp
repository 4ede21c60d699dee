// The exact assignment on vector lanes: csrc/assignment_solver.h on one thread, whose loops over columns run in double
// precision, also for a float cost: its sums are exact then for costs of one magnitude.
//
// A problem is copied first, its shorter side as rows, padded to whole vectors: what is absent or not finite costs infinity,
// and nothing else needs a mask.
#include "linear_assignment_kernel.h"

#include "../assignment_solver.h"
#include "match_group.h"

#include <algorithm>
#include <cmath>

namespace dmm::DMM_ISA {
namespace {

constexpr int W = kLanes<double>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }  // whole vectors of float, too

template <typename T>
class OneThread {
 public:
  int32_t rows = 0, columns = 0;
  bool chooses = false;

  explicit OneThread(const AssignmentProblem<T>& problem)
      : p_(problem),
        rows_(std::min(p_.N, p_.M)),
        columns_(padded(std::max(p_.N, p_.M))),
        scratch_(sizeof(double) * (4 * columns_ + 3 * rows_) + sizeof(T) * rows_ * columns_ +
                 sizeof(int32_t) * (columns_ + 4 * rows_)) {
    char* cursor = static_cast<char*>(scratch_.get());
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(cursor);
      cursor += count * static_cast<int64_t>(sizeof(*array));
    };
    AssignmentArrays& at = arrays_;
    for (double** array : {&at.price, &at.distance, &at.closed_price, &taken_}) take(*array, columns_);
    take(cost_, rows_ * columns_);
    take(at.row_of, columns_);
    for (double** array : {&at.tree_distance, &at.tree_price, &at.tree_base}) take(*array, rows_);
    for (int32_t** array : {&at.column_of, &at.waiting, &at.tree_column, &at.tree_row}) take(*array, rows_);
  }

  void solve(int64_t b) {
    load(b);
    AssignmentSolver<OneThread> solver(*this, arrays_);
    solver.solve();
    store(b, solver);
  }

  // ---- the team ----

  double cost(int32_t i, int32_t j) const { return static_cast<double>(cost_[i * stride_ + j]); }
  double alone(int32_t i) const { return turned_ ? 0 : unmatched_[i]; }
  double start_price(int32_t j) const { return turned_ && chooses ? unmatched_[j] : 0; }

  Nearest nearest(int32_t i, double base) {
    const T* const row = cost_ + i * stride_;
    const VecD from = broadcast(base);
    VecD least_of_all = broadcast(kInfinity), least_of_free = least_of_all;
    for (int64_t k = 0; k < stride_; k += W) {
      const VecD distance = least(load_wide(arrays_.distance + k), (load_wide(row + k) - load_wide(arrays_.price + k)) + from);
      store_vector(arrays_.distance + k, distance);
      least_of_all = least(least_of_all, distance);
      least_of_free = least(least_of_free, distance + load_wide(taken_ + k));
    }
    const double value = lane_least(least_of_all);
    if (!(value < kInfinity)) return {value, -1};
    const bool free = lane_least(least_of_free) == value;
    return {value, find(value, [&](int64_t k) {
              const VecD distance = load_wide(arrays_.distance + k);
              return free ? distance + load_wide(taken_ + k) : distance;
            })};
  }

  TwoNearest two_nearest(int32_t i) const {
    const T* const row = cost_ + i * stride_;
    const auto at = [&](int64_t k) { return load_wide(row + k) - load_wide(arrays_.price + k); };
    VecD first = broadcast(kInfinity), second = first, of_free = first;
    for (int64_t k = 0; k < stride_; k += W) {
      const VecD value = at(k);
      second = least(second, DMM_ISA::greatest(first, value));
      first = least(first, value);
      of_free = least(of_free, value + load_wide(taken_ + k));
    }
    const double value = lane_least(first);
    if (!(value < kInfinity)) return {value, value, -1};
    const Bits lanes = equal(first, broadcast(value));
    const double next = lanes & (lanes - 1) ? value : lane_least(select(lanes, second, first));
    const bool free = lane_least(of_free) == value;
    return {value, next, find(value, [&](int64_t k) { return free ? at(k) + load_wide(taken_ + k) : at(k); })};
  }

  template <typename Test>
  int32_t last(int32_t count, const Test& test) const {
    int32_t k = count - 1;
    while (k > 0 && !test(k)) --k;
    return k;
  }
  template <typename Value>
  double greatest(int32_t count, const Value& value) const {
    double most = -kInfinity;
    for (int32_t k = 0; k < count; ++k) most = std::max(most, static_cast<double>(value(k)));
    return most;
  }
  template <typename Act>
  void each(int32_t count, const Act& act) const {
    for (int32_t k = 0; k < count; ++k) act(k);
  }
  bool owns(int32_t) const { return true; }
  bool leads() const { return true; }
  void sync() const {}
  void take(int32_t j) { taken_[j] = kInfinity; }

 private:
  static void store_vector(double* at, VecD value) { std::memcpy(at, &value, sizeof(VecD)); }

  // The first column at which vector(k), of the columns from k on, is `value`; it is somewhere.
  template <typename Vector>
  static int32_t find(double value, const Vector& vector) {
    const VecD wanted = broadcast(value);
    for (int64_t k = 0;; k += W)
      if (const Bits lanes = equal(vector(k), wanted)) return static_cast<int32_t>(k + __builtin_ctz(lanes));
  }

  void load(int64_t b) {
    const int64_t n = p_.num_templates ? p_.num_templates[b] : p_.N, m = p_.num_proposals ? p_.num_proposals[b] : p_.M;
    turned_ = n > m;
    rows = static_cast<int32_t>(std::min(n, m));
    columns = static_cast<int32_t>(std::max(n, m));
    stride_ = padded(columns);
    chooses = p_.unmatched != nullptr;
    unmatched_ = p_.unmatched + b * p_.unmatched_stride;
    const T* const source = p_.cost + b * p_.N * p_.M;
    constexpr T kAbsent = std::numeric_limits<T>::infinity();
    const auto allowed = [](T value) { return std::abs(value) < kAbsent ? value : kAbsent; };
    for (int64_t i = 0; i < rows; ++i) {
      T* const row = cost_ + i * stride_;
      if (turned_)
        for (int64_t j = 0; j < columns; ++j) row[j] = allowed(source[j * p_.M + i]);
      else
        for (int64_t j = 0; j < columns; ++j) row[j] = allowed(source[i * p_.M + j]);
      for (int64_t j = columns; j < stride_; ++j) row[j] = kAbsent;
    }
    for (int64_t j = 0; j < stride_; ++j) taken_[j] = 0;
    for (int64_t j = columns; j < stride_; ++j) arrays_.price[j] = 0, arrays_.distance[j] = kInfinity;
  }

  void store(int64_t b, AssignmentSolver<OneThread>& solver) {
    const int32_t n = turned_ ? columns : rows, m = turned_ ? rows : columns;
    const int32_t* const choice = turned_ ? arrays_.row_of : arrays_.column_of;
    for (int64_t r = 0; r < p_.N; ++r) p_.choice[b * p_.N + r] = r < n ? choice[r] : -1;
    if (!p_.template_prices && !p_.proposal_prices) return;
    const double limit = solver.limit();
    T *of_templates = p_.template_prices + b * p_.N, *of_proposals = p_.proposal_prices + b * p_.M;
    for (int64_t r = n; r < p_.N; ++r) of_templates[r] = 0;
    for (int64_t c = m; c < p_.M; ++c) of_proposals[c] = 0;
    if (turned_) std::swap(of_templates, of_proposals);
    for (int32_t i = 0; i < rows; ++i) of_templates[i] = static_cast<T>(solver.row_price(i, limit));
    for (int32_t j = 0; j < columns; ++j) of_proposals[j] = static_cast<T>(solver.column_price(j, limit));
  }

  const AssignmentProblem<T>& p_;
  const int64_t rows_, columns_;  // the most of the batch
  Scratch scratch_;
  AssignmentArrays arrays_;
  double* taken_;  // [columns] infinity where the column is matched, 0 where free
  T* cost_;        // [rows, stride]
  int64_t stride_ = 0;
  bool turned_ = false;  // rows are proposals
  const T* unmatched_ = nullptr;
};

template <typename T>
void run(const AssignmentProblem<T>& problem, int64_t first, int64_t last) {
  OneThread<T> thread(problem);
  for (int64_t b = first; b < last; ++b) thread.solve(b);
}

}  // namespace

extern const AssignmentKernels assignment_kernels = {run<float>, run<double>};

}  // namespace dmm::DMM_ISA
