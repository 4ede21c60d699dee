// The matching problem by Newton prices on vector lanes. docs/variants.md ("Newton prices, for a kernel") says what is
// computed here; its names are kept: prices a of rows and b >= 0 of columns, p = relu(-C - a - b), pos = (p > 0), one Newton
// step per round for each price, and x_k = t_k p. Lanes run across a problem's columns or across problems (match_group.h).
//
// Absent rows and columns (ragged batches, the last column group) cost infinity. Then pos is false for ever, and nothing else
// needs a mask. A round is one pass over N * M: it steps with the bits of pos that the last one left, and leaves its own.
//
// With `unmatched`, templates may stay alone: the cost is C less what that costs, and a >= 0, with a bit per row and round.
#pragma once

#include "match_group.h"

namespace dmm::DMM_ISA {
namespace {

template <typename V>
inline V at_least_one(V count) {
  return relu(count - 1) + 1;
}

// What is known per row: its price (or the price's gradient), and a sum and a count over its columns where pos.
// In registers where the number of rows R is known, in memory where not (R = 0).
template <typename V, int R>
struct Rows {
  V price[R], sum[R], count[R];
};
template <typename V>
struct Rows<V, 0> {
  V *price, *sum, *count;
};

template <typename T, Lanes lanes, bool unmatched>
class PricesSolver : Group<T, lanes> {
  using Base = Group<T, lanes>;
  using V = typename Base::V;
  using Base::enter, Base::gather, Base::gather_unmatched, Base::gather_cost_less, Base::store, Base::store_grad_lr,
      Base::sum_row;
  using Base::W, Base::kInfinity, Base::p_, Base::N_, Base::K_, Base::lr_, Base::poison_;

 public:
  explicit PricesSolver(const MatchProblem<T>& problem) : Base(problem) {}

  void forward(T* out, int64_t first, int64_t last) {
    Scratch scratch(sizeof(V) * forward_vectors() + sizeof(Bits) * round_bits());
    Bits* const bits = reinterpret_cast<Bits*>(carve_forward(static_cast<V*>(scratch.get())));
    const auto& options = p_.options;
    const T scale = static_cast<T>(output_scale(options));
    for (int64_t group = first; group < last; ++group) {
      load(group);
      begin(bits);
      for (int64_t i = 0; i < K_ * N_; ++i) total_[i] = V{};
      for (int64_t step = 1; step <= options.n_grad; ++step) {
        const V t = sharpness(step), e = 1 / t;
        for (int64_t round = 1; round < options.n_proj; ++round) take_round<false>(e, V{}, bits, bits);
        if (step == options.n_grad || !options.last)
          take_round<true>(e, t * scale, bits, bits);
        else
          take_round<false>(e, V{}, bits, bits);
      }
      store(total_, out);
    }
  }

  // The bits of all rounds are kept: 25 kB for 5 x 50 at the defaults, across problems.
  void backward(const T* grad, T* grad_cost, T*, T* grad_lr, int64_t first, int64_t last) {
    const int64_t n_proj = p_.options.n_proj, rounds = p_.options.n_grad * n_proj;
    Scratch scratch(sizeof(V) * (forward_vectors() + backward_vectors()) + sizeof(Bits) * round_bits() * (rounds + 1));
    Bits* const bits = reinterpret_cast<Bits*>(carve_backward(carve_forward(static_cast<V*>(scratch.get()))));
    const T scale = static_cast<T>(output_scale(p_.options));
    const auto at = [&](int64_t round) { return bits + round * round_bits(); };
    for (int64_t group = first; group < last; ++group) {
      load(group);
      begin(bits);
      for (int64_t i = 0; i < rounds; ++i) take_round<false>(1 / sharpness(i / n_proj + 1), V{}, at(i), at(i + 1));
      begin_backward(grad);
      undo_round<true>(sharpness(p_.options.n_grad) * scale, at(rounds), at(rounds - 1));
      for (int64_t i = rounds - 1; i > 0; --i) {
        if (i % n_proj == 0 && !p_.options.last)
          undo_round<true>(sharpness(i / n_proj) * scale, at(i), at(i - 1));
        else
          undo_round<false>(V{}, at(i), at(i - 1));
      }
      undo_round<false>(V{}, at(0), nullptr);
      finish_grad(grad_cost, grad_lr);
    }
  }

 private:
  // ---- memory ----
  // pos before the round, and col (and row): which columns (and rows) keep a price after it
  int64_t round_bits() const { return K_ * N_ + K_ + (unmatched ? N_ : 0); }
  size_t forward_vectors() const { return 2 * K_ * N_ + 2 * K_ + (unmatched ? 5 : 4) * N_; }
  size_t backward_vectors() const { return 2 * K_ * N_ + 2 * K_ + 4 * N_; }

  V* carve_forward(V* cursor) {
    auto take = [&](int64_t count) { return std::exchange(cursor, cursor + count); };
    gain_ = take(K_ * N_), total_ = take(K_ * N_), b_price_ = take(K_), absent_columns_ = take(K_);
    rows_ = {take(N_), take(N_), take(N_)}, absent_rows_ = take(N_);
    if constexpr (unmatched) own_ = take(N_);
    return cursor;
  }

  V* carve_backward(V* cursor) {
    auto take = [&](int64_t count) { return std::exchange(cursor, cursor + count); };
    grad_ = take(K_ * N_), dcost_ = take(K_ * N_), db_ = take(K_), ds_ = take(K_);
    drows_ = {take(N_), take(N_), take(N_)}, dd_ = take(N_);
    return cursor;
  }

  // gain_ = -C, and -infinity where absent. A step size that is not positive poisons like what is not finite.
  void load(int64_t group) {
    enter(group, absent_rows_, absent_columns_);
    if constexpr (unmatched) gather_unmatched(own_);
    gather_cost(gain_);
    poison_ = V{};
    for (int64_t k = 0; k < K_; ++k)
      for (int64_t r = 0; r < N_; ++r) {
        V& gain = gain_[k * N_ + r];
        poison_ += gain * 0;
        gain = -gain - absent_rows_[r] - absent_columns_[k];
      }
    poison_ = sum_row(poison_) + lr_ * 0;
    for (int l = 0; l < W; ++l)
      if (!(lr_[l] > 0)) poison_[l] = std::numeric_limits<T>::quiet_NaN();
  }

  void gather_cost(V* cost) {
    if constexpr (unmatched)
      gather_cost_less(own_, absent_columns_, cost);
    else
      gather(p_.cost, cost);
  }

  // t_k, k = 1 .. n_grad
  V sharpness(int64_t step) const {
    const double n_grad = static_cast<double>(p_.options.n_grad), share = static_cast<double>(step) / n_grad;
    return lr_ * static_cast<T>(n_grad * share * share * share);
  }

  // Row prices that make every row buy, no column prices. The first step forgets them.
  void begin(Bits* bits) {
    const V e = 1 / sharpness(1);
    for (int64_t r = 0; r < N_; ++r) {
      V best = gain_[r];
      for (int64_t k = 1; k < K_; ++k) {
        const V gain = gain_[k * N_ + r];
        best = gain > best ? gain : best;
      }
      if constexpr (lanes == Lanes::columns)
        for (int l = 1; l < W; ++l)
          if (best[l] > best[0]) best[0] = best[l];
      for (int l = 0; l < W; ++l) {
        const T top = best[lanes == Lanes::columns ? 0 : l];
        rows_.price[r][l] = top > -kInfinity ? top - e[l] : 0;
      }
      if constexpr (unmatched) rows_.price[r] = relu(rows_.price[r]);
      rows_.sum[r] = rows_.count[r] = V{};
    }
    for (int64_t k = 0; k < K_; ++k) {
      b_price_[k] = V{};
      look<false>(rows_, N_, k, V{}, V{}, bits);
    }
  }

  template <int R>
  static __attribute__((always_inline)) Rows<V, R> load_rows(const Rows<V, 0>& memory) {
    if constexpr (R == 0) {
      return memory;
    } else {
      Rows<V, R> rows;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) rows.price[r] = memory.price[r], rows.sum[r] = memory.sum[r], rows.count[r] = memory.count[r];
      return rows;
    }
  }

  template <int R>
  static __attribute__((always_inline)) void store_rows(const Rows<V, R>& rows, const Rows<V, 0>& memory) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) memory.price[r] = rows.price[r], memory.sum[r] = rows.sum[r], memory.count[r] = rows.count[r];
  }

  // f(integral_constant<R>): the number of rows if they fit registers, else 0.
  template <typename F>
  void with_rows(const F& f) const {
    if (N_ <= kRowBlock)
      for_row_blocks(N_, [&](auto rows, int64_t) { f(rows); });
    else
      f(std::integral_constant<int, 0>{});
  }

  // ---- forward ----
  template <bool output>
  void take_round(V e, V weight, Bits* bits, Bits* next) {
    with_rows([&](auto rows) { round_forward<rows, output>(e, weight, bits, next); });
  }

  // One round: a += d, b = max(0, w), then p, pos and their sums. With `output`, weight * p is added to the result.
  template <int R, bool output>
  void round_forward(V e, V weight, Bits* bits, Bits* next) {
    const int64_t N = R ? R : N_, K = K_;
    Rows<V, R> rows = load_rows<R>(rows_);
#pragma GCC unroll 8
    for (int64_t r = 0; r < N; ++r) {
      rows.price[r] += (sum_row(rows.sum[r]) - e) / at_least_one(sum_row(rows.count[r]));
      if constexpr (unmatched) {
        bits[K * N + K + r] = positive(rows.price[r]);
        rows.price[r] = relu(rows.price[r]);
      }
      rows.sum[r] = rows.count[r] = V{};
    }
    for (int64_t k = 0; k < K; ++k) {
      const V* const gain = gain_ + k * N;
      const Bits* const pos = bits + k * N;
      V s = V{}, count = V{};  // of -C - a (the new a) where pos
#pragma GCC unroll 8
      for (int64_t r = 0; r < N; ++r) {
        s += keep(pos[r], gain[r] - rows.price[r]);
        count += keep(pos[r], V{} + 1);
      }
      const V b = b_price_[k];
      const V w = b + (s - count * b - e) / at_least_one(count);
      bits[K * N + k] = positive(w);
      look<output>(rows, N, k, b_price_[k] = relu(w), weight, next);
    }
    store_rows<R>(rows, rows_);
  }

  // p = relu(-C - a - b) of a column group, its bits, and what the rows' next step wants to know.
  template <bool output, int R>
  __attribute__((always_inline)) void look(Rows<V, R>& rows, int64_t N, int64_t k, V b, V weight, Bits* next) {
    const V* const gain = gain_ + k * N;
    V* const total = total_ + k * N;
#pragma GCC unroll 8
    for (int64_t r = 0; r < N; ++r) {
      const V p = relu(gain[r] - rows.price[r] - b);
      const Bits pos = next[k * N + r] = positive(p);
      rows.sum[r] += p;
      rows.count[r] += keep(pos, V{} + 1);
      if constexpr (output) total[r] += weight * p;
    }
  }

  // ---- backward ----
  void begin_backward(const T* grad) {
    gather(grad, grad_);
    for (int64_t i = 0; i < K_ * N_; ++i) dcost_[i] = V{};
    for (int64_t k = 0; k < K_; ++k) db_[k] = ds_[k] = V{};
    for (int64_t r = 0; r < N_; ++r) drows_.price[r] = drows_.sum[r] = drows_.count[r] = V{};
  }

  template <bool output>
  void undo_round(V weight, const Bits* bits, const Bits* older) {
    with_rows([&](auto rows) { round_backward<rows, output>(weight, bits, older); });
  }

  // h, which reaches -C - a - b through the round that read `bits` and, with `output`, through the iterate of the same pos;
  // then the column step of the `older` round, and the sums of its row step. Row gradients are partial sums over the lanes
  // when lanes are columns; only their sums are used.
  template <int R, bool output>
  void round_backward(V weight, const Bits* bits, const Bits* older) {
    const int64_t N = R ? R : N_, K = K_;
    Rows<V, R> rows = load_rows<R>(drows_);
    V dd_in_registers[R ? R : 1];
    V* const dd = R ? dd_in_registers : dd_;
#pragma GCC unroll 8
    for (int64_t r = 0; r < N; ++r) {
      V moves = rows.price[r] - rows.sum[r];
      if constexpr (unmatched) {  // a price held at 0 forgets the one before
        moves = keep(bits[K * N + K + r], moves);
        rows.price[r] = rows.sum[r] + moves;
      }
      dd[r] = sum_row(moves) / at_least_one(sum_row(rows.count[r]));
      rows.sum[r] = rows.count[r] = V{};
    }
    for (int64_t k = 0; k < K; ++k) {
      const V* const grad = grad_ + k * N;
      V* const dcost = dcost_ + k * N;
      V db = db_[k], ds = ds_[k], count = V{};
#pragma GCC unroll 8
      for (int64_t r = 0; r < N; ++r) {
        const V h = keep(bits[k * N + r], output ? dd[r] + ds + weight * grad[r] : dd[r] + ds);
        dcost[r] -= h;
        rows.price[r] -= h;
        db -= h;
      }
      if (older) {
        const Bits* const pos = older + k * N;
#pragma GCC unroll 8
        for (int64_t r = 0; r < N; ++r) count += keep(pos[r], V{} + 1);
        db = keep(older[K * N + k], db);
        ds_[k] = ds = db / at_least_one(count);
#pragma GCC unroll 8
        for (int64_t r = 0; r < N; ++r) {
          rows.sum[r] += keep(pos[r], ds);
          rows.count[r] += keep(pos[r], V{} + 1);
        }
      }
      db_[k] = db;
    }
    store_rows<R>(rows, drows_);
  }

  void finish_grad(T* grad_cost, T* grad_lr) {
    gather_cost(total_);
    V dlr = V{};
    for (int64_t i = 0; i < K_ * N_; ++i) dlr += dcost_[i] * total_[i];
    store_grad_lr(sum_row(dlr) / lr_, grad_lr);  // X depends on lr C alone
    store(dcost_, grad_cost);
  }

  V *gain_, *total_, *b_price_, *absent_rows_, *absent_columns_, *own_;
  V *grad_, *dcost_, *db_, *ds_, *dd_;
  Rows<V, 0> rows_, drows_;
};

}  // namespace
}  // namespace dmm::DMM_ISA
