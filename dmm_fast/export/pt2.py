""".pt2: start and step by torch.export and AOTInductor, machine code in a package; add and drop are merges of states.

The op library is not in the package: whoever loads it loads that first, by the manifest.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dmm_fast.model import DMMNet

from .flat import FUNCTIONS, POOLING, traced
from .loaded import Run
from .manifest import LIMITS, OPEN, Example, Manifest, Sizes


def export(net: DMMNet, folder: Path, sizes: Sizes = OPEN, soft: bool = False) -> Manifest:
    """Compile `net` for the device it is on into `folder`; returns the manifest, not written yet. Takes minutes."""
    from torch._inductor import aoti_compile_and_package

    example = Example(net, sizes, soft)
    ops: set[str] = set()
    # Inductor compiles its own pooling for one size only, and says nothing.
    programs = traced(net, example, sizes, POOLING if sizes.H is None else {})
    for name, program in programs.items():
        ops |= {node.target.name().partition(".")[0] for node in program.graph.nodes if "dmm." in str(node.target)}
        aoti_compile_and_package(program, package_path=str(folder / f"{name}.pt2"))
    return Manifest(
        kind="pt2",
        config=net.config.to_dict(),
        files=example.entries({name: f"{name}.pt2" for name in FUNCTIONS}),
        state=example.state_specs,
        dynamic={name: LIMITS[name] for name in sizes.varying},
        ops=tuple(sorted(ops)),
        device=net.mean.device.type,
        proposal_masks=("soft" if soft else "full",),
        notes=(
            *sizes.notes(),
            "compiled for this kind of processor: another may lack its instructions",
            "add and drop: torch.where(slots, start's or zero state, state), tensor by tensor",
        ),
    )


def load(folder: Path, manifest: Manifest, device: str) -> Run:
    from torch._inductor import aoti_load_package

    index = torch.device(device).index
    models = {
        name: aoti_load_package(str(folder / entry.file), device_index=-1 if index is None else index)
        for name, entry in manifest.files.items()
    }

    def run(name: str, tensors: list[Tensor]) -> list[Tensor]:
        return list(models[name](*(tensor.contiguous() for tensor in tensors)))

    return run
