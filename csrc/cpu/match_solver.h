// The matching layer in dual form on vector lanes. docs/matching.md derives the algorithm; the names are the same:
// y0 the point being projected, u [N] and v [M] the duals, x = relu(y0 - u - v), one pass over N * M per Dykstra round.
// Lanes run across a problem's columns or across problems (match_group.h).
//
// Absent rows and columns (ragged batches, the last column group) carry an infinite dual. Then x = relu(0 - u - v) = 0 for
// ever, every sum sees 0, and nothing else needs a mask.
//
// With `unmatched`, templates may stay alone: the cost is C less what that costs, and u >= 0, with a bit per row and round.
#pragma once

#include "match_group.h"

namespace dmm::DMM_ISA {
namespace {

template <typename T, Lanes lanes, bool unmatched>
class Solver : Group<T, lanes> {
  using Base = Group<T, lanes>;
  using V = typename Base::V;
  using Base::enter, Base::gather, Base::gather_unmatched, Base::gather_cost_less, Base::store, Base::store_grad_lr,
      Base::sum_row;
  using Base::W, Base::p_, Base::N_, Base::K_, Base::n_, Base::m_, Base::lr_, Base::poison_;

 public:
  // Mask bits of a backward are kept for as many outer steps as fit here (half of a common L2 cache); longer runs are cut
  // into segments that start from snapshots.
  static constexpr size_t kMaskBytes = 512 << 10;

  explicit Solver(const MatchProblem<T>& problem) : Base(problem) {}

  void forward(T* out, int64_t first, int64_t last) {
    Scratch scratch(sizeof(V) * forward_vectors());
    carve_forward(static_cast<V*>(scratch.get()));
    const T scale = static_cast<T>(output_scale(p_.options));
    for (int64_t group = first; group < last; ++group) {
      load(group);
      for (int64_t step = 0; step < p_.options.n_grad; ++step) outer_step<false>(nullptr);
      for (int64_t i = 0; i < K_ * N_; ++i) total_[i] *= scale;
      store(total_, out);
    }
  }

  void backward(const T* grad, T* grad_cost, T* grad_init, T* grad_lr, int64_t first, int64_t last) {
    const auto& options = p_.options;
    const size_t step_bits = static_cast<size_t>(options.n_proj * round_bits());
    int64_t segment = static_cast<int64_t>(kMaskBytes / (step_bits * sizeof(Bits)));  // outer steps whose masks are kept
    segment = segment < 1 ? 1 : segment > options.n_grad ? options.n_grad : segment;
    const int64_t newest = (options.n_grad - 1) / segment;  // the last segment, which may be shorter
    const int64_t snapshots = newest > 0 ? newest - 1 : 0;  // starts of segments 1 .. newest - 1
    const size_t state = state_vectors();
    const size_t vectors = forward_vectors() + backward_vectors() + snapshots * state;
    Scratch scratch(sizeof(V) * vectors + sizeof(Bits) * step_bits * segment);
    V* const saved = carve_backward(carve_forward(static_cast<V*>(scratch.get())));
    Bits* const bits = reinterpret_cast<Bits*>(saved + snapshots * state);

    for (int64_t group = first; group < last; ++group) {
      load(group);
      load_grad(grad);
      for (int64_t i = 0; i < newest; ++i) {
        if (i > 0) std::memcpy(static_cast<void*>(saved + (i - 1) * state), y0_, state * sizeof(V));
        for (int64_t step = 0; step < segment; ++step) outer_step<false>(nullptr);
      }
      for (int64_t i = newest; i >= 0; --i) {
        if (i == 0 && newest > 0)
          begin();
        else if (i < newest)
          std::memcpy(static_cast<void*>(y0_), saved + (i - 1) * state, state * sizeof(V));
        const int64_t steps = i < newest ? segment : options.n_grad - i * segment;
        for (int64_t step = 0; step < steps; ++step) outer_step<true>(bits + step * step_bits);
        for (int64_t step = steps - 1; step >= 0; --step)
          outer_step_backward(bits + step * step_bits, i == newest && step == steps - 1);
      }
      finish_grad(grad_cost, grad_init, grad_lr);
    }
  }

 private:
  // ---- memory ----
  int64_t round_bits() const { return K_ * N_ + K_ + (unmatched ? N_ : 0); }  // pos, and which columns and rows have a dual
  size_t state_vectors() const { return K_ * N_ + 2 * K_ + 2 * N_; }
  size_t forward_vectors() const { return state_vectors() + 3 * K_ * N_ + K_ + (unmatched ? 3 : 2) * N_; }
  size_t backward_vectors() const { return 4 * K_ * N_ + 2 * K_ + 2 * N_; }

  V* carve_forward(V* cursor) {
    auto take = [&](int64_t count) { return std::exchange(cursor, cursor + count); };
    // The state between two outer steps, contiguous so that a snapshot is one copy.
    y0_ = take(K_ * N_), s_ = take(K_), row_sum_ = take(N_), u_ = take(N_), v_ = take(K_);
    cost_ = take(K_ * N_), init_ = take(K_ * N_), total_ = take(K_ * N_);
    v_start_ = take(K_), u_start_ = take(N_), inv_m_ = take(N_);
    if constexpr (unmatched) own_ = take(N_);
    return cursor;
  }

  V* carve_backward(V* cursor) {
    auto take = [&](int64_t count) { return std::exchange(cursor, cursor + count); };
    grad_ = take(K_ * N_), dx_ = take(K_ * N_), dy_ = take(K_ * N_), dz_sum_ = take(K_ * N_);
    ds_ = take(K_), dv_ = take(K_), du_ = take(N_), drow_ = take(N_);
    return cursor;
  }

  // Loads a group: cost_ = lr * C, init_, the absent rows and columns, and the poison: 0, or NaN where anything in the
  // problem is not finite.
  void load(int64_t group) {
    enter(group, u_start_, v_start_);
    for (int l = 0; l < W; ++l) {
      inv_n_[l] = n_[l] ? T(1) / static_cast<T>(n_[l]) : 0;
      for (int64_t r = 0; r < N_; ++r) inv_m_[r][l] = r < n_[l] ? T(1) / static_cast<T>(m_[l]) : 0;
    }
    if constexpr (unmatched) gather_unmatched(own_);
    gather_cost();
    if (p_.init)
      gather(p_.init, init_);
    else
      std::memset(static_cast<void*>(init_), 0, K_ * N_ * sizeof(V));
    poison_ = V{};
    for (int64_t i = 0; i < K_ * N_; ++i) poison_ += cost_[i] * 0 + init_[i] * 0, cost_[i] *= lr_;
    poison_ = sum_row(poison_) + lr_ * 0;
    begin();
  }

  void gather_cost() {
    if constexpr (unmatched)
      gather_cost_less(own_, v_start_, cost_);
    else
      gather(p_.cost, cost_);
  }

  // The state before the first outer step: x = init.
  void begin() {
    const bool counts = p_.options.carry && !p_.options.last;
    for (int64_t i = 0; i < K_ * N_; ++i) {
      y0_[i] = init_[i] - cost_[i];
      total_[i] = counts ? init_[i] : V{};
    }
    std::memcpy(static_cast<void*>(u_), u_start_, N_ * sizeof(V));
    std::memcpy(static_cast<void*>(v_), v_start_, K_ * sizeof(V));
    for (int64_t r = 0; r < N_; ++r) row_sum_[r] = V{};
    for (int64_t k = 0; k < K_; ++k) {
      s_[k] = V{};
      for (int64_t r = 0; r < N_; ++r) {
        row_sum_[r] += y0_[k * N_ + r];
        s_[k] += y0_[k * N_ + r];
      }
    }
    for (int64_t r = 0; r < N_; ++r) row_sum_[r] = sum_row(row_sum_[r]);
  }

  // ---- forward ----
  // One outer step: n_proj rounds, each `update_rows` (d, u), then for every column group v and x = relu(y0 - u - v) with the
  // sums the next round needs. A problem whose rows fit one block keeps u and the row sums in registers for the whole step.
  template <bool record>
  void outer_step(Bits* bits) {
    if (N_ <= kRowBlock)
      for_row_blocks(N_, [&](auto rows, int64_t) { outer_step_in_registers<rows, record>(bits); });
    else
      outer_step_in_blocks<record>(bits);
  }

  // The duals an outer step begins with.
  const V* first_u() const { return p_.options.carry ? u_ : u_start_; }
  const V* first_v() const { return p_.options.carry ? v_ : v_start_; }

  template <int R, bool record>
  void outer_step_in_registers(Bits* bits) {
    V u[R], row_sum[R];
    for (int r = 0; r < R; ++r) u[r] = first_u()[r], row_sum[r] = row_sum_[r];
    const V* v = first_v();
    for (int64_t round = 1; round < p_.options.n_proj; ++round) {
      const V shift = update_rows<R>(u, row_sum, inv_m_) * inv_n_;
      if constexpr (record) record_rows<R>(u, row_bits(bits));
      sweep<R, false, record, false>(0, shift, v, u, row_sum, bits);
      v = v_;
      if constexpr (record) bits += round_bits();
    }
    const V shift = update_rows<R>(u, row_sum, inv_m_) * inv_n_;
    if constexpr (record) record_rows<R>(u, row_bits(bits));
    if (p_.options.carry)
      sweep<R, true, record, true>(0, shift, v, u, row_sum, bits);
    else
      sweep<R, true, record, false>(0, shift, v, u, row_sum, bits);
    for (int r = 0; r < R; ++r) u_[r] = u[r], row_sum_[r] = row_sum[r];
  }

  template <bool record>
  void outer_step_in_blocks(Bits* bits) {
    if (!p_.options.carry) std::memcpy(static_cast<void*>(u_), u_start_, N_ * sizeof(V));
    const V* v = first_v();
    for (int64_t round = 1; round <= p_.options.n_proj; ++round) {
      V shift = V{};
      for_row_blocks(N_, [&](auto rows, int64_t first) {
        shift += update_rows<rows>(u_ + first, row_sum_ + first, inv_m_ + first);
        if constexpr (record) record_rows<rows>(u_ + first, row_bits(bits) + first);
      });
      shift *= inv_n_;
      for_row_blocks(N_, [&](auto rows, int64_t first) {
        if (round < p_.options.n_proj)
          sweep<rows, false, record, false>(first, shift, v, u_ + first, row_sum_ + first, bits);
        else if (p_.options.carry)
          sweep<rows, true, record, true>(first, shift, v, u_ + first, row_sum_ + first, bits);
        else
          sweep<rows, true, record, false>(first, shift, v, u_ + first, row_sum_ + first, bits);
      });
      v = v_;
      if constexpr (record) bits += round_bits();
    }
  }

  // A tree, because this sum is on the critical path of a small batch.
  template <int count>
  static __attribute__((always_inline)) V tree_sum(const V* d) {
    if constexpr (count == 1)
      return d[0];
    else
      return tree_sum<count / 2>(d) + tree_sum<count - count / 2>(d + count / 2);
  }

  // Step 1 of a round: d = (row sum - 1) / m, u += d. Returns the sum of d over the rows. Templates that may stay alone have
  // u >= 0, so d >= -u, which an infinite u takes no part in.
  template <int R>
  static __attribute__((always_inline)) V update_rows(V* u, const V* row_sum, const V* iv_m) {
    V d[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      d[r] = (row_sum[r] - 1) * iv_m[r];
      if constexpr (unmatched) d[r] = d[r] > -u[r] ? d[r] : -u[r];
      u[r] += d[r];
    }
    return tree_sum<R>(d);
  }

  Bits* row_bits(Bits* bits) const { return bits + K_ * N_ + K_; }
  const Bits* row_bits(const Bits* bits) const { return bits + K_ * N_ + K_; }

  template <int R>
  static __attribute__((always_inline)) void record_rows(const V* u, Bits* row_bits) {
    if constexpr (unmatched) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) row_bits[r] = positive(u[r]);
    }
  }

  // Steps 2 and 3 of a round for R rows. Step 2, by the first block of rows, from the old v at `v_from`:
  //     v = max(0, (s - 1) / n + v - shift),  shift = sum d / n,
  // written so that only `shift`, which comes last, is waited for. Step 3: x = relu(y0 - u - v) and its sums. The last sweep
  // of an outer step (`outer`) takes x as the new iterate X, accumulates it, and takes the gradient step: the sums are those
  // of X - lr * C.
  template <int R, bool outer, bool record, bool carry>
  __attribute__((always_inline)) void sweep(int64_t first, V shift, const V* v_from, const V* u_rows, V* row_sums, Bits* bits) {
    V u[R], row_sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) u[r] = u_rows[r], row_sum[r] = V{};
    const V keep_total = V{} + (p_.options.last ? T(0) : T(1));
    const V iv_n = inv_n_, one = opaque_one();
    V *const s_all = s_, *const v_all = v_, *const y0_all = y0_ + first;
    const int64_t N = N_, K = K_;
    for (int64_t k = 0; k < K; ++k) {
      V* const y0 = y0_all + k * N;
      V v, s = V{};
      if (first == 0) {
        const V excess = ((s_all[k] - 1) * iv_n + v_from[k]) - shift;
        if constexpr (record) bits[K * N + k] = positive(excess);
        v = v_all[k] = relu(excess);
      } else {
        v = v_all[k];
        s = s_all[k];
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        V x = relu(y0[r] - u[r] - v);
        if constexpr (record) bits[k * N + first + r] = positive(x);
        if constexpr (outer) {
          const V step = cost_[k * N + first + r];
          if constexpr (!record) {
            V& total = total_[k * N + first + r];
            total = total * keep_total + x;
          }
          x -= step;
          y0[r] = carry ? y0[r] - step : x;
        }
        row_sum[r] = lanes == Lanes::problems ? x * one + row_sum[r] : row_sum[r] + x;
        s = x * one + s;
      }
      s_all[k] = s;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row_sums[r] = sum_row(row_sum[r]);
  }

  // A 1 the compiler can't see through: x * one + y stays a fused multiply-add, which runs on other ports than the subtractions
  // and maxima around it (a fifth faster on Zen 5, nothing lost elsewhere). Row sums across columns keep the plain addition:
  // there its shorter latency counts.
  static V opaque_one() {
    V one = V{} + 1;
    asm("" : "+x"(one));
    return one;
  }

  // ---- backward ----
  void load_grad(const T* grad) {
    gather(grad, grad_);
    const T scale = static_cast<T>(output_scale(p_.options));
    for (int64_t i = 0; i < K_ * N_; ++i) grad_[i] *= scale, dx_[i] = dy_[i] = dz_sum_[i] = V{};
    for (int64_t k = 0; k < K_; ++k) dv_[k] = V{};
    for (int64_t r = 0; r < N_; ++r) du_[r] = V{};
  }

  void outer_step_backward(const Bits* bits, bool newest) {
    const bool carry = p_.options.carry;
    if (newest || !p_.options.last)
      for (int64_t i = 0; i < K_ * N_; ++i) dx_[i] += grad_[i];
    if (!carry) {
      for (int64_t i = 0; i < K_ * N_; ++i) dy_[i] = V{};
      for (int64_t k = 0; k < K_; ++k) dv_[k] = V{};
      for (int64_t r = 0; r < N_; ++r) du_[r] = V{};
    }
    if (N_ <= kRowBlock)
      for_row_blocks(N_, [&](auto rows, int64_t) { rounds_backward_in_registers<rows>(bits); });
    else
      rounds_backward_in_blocks(bits);
    for (int64_t k = 0; k < K_; ++k)
      for (int64_t r = 0; r < N_; ++r) {
        const int64_t i = k * N_ + r;
        const V dx = drow_[r] + ds_[k];
        const V dz = dx + dy_[i];
        dz_sum_[i] += dz;
        dx_[i] = carry ? dx : dz;
      }
  }

  template <int R>
  void rounds_backward_in_registers(const Bits* bits) {
    V du[R], drow[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) du[r] = du_[r];
    bits += (p_.options.n_proj - 1) * round_bits();
    round_backward<R, true>(0, bits, du, drow);
    rows_backward<R>(du, columns_backward(bits + K_ * N_), inv_m_, row_bits(bits), drow);
    for (int64_t round = p_.options.n_proj - 1; round > 0; --round) {
      bits -= round_bits();
      round_backward<R, false>(0, bits, du, drow);
      rows_backward<R>(du, columns_backward(bits + K_ * N_), inv_m_, row_bits(bits), drow);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) du_[r] = du[r], drow_[r] = drow[r];
  }

  void rounds_backward_in_blocks(const Bits* bits) {
    bits += p_.options.n_proj * round_bits();
    for (int64_t round = p_.options.n_proj; round > 0; --round) {
      bits -= round_bits();
      for_row_blocks(N_, [&](auto rows, int64_t first) {
        if (round == p_.options.n_proj)
          round_backward<rows, true>(first, bits, du_ + first, drow_ + first);
        else
          round_backward<rows, false>(first, bits, du_ + first, drow_ + first);
      });
      const V ds_sum = columns_backward(bits + K_ * N_);
      for_row_blocks(N_, [&](auto rows, int64_t first) {
        rows_backward<rows>(du_ + first, ds_sum, inv_m_ + first, row_bits(bits) + first, drow_ + first);
      });
    }
  }

  // h = dx * pos, collected into dy, du and dv. Before the newest round of an outer step dx is rank one: drow[r] + ds[k].
  template <int R, bool newest>
  __attribute__((always_inline)) void round_backward(int64_t first, const Bits* bits, V* du_rows, const V* drow_rows) {
    V du[R], drow[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) du[r] = du_rows[r], drow[r] = newest ? V{} : drow_rows[r];
    V *const dy = dy_ + first, *const dx = dx_ + first, *const ds_all = ds_, *const dv_all = dv_;
    const int64_t N = N_, K = K_;
    bits += first;
    for (int64_t k = 0; k < K; ++k) {
      const V ds = newest ? V{} : ds_all[k];
      V dv = dv_all[k];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int64_t i = k * N + r;
        const V h = keep(bits[i], newest ? dx[i] : drow[r] + ds);
        dy[i] += h;
        du[r] -= h;
        dv -= h;
      }
      dv_all[k] = dv;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) du_rows[r] = du[r];
  }

  // ds = dv / n where the column was above 1, else 0; dv = n ds. Returns sum ds.
  V columns_backward(const Bits* column_bits) {
    V ds_sum = V{};
    for (int64_t k = 0; k < K_; ++k) {
      const V dv = keep(column_bits[k], dv_[k]);
      const V ds = dv * inv_n_;
      dv_[k] = dv, ds_[k] = ds;
      ds_sum += ds;
    }
    return sum_row(ds_sum);
  }

  // drow = (du - sum ds) / m. du holds one partial sum per lane when lanes are columns; only its sum is used. Where u was held
  // at 0, drow = 0 and du = sum ds.
  template <int R>
  static __attribute__((always_inline)) void rows_backward(V* du, V ds_sum, const V* inv_m, const Bits* row_bits, V* drow) {
    [[maybe_unused]] const V share = ds_sum * (lanes == Lanes::columns ? T(1) / W : T(1));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if constexpr (unmatched) du[r] = keep(row_bits[r], du[r] - share) + share;
      drow[r] = (sum_row(du[r]) - ds_sum) * inv_m[r];
    }
  }

  // dC = -lr * sum dz, dlr = -<sum dz, C>, and the gradient of the start.
  void finish_grad(T* grad_cost, T* grad_init, T* grad_lr) {
    const bool counts = p_.options.carry && !p_.options.last;
    if (p_.options.carry)
      for (int64_t i = 0; i < K_ * N_; ++i) dx_[i] += counts ? dy_[i] + grad_[i] : dy_[i];
    store(dx_, grad_init);

    gather_cost();
    V dlr = V{};
    for (int64_t i = 0; i < K_ * N_; ++i) {
      dlr -= dz_sum_[i] * cost_[i];
      dz_sum_[i] *= -lr_;
    }
    store_grad_lr(sum_row(dlr), grad_lr);
    store(dz_sum_, grad_cost);
  }

  V inv_n_;
  V *y0_, *s_, *row_sum_, *u_, *v_, *cost_, *init_, *total_, *v_start_, *u_start_, *inv_m_, *own_;
  V *grad_, *dx_, *dy_, *dz_sum_, *ds_, *dv_, *du_, *drow_;
};

}  // namespace
}  // namespace dmm::DMM_ISA
