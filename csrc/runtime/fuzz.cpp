// Runs one reader on each file: dmm-read json|manifest|proposals|safetensors|frame|mask FILE... Prints one line a file, what
// was read or why it was refused. Made for fuzzing under sanitizers; it needs no torch.
#include <iostream>

#include "dmm/error.h"
#include "dmm/image.h"
#include "dmm/manifest.h"
#include "dmm/proposals.h"
#include "dmm/safetensors.h"

namespace {

std::string read(const std::string& kind, const std::string& path) {
  if (kind == "json") return dmm::Json::parse(dmm::read_file(path), path).dump();
  if (kind == "manifest") return dmm::Manifest::read(path).kind;
  if (kind == "safetensors") return std::to_string(dmm::SafeTensors::read(path).tensors.size()) + " tensors";
  if (kind == "proposals") {
    dmm::ProposalFile file(path);
    file.notes({"7", "8"});
    const auto frame = file.frame("7", 24, 32);
    return std::to_string(frame.scores.size()) + " proposals";
  }
  if (kind == "frame" || kind == "mask") {
    const auto image = kind == "frame" ? dmm::read_frame(path) : dmm::read_mask(path, 24, 32);
    uint64_t sum = 0;  // touches every pixel
    for (size_t at = 0; at < image.pixels.size(); ++at) sum += image.pixels[at] * (at % 251 + 1);
    return std::to_string(image.width) + "x" + std::to_string(image.height) + " " + std::to_string(sum);
  }
  dmm::fail("no reader of ", dmm::excerpt(kind));
}

}  // namespace

int main(int argc, char** argv) {
  for (int k = 2; k < argc; ++k) {
    try {
      const std::string got = read(argv[1], argv[k]);
      std::cout << "read " << got << "\n";
    } catch (const dmm::Error& error) {
      std::cout << "refused " << error.what() << "\n";
    }
  }
}
