// Mask IoU on CUDA: one kernel, every byte read once (up to 32 x 64 masks; more are cut into such tiles).
//
// A block takes 1024 pixels of all masks of a tile, packs them into bits in shared memory, counts every pair there and
// adds its counts to the tile's in global memory (integers: the order does not matter). The block that comes last
// divides.
#pragma once

#include "launch.h"
#include "sum_warp.h"

#include <cstdint>

namespace dmm::iou {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileA = 32, kTileB = 64;  // masks of a and b that one block sees
constexpr int kSegment = 512;            // pixels that one warp packs at a time: 16 bytes per lane
constexpr int kSegments = 2;             // per block and mask
constexpr int kPixels = kSegments * kSegment;
constexpr int kWords = kPixels / 32;
constexpr int kStride = kWords + 1;  // odd: masks of neighbouring lanes lie in different banks
constexpr int kInFlight = 8;         // loads that a lane starts before it uses the first
constexpr int kRowsAtOnce = 4;       // masks of a that a thread counts against one mask of b

// What the blocks of one tile add up; starts at 0.
struct TileCounts {
  int both[kTileA * kTileB], area[kTileA + kTileB], blocks_done;
};

struct Problem {
  const uint8_t* a;   // [B, N, pixels]
  const uint8_t* b;   // [B, M, pixels]
  float* iou;         // [B, N, M]
  TileCounts* tiles;  // [tile_count()], scratch
  int64_t B, N, M, pixels;

  __host__ __device__ int64_t tiles_a() const { return (N + kTileA - 1) / kTileA; }
  __host__ __device__ int64_t tiles_b() const { return (M + kTileB - 1) / kTileB; }
  __host__ __device__ int64_t chunks() const { return pixels ? (pixels + kPixels - 1) / kPixels : 1; }
  int64_t tile_count() const { return B * tiles_a() * tiles_b(); }
  int64_t blocks() const { return tile_count() * chunks(); }
};

// Bit k is set where byte k is not 0.
__device__ __forceinline__ uint32_t nonzero_bytes(uint32_t four) {
  const uint32_t high = (((four & 0x7f7f7f7fu) + 0x7f7f7f7fu) | four) & 0x80808080u;
  return ((high >> 7) * 0x01020408u) >> 24;
}

__device__ __forceinline__ uint32_t nonzero_bytes(uint4 v) {
  return nonzero_bytes(v.x) | nonzero_bytes(v.y) << 4 | nonzero_bytes(v.z) << 8 | nonzero_bytes(v.w) << 12;
}

// kVector: every mask starts on 16 bytes and its size is a multiple of 16.
template <bool kVector>
__global__ void __launch_bounds__(kThreads) mask_iou_kernel(const Problem p) {
  __shared__ uint32_t bits[(kTileA + kTileB) * kStride];
  __shared__ int area[kTileA + kTileB];
  __shared__ bool last;

  const unsigned chunks = static_cast<unsigned>(p.chunks()), tiles_a = static_cast<unsigned>(p.tiles_a());
  const unsigned tiles_b = static_cast<unsigned>(p.tiles_b());
  const unsigned chunk = blockIdx.x % chunks, index = blockIdx.x / chunks;  // tiles of b vary before those of a
  TileCounts& tile = p.tiles[index];
  const int64_t first_b = int64_t{index % tiles_b} * kTileB;
  const int64_t first_a = int64_t{index / tiles_b % tiles_a} * kTileA;
  const int64_t batch = index / tiles_b / tiles_a;
  const int count_a = static_cast<int>(min(p.N - first_a, static_cast<int64_t>(kTileA)));
  const int count_b = static_cast<int>(min(p.M - first_b, static_cast<int64_t>(kTileB)));
  const uint8_t* a = p.a + (batch * p.N + first_a) * p.pixels;
  const uint8_t* b = p.b + (batch * p.M + first_b) * p.pixels;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < kTileA + kTileB) area[threadIdx.x] = 0;
  __syncthreads();

  // Pack: a warp takes one segment of one mask at a time. Rows of `bits`: the masks of a, then those of b.
  const int items = (count_a + count_b) * kSegments;
  auto bytes_of = [&](int row) { return row < count_a ? a + row * p.pixels : b + (row - count_a) * p.pixels; };
  auto add_area = [&](int row, uint32_t set) {
    const int sum = sum_warp(__popc(set));
    if (lane == 0) atomicAdd(&area[row], sum);
  };
  if constexpr (kVector) {
    for (int item = warp; item < items; item += kWarps * kInFlight) {
      uint4 loaded[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int at = item + k * kWarps, row = at / kSegments;
        const int64_t pixel = static_cast<int64_t>(chunk) * kPixels + at % kSegments * kSegment + 16 * lane;
        loaded[k] = make_uint4(0, 0, 0, 0);
        if (at < items && pixel < p.pixels) loaded[k] = __ldg(reinterpret_cast<const uint4*>(bytes_of(row) + pixel));
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int at = item + k * kWarps, row = at / kSegments;
        if (at >= items) break;
        const uint32_t set = nonzero_bytes(loaded[k]);
        reinterpret_cast<uint16_t*>(bits + row * kStride)[at % kSegments * 32 + lane] = static_cast<uint16_t>(set);
        add_area(row, set);
      }
    }
  } else {
    for (int item = warp; item < items; item += kWarps) {
      const int row = item / kSegments, segment = item % kSegments;
      const int64_t first = static_cast<int64_t>(chunk) * kPixels + segment * kSegment;
      uint32_t set = 0;
#pragma unroll
      for (int word = 0; word < 16; ++word) {
        const int64_t pixel = first + 32 * word + lane;
        const uint32_t votes = __ballot_sync(0xffffffffu, pixel < p.pixels && bytes_of(row)[pixel] != 0);
        if (lane == word) set = votes;
      }
      if (lane < 16) bits[row * kStride + segment * 16 + lane] = set;
      add_area(row, set);
    }
  }
  __syncthreads();

  // Count: neighbouring threads take neighbouring masks of b against the same few masks of a.
  const int groups = (count_a + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int item = threadIdx.x; item < groups * count_b; item += kThreads) {
    const int i = item / count_b * kRowsAtOnce, j = item % count_b;
    const uint32_t* bits_b = bits + (count_a + j) * kStride;
    const uint32_t* bits_a[kRowsAtOnce];
    int both[kRowsAtOnce] = {};
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) bits_a[r] = bits + min(i + r, count_a - 1) * kStride;
#pragma unroll 8
    for (int word = 0; word < kWords; ++word) {
      const uint32_t other = bits_b[word];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) both[r] += __popc(bits_a[r][word] & other);
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)
      if (i + r < count_a && both[r]) atomicAdd(&tile.both[(i + r) * kTileB + j], both[r]);
  }
  for (int row = threadIdx.x; row < count_a + count_b; row += kThreads)
    if (area[row]) atomicAdd(&tile.area[row], area[row]);

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&tile.blocks_done, 1) == static_cast<int>(chunks) - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int pair = threadIdx.x; pair < count_a * count_b; pair += kThreads) {
    const int i = pair / count_b, j = pair % count_b;
    const int both = __ldcg(&tile.both[i * kTileB + j]);
    // Areas may add up to more than an int holds.
    const int64_t either = static_cast<int64_t>(__ldcg(&tile.area[i])) + __ldcg(&tile.area[count_a + j]) - both;
    p.iou[(batch * p.N + first_a + i) * p.M + first_b + j] =
        either ? static_cast<float>(static_cast<double>(both) / static_cast<double>(either)) : 0.0f;
  }
}

inline void mask_iou(const char* op, const Problem& p, cudaStream_t stream) {
  const auto on_16_bytes = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool vector = p.pixels % 16 == 0 && on_16_bytes(p.a) && on_16_bytes(p.b);
  check_cuda(op, cudaMemsetAsync(p.tiles, 0, p.tile_count() * sizeof(TileCounts), stream));
  launch_kernel(op, vector ? mask_iou_kernel<true> : mask_iou_kernel<false>, dim3(static_cast<unsigned>(p.blocks())), kThreads,
                0, stream, p);
}

}  // namespace dmm::iou
