// Where a pixel falls in a pasted mask. No torch: shared by the CPU and CUDA kernels.
//
// A mask of S x S cells is stretched over its box; pixel p has its centre at p + 0.5 and sees the mask coordinate
//     u = (p + 0.5 - low) * S / (high - low) - 0.5,
// interpolated between the cells floor(u) and floor(u) + 1, with 0 outside the mask: so pixels with -1 < u < S are
// touched.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DMM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DMM_HOST_DEVICE inline
#endif

namespace dmm {

// The two cells that a pixel is interpolated from, both inside the mask; a cell that would not be has weight 0.
template <typename T>
struct Tap {
  int cell0, cell1;
  T weight0, weight1;
};

// One axis of a box [low, high) over an image of `size` pixels.
template <typename T>
struct PasteAxis {
  T low, scale;
  int begin,
      end;  // the pixels that may be touched, clipped to the image: none if the box has no positive, finite extent

  DMM_HOST_DEVICE bool empty() const { return begin >= end; }

  DMM_HOST_DEVICE T at(int pixel) const { return (static_cast<T>(pixel) + T(0.5) - low) * scale - T(0.5); }  // u

  // How much of cell `s` a pixel sees.
  DMM_HOST_DEVICE T tent(int pixel, int s) const {
    const T weight = T(1) - std::fabs(at(pixel) - static_cast<T>(s));
    return weight > T(0) ? weight : T(0);
  }

  DMM_HOST_DEVICE Tap<T> tap(int pixel, int S) const {
    const T u = at(pixel);
    if (!(u > T(-1) && u < static_cast<T>(S))) return {0, 0, T(0), T(0)};
    const T floor = std::floor(u), fraction = u - floor;
    const int cell = static_cast<int>(floor);
    return {cell < 0 ? 0 : cell, cell + 1 < S ? cell + 1 : cell, cell < 0 ? T(0) : T(1) - fraction,
            cell + 1 < S ? fraction : T(0)};
  }
};

// Where a real number falls among the integers 0..size; NaN at 0.
template <typename T>
DMM_HOST_DEVICE int clamp_to_image(T x, int64_t size) {
  const T limit = static_cast<T>(size);
  return x > T(0) ? static_cast<int>(x < limit ? x : limit) : 0;
}

template <typename T>
DMM_HOST_DEVICE PasteAxis<T> paste_axis(T low, T high, int S, int64_t size) {
  const T extent = high - low;
  if (S == 0 || !(extent > T(0) && std::isfinite(extent))) return {T(0), T(0), 0, 0};
  const T scale = static_cast<T>(S) / extent, half_cell = T(0.5) / scale;
  // One pixel wider than the exact range, against rounding; tap() gives those weight 0.
  return {low, scale, clamp_to_image(std::floor(low - half_cell - T(0.5)), size),
          clamp_to_image(std::ceil(high + half_cell - T(0.5)) + T(1), size)};
}

}  // namespace dmm
