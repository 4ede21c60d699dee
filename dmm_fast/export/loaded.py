"""An export at work in Python: the functions of `DMMNet`, whatever the format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.model import Config, DMMNet, Output, Proposals, State
from dmm_fast.model.state import empty_like, merge
from dmm_fast.ops.vision import NO_RUN
from dmm_fast.proposals.base import encode_runs, full_masks, real

from .manifest import Example, ExportError, Manifest, Sizes, config_of, flat, kind_of, unflat

if TYPE_CHECKING:
    from dmm_fast.proposals.live import Live

# Runs one of the manifest's functions on its inputs, flat and in its order; returns its outputs likewise.
Run = Callable[[str, list[Tensor]], list[Tensor]]


class Exported:
    """start, step, add and drop of an export, with `dmm_fast.model`'s tuples in and out, as `DMMNet` has them; and propose.

    What goes in is checked against the manifest. Where the number of proposals is fixed, padding (score -inf) is appended; a
    number of object slots that is fixed is the caller's to keep (`slots`): those not in use are not `valid`.
    """

    def __init__(self, manifest: Manifest, run: Run) -> None:
        self.manifest = manifest
        self.config: Config = config_of(manifest)
        self._run = run
        n = manifest.files["step"].inputs[1 + len(Proposals._fields)].shape[0] if "step" in manifest.files else None
        self.slots: int | None = n if isinstance(n, int) else None  # objects, where their number is fixed

    def start(self, frame: Tensor, masks: Tensor, valid: Tensor) -> State:
        """As `DMMNet.start`."""
        return unflat(self._call("start", [frame, masks, valid]))

    def step(self, frame: Tensor, proposals: Proposals, state: State) -> tuple[Output, State]:
        """As `DMMNet.step`."""
        results = self._call("step", [frame, *self._ready(proposals, (frame.size(1), frame.size(2))), *flat(state)])
        return _stepped(results, proposals)

    def add(self, frame: Tensor, masks: Tensor, new: Tensor, state: State) -> State:
        """As `DMMNet.add`: `frame` is the one of the last step, or of `start`."""
        if "add" in self.manifest.files:
            return unflat(self._call("add", [frame, masks, new, *flat(state)]))
        return merge(new, state, self.start(frame, masks, new))

    def drop(self, gone: Tensor, state: State) -> State:
        """As `DMMNet.drop`."""
        if "drop" in self.manifest.files:
            return unflat(self._call("drop", [gone, *flat(state)]))
        return merge(gone, state, empty_like(state))

    def propose(self, frame: Tensor) -> Proposals:
        """Proposals of a frame [3, H, W] uint8 by the export's own detector; ExportError where it has none."""
        if "proposals" not in self.manifest.files:
            raise ExportError("this export holds no proposal network")
        return real(*self._call("proposals", [frame]))

    def live(self, frame: Tensor, state: State) -> tuple[Proposals, Output, State]:
        """`propose` and `step` with what it gives, in one: faster where the two have one backbone."""
        if "live" not in self.manifest.files:
            raise ExportError("this export holds no proposal network")
        results = self._call("live", [frame, *flat(state)])
        proposals = real(*results[:3])
        return proposals, *_stepped(results[3:], proposals)

    def match(self, cost: Tensor, num_templates: Tensor, num_proposals: Tensor) -> Tensor:
        """cost [B, N, M] float32, how much of it is real, both [B] int64 -> assignment [B, N, M]; of an export of the layer."""
        if "match" not in self.manifest.files:
            raise ExportError("this export holds no layer alone; export(..., only='match') writes it")
        return self._call("match", [cost, num_templates, num_proposals])[0]

    def _call(self, name: str, tensors: list[Tensor]) -> list[Tensor]:
        self.manifest.check(name, tensors)
        return self._run(name, tensors)

    def _ready(self, proposals: Proposals, size: tuple[int, int]) -> Proposals:
        """The proposals with masks of a kind that the export takes, and as many of padding behind them as it asks for."""
        boxes, scores, masks = proposals
        kinds = self.manifest.proposal_masks
        if kind_of(masks) not in kinds or not len(masks):
            if "full" in kinds:
                masks = full_masks(proposals, size)[2].to(boxes.device)
            elif "runs" in kinds:
                masks = encode_runs(full_masks(proposals, size)[2]).to(boxes.device)
            elif not len(masks):
                masks = boxes.new_zeros((0, *map(int, self.manifest.files["step"].inputs[3].shape[1:])))
        m = self.manifest.files["step"].inputs[2].shape[0]
        missing = max(0, (m if isinstance(m, int) else self.manifest.dynamic[m][0]) - len(scores))
        fill = NO_RUN if kind_of(masks) == "runs" else 0
        if kind_of(masks) == "runs" and not masks.size(1):
            masks = masks.new_full((len(masks), 1), NO_RUN)
        return Proposals(
            F.pad(boxes, [0, 0, 0, missing]),
            F.pad(scores, [0, missing], value=float("-inf")),
            torch.cat([masks, masks.new_full((missing, *masks.shape[1:]), fill)]),
        )


def _stepped(results: list[Tensor], proposals: Proposals) -> tuple[Output, State]:
    """What a step gives, whose parts are those of real proposals alone."""
    count = len(Output._fields)
    output = Output(*results[:count])
    return output._replace(parts=output.parts[:, : proposals.scores.numel()]), unflat(results[count:])


@torch.no_grad()
def verify(exported: Exported, net: DMMNet, sizes: Sizes, masks: str, live: Live | None = None) -> None:
    """Refuse an export that does not compute what `net` and `live` do, at sizes other than those it was traced with.

    Compilers fix a size here and there without a word, and then compute something else for every other one. And they compile
    loops twice, for vectors and for what is left, so few objects and many are two cases.
    """
    for usual in ((2, 4, 80, 112), (19, 35, 80, 112)):
        other = Sizes(*(given or size for given, size in zip(astuple(sizes), usual)))
        example = Example(net, other, masks)
        _verify_step(exported, net, other, example)
    if live is not None:
        _verify_proposals(exported.propose(example.frame), live.detector(example.frame))
        found, output, _ = exported.live(example.frame, example.state)
        proposals, expected, _ = live(example.frame, example.state)
        _verify_proposals(found, proposals)
        if (output.labels != expected.labels).float().mean() > 0.001:
            raise ExportError("export: the exported live step differs from the network's; report it")


def _verify_proposals(found: Proposals, expected: Iterable[Tensor]) -> None:
    boxes, scores, _ = expected
    same = len(found.scores) == len(scores)
    if same and len(scores):  # not by their order: where two scores are next to equal, either may come first
        near = (found.boxes[:, None] - boxes).abs().amax(2).amin(1) < 1  # pixel
        same = bool(near.float().mean() > 0.9 and (found.scores - scores).abs().max() < 0.01)
    if not same:
        raise ExportError("export: the exported proposal network finds other proposals than the detector; report it")


def _verify_step(exported: Exported, net: DMMNet, other: Sizes, example: Example) -> None:
    """Two steps, with an object added between them, so that templates come from two frames."""
    following = example.frame.flip(2)
    last = torch.arange(len(example.valid), device=example.valid.device) == len(example.valid) - 1
    results = []
    for function in (exported, net):
        state = function.start(example.frame, example.objects, example.valid)
        _, state = function.step(following, example.proposals, state)
        state = function.add(following, example.objects.flip(2), last, state)
        results += [function.step(example.frame, example.proposals, state)]
    (output, state), (expected, theirs) = results
    names = (*Output._fields, *(spec.name for spec in exported.manifest.state))
    pairs = zip(names, (*output, *flat(state)), (*expected, *flat(theirs)), strict=True)
    for name, a, b in pairs:
        wrong = 1.0 if a.shape != b.shape else 0.0
        if a.shape == b.shape and a.numel():
            wrong = ((a.float() - b.float()).abs() > 0.01).float().mean().item()
        if wrong > 0.001:
            raise ExportError(
                f"export: {name} of the exported step differs from the network's ({wrong:.1%} of its values, at {other}); "
                "this is a fault of dmm_fast or of a compiler: give --height, --width, --objects and --proposals, or report it"
            )
