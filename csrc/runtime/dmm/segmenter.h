// dmm::Segmenter: follow objects through a video with an exported network, without Python.
//
//   dmm::Segmenter segmenter("exported");
//   segmenter.start(frame, ids);                           // uint8 [3, H, W] and [H, W]
//   auto result = segmenter.step(frame, proposals);        // result.ids: uint8 [H, W]
//
// What a call throws is a dmm::Error (something given cannot be used) and leaves the session as it was.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "dmm/error.h"
#include "dmm/image.h"
#include "dmm/proposals.h"

namespace dmm {

/// Mask proposals of one frame.
struct Proposals {
  at::Tensor boxes;   // [M, 4] float, x0 y0 x1 y1 in pixels of the frame
  at::Tensor scores;  // [M] float
  // [M, H, W] bool ("full"); [M, R] int32, run-length codes as in FrameProposals ("runs"); or [M, S, S] float in [0, 1], inside
  // the boxes ("soft"). Full masks and runs become each other where an export takes only the other.
  at::Tensor masks;
};

/// What happened to one object in one frame.
struct ObjectResult {
  int id;
  int64_t proposal;  // index of the matched proposal; -1 if given by the user, or lost
  double score;      // minus the cost of the match (Eq. 1), at most 1; 0 where lost
  double runner_up;  // the same for the best other proposal, 0 where there is none
  bool lost;         // nothing matched: the object keeps its last mask
};

struct FrameResult {
  at::Tensor ids;                     // [H, W] uint8, 0 is background
  std::vector<ObjectResult> objects;  // by id
};

struct Options {
  std::string device = "cpu";  // or "cuda", "cuda:1", ..
  std::string ops;             // libdmm_cpu.so or its folder; else $DMM_OPS, else beside the program
  int slots = 1;               // object slots to start with; more are added when needed
};

class Segmenter {
 public:
  /// `folder` is an export of dmm_fast: manifest.json and what it lists.
  explicit Segmenter(const std::string& folder, const Options& options = {});
  Segmenter(Segmenter&&) noexcept;
  Segmenter& operator=(Segmenter&&) noexcept;
  ~Segmenter();

  /// Begin with a frame [3, H, W] uint8 and its objects, ids [H, W] uint8 of 1..254 (0 is background); forgets any earlier
  /// session.
  FrameResult start(const at::Tensor& frame, const at::Tensor& ids);

  /// Find the objects in the next frame.
  FrameResult step(const at::Tensor& frame, const Proposals& proposals);

  /// The same among what the exported proposal network finds (see `propose`), in one: faster than the two, as a backbone that
  /// both networks have runs once.
  FrameResult step(const at::Tensor& frame);

  /// Follow further objects, given by their masks in the last frame; they are drawn over that frame's result.
  FrameResult add(const at::Tensor& ids);

  /// Follow these objects no longer; their slots are free for others.
  void drop(const std::vector<int>& ids);

  /// The proposals of the exported proposal network; `proposes` tells whether there is one.
  Proposals propose(const at::Tensor& frame);
  bool proposes() const;

  /// Write the session to a safetensors file, whole or not at all, as dmm_fast.Segmenter.save does: each reads the other's.
  /// `last_frame`: a name to find the place by when going on.
  void save(const std::string& path, const std::string& last_frame = "") const;

  /// Go on from such a file, with an export of the same network; results are those without the break.
  static Segmenter load(const std::string& path, const std::string& folder, const Options& options = {});

  /// Ids of the objects being followed, ascending.
  std::vector<int> object_ids() const;

  /// Whether there is a session: `start` or `load` was called.
  bool started() const;

  /// The `last_frame` of the session that was loaded.
  const std::string& last_frame() const;

 private:
  struct Session;
  std::unique_ptr<Session> session_;
};

/// An image as a frame [3, H, W], or as ids [H, W] where it has one channel.
at::Tensor to_tensor(const Image& image);

Proposals to_tensors(const FrameProposals& proposals);

}  // namespace dmm
