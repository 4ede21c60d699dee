"""Table 4 of the paper: greedy, Hungarian and the layer on given features, and features tuned through the layer or beside it.

What is tuned is `DMMNet.embed`, a linear map of the features of objects that starts as the identity, or as trained weights have
it. The backbone stays frozen, so that the features of all proposals are computed once and a training step costs milliseconds.
All variants see the same clips in the same order and take the same steps. The first three have the same loss on the cosines too,
and differ in the assignment alone:

detached   the Hungarian assignment of the detached cost: the loss of the matched masks has no gradient
layer      the layer, and of each row its largest entry (Section 4.1)
mixture    the layer, and Eq. 8 with all entries of X, rows scaled to sum 1: every proposal has a gradient
alone      layer or mixture without the loss on the cosines, so that all there is to learn from comes through the layer
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dmm_fast.data.alike import AlikeClips
from dmm_fast.data.clips import Clip, Clips
from dmm_fast.data.datasets import VideoDataset, open_dataset
from dmm_fast.data.paste import PasteClips
from dmm_fast.evaluation import boundary_f, jaccard
from dmm_fast.files import digest, whole_file
from dmm_fast.learning.losses import greedy_target
from dmm_fast.model import Affinity, Config, DMMNet, Proposals, State, load_weights, packaged, read_config, read_weights
from dmm_fast.model.masks import mask_boxes
from dmm_fast.model.network import absent
from dmm_fast.ops import assign, greedy, hungarian
from dmm_fast.proposals.base import suppress
from dmm_fast.training.imagenet import imagenet_weights

from .figures import COLOURS, QUIET, figure

UNTRAINED = ("independent", "greedy", "hungarian", "layer", "rounded", "truth")
DECISIONS = ("layer", "hungarian")  # what was tuned is scored with both
KINDS = {"paste": "pasted", "alike": "alike"}  # of clips, and what the table calls them
SAME = 0.7  # IoU from which on two masks are of one object


class Variant(NamedTuple):
    """How to tune: what assigns, whether masks are Eq. 8 with all entries of X, and the weight of the loss on the cosines."""

    matcher: str
    soft: bool
    cosine: float


TUNED = {
    "tuned detached": Variant("hungarian", False, 1.0),
    "tuned layer": Variant("layer", False, 1.0),
    "tuned mixture": Variant("layer", True, 1.0),
    "tuned layer alone": Variant("layer", False, 0.0),
    "tuned mixture alone": Variant("layer", True, 0.0),
}
LABELS = {
    "truth": "best proposals", "independent": "each its own best", "greedy": "greedy", "hungarian": "Hungarian", "layer": "ours",
    "rounded": "ours, rounded to an assignment",
    "tuned detached": "ours, tuned with it detached", "tuned layer": "ours, tuned through it",
    "tuned mixture": "ours, tuned through it, mixture",
    "tuned layer alone": "ours, tuned through it alone", "tuned mixture alone": "ours, tuned through it alone, mixture",
}  # fmt: skip
INKS = {
    "tuned detached": COLOURS[1], "tuned layer": COLOURS[0], "tuned mixture": COLOURS[2], "tuned layer alone": COLOURS[5],
    "tuned mixture alone": COLOURS[4],
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """data, proposals, layout: as `open_dataset` takes them. held_out: videos that score and are not trained on.

    clips: made training clips, prepared once; val_clips, val_frames: made scoring clips and their length. unroll: matched
    frames after the first of a training clip. short_side, pool, iou_weight: as in `Config`. batch clips a step, `lr` of Adam.

    kind: "paste" puts objects of other videos into a clip (`PasteClips`), "alike" the same one several times, on paths that cross
    (`AlikeClips`, all of them objects); objects: how many, from .. to. copies of the first among them (0: one or two), and the
    chance of `covers`: for "alike".
    suppress: proposals with a higher IoU with a better scored one are left out (1: none are).
    weights: "imagenet", or the network whose backbone and `embed` all start from: "small", in the package, or a file.
    """

    data: str
    proposals: str
    held_out: tuple[str, ...]
    layout: str = "auto"
    backbone: str = "tf_efficientnet_lite0"
    weights: str = "imagenet"
    short_side: int = 128
    pool: str = "box"
    iou_weight: float = 0.3
    kind: str = "paste"
    objects: tuple[int, int] = (1, 4)
    copies: int = 0
    covers: float = 0.5
    suppress: float = 1.0
    clips: int = 64
    val_clips: int = 40
    val_frames: int = 8
    top: int = 50
    unroll: tuple[int, ...] = (2, 3)
    steps: int = 300
    batch: int = 4
    lr: float = 1e-3
    seeds: int = 5

    def __post_init__(self) -> None:
        for name in ("clips", "val_clips", "top", "steps", "batch", "seeds", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"study: {name} must be positive, got {getattr(self, name)}")
        if not self.unroll or min(self.unroll) < 1 or self.val_frames < 2:
            raise ValueError(f"study: need unroll >= 1 and val_frames >= 2, got {self.unroll} and {self.val_frames}")
        if self.kind not in KINDS:
            raise ValueError(f"study: kind must be one of {tuple(KINDS)}, got {self.kind!r}")
        if len(self.objects) != 2:
            raise ValueError(f"study: objects must be two numbers, the fewest and the most, got {self.objects}")
        if not 0 < self.suppress <= 1:
            raise ValueError(f"study: suppress is an IoU above 0, at most 1, got {self.suppress}")
        if not self.held_out:
            raise ValueError("study: held_out must name at least one video to score on")


class Frame(NamedTuple):
    """One frame, ready to be matched."""

    features: Tensor  # [M, C] features of its proposals, before `embed`
    packed: Tensor  # [M, ceil(H W / 8)] uint8, masks of its proposals, a bit for a pixel
    truth: Tensor  # [H, W] uint8, ids


class Track(NamedTuple):
    """A clip, ready to be matched: objects 1 .. N of its first frame."""

    name: str
    templates: Tensor  # [N, C] features, before `embed`
    first: Tensor  # [H, W] uint8, ids
    frames: list[Frame]  # those after the first

    @property
    def objects(self) -> Tensor:
        return torch.arange(1, self.templates.size(0) + 1, dtype=torch.uint8)[:, None, None]  # [N, 1, 1]


# --------------------------------------------------------------------------------------------------------- preparing


@torch.no_grad()
def track(net: DMMNet, clip: Clip, overlap: float = 1.0) -> Track:
    """The features of a clip's templates and proposals by `net`, whose `embed` is the identity; overlap: `suppress` of `Settings`."""
    height, width = clip.masks.shape[2:]
    number = torch.arange(1, clip.masks.size(1) + 1, dtype=torch.uint8)[:, None, None]
    ids = (clip.masks * number).amax(1)  # [T, H, W]; masks of one frame do not overlap
    levels = net.encode(clip.frames[:1])
    templates = net.describe(levels, mask_boxes(clip.masks[0]), clip.masks[0].float(), height, width)
    frames = []
    for frame, proposals, truth in zip(clip.frames[1:], clip.proposals[1:], ids[1:]):
        proposals = distinct(proposals, overlap)
        features = net.describe(net.encode(frame[None]), proposals.boxes, proposals.masks.float(), height, width)
        frames.append(Frame(features, _pack(proposals.masks), truth))
    return Track(clip.name, templates, ids[0], frames)


def distinct(proposals: Proposals, overlap: float) -> Proposals:
    """Without those whose mask has an IoU above `overlap` with the mask of one that is kept and has a higher score."""
    kept = suppress(proposals.masks, proposals.scores, len(proposals.scores), overlap).sort().values
    return Proposals(*(part[kept] for part in proposals))


def _pack(masks: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(masks.flatten(1).numpy(), axis=1))


def sequences(videos: VideoDataset) -> Iterator[Clip]:
    """Whole videos as clips: the objects of the first frame, every annotated frame."""
    for video in videos:
        known = video.annotated
        ids = np.stack([video.ids(i) for i in known])
        numbers = np.setdiff1d(np.unique(ids[0]), [0, 255])
        masks = torch.from_numpy(ids[:, None] == numbers[:, None, None])
        frames = torch.from_numpy(np.stack(video.frames(known))).permute(0, 3, 1, 2)
        yield Clip(frames, masks, [video.proposals(i) for i in known], video.name)


def prepare(settings: Settings, out: Path, progress: bool = True) -> dict[str, list[Track]]:
    """Tracks to train on ("train") and to score on ("pasted", "videos"). Each part is kept in a file in the folder `out`, and
    taken from there if it was made with the same settings."""
    videos = open_dataset(settings.data, settings.layout, proposals=settings.proposals, top=settings.top)
    held = videos.subset(settings.held_out)
    others = videos.subset([name for name in videos.names if name not in settings.held_out])
    if not others.names:
        raise ValueError(f"study: held_out names all {len(held)} videos of {settings.data}; none is left to train on")
    height, width = held.video(held.names[0]).size
    size = (settings.short_side, round(width * settings.short_side / height))
    parts: dict[str, Clips | VideoDataset] = {
        "train": _made(settings, others, 1 + max(settings.unroll), size, length=settings.clips, seed=0),
        "pasted": _made(settings, held, settings.val_frames, size, length=settings.val_clips, seed=1, skips=(1, 3)),
        "videos": held,
    }
    keys = [key for key in asdict(settings) if key not in ("iou_weight", "steps", "batch", "lr", "seeds")]
    wanted = json.dumps({key: getattr(settings, key) for key in keys} | contents(settings))
    return {name: _kept(out / f"{name}.safetensors", wanted, settings, part, progress) for name, part in parts.items()}


def contents(settings: Settings) -> dict[str, str]:
    """What stands in the files that the settings name, by digest."""
    weights = [] if settings.weights == "imagenet" else [_file(settings)]
    return {
        "proposals' contents": digest(*sorted(Path(settings.proposals).glob("*.json"))), "weights' contents": digest(*weights)
    }  # fmt: skip


def _made(settings: Settings, videos: VideoDataset, frames: int, size: tuple[int, int], **options: Any) -> Clips:
    options |= {"size": size, "top": settings.top}
    if settings.kind == "paste":
        return PasteClips(videos, frames, pasted=settings.objects, **options)
    options |= {"twins": 1.0, "crossings": 1.0, "strangers": 0.0, "copies": settings.copies, "covers": settings.covers}
    return AlikeClips(videos, frames, layers=settings.objects, **options)


def _kept(path: Path, wanted: str, settings: Settings, part: Clips | VideoDataset, progress: bool) -> list[Track]:
    if path.is_file():
        with safe_open(path, "pt") as file:
            if file.metadata()["settings"] == wanted:
                return _unflatten(json.loads(file.metadata()["tracks"]), file.get_tensor)
    net = frozen_net(settings)
    clips = sequences(part) if isinstance(part, VideoDataset) else (part[i] for i in range(len(part)))
    tracks = [
        track(net, clip, settings.suppress) for clip in tqdm(clips, path.stem, len(part), unit=" clips", disable=not progress)
    ]
    described = [(one.name, len(one.frames)) for one in tracks]
    with whole_file(path) as temporary:
        save_file(_flatten(tracks), temporary, {"settings": wanted, "tracks": json.dumps(described)})
    return tracks


def _flatten(tracks: list[Track]) -> dict[str, Tensor]:
    """The tensors of tracks by number/field and number/frame/field."""
    tensors: dict[str, Tensor] = {}
    for i, one in enumerate(tracks):
        tensors |= {f"{i}/templates": one.templates, f"{i}/first": one.first}
        for k, frame in enumerate(one.frames):
            tensors |= {f"{i}/{k}/{name}": tensor for name, tensor in frame._asdict().items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _unflatten(described: list[tuple[str, int]], tensor: Any) -> list[Track]:
    tracks = []
    for i, (name, length) in enumerate(described):
        frames = [Frame(*(tensor(f"{i}/{k}/{field}") for field in Frame._fields)) for k in range(length)]
        tracks.append(Track(name, tensor(f"{i}/templates"), tensor(f"{i}/first"), frames))
    return tracks


def frozen_net(settings: Settings) -> DMMNet:
    """The network of the study without `embed`."""
    config = Config(
        backbone=settings.backbone, short_side=settings.short_side, pool=settings.pool, iou_weight=settings.iou_weight
    )
    if settings.weights == "imagenet":
        tensors = imagenet_weights(settings.backbone)
    else:
        config = replace(config, min_cosine=read_config(_file(settings)).min_cosine)
        tensors = {
            name.removeprefix("backbone."): tensor
            for name, tensor in read_weights(_file(settings)).items()
            if name.startswith("backbone.")
        }
    net = DMMNet(config).eval()
    load_weights(net.backbone, tensors, settings.weights)
    return net


def first_embed(settings: Settings, width: int) -> nn.Linear:
    """`embed` before it is tuned, for features of `width` dimensions: that of the weights, else the identity."""
    if settings.weights == "imagenet":
        weight = torch.eye(width)
    else:
        weight = read_weights(_file(settings)).get("embed.weight", torch.eye(width))
    embed = nn.Linear(width, len(weight), bias=False)
    embed.load_state_dict({"weight": weight})
    return embed


def _file(settings: Settings) -> Path:
    return packaged("small") if settings.weights == "small" else Path(settings.weights)


# ---------------------------------------------------------------------------------------------------------- matching

Source = tuple[int, int]  # a mask: (frame, proposal), or (-1, object) for a template


class Counts(NamedTuple):
    """What the losses of a frame need to know of its pixels."""

    both: Tensor  # [N, M] float, pixels of true masks and proposals in common
    area: Tensor  # [M]
    true_area: Tensor  # [N], 0 where the object is hidden
    target: Tensor  # [N, M], the greedy assignment by IoU with the truth
    iou: Tensor  # [N, M] of true masks and proposals


class Masks:
    """The masks of a track, unpacked when asked for; what was computed from them is kept, as all variants ask the same."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self._rows: dict[tuple[Source, int], Tensor] = {}
        self._counts: dict[int, Counts] = {}
        self._scores: dict[tuple[Source, int, int], tuple[float, float]] = {}

    def of(self, k: int) -> Tensor:
        """Proposals of frame k, or the templates for k = -1: [M, H, W] bool."""
        if k < 0:
            return self.track.first == self.track.objects
        frame = self.track.frames[k]
        bits = np.unpackbits(frame.packed.numpy(), axis=1, count=frame.truth.numel())
        return torch.from_numpy(bits).view(torch.bool).view(-1, *frame.truth.shape)

    def true(self, k: int) -> Tensor:
        return self.track.frames[k].truth == self.track.objects  # [N, H, W]

    def iou(self, source: Source, k: int) -> Tensor:
        """IoU of a mask with the proposals of frame k: [M]."""
        if (source, k) not in self._rows:
            mask = self.of(source[0])[source[1]]
            self._rows[source, k] = torch.ops.dmm.mask_iou(mask[None], self.of(k))[0]
        return self._rows[source, k]

    def counts(self, k: int) -> Counts:
        if k not in self._counts:
            masks, true = self.of(k), self.true(k)
            iou = torch.ops.dmm.mask_iou(true, masks)  # [N, M]
            area, true_area = (part.flatten(1).sum(1).float() for part in (masks, true))
            both = iou / (1 + iou) * (true_area[:, None] + area)
            target = greedy_target(masks.float(), true.float())
            self._counts[k] = Counts(both, area, true_area, target, iou)
        return self._counts[k]

    def score(self, source: Source, k: int, number: int) -> tuple[float, float]:
        """J and F of a mask as object `number` (from 0) of frame k."""
        key = (source, k, number)
        if key not in self._scores:
            mask, true = self.of(source[0])[source[1]].numpy(), self.true(k)[number].numpy()
            self._scores[key] = jaccard(mask, true), boundary_f(mask, true)
        return self._scores[key]


class Match(NamedTuple):
    """One matched frame, number `k`."""

    k: int
    x: Tensor  # [N, >= M] the assignment
    cosine: Tensor  # [N, M]
    weight: Tensor  # [N], 1 with the gradient of X's entry: what Eq. 8 multiplies the matched mask by
    proposal: Tensor  # [N] int64, -1 where lost
    sources: list[Source]  # N of them, each object's mask: its proposal, or the last one where it is lost

    def rivals(self, masks: Masks, least: float | None = None) -> set[int]:
        """The objects that have another's proposal; or with `least` one whose mask has at least this IoU with another's."""
        found = [i for i, (k, _) in enumerate(self.sources) if k == self.k]
        pairs = [(i, j) for i in found for j in found if i != j]
        if least is None:
            return {i for i, j in pairs if self.sources[i] == self.sources[j]}
        return {i for i, j in pairs if masks.iou(self.sources[i], self.k)[self.sources[j][1]] >= least}


def unroll(net: DMMNet, embed: nn.Module, masks: Masks, matcher: str, length: int | None = None) -> Iterator[Match]:
    """Match `length` frames after the first, or all.

    matcher: "layer", "greedy" or "hungarian"; "rounded": the layer, and `assign` in place of each row's largest entry;
    "independent": each object takes the best, whatever others take; or "truth", the best that any could do: by the IoU with the
    true masks.
    """
    track = masks.track
    n = len(track.templates)
    sources: list[Source] = [(-1, i) for i in range(n)]
    # The decision does not look at pixels but for the IoU, which is given: masks of one pixel stand for the real ones.
    pixel = torch.ones(n, 1, 1)
    state = State(torch.ones(n, dtype=torch.bool), embed(track.templates), pixel, pixel, torch.zeros(n, 2), pixel > 0, [])
    for k, frame in enumerate(track.frames[:length]):
        m = len(frame.features)
        if m == 0:
            proposals, features, iou = absent(pixel), frame.features.new_zeros(1, frame.features.size(1)), torch.zeros(n, 1)
        else:
            proposals = Proposals(torch.zeros(m, 4), torch.zeros(m), torch.ones(m, 1, 1, dtype=torch.bool))
            features, iou = frame.features, torch.stack([masks.iou(source, k) for source in sources])
        features = F.normalize(embed(features), dim=1)
        cosine = F.normalize(state.features, dim=1) @ features.t()  # [N, M]
        affinity, candidates = Affinity(cosine, iou, features), net.prepare(proposals, state, 1, 1)
        cost = net.cost(affinity)
        if matcher in ("layer", "rounded"):
            x = net.match(cost, proposals.scores, state.valid)
            if matcher == "rounded":
                chosen = assign(x)
                x = F.one_hot(chosen.clamp(min=0), x.size(1)) * (chosen >= 0)[:, None].to(x.dtype)
        elif matcher == "truth":
            x = F.pad(hungarian(-masks.counts(k).iou), [0, n])
        else:  # as in the layer, nothing is an option, at cost 0
            x = {"independent": _cheapest, "greedy": greedy, "hungarian": hungarian}[matcher](F.pad(cost.detach(), [0, n]))
        output, _ = net.decide([], candidates, affinity, x, state)
        found = output.proposal.tolist()
        sources = [(k, j) if j >= 0 else last for j, last in zip(found, sources)]
        yield Match(k, x, cosine, output.matched[:, 0, 0], output.proposal, sources)


def _cheapest(cost: Tensor) -> Tensor:
    return F.one_hot(cost.argmin(1), cost.size(1)).to(cost.dtype)


def losses(match: Match, counts: Counts, soft: bool) -> Tensor:
    """1 - soft IoU of the matched masks, and the squared difference of the cosines to the greedy assignment: [2].

    soft: masks are Eq. 8 with all entries of X, rows scaled to sum 1, not the largest alone. A mask is a weighted sum of
    proposals, so its pixels in common with the truth are the weighted sum of theirs: no pixels are needed.
    """
    m = len(counts.area)
    if m == 0:
        return torch.zeros(2)
    if soft:
        share = match.x[:, :m] / match.x.sum(1, keepdim=True).clamp(min=1e-6)
    else:
        chosen = F.one_hot(match.proposal.clamp(min=0), m) * (match.proposal >= 0)[:, None]
        share = chosen * match.weight[:, None]  # [N, M]
    both, area = (share * counts.both).sum(1), share @ counts.area  # [N]
    iou = both / (area + counts.true_area - both).clamp(min=1e-6)
    seen = counts.true_area > 0
    matched = ((1 - iou) * seen).sum() / seen.sum().clamp(min=1)
    return torch.stack([matched, F.mse_loss(match.cosine, counts.target)])


def tune(
    net: DMMNet, several: list[Masks], variant: Variant, length: int, seed: int, settings: Settings
) -> tuple[nn.Linear, list[list[float]]]:
    """Train `embed` from what it is at first; returns it and the two losses of each step."""
    embed = first_embed(settings, several[0].track.templates.size(1))
    optimizer = torch.optim.Adam(embed.parameters(), settings.lr)
    weights = torch.tensor([1.0, variant.cosine])
    order = np.random.default_rng(seed).integers(len(several), size=(settings.steps, settings.batch))
    curve = []
    for chosen in order.tolist():
        terms = [
            losses(match, several[i].counts(match.k), variant.soft)
            for i in chosen
            for match in unroll(net, embed, several[i], variant.matcher, length)
        ]
        mean = torch.stack(terms).mean(0)  # [2]
        optimizer.zero_grad()
        (weights * mean).sum().backward()
        optimizer.step()
        curve.append(mean.tolist())
    return embed, curve


Object = tuple[int, int]  # (frame, object), both from 0


class Scores(NamedTuple):
    """What `score` finds."""

    objects: list[tuple[float, float]]  # J and F of every object of every clip, means over the frames that show it
    shared: float  # share of the objects' frames in which another object has the same proposal
    doubled: float  # in which another object's mask is the same or nearly (`SAME`)
    contested: float  # J in the frames that were named, nan without any


@torch.no_grad()
def score(
    net: DMMNet, embed: nn.Module, several: list[Masks], matcher: str, inner: bool = False,
    contested: list[set[Object]] | None = None,
) -> Scores:  # fmt: skip
    """J and F of the matched masks.

    inner: without the last frame, as DAVIS scores whole videos. contested: for each clip the frames that get a score of their own.
    """
    objects, shared, doubled, there = [], [], [], []
    for number, masks in enumerate(several):
        last = len(masks.track.frames) - inner
        own: list[list[tuple[float, float]]] = [[] for _ in masks.track.templates]
        for match in unroll(net, embed, masks, matcher, last):
            twice, nearly = match.rivals(masks), match.rivals(masks, SAME)
            for i in masks.counts(match.k).true_area.nonzero()[:, 0].tolist():
                own[i].append(masks.score(match.sources[i], match.k, i))
                shared.append(i in twice)
                doubled.append(i in nearly)
                if contested and (match.k, i) in contested[number]:
                    there.append(own[i][-1][0])
        objects += [tuple(np.mean(frames, 0).tolist()) for frames in own if frames]
    mean = float(np.mean(there)) if there else float("nan")
    return Scores(objects, float(np.mean(shared)), float(np.mean(doubled)), mean)


@torch.no_grad()
def contests(net: DMMNet, embed: nn.Module, masks: Masks) -> set[Object]:
    """The frames of a clip's objects in which two would take the same proposal if each took the best."""
    return {(match.k, i) for match in unroll(net, embed, masks, "independent") for i in match.rivals(masks)}


# --------------------------------------------------------------------------------------------------------- the study


def study(settings: Settings, out: Path, progress: bool = True) -> dict[str, Any]:
    """Every variant and seed, and `matching.json` in the folder `out`; an interrupted study goes on where it was. The file may hold
    more seeds than the settings ask for. ValueError where it is of other settings."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "matching.json"
    kept = _goes_on(path, {"settings": json.loads(json.dumps(asdict(settings))), "contents": contents(settings), "rows": []})
    tracks = {part: [Masks(one) for one in several] for part, several in prepare(settings, out, progress).items()}
    net = frozen_net(settings)
    untrained = first_embed(settings, tracks["train"][0].track.templates.size(1))
    contested = [contests(net, untrained, masks) for masks in tracks["pasted"]]
    done = {(row["name"], row["unroll"], row["seed"]) for row in kept["rows"]}
    jobs = [(name, 0, 0) for name in UNTRAINED]
    jobs += [(name, length, seed) for seed in range(settings.seeds) for length, name in _variants(settings)]
    for name, length, seed in tqdm([job for job in jobs if job not in done], "variants", unit=" runs", disable=not progress):
        embed = untrained
        curve: list[list[float]] = []
        if length:
            embed, curve = tune(net, tracks["train"], TUNED[name], length, seed, settings)
        for matcher in DECISIONS if length else (name,):
            row = {"name": name, "unroll": length, "seed": seed, "decide": matcher, "curve": _means(curve)}
            pasted = score(net, embed, tracks["pasted"], matcher, contested=contested)
            videos = score(net, embed, tracks["videos"], matcher, True)
            row |= {"pasted": _short(pasted.objects), "videos": _short(videos.objects)}
            kept["rows"].append(row | {"pairs": _short([pasted.shared, pasted.doubled, pasted.contested])})
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(kept) + "\n")
    return kept | {"rows": [row for row in kept["rows"] if row["seed"] < settings.seeds]}


def _goes_on(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """`fresh`, with the rows of an earlier call if it was of the same settings: more or fewer seeds may be asked for."""
    if path.is_file():
        before = json.loads(path.read_text())
        mine, theirs = ({**result["settings"], **result.get("contents", {})} for result in (fresh, before))
        if other := [key for key in mine | theirs if key != "seeds" and mine.get(key) != theirs.get(key)]:
            raise ValueError(
                f"study: {path} has rows of other settings ({', '.join(other)}); choose another --out, or delete it"
            )
        fresh["rows"] = before["rows"]
        fresh["settings"]["seeds"] = max(mine["seeds"], theirs["seeds"])
    return fresh


def _variants(settings: Settings) -> list[tuple[int, str]]:
    """What is tuned: each with the first unroll, and through the layer with the others too."""
    return [(settings.unroll[0], name) for name in TUNED] + [(length, "tuned layer") for length in settings.unroll[1:]]


def _short(values: Any) -> Any:
    return np.round(values, 4).tolist()


def _means(curve: list[list[float]], width: int = 25) -> list[list[float]]:
    """Means over stretches of so many steps."""
    return [np.mean(curve[i : i + width], 0).round(4).tolist() for i in range(0, len(curve), width)]


class Row(NamedTuple):
    """A line of the table: one variant over its seeds."""

    name: str
    unroll: int
    decide: str
    scores: dict[str, np.ndarray]  # by part: [seeds, objects, 2], J and F
    pairs: np.ndarray  # [seeds, 3], as in `Scores`: shared, doubled, contested

    @property
    def label(self) -> str:
        if not self.unroll:
            return LABELS[self.name]
        return LABELS[self.name] + f", unroll {self.unroll}" + (", decided by Hungarian" if self.decide == "hungarian" else "")


def rows(result: dict[str, Any]) -> list[Row]:
    """In the order of the table."""
    order = [*UNTRAINED[:-1], *TUNED, UNTRAINED[-1]]
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["name"], row["unroll"], row["decide"]), []).append(row)
    return [
        Row(
            name,
            length,
            decide,
            {part: np.array([row[part] for row in several]) for part in ("pasted", "videos")},
            np.array([row["pairs"] for row in several]),
        )
        for (name, length, decide), several in sorted(found.items(), key=lambda item: order.index(item[0][0]))
    ]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [K] and its standard error, nan for one value."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def differences(result: dict[str, Any], part: str) -> list[tuple[str, float, float, float]]:
    """J of what was tuned through the layer less J of what was tuned beside it, with the same seed and clips; and without tuning, J of
    every matcher less J of each its own best: label, mean, its standard error over seeds, and over objects."""
    lines = rows(result)
    scores = {(row.name, row.decide): row.scores[part][..., 0] for row in lines}  # [seeds, objects]
    found = []
    for row in lines:
        base = scores.get(("tuned detached", row.decide) if row.unroll else ("independent", "independent"))
        if base is None or row.name in ("tuned detached", "independent", "truth"):
            continue
        gain = row.scores[part][..., 0][: len(base)] - base[: len(row.scores[part])]
        found.append((row.label, float(gain.mean()), mean_and_error(gain.mean(1))[1], mean_and_error(gain.mean(0))[1]))
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown tables: J and F of every variant, the paired differences, and how often two objects had one proposal."""
    kind = KINDS[result["settings"]["kind"]]
    lines = [f"| matching | {kind} clips J | F | whole videos J | F |", "|---|---|---|---|---|"]
    for row in rows(result):
        means = [part for name in ("pasted", "videos") for part in row.scores[name].mean(1).T]  # each [seeds], J and F of both
        lines.append(_line(row.label, means))
    lines += [
        "",
        "| J less that of each its own best; tuned: less that of the detached | clips | mean | s.e. over seeds | objects |",
    ]
    lines += ["|---|---|---|---|---|"]
    for part, title in (("pasted", kind), ("videos", "videos")):
        for label, mean, seeds, objects in differences(result, part):
            lines.append(
                f"| {label} | {title} | {mean:+.4f} | " + (f"{seeds:.4f}" if np.isfinite(seeds) else "") + f" | {objects:.4f} |"
            )
    lines += ["", f"| {kind} clips | one proposal for two | one object for two | J where each would take the same |"]
    lines += ["|---|---|---|---|"]
    lines += [_line(row.label, list(row.pairs.T)) for row in rows(result)]
    return "\n".join(lines)


def _line(label: str, columns: list[np.ndarray]) -> str:
    """A line of a table with the mean of each column's values, and its standard error where there are several."""
    cells = [label]
    for mean, error in map(mean_and_error, columns):
        cells.append(f"{mean:.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else ""))
    return "| " + " | ".join(cells) + " |"


def draw(result: dict[str, Any], path: Path) -> None:
    """A dot for each seed, a bar for their mean; without the best proposals, which are far to the right."""
    lines = [row for row in rows(result)[::-1] if row.name != "truth"]
    kind = KINDS[result["settings"]["kind"]]
    titles = {"pasted": f"Clips with several {kind} objects", "videos": "Whole videos, one object"}
    with figure(path, 1, 2, 10, 3.6) as panels:
        for axes, (part, title) in zip(panels, titles.items()):
            for y, row in enumerate(lines):
                colour, values = INKS.get(row.name, QUIET), row.scores[part][..., 0].mean(1)
                if row.unroll:
                    axes.plot(values, np.full(len(values), y), "o", color=colour, alpha=0.45, markersize=5, markeredgewidth=0)
                axes.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2.2)
            axes.set(title=title, xlabel="J of the matched masks", ylim=(-0.6, len(lines) - 0.4))
            axes.set_yticks(range(len(lines)), [row.label for row in lines] if part == "pasted" else [""] * len(lines))
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
