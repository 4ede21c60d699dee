// The exact assignment on the device: csrc/assignment_solver.h with a warp or a block per problem, threads across columns.
//
// A block works on one problem after the other. Its arrays are in shared memory where they fit, the cost too while it is
// small, and in scratch memory where not. Everything is computed in double precision, in the order of the CPU's kernel.
#pragma once

#include "../assignment_problem.h"
#include "../assignment_solver.h"
#include "layer_launch.cuh"

namespace dmm::cuda::assignment {

struct OnDevice : AssignmentProblem<void, void> {
  Element element, price_element;  // of cost; of prices and costs of staying alone
};

constexpr int kOneWarp = 32, kMaxThreads = 512;
constexpr int64_t kWarpColumns = 128;  // at most so many columns for a warp

struct Sizes {
  int64_t rows, columns;
  bool staged;  // a copy of the cost lies with the arrays

  __host__ __device__ int64_t bytes() const {
    const int64_t doubles = 3 * columns + 3 * rows + (staged ? rows * columns : 0);
    return (doubles * 8 + (columns + 4 * rows) * 4 + 15) / 16 * 16;
  }
};

// The least value, which column it belongs to (the highest bit: it is taken), and the second least.
struct Candidate {
  double value, second;
  unsigned code;

  __device__ __forceinline__ void add(const Candidate& other) {
    const bool better = other.value < value || (other.value == value && other.code < code);
    const double loser = better ? value : other.value, next = better ? other.second : second;
    second = loser < next ? loser : next;
    value = better ? other.value : value;
    code = better ? other.code : code;
  }
};

class Team {
 public:
  using OfWarps = Candidate[2][kMaxThreads / kOneWarp];
  static constexpr int64_t kOwnBytes = sizeof(OfWarps);  // static shared memory

  int32_t rows = 0, columns = 0;
  bool chooses = false;

  __device__ Team(const OnDevice& problem, const Sizes& sizes, unsigned char* memory) : p_(problem) {
    auto* doubles = reinterpret_cast<double*>(memory);
    const auto take = [&](int64_t count) {
      double* const taken = doubles;
      doubles += count;
      return taken;
    };
    at_.price = take(sizes.columns), at_.distance = take(sizes.columns), at_.closed_price = take(sizes.columns);
    at_.tree_distance = take(sizes.rows), at_.tree_price = take(sizes.rows), at_.tree_base = take(sizes.rows);
    staged_ = sizes.staged ? take(sizes.rows * sizes.columns) : nullptr;
    auto* ints = reinterpret_cast<int32_t*>(doubles);
    at_.row_of = ints, ints += sizes.columns;
    at_.column_of = ints, ints += sizes.rows;
    at_.waiting = ints, ints += sizes.rows;
    at_.tree_column = ints, ints += sizes.rows;
    at_.tree_row = ints;
  }

  __device__ __forceinline__ void solve(int64_t b) {
    const bool fine = load_problem(b);
    AssignmentSolver<Team> solver(*this, at_);
    solver.solve();
    store_result(b, fine, solver);
  }

  // ---- what the solver asks for ----

  __device__ __forceinline__ double cost(int32_t i, int32_t j) const {
    return staged_ ? staged_[int64_t{i} * columns + j] : given_cost(i, j);
  }
  __device__ __forceinline__ double alone(int32_t i) const { return turned_ ? 0 : unmatched(i); }
  __device__ __forceinline__ double start_price(int32_t j) const { return turned_ && chooses ? unmatched(j) : 0; }

  __device__ __forceinline__ Nearest nearest(int32_t i, double base) {
    Candidate best = none();
    for (int32_t j = thread(); j < columns; j += threads()) {
      const double reach = (cost(i, j) - at_.price[j]) + base, before = at_.distance[j];
      const double distance = reach < before ? reach : before;
      at_.distance[j] = distance;
      best.add({distance, kInfinity, code(j)});
    }
    best = reduce(best);
    return {best.value, static_cast<int32_t>(best.code & ~kTaken)};
  }

  __device__ __forceinline__ TwoNearest two_nearest(int32_t i) {
    Candidate best = none();
    for (int32_t j = thread(); j < columns; j += threads()) best.add({cost(i, j) - at_.price[j], kInfinity, code(j)});
    best = reduce(best);
    return {best.value, best.second, static_cast<int32_t>(best.code & ~kTaken)};
  }

  template <typename Test>
  __device__ __forceinline__ int32_t last(int32_t count, const Test& test) {
    for (int32_t end = count; end > 0; end -= threads()) {
      const int32_t k = end - 1 - thread();
      const double found = reduce({k >= 0 && test(k) ? -static_cast<double>(k) : kInfinity, kInfinity, 0}).value;
      if (found < kInfinity) return static_cast<int32_t>(-found);
    }
    return 0;
  }

  template <typename Value>
  __device__ __forceinline__ double greatest(int32_t count, const Value& value) {
    double most = -kInfinity;
    for (int32_t k = thread(); k < count; k += threads()) {
      const double other = value(k);
      most = other > most ? other : most;
    }
    return -reduce({-most, kInfinity, 0}).value;
  }

  template <typename Act>
  __device__ __forceinline__ void each(int32_t count, const Act& act) const {
    for (int32_t k = thread(); k < count; k += threads()) act(k);
  }
  __device__ __forceinline__ bool owns(int32_t j) const { return j % threads() == thread(); }
  __device__ __forceinline__ bool leads() const { return thread() == 0; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void take(int32_t) const {}  // row_of tells

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static constexpr unsigned kTaken = 0x80000000u, kEveryLane = 0xffffffffu;

  __device__ __forceinline__ int32_t thread() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ __forceinline__ int32_t threads() const { return static_cast<int32_t>(blockDim.x); }
  __device__ __forceinline__ unsigned code(int32_t j) const {
    return static_cast<unsigned>(j) | (at_.row_of[j] < 0 ? 0u : kTaken);
  }

  __device__ __forceinline__ static Candidate none() { return {kInfinity, kInfinity, ~0u}; }

  __device__ __forceinline__ static Candidate reduce_warp(Candidate best) {
    for (int distance = kOneWarp / 2; distance > 0; distance /= 2)
      best.add({__shfl_xor_sync(kEveryLane, best.value, distance), __shfl_xor_sync(kEveryLane, best.second, distance),
                __shfl_xor_sync(kEveryLane, best.code, distance)});
    return best;
  }

  // The same for all threads. Two buffers in turns: who writes one again has seen everybody through the other.
  __device__ __forceinline__ Candidate reduce(Candidate best) {
    best = reduce_warp(best);
    if (threads() > kOneWarp) {
      __shared__ OfWarps of_warps;
      Candidate* const buffer = of_warps[turn_];
      turn_ ^= 1;
      const int32_t lane = thread() % kOneWarp;
      if (lane == 0) buffer[thread() / kOneWarp] = best;
      __syncthreads();
      best = reduce_warp(lane < threads() / kOneWarp ? buffer[lane] : none());
    }
    return best;
  }

  __device__ __forceinline__ double given_cost(int32_t i, int32_t j) const {
    const int64_t r = turned_ ? j : i, c = turned_ ? i : j;
    const double value = load<double>(p_.cost, offset_ + r * p_.M + c, p_.element);
    return value - value == 0 ? value : kInfinity;
  }
  __device__ __forceinline__ double unmatched(int32_t r) const {
    return load<double>(p_.unmatched, own_ + r, p_.price_element);
  }

  // False where a count is out of range, or a cost of staying alone not finite; the problem is empty then.
  __device__ __forceinline__ bool load_problem(int64_t b) {
    int64_t n = p_.num_templates ? p_.num_templates[b] : p_.N, m = p_.num_proposals ? p_.num_proposals[b] : p_.M;
    bool fine = n >= 0 && n <= p_.N && m >= 0 && m <= p_.M;
    offset_ = b * p_.N * p_.M;
    own_ = b * p_.unmatched_stride;
    chooses = p_.unmatched != nullptr;
    if (fine && chooses) {
      bool bad = false;
      for (int64_t r = thread(); r < n; r += threads()) {
        const double own = unmatched(static_cast<int32_t>(r));
        bad |= !(own - own == 0);
      }
      fine = !__syncthreads_or(bad);
    }
    if (!fine) n = m = 0;
    turned_ = n > m;
    rows = static_cast<int32_t>(turned_ ? m : n);
    columns = static_cast<int32_t>(turned_ ? n : m);
    if (staged_)
      for (int64_t k = thread(); k < int64_t{rows} * columns; k += threads()) {
        const int32_t i = static_cast<int32_t>(turned_ ? k % rows : k / columns);  // along the given rows
        const int32_t j = static_cast<int32_t>(turned_ ? k / rows : k % columns);
        staged_[int64_t{i} * columns + j] = given_cost(i, j);
      }
    sync();
    return fine;
  }

  __device__ __forceinline__ void store_result(int64_t b, bool fine, AssignmentSolver<Team>& solver) {
    const int32_t n = turned_ ? columns : rows, m = turned_ ? rows : columns;
    const int32_t* const choice = turned_ ? at_.row_of : at_.column_of;
    for (int64_t r = thread(); r < p_.N; r += threads()) p_.choice[b * p_.N + r] = r < n ? choice[r] : -1;
    if (!p_.template_prices && !p_.proposal_prices) return;
    const double limit = solver.limit(), outside = fine ? 0.0 : static_cast<double>(NAN);
    for (int64_t r = thread(); r < p_.N; r += threads()) {
      const auto k = static_cast<int32_t>(r);
      const double price = r >= n ? outside : turned_ ? solver.column_price(k, limit) : solver.row_price(k, limit);
      store<double>(p_.template_prices, b * p_.N + r, p_.price_element, price);
    }
    for (int64_t c = thread(); c < p_.M; c += threads()) {
      const auto k = static_cast<int32_t>(c);
      const double price = c >= m ? outside : turned_ ? solver.row_price(k, limit) : solver.column_price(k, limit);
      store<double>(p_.proposal_prices, b * p_.M + c, p_.price_element, price);
    }
  }

  const OnDevice& p_;
  AssignmentArrays at_;
  double* staged_;  // [rows, columns] or null
  int64_t offset_ = 0, own_ = 0;
  bool turned_ = false;  // rows are proposals
  int turn_ = 0;
};

// One kernel for both: with its own number of threads as a constant, that of one warp spilled.
__global__ void __launch_bounds__(kMaxThreads) assignment_kernel(OnDevice p, Sizes sizes, unsigned char* scratch) {
  Team team(p, sizes, scratch ? scratch + blockIdx.x * sizes.bytes() : shared_memory);
  for (int64_t b = blockIdx.x; b < p.B; b += gridDim.x) {
    team.solve(b);
    __syncthreads();
  }
}

// The entry: p.B > 0, every tensor is contiguous and on the current device. `allocate(bytes)` returns scratch that lives until
// the kernel has run.
template <typename Allocate>
void solve(const OnDevice& p, cudaStream_t stream, const Allocate& allocate) {
  constexpr int64_t kStagedBytes = 48 << 10;  // at least four blocks share a multiprocessor then
  constexpr int64_t kScratchLimit = int64_t{1} << 30;
  Sizes sizes{std::min(p.N, p.M), std::max(p.N, p.M), true};
  sizes.staged = sizes.bytes() <= kStagedBytes;
  const int64_t threads =
      sizes.columns <= kWarpColumns ? kOneWarp : std::min<int64_t>((sizes.columns + 31) / 32 * 32, kMaxThreads);
  int64_t blocks = std::min(p.B, attribute(cudaDevAttrMultiProcessorCount) * (2048 / threads));
  const bool shared = sizes.bytes() <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 2048;
  if (!shared) blocks = std::clamp<int64_t>(kScratchLimit / sizes.bytes(), 1, blocks);
  auto* const scratch = static_cast<unsigned char*>(shared ? nullptr : allocate(blocks * sizes.bytes()));
  launch(assignment_kernel, blocks, threads, Team::kOwnBytes, shared ? sizes.bytes() : 0, stream, p, sizes, scratch);
}

}  // namespace dmm::cuda::assignment
