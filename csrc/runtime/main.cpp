// dmm-segment: segment a folder of frames with an exported network.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <optional>

#include "dmm/frames.h"
#include "dmm/segmenter.h"

namespace {

namespace fs = std::filesystem;

constexpr const char* kHelp = R"(usage: dmm-segment --model DIR --frames DIR --masks FIRST.png [--proposals FILE] --out DIR

Follow objects through a video, given their masks in its first frame. Needs no Python: the network is an export of dmm_fast
(dmm-fast export), run by libtorch.

input:
  --model DIR        an export: manifest.json and what it lists (TorchScript or .pt2)
  --frames DIR       the video as JPEG or PNG files, in the order of the numbers in their names
  --masks PNG|DIR    the objects of the first frame, as an indexed PNG: 0 is background, 1..254 are objects, 255 is ignored.
                     A folder holds PNGs named like frames; new objects in a later one are added there
  --proposals FILE   mask proposals: a COCO results file (JSON list of image_id = the frame's name, score, RLE, bbox).
                     Default: the export's own proposal network
  --image-id-offset N
                     added to the file's image ids to give frame numbers: -1 for ids that count from 1, 0 for ids as they are.
                     Default: as they are, with a note if they do not match (dmm-fast segment detects the offset)

output:
  --out DIR          one indexed PNG per frame, including the first, named like the frame
  --report FILE      JSON: for each frame the result for each object, and the milliseconds of each stage
  --overwrite        replace the masks and the report of an earlier run

saving and resuming:
  --save STATE       write the session at the end and on Ctrl-C (safetensors; Python's Segmenter.load reads it too)
  --every N          and after every N frames
  --resume STATE     continue from such a file, after the frame that it names, or after --after
  --after NAME       the last frame done, if STATE does not name it (sessions saved in Python do not)

other:
  --device NAME      cpu (default), cuda, cuda:1, ..
  --threads N        of the CPU (default: $OMP_NUM_THREADS, else all cores)
  --ops FILE         the op library libdmm_cpu.so or its folder (default: $DMM_OPS, else beside this program)
  --quiet            no summary

Exit code: 0 done, 2 bad input, 1 internal error, 130 stopped by Ctrl-C.

examples:
  dmm-fast export --format torchscript --preset iou --out model            (with Python, once)
  dmm-segment --model model --frames frames --masks first.png --proposals proposals.json --out result
      masks in result/, and frames per second on the terminal
  dmm-segment ... --save state.safetensors --every 100
  dmm-segment ... --resume state.safetensors --save state.safetensors --every 100
      repeat this command to continue an interrupted run
)";

/// The command line: every option takes a value but --overwrite, --quiet and --help.
std::map<std::string, std::string> parse(int count, char** words) {
  static const std::string kKnown[] = {"model",     "frames", "masks", "proposals", "image-id-offset", "out",    "report",
                                       "overwrite", "save",   "every", "resume",    "after",           "device", "threads",
                                       "ops",       "quiet",  "help"};
  static const std::string kPlain[] = {"overwrite", "quiet", "help"};
  std::map<std::string, std::string> options;
  for (int k = 1; k < count; ++k) {
    std::string word = words[k];
    if (word == "-h") word = "--help";
    std::optional<std::string> value;
    if (const auto equals = word.find('='); equals != std::string::npos) value = word.substr(equals + 1), word.resize(equals);
    const std::string name = word.substr(0, 2) == "--" ? word.substr(2) : "";
    if (std::find(std::begin(kKnown), std::end(kKnown), name) == std::end(kKnown)) {
      dmm::fail("unknown argument ", dmm::excerpt(word), "; see dmm-segment --help");
    }
    if (std::find(std::begin(kPlain), std::end(kPlain), name) == std::end(kPlain) && !value) {
      if (++k >= count) dmm::fail(word, " needs a value");
      value = words[k];
    }
    options[name] = value.value_or("");
  }
  return options;
}

constexpr int kMost = 1'000'000'000;

int whole_number(const std::map<std::string, std::string>& options, const std::string& name, int otherwise, int least = 1) {
  const auto found = options.find(name);
  if (found == options.end()) return otherwise;
  char* end = nullptr;
  const long value = std::strtol(found->second.c_str(), &end, 10);
  if (found->second.empty() || *end || value < least || value > kMost) {
    dmm::fail("--", name, " must be a whole number from ", least, " to ", kMost, ", got ", dmm::excerpt(found->second));
  }
  return int(value);
}

/// Milliseconds of the stages of one frame.
enum Stage { decode, proposals, step, write, stages };
constexpr const char* kStages[] = {"decode", "proposals", "step", "write"};
using Times = std::array<double, stages>;

template <class Work>
auto timed(Times& times, Stage stage, const Work& work) {
  struct Clock {
    double& total;
    std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
    ~Clock() { total += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count(); }
  } clock{times[stage]};
  return work();
}

/// Where objects come from: a mask of the first frame, or a folder of masks by frame.
class GivenMasks {
 public:
  GivenMasks(const std::string& path, const std::vector<std::pair<std::string, std::string>>& frames) {
    if (!fs::exists(path)) dmm::fail(path, ": no such mask file or folder");
    if (!fs::is_directory(path)) {
      const std::string stem = fs::path(path).stem().string();
      const bool named = std::any_of(frames.begin(), frames.end(), [&](const auto& frame) { return frame.first == stem; });
      files_[named ? stem : frames[0].first] = path;
      return;
    }
    for (const auto& [stem, file] : frames) {
      const fs::path mask = fs::path(path) / (stem + ".png");
      if (fs::exists(mask)) files_[stem] = mask.string();
    }
    if (files_.empty()) dmm::fail(path, ": no mask there bears the name of a frame, such as ", frames[0].first, ".png");
  }

  /// The ids given for a frame that are not `known` yet, if any.
  std::optional<at::Tensor> of(const std::string& stem, const dmm::Image& frame, const std::vector<int>& known) const {
    const auto found = files_.find(stem);
    if (found == files_.end()) return std::nullopt;
    dmm::Image mask = dmm::read_mask(found->second, frame.height, frame.width);
    bool any = false;
    for (uint8_t& id : mask.pixels) {
      if (std::find(known.begin(), known.end(), id) != known.end()) id = 0;
      any |= id != 0;
    }
    return any ? std::optional(dmm::to_tensor(mask)) : std::nullopt;
  }

 private:
  std::map<std::string, std::string> files_;
};

dmm::Json row(const std::string& stem, const dmm::FrameResult& result, const Times& times) {
  using dmm::Json;
  Json::Array objects;
  for (const auto& o : result.objects) {
    objects.push_back(Json::Object{{"id", o.id},
                                   {"proposal", o.proposal < 0 ? Json() : Json(o.proposal)},
                                   {"score", o.score},
                                   {"runner_up", o.runner_up},
                                   {"lost", o.lost}});
  }
  Json::Object milliseconds;
  for (int k = 0; k < stages; ++k) milliseconds.emplace_back(kStages[k], times[k]);
  return Json::Object{{"frame", stem}, {"objects", std::move(objects)}, {"ms", std::move(milliseconds)}};
}

volatile std::sig_atomic_t stop_asked = 0;
void ask_to_stop(int number) {
  stop_asked = 1;
  std::signal(number, SIG_DFL);  // a second Ctrl-C stops at once
}

void summarise(const std::vector<Times>& frames) {
  Times sum{};
  for (const Times& times : frames) {
    for (int k = 0; k < stages; ++k) sum[k] += times[k];
  }
  double total = 0;
  for (double stage : sum) total += stage;
  const double count = double(frames.size());
  const auto fps = [count](double milliseconds) { return milliseconds > 0 ? 1000 * count / milliseconds : 0.0; };
  std::printf("%zu frames, %.1f frames/s\n", frames.size(), fps(total));
  for (int k = 0; k < stages; ++k) {
    if (sum[k] == 0) continue;  // did not run: the export's own proposals are part of the step
    std::printf("  %-10s %8.2f ms a frame %10.1f frames/s\n", kStages[k], sum[k] / count, fps(sum[k]));
  }
}

/// What an earlier run has left where this one writes: masks of these frames, a report.
std::vector<fs::path> earlier_results(const fs::path& out, const std::string& report,
                                      const std::vector<std::pair<std::string, std::string>>& frames) {
  std::vector<fs::path> found;
  for (const auto& [stem, file] : frames) {
    if (const fs::path mask = out / (stem + ".png"); fs::is_regular_file(mask)) found.push_back(mask);
  }
  if (fs::is_regular_file(report)) found.push_back(report);
  return found;
}

int run(const std::map<std::string, std::string>& options) {
  const auto text = [&options](const char* name, const char* otherwise = "") {
    const auto found = options.find(name);
    return found == options.end() ? std::string(otherwise) : found->second;
  };
  for (const char* needed : {"model", "frames", "out"}) {
    if (text(needed).empty()) dmm::fail("--", needed, " is needed; see dmm-segment --help");
  }
  const bool resumes = options.count("resume") > 0;
  if (!resumes && text("masks").empty()) dmm::fail("--masks is needed (or --resume); see dmm-segment --help");
  if (options.count("every") && text("save").empty()) dmm::fail("--every needs --save");
  if (options.count("image-id-offset") && !options.count("proposals")) dmm::fail("--image-id-offset needs --proposals");
  if (options.count("overwrite") && resumes) dmm::fail("--resume goes on, --overwrite starts again: give one of them");
  const int every = whole_number(options, "every", 0);
  if (options.count("threads")) at::set_num_threads(whole_number(options, "threads", 1));

  const auto frames = dmm::list_frames(text("frames"));
  std::optional<GivenMasks> masks;
  if (options.count("masks")) masks.emplace(text("masks"), frames);
  std::optional<dmm::ProposalFile> file;
  if (options.count("proposals")) {
    file.emplace(text("proposals"));
    std::vector<std::string> stems;
    for (const auto& frame : frames) stems.push_back(frame.first);
    if (options.count("image-id-offset")) file->shift(stems, whole_number(options, "image-id-offset", 0, -kMost));
    if (!file->empty() && !file->covers(stems)) {
      dmm::fail(text("proposals"), ": no proposals for these frames: image_id must be a frame's name such as ",
                dmm::excerpt(stems[0]), ", the file holds ", file->example(),
                " (--image-id-offset N is added to ids that are numbers)");
    }
    for (const std::string& note : file->notes(stems)) std::cerr << "note: " << note << "\n";
  }
  const fs::path out = text("out");
  if (fs::exists(out) && fs::equivalent(out, text("frames")))
    dmm::fail(out.string(), ": this is where the frames are read from");
  if (fs::exists(out) && masks) {
    const fs::path given = text("masks");
    if (fs::equivalent(out, fs::is_directory(given) ? given : fs::absolute(given).parent_path())) {
      dmm::fail(out.string(), ": this is where the masks are read from; choose another --out");
    }
  }
  // A resumed run goes on in the folder of the one before it.
  const auto earlier = resumes ? std::vector<fs::path>() : earlier_results(out, text("report"), frames);
  if (!earlier.empty() && !options.count("overwrite")) {
    const std::string rest = earlier.size() > 1 ? " (and " + std::to_string(earlier.size() - 1) + " more)" : "";
    dmm::fail(earlier[0].string(), ": is there already", rest,
              "; --overwrite replaces the results there, --resume STATE goes on");
  }
  const dmm::Options how{text("device", "cpu"), text("ops"), 1};
  dmm::Segmenter segmenter =
      resumes ? dmm::Segmenter::load(text("resume"), text("model"), how) : dmm::Segmenter(text("model"), how);
  if (!file && !segmenter.proposes()) dmm::fail("--proposals is needed: ", text("model"), " holds no proposal network");

  size_t next = 0;
  if (resumes) {
    const std::string last = text("after", segmenter.last_frame().c_str());
    if (last.empty()) dmm::fail(text("resume"), ": does not name its last frame; --after NAME does");
    const auto found = std::find_if(frames.begin(), frames.end(), [&](const auto& frame) { return frame.first == last; });
    if (found == frames.end()) dmm::fail(text("frames"), ": no frame ", dmm::excerpt(last), " to go on behind");
    next = size_t(found - frames.begin()) + 1;
  }
  fs::create_directories(out);
  for (const fs::path& file : earlier) fs::remove(file);  // so that masks of two runs are never mixed
  std::signal(SIGINT, ask_to_stop);
  std::signal(SIGTERM, ask_to_stop);

  std::vector<Times> spent;
  dmm::Json::Array rows;
  std::string last = segmenter.last_frame();
  int height = 0, width = 0;
  for (; next < frames.size() && !stop_asked; ++next) {
    const auto& [stem, path] = frames[next];
    Times times{};
    const auto image = timed(times, decode, [&, &path = path] { return dmm::read_frame(path); });
    if (spent.empty()) height = image.height, width = image.width;
    if (image.height != height || image.width != width) {
      dmm::fail(path, ": is ", image.width, "x", image.height, ", the first frame is ", width, "x", height,
                "; all frames of a video must have one size");
    }
    const auto frame = timed(times, decode, [&] { return dmm::to_tensor(image); });
    dmm::FrameResult result{at::zeros({image.height, image.width}, at::kByte), {}};
    if (segmenter.started()) {
      std::optional<dmm::Proposals> found;  // the export's own are part of the step
      if (file) {
        found = timed(times, proposals,
                      [&, &stem = stem] { return dmm::to_tensors(file->frame(stem, image.height, image.width)); });
      }
      result = timed(times, step, [&] { return found ? segmenter.step(frame, *found) : segmenter.step(frame); });
    }
    if (const auto given = masks ? masks->of(stem, image, segmenter.object_ids()) : std::nullopt) {
      const auto joined =
          timed(times, step, [&] { return segmenter.started() ? segmenter.add(*given) : segmenter.start(frame, *given); });
      result.ids = joined.ids;
      result.objects.insert(result.objects.end(), joined.objects.begin(), joined.objects.end());
    }
    timed(times, write, [&, &stem = stem] {
      dmm::write_mask((out / (stem + ".png")).string(), result.ids.const_data_ptr<uint8_t>(), image.height, image.width);
    });
    rows.push_back(row(stem, result, times));
    spent.push_back(times);
    last = stem;
    if (every && spent.size() % size_t(every) == 0 && segmenter.started()) segmenter.save(text("save"), last);
  }
  if (!segmenter.started() && !stop_asked) dmm::fail(text("masks"), ": no object in any mask");
  if (!text("save").empty() && segmenter.started()) segmenter.save(text("save"), last);
  if (!text("report").empty())
    dmm::write_file(text("report"), dmm::Json(dmm::Json::Object{{"frames", std::move(rows)}}).dump() + "\n");
  if (!options.count("quiet")) spent.empty() ? void(std::puts("nothing left to do")) : summarise(spent);
  return stop_asked ? 130 : 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    const auto options = parse(count, words);
    if (count < 2 || options.count("help")) {
      std::fputs(kHelp, count < 2 ? stderr : stdout);
      return count < 2 ? 2 : 0;
    }
    return run(options);
  } catch (const dmm::Error& error) {
    std::cerr << "dmm-segment: " << error.what() << "\n";
    return 2;
  } catch (const fs::filesystem_error& error) {
    std::cerr << "dmm-segment: " << error.what() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "dmm-segment: a fault of this program: " << error.what() << "\n";
    return 1;
  }
}
