// The matching layer by Newton prices (docs/variants.md, "Newton prices, for a kernel"; its names are kept): prices a
// of rows and b >= 0 of columns, p = relu(-C - a - b), pos = (p > 0), one Newton step per round for each price,
// x_k = t_k p. kUnmatched: templates may stay alone, C is less by what that costs, and a >= 0.
#pragma once

#include "match_general.cuh"
#include "match_registers.cuh"
#include "sum_warp.h"

namespace dmm::cuda::prices {

// t_k, k = 1 .. n_grad.
template <typename T>
__device__ __forceinline__ T sharpness(T lr, T step, T n_grad) {
  const T share = step / n_grad;
  return lr * (n_grad * share * share * share);
}

template <typename T>
__device__ __forceinline__ T nan_unless(bool fine) {
  return fine ? T(0) : static_cast<T>(NAN);
}

// ---- n <= 16, m <= 128: a warp per problem, columns across lanes, everything in registers ----

template <int N, int K, bool kUnmatched>
struct Warp {
  using Shape = Layout<N, kWarp, K, kUnmatched>;
  static constexpr int kQuads = (N + 3) / 4;

  // The number of entries in use per row, one byte per row of four (at most 128): one reduction counts four rows.
  struct RowCounts {
    unsigned packed[kQuads] = {};
    int shift;  // slot j of a lane may hold row j ^ p (match_registers.cuh), so its byte is j ^ p as well

    __device__ __forceinline__ explicit RowCounts(int lane) : shift(lane / (kWarp / 4) * 8) {}
    __device__ __forceinline__ int shift_of(int r) const { return r < Shape::kQuadRows ? r % 4 * 8 ^ shift : r % 4 * 8; }
    __device__ __forceinline__ void add(int r, int count) { packed[r / 4] += static_cast<unsigned>(count) << shift_of(r); }
    __device__ __forceinline__ void sum_lanes() {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) packed[q] = sum_warp(packed[q]);
    }
    __device__ __forceinline__ float at_least_one(int r) const {
      return fmaxf(1.f, static_cast<float>(packed[r / 4] >> shift_of(r) & 255u));
    }
  };

  // pos of every entry of a lane, col of its columns, and whether row `lane` keeps a price.
  struct Bits {
    unsigned word[Shape::kWords] = {};

    static __device__ constexpr int pos(int r, int k) { return r * K + k; }
    static __device__ constexpr int col(int k) { return N * K + k; }
    static __device__ constexpr int row() { return Shape::kRowBit; }
    __device__ __forceinline__ void set(int bit, bool value) {
      if (value) word[Shape::word_of(bit)] |= 1u << Shape::shift_of(bit);
    }
    __device__ __forceinline__ bool operator[](int bit) const {
      return (word[Shape::word_of(bit)] >> Shape::shift_of(bit) & 1u) != 0;
    }
    __device__ __forceinline__ void save(LaneMemory<typename Shape::Word> memory, int round) const {
#pragma unroll
      for (int w = 0; w < Shape::kWords; ++w)
        memory.base[(int64_t{round} * Shape::kWords + w) * kWarp] = static_cast<typename Shape::Word>(word[w]);
    }
    __device__ __forceinline__ static Bits load(LaneMemory<typename Shape::Word> memory, int round) {
      Bits bits;
#pragma unroll
      for (int w = 0; w < Shape::kWords; ++w) bits.word[w] = memory.base[(int64_t{round} * Shape::kWords + w) * kWarp];
      return bits;
    }
  };

  // Absent rows and columns gain -infinity: pos is false there for ever, and nothing else needs a mask.
  struct Solver {
    const Place<N, kWarp, K>& at;
    float gain[N][K], p[N][K], a[N], b[K], rows[N];  // gain = -C; rows: sums of p
    RowCounts counts;
    float column_counts[K];
    float poison = 0.f;

    __device__ __forceinline__ Solver(const Place<N, kWarp, K>& place, LaneMemory<float> stage)
        : at(place), counts(place.lane) {
      at.template read_cost<kUnmatched>(stage);
#pragma unroll
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const float value = stage[r * K + k];
          poison += 0.f * value;
          gain[r][k] = at.present(r, k) ? -value : -INFINITY;
        }
      poison = sum_lanes<kWarp>(poison) + nan_unless<float>(!at.out_of_range && at.lr > 0.f) + 0.f * at.lr;
      begin();
      look();
    }

    // Row prices at which every row buys, no column prices. The first step forgets them.
    __device__ __forceinline__ void begin() {
      const float e = 1.f / t(1);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        a[r] = gain[r][0];
#pragma unroll
        for (int k = 1; k < K; ++k) a[r] = fmaxf(a[r], gain[r][k]);
      }
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        float best[N];
#pragma unroll
        for (int r = 0; r < N; ++r)  // the slot in which the other lane holds this row
          best[r] = fmaxf(a[r], from_lane(a[r < Shape::kQuadRows ? r ^ distance / (kWarp / 4) : r], distance));
#pragma unroll
        for (int r = 0; r < N; ++r) a[r] = best[r];
      }
#pragma unroll
      for (int r = 0; r < N; ++r) {
        a[r] = a[r] > -INFINITY ? a[r] - e : 0.f;
        if constexpr (kUnmatched) a[r] = fmaxf(0.f, a[r]);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) b[k] = 0.f;
    }

    __device__ __forceinline__ float t(int step) const {
      return sharpness(at.lr, static_cast<float>(step), static_cast<float>(at.p.options.n_grad));
    }

    // p of the present prices, and what the next step wants to know of it.
    __device__ __forceinline__ void look() {
      counts = RowCounts(at.lane);
      int in_column[K] = {};
#pragma unroll
      for (int r = 0; r < N; ++r) {
        RowSum<kWarp, K> by_row;
        int in_row = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          p[r][k] = fmaxf(gain[r][k] - a[r] - b[k], 0.f);
          by_row.add(k, p[r][k]);
          in_row += p[r][k] > 0.f;
          in_column[k] += p[r][k] > 0.f;
        }
        counts.add(r, in_row);
        rows[r] = by_row.lane_total();
      }
      sum_lanes<kWarp, Shape::kQuadRows>(rows);
      counts.sum_lanes();
#pragma unroll
      for (int k = 0; k < K; ++k) column_counts[k] = fmaxf(1.f, static_cast<float>(in_column[k]));
    }

    // One round. Returns pos before it, col and row.
    __device__ __forceinline__ Bits round(float e) {
      Bits bits;
      ColumnSums<N, K> by_column;
#pragma unroll
      for (int r = 0; r < N; ++r) {
        float d = __fdividef(rows[r] - e, counts.at_least_one(r));
        if constexpr (kUnmatched) d = fmaxf(d, -a[r]);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const bool pos = p[r][k] > 0.f;
          by_column.add(r, k, pos ? p[r][k] - d : 0.f);
          bits.set(Bits::pos(r, k), pos);
        }
        a[r] += d;
        if constexpr (kUnmatched) bits.set(Bits::row(), at.is_row_of_lane(r) && a[r] > 0.f);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float w = b[k] + __fdividef(by_column.total[k] - e, column_counts[k]);
        bits.set(Bits::col(k), w > 0.f);
        b[k] = fmaxf(0.f, w);
      }
      look();
      return bits;
    }
  };

  // h reaches -C - a - b. Row gradients da are partial sums over the lanes: a round adds them up.
  struct Adjoint {
    const Place<N, kWarp, K>& at;
    Bits after;
    float g[N][K], dcost[N][K], da[N], db[K];

    __device__ __forceinline__ Adjoint(const Solver& end, const void* grad, LaneMemory<float> stage) : at(end.at) {
      at.read(grad, stage);
#pragma unroll
      for (int k = 0; k < K; ++k) db[k] = 0.f;
#pragma unroll
      for (int r = 0; r < N; ++r) {
        da[r] = 0.f;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          after.set(Bits::pos(r, k), end.p[r][k] > 0.f);
          g[r][k] = stage[r * K + k];
          dcost[r][k] = 0.f;
        }
      }
    }

    __device__ __forceinline__ void arrive(int r, int k, float h) {
      dcost[r][k] -= h;
      da[r] -= h;
      db[k] -= h;
    }

    __device__ __forceinline__ void iterate(float weight) {
#pragma unroll
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int k = 0; k < K; ++k) arrive(r, k, after[Bits::pos(r, k)] ? weight * g[r][k] : 0.f);
    }

    __device__ __forceinline__ void round(const Bits& bits) {
      float ds[K], dd[N];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        int in_column = 0;
#pragma unroll
        for (int r = 0; r < N; ++r) in_column += bits[Bits::pos(r, k)];
        db[k] = bits[Bits::col(k)] ? db[k] : 0.f;
        ds[k] = __fdividef(db[k], fmaxf(1.f, static_cast<float>(in_column)));
      }
      [[maybe_unused]] unsigned row_bits = 0;
      if constexpr (kUnmatched) row_bits = at.row_bits(bits[Bits::row()]);
      RowCounts counts(at.lane);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        int in_row = 0;
        dd[r] = da[r];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          in_row += bits[Bits::pos(r, k)];
          dd[r] -= bits[Bits::pos(r, k)] ? ds[k] : 0.f;
        }
        counts.add(r, in_row);
        if constexpr (kUnmatched)
          if (!(row_bits >> at.row_of(r) & 1u)) {  // a price held at 0 forgets the one before
            da[r] -= dd[r];
            dd[r] = 0.f;
          }
      }
      sum_lanes<kWarp, Shape::kQuadRows>(dd);
      counts.sum_lanes();
#pragma unroll
      for (int r = 0; r < N; ++r) {
        dd[r] = __fdividef(dd[r], counts.at_least_one(r));
#pragma unroll
        for (int k = 0; k < K; ++k) arrive(r, k, bits[Bits::pos(r, k)] ? ds[k] + dd[r] : 0.f);
      }
      after = bits;
    }
  };
};

template <int N, int K, bool kUnmatched>
__global__ void __launch_bounds__(kWarp, 1) forward_kernel(Problem p, void* out) {
  constexpr bool kRoomy = Layout<N, kWarp, K>::kRoomy;
  using Stage = Grid<N, K, false>;
  using Total = Grid<N, K, kRoomy>;
  __shared__ float memory[Stage::kSharedFloats + Total::kSharedFloats];
  Arena arena{memory};
  Stage stage(arena);
  Total total(arena);
  const Place<N, kWarp, K> at(p, blockIdx.x);
  typename Warp<N, K, kUnmatched>::Solver solve(at, stage.value);
#pragma unroll
  for (int r = 0; r < N; ++r)
#pragma unroll
    for (int k = 0; k < K; ++k) total(r, k) = 0.f;
  const int n_grad = static_cast<int>(p.options.n_grad), n_proj = static_cast<int>(p.options.n_proj);
  for (int step = 1; step <= n_grad; ++step) {
    const float t = solve.t(step), e = 1.f / t, weight = t * static_cast<float>(p.scale);
    for (int i = 0; i < n_proj; ++i) solve.round(e);
    if (p.options.last && step < n_grad) continue;
#pragma unroll
    for (int r = 0; r < N; ++r) {
      pace<kRoomy>(r);
#pragma unroll
      for (int k = 0; k < K; ++k) total(r, k) = fmaf(weight, solve.p[r][k], total(r, k));
    }
  }
#pragma unroll
  for (int r = 0; r < N; ++r) {
    pace<kRoomy>(r);
#pragma unroll
    for (int k = 0; k < K; ++k) stage(r, k) = total(r, k);
  }
  at.write(out, stage.value, solve.poison);
}

// The forward again, with the bits of every round kept in shared memory or, where they don't fit, in `scratch`; and
// back.
template <int N, int K, bool kUnmatched>
__global__ void __launch_bounds__(kWarp, 1) backward_kernel(Problem p, Gradients out, void* scratch) {
  using W = Warp<N, K, kUnmatched>;
  using Word = typename W::Shape::Word;
  using Stage = Grid<N, K, false>;
  __shared__ float memory[Stage::kSharedFloats];
  const int n_grad = static_cast<int>(p.options.n_grad), n_proj = static_cast<int>(p.options.n_proj);
  const int64_t block_words = int64_t{n_grad} * n_proj * W::Shape::kWords * kWarp;
  Word* const words = scratch ? static_cast<Word*>(scratch) + blockIdx.x * block_words : reinterpret_cast<Word*>(shared_memory);
  const LaneMemory<Word> kept{words + threadIdx.x};
  for (int64_t b = blockIdx.x; b < p.B; b += gridDim.x) {
    Arena arena{memory};
    Stage stage(arena);
    const Place<N, kWarp, K> at(p, b);
    typename W::Solver solve(at, stage.value);
    for (int step = 1, round = 0; step <= n_grad; ++step) {
      const float e = 1.f / solve.t(step);
      for (int i = 0; i < n_proj; ++i, ++round) solve.round(e).save(kept, round);
    }
    typename W::Adjoint back(solve, out.grad, stage.value);
    for (int step = n_grad, round = n_grad * n_proj; step >= 1; --step) {
      if (!p.options.last || step == n_grad) back.iterate(solve.t(step) * static_cast<float>(p.scale));
      for (int i = 0; i < n_proj; ++i) back.round(W::Bits::load(kept, --round));
    }
    at.template read_cost<kUnmatched>(stage.value);
    float dlr = 0.f;
#pragma unroll
    for (int r = 0; r < N; ++r)
#pragma unroll
      for (int k = 0; k < K; ++k) {
        dlr = fmaf(back.dcost[r][k], stage(r, k), dlr);
        stage(r, k) = back.dcost[r][k];
      }
    dlr = sum_lanes<kWarp>(dlr) / at.lr;  // X depends on lr C alone
    at.write(out.cost, stage.value, solve.poison);
    if (at.lane == 0) static_cast<float*>(out.lr)[b] = at.n || at.out_of_range ? dlr + solve.poison : 0.f;
  }
}

// ---- any size, and float64: a block per problem; warps own rows, threads own columns, two barriers per round ----

struct Sizes {
  static GeneralSizes forward(int64_t N, int64_t M) { return {2 * N * M + 3 * N + M, 0, 0}; }
  static GeneralSizes backward(int64_t N, int64_t M, const MatchOptions& options, bool unmatched) {
    const int64_t rounds = options.n_grad * options.n_proj;
    return {2 * N * M + 5 * N + 3 * M, 0, (rounds + 1) * GeneralSizes::round_words(N, M, unmatched)};
  }
};

template <typename T, bool kUnmatched>
struct GeneralSolver {
  const Problem& p;
  int64_t n, m, b_index, offset;
  T lr, poison;
  bool out_of_range;
  T *gain, *total, *a, *a_next, *d, *b;  // gain, total: [n, m]
  const int64_t words;                   // of a row's bits
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  __device__ GeneralSolver(const Problem& problem, Cursor<T>& cursor) : p(problem), words((problem.M + 31) / 32) {
    gain = cursor.take(p.N * p.M), total = cursor.take(p.N * p.M);
    a = cursor.take(p.N), a_next = cursor.take(p.N), d = cursor.take(p.N), b = cursor.take(p.M);
  }

  __device__ int64_t index(int64_t r, int64_t c) const { return offset + r * p.M + c; }
  __device__ T cost(int64_t r, int64_t c) const {
    const T own = kUnmatched ? static_cast<const T*>(p.unmatched)[b_index * p.unmatched_stride + r] : T(0);
    return load<T>(p.cost, index(r, c), p.element) - own;
  }
  __device__ T t(int64_t step) const { return sharpness(lr, static_cast<T>(step), static_cast<T>(p.options.n_grad)); }
  __device__ T point(int64_t r, int64_t c) const {
    const T value = gain[r * m + c] - a[r] - b[c];
    return value > 0 ? value : T(0);
  }

  // each(r, c, i) for the rows of this warp; i = r * m + c.
  template <typename Each>
  __device__ void for_rows(const Each& each) const {
    for (int64_t r = warp; r < n; r += warps)
      for (int64_t c = lane; c < m; c += 32) each(r, c, r * m + c);
  }

  __device__ void load_problem(int64_t which) {
    b_index = which;
    offset = which * p.N * p.M;
    n = p.num_templates ? p.num_templates[which] : p.N;
    m = p.num_proposals ? p.num_proposals[which] : p.M;
    out_of_range = n < 0 || n > p.N || m < 0 || m > p.M;
    if (out_of_range || n == 0 || m == 0) n = m = 0;
    lr = p.lr ? static_cast<const T*>(p.lr)[which * p.lr_stride] : static_cast<T>(p.options.lr);
    const T e = 1 / t(1);
    T bad = T(0) * lr;
    for (int64_t r = warp; r < n; r += warps) {
      T best = -INFINITY;
      for (int64_t c = lane; c < m; c += 32) {
        const T cost = this->cost(r, c);
        bad += T(0) * cost;
        gain[r * m + c] = -cost;
        total[r * m + c] = 0;
        best = -cost > best ? -cost : best;
      }
      for (int distance = 16; distance > 0; distance /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, best, distance);
        best = other > best ? other : best;
      }
      if (lane == 0) a[r] = kUnmatched && !(best - e > 0) ? T(0) : best - e;
    }
    for (int64_t c = threadIdx.x; c < m; c += blockDim.x) b[c] = 0;
    poison = nan_unless<T>(!__syncthreads_or(bad != bad) && !out_of_range && lr > 0);
  }

  // pos of this warp's rows at the present point.
  __device__ void save_pos(uint32_t* bits) const {
    for (int64_t r = warp; r < n; r += warps)
      for (int64_t c = lane; c - lane < m; c += 32) save(bits, r, c, c < m && point(r, c) > 0);
  }
  __device__ void save(uint32_t* bits, int64_t r, int64_t c, bool set) const {
    const uint32_t word = __ballot_sync(kAllLanes, set);
    if (lane == 0) bits[r * words + c / 32] = word;
  }

  // All threads enter and leave together. With bits, pos before the round, col and row are kept there.
  __device__ void round(T e, uint32_t* bits) {
    if (bits) save_pos(bits);
    for (int64_t r = warp; r < n; r += warps) {
      T sum = 0, count = 0;
      for (int64_t c = lane; c < m; c += 32) {
        const T x = point(r, c);
        sum += x;
        count += x > 0;
      }
      sum = sum_warp(sum), count = sum_warp(count);
      if (lane == 0) {
        d[r] = (sum - e) / (count > 1 ? count : T(1));
        if constexpr (kUnmatched) d[r] = d[r] > -a[r] ? d[r] : -a[r];
        a_next[r] = a[r] + d[r];
      }
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c - lane < m; c += blockDim.x) {
      T s = 0, count = 0, w = 0;
      if (c < m) {
        for (int64_t r = 0; r < n; ++r) {
          const T x = point(r, c);
          if (x > 0) {
            s += x - d[r];
            count += 1;
          }
        }
        w = b[c] + (s - e) / (count > 1 ? count : T(1));
        b[c] = w > 0 ? w : T(0);
      }
      if (bits) save(bits, n, c, w > 0);
    }
    if constexpr (kUnmatched)
      for (int64_t r = threadIdx.x; bits && r - lane < n; r += blockDim.x)
        save(bits + (p.N + 1) * words, 0, r, r < n && a_next[r] > 0);
    __syncthreads();
    T* const old = a;
    a = a_next, a_next = old;
  }

  // Writes value(r, c, i), NaN where the problem is poisoned, 0 around it.
  template <typename Value>
  __device__ void write(void* tensor, const Value& value) const {
    for (int64_t r = warp; r < p.N; r += warps)
      for (int64_t c = lane; c < p.M; c += 32) {
        const T inside = r < n && c < m ? value(r, c, r * m + c) + poison : out_of_range ? poison : T(0);
        store<T>(tensor, index(r, c), p.element, inside);
      }
  }
};

template <typename T, bool kUnmatched>
__global__ void __launch_bounds__(kGeneralThreads<T>, 1)
    general_forward_kernel(Problem p, GeneralSizes sizes, unsigned char* scratch, void* out) {
  const int64_t bytes = sizes.template array_bytes<T>();
  Cursor<T> cursor{reinterpret_cast<T*>(scratch ? scratch + blockIdx.x * bytes : shared_memory)};
  GeneralSolver<T, kUnmatched> solve(p, cursor);
  for (int64_t problem = blockIdx.x; problem < p.B; problem += gridDim.x) {
    solve.load_problem(problem);
    for (int64_t step = 1; step <= p.options.n_grad; ++step) {
      const T t = solve.t(step), weight = t * static_cast<T>(p.scale);
      for (int64_t round = 0; round < p.options.n_proj; ++round) solve.round(1 / t, nullptr);
      if (p.options.last && step < p.options.n_grad) continue;
      solve.for_rows([&](int64_t r, int64_t c, int64_t i) { solve.total[i] += weight * solve.point(r, c); });
    }
    solve.write(out, [&](int64_t, int64_t, int64_t i) { return solve.total[i]; });
    __syncthreads();
  }
}

template <typename T, bool kUnmatched>
__global__ void __launch_bounds__(kGeneralThreads<T>, 1)
    general_backward_kernel(Problem p, GeneralSizes sizes, unsigned char* cold, unsigned char* scratch, Gradients out) {
  const int64_t bytes = sizes.template array_bytes<T>();
  Cursor<T> cursor{reinterpret_cast<T*>(scratch ? scratch + blockIdx.x * bytes : shared_memory)};
  GeneralSolver<T, kUnmatched> solve(p, cursor);
  T *const da = cursor.take(p.N), *const dd = cursor.take(p.N), *const db = cursor.take(p.M), *const ds = cursor.take(p.M);
  T *const dcost = solve.gain, *const g = solve.total;  // from the end of the forward on
  auto* const bits = reinterpret_cast<uint32_t*>(cold + blockIdx.x * sizes.template cold_bytes<T>());
  const int64_t n_grad = p.options.n_grad, n_proj = p.options.n_proj;
  const int64_t round_words = GeneralSizes::round_words(p.N, p.M, kUnmatched);
  const int lane = solve.lane;

  for (int64_t problem = blockIdx.x; problem < p.B; problem += gridDim.x) {
    solve.load_problem(problem);
    const int64_t n = solve.n, m = solve.m;
    for (int64_t step = 1, round = 0; step <= n_grad; ++step)
      for (int64_t i = 0; i < n_proj; ++i, ++round) solve.round(1 / solve.t(step), bits + round * round_words);
    solve.save_pos(bits + n_grad * n_proj * round_words);
    __syncthreads();

    solve.for_rows([&](int64_t r, int64_t c, int64_t i) {
      g[i] = load<T>(out.grad, solve.index(r, c), p.element);
      dcost[i] = 0;
    });
    for (int64_t r = threadIdx.x; r < n; r += blockDim.x) da[r] = 0;
    for (int64_t c = threadIdx.x; c < m; c += blockDim.x) db[c] = 0;
    __syncthreads();

    // h(r, c, i) where the bits of `round` are set: over the rows of this warp, then over the columns of this thread.
    const auto arrive = [&](int64_t round, const auto& h) {
      const uint32_t* const at = bits + round * round_words;
      const auto bit = [&](int64_t r, int64_t c) { return (at[r * solve.words + c / 32] >> (c % 32) & 1u) != 0; };
      for (int64_t r = solve.warp; r < n; r += solve.warps) {
        T sum = 0;
        for (int64_t c = lane; c < m; c += 32) {
          const T value = bit(r, c) ? h(r, c, r * m + c) : T(0);
          dcost[r * m + c] -= value;
          sum += value;
        }
        sum = sum_warp(sum);
        if (lane == 0) da[r] -= sum;
      }
      for (int64_t c = threadIdx.x; c < m; c += blockDim.x) {
        T sum = 0;
        for (int64_t r = 0; r < n; ++r)
          if (bit(r, c)) sum += h(r, c, r * m + c);
        db[c] -= sum;
      }
      __syncthreads();
    };

    for (int64_t step = n_grad, round = n_grad * n_proj; step >= 1; --step) {
      const T weight = solve.t(step) * static_cast<T>(p.scale);
      if (!p.options.last || step == n_grad) arrive(round, [&](int64_t, int64_t, int64_t i) { return weight * g[i]; });
      for (int64_t i = 0; i < n_proj; ++i) {
        const uint32_t* const at = bits + --round * round_words;
        const auto bit = [&](int64_t r, int64_t c) { return (at[r * solve.words + c / 32] >> (c % 32) & 1u) != 0; };
        for (int64_t c = threadIdx.x; c < m; c += blockDim.x) {
          T count = 0;
          for (int64_t r = 0; r < n; ++r) count += bit(r, c);
          db[c] = bit(n, c) ? db[c] : T(0);
          ds[c] = db[c] / (count > 1 ? count : T(1));
        }
        __syncthreads();
        for (int64_t r = solve.warp; r < n; r += solve.warps) {
          T sum = 0, count = 0;
          for (int64_t c = lane; c < m; c += 32)
            if (bit(r, c)) {
              sum += ds[c];
              count += 1;
            }
          sum = sum_warp(sum), count = sum_warp(count);
          if (lane == 0) {
            if constexpr (kUnmatched)
              if (!(at[(p.N + 1) * solve.words + r / 32] >> (r % 32) & 1u))
                da[r] = sum;  // held at 0, it forgets the one before
            dd[r] = (da[r] - sum) / (count > 1 ? count : T(1));
          }
        }
        __syncthreads();
        arrive(round, [&](int64_t r, int64_t c, int64_t) { return ds[c] + dd[r]; });
      }
    }

    solve.write(out.cost, [&](int64_t, int64_t, int64_t i) { return dcost[i]; });
    for (int64_t r = solve.warp; r < n; r += solve.warps) {
      T sum = 0;
      for (int64_t c = lane; c < m; c += 32) sum += dcost[r * m + c] * solve.cost(r, c);
      sum = sum_warp(sum);
      if (lane == 0) dd[r] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      T sum = 0;
      for (int64_t r = 0; r < n; ++r) sum += dd[r];
      static_cast<T*>(out.lr)[problem] = n || solve.out_of_range ? sum / solve.lr + solve.poison : T(0);
    }
    __syncthreads();
  }
}

}  // namespace dmm::cuda::prices
