#include "dmm/image.h"

#include <cstdio>  // before jpeglib.h, which needs it

#include <jerror.h>
#include <jpeglib.h>
#include <png.h>

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstring>

#include "dmm/error.h"

namespace dmm {
namespace {

constexpr int kSide = 65535;
constexpr int64_t kPixels = 178'956'970;  // 512 MiB of RGB: larger ones are decompression bombs

void check_extent(const std::string& path, int64_t height, int64_t width) {
  if (height < 1 || width < 1 || height > kSide || width > kSide || height * width > kPixels) {
    fail(path, ": ", width, "x", height, " pixels; at most ", kPixels, " are read");
  }
}

// ------------------------------------------------------------------------------------------------------- orientation

constexpr std::string_view kExif("Exif\0\0", 6), kXmp("http://ns.adobe.com/xap/1.0/\0", 29);  // what their APP1 begin with

/// The orientation in EXIF (1 to 8, an invalid one is 1); 0 where it holds none.
int exif_orientation(std::string_view tiff) {
  const bool big = tiff.substr(0, 2) == "MM";
  const auto number = [&](uint64_t at, int bytes) -> uint64_t {  // 0 outside
    uint64_t value = 0;
    if (at + bytes > tiff.size()) return 0;
    for (int k = 0; k < bytes; ++k)
      value |= uint64_t(static_cast<unsigned char>(tiff[at + (big ? bytes - 1 - k : k)])) << (8 * k);
    return value;
  };
  const uint64_t directory = number(4, 4), count = number(directory, 2);
  for (uint64_t entry = 0; entry < count; ++entry) {
    const uint64_t at = directory + 2 + 12 * entry;
    if (number(at, 2) == 0x0112) {
      const uint64_t value = number(at + 8, 2);
      return value >= 1 && value <= 8 ? int(value) : 1;
    }
  }
  return 0;
}

/// The same in XMP, of which Pillow takes the first tiff:Orientation="6" or tiff:Orientation>6.
int xmp_orientation(std::string_view packet) {
  constexpr std::string_view name = "tiff:Orientation";
  for (size_t at = packet.find(name); at != packet.npos; at = packet.find(name, at + 1)) {
    std::string_view value = packet.substr(at + name.size());
    const size_t before = value.starts_with('>') ? 1 : value.starts_with("=\"") ? 2 : value.size();
    value.remove_prefix(before);
    if (!value.empty() && value[0] >= '0' && value[0] <= '9') return value[0] >= '1' && value[0] <= '8' ? value[0] - '0' : 1;
  }
  return 0;
}

/// An image says in two places which way up it is, each 0 where it does not; EXIF counts first.
struct Turned {
  int exif = 0, xmp = 0;

  int orientation() const { return exif ? exif : xmp ? xmp : 1; }
};

/// The image turned upright.
Image upright(Image image, int orientation) {
  if (orientation == 1) return image;
  const bool swap = orientation >= 5, flip_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool flip_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  Image result{swap ? image.width : image.height, swap ? image.height : image.width, image.channels, {}};
  result.pixels.resize(image.pixels.size());
  auto* out = result.pixels.data();
  for (int y = 0; y < result.height; ++y) {
    for (int x = 0; x < result.width; ++x, out += image.channels) {
      int from_y = swap ? x : y, from_x = swap ? y : x;
      if (flip_y) from_y = image.height - 1 - from_y;
      if (flip_x) from_x = image.width - 1 - from_x;
      std::copy_n(&image.pixels[(size_t(from_y) * image.width + from_x) * image.channels], image.channels, out);
    }
  }
  return result;
}

// ------------------------------------------------------------------------------------------------------------- JPEG

struct JpegErrors {
  jpeg_error_mgr manager;  // first, so that its address is the struct's
  std::jmp_buf escape;
  char message[JMSG_LENGTH_MAX];
};

[[noreturn]] void jpeg_failed(j_common_ptr info) {
  auto* errors = reinterpret_cast<JpegErrors*>(info->err);
  info->err->format_message(info, errors->message);
  std::longjmp(errors->escape, 1);
}

void jpeg_warned(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) jpeg_failed(info);  // the rest would be grey
}

// Between setjmp and the last call of libjpeg or libpng nothing lives on the stack that has a destructor: their way out of an
// error is longjmp, which runs none.
bool decode_jpeg(const std::string& bytes, const std::string& path, jpeg_decompress_struct& info, JpegErrors& errors,
                 Image& image, Turned& turned) {
  if (setjmp(errors.escape)) return false;
  jpeg_mem_src(&info, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
  jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&info, TRUE);
  check_extent(path, info.image_height, info.image_width);
  if (info.num_components == 4) fail(path, ": a CMYK JPEG; frames must be RGB or grey");
  info.out_color_space = JCS_RGB;
  for (auto* marker = info.marker_list; marker; marker = marker->next) {
    const std::string_view segment(reinterpret_cast<const char*>(marker->data), marker->data_length);
    if (segment.starts_with(kExif) && !turned.exif) turned.exif = exif_orientation(segment.substr(kExif.size()));
    if (segment.starts_with(kXmp)) turned.xmp = xmp_orientation(segment);
  }
  jpeg_start_decompress(&info);
  image.height = int(info.output_height), image.width = int(info.output_width), image.channels = 3;
  image.pixels.resize(size_t(image.height) * image.width * 3);
  while (info.output_scanline < info.output_height) {
    JSAMPROW row = &image.pixels[size_t(info.output_scanline) * image.width * 3];
    jpeg_read_scanlines(&info, &row, 1);
  }
  return true;
}

Image read_jpeg(const std::string& bytes, const std::string& path) {
  struct Decoder {
    jpeg_decompress_struct info{};
    JpegErrors errors{};
    Decoder() {
      info.err = jpeg_std_error(&errors.manager);
      errors.manager.error_exit = jpeg_failed;
      errors.manager.emit_message = jpeg_warned;
      jpeg_create_decompress(&info);
    }
    ~Decoder() { jpeg_destroy_decompress(&info); }
  } decoder;
  Image image;
  Turned turned;
  if (!decode_jpeg(bytes, path, decoder.info, decoder.errors, image, turned)) {
    fail(path, ": the JPEG is damaged or cut short (", decoder.errors.message, ")");
  }
  return upright(std::move(image), turned.orientation());
}

// -------------------------------------------------------------------------------------------------------------- PNG

enum class As { rgb, stored };  // stored: a palette's indices, or grey levels

struct PngSource {
  const std::string* bytes;
  size_t at;
  char message[120];
};

void png_read_bytes(png_structp png, png_bytep out, size_t count) {
  auto* source = static_cast<PngSource*>(png_get_io_ptr(png));
  if (count > source->bytes->size() - source->at) png_error(png, "the file ends too early");
  std::memcpy(out, source->bytes->data() + source->at, count);
  source->at += count;
}

[[noreturn]] void png_failed(png_structp png, png_const_charp message) {
  std::snprintf(static_cast<PngSource*>(png_get_error_ptr(png))->message, sizeof PngSource::message, "%s", message);
  png_longjmp(png, 1);
}

void png_warned(png_structp, png_const_charp) {}

bool decode_png(png_structp png, png_infop info, PngSource& source, const std::string& path, As as, Image& image, int& colour,
                Turned& turned, std::vector<png_bytep>& rows) {
  if (setjmp(png_jmpbuf(png))) return false;
  png_set_read_fn(png, &source, png_read_bytes);
  png_set_user_limits(png, kSide, kSide);
  png_read_info(png, info);
  check_extent(path, png_get_image_height(png, info), png_get_image_width(png, info));
  colour = png_get_color_type(png, info);
  const int depth = png_get_bit_depth(png, info);
  if (as == As::stored) {
    if (colour != PNG_COLOR_TYPE_PALETTE && colour != PNG_COLOR_TYPE_GRAY) {
      fail(path, ": holds colours instead of object ids; save the mask as an indexed PNG (one object id per pixel)");
    }
    if (depth == 16) fail(path, ": 16-bit values; object ids must fit 0..254: save the mask as an indexed PNG");
    if (colour == PNG_COLOR_TYPE_GRAY && (depth == 2 || depth == 4)) png_set_expand_gray_1_2_4_to_8(png);
    png_set_packing(png);  // several pixels in a byte
  } else {
    if (colour == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png);
    if (depth < 8 && colour == PNG_COLOR_TYPE_GRAY) png_set_expand_gray_1_2_4_to_8(png);
    if (depth == 16) png_set_strip_16(png);
    if (!(colour & PNG_COLOR_MASK_COLOR)) png_set_gray_to_rgb(png);
    png_set_strip_alpha(png);
  }
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  image.height = int(png_get_image_height(png, info)), image.width = int(png_get_image_width(png, info));
  image.channels = png_get_channels(png, info);
  const size_t stride = png_get_rowbytes(png, info);
  image.pixels.resize(stride * image.height);
  rows.resize(image.height);
  for (int y = 0; y < image.height; ++y) rows[y] = &image.pixels[stride * y];
  png_read_image(png, rows.data());
  png_read_end(png, info);
#ifdef PNG_eXIf_SUPPORTED
  png_bytep exif;
  png_uint_32 length;
  if (png_get_eXIf_1(png, info, &length, &exif)) turned.exif = exif_orientation({reinterpret_cast<char*>(exif), length});
#endif
  png_textp text;
  const int texts = png_get_text(png, info, &text, nullptr);
  for (int k = 0; k < texts; ++k) {
    if (std::string_view(text[k].key) == "XML:com.adobe.xmp") turned.xmp = xmp_orientation(text[k].text);
  }
  return true;
}

Image read_png(const std::string& bytes, const std::string& path, As as, int& colour) {
  PngSource source{&bytes, 0, ""};
  struct Decoder {
    png_structp png;
    png_infop info;
    explicit Decoder(PngSource* source)
        : png(png_create_read_struct(PNG_LIBPNG_VER_STRING, source, png_failed, png_warned)),
          info(png_create_info_struct(png)) {}
    ~Decoder() { png_destroy_read_struct(&png, &info, nullptr); }
  } decoder(&source);
  Image image;
  Turned turned;
  std::vector<png_bytep> rows;
  if (!decode_png(decoder.png, decoder.info, source, path, as, image, colour, turned, rows)) {
    fail(path, ": the PNG is damaged or cut short (", source.message, ")");
  }
  if (as == As::stored) return image;  // as Python's masks are
  return upright(std::move(image), turned.orientation());
}

bool is_png(const std::string& bytes) { return bytes.compare(0, 8, "\x89PNG\r\n\x1a\n") == 0; }
bool is_jpeg(const std::string& bytes) { return bytes.compare(0, 3, "\xFF\xD8\xFF") == 0; }

// ------------------------------------------------------------------------------------------------------------ masks

/// Refuse grey levels that come from anti-aliasing, interpolation or a photograph: those between the lowest and the highest
/// seldom fill a 2x2 block.
void check_grey(const std::string& path, const Image& mask, const std::array<int64_t, 256>& count) {
  const auto levels = std::count_if(count.begin(), count.end(), [](int64_t n) { return n > 0; });
  int lowest = 0, highest = 255;
  while (!count[lowest]) ++lowest;
  while (!count[highest]) --highest;
  if (highest <= 63 || levels <= 4) return;
  const auto pixel = [&](int y, int x) { return mask.pixels[size_t(y) * mask.width + x]; };
  const auto solid = [&](int y, int x) {  // the block whose first pixel is (y, x)
    if (y < 0 || x < 0 || y + 1 >= mask.height || x + 1 >= mask.width) return false;
    const int value = pixel(y, x);
    return pixel(y, x + 1) == value && pixel(y + 1, x) == value && pixel(y + 1, x + 1) == value;
  };
  int64_t between = 0, flat = 0;
  for (int y = 0; y < mask.height; ++y) {
    for (int x = 0; x < mask.width; ++x) {
      if (pixel(y, x) == lowest || pixel(y, x) == highest) continue;
      ++between;
      flat += solid(y, x) || solid(y, x - 1) || solid(y - 1, x) || solid(y - 1, x - 1);
    }
  }
  if (2 * flat < between) {
    fail(path, ": ", levels,
         " grey levels, most of them only along edges: anti-aliased or interpolated; save the mask as an "
         "indexed PNG and resize it with nearest neighbour only");
  }
}

/// Pascal VOC's colours: bits 0, 1, 2 of an id are the top bits of R, G, B; 3, 4, 5 the next.
const std::array<png_color, 256>& palette() {
  static const auto colours = [] {
    std::array<png_color, 256> table{};
    for (int id = 0; id < 256; ++id) {
      for (int bit = 0; bit < 8; ++bit) {
        png_byte* channels[] = {&table[id].red, &table[id].green, &table[id].blue};
        *channels[bit % 3] |= static_cast<png_byte>((id >> bit & 1) << (7 - bit / 3));
      }
    }
    return table;
  }();
  return colours;
}

void png_append(png_structp png, png_bytep bytes, size_t count) {
  static_cast<std::string*>(png_get_io_ptr(png))->append(reinterpret_cast<char*>(bytes), count);
}

void png_flushed(png_structp) {}

bool encode_png(png_structp png, png_infop info, const uint8_t* ids, int height, int width, std::string& out) {
  if (setjmp(png_jmpbuf(png))) return false;
  png_set_write_fn(png, &out, png_append, png_flushed);
  png_set_IHDR(png, info, width, height, 8, PNG_COLOR_TYPE_PALETTE, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
               PNG_FILTER_TYPE_DEFAULT);
  png_set_PLTE(png, info, palette().data(), 256);
  png_write_info(png, info);
  for (int y = 0; y < height; ++y) png_write_row(png, ids + size_t(y) * width);
  png_write_end(png, info);
  return true;
}

}  // namespace

Image read_frame(const std::string& path) {
  const std::string bytes = read_file(path);
  int colour;
  if (is_jpeg(bytes)) return read_jpeg(bytes, path);
  if (is_png(bytes)) return read_png(bytes, path, As::rgb, colour);
  fail(path, ": neither a JPEG nor a PNG file");
}

Image read_mask(const std::string& path, int height, int width) {
  const std::string bytes = read_file(path);
  if (is_jpeg(bytes)) fail(path, ": a JPEG file smears object ids; save masks as indexed PNG");
  if (!is_png(bytes)) fail(path, ": not a PNG file; a mask must be an indexed PNG (one object id per pixel)");
  int colour = 0;
  Image mask = read_png(bytes, path, As::stored, colour);
  if (mask.height != height || mask.width != width) {
    fail(path, ": wrong size: the mask is ", mask.width, "x", mask.height, ", the frames are ", width, "x", height,
         " (width x height); resize the mask with nearest neighbour");
  }
  std::array<int64_t, 256> count{};
  for (uint8_t id : mask.pixels) ++count[id];
  uint8_t in_place_of_void = 0;
  if (colour == PNG_COLOR_TYPE_GRAY) {
    check_grey(path, mask, count);
    const auto objects = std::count_if(count.begin() + 1, count.end() - 1, [](int64_t n) { return n > 0; });
    if (count[255] && !objects) in_place_of_void = 1;  // a mask of 0 and 255
    const bool dense = std::all_of(count.begin() + 1, count.begin() + 1 + objects, [](int64_t n) { return n > 0; });
    if (count[255] && objects && !dense) {
      fail(path,
           ": its grey values may be object ids with void (255) or several grey levels of one mask; save the mask as an "
           "indexed PNG with ids 1, 2, ...");
    }
  }
  if (count[255]) std::replace(mask.pixels.begin(), mask.pixels.end(), uint8_t(255), in_place_of_void);
  return mask;
}

void write_mask(const std::string& path, const uint8_t* ids, int height, int width) {
  struct Encoder {
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, png_warned);
    png_infop info = png_create_info_struct(png);
    ~Encoder() { png_destroy_write_struct(&png, &info); }
  } encoder;
  std::string out;
  if (!encode_png(encoder.png, encoder.info, ids, height, width, out)) fail(path, ": libpng cannot write it");
  write_file(path, out);
}

}  // namespace dmm
