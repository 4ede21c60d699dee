// The matching layer for any size and for float64: one block per problem, its arrays in shared memory where they fit
// and in scratch memory where not, two barriers per round. Warps own rows for row sums, threads own columns for column
// sums; every sum has one fixed order. Blocks take several problems in turn, so scratch does not grow with the batch.
#pragma once

#include "problem.cuh"
#include "sum_warp.h"

namespace dmm::cuda {

// The most threads of a block. Its registers are the limit: 128 for each of 512, of which double would spill some.
template <typename T>
constexpr int kGeneralThreads = sizeof(T) == 8 ? 256 : 512;

template <typename T>
__device__ __forceinline__ T load(const void* tensor, int64_t i, Element element) {
  switch (element) {
    case Element::f64:
      return static_cast<T>(static_cast<const double*>(tensor)[i]);
    case Element::f32:
      return static_cast<T>(static_cast<const float*>(tensor)[i]);
    case Element::f16:
      return static_cast<T>(static_cast<float>(static_cast<const c10::Half*>(tensor)[i]));
    default:
      return static_cast<T>(static_cast<float>(static_cast<const c10::BFloat16*>(tensor)[i]));
  }
}

template <typename T>
__device__ __forceinline__ void store(void* tensor, int64_t i, Element element, T value) {
  switch (element) {
    case Element::f64:
      static_cast<double*>(tensor)[i] = static_cast<double>(value);
      return;
    case Element::f32:
      static_cast<float*>(tensor)[i] = static_cast<float>(value);
      return;
    case Element::f16:
      static_cast<c10::Half*>(tensor)[i] = static_cast<c10::Half>(static_cast<float>(value));
      return;
    default:
      static_cast<c10::BFloat16*>(tensor)[i] = static_cast<c10::BFloat16>(static_cast<float>(value));
  }
}

// What a block needs, in elements of T: `arrays` are hot, `snapshots` and mask words (`bits`) are for the backward
// alone.
struct GeneralSizes {
  int64_t arrays, snapshots, bits;

  static GeneralSizes forward(int64_t N, int64_t M) { return {3 * N * M + 3 * N + M, 0, 0}; }
  static GeneralSizes backward(int64_t N, int64_t M, const MatchOptions& options, bool unmatched) {
    return {5 * N * M + (unmatched ? 6 : 5) * N + 3 * M, options.n_grad * (N * M + N + M),
            options.n_proj * round_words(N, M, unmatched)};
  }
  // Mask words of a round: a bit per element, column and, where templates may stay alone, row.
  __host__ __device__ static int64_t round_words(int64_t N, int64_t M, bool unmatched) {
    return (N + 1) * ((M + 31) / 32) + (unmatched ? (N + 31) / 32 : 0);
  }
  template <typename T>
  __host__ __device__ int64_t array_bytes() const {
    return arrays * static_cast<int64_t>(sizeof(T));
  }
  template <typename T>
  __host__ __device__ int64_t cold_bytes() const {
    return (snapshots * static_cast<int64_t>(sizeof(T)) + bits * 4 + 15) / 16 * 16;
  }
};

// Hands out consecutive arrays.
template <typename T>
struct Cursor {
  T* next;
  __device__ T* take(int64_t count) {
    T* const taken = next;
    next += count;
    return taken;
  }
};

// kUnmatched: templates may stay alone. The cost is less by what that costs, and u >= 0.
template <typename T, bool kUnmatched>
struct General {
  enum class From { start, shifted, duals };  // what x of a round is: y0, relu(y0 + lr C - u - v) - lr C, relu(y0 - u - v)

  const Problem& p;
  int64_t n, m, b, offset;
  T lr, inv_m, inv_n, poison;
  bool out_of_range;
  T *y0, *step, *total, *u, *u_next, *row, *v;  // y0, step = lr * C, total: [n, m]

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  __device__ General(const Problem& problem, Cursor<T>& cursor) : p(problem) {
    y0 = cursor.take(p.N * p.M), step = cursor.take(p.N * p.M), total = cursor.take(p.N * p.M);
    u = cursor.take(p.N), u_next = cursor.take(p.N), row = cursor.take(p.N), v = cursor.take(p.M);
  }

  // each(r, c, i) for the rows of this warp; i = r * m + c.
  template <typename Each>
  __device__ void for_rows(const Each& each) const {
    for (int64_t r = warp; r < n; r += warps)
      for (int64_t c = lane; c < m; c += 32) each(r, c, r * m + c);
  }

  // Element of this problem in [B, N, M].
  __device__ int64_t index(int64_t r, int64_t c) const { return offset + r * p.M + c; }

  __device__ T cost(int64_t r, int64_t c) const {
    const T own = kUnmatched ? static_cast<const T*>(p.unmatched)[b * p.unmatched_stride + r] : T(0);
    return load<T>(p.cost, index(r, c), p.element) - own;
  }

  __device__ void load_problem(int64_t which) {
    b = which;
    offset = b * p.N * p.M;
    n = p.num_templates ? p.num_templates[b] : p.N;
    m = p.num_proposals ? p.num_proposals[b] : p.M;
    out_of_range = n < 0 || n > p.N || m < 0 || m > p.M;
    if (out_of_range || n == 0 || m == 0) n = m = 0;
    lr = p.lr ? static_cast<const T*>(p.lr)[b * p.lr_stride] : static_cast<T>(p.options.lr);
    inv_m = T(1) / static_cast<T>(m ? m : 1);
    inv_n = T(1) / static_cast<T>(n ? n : 1);
    poison = T(0) * lr;
    const bool average_start = p.options.carry && !p.options.last;
    for_rows([&](int64_t r, int64_t c, int64_t i) {
      const T cost = this->cost(r, c);
      const T x = p.init ? load<T>(p.init, index(r, c), p.element) : T(0);
      poison += T(0) * cost + T(0) * x;
      step[i] = lr * cost;
      y0[i] = x - step[i];
      total[i] = average_start ? x : T(0);
    });
    forget();
    poison = __syncthreads_or(poison != poison) || out_of_range ? static_cast<T>(NAN) : T(0);
  }

  __device__ void forget() {
    for (int64_t r = threadIdx.x; r < n; r += blockDim.x) u[r] = 0;
    for (int64_t c = threadIdx.x; c < m; c += blockDim.x) v[c] = 0;
  }

  __device__ T dual_point(int64_t r, int64_t c, int64_t i) const { return y0[i] - u[r] - v[c]; }

  __device__ T value(From from, int64_t r, int64_t c, int64_t i) const {
    if (from == From::start) return y0[i];
    const T shift = from == From::shifted ? step[i] : T(0);
    const T t = dual_point(r, c, i) + shift;
    return (t > 0 ? t : T(0)) - shift;
  }

  // Rows, then columns, then the duals. All threads enter and leave together.
  __device__ void round(From from) {
    for (int64_t r = warp; r < n; r += warps) {
      T sum = 0;
      for (int64_t c = lane; c < m; c += 32) sum += value(from, r, c, r * m + c);
      sum = sum_warp(sum);
      if (lane == 0) {
        if constexpr (kUnmatched) {
          const T d = (sum - 1) * inv_m;
          row[r] = d > -u[r] ? d : -u[r];
          u_next[r] = u[r] + row[r];
        } else {
          row[r] = sum - 1;
          u_next[r] = u[r] + (sum - 1) * inv_m;
        }
      }
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c < m; c += blockDim.x) {
      T sum = 0, excess = 0;
      for (int64_t r = 0; r < n; ++r) {
        sum += value(from, r, c, r * m + c);
        excess += row[r];
      }
      const T s = sum - (kUnmatched ? excess : excess * inv_m) + static_cast<T>(n) * v[c];
      v[c] = s > 1 ? (s - 1) * inv_n : T(0);
    }
    __syncthreads();
    T* const old = u;
    u = u_next, u_next = old;
  }

  // X = relu(y0 - u - v) becomes the point to be projected next.
  __device__ void outer() {
    for_rows([&](int64_t r, int64_t c, int64_t i) {
      const T x = value(From::duals, r, c, i);
      total[i] = p.options.last ? x : total[i] + x;
      y0[i] = (p.options.carry ? y0[i] : x) - step[i];
    });
    __syncthreads();
    if (!p.options.carry) forget();
    __syncthreads();
  }

  __device__ From first_round(int64_t outer_step) const {
    return outer_step > 0 && p.options.carry ? From::shifted : From::start;
  }

  // tensor = value(r, c, i) + poison in the problem, 0 around it.
  template <typename Value>
  __device__ void write(void* tensor, const Value& value) const {
    for (int64_t r = warp; r < p.N; r += warps)
      for (int64_t c = lane; c < p.M; c += 32) {
        const T around = out_of_range ? poison : T(0);
        store<T>(tensor, index(r, c), p.element, r < n && c < m ? value(r, c, r * m + c) + poison : around);
      }
  }
};

// `scratch` is null where a block's arrays are in shared memory.
template <typename T, bool kUnmatched>
__global__ void __launch_bounds__(kGeneralThreads<T>, 1)
    general_forward_kernel(Problem p, GeneralSizes sizes, unsigned char* scratch, void* out) {
  unsigned char* arrays = scratch ? scratch + blockIdx.x * sizes.array_bytes<T>() : shared_memory;
  Cursor<T> cursor{reinterpret_cast<T*>(arrays)};
  using From = typename General<T, kUnmatched>::From;
  General<T, kUnmatched> solve(p, cursor);
  const T scale = static_cast<T>(p.scale);
  for (int64_t b = blockIdx.x; b < p.B; b += gridDim.x) {
    solve.load_problem(b);
    for (int64_t step = 0; step < p.options.n_grad; ++step) {
      for (int64_t round = 0; round < p.options.n_proj; ++round) solve.round(round ? From::duals : solve.first_round(step));
      solve.outer();
    }
    solve.write(out, [&](int64_t, int64_t, int64_t i) { return solve.total[i] * scale; });
    __syncthreads();
  }
}

// Snapshots before every outer step, then the outer steps in reverse, the masks of one at a time.
template <typename T, bool kUnmatched>
__global__ void __launch_bounds__(kGeneralThreads<T>, 1)
    general_backward_kernel(Problem p, GeneralSizes sizes, unsigned char* cold, unsigned char* scratch, Gradients out) {
  using From = typename General<T, kUnmatched>::From;
  unsigned char* arrays = scratch ? scratch + blockIdx.x * sizes.array_bytes<T>() : shared_memory;
  Cursor<T> cursor{reinterpret_cast<T*>(arrays)};
  General<T, kUnmatched> solve(p, cursor);
  T *dx = solve.total, *dz_sum = cursor.take(p.N * p.M), *g = cursor.take(p.N * p.M);
  T *du = cursor.take(p.N), *a = cursor.take(p.N), *dv = cursor.take(p.M), *ds = cursor.take(p.M);
  [[maybe_unused]] T* const moved = kUnmatched ? cursor.take(p.N) : nullptr;  // 0 where the last row step held u at 0
  T* const snapshots = reinterpret_cast<T*>(cold + blockIdx.x * sizes.cold_bytes<T>());
  uint32_t* const bits = reinterpret_cast<uint32_t*>(snapshots + sizes.snapshots);
  const int64_t words = (p.M + 31) / 32, round_words = GeneralSizes::round_words(p.N, p.M, kUnmatched);
  const int64_t n_grad = p.options.n_grad, n_proj = p.options.n_proj;
  const bool carry = p.options.carry;
  const T scale = static_cast<T>(p.scale);
  const int lane = solve.lane, warp = solve.warp, warps = solve.warps;

  for (int64_t b = blockIdx.x; b < p.B; b += gridDim.x) {
    solve.load_problem(b);
    const int64_t n = solve.n, m = solve.m;
    const auto copy_state = [&](int64_t step, auto copy) {
      T* const at = snapshots + step * (p.N * p.M + p.N + p.M);
      for (int64_t i = threadIdx.x; i < n * m; i += blockDim.x) copy(at[i], solve.y0[i]);
      if (carry) {
        for (int64_t r = threadIdx.x; r < n; r += blockDim.x) copy(at[n * m + r], solve.u[r]);
        for (int64_t c = threadIdx.x; c < m; c += blockDim.x) copy(at[n * m + n + c], solve.v[c]);
      }
    };
    for (int64_t step = 0; step < n_grad; ++step) {
      copy_state(step, [](T& saved, T& live) { saved = live; });
      for (int64_t round = 0; round < n_proj; ++round) solve.round(round ? From::duals : solve.first_round(step));
      solve.outer();
    }

    solve.for_rows([&](int64_t r, int64_t c, int64_t i) {
      g[i] = load<T>(out.grad, solve.index(r, c), p.element) * scale;
      dx[i] = dz_sum[i] = 0;
    });
    const auto forget = [&] {
      for (int64_t r = threadIdx.x; r < n; r += blockDim.x) {
        du[r] = 0;
        if constexpr (kUnmatched) moved[r] = 1;
      }
      for (int64_t c = threadIdx.x; c < m; c += blockDim.x) dv[c] = 0;
    };
    for (int64_t c = threadIdx.x; c < m; c += blockDim.x) ds[c] = 0;
    forget();
    __syncthreads();

    // a[r] = (du[r] - sum of ds) / m, this warp's rows: dx of the round at hand is a[r] + ds[c]. Where the row step held u at
    // 0, du is the sum of ds.
    const auto row_dual = [&](int64_t r, [[maybe_unused]] T ds_sum) {
      if constexpr (kUnmatched)
        if (moved[r] == 0) return ds_sum;
      return du[r];
    };
    const auto rank_one = [&](int64_t r, T ds_sum) { return (row_dual(r, ds_sum) - ds_sum) * solve.inv_m; };
    const auto sum_ds = [&] {
      T sum = 0;
      for (int64_t c = lane; c < m; c += 32) sum += ds[c];
      return sum_warp(sum);
    };

    for (int64_t step = n_grad - 1; step >= 0; --step) {
      copy_state(step, [](T& saved, T& live) { live = saved; });
      if (!carry) solve.forget();
      __syncthreads();
      for (int64_t round = 0; round < n_proj; ++round) {
        solve.round(round ? From::duals : solve.first_round(step));
        uint32_t* const at = bits + round * round_words;
        for (int64_t r = warp; r <= n; r += warps)
          for (int64_t c = lane; c - lane < m; c += 32) {
            const bool set = c < m && (r < n ? solve.dual_point(r, c, r * m + c) : solve.v[c]) > 0;
            const uint32_t word = __ballot_sync(0xffffffffu, set);
            if (lane == 0) at[r * words + c / 32] = word;
          }
        if constexpr (kUnmatched)
          for (int64_t r = threadIdx.x; r - lane < n; r += blockDim.x) {
            const uint32_t word = __ballot_sync(0xffffffffu, r < n && solve.u[r] > 0);
            if (lane == 0) at[(p.N + 1) * words + r / 32] = word;
          }
      }
      const T weight = !p.options.last || step == n_grad - 1 ? T(1) : T(0);
      for (int64_t round = n_proj - 1; round >= 0; --round) {
        const bool newest = round == n_proj - 1;
        const uint32_t* const at = bits + round * round_words;
        const auto bit = [&](int64_t r, int64_t c) { return (at[r * words + c / 32] >> (c % 32) & 1u) != 0; };
        const auto h = [&](int64_t r, int64_t c, int64_t i, T a_r) {
          if (!bit(r, c)) return T(0);
          const T rank = a_r + ds[c];
          return newest ? weight * g[i] + (carry ? rank : dx[i]) : rank;
        };
        __syncthreads();
        const T ds_sum = sum_ds();
        for (int64_t r = warp; r < n; r += warps) {
          const T a_r = rank_one(r, ds_sum);
          T sum = 0;
          for (int64_t c = lane; c < m; c += 32) sum += h(r, c, r * m + c, a_r);
          sum = sum_warp(sum);
          if (lane == 0) {
            a[r] = a_r;
            du[r] = row_dual(r, ds_sum) - sum;
          }
        }
        __syncthreads();
        for (int64_t c = threadIdx.x; c < m; c += blockDim.x) {
          T sum = 0;
          for (int64_t r = 0; r < n; ++r) {
            const int64_t i = r * m + c;
            const T value = h(r, c, i, a[r]);
            dx[i] = (newest && !carry ? T(0) : dx[i]) + value;
            sum += value;
          }
          dv[c] = bit(n, c) ? dv[c] - sum : T(0);
          ds[c] = dv[c] * solve.inv_n;
        }
        if constexpr (kUnmatched)
          for (int64_t r = threadIdx.x; r < n; r += blockDim.x)
            moved[r] = static_cast<T>(at[(p.N + 1) * words + r / 32] >> (r % 32) & 1u);
      }
      __syncthreads();
      const T ds_sum = sum_ds();
      for (int64_t r = warp; r < n; r += warps) {
        const T a_r = rank_one(r, ds_sum);
        for (int64_t c = lane; c < m; c += 32) {
          const int64_t i = r * m + c;
          const T dz = a_r + ds[c] + dx[i];
          dz_sum[i] += dz;
          if (!carry) dx[i] = dz;
        }
      }
      __syncthreads();
      if (!carry) forget();
    }
    __syncthreads();

    const bool counts = carry && !p.options.last;
    const T ds_sum = sum_ds();
    solve.write(out.init, [&](int64_t r, int64_t c, int64_t i) {
      return dx[i] + (carry ? rank_one(r, ds_sum) + ds[c] : T(0)) + (counts ? g[i] : T(0));
    });
    solve.write(out.cost, [&](int64_t, int64_t, int64_t i) { return -solve.lr * dz_sum[i]; });
    for (int64_t r = warp; r < n; r += warps) {
      T sum = 0;
      for (int64_t c = lane; c < m; c += 32) sum += dz_sum[r * m + c] * solve.cost(r, c);
      sum = sum_warp(sum);
      if (lane == 0) du[r] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      T sum = 0;
      for (int64_t r = 0; r < n; ++r) sum += du[r];
      static_cast<T*>(out.lr)[b] = n || solve.out_of_range ? solve.poison - sum : T(0);
    }
    __syncthreads();
  }
}

}  // namespace dmm::cuda
