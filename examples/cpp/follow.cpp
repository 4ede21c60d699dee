// follow EXPORT FRAMES FIRST.png PROPOSALS.json: prints, per frame, where each object is and how sure the match was.
#include <dmm/frames.h>
#include <dmm/segmenter.h>

#include <cstdio>

int main(int argc, char** argv) try {
  if (argc != 5) dmm::fail("usage: follow EXPORT FRAMES FIRST.png PROPOSALS.json");
  dmm::Segmenter segmenter(argv[1]);
  const dmm::ProposalFile proposals(argv[4]);
  for (const auto& [stem, path] : dmm::list_frames(argv[2])) {
    const dmm::Image image = dmm::read_frame(path);
    const at::Tensor frame = dmm::to_tensor(image);
    const auto result = segmenter.started()
                            ? segmenter.step(frame, dmm::to_tensors(proposals.frame(stem, image.height, image.width)))
                            : segmenter.start(frame, dmm::to_tensor(dmm::read_mask(argv[3], image.height, image.width)));
    for (const auto& object : result.objects) {
      const long pixels = result.ids.eq(object.id).sum().item<int64_t>();
      std::printf("%s object %d: %ld pixels, score %.3f%s\n", stem.c_str(), object.id, pixels, object.score,
                  object.lost ? ", lost" : "");
    }
  }
} catch (const dmm::Error& error) {
  std::fprintf(stderr, "follow: %s\n", error.what());
  return 2;
}
