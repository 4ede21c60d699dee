""".pt2: the functions by torch.export and AOTInductor, machine code in a package each; add and drop are merges of states.

The op library is not in the package: whoever loads it loads that first, by the manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmm_fast.model import DMMNet

from .flat import POOLING, Progress, Traced, traced, traced_layer
from .loaded import Run
from .manifest import LAYER_LIMITS, OPEN, Example, Manifest, Sizes

if TYPE_CHECKING:
    from dmm_fast.proposals.live import Live


def export(
    net: DMMNet, folder: Path, sizes: Sizes = OPEN, masks: str = "full", live: Live | None = None, *,
    progress: Progress,
) -> Manifest:  # fmt: skip
    """Compile `net`, and `live` with its detector, for the device `net` is on into `folder`; returns the manifest, not written yet.

    Takes minutes.
    """
    example = Example(net, sizes, masks)
    # Inductor compiles its own pooling for one size only, and says nothing.
    result = traced(net, example, sizes, ".pt2", POOLING if sizes.H is None else {}, live)
    _compile(result, folder, progress)
    return Manifest(
        kind="pt2",
        config=net.config.to_dict(),
        files=result.entries,
        state=example.state_specs,
        dynamic=example.dynamic,
        ops=result.ops(),
        device=net.mean.device.type,
        proposal_masks=(masks,),
        notes=(
            *sizes.notes(),
            _PROCESSOR,
            "add and drop: torch.where(slots, start's or zero state, state), tensor by tensor",
        ),
    )


def export_layer(net: DMMNet, folder: Path, *, progress: Progress) -> Manifest:
    """The network's matching layer alone: a batch of ragged problems -> their assignments."""
    result = traced_layer(net, Example(net, OPEN), ".pt2", {})
    _compile(result, folder, progress)
    return Manifest(
        kind="pt2", config=net.config.to_dict(), files=result.entries, dynamic=LAYER_LIMITS, ops=result.ops(),
        device=net.mean.device.type, notes=(_PROCESSOR,),
    )  # fmt: skip


_PROCESSOR = "compiled for this kind of processor: another may lack its instructions"


def _compile(result: Traced, folder: Path, progress: Progress) -> None:
    from torch._inductor import aoti_compile_and_package

    for name, program in result.programs.items():
        progress(f"compiling {name}")
        aoti_compile_and_package(program, package_path=str(folder / result.entries[name].file))


def load(folder: Path, manifest: Manifest, device: str) -> Run:
    from torch._inductor import aoti_load_package

    index = torch.device(device).index
    models = {
        name: aoti_load_package(str(folder / entry.file), device_index=-1 if index is None else index)
        for name, entry in manifest.files.items()
    }

    def run(name: str, tensors: list[Tensor]) -> list[Tensor]:
        results = models[name](*(tensor.contiguous() for tensor in tensors))
        return [results] if isinstance(results, Tensor) else list(results)

    return run
