// What the solvers of the matching problem share on vector lanes: rows in register blocks, scratch, and a group of problems
// moved between the batch in memory and vectors.
//
// One solver, two meanings of a lane:
//   columns   one problem at a time, lanes run across its columns (short latency for a small batch);
//   problems  as many problems at a time as there are lanes (no reduction across lanes, no padding waste: a large batch).
// Vector (k, r) is row r of column group k (columns) or of column k (problems). They differ only in how a row is summed.
#pragma once

#include "match_kernel.h"
#include "simd.h"

#include <cstdlib>
#include <limits>
#include <new>

namespace dmm::DMM_ISA {

enum class Lanes { columns, problems };

// Rows handled together, their duals and sums in registers.
inline constexpr int kRowBlock = kVectorBytes == 64 ? 8 : 6;

// f(integral_constant<rows>, first row) for every block of rows.
template <typename F>
inline void for_row_blocks(int64_t N, const F& f) {
  int64_t r = 0;
  for (; r + kRowBlock <= N; r += kRowBlock) f(std::integral_constant<int, kRowBlock>{}, r);
  switch (N - r) {
    case 1:
      return f(std::integral_constant<int, 1>{}, r);
    case 2:
      return f(std::integral_constant<int, 2>{}, r);
    case 3:
      return f(std::integral_constant<int, 3>{}, r);
    case 4:
      return f(std::integral_constant<int, 4>{}, r);
    case 5:
      return f(std::integral_constant<int, 5>{}, r);
    case 6:
      return f(std::integral_constant<int, 6>{}, r);
    case 7:
      return f(std::integral_constant<int, 7>{}, r);
    default:
      return;
  }
}

// Aligned scratch for one thread's share of a call.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

// The group of problems at hand.
template <typename T, Lanes lanes>
class Group {
 protected:
  using V = Vec<T>;
  static constexpr int W = kLanes<T>;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  explicit Group(const MatchProblem<T>& problem)
      : p_(problem), N_(problem.N), K_(lanes == Lanes::columns ? (problem.M + W - 1) / W : problem.M) {}

  // Makes `group` the group at hand: its sizes and lr, and 0 or, where a row or column is absent, infinity.
  void enter(int64_t group, V* absent_rows, V* absent_columns) {
    b_ = lanes == Lanes::columns ? group : group * W;
    const int64_t left = p_.B - b_;
    problems_ = lanes == Lanes::columns ? 1 : static_cast<int>(left < W ? left : W);
    lr_ = V{};
    for (int l = 0; l < W; ++l) {
      const int64_t b = b_ + (lanes == Lanes::columns ? 0 : l);
      const bool present = lanes == Lanes::columns || l < problems_;
      const bool any = present && rows_of(b) > 0 && columns_of(b) > 0;
      n_[l] = any ? rows_of(b) : 0;
      m_[l] = any ? columns_of(b) : 0;
      lr_[l] = any ? lr_of(b) : 0;
    }
    for (int64_t r = 0; r < N_; ++r)
      for (int l = 0; l < W; ++l) absent_rows[r][l] = r < n_[l] ? 0 : kInfinity;
    for (int64_t k = 0; k < K_; ++k)
      for (int l = 0; l < W; ++l) absent_columns[k][l] = (lanes == Lanes::columns ? k * W + l : k) < m_[l] ? 0 : kInfinity;
  }

  // Copies the valid part of `source` into the vectors; 0 elsewhere.
  void gather(const T* source, V* vectors) const {
    std::memset(static_cast<void*>(vectors), 0, K_ * N_ * sizeof(V));
    T* const lane = reinterpret_cast<T*>(vectors);
    if constexpr (lanes == Lanes::columns) {
      const T* problem = source + b_ * p_.N * p_.M;
      for (int64_t r = 0; r < n_[0]; ++r)
        for (int64_t c = 0; c < m_[0]; c += W) copy_lanes(lane + (c / W * N_ + r) * W, problem + r * p_.M + c, m_[0] - c);
    } else {
      for (int l = 0; l < W; ++l) {
        const T* problem = source + (b_ + l) * p_.N * p_.M;
        for (int64_t r = 0; r < n_[l]; ++r)
          for (int64_t c = 0; c < m_[l]; ++c) lane[(c * N_ + r) * W + l] = problem[r * p_.M + c];
      }
    }
  }

  // Writes the vectors to `target`, plus the group's poison; 0 outside the valid part.
  void store(const V* vectors, T* target) const {
    const T* const lane = reinterpret_cast<const T*>(vectors);
    for (int l = 0; l < problems_; ++l) {
      T* problem = target + (b_ + l) * p_.N * p_.M;
      for (int64_t r = 0; r < p_.N; ++r) {
        const int64_t valid = r < n_[l] ? m_[l] : 0;
        T* row = problem + r * p_.M;
        if constexpr (lanes == Lanes::columns) {
          for (int64_t c = 0; c < valid; c += W) {
            const V value = vectors[c / W * N_ + r] + poison_;
            copy_lanes(row + c, reinterpret_cast<const T*>(&value), valid - c);
          }
        } else {
          for (int64_t c = 0; c < valid; ++c) row[c] = lane[(c * N_ + r) * W + l] + poison_[l];
        }
        std::memset(row + valid, 0, (p_.M - valid) * sizeof(T));
      }
    }
  }

  // Puts into `own` what staying alone costs each row, 0 where absent.
  void gather_unmatched(V* own) const {
    for (int64_t r = 0; r < N_; ++r)
      for (int l = 0; l < W; ++l) {
        const int64_t b = b_ + (lanes == Lanes::columns ? 0 : l);
        own[r][l] = r < n_[l] ? p_.unmatched[b * p_.unmatched_stride + r] : 0;
      }
  }

  // gather() of the cost, less `own` in every row.
  void gather_cost_less(const V* own, const V* absent_columns, V* vectors) const {
    gather(p_.cost, vectors);
    for (int64_t k = 0; k < K_; ++k) {
      const Bits present = positive(1 - absent_columns[k]);
      for (int64_t r = 0; r < N_; ++r) vectors[k * N_ + r] -= keep(present, own[r]);
    }
  }

  // The gradient of lr, one number per problem.
  void store_grad_lr(V sum, T* grad_lr) const {
    sum += poison_;
    for (int l = 0; l < problems_; ++l) grad_lr[b_ + l] = n_[l] ? sum[l] : 0;
  }

  static V sum_row(V partial) {
    if constexpr (lanes == Lanes::columns)
      return lane_sum<T>(partial);
    else
      return partial;
  }

  const MatchProblem<T>& p_;
  const int64_t N_, K_;

  int64_t b_ = 0;  // the first problem
  int problems_ = 0;
  int64_t n_[W], m_[W];  // valid rows and columns per lane
  V lr_, poison_;        // poison: 0, or NaN where anything in the problem is not finite

 private:
  int64_t rows_of(int64_t b) const { return p_.num_templates ? p_.num_templates[b] : p_.N; }
  int64_t columns_of(int64_t b) const { return p_.num_proposals ? p_.num_proposals[b] : p_.M; }
  T lr_of(int64_t b) const { return p_.lr ? p_.lr[b * p_.lr_stride] : static_cast<T>(p_.options.lr); }

  static void copy_lanes(T* target, const T* source, int64_t count) {
    if (count >= W)
      std::memcpy(target, source, sizeof(V));
    else
      for (int64_t i = 0; i < count; ++i) target[i] = source[i];
  }
};

template <template <typename, Lanes> class Solver, typename T>
constexpr MatchKernelsOf<T> kernels_for() {
  return {kLanes<T>,
          [](const MatchProblem<T>& problem, T* out, bool across_problems, int64_t first, int64_t last) {
            if (across_problems)
              Solver<T, Lanes::problems>(problem).forward(out, first, last);
            else
              Solver<T, Lanes::columns>(problem).forward(out, first, last);
          },
          [](const MatchProblem<T>& problem, const T* grad, T* grad_cost, T* grad_init, T* grad_lr, bool across_problems,
             int64_t first, int64_t last) {
            if (across_problems)
              Solver<T, Lanes::problems>(problem).backward(grad, grad_cost, grad_init, grad_lr, first, last);
            else
              Solver<T, Lanes::columns>(problem).backward(grad, grad_cost, grad_init, grad_lr, first, last);
          }};
}

// The kernels of a solver with both meanings of a lane. Solvers need different names, even in anonymous namespaces: GCC 12
// gives what a template template argument instantiates external linkage.
template <template <typename, Lanes> class Solver>
constexpr MatchKernels kernels_of() {
  return {kernels_for<Solver, float>(), kernels_for<Solver, double>()};
}

}  // namespace dmm::DMM_ISA
