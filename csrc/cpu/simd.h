// The few vector operations the CPU kernels need, for the instruction set this file is compiled for.
//
// Arithmetic is GCC/Clang vector extensions; what they don't express well (a NaN-keeping relu, comparison to bits, keeping
// lanes by bits) is written per instruction set. Everything lives in the namespace DMM_ISA, one per instruction set, so that
// no symbol of a wider one can be picked on a narrower machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace dmm::DMM_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
template <typename T>
using Vec = std::conditional_t<std::is_same_v<T, float>, VecF, VecD>;
template <typename T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

using Bits = uint16_t;  // one bit per lane

template <typename T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

#if defined(__AVX512F__)

// max(0, a) in this operand order keeps NaN.
inline VecF relu(VecF a) { return _mm512_max_ps(_mm512_setzero_ps(), a); }
inline VecD relu(VecD a) { return _mm512_max_pd(_mm512_setzero_pd(), a); }
inline Bits positive(VecF a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ); }
inline Bits positive(VecD a) { return _mm512_cmp_pd_mask(a, _mm512_setzero_pd(), _CMP_GT_OQ); }
inline VecF keep(Bits bits, VecF a) { return _mm512_maskz_mov_ps(bits, a); }
inline VecD keep(Bits bits, VecD a) { return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), a); }

inline VecD least(VecD a, VecD b) { return _mm512_min_pd(a, b); }
inline VecD greatest(VecD a, VecD b) { return _mm512_max_pd(a, b); }
inline Bits equal(VecD a, VecD b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
inline VecD select(Bits bits, VecD a, VecD b) { return _mm512_mask_mov_pd(b, static_cast<__mmask8>(bits), a); }
inline VecD load_wide(const float* at) { return _mm512_cvtps_pd(_mm256_loadu_ps(at)); }

#elif defined(__AVX2__)

inline VecF relu(VecF a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }
inline VecD relu(VecD a) { return _mm256_max_pd(_mm256_setzero_pd(), a); }
inline Bits positive(VecF a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ)); }
inline Bits positive(VecD a) { return _mm256_movemask_pd(_mm256_cmp_pd(a, _mm256_setzero_pd(), _CMP_GT_OQ)); }
inline VecF keep(Bits bits, VecF a) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane)));
}
inline VecD keep(Bits bits, VecD a) {
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  return _mm256_and_pd(a, _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), lane), lane)));
}

inline VecD least(VecD a, VecD b) { return _mm256_min_pd(a, b); }
inline VecD greatest(VecD a, VecD b) { return _mm256_max_pd(a, b); }
inline Bits equal(VecD a, VecD b) { return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_EQ_OQ)); }
inline VecD select(Bits bits, VecD a, VecD b) {
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  return _mm256_blendv_pd(b, a,
                          _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), lane), lane)));
}
inline VecD load_wide(const float* at) { return _mm256_cvtps_pd(_mm_loadu_ps(at)); }

#else

template <typename V>
inline V relu(V a) {
  return a < 0 ? V{} : a;
}
template <typename V>
inline Bits positive(V a) {
  Bits bits = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) bits |= static_cast<Bits>((a[i] > 0) << i);
  return bits;
}
template <typename V>
inline V keep(Bits bits, V a) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) a[i] = bits >> i & 1 ? a[i] : 0;
  return a;
}

inline VecD least(VecD a, VecD b) { return a < b ? a : b; }
inline VecD greatest(VecD a, VecD b) { return a > b ? a : b; }
inline Bits equal(VecD a, VecD b) { return static_cast<Bits>((a[0] == b[0]) | (a[1] == b[1]) << 1); }
inline VecD select(Bits bits, VecD a, VecD b) { return VecD{bits & 1 ? a[0] : b[0], bits & 2 ? a[1] : b[1]}; }
inline VecD load_wide(const float* at) { return VecD{at[0], at[1]}; }

#endif

#if defined(__clang__)
template <int distance, typename V, size_t... lane>
inline V swap_lanes(V a, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, a, static_cast<int>(lane ^ distance)...);
}
#else
template <int distance, typename V, size_t... lane>
inline V swap_lanes(V a, std::index_sequence<lane...>) {
  using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, Indices{static_cast<Index>(lane ^ distance)...});
}
#endif

// The sum over the lanes, in every lane.
template <typename T, int distance = kLanes<T> / 2>
inline Vec<T> lane_sum(Vec<T> a) {
  if constexpr (distance == 0)
    return a;
  else
    return lane_sum<T, distance / 2>(a + swap_lanes<distance>(a, std::make_index_sequence<kLanes<T>>{}));
}

// The least of the lanes.
template <int distance = kLanes<double> / 2>
inline double lane_least(VecD a) {
  if constexpr (distance == 0)
    return a[0];
  else
    return lane_least<distance / 2>(least(a, swap_lanes<distance>(a, std::make_index_sequence<kLanes<double>>{})));
}

inline VecD load_wide(const double* at) {
  VecD value;
  std::memcpy(&value, at, sizeof(VecD));
  return value;
}

}  // namespace dmm::DMM_ISA
