// Where the cells of a grid and the pixels of a frame fall among each other. Whole numbers, so every backend has the same
// edges and weights. No torch: shared by the CPU and CUDA kernels.
#pragma once

#include "paste_geometry.h"

#include <cstdint>

namespace dmm {

// a / b for a >= 0, b > 0; a GPU takes several times as long for 64 bits.
DMM_HOST_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

DMM_HOST_DEVICE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
DMM_HOST_DEVICE int64_t greater(int64_t a, int64_t b) { return a < b ? b : a; }

// One axis of a frame, `pixels` long and cut into `cells`: pixels * cells units, of which pixel p has
// [p * cells, (p + 1) * cells) and cell c has [c * pixels, (c + 1) * pixels). Both are below 2^16, so units fit 32 bits.
struct CellAxis {
  int64_t pixels, cells;

  DMM_HOST_DEVICE static int64_t divided(int64_t units, int64_t by) {
    return static_cast<uint32_t>(units) / static_cast<uint32_t>(by);
  }
  DMM_HOST_DEVICE int64_t cell_at(int64_t pixel) const { return divided(pixel * cells, pixels); }  // where a pixel begins
  DMM_HOST_DEVICE int64_t first_pixel(int64_t cell) const { return divided(cell * pixels, cells); }
  DMM_HOST_DEVICE int64_t end_pixel(int64_t cell) const { return divided((cell + 1) * pixels + cells - 1, cells); }

  // How many units of a cell the pixels [begin, end) have.
  DMM_HOST_DEVICE int64_t shared(int64_t begin, int64_t end, int64_t cell) const {
    const int64_t units = lesser(end * cells, (cell + 1) * pixels) - greater(begin * cells, cell * pixels);
    return units > 0 ? units : 0;
  }
};

// The two samples that a pixel lies between, and the weight of the second.
template <typename T>
struct Between {
  int first, second;
  T weight;
};

// `samples` stretched over `pixels`, as F.interpolate(align_corners=False) does it: pixel p is at
// (p + 0.5) * samples / pixels - 0.5, held within the samples.
template <typename T>
DMM_HOST_DEVICE Between<T> between(int64_t pixel, int64_t samples, int64_t pixels) {
  const int64_t place = (2 * pixel + 1) * samples - pixels;  // in units of 1 / (2 * pixels)
  if (place <= 0) return {0, samples > 1 ? 1 : 0, T(0)};
  const int64_t first = quotient(place, 2 * pixels);
  if (first >= samples - 1) return {static_cast<int>(samples - 1), static_cast<int>(samples - 1), T(0)};
  return {static_cast<int>(first), static_cast<int>(first + 1),
          static_cast<T>(place - first * 2 * pixels) / static_cast<T>(2 * pixels)};
}

}  // namespace dmm
