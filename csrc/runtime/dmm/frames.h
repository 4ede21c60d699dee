// A folder of frames, in the order in which people number them.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace dmm {

/// The JPEG and PNG files of a folder as (stem, path), frame2 before frame10. Throws Error where there is none, where two bear
/// one stem, or where frames are of a kind that is not read here.
std::vector<std::pair<std::string, std::string>> list_frames(const std::string& folder);

}  // namespace dmm
