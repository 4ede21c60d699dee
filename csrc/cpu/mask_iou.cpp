// Mask IoU on the CPU: one pass over the bytes.
//
// The image is cut into chunks. A chunk of every mask is packed into bits that stay in cache, then every pair of masks
// is counted there. Threads take different chunks and add up counts of their own.
#include "../mask_iou.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dmm {
namespace {

constexpr int64_t kChunk = 16384;        // pixels; packed, 60 masks take 120 KB
constexpr int64_t kWords = kChunk / 64;  // 64-bit words

struct Kernels {
  // Sets words[k] to the bits of bytes[64 k .. 64 k + 64), 64 pixels each; returns how many are set.
  int64_t (*pack)(const uint8_t* bytes, int64_t words, uint64_t* bits);
  // counts[j] += popcount(a & b[j]) for M packed masks b, kWords apart, `words` of which are in use; b[j] is
  // empty where b_area[j] is 0.
  void (*overlap)(const uint64_t* a, const uint64_t* b, int64_t words, int64_t M, const int64_t* b_area, int64_t* counts);
};

inline __attribute__((always_inline)) void overlap_words(const uint64_t* a, const uint64_t* b, int64_t words, int64_t M,
                                                         const int64_t* b_area, int64_t* counts) {
  for (int64_t j = 0; j < M; ++j, b += kWords) {
    if (b_area[j] == 0) continue;
    int64_t count = 0;
    for (int64_t k = 0; k < words; ++k) count += __builtin_popcountll(a[k] & b[k]);
    counts[j] += count;
  }
}

int64_t pack_portable(const uint8_t* bytes, int64_t words, uint64_t* bits) {
  int64_t area = 0;
  for (int64_t k = 0; k < words; ++k) {
    uint64_t word = 0;
    for (int group = 0; group < 8; ++group) {
      uint64_t eight;
      std::memcpy(&eight, bytes + 64 * k + 8 * group, 8);
      constexpr uint64_t low7 = 0x7f7f7f7f7f7f7f7f;
      eight = (((eight & low7) + low7) | eight) >> 7 & 0x0101010101010101;  // 1 where the byte is not 0
      word |= (eight * 0x0102040810204080) >> 56 << (8 * group);            // bit 7 - k from byte k
    }
    bits[k] = word;
    area += __builtin_popcountll(word);
  }
  return area;
}

void overlap_portable(const uint64_t* a, const uint64_t* b, int64_t words, int64_t M, const int64_t* b_area, int64_t* counts) {
  overlap_words(a, b, words, M, b_area, counts);
}

#if defined(__x86_64__)

__attribute__((target("avx2,popcnt"))) int64_t pack_avx2(const uint8_t* bytes, int64_t words, uint64_t* bits) {
  const __m256i zero = _mm256_setzero_si256();
  int64_t area = 0;
  for (int64_t k = 0; k < words; ++k) {
    const auto* at = reinterpret_cast<const __m256i*>(bytes + 64 * k);
    const uint32_t low = ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256(at), zero));
    const uint32_t high = ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256(at + 1), zero));
    bits[k] = low | static_cast<uint64_t>(high) << 32;
    area += __builtin_popcountll(bits[k]);
  }
  return area;
}

__attribute__((target("avx2,popcnt"))) void overlap_avx2(const uint64_t* a, const uint64_t* b, int64_t words, int64_t M,
                                                         const int64_t* b_area, int64_t* counts) {
  overlap_words(a, b, words, M, b_area, counts);
}

#define DMM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vpopcntdq,popcnt")))

DMM_AVX512 int64_t pack_avx512(const uint8_t* bytes, int64_t words, uint64_t* bits) {
  int64_t area = 0;
  for (int64_t k = 0; k < words; ++k) {
    const __m512i pixels = _mm512_loadu_si512(bytes + 64 * k);
    bits[k] = _mm512_test_epi8_mask(pixels, pixels);
    area += __builtin_popcountll(bits[k]);
  }
  return area;
}

DMM_AVX512 void overlap_avx512(const uint64_t* a, const uint64_t* b, int64_t words, int64_t M, const int64_t* b_area,
                               int64_t* counts) {
  for (int64_t j = 0; j < M; ++j, b += kWords) {
    if (b_area[j] == 0) continue;
    __m512i even = _mm512_setzero_si512(), odd = even;
    for (int64_t k = 0; k < words; k += 16) {  // the words past `words` are 0 up to a multiple of 16
      even =
          _mm512_add_epi64(even, _mm512_popcnt_epi64(_mm512_and_si512(_mm512_loadu_si512(a + k), _mm512_loadu_si512(b + k))));
      odd = _mm512_add_epi64(
          odd, _mm512_popcnt_epi64(_mm512_and_si512(_mm512_loadu_si512(a + k + 8), _mm512_loadu_si512(b + k + 8))));
    }
    alignas(64) int64_t lanes[8];
    _mm512_store_si512(lanes, _mm512_add_epi64(even, odd));
    for (int64_t lane : lanes) counts[j] += lane;
  }
}

#endif

Kernels pick_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vpopcntdq")) return {pack_avx512, overlap_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) return {pack_avx2, overlap_avx2};
#endif
  return {pack_portable, overlap_portable};
}

// What one thread adds up and packs into.
struct Tally {
  std::vector<int64_t> both, a_area, b_area;  // [N * M], [N], [M]
  std::vector<uint64_t> a_bits, b_bits;       // [N, kWords], [M, kWords]
  std::vector<int64_t> a_here, b_here;        // areas in this chunk

  Tally(int64_t N, int64_t M)
      : both(N * M), a_area(N), b_area(M), a_bits(N * kWords), b_bits(M * kWords), a_here(N), b_here(M) {}
};

void pack_chunk(const Kernels& kernels, const uint8_t* masks, int64_t count, int64_t pixels, int64_t first, uint64_t* bits,
                int64_t* here, int64_t* area) {
  const int64_t length = std::min(kChunk, pixels - first);
  const int64_t whole = length / 64, rest = length % 64;
  for (int64_t i = 0; i < count; ++i, bits += kWords) {
    const uint8_t* bytes = masks + i * pixels + first;
    here[i] = kernels.pack(bytes, whole, bits);
    if (rest) {
      uint8_t padded[64] = {};
      std::memcpy(padded, bytes + 64 * whole, rest);
      here[i] += kernels.pack(padded, 1, bits + whole);
    }
    std::fill(bits + whole + (rest > 0), bits + kWords, 0);
    area[i] += here[i];
  }
}

void count_image(const Kernels& kernels, const MaskIouInputs& in, int64_t batch, float* iou) {
  const int64_t N = in.N, M = in.M;
  const int64_t chunks = (in.pixels + kChunk - 1) / kChunk;
  const int64_t tasks = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  std::vector<Tally> tallies(std::max<int64_t>(tasks, 1), Tally(N, M));
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      Tally& tally = tallies[task];
      for (int64_t chunk = chunks * task / tasks; chunk < chunks * (task + 1) / tasks; ++chunk) {
        const int64_t first = chunk * kChunk;
        const int64_t words = (std::min(kChunk, in.pixels - first) + 63) / 64;
        pack_chunk(kernels, in.a_of(batch), N, in.pixels, first, tally.a_bits.data(), tally.a_here.data(), tally.a_area.data());
        pack_chunk(kernels, in.b_of(batch), M, in.pixels, first, tally.b_bits.data(), tally.b_here.data(), tally.b_area.data());
        for (int64_t i = 0; i < N; ++i)
          if (tally.a_here[i])
            kernels.overlap(tally.a_bits.data() + i * kWords, tally.b_bits.data(), words, M, tally.b_here.data(),
                            tally.both.data() + i * M);
      }
    }
  });
  Tally& total = tallies[0];
  for (size_t task = 1; task < tallies.size(); ++task) {
    for (int64_t k = 0; k < N * M; ++k) total.both[k] += tallies[task].both[k];
    for (int64_t i = 0; i < N; ++i) total.a_area[i] += tallies[task].a_area[i];
    for (int64_t j = 0; j < M; ++j) total.b_area[j] += tallies[task].b_area[j];
  }
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < M; ++j) {
      const int64_t both = total.both[i * M + j], either = total.a_area[i] + total.b_area[j] - both;
      iou[i * M + j] = either ? static_cast<float>(static_cast<double>(both) / static_cast<double>(either)) : 0.0f;
    }
}

Tensor mask_iou(const Tensor& a, const Tensor& b) {
  const MaskIouInputs in = check_mask_iou(a, b);
  Tensor iou = in.new_result();
  if (iou.numel() == 0) return iou;
  static const Kernels kernels = pick_kernels();
  for (int64_t batch = 0; batch < in.B; ++batch)
    count_image(kernels, in, batch, static_cast<float*>(iou.data_ptr()) + batch * in.N * in.M);
  return iou;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmm, m) { m.def(kMaskIouSchema); }

STABLE_TORCH_LIBRARY_IMPL(dmm, CPU, m) { m.impl("mask_iou", TORCH_BOX(&mask_iou)); }

}  // namespace dmm
