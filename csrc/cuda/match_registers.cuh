// The matching layer for n <= 16 templates and m <= 128 proposals: a problem lives in the registers of part of a warp.
// docs/matching.md derives the algorithm; docs/performance.md explains the layout.
//
// kLanes lanes share a problem, columns run across lanes (column k * kLanes + lane), rows across registers. Column sums
// are lane-local; row sums are the only traffic between lanes. u is replicated, v is per lane, y0 is the only array
// that must be fast. With z = max(y0 - u, v) = x + v a round costs four instructions per element, and n * v drops out
// of the column step:
//     row sum of x = sum z - sum v          column sum of x + n * v = sum z
// Absent rows and columns have y0 = -inf, so z = v and x = 0; absent columns have 1/n = 0, so v = 0 for ever.
//
// Every sum is one fixed tree over rows and columns, whatever kLanes is, and products that are summed are rounded first
// (__fmul_rn, which the compiler does not fuse): results do not depend, to the bit, on the layout chosen for the batch.
//
// kUnmatched: templates may stay alone. The cost is less by what that costs, u >= 0, and each lane keeps the bit of one row.
#pragma once

#include "problem.cuh"

namespace dmm::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// use(T{}) with the type behind `element`: the branch is taken once per array, not once per element. These kernels
// compute in float and are never given f64.
template <typename Use>
__device__ __forceinline__ void with_element(Element element, const Use& use) {
  if (element == Element::f32)
    use(float{});
  else if (element == Element::f16)
    use(c10::Half{});
  else
    use(c10::BFloat16{});
}

template <int N, int kLanes, int K, bool kUnmatched = false>
struct Layout {
  static_assert(!kUnmatched || N <= kLanes);
  static_assert(kLanes == 4 || kLanes == 8 || kLanes == 16 || kLanes == 32);
  static constexpr int kProblems = kWarp / kLanes;  // per warp
  static constexpr int kClasses = kWarp / kLanes;   // accumulators of a row sum: columns equal modulo 32 share one
  static constexpr int kElements = N * K;

  // Four rows are reduced together at the price of about one, but with two steps more to wait for. A whole warp per
  // problem is chosen for latency, so there it pays from the point where the shuffles themselves are the queue.
  static constexpr bool kTransposed = N >= 4 && (kLanes < kWarp || N > 8);
  static constexpr int kQuadRows = kTransposed ? N / 4 * 4 : 0;

  static constexpr bool kRoomy = kElements <= 40;  // two more arrays of the size of y0 fit into registers

  // Mask bits of a round and lane, first bit highest: pos[r][k] in order, then col[k], then that of row `lane`.
  static constexpr int kRowBit = (N + 1) * K;
  static constexpr int kBits = kRowBit + kUnmatched;
  static constexpr int kWords = (kBits + 31) / 32;
  static __device__ constexpr int word_of(int bit) { return bit / 32; }
  static __device__ constexpr int shift_of(int bit) {
    const int in_word = word_of(bit) + 1 < kWords ? 32 : kBits - (kWords - 1) * 32;
    return in_word - 1 - bit % 32;
  }
  using Word = std::conditional_t<kBits <= 16, uint16_t, uint32_t>;

  // Floats per lane of a snapshot of the forward, and of the backward's state between two segments.
  static constexpr int64_t kSnapshot = kElements + 2 * N + K + kUnmatched;
  static constexpr int64_t kPending = 2 * kElements + 2 * N + 2 * K;
};

// Sums over rows, in an order that does not change when the rows of a group of four are permuted by XOR.
template <int N, int K>
struct ColumnSums {
  float total[K], even[K], odd[K];

  __device__ __forceinline__ void add(int r, int k, float value) {
    if (r >= N / 4 * 4)
      total[k] = r ? total[k] + value : value;
    else if (r % 4 == 0)
      even[k] = value;
    else if (r % 4 == 1)
      even[k] += value;
    else if (r % 4 == 2)
      odd[k] = value;
    else
      total[k] = r == 3 ? even[k] + (odd[k] + value) : total[k] + (even[k] + (odd[k] + value));
  }
};

template <int N>
__device__ __forceinline__ float sum_rows(const float (&row)[N]) {
  ColumnSums<N, 1> sums;
#pragma unroll
  for (int r = 0; r < N; ++r) sums.add(r, 0, row[r]);
  return sums.total[0];
}

// Sum over a lane's columns, and the tree's first levels that a wider layout would run across lanes.
template <int kLanes, int K>
struct RowSum {
  static constexpr int kClasses = kWarp / kLanes;
  float part[kClasses];

  __device__ __forceinline__ void add(int k, float value) {
    part[k % kClasses] = k < kClasses ? value : part[k % kClasses] + value;
  }
  __device__ __forceinline__ float lane_total() {
#pragma unroll
    for (int c = K; c < kClasses; ++c) part[c] = 0;
#pragma unroll
    for (int half = kClasses / 2; half > 0; half /= 2)
#pragma unroll
      for (int c = 0; c < half; ++c) part[c] += part[c + half];
    return part[0];
  }
};

__device__ __forceinline__ float from_lane(float value, int distance) { return __shfl_xor_sync(kAllLanes, value, distance); }

// All-reduce of one value over the lanes of a problem.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += from_lane(value, distance);
  return value;
}

// All-reduce of `kCount` values over the lanes of a problem. The first kQuadRows are rows in groups of four, where slot
// j of a lane holds row j ^ p, p the top two bits of the lane: then each exchange halves what is left to add without a
// select.
template <int kLanes, int kQuadRows, int kCount>
__device__ __forceinline__ void sum_lanes(float (&value)[kCount]) {
#pragma unroll
  for (int j = 0; j < kQuadRows; j += 4) {
    value[j] += from_lane(value[j + 2], kLanes / 2);
    value[j + 1] += from_lane(value[j + 3], kLanes / 2);
    value[j] += from_lane(value[j + 1], kLanes / 4);
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int j = 0; j < kQuadRows; j += 4)
      if (distance < kLanes / 4) value[j] += from_lane(value[j], distance);
#pragma unroll
    for (int j = kQuadRows; j < kCount; ++j) value[j] += from_lane(value[j], distance);
  }
#pragma unroll
  for (int j = 0; j < kQuadRows; j += 4) value[j + 1] = from_lane(value[j], kLanes / 4);
#pragma unroll
  for (int j = 0; j < kQuadRows; j += 4) {
    value[j + 2] = from_lane(value[j], kLanes / 2);
    value[j + 3] = from_lane(value[j + 1], kLanes / 2);
  }
}

// Memory of one lane, in steps of a warp.
template <typename T>
struct LaneMemory {
  T* base;
  __device__ __forceinline__ T& operator[](int i) const { return base[i * kWarp]; }
};

// The part of the batch that a lane works on.
template <int N, int kLanes, int K>
struct Place {
  using Shape = Layout<N, kLanes, K>;
  const Problem& p;
  int lane;  // within the problem
  int n, m;  // of the problem; 0, 0 where there is nothing to solve
  int64_t b;
  bool exists, out_of_range;
  float lr;

  __device__ __forceinline__ Place(const Problem& problem, int64_t group)
      : p(problem), lane(threadIdx.x % kLanes), b(group * Shape::kProblems + threadIdx.x / kLanes), exists(b < p.B) {
    const int64_t want_n = exists ? (p.num_templates ? p.num_templates[b] : p.N) : 0;
    const int64_t want_m = exists ? (p.num_proposals ? p.num_proposals[b] : p.M) : 0;
    out_of_range = want_n < 0 || want_n > p.N || want_m < 0 || want_m > p.M;
    const bool any = !out_of_range && want_n > 0 && want_m > 0;
    n = any ? static_cast<int>(want_n) : 0;
    m = any ? static_cast<int>(want_m) : 0;
    lr = !exists ? 0.f : p.lr ? static_cast<const float*>(p.lr)[b * p.lr_stride] : static_cast<float>(p.options.lr);
  }

  __device__ __forceinline__ int row_of(int slot) const {
    return slot < Shape::kQuadRows ? slot ^ (lane / (kLanes / 4)) : slot;
  }
  __device__ __forceinline__ int column_of(int k) const { return k * kLanes + lane; }
  __device__ __forceinline__ bool present(int slot, int k) const { return row_of(slot) < n && column_of(k) < m; }
  __device__ __forceinline__ int64_t index(int slot, int k) const { return (b * p.N + row_of(slot)) * p.M + column_of(k); }

  // Copies the problem between a tensor and memory of the lane, `stage`, element (slot, k) at slot * K + k. Loops stay
  // rolled: what follows the element type is kept small, and a batch of loads is in flight at a time. No tensor: zeros.
  __device__ __forceinline__ void read(const void* tensor, LaneMemory<float> stage) const {
    constexpr int kRowsAtATime = K >= 8 ? 1 : 8 / K;
    with_element(p.element, [&](auto tag) {
      const auto* typed = static_cast<const decltype(tag)*>(tensor);
#pragma unroll 1
      for (int first = 0; first < N; first += kRowsAtATime) {
        float value[kRowsAtATime][K];
#pragma unroll
        for (int r = 0; r < kRowsAtATime; ++r)
#pragma unroll
          for (int k = 0; k < K; ++k)
            value[r][k] = tensor && present(first + r, k) ? static_cast<float>(typed[index(first + r, k)]) : 0.f;
#pragma unroll
        for (int r = 0; r < kRowsAtATime; ++r)
#pragma unroll
          for (int k = 0; k < K; ++k)
            if (first + r < N) stage[(first + r) * K + k] = value[r][k];
      }
    });
  }

  __device__ __forceinline__ bool is_row_of_lane(int slot) const { return row_of(slot) == lane; }

  // The bit of each row, at its number, from every lane's of row `lane`.
  __device__ __forceinline__ unsigned row_bits(bool mine) const {
    return __ballot_sync(kAllLanes, mine) >> (kLanes < kWarp ? threadIdx.x / kLanes * kLanes : 0);
  }

  template <bool kUnmatched>
  __device__ __forceinline__ void read_cost(LaneMemory<float> stage) const {
    read(p.cost, stage);
    if constexpr (kUnmatched) {
#pragma unroll 1
      for (int r = 0; r < N; ++r) {
        if (row_of(r) >= n) continue;
        const float own = static_cast<const float*>(p.unmatched)[b * p.unmatched_stride + row_of(r)];
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (column_of(k) < m) stage[r * K + k] -= own;
      }
    }
  }

  // 0 around the problem, and `poison` added within it.
  __device__ __forceinline__ void write(void* tensor, LaneMemory<float> stage, float poison) const {
    with_element(p.element, [&](auto tag) {
      auto* typed = static_cast<decltype(tag)*>(tensor);
#pragma unroll 1
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const float value = present(r, k) || out_of_range ? stage[r * K + k] + poison : 0.f;
          if (exists && row_of(r) < p.N && column_of(k) < p.M) typed[index(r, k)] = static_cast<decltype(tag)>(value);
        }
    });
  }
};

// Hands out a block's shared memory.
struct Arena {
  float* next;
};

// [N, K] values of a lane: in registers, or in shared memory where registers are short.
template <int N, int K, bool kInRegisters>
struct Grid {
  static constexpr int kSharedFloats = 0;
  float value[N][K];
  __device__ __forceinline__ explicit Grid(Arena&) {}
  __device__ __forceinline__ float& operator()(int r, int k = 0) { return value[r][k]; }
};

template <int N, int K>
struct Grid<N, K, false> {
  static constexpr int kSharedFloats = N * K * kWarp;
  LaneMemory<float> value;
  __device__ __forceinline__ explicit Grid(Arena& arena) : value{arena.next + threadIdx.x} { arena.next += kSharedFloats; }
  __device__ __forceinline__ float& operator()(int r, int k = 0) const { return value[r * K + k]; }
};

// Before row r: where registers are short, no more than four rows are read ahead from shared memory, or the compiler
// spills.
template <bool kRoomy>
__device__ __forceinline__ void pace(int r) {
  if (!kRoomy && r % 4 == 0) __syncwarp();
}

// The forward iteration. `update_duals` and `sweep` alternate, n_proj times per outer step.
template <int N, int kLanes, int K, bool kRecord, bool kUnmatched>
struct Solver {
  using Shape = Layout<N, kLanes, K, kUnmatched>;
  // Touched once per outer step, and live through the backward as well: the first to leave the registers.
  static constexpr bool kRoomForCost = Shape::kElements <= (kRecord ? 24 : 40);
  using Stage = Grid<N, K, false>;
  using Cost = Grid<N, K, kRoomForCost>;
  using CostRow = Grid<N, 1, kRoomForCost>;
  using CostColumn = Grid<1, K, kRoomForCost>;
  using RowDual = Grid<N, 1, Shape::kRoomy>;
  static constexpr int kSharedFloats =
      Stage::kSharedFloats + Cost::kSharedFloats + CostRow::kSharedFloats + CostColumn::kSharedFloats + RowDual::kSharedFloats;

  const Place<N, kLanes, K>& at;
  const bool carry;
  float y0[N][K], v[K], rows[N], columns[K];  // sums of x over a row; (sum z - absent rows * v) / n over a column
  float inv_m, inv_n[K], base;                // base + sum of rows / m = 1 + sum of d
  float next_base, absent_rows, dropped_rows;
  [[maybe_unused]] float u_sum;  // kUnmatched: of u before the round, which base and next_base are not used for
  float poison;                  // 0, or NaN where anything in the problem is not finite
  Stage stage;                   // between tensors and registers
  Cost step;                     // lr * C; infinite where absent
  CostRow cost_row;              // sums of lr * C over a row, times 1/m
  CostColumn cost_column;        // sums of lr * C over a column
  RowDual u;

  __device__ __forceinline__ Solver(const Place<N, kLanes, K>& place, const Problem& p, Arena& arena)
      : at(place), carry(p.options.carry), stage(arena), step(arena), cost_row(arena), cost_column(arena), u(arena) {
    inv_m = at.m ? 1.f / static_cast<float>(at.m) : 0.f;
    absent_rows = static_cast<float>(N - at.n);
    dropped_rows = carry ? absent_rows : static_cast<float>(N);  // a reset forgets v in every row
#pragma unroll
    for (int k = 0; k < K; ++k) inv_n[k] = at.column_of(k) < at.m ? 1.f / static_cast<float>(at.n) : 0.f;

    poison = at.out_of_range ? NAN : 0.f * at.lr;
    at.template read_cost<kUnmatched>(stage.value);
    ColumnSums<N, K> by_column;
#pragma unroll
    for (int r = 0; r < N; ++r) {
      RowSum<kLanes, K> by_row;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float value = __fmul_rn(at.lr, stage(r, k));
        poison += 0.f * value;
        by_row.add(k, value);
        by_column.add(r, k, value);
        step(r, k) = at.present(r, k) ? value : INFINITY;
      }
      rows[r] = by_row.lane_total();
    }
#pragma unroll
    for (int k = 0; k < K; ++k) cost_column(0, k) = by_column.total[k];
    sum_lanes<kLanes, Shape::kQuadRows>(rows);
    next_base = fmaf(-(static_cast<float>(at.n) + sum_rows(rows)), inv_m, 1.f);
#pragma unroll
    for (int r = 0; r < N; ++r) cost_row(r) = __fmul_rn(rows[r], inv_m);
  }

  // x = init - lr * C, where init may be anything. each(r, k, init) sees every element of the start.
  template <typename Each>
  __device__ __forceinline__ void begin(const Problem& p, const Each& each) {
    at.read(p.init, stage.value);
    ColumnSums<N, K> by_column;
#pragma unroll
    for (int r = 0; r < N; ++r) {
      RowSum<kLanes, K> by_row;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float start = stage(r, k);
        each(r, k, start);
        y0[r][k] = start - step(r, k);
        const float x = at.present(r, k) ? y0[r][k] : 0.f;
        by_row.add(k, x);
        by_column.add(r, k, x);
      }
      rows[r] = by_row.lane_total();
      u(r) = 0.f;
    }
    sum_lanes<kLanes, Shape::kQuadRows>(rows);
#pragma unroll
    for (int k = 0; k < K; ++k) columns[k] = __fmul_rn(by_column.total[k], inv_n[k]);
    base = fmaf(-static_cast<float>(at.n), inv_m, 1.f);
    if constexpr (kUnmatched) u_sum = 0.f;
  }

  // Steps 1 and 2 of a round: u += (row sum - 1) / m;  v = max(0, (column sum - sum of d + n v - 1) / n).
  __device__ __forceinline__ void update_duals() {
    float excess;
    if constexpr (kUnmatched) {
      ColumnSums<N, 1> sums;
#pragma unroll
      for (int r = 0; r < N; ++r) {
        const float moved = fmaxf(0.f, fmaf(rows[r] - 1.f, inv_m, u(r)));
        sums.add(r, 0, moved);
        u(r) = moved;
      }
      excess = 1.f + (sums.total[0] - u_sum);
      u_sum = sums.total[0];
    } else {
      excess = fmaf(sum_rows(rows), inv_m, base);
#pragma unroll
      for (int r = 0; r < N; ++r) u(r) = fmaf(rows[r] - 1.f, inv_m, u(r));
    }
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = fmaxf(0.f, fmaf(-excess, inv_n[k], columns[k]));
  }

  // Step 3 of a round, x = relu(y0 - u - v), as the sums that the next round needs. kOuter ends an outer step: x is the
  // new iterate X, each(r, k, X) sees it, and the next round starts from X - lr * C, whose sums are those of X less
  // those of lr * C.
  template <bool kOuter, typename Each>
  __device__ __forceinline__ void sweep(LaneMemory<typename Shape::Word> masks, const Each& each) {
    [[maybe_unused]] unsigned bits[Shape::kWords];
    RowSum<kLanes, K> v_sum;
#pragma unroll
    for (int k = 0; k < K; ++k) v_sum.add(k, v[k]);
    ColumnSums<N, K> by_column;
#pragma unroll
    for (int r = 0; r < N; ++r) {
      RowSum<kLanes, K> by_row;
      const float u_r = u(r);
      if constexpr (kOuter) pace<Shape::kRoomy>(r);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float t = y0[r][k] - u_r;
        const float z = fmaxf(t, v[k]);
        by_row.add(k, k < Shape::kClasses ? z - v_sum.part[k] : z);
        by_column.add(r, k, z);
        if constexpr (kRecord) push(bits, r * K + k, v[k] - t);
        if constexpr (kOuter) {
          const float x = z - v[k];
          each(r, k, x);
          y0[r][k] = (carry ? y0[r][k] : x) - step(r, k);
        }
      }
      rows[r] = by_row.lane_total();
    }
    sum_lanes<kLanes, Shape::kQuadRows>(rows);  // what follows runs in the shadow of the shuffles
    if constexpr (kRecord) {
#pragma unroll
      for (int k = 0; k < K; ++k) push(bits, N * K + k, 0.f - v[k]);
      if constexpr (kUnmatched) {
        float mine = 0.f;
#pragma unroll
        for (int r = 0; r < N; ++r) mine = chosen(at.is_row_of_lane(r), u(r), mine);
        push(bits, Shape::kRowBit, 0.f - mine);
      }
#pragma unroll
      for (int w = 0; w < Shape::kWords; ++w) masks[w] = static_cast<typename Shape::Word>(bits[w]);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const float kept = fmaf(kOuter ? -dropped_rows : -absent_rows, v[k], by_column.total[k]);
      columns[k] = __fmul_rn(kOuter ? kept - cost_column(0, k) : kept, inv_n[k]);
    }
    base = kOuter ? next_base : fmaf(-static_cast<float>(at.n), inv_m, 1.f);
    if constexpr (kOuter) {
#pragma unroll
      for (int r = 0; r < N; ++r) u(r) = (carry ? u(r) : 0.f) - cost_row(r);
      if constexpr (kUnmatched) u_sum = carry ? u_sum : 0.f;
    }
  }

  // `steps` outer steps. Masks go to `masks`, kWords per round.
  template <typename Each>
  __device__ __forceinline__ void run(int steps, int n_proj, LaneMemory<typename Shape::Word> masks, const Each& each) {
    for (int step = 0, round = 0; step < steps;) {
      update_duals();
      if (++round < n_proj) {
        sweep<false>(masks, each);
      } else {
        sweep<true>(masks, each);
        round = 0;
        ++step;
      }
      if constexpr (kRecord) masks.base += Shape::kWords * kWarp;
    }
  }

  // By value: "?:" on places would choose an address, and what is there leave its registers.
  static __device__ __forceinline__ float chosen(bool first, float a, float b) { return first ? a : b; }

  // Shifts the sign of `value` into the mask word of `bit`.
  static __device__ __forceinline__ void push(unsigned (&bits)[Shape::kWords], int bit, float value) {
    unsigned& word = bits[Shape::word_of(bit)];
    word = __funnelshift_l(__float_as_uint(value), bit % 32 ? word : 0u, 1);
  }

  // copy(i, value) for everything that the rest of the run depends on.
  template <typename Copy>
  __device__ __forceinline__ void snapshot(const Copy& copy) {
    int i = 0;
#pragma unroll
    for (int r = 0; r < N; ++r)
#pragma unroll
      for (int k = 0; k < K; ++k) copy(i++, y0[r][k]);
#pragma unroll
    for (int r = 0; r < N; ++r) copy(i++, rows[r]), copy(i++, u(r));
#pragma unroll
    for (int k = 0; k < K; ++k) copy(i++, columns[k]);
    if constexpr (kUnmatched) copy(i++, u_sum);
  }
};

// One warp per block: no barrier, and the scheduler balances the tail.
template <int N, int kLanes, int K, bool kUnmatched>
__global__ void __launch_bounds__(kWarp, 1) register_forward_kernel(Problem p, void* out) {
  using Solve = Solver<N, kLanes, K, false, kUnmatched>;
  using Total = Grid<N, K, Layout<N, kLanes, K>::kRoomy>;
  __shared__ float memory[Solve::kSharedFloats + Total::kSharedFloats];
  Arena arena{memory};
  const Place<N, kLanes, K> at(p, blockIdx.x);
  Solve solve(at, p, arena);
  Total total(arena);
  const bool average_start = p.options.carry && !p.options.last;
  const float keep = p.options.last ? 0.f : 1.f;
  float poison = solve.poison;
  solve.begin(p, [&](int r, int k, float x) {
    poison += 0.f * x;
    total(r, k) = average_start ? x : 0.f;
  });
  solve.run(static_cast<int>(p.options.n_grad), static_cast<int>(p.options.n_proj), {nullptr},
            [&](int r, int k, float x) { total(r, k) = fmaf(total(r, k), keep, x); });
  const float scale = static_cast<float>(p.scale);
#pragma unroll
  for (int r = 0; r < N; ++r)
#pragma unroll
    for (int k = 0; k < K; ++k) solve.stage(r, k) = total(r, k) * scale;
  at.write(out, solve.stage.value, sum_lanes<kLanes>(poison));
}

// Where a backward keeps what it cannot keep in registers.
struct Segments {
  int steps;  // outer steps whose masks fit into shared memory
  int count;
  float* scratch;  // per block: (count - 1) snapshots, then the pending gradient; null when there is one segment
};

// The iteration backwards. The names are those of docs/matching.md; x is rank one between rounds: row[r] + ds[k].
template <int N, int kLanes, int K, bool kUnmatched>
struct Adjoint {
  using Shape = Layout<N, kLanes, K, kUnmatched>;
  using Sum = Grid<N, K, Shape::kRoomy>;
  using RowDual = Grid<N, 1, Shape::kRoomy>;
  static constexpr int kSharedFloats = Sum::kSharedFloats + RowDual::kSharedFloats;
  float dx[N][K];  // reset: gradient of X, then dY within an outer step; carry: dY
  Sum dz_sum;
  RowDual du;
  float dv[K], row[N], ds[K];

  __device__ __forceinline__ explicit Adjoint(Arena& arena) : dz_sum(arena), du(arena) {
#pragma unroll
    for (int r = 0; r < N; ++r) {
      du(r) = row[r] = 0.f;
#pragma unroll
      for (int k = 0; k < K; ++k) dx[r][k] = dz_sum(r, k) = 0.f;
    }
#pragma unroll
    for (int k = 0; k < K; ++k) dv[k] = ds[k] = 0.f;
  }

  // One round. kNewest is the first to be undone in an outer step: there the gradient `grad` of the iterate joins in.
  template <bool kNewest, typename Solve>
  __device__ __forceinline__ void round(const Solve& solve, const unsigned (&bits)[Shape::kWords],
                                        const Grid<N, K, false>& grad, float weight) {
    const auto bit = [&](int i) { return (bits[Shape::word_of(i)] >> Shape::shift_of(i) & 1u) != 0; };

    ColumnSums<N, K> by_column;
    float sums[N + 1];  // of h over each row, and of ds over the columns
#pragma unroll
    for (int r = 0; r < N; ++r) {
      RowSum<kLanes, K> by_row;
      if constexpr (kNewest) pace<Shape::kRoomy>(r);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        float dy = dx[r][k], h = row[r] + ds[k];
        if constexpr (kNewest) {
          h = fmaf(grad(r, k), weight, solve.carry ? h : dy);
          dy = solve.carry ? dy : 0.f;
        }
        h = bit(r * K + k) ? h : 0.f;
        dx[r][k] = dy + h;
        by_row.add(k, h);
        by_column.add(r, k, h);
      }
      sums[r] = by_row.lane_total();
    }
    RowSum<kLanes, K> ds_sum;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      dv[k] = bit(N * K + k) ? dv[k] - by_column.total[k] : 0.f;
      ds[k] = __fmul_rn(dv[k], solve.inv_n[k]);
      ds_sum.add(k, ds[k]);
    }
    sums[N] = ds_sum.lane_total();
    [[maybe_unused]] unsigned row_bits = 0;
    if constexpr (kUnmatched) row_bits = solve.at.row_bits(bit(Shape::kRowBit));
    sum_lanes<kLanes, Shape::kQuadRows>(sums);
#pragma unroll
    for (int r = 0; r < N; ++r) {
      du(r) -= sums[r];
      if constexpr (kUnmatched)
        if (!(row_bits >> solve.at.row_of(r) & 1u)) du(r) = sums[N];  // u was held at 0
      row[r] = __fmul_rn(du(r) - sums[N], solve.inv_m);
    }
  }

  // The gradient step before the rounds: dz goes to C and to the iterate before.
  template <typename Solve>
  __device__ __forceinline__ void gradient_step(const Solve& solve) {
#pragma unroll
    for (int r = 0; r < N; ++r) {
      pace<Shape::kRoomy>(r);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float dz = row[r] + ds[k] + dx[r][k];
        dz_sum(r, k) += dz;
        if (!solve.carry) dx[r][k] = dz;
      }
    }
    if (!solve.carry) {
#pragma unroll
      for (int r = 0; r < N; ++r) du(r) = 0.f;
#pragma unroll
      for (int k = 0; k < K; ++k) dv[k] = 0.f;
    }
  }

  template <typename Copy>
  __device__ __forceinline__ void pending(const Copy& copy) {
    int i = 0;
#pragma unroll
    for (int r = 0; r < N; ++r)
#pragma unroll
      for (int k = 0; k < K; ++k) copy(i++, dx[r][k]), copy(i++, dz_sum(r, k));
#pragma unroll
    for (int r = 0; r < N; ++r) copy(i++, du(r)), copy(i++, row[r]);
#pragma unroll
    for (int k = 0; k < K; ++k) copy(i++, dv[k]), copy(i++, ds[k]);
  }
};

template <int N, int kLanes, int K, bool kUnmatched>
constexpr int kBackwardSharedFloats =
    Solver<N, kLanes, K, true, kUnmatched>::kSharedFloats + Adjoint<N, kLanes, K, kUnmatched>::kSharedFloats;

// Runs the forward again, mask bits into shared memory, then back. A run that is too long for that is cut into
// segments: up through all of them leaving snapshots, then down, each segment's masks rebuilt from its snapshot.
template <int N, int kLanes, int K, bool kUnmatched>
__global__ void __launch_bounds__(kWarp, 1)
    register_backward_kernel(Problem p, Gradients out, Segments segments, int64_t groups) {
  using Shape = Layout<N, kLanes, K, kUnmatched>;
  using Word = typename Shape::Word;
  using Solve = Solver<N, kLanes, K, true, kUnmatched>;
  using Undo = Adjoint<N, kLanes, K, kUnmatched>;
  __shared__ float memory[kBackwardSharedFloats<N, kLanes, K, kUnmatched>];
  const LaneMemory<Word> masks{reinterpret_cast<Word*>(shared_memory) + threadIdx.x};
  const int n_grad = static_cast<int>(p.options.n_grad), n_proj = static_cast<int>(p.options.n_proj);
  const int newest = segments.count - 1;
  const auto load_words = [](const LaneMemory<Word>& masks, int round, unsigned (&words)[Shape::kWords]) {
#pragma unroll
    for (int w = 0; w < Shape::kWords; ++w) words[w] = masks[round * Shape::kWords + w];
  };
  float* const scratch = segments.scratch + blockIdx.x * (newest * Shape::kSnapshot + Shape::kPending) * kWarp + threadIdx.x;
  const LaneMemory<float> pending{scratch + newest * Shape::kSnapshot * kWarp};
  const auto snapshot_of = [&](int segment) { return LaneMemory<float>{scratch + (segment - 1) * Shape::kSnapshot * kWarp}; };

  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const Place<N, kLanes, K> at(p, group);
    Arena arena{memory};
    Solve solve(at, p, arena);
    float poison = solve.poison;
    const float scale = static_cast<float>(p.scale);
    // The gradient of X lies where the problem was staged: 5 x 50, 40 x 5 then takes 28.5 KB with what the device keeps for
    // itself, of which a multiprocessor of 228 KB holds eight, two for each scheduler.
    const auto& grad = solve.stage;

    bool up = true;
    for (int segment = 0;;) {
      const int steps = segment < newest ? segments.steps : n_grad - newest * segments.steps;
      if (segment == 0)
        solve.begin(p, [&](int, int, float x) { poison += 0.f * x; });
      else
        solve.snapshot([&, from = snapshot_of(segment)](int i, float& value) { value = from[i]; });
      solve.run(steps, n_proj, masks, [](int, int, float) {});
      if (up && segment < newest) {
        ++segment;
        solve.snapshot([&, to = snapshot_of(segment)](int i, float& value) { to[i] = value; });
        continue;
      }
      up = false;
      at.read(out.grad, grad.value);
#pragma unroll 1
      for (int i = 0; i < N * K; ++i) grad.value[i] *= scale;

      Arena rest = arena;
      Undo adjoint(rest);
      if (segment < newest) adjoint.pending([&](int i, float& value) { value = pending[i]; });
      int last_round = steps * n_proj - 1;
      unsigned bits[Shape::kWords];
      load_words(masks, last_round, bits);
      // Undoes a round; the words of the one before it are on their way meanwhile.
      const auto undo = [&](auto newest_round, float weight) {
        unsigned before[Shape::kWords];
        last_round = max(last_round - 1, 0);
        load_words(masks, last_round, before);
        adjoint.template round<newest_round.value>(solve, bits, grad, weight);
#pragma unroll
        for (int w = 0; w < Shape::kWords; ++w) bits[w] = before[w];
      };
      for (int step = steps - 1; step >= 0; --step) {
        const bool counts = !p.options.last || (segment == newest && step == steps - 1);
        undo(std::true_type{}, counts ? 1.f : 0.f);
        for (int round = 1; round < n_proj; ++round) undo(std::false_type{}, 0.f);
        adjoint.gradient_step(solve);
      }
      if (segment-- > 0) {
        adjoint.pending([&](int i, float& value) { pending[i] = value; });
        continue;
      }

      poison = sum_lanes<kLanes>(poison);
      const bool counts = p.options.carry && !p.options.last;
#pragma unroll
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const float dx = p.options.carry ? adjoint.row[r] + adjoint.ds[k] + adjoint.dx[r][k] : adjoint.dx[r][k];
          solve.stage(r, k) = counts ? dx + grad(r, k) : dx;
        }
      at.write(out.init, solve.stage.value, poison);
#pragma unroll
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int k = 0; k < K; ++k) solve.stage(r, k) = -at.lr * adjoint.dz_sum(r, k);
      at.write(out.cost, solve.stage.value, poison);
      at.template read_cost<kUnmatched>(solve.stage.value);
      ColumnSums<N, K> by_column;
      RowSum<kLanes, K> by_row;
#pragma unroll
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int k = 0; k < K; ++k) by_column.add(r, k, __fmul_rn(adjoint.dz_sum(r, k), solve.stage(r, k)));
#pragma unroll
      for (int k = 0; k < K; ++k) by_row.add(k, by_column.total[k]);
      const float dlr = sum_lanes<kLanes>(by_row.lane_total());
      if (at.exists && at.lane == 0) static_cast<float*>(out.lr)[at.b] = at.n || at.out_of_range ? poison - dlr : 0.f;
      break;
    }
  }
}

}  // namespace dmm::cuda
