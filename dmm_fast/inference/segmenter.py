"""The streaming API: first masks in, then one frame at a time; memory does not depend on the video's length."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmm_fast.inference.graph import Graph, GraphStep, pad
from dmm_fast.model import (
    PACKAGED,
    Config,
    DMMNet,
    Output,
    Proposals,
    State,
    digest,
    inference,
    load_weights,
    packaged,
    read_config,
    read_weights,
    save_weights,
)
from dmm_fast.model.state import grow
from dmm_fast.model.weights import write_tensors
from dmm_fast.ops import assign, greedy, hungarian
from dmm_fast.ops.device import open_device
from dmm_fast.proposals.base import checked, real
from dmm_fast.proposals.live import Live, shares_backbone
from dmm_fast.proposals.traceable import ProposalNetwork

MATCHERS = ("dmm", "greedy", "hungarian")
DECISIONS = ("confident", "assign")
PRECISIONS = ("float32", "bfloat16")
FORMAT = 3  # of saved sessions

Frame = np.ndarray | Tensor
Masks = np.ndarray | Tensor | Mapping[int, Any]
Proposer = Callable[[Frame], Proposals]


@dataclass(frozen=True)
class ObjectResult:
    """What happened to one object in one frame."""

    id: int
    proposal: int | None  # index of the matched proposal; None if given by the user, or lost
    score: float  # minus the cost of the match (Eq. 1), at most 1; 0 where lost
    runner_up: float  # the same for the best other proposal, 0 where there is none
    lost: bool  # nothing matched: the object keeps its last mask


@dataclass(frozen=True)
class FrameResult:
    """A frame's masks as one id per pixel, and what happened to each object."""

    ids: np.ndarray  # [H, W] uint8, 0 is background
    objects: list[ObjectResult]


class Segmenter:
    """Follows objects through a video, given their first masks and mask proposals for every frame.

    config: a `Config`, a preset's name, or None: that of the weights, "small" if those are not given either.
    weights: a safetensors file of this project; "imagenet" (the backbone's alone, from timm: no refinement); or None: the
    weights in the package for the presets "small" and "detail", none at all without a backbone (the preset "iou").
    short_side: frames enter the network with a short side of so many pixels, in place of the config's; smaller ones are enlarged.
    refine: "none", "light" or "heavy" in place of the config's; "none" leaves the matched proposals as they are.
    matcher: "dmm", or "greedy" or "hungarian" on the same cost, to compare with.
    decision: how the assignment becomes a choice: "confident" takes each row's largest entry (Section 4.1, and what
    an exported step does); "assign" rounds the assignment with the Hungarian algorithm, so that no two objects take
    the same proposal.
    slots: object slots to start with; more are added when needed.
    graph: run the step as a CUDA graph (`dmm_fast.inference.graph`), several times as fast: None where that is possible (on a GPU, with
    the matcher "dmm" and the decision "confident"), True to insist, False never. Proposals are padded to the config's `top`
    and slots to a power of two; only more slots, another frame size or another kind of proposal masks capture again.
    precision: "bfloat16" for the backbone, the decoder of a heavy refinement, and the convolutions of a detector that joins the step: faster
    on a CPU that has it (AVX-512 BF16, AMX), with masks that differ a little. Matching stays in float32.
    proposer: called with the frame when `step` gets no proposals. A `dmm_fast.proposals.detector.Detector` on the same device joins
    the step: a backbone that both have runs once, and a graph holds both.

    A call that raises leaves the session as it was. For several videos at once see `another`.
    """

    def __init__(
        self,
        config: Config | str | None = None,
        *,
        weights: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        short_side: int | None = None,
        refine: str | None = None,
        proposer: Proposer | None = None,
        matcher: str = "dmm",
        decision: str = "confident",
        slots: int = 1,
        graph: bool | None = None,
        precision: str = "float32",
    ) -> None:
        resolved, weights = _resolve(config, weights, refine, short_side)
        choices = (("matcher", matcher, MATCHERS), ("decision", decision, DECISIONS), ("precision", precision, PRECISIONS))
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"Segmenter: {name} must be one of {allowed}, got {value!r}")
        if not 1 <= slots <= 255:
            raise ValueError(f"Segmenter: slots must be in 1..255, got {slots}")
        self.config, self.matcher, self.decision, self.slots = resolved, matcher, decision, slots
        self.device = open_device(device)
        self.proposer = proposer
        self.graph = graph_wanted(graph, self.device, matcher, decision)
        self.net = _build(resolved, weights).to(self.device).eval()
        self.precision = precision
        self.note = _note(resolved, weights)
        self._shared = False  # whether another session has the same network
        self._make_ready()
        self._forget()

    def _make_ready(self) -> None:
        """What runs, made from what may have learnt."""
        self._inference = inference(self.net, getattr(torch, self.precision))
        self._make_steps()

    def _make_steps(self) -> None:
        self._graph_step = GraphStep(self._inference, self.config.top) if self.graph else None
        self._live = self._joined(self.proposer)

    def _forget(self) -> None:
        self._state: State | None = None
        self._slot_ids: list[int] = []  # by slot, 0 where free
        self._frame = torch.empty(0)
        self._ids = np.empty((0, 0), np.uint8)

    def another(self) -> Segmenter:
        """A new session over the same network and proposer, for one more video at once; weights are in memory once, but for
        a detector's in bfloat16.

        Sessions do not touch each other: use them in turns, or each in a thread of its own. On a GPU they work at the same time if every
        thread has its own stream, ``with torch.cuda.stream(torch.cuda.Stream()): ...``. One that learns (`tune`) goes on with a network
        of its own.
        """
        session = copy.copy(self)
        self._shared = session._shared = True
        session._make_steps()
        session._forget()
        return session

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self._frame.size(1), self._frame.size(2)

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects being followed, ascending."""
        return sorted(i for i in self._slot_ids if i)

    def tune(self, frame: Frame, masks: Masks, proposals: Proposals | None = None, **budget: Any) -> int:
        """Online learning: fit the network to a first frame with its masks, then call `start`; returns the steps taken.

        budget: seconds=30 or epochs=20, and further settings of `dmm_fast.learning.online.tune`.
        """
        from dmm_fast.learning.online import tune  # training is not needed otherwise

        frame = _frame(frame, None)
        size = (frame.size(1), frame.size(2))
        ids, masks = _masks(masks, size)
        if not ids:
            raise ValueError("Segmenter.tune: no object in the masks")
        if proposals is not None:
            proposals, _ = _proposals(proposals, size, self.config.top, self.device)
        self.__dict__.pop("_digest", None)
        if self._shared:
            self.net, self._shared = copy.deepcopy(self.net), False
        steps = tune(self.net, frame.to(self.device), masks.to(self.device), proposals, **budget)
        self._make_ready()
        return steps

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write the network's weights, as after `tune`, to a file that `Segmenter(weights=path)` takes."""
        save_weights(self.net, path, {"format": 1, "config": self.config.to_dict()})

    @torch.no_grad()
    def start(self, frame: Frame, masks: Masks) -> FrameResult:
        """Begin with a frame and its objects; forgets any earlier session.

        frame: [H, W, 3] uint8 RGB array, or [3, H, W] uint8 tensor. masks: [H, W] ids (0 is background), {id: [H, W]
        bool}, or [N, H, W] bool for ids 1..N.
        """
        frame = _frame(frame, None)
        ids, masks = _masks(masks, (frame.size(1), frame.size(2)))
        if not ids:
            raise ValueError("Segmenter.start: no object in the masks")
        slots = self._room(max(self.slots, len(ids)))
        full = torch.zeros((slots, *masks.shape[1:]), dtype=torch.bool, device=self.device)
        full[: len(ids)] = masks.to(self.device)
        valid = torch.arange(slots, device=self.device) < len(ids)
        frame = frame.to(self.device)
        state = self._inference.start(frame, full, valid)
        self._state, self._frame = state, frame
        self._slot_ids = ids + [0] * (slots - len(ids))
        self._ids = _paint(np.zeros(masks.shape[1:], np.uint8), ids, masks)
        return FrameResult(self._ids.copy(), _given(ids))

    @torch.no_grad()
    def step(self, frame: Frame, proposals: Proposals | None = None) -> FrameResult:
        """Find the objects in the next frame, among `proposals` or those of the proposer."""
        state = self._started("step")
        size = self._size
        tensor = _frame(frame, size)
        if proposals is None and self._live is not None:
            tensor = self._on_device(tensor)
            found, output, state = self._live(tensor, state)
            kept = list(range(found.scores.numel()))
        else:
            if proposals is None:
                if self.proposer is None:
                    raise ValueError("Segmenter.step: give proposals, or a proposer when making the Segmenter")
                proposals = self.proposer(frame)
            proposals, kept = _proposals(proposals, size, self.config.top, self.device)
            tensor = self._on_device(tensor)
            output, state = self._advance(tensor, proposals, state)

        table = np.array([0, *self._slot_ids], np.uint8)
        ids = table[output.labels.cpu().numpy()]
        # One array of one dtype, so that a GPU is waited for once.
        columns = torch.stack([output.proposal.double(), output.score, output.runner_up, output.lost]).tolist()
        objects = [
            ObjectResult(i, None if lost else kept[int(proposal)], score, runner_up, bool(lost))
            for i, proposal, score, runner_up, lost in zip(self._slot_ids, *columns)
            if i
        ]
        self._state, self._frame, self._ids = state, tensor, ids
        return FrameResult(ids.copy(), sorted(objects, key=lambda o: o.id))

    @torch.no_grad()
    def propose(self, frame: Frame) -> Proposals:
        """What `step(frame)` would choose from: the proposals of the proposer, best first. The session stays as it is."""
        if self.proposer is None:
            raise ValueError("Segmenter.propose: give a proposer when making the Segmenter")
        if self._live is None:
            return self.proposer(frame)
        live: Any = self._live.function if isinstance(self._live, Graph) else self._live
        tensor = self._on_device(_frame(frame, None))
        return real(*live.propose(tensor, live.net.encode(tensor[None])))

    def _advance(self, frame: Tensor, proposals: Proposals, state: State) -> tuple[Output, State]:
        """The device's part of a step."""
        if self._graph_step is not None:
            return self._graph_step(frame, proposals, state)
        net = self._inference
        if (self.matcher, self.decision) == ("dmm", "confident"):
            return net.step(frame, proposals, state)
        features = net.encode(frame[None])
        candidates = net.prepare(proposals, state, *self._size)
        affinity = net.compare(features, candidates, state)
        assignment = self._assignment(net.cost(affinity), candidates.scores, state.valid)
        return net.decide(features, candidates, affinity, assignment, state)

    def _on_device(self, frame: Tensor) -> Tensor:
        """The frame where the network is; to a GPU without waiting for the copy."""
        if self.device.type == "cuda" and not frame.is_cuda:
            return frame.contiguous().pin_memory().to(self.device, non_blocking=True)
        return frame.to(self.device)

    def _joined(self, proposer: Proposer | None) -> Callable[[Tensor, State], tuple[Proposals, Output, State]] | None:
        """Proposals and step in one, where `proposer` is a detector that can join."""
        network = getattr(proposer, "network", None)
        plain = (self.matcher, self.decision) == ("dmm", "confident")
        if (
            not isinstance(network, ProposalNetwork)
            or not plain
            or network.top > self.config.top
            or network.mean.device != self.net.mean.device
        ):
            return None
        network = network.in_precision(getattr(torch, self.precision))
        live = Live(self._inference, network, shares_backbone(self.net, proposer)).eval()
        return Graph(live, self._inference) if self.graph else live

    def _room(self, objects: int) -> int:
        """Slots for so many objects: with a graph a power of two, so that it is seldom captured again."""
        return min(255, 1 << (objects - 1).bit_length()) if self.graph else objects

    @torch.no_grad()
    def add(self, masks: Masks) -> FrameResult:
        """Follow further objects, given by their masks in the last frame; they are drawn over that frame's result."""
        state = self._started("add")
        ids, masks = _masks(masks, self._size)
        known = sorted(set(ids) & set(self._slot_ids))
        if known:
            raise ValueError(f"Segmenter.add: objects {known} are followed already; drop them first")
        slot_ids = list(self._slot_ids)
        objects = len(self.object_ids) + len(ids)
        if objects > 255:
            raise ValueError(f"Segmenter.add: at most 255 objects, got {objects}")
        if objects > len(slot_ids):
            slot_ids += [0] * (self._room(objects) - len(slot_ids))
        state = grow(state, len(slot_ids))
        free = [slot for slot, i in enumerate(slot_ids) if i == 0][: len(ids)]
        full = torch.zeros((len(slot_ids), *self._size), dtype=torch.bool, device=self.device)
        new = torch.zeros_like(state.valid)
        full[free], new[free] = masks.to(self.device), True
        for slot, i in zip(free, ids):
            slot_ids[slot] = i
        state = self._inference.add(self._frame, full, new, state)
        self._state, self._slot_ids = state, slot_ids
        self._ids = _paint(self._ids.copy(), ids, masks)
        return FrameResult(self._ids.copy(), _given(ids))

    @torch.no_grad()
    def drop(self, ids: int | list[int]) -> None:
        """Follow these objects no longer; their slots are free for others."""
        state = self._started("drop")
        ids = [int(i) for i in (ids if isinstance(ids, Iterable) else [ids])]
        unknown = [i for i in ids if i not in self.object_ids]
        if unknown:
            raise ValueError(f"Segmenter.drop: objects {unknown} are not followed; those are {self.object_ids}")
        gone = torch.tensor([i in ids for i in self._slot_ids], device=self.device)
        self._state = self.net.drop(gone, state)
        self._slot_ids = [0 if i in ids else i for i in self._slot_ids]
        self._ids = np.where(np.isin(self._ids, ids), 0, self._ids)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a safetensors file, whole or not at all. The network's weights are not in it."""
        state = self._started("save")
        tensors = {f"state.{name}": tensor for name, tensor in zip(State._fields[:-1], state)}
        tensors |= {f"state.hidden.{k}": tensor for k, tensor in enumerate(state.hidden)}
        tensors |= {"frame": self._frame, "ids": torch.from_numpy(self._ids)}
        session = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "weights": self._digest,
            "slot_ids": self._slot_ids,
            "matcher": self.matcher,
            "decision": self.decision,
            "slots": self.slots,
        }
        write_tensors(path, tensors, session)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        weights: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        proposer: Proposer | None = None,
        graph: bool | None = None,
        precision: str = "float32",
    ) -> Segmenter:
        """Go on from a file written by `save`, with the same `weights`; results are those without the break."""
        session, state, frame, ids = _read_session(path)
        config = Config.from_dict(session["config"])
        if weights is None and config.backbone == Config.preset("small").backbone:
            files = map(packaged, PACKAGED)  # of which one may have the session's weights
            weights = next((file for file in files if digest(_build(config, file)) == session["weights"]), packaged("small"))
        segmenter = cls(
            config,
            weights=weights,
            device=device,
            proposer=proposer,
            matcher=session["matcher"],
            decision=session["decision"],
            slots=session["slots"],
            graph=graph,
            precision=precision,
        )
        segmenter._take(path, session, state, frame, ids, weights)
        return segmenter

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file that a session with the same settings and weights has written by `save`."""
        session, state, frame, ids = _read_session(path)
        mine = (self.config, self.matcher, self.decision)
        if (Config.from_dict(session["config"]), session["matcher"], session["decision"]) != mine:
            raise ValueError(f"Segmenter.restore: {path} was written with other settings")
        self._take(path, session, state, frame, ids, "these")

    def _take(self, path: Any, session: dict, state: State, frame: Tensor, ids: Tensor, weights: Any) -> None:
        if self._digest != session["weights"]:
            raise ValueError(f"Segmenter.load: {path} was written with other weights than {weights!r}")
        hidden = [h.to(self.device) for h in state.hidden]
        self._state = State(*(tensor.to(self.device) for tensor in state[:-1]), hidden)
        self._slot_ids = session["slot_ids"]
        self._frame, self._ids = frame.to(self.device), ids.numpy()

    @cached_property
    def _digest(self) -> str:
        return digest(self.net)

    def _started(self, name: str) -> State:
        if self._state is None:
            raise RuntimeError(f"Segmenter.{name}: call start first")
        return self._state

    def _assignment(self, cost: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """X [N, >= M] by the chosen matcher and decision."""
        if self.matcher == "dmm":
            x = self.net.match(cost, scores, valid)
        else:
            x = torch.zeros_like(cost)
            x[valid] = (greedy if self.matcher == "greedy" else hungarian)(cost[valid])
        if self.decision == "assign":
            x = x * _one_hot(assign(x), x.size(1))
        return x


def graph_wanted(graph: bool | None, device: torch.device, matcher: str, decision: str) -> bool:
    """Whether the step runs as a CUDA graph: where it can unless `graph` is False; ValueError where True asks too much."""
    possible = device.type == "cuda" and (matcher, decision) == ("dmm", "confident")
    if graph and not possible:
        raise ValueError("Segmenter: graph needs a CUDA device, the matcher 'dmm' and the decision 'confident'")
    return possible and graph is not False


def _one_hot(columns: Tensor, size: int) -> Tensor:
    """[N] indices, -1 for none -> [N, size] of 0 and 1."""
    return (columns[:, None] == torch.arange(size, device=columns.device)).to(torch.float32)


def _resolve(
    config: Config | str | None, weights: str | os.PathLike[str] | None, refine: str | None, short_side: int | None
) -> tuple[Config, str | os.PathLike[str] | None]:
    """The config and weights meant, where one follows from the other."""
    if weights is None and (config is None or config in PACKAGED):
        weights = packaged(config or "small")
    if config is None:
        config = "davis" if weights == "imagenet" else read_config(weights)
    chosen = config if isinstance(config, Config) else Config.preset(config)
    if weights == "imagenet" and refine is None and not isinstance(config, Config):
        refine = "none"
    if refine is not None and refine != chosen.refine:
        heavy = {} if refine == "heavy" else {"objects": "apart", "memory": 0}  # which only that knows
        follow = "matched" if refine == "none" else chosen.follow
        chosen = replace(chosen, refine=refine, follow=follow, min_certainty=0.0, **heavy)
    if short_side is not None:
        if chosen.backbone == "none":
            raise ValueError("Segmenter: short_side is of a network; without a backbone (the preset iou) there is none")
        chosen = replace(chosen, short_side=short_side, enlarge=True, input_size=None)
    return chosen, weights


def _build(config: Config, weights: str | os.PathLike[str] | None) -> DMMNet:
    if config.backbone == "none":
        if weights is not None:
            raise ValueError(f"Segmenter: backbone 'none' takes no weights, got {str(weights)!r}")
        return DMMNet(config)
    if weights is None:
        raise ValueError(
            f"Segmenter: backbone {config.backbone!r} needs weights: 'imagenet' or a safetensors file of this project; "
            f"the presets {' and '.join(map(repr, PACKAGED))} have their own, the preset 'iou' needs none"
        )
    if weights == "imagenet":
        if config.refine != "none":
            raise ValueError(f"Segmenter: refine {config.refine!r} needs a weights file of this project, not ImageNet's alone")
        return DMMNet(config, pretrained=True)
    net = DMMNet(config)
    tensors = read_weights(weights)
    if config.refine == "none":  # weights of a refinement are of no use then
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("refinement.")}
    load_weights(net, tensors, str(weights))
    return net


def _note(config: Config, weights: str | os.PathLike[str] | None) -> str:
    """One line for people on what the results rest on."""
    if config.backbone == "none":
        return "matching on mask overlap alone, no trained weights: the masks are the matched proposals"
    masks = "the masks are the matched proposals" if config.refine == "none" else f"{config.refine} refinement"
    origins = {packaged(name): f"{name}, in the package" for name in PACKAGED}
    origin = {"imagenet": "ImageNet", **origins}.get(weights, weights)
    return f"matching on overlap and features of {config.backbone} ({origin}); {masks}"


def _frame(frame: Frame, size: tuple[int, int] | None) -> Tensor:
    """A frame as a [3, H, W] uint8 tensor; `size` is what it must be."""
    if not isinstance(frame, (np.ndarray, Tensor)):
        raise TypeError(f"Segmenter: frame must be an array or a tensor, got {type(frame).__name__}")
    array = isinstance(frame, np.ndarray)
    if frame.ndim != 3 or frame.shape[-1 if array else 0] != 3 or 0 in frame.shape:
        rule = "[H, W, 3]" if array else "[3, H, W]"
        raise ValueError(f"Segmenter: frame must have shape {rule}, got {list(frame.shape)}")
    if frame.dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"Segmenter: frame must be uint8, got {frame.dtype}")
    # A copy: a frame buffer may be read-only, a view that runs backwards, or filled again by its owner.
    tensor = frame.clone() if isinstance(frame, Tensor) else torch.from_numpy(frame.copy()).permute(2, 0, 1)
    if size is not None and tuple(tensor.shape[1:]) != size:
        raise ValueError(f"Segmenter: frames must have the first one's size {size}, got {tuple(tensor.shape[1:])}")
    return tensor


def _copied(mask: np.ndarray | Tensor) -> Tensor:
    """A tensor as it is, an array copied."""
    return mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))


def _masks(masks: Masks, size: tuple[int, int]) -> tuple[list[int], Tensor]:
    """Any of the accepted forms of masks -> ids and masks [N, H, W] bool."""
    if isinstance(masks, Mapping):
        ids = [int(i) for i in masks]
        planes = [_copied(mask) for mask in masks.values()]
        if any(plane.dtype != torch.bool or tuple(plane.shape) != size for plane in planes):
            raise ValueError(f"Segmenter: masks by id must be bool and of the frame's size {size}")
        stack = torch.stack(planes) if planes else torch.zeros((0, *size), dtype=torch.bool)
    else:
        tensor = _copied(masks)
        if tuple(tensor.shape[-2:]) != size or tensor.ndim not in (2, 3):
            got = list(tensor.shape)
            raise ValueError(f"Segmenter: masks must be [H, W] or [N, H, W] with the frame's size {size}, got {got}")
        if tensor.ndim == 2:
            if tensor.dtype != torch.uint8:
                raise ValueError(f"Segmenter: an id map must be uint8, got {tensor.dtype}")
            ids = [i for i in tensor.unique().tolist() if i]
            stack = tensor == torch.tensor(ids, dtype=torch.uint8, device=tensor.device)[:, None, None]
        elif tensor.dtype == torch.bool:
            ids, stack = list(range(1, tensor.size(0) + 1)), tensor
        else:
            raise ValueError(f"Segmenter: masks [N, H, W] must be bool, got {tensor.dtype}")
    wrong = [i for i in ids if not 1 <= i <= 254]  # 255 is void
    if wrong:
        raise ValueError(f"Segmenter: object ids must be in 1..254 (255 means void), got {wrong}")
    empty = [i for i, filled in zip(ids, stack.flatten(1).any(1).tolist()) if not filled]
    if empty:
        raise ValueError(f"Segmenter: the masks of objects {empty} are empty")
    return ids, stack


def _proposals(proposals: Proposals, size: tuple[int, int], top: int, device: torch.device) -> tuple[Proposals, list[int]]:
    """Checked proposals on the device, the `top` best by score; and their indices among those given. Padding is left out."""
    boxes, scores, masks = checked(proposals, size)
    told = scores.cpu()
    kept = (told > -torch.inf).nonzero()[:, 0]
    if len(kept) > top:
        kept = kept[told[kept].argsort(descending=True, stable=True)[:top].sort().values]
    if not len(kept):
        square = masks.is_floating_point() and masks.size(1) == masks.size(2) > 0
        like = masks[:0] if masks.dtype == torch.int32 or square else torch.zeros((0, *size), dtype=torch.bool)
        return pad(Proposals(boxes[:0].to(device), scores[:0].to(device), like.to(device)), 1), []
    if len(kept) < len(scores):
        boxes, scores, masks = boxes[kept], scores[kept], masks[kept]
    return Proposals(boxes.to(device), scores.to(device), masks.to(device)), kept.tolist()


def _given(ids: list[int]) -> list[ObjectResult]:
    return [ObjectResult(i, None, 1.0, 0.0, False) for i in sorted(ids)]


def _paint(ids: np.ndarray, new: list[int], masks: Tensor) -> np.ndarray:
    for i, mask in zip(new, masks.cpu().numpy()):
        ids[mask] = i
    return ids


def _read_session(path: str | os.PathLike[str]) -> tuple[dict[str, Any], State, Tensor, Tensor]:
    """What `save` wrote: the session's settings, its state, last frame and last ids."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"Segmenter.load: no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            session = json.loads((file.metadata() or {}).get("dmm_fast", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"Segmenter.load: {path} is not a whole session file ({error})") from error
    if session.get("format") != FORMAT:
        raise ValueError(f"Segmenter.load: {path} is not a session of format {FORMAT}, but {session.get('format')}")
    layers = sum(name.startswith("state.hidden.") for name in tensors)
    names = [f"state.{name}" for name in State._fields[:-1]] + [f"state.hidden.{k}" for k in range(layers)]
    missing = [name for name in [*names, "frame", "ids"] if name not in tensors]
    if missing or len(session["slot_ids"]) != tensors["state.valid"].numel():
        raise ValueError(f"Segmenter.load: {path} is damaged: missing {missing}, or slots unlike the state's")
    parts, fixed = [tensors[name] for name in names], len(State._fields) - 1
    return session, State(*parts[:fixed], parts[fixed:]), tensors["frame"], tensors["ids"]
