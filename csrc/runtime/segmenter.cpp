#include "dmm/segmenter.h"

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "dmm/safetensors.h"
#include "model.h"

namespace dmm {
namespace {

constexpr int64_t kFormat = 3;  // of saved sessions
constexpr int kMostObjects = 255;

// The tensors of a state, in the order of dmm_fast.model.State; the hidden ones follow.
constexpr std::array<const char*, 6> kState = {"state.valid", "state.features", "state.templates",
                                               "state.masks", "state.motion",   "state.full"};
constexpr size_t kValid = 0, kHidden = kState.size();

std::string state_name(size_t index) {
  return index < kHidden ? kState[index] : "state.hidden." + std::to_string(index - kHidden);
}

/// Where a step's results are among its outputs.
struct Places {
  explicit Places(const Manifest& manifest) : outputs(manifest.files.at("step").outputs), where(manifest.folder) {}
  size_t operator()(const std::string& name) const {
    const auto found = std::find_if(outputs.begin(), outputs.end(), [&](const TensorSpec& spec) { return spec.name == name; });
    if (found == outputs.end()) fail(where, ": its step does not give ", name);
    return size_t(found - outputs.begin());
  }
  const std::vector<TensorSpec>& outputs;
  const std::string& where;
};

/// Objects as they are given: their ids, and masks [N, H, W] bool.
struct Objects {
  std::vector<int> ids;
  at::Tensor masks;
};

at::Tensor checked_frame(const at::Tensor& frame) {
  if (frame.dim() != 3 || frame.size(0) != 3 || frame.numel() == 0 || frame.scalar_type() != at::kByte) {
    fail("Segmenter: frame must be uint8 [3, H, W], got ", c10::toString(frame.scalar_type()), " ", frame.sizes());
  }
  return frame.contiguous();
}

Objects checked_objects(const at::Tensor& given, at::IntArrayRef size) {
  if (given.scalar_type() != at::kByte || given.sizes() != size) {
    fail("Segmenter: ids must be uint8 of the frame's size ", size, ", got ", c10::toString(given.scalar_type()), " ",
         given.sizes());
  }
  const at::Tensor ids = given.cpu().contiguous();
  const auto* pixels = ids.const_data_ptr<uint8_t>();
  std::array<bool, 256> seen{};
  for (int64_t k = 0; k < ids.numel(); ++k) seen[pixels[k]] = true;
  if (seen[255]) fail("Segmenter: object ids must be in 1..254 (255 means void), got 255");
  Objects objects;
  Tensors masks;
  for (int id = 1; id < 255; ++id) {
    if (seen[id]) objects.ids.push_back(id), masks.push_back(ids.eq(id));
  }
  objects.masks = masks.empty() ? at::zeros({0, size[0], size[1]}, at::kBool) : at::stack(masks);
  return objects;
}

/// `theirs` in the slots where `chosen` [N] is set, `mine` elsewhere.
Tensors merge(const at::Tensor& chosen, const Tensors& mine, const Tensors& theirs) {
  Tensors result;
  for (size_t k = 0; k < mine.size(); ++k) {
    std::vector<int64_t> shape(mine[k].dim(), 1);
    shape[0] = -1;
    result.push_back(at::where(chosen.view(shape), theirs[k], mine[k]));
  }
  return result;
}

/// The state with free slots appended until there are `slots`.
Tensors grow(Tensors state, int64_t slots) {
  for (at::Tensor& tensor : state) {
    auto shape = tensor.sizes().vec();
    shape[0] = slots - shape[0];
    if (shape[0] > 0) tensor = at::cat({tensor, at::zeros(shape, tensor.options())});
  }
  return state;
}

/// Full masks [M, H, W] as run-length codes [M, R].
at::Tensor encode_runs(const at::Tensor& masks) {
  const at::Tensor down = masks.cpu().transpose(1, 2).contiguous();  // column by column
  const int64_t count = masks.size(0), area = masks.size(1) * masks.size(2);
  std::vector<std::vector<int32_t>> codes(count);
  size_t longest = 1;
  for (int64_t k = 0; k < count; ++k) {
    const bool* pixel = down.const_data_ptr<bool>() + k * area;
    for (int64_t at = 0; at < area; ++at) {
      if (pixel[at] != (at > 0 && pixel[at - 1])) codes[k].push_back(int32_t(at));
    }
    longest = std::max(longest, codes[k].size());
  }
  at::Tensor runs = at::full({count, int64_t(longest)}, kNoRun, at::kInt);
  for (int64_t k = 0; k < count; ++k) {
    std::copy(codes[k].begin(), codes[k].end(), runs.mutable_data_ptr<int32_t>() + k * int64_t(longest));
  }
  return runs;
}

/// The inverse.
at::Tensor decode_runs(const at::Tensor& runs, int64_t height, int64_t width) {
  const at::Tensor places = runs.cpu().contiguous();
  const int64_t count = runs.size(0), length = runs.size(1), area = height * width;
  at::Tensor down = at::zeros({count, width, height}, at::kBool);
  for (int64_t k = 0; k < count; ++k) {
    const int32_t* place = places.const_data_ptr<int32_t>() + k * length;
    bool* pixels = down.mutable_data_ptr<bool>() + k * area;
    for (int64_t j = 0; j < length; j += 2) {
      const int64_t begin = std::clamp<int64_t>(place[j], 0, area);
      const int64_t end = j + 1 < length ? std::clamp<int64_t>(place[j + 1], begin, area) : area;
      std::fill(pixels + begin, pixels + end, true);
    }
  }
  return down.transpose(1, 2).contiguous();
}

FrameResult given(const std::vector<int>& ids, const at::Tensor& map) {
  FrameResult result{map.clone(), {}};
  for (int id : ids) result.objects.push_back({id, -1, 1.0, 0.0, false});
  return result;
}

int64_t integer(const Json& config, const char* name, int64_t otherwise) {
  const Json* value = config.find(name);
  return value && value->get<int64_t>() ? *value->get<int64_t>() : otherwise;
}

const std::vector<std::pair<const char*, at::ScalarType>> kDtypes = {
    {"BOOL", at::kBool},     {"U8", at::kByte},   {"I64", at::kLong},  {"F16", at::kHalf},
    {"BF16", at::kBFloat16}, {"F32", at::kFloat}, {"F64", at::kDouble}};

at::Tensor tensor_of(const TensorBytes& bytes, const std::string& where) {
  const auto type = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const auto& d) { return d.first == bytes.dtype; })->second;
  if (type == at::kBool && std::any_of(bytes.bytes.begin(), bytes.bytes.end(), [](unsigned char b) { return b > 1; })) {
    fail(where, ": is damaged: a truth value is neither 0 nor 1");
  }
  at::Tensor tensor = at::empty(bytes.shape, type);
  std::copy(bytes.bytes.begin(), bytes.bytes.end(), static_cast<char*>(tensor.mutable_data_ptr()));
  return tensor;
}

TensorBytes bytes_of(const at::Tensor& tensor) {  // which must live on, contiguous, on the CPU
  const auto type =
      std::find_if(kDtypes.begin(), kDtypes.end(), [&](const auto& d) { return d.second == tensor.scalar_type(); });
  return {type->first, tensor.sizes().vec(), {static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()}};
}

}  // namespace

struct Segmenter::Session {
  Session(const std::string& folder, const Options& options)
      : model(Manifest::read(folder), options.device, options.ops), slots(options.slots) {
    if (slots < 1 || slots > kMostObjects) fail("Segmenter: slots must be in 1..255, got ", slots);
    std::tie(least_slots, most_slots) = model.limits("step", 4, 0);
    std::tie(least_proposals, most_proposals) = model.limits("step", 2, 0);
    const Places place(model.manifest());
    labels = place("output.labels"), proposal = place("output.proposal"), score = place("output.score");
    runner_up = place("output.runner_up"), lost = place("output.lost"), first_state = place("state.valid");
    if (place.outputs.size() - first_state != model.manifest().files.at("start").outputs.size()) {
      fail(folder, ": a step does not end with the state that start gives");
    }
    most_slots = std::min<int64_t>(most_slots, kMostObjects);
    most_proposals = std::min(most_proposals, integer(model.manifest().config, "top", 50));
  }

  Model model;
  int slots;
  size_t labels, proposal, score, runner_up, lost, first_state;  // among the outputs of a step
  int64_t least_slots, most_slots, least_proposals, most_proposals;
  Tensors state;              // empty before the first frame
  std::vector<int> slot_ids;  // by slot, 0 where free
  at::Tensor frame, ids;      // the last
  std::string last_frame;

  void require_start(const char* name) const {
    if (state.empty()) fail("Segmenter::", name, ": call start first");
  }

  int64_t slots_for(int64_t objects) const {
    if (objects > most_slots) fail("Segmenter: at most ", most_slots, " objects (as exported), got ", objects);
    return std::max(objects, least_slots);
  }

  /// Masks [slots, H, W] with those of `objects` in the slots `at`, and which slots [slots] these are.
  std::pair<at::Tensor, at::Tensor> spread(const Objects& objects, const std::vector<int64_t>& at, int64_t count) const {
    at::Tensor masks = at::zeros({count, objects.masks.size(1), objects.masks.size(2)}, at::kBool);
    at::Tensor chosen = at::zeros({count}, at::kBool);
    for (size_t k = 0; k < at.size(); ++k) {
      masks.select(0, at[k]).copy_(objects.masks.select(0, int64_t(k)));
      chosen.select(0, at[k]).fill_(true);
    }
    return {masks.to(model.device()), chosen.to(model.device())};
  }

  void paint(at::Tensor& map, const Objects& objects) const {
    for (size_t k = 0; k < objects.ids.size(); ++k) map.masked_fill_(objects.masks.select(0, int64_t(k)), objects.ids[k]);
  }

  at::Tensor following(const at::Tensor& given) const;
  FrameResult take(at::Tensor frame, const Tensors& results, const std::vector<int64_t>& kept);
  std::pair<Proposals, std::vector<int64_t>> chosen(const Proposals& given) const;
  at::Tensor fitting(const at::Tensor& masks) const;
  Proposals padded(Proposals proposals) const;
};

/// The next frame, checked, and its own copy.
at::Tensor Segmenter::Session::following(const at::Tensor& given) const {
  at::Tensor next = checked_frame(given).clone();
  if (next.sizes() != frame.sizes()) {
    fail("Segmenter: frames must have the first one's size ", frame.sizes(), ", got ", next.sizes());
  }
  return next;
}

/// Go on to a frame with what a step has given for it; `kept`: which of the caller's proposals those of the step are.
FrameResult Segmenter::Session::take(at::Tensor next, const Tensors& results, const std::vector<int64_t>& kept) {
  const at::Tensor plain = results[labels].cpu().contiguous();
  at::Tensor map = at::empty_like(plain);
  std::array<uint8_t, 256> table{};
  for (size_t slot = 0; slot < slot_ids.size(); ++slot) table[slot + 1] = uint8_t(slot_ids[slot]);
  const auto* label = plain.const_data_ptr<uint8_t>();
  std::transform(label, label + plain.numel(), map.mutable_data_ptr<uint8_t>(), [&table](uint8_t l) { return table[l]; });

  FrameResult result{map.clone(), {}};
  const at::Tensor choice = results[proposal].cpu(), scores = results[score].cpu(), rivals = results[runner_up].cpu();
  const at::Tensor missed = results[lost].cpu();
  for (int64_t slot = 0; slot < int64_t(slot_ids.size()); ++slot) {
    if (slot_ids[slot] == 0) continue;
    const bool gone = missed[slot].item<bool>();
    result.objects.push_back({slot_ids[slot], gone ? -1 : kept.at(choice[slot].item<int64_t>()), scores[slot].item<double>(),
                              rivals[slot].item<double>(), gone});
  }
  std::sort(result.objects.begin(), result.objects.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  state.assign(results.begin() + int64_t(first_state), results.end());
  frame = std::move(next), ids = std::move(map);
  return result;
}

/// Checked proposals, the best by score where there are more than the network takes; and their indices among those given.
std::pair<Proposals, std::vector<int64_t>> Segmenter::Session::chosen(const Proposals& given) const {
  const auto& [boxes, scores, masks] = given;
  const int64_t count = scores.numel();
  const bool runs = masks.scalar_type() == at::kInt;
  if (scores.dim() != 1 || boxes.dim() != 2 || boxes.size(0) != count || boxes.size(1) != 4 || masks.dim() != (runs ? 2 : 3) ||
      masks.size(0) != count) {
    fail("Segmenter: proposals must be boxes [M, 4], scores [M] and masks [M, ., .] or [M, .], got ", boxes.sizes(), ", ",
         scores.sizes(), " and ", masks.sizes());
  }
  std::vector<int64_t> kept(count);
  for (int64_t k = 0; k < count; ++k) kept[k] = k;
  if (count == 0) return {given, kept};
  if (!at::isfinite(boxes).all().item<bool>() || !at::isfinite(scores).all().item<bool>()) {
    fail("Segmenter: proposals must have finite boxes and scores");
  }
  const bool full = masks.scalar_type() == at::kBool;
  if (masks.is_floating_point() && masks.sizes().slice(1) == ids.sizes()) {
    fail("Segmenter: proposal masks of the frame's size must be bool, as masks > 0.5; float ones lie in their boxes");
  }
  const bool soft = masks.is_floating_point() && masks.size(1) == masks.size(2);
  if (full ? masks.sizes().slice(1) != ids.sizes() : !runs && !soft) {
    fail("Segmenter: proposal masks must be bool [M, H, W] of the frame's size ", ids.sizes(),
         ", float [M, S, S] in their boxes, or int32 [M, R] run-length codes, got ", c10::toString(masks.scalar_type()), " ",
         masks.sizes());
  }
  Proposals result = given;
  if (count > most_proposals) {
    const at::Tensor plain = scores.cpu().to(at::kDouble).contiguous();
    const auto* score = plain.const_data_ptr<double>();
    std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) { return score[a] > score[b]; });
    kept.resize(most_proposals);
    std::sort(kept.begin(), kept.end());
    const at::Tensor index = at::tensor(kept, at::kLong).to(scores.device());
    result = {boxes.index_select(0, index), scores.index_select(0, index), masks.index_select(0, index)};
  }
  return {
      {result.boxes.to(at::kFloat), result.scores.to(at::kFloat), fitting(soft ? result.masks.to(at::kFloat) : result.masks)},
      kept};
}

/// The masks, of a kind that the export takes.
at::Tensor Segmenter::Session::fitting(const at::Tensor& masks) const {
  const std::set<std::string>& kinds = model.manifest().masks;
  const std::string kind = mask_kind(masks);
  if (kinds.count(kind)) return masks;
  if (kind == "full" && kinds.count("runs")) return encode_runs(masks);
  if (kind == "runs" && kinds.count("full")) return decode_runs(masks, ids.size(0), ids.size(1));
  fail("Segmenter: this export does not take proposals with ", kind, " masks; export with others (dmm-fast export --masks)");
}

/// With empty proposals (score -inf) behind them, as many as the export asks for, and at least one.
Proposals Segmenter::Session::padded(Proposals proposals) const {
  const int64_t count = proposals.scores.numel(), missing = std::max<int64_t>(least_proposals, 1) - count;
  if (missing <= 0) return proposals;
  if (count == 0) {
    const std::string& dtype = model.manifest().files.at("step").inputs[3].dtype;
    const int64_t side = dtype == "float32" ? std::max<int64_t>(model.limits("step", 3, 1).first, 1) : 0;
    const at::Tensor masks = dtype == "bool"    ? at::zeros({0, ids.size(0), ids.size(1)}, at::kBool)
                             : dtype == "int32" ? at::zeros({0, 1}, at::kInt)
                                                : at::zeros({0, side, side});
    proposals = {at::zeros({0, 4}), at::zeros({0}), masks};
  }
  auto shape = proposals.masks.sizes().vec();
  shape[0] = missing;
  const bool runs = mask_kind(proposals.masks) == "runs";
  return {at::cat({proposals.boxes, at::zeros({missing, 4}, proposals.boxes.options())}),
          at::cat({proposals.scores, at::full({missing}, -INFINITY, proposals.scores.options())}),
          at::cat({proposals.masks, at::full(shape, runs ? kNoRun : 0, proposals.masks.options())})};
}

Segmenter::Segmenter(const std::string& folder, const Options& options)
    : session_(std::make_unique<Session>(folder, options)) {}
Segmenter::Segmenter(Segmenter&&) noexcept = default;
Segmenter& Segmenter::operator=(Segmenter&&) noexcept = default;
Segmenter::~Segmenter() = default;

FrameResult Segmenter::start(const at::Tensor& given_frame, const at::Tensor& given_ids) {
  const c10::InferenceMode guard;
  Session& s = *session_;
  at::Tensor frame = checked_frame(given_frame).clone();
  const Objects objects = checked_objects(given_ids, frame.sizes().slice(1));
  if (objects.ids.empty()) fail("Segmenter::start: no object in the masks");
  const int64_t slots = s.slots_for(std::max<int64_t>(s.slots, int64_t(objects.ids.size())));
  std::vector<int64_t> at(objects.ids.size());
  for (size_t k = 0; k < at.size(); ++k) at[k] = int64_t(k);
  const auto [masks, valid] = s.spread(objects, at, slots);
  Tensors state = s.model.call("start", {frame, masks, valid});
  at::Tensor ids = at::zeros({frame.size(1), frame.size(2)}, at::kByte);
  s.paint(ids, objects);
  s.state = std::move(state), s.frame = std::move(frame), s.ids = std::move(ids);
  s.slot_ids = objects.ids;
  s.slot_ids.resize(slots);
  return given(objects.ids, s.ids);
}

FrameResult Segmenter::step(const at::Tensor& given_frame, const Proposals& proposals) {
  const c10::InferenceMode guard;
  Session& s = *session_;
  s.require_start("step");
  at::Tensor frame = s.following(given_frame);
  const auto [best, kept] = s.chosen(proposals);
  const Proposals whole = s.padded(best);
  Tensors inputs = {frame, whole.boxes, whole.scores, whole.masks};
  inputs.insert(inputs.end(), s.state.begin(), s.state.end());
  return s.take(frame, s.model.call("step", std::move(inputs)), kept);
}

FrameResult Segmenter::step(const at::Tensor& given_frame) {
  const c10::InferenceMode guard;
  Session& s = *session_;
  if (!s.model.manifest().files.count("live")) return step(given_frame, propose(given_frame));
  s.require_start("step");
  at::Tensor frame = s.following(given_frame);
  Tensors inputs = {frame};
  inputs.insert(inputs.end(), s.state.begin(), s.state.end());
  const Tensors results = s.model.call("live", std::move(inputs));  // the proposals, then what a step gives
  std::vector<int64_t> kept(results.at(1).size(0));
  for (size_t k = 0; k < kept.size(); ++k) kept[k] = int64_t(k);
  return s.take(frame, Tensors(results.begin() + 3, results.end()), kept);
}

FrameResult Segmenter::add(const at::Tensor& given_ids) {
  const c10::InferenceMode guard;
  Session& s = *session_;
  s.require_start("add");
  const Objects objects = checked_objects(given_ids, s.ids.sizes());
  for (int id : objects.ids) {
    if (std::count(s.slot_ids.begin(), s.slot_ids.end(), id))
      fail("Segmenter::add: object ", id, " is followed already; drop it first");
  }
  std::vector<int> slot_ids = s.slot_ids;
  std::vector<int64_t> free;
  for (size_t k = 0; k < objects.ids.size(); ++k) {
    const auto slot = std::find(slot_ids.begin(), slot_ids.end(), 0) - slot_ids.begin();
    if (slot == int64_t(slot_ids.size())) slot_ids.push_back(0);
    slot_ids[slot] = objects.ids[k];
    free.push_back(slot);
  }
  const int64_t slots = s.slots_for(int64_t(slot_ids.size()));
  const auto [masks, chosen] = s.spread(objects, free, slots);
  const Tensors begun = s.model.call("start", {s.frame, masks, chosen});
  Tensors state = merge(chosen, grow(s.state, slots), begun);
  at::Tensor ids = s.ids.clone();
  s.paint(ids, objects);
  s.state = std::move(state), s.slot_ids = std::move(slot_ids), s.ids = std::move(ids);
  return given(objects.ids, s.ids);
}

void Segmenter::drop(const std::vector<int>& ids) {
  const c10::InferenceMode guard;
  Session& s = *session_;
  s.require_start("drop");
  at::Tensor gone = at::zeros({int64_t(s.slot_ids.size())}, at::kBool);
  std::vector<int> slot_ids = s.slot_ids;
  at::Tensor left = s.ids.clone();  // add draws over it
  for (int id : ids) {
    const auto slot = std::find(slot_ids.begin(), slot_ids.end(), id) - slot_ids.begin();
    if (id == 0 || slot == int64_t(slot_ids.size())) fail("Segmenter::drop: object ", id, " is not followed");
    slot_ids[slot] = 0;
    gone.select(0, slot).fill_(true);
    left.masked_fill_(left.eq(id), 0);
  }
  Tensors nothing;
  for (const at::Tensor& tensor : s.state) nothing.push_back(at::zeros_like(tensor));
  s.state = merge(gone.to(s.model.device()), s.state, nothing);
  s.slot_ids = std::move(slot_ids), s.ids = std::move(left);
}

bool Segmenter::proposes() const { return session_->model.manifest().files.count("proposals") > 0; }

Proposals Segmenter::propose(const at::Tensor& frame) {
  if (!proposes()) fail(session_->model.manifest().folder, ": holds no proposal network; give proposals");
  const Tensors found = session_->model.call("proposals", {checked_frame(frame)});
  if (found.size() != 3) fail("proposals: must give boxes, scores and masks, got ", found.size(), " tensors");
  const int64_t count = at::isfinite(found[1]).sum().item<int64_t>();  // behind them is padding
  return {found[0].narrow(0, 0, count), found[1].narrow(0, 0, count), found[2].narrow(0, 0, count)};
}

void Segmenter::save(const std::string& path, const std::string& last_frame) const {
  const Session& s = *session_;
  s.require_start("save");
  Tensors owned;
  std::vector<std::pair<std::string, TensorBytes>> tensors;
  const auto put = [&](const std::string& name, const at::Tensor& tensor) {
    owned.push_back(tensor.cpu().contiguous());
    tensors.emplace_back(name, bytes_of(owned.back()));
  };
  for (size_t k = 0; k < s.state.size(); ++k) put(state_name(k), s.state[k]);
  put("frame", s.frame);
  put("ids", s.ids);
  const Json session(Json::Object{{"format", kFormat},
                                  {"config", s.model.manifest().config},
                                  {"weights", s.model.manifest().weights},
                                  {"slot_ids", Json::Array(s.slot_ids.begin(), s.slot_ids.end())},
                                  {"matcher", "dmm"},
                                  {"decision", "confident"},
                                  {"slots", s.slots},
                                  {"last_frame", last_frame}});
  write_safetensors(path, {{"dmm_fast", session.dump()}}, tensors);
}

Segmenter Segmenter::load(const std::string& path, const std::string& folder, const Options& options) {
  const c10::InferenceMode guard;
  const SafeTensors file = SafeTensors::read(path);
  const auto text = file.metadata.find("dmm_fast");
  if (text == file.metadata.end()) fail(path, ": is no session of dmm_fast");
  const Json session = Json::parse(text->second, path);
  const auto member = [&](const char* name) {
    const Json* found = session.find(name);
    return found ? *found : Json();
  };
  if (member("format") != Json(kFormat))
    fail(path, ": is not a session of format ", kFormat, ", but ", member("format").dump());

  Segmenter result(folder, options);
  Session& s = *result.session_;
  const Manifest& manifest = s.model.manifest();
  if (member("matcher") != Json("dmm") || member("decision") != Json("confident")) {
    fail(path, ": was made with matcher ", member("matcher").dump(), " and decision ", member("decision").dump(),
         "; an exported step has \"dmm\" and \"confident\"");
  }
  if (member("config") != manifest.config) fail(path, ": was made with other settings than those of ", folder);
  if (member("weights") != Json(manifest.weights)) fail(path, ": was made with other weights than those of ", folder);

  const auto take = [&](const std::string& name) {
    const auto found = file.tensors.find(name);
    if (found == file.tensors.end()) fail(path, ": is damaged: ", name, " is missing");
    return tensor_of(found->second, path);
  };
  Tensors state;
  for (size_t k = 0; k < kHidden || file.tensors.count(state_name(k)); ++k) state.push_back(take(state_name(k)));
  at::Tensor frame = checked_frame(take("frame")), ids = take("ids");
  if (ids.scalar_type() != at::kByte || ids.sizes() != frame.sizes().slice(1)) fail(path, ": is damaged: ids unlike the frame");

  const Json slot_list = member("slot_ids");
  const auto* listed = slot_list.get<Json::Array>();
  const at::Tensor& valid = state[kValid];
  const auto damaged = [&] { fail(path, ": is damaged: slots unlike the state's"); };
  if (!listed || listed->size() > kMostObjects || valid.scalar_type() != at::kBool || valid.dim() != 1 ||
      valid.numel() != int64_t(listed->size())) {
    damaged();
  }
  std::vector<int> slot_ids;
  for (const Json& item : *listed) {
    const auto* id = item.get<int64_t>();
    if (!id || *id < 0 || *id > 254 || (*id && std::count(slot_ids.begin(), slot_ids.end(), int(*id)))) damaged();
    if ((*id != 0) != valid[int64_t(slot_ids.size())].item<bool>()) damaged();
    slot_ids.push_back(int(*id));
  }
  // What the network makes of an empty start on this frame has the layout that every state of the session must have.
  const int64_t count = int64_t(slot_ids.size()), slots = s.slots_for(count);
  const Tensors layout =
      s.model.call("start", {frame, at::zeros({slots, ids.size(0), ids.size(1)}, at::kBool), at::zeros({slots}, at::kBool)});
  if (layout.size() != state.size())
    fail(path, ": holds ", state.size(), " tensors of state where the network has ", layout.size());
  for (size_t k = 0; k < state.size(); ++k) {
    const bool rows = state[k].dim() == layout[k].dim() && state[k].size(0) == count;
    if (!rows || state[k].scalar_type() != layout[k].scalar_type() || state[k].sizes().slice(1) != layout[k].sizes().slice(1)) {
      fail(path, ": ", state_name(k), " is ", c10::toString(state[k].scalar_type()), " ", state[k].sizes(),
           ", the network's is ", c10::toString(layout[k].scalar_type()), " ", layout[k].sizes());
    }
    state[k] = state[k].to(s.model.device());
  }
  s.state = grow(std::move(state), slots);
  s.slot_ids = std::move(slot_ids);
  s.slot_ids.resize(slots);
  s.slots = int(std::clamp<int64_t>(integer(session, "slots", 1), 1, kMostObjects));
  s.frame = std::move(frame), s.ids = std::move(ids);
  const Json last = member("last_frame");
  s.last_frame = last.get<std::string>() ? *last.get<std::string>() : "";
  return result;
}

std::vector<int> Segmenter::object_ids() const {
  std::vector<int> result;
  std::copy_if(session_->slot_ids.begin(), session_->slot_ids.end(), std::back_inserter(result),
               [](int id) { return id != 0; });
  std::sort(result.begin(), result.end());
  return result;
}

bool Segmenter::started() const { return !session_->state.empty(); }

const std::string& Segmenter::last_frame() const { return session_->last_frame; }

at::Tensor to_tensor(const Image& image) {
  const at::Tensor rows =
      at::from_blob(const_cast<uint8_t*>(image.pixels.data()), {image.height, image.width, image.channels}, at::kByte);
  return image.channels == 1 ? rows.squeeze(2).clone() : rows.permute({2, 0, 1}).clone(at::MemoryFormat::Contiguous);
}

Proposals to_tensors(const FrameProposals& p) {
  const int64_t count = int64_t(p.scores.size());
  const auto copy = [](const auto& values, at::IntArrayRef shape, at::ScalarType type) {
    return at::from_blob(const_cast<void*>(static_cast<const void*>(values.data())), shape, type).clone();
  };
  return {copy(p.boxes, {count, 4}, at::kFloat), copy(p.scores, {count}, at::kFloat),
          copy(p.runs, {count, count ? int64_t(p.runs.size()) / count : 1}, at::kInt)};
}

}  // namespace dmm
