// Frames and masks on disk, by libjpeg and libpng.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace dmm {

/// Interleaved rows: channels is 3 (RGB) or 1.
struct Image {
  int height = 0, width = 0, channels = 0;
  std::vector<uint8_t> pixels;
};

/// A JPEG or PNG file as RGB, upright as its EXIF tag says. Throws Error for what is neither, damaged or cut short.
Image read_frame(const std::string& path);

/// Object ids, one channel, of an indexed or grey PNG: 0 is background, void (255) becomes background; a mask of 0 and 255
/// alone is object 1. `height` and `width` are what it must have. Everything that would be a guess throws Error, as
/// dmm_fast.data.masks does.
Image read_mask(const std::string& path, int height, int width);

/// Write ids as an indexed PNG in the DAVIS palette, whole or not at all.
void write_mask(const std::string& path, const uint8_t* ids, int height, int width);

}  // namespace dmm
