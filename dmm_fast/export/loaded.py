"""An export at work in Python: the functions of `DMMNet`, whatever the format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.model import Config, DMMNet, Output, Proposals, State
from dmm_fast.model.network import absent
from dmm_fast.model.state import empty_like, merge

from .manifest import Example, ExportError, Manifest, Sizes, config_of, flat, unflat

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
        n = manifest.files["step"].inputs[1 + len(Proposals._fields)].shape[0]
        self.slots: int | None = n if isinstance(n, int) else None  # objects, where their number is fixed

    def start(self, frame: Tensor, masks: Tensor, valid: Tensor) -> State:
        return unflat(self._call("start", [frame, masks, valid]))

    def step(self, frame: Tensor, proposals: Proposals, state: State) -> tuple[Output, State]:
        results = self._call("step", [frame, *self._padded(proposals, state), *flat(state)])
        count = len(Output._fields)
        output = Output(*results[:count])
        return output._replace(parts=output.parts[:, : proposals.scores.numel()]), unflat(results[count:])

    def add(self, frame: Tensor, masks: Tensor, new: Tensor, state: State) -> State:
        if "add" in self.manifest.files:
            return unflat(self._call("add", [frame, masks, new, *flat(state)]))
        return merge(new, state, self.start(frame, masks, new))

    def drop(self, gone: Tensor, state: State) -> State:
        if "drop" in self.manifest.files:
            return unflat(self._call("drop", [gone, *flat(state)]))
        return merge(gone, state, empty_like(state))

    def propose(self, frame: Tensor) -> Proposals:
        """Proposals of a frame [3, H, W] uint8 by the export's own detector; ExportError where it has none."""
        if "proposals" not in self.manifest.files:
            raise ExportError("this export holds no proposal network")
        boxes, scores, masks = self._call("proposals", [frame])
        count = int(torch.isfinite(scores).sum())  # behind them is padding
        return Proposals(boxes[:count], scores[:count], masks[:count])

    def _call(self, name: str, tensors: list[Tensor]) -> list[Tensor]:
        self.manifest.check(name, tensors)
        return self._run(name, tensors)

    def _padded(self, proposals: Proposals, state: State) -> Proposals:
        """The proposals, with as many of padding behind them as the manifest asks for."""
        m = self.manifest.files["step"].inputs[2].shape[0]
        least = m if isinstance(m, int) else self.manifest.dynamic[m][0]
        missing = least - proposals.scores.numel()
        if missing <= 0:
            return proposals
        masks = proposals.masks if proposals.scores.numel() else absent(state.masks).masks[:0]
        return Proposals(
            F.pad(proposals.boxes, [0, 0, 0, missing]),
            F.pad(proposals.scores, [0, missing], value=float("-inf")),
            torch.cat([masks, masks.new_zeros((missing, *masks.shape[1:]))]),
        )


@torch.no_grad()
def verify(exported: Exported, net: DMMNet, sizes: Sizes, soft: bool = False) -> None:
    """Refuse an export that does not compute what `net` does, at sizes other than those it was traced with.

    Compilers fix a size here and there without a word, and then compute something else for every other one.
    """
    other = Sizes(*(given or size for given, size in zip(astuple(sizes), (2, 4, 80, 112))))
    example = Example(net, other, soft)
    state, theirs = exported.start(example.frame, example.objects, example.valid), example.state
    for _ in range(2):  # in the first, what is remembered of the template and of the last frame is still the same
        output, state = exported.step(example.frame, example.proposals, state)
        expected, theirs = net.step(example.frame, example.proposals, theirs)
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
