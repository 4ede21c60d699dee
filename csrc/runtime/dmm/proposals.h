// Mask proposals from a COCO results file, as dmm_fast.proposals reads them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "dmm/json.h"

namespace dmm {

/// Proposals of one frame, best first.
struct FrameProposals {
  int height = 0, width = 0;
  std::vector<float> boxes;   // [M, 4] x0 y0 x1 y1 in pixels
  std::vector<float> scores;  // [M]
  // [M, R]: for each mask the places, counted down the columns, at which it begins and ends in turn, ascending, padded with
  // kNoRun.
  std::vector<int32_t> runs;
};

constexpr int32_t kNoRun = INT32_MAX;

/// A JSON list of {image_id, score, segmentation, bbox?}: image_id is the frame's stem, segmentation an RLE.
class ProposalFile {
 public:
  /// Throws Error for a file that is missing, cut short or not such a list; a frame's masks are read when it is asked for.
  explicit ProposalFile(const std::string& path, int top = 50);

  /// At most `top` proposals of a frame of this size; none at all is an empty result, not an error.
  FrameProposals frame(const std::string& stem, int height, int width) const;

  /// Read image id n as the frame numbered n + offset: by the last number in its name, or by its place among `stems` where not
  /// every frame has a number of its own. 0 takes ids that are frames' names as they are. Throws Error where no id is a
  /// frame's.
  void shift(const std::vector<std::string>& stems, int64_t offset);

  /// What the user should know about the frames of a clip: those without proposals, and image ids that are not a frame's.
  std::vector<std::string> notes(const std::vector<std::string>& stems) const;

  /// How many of these frames have a proposal.
  int64_t covers(const std::vector<std::string>& stems) const;

  /// Whether it holds no proposal at all, as of a detector that found nothing; that is no error.
  bool empty() const { return ids_.empty(); }

  /// The image_id of the first entry, as it may stand in a message; "nothing" for an empty file.
  std::string example() const;

 private:
  struct Entry {
    double score;
    Json bbox, segmentation;
  };
  using Entries = std::map<std::string, std::vector<Entry>>;
  Entries::const_iterator find(const std::string& stem) const;

  std::string path_;
  int top_;
  Entries entries_;                           // by image id, best first
  std::vector<std::string> ids_;              // in the file's order
  std::map<std::string, std::string> moved_;  // frame -> image id, after a shift
  bool asked_ = false;                        // how ids count has been given
};

/// Run lengths of 0 and 1 in turn, down the columns, from COCO's compressed text; false where it is damaged.
bool uncompress(const std::string& counts, std::vector<int64_t>& runs);

}  // namespace dmm
