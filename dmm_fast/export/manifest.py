"""manifest.json: what an exported folder holds, written last and believed only after it is checked.

Every tensor that crosses the border of a file is listed by name, dtype and shape, in order. A shape's entry is a number,
or the name of a size that may vary: N objects, M proposals, R places of a run-length code, H and W pixels of the frame, h and w
cells of the grid on which masks are compared, h0, w0 .. cells of the features.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm_fast.model import Config, DMMNet, Output, Proposals, State
from dmm_fast.proposals.base import encode_runs

FORMAT = 3
ABI = "2.11"  # of torch's stable ABI, which the op libraries are built for
KINDS = ("torchscript", "pt2", "onnx")
"""The formats that `export` writes."""
NAME = "manifest.json"
MASKS = ("full", "runs", "soft")  # kinds of proposal masks
LIMITS = {
    "N": (1, 255), "M": (1, 4096), "R": (1, 1 << 20), "H": (32, 8192), "W": (32, 8192), "h": (1, 8192), "w": (1, 8192)
}  # fmt: skip
MEANING = {
    "N": "objects", "M": "proposals", "R": "run lengths of a mask", "H": "frame height", "W": "frame width",
    "h": "grid height", "w": "grid width", "B": "problems",
}  # fmt: skip
LAYER_LIMITS = {"B": (1, 1 << 20), "N": (1, 4096), "M": (1, 4096)}  # of the matching layer alone

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a name in the manifest's own folder, nothing that leads elsewhere
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DTYPES = {"bool": torch.bool, "uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


class ExportError(ValueError):
    """An export that cannot be made or must not be used; the message says why."""


@dataclass(frozen=True)
class Spec:
    """A tensor: its name, dtype, and per dimension a size or the name of one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor, shape: Iterable[int | str]) -> Spec:
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(shape))


_BATCH = ("B", "N", "M")
LAYER = (Spec("cost", "float32", _BATCH), Spec("num_templates", "int64", ("B",)), Spec("num_proposals", "int64", ("B",)))
ASSIGNMENT = (Spec("assignment", "float32", _BATCH),)  # of the matching layer alone


@dataclass(frozen=True)
class Entry:
    """One function: the file it is in, and its tensors."""

    file: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. `dynamic` gives the smallest and largest value of every size that may vary."""

    kind: str
    config: dict[str, Any]
    files: dict[str, Entry]
    state: tuple[Spec, ...] = ()
    dynamic: dict[str, tuple[int, int]] = field(default_factory=dict)
    ops: tuple[str, ...] = ()
    device: str = "any"  # where it runs: "any", "cpu" or "cuda"
    proposal_masks: tuple[str, ...] = ("full",)  # of `MASKS`: bool [M, H, W], int32 [M, R], float [M, S, S] inside the boxes
    weights: str = ""  # dmm_fast.model.digest of the network
    notes: tuple[str, ...] = ()  # what is fixed, and why, for people
    dmm_fast: str = version("dmm_fast")
    torch: str = torch.__version__

    def write(self, folder: str | os.PathLike[str]) -> Manifest:
        """Note every file's size and checksum and write `manifest.json`, whole; returns the manifest with them in it."""
        folder = Path(folder)
        files = {}
        for name, entry in self.files.items():
            path = folder / entry.file
            files[name] = replace(entry, bytes=path.stat().st_size, sha256=sha256(path))
        manifest = replace(self, files=files)
        partial = folder / f"{NAME}.partial"
        partial.write_text(json.dumps(manifest.to_dict(), indent=1) + "\n")
        os.replace(partial, folder / NAME)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """What `write` puts into manifest.json."""
        values = asdict(self)
        values["op_library"] = {"ops": values.pop("ops"), "abi": ABI}
        values["dynamic"] = [{"name": name, "min": low, "max": high} for name, (low, high) in self.dynamic.items()]
        return {"format": FORMAT, **values}

    @staticmethod
    def _masks_spec(spec: Spec, kind: str) -> Spec:
        """`spec`, of proposals' masks, for those of a `kind`."""
        dtypes = {"full": "bool", "runs": "int32", "soft": "float32"}
        if spec.dtype == dtypes[kind]:
            return spec
        cells: dict[str, tuple[int | str, ...]] = {"full": ("H", "W"), "runs": ("R",), "soft": ("S", "S")}
        return Spec(spec.name, dtypes[kind], (spec.shape[0], *cells[kind]))

    def check(self, name: str, tensors: Iterable[Tensor], direction: str = "inputs") -> dict[str, int]:
        """Refuse tensors unlike those listed for the function `name`; returns the sizes that vary."""
        specs: tuple[Spec, ...] = getattr(self.files[name], direction)
        tensors = list(tensors)
        if len(tensors) != len(specs):
            raise ExportError(f"{name}: takes {len(specs)} tensors, got {len(tensors)}")
        sizes: dict[str, int] = {}
        for spec, tensor in zip(specs, tensors):
            if spec.name == "proposals.masks" and kind_of(tensor) in self.proposal_masks:
                spec = self._masks_spec(spec, kind_of(tensor))
            got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            rule = f"{name}: {spec.name} must be {spec.dtype} [{', '.join(map(str, spec.shape))}]"
            if tensor.dtype != _DTYPES[spec.dtype] or tensor.dim() != len(spec.shape):
                raise ExportError(f"{rule}, got {got}")
            for size, wanted in zip(tensor.shape, spec.shape):
                if isinstance(wanted, str):
                    low, high = self.dynamic.get(wanted, (0, size))
                    if not low <= size <= high:
                        raise ExportError(f"{rule} with {wanted} in {low}..{high}, got {got}")
                    wanted = sizes.setdefault(wanted, size)
                if size != wanted:
                    known = "".join(f", {k} = {v}" for k, v in sizes.items() if k in spec.shape)
                    raise ExportError(f"{rule}{known}, got {got}")
        return sizes


def kind_of(masks: Tensor) -> str:
    """Which of `MASKS` these are, by dtype."""
    return "soft" if masks.is_floating_point() else "full" if masks.dtype == torch.bool else "runs"


def sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


# ---- reading: nothing in the file is believed before it is checked ----


def read(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of an exported folder, whose files are all there and those that were written.

    Raises ExportError for anything else, before any of the files is opened as what it claims to be.
    """
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        raise ExportError(f"{folder}: no {NAME} there, so this is no finished export")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise ExportError(f"{path}: not valid JSON ({error})") from None
    manifest = _parse(values, str(path))
    checked: dict[str, tuple[int, str]] = {}
    for entry in manifest.files.values():
        said = (entry.bytes, entry.sha256)
        if checked.setdefault(entry.file, said) != said:
            raise ExportError(f"{path}: {entry.file} is listed with two checksums")
    for name, (size, digest) in checked.items():
        file = folder / name
        if not file.is_file():
            raise ExportError(f"{file}: missing, but listed in {NAME}")
        if file.stat().st_size != size:
            raise ExportError(f"{file}: {file.stat().st_size} bytes, {size} when it was written: cut short or replaced")
        if sha256(file) != digest:
            raise ExportError(f"{file}: its sha256 is not the one in {NAME}: damaged or replaced")
    return manifest


def _parse(values: Any, where: str) -> Manifest:
    def require(holds: bool, rule: str, value: Any) -> None:
        if not holds:
            text = repr(value)
            raise ExportError(f"{where}: {rule}, got {text[:80] + '..' * (len(text) > 80)}")

    def member(holder: Mapping, name: str, kind: type | tuple[type, ...]) -> Any:
        require(name in holder, f"{name!r} must be there", sorted(map(str, holder)))
        value = holder[name]
        known = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        require(known, f"{name!r} must be a {getattr(kind, '__name__', kind)}", value)
        return value

    def words(holder: Mapping, name: str) -> tuple[str, ...]:
        value = member(holder, name, list)
        require(all(isinstance(word, str) for word in value), f"{name!r} must be a list of str", value)
        return tuple(value)

    def spec(value: Any) -> Spec:
        require(isinstance(value, dict), "a tensor must be an object", value)
        name, dtype, shape = member(value, "name", str), member(value, "dtype", str), member(value, "shape", list)
        require(dtype in _DTYPES, f"dtype of {name} must be one of {tuple(_DTYPES)}", dtype)
        whole = all(isinstance(s, str) or (type(s) is int and s >= 0) for s in shape)
        require(whole, f"shape of {name} must hold sizes >= 0 and names", shape)
        return Spec(name, dtype, tuple(shape))

    def specs(holder: Mapping, name: str) -> tuple[Spec, ...]:
        return tuple(spec(value) for value in member(holder, name, list))

    def entry(value: Any) -> Entry:
        require(isinstance(value, dict), "each of 'files' must be an object", value)
        file, size, digest = member(value, "file", str), member(value, "bytes", int), member(value, "sha256", str)
        require(_FILE.fullmatch(file) is not None, "'file' must be a plain name in the export's own folder", file)
        require(_DIGEST.fullmatch(digest) is not None, "'sha256' must be 64 hex digits", digest)
        return Entry(file, specs(value, "inputs"), specs(value, "outputs"), size, digest)

    def limits(value: Any) -> tuple[str, tuple[int, int]]:
        require(isinstance(value, dict), "each of 'dynamic' must be an object", value)
        return member(value, "name", str), (member(value, "min", int), member(value, "max", int))

    require(isinstance(values, dict), "a manifest is a JSON object", values)
    require(type(values.get("format")) is int, "'format' must be an int", values.get("format"))
    require(values["format"] == FORMAT, f"this dmm_fast reads format {FORMAT}", values["format"])
    kind = member(values, "kind", str)
    require(kind in KINDS, f"'kind' must be one of {KINDS}", kind)
    library = member(values, "op_library", dict)
    return Manifest(
        kind=kind,
        config=member(values, "config", dict),
        files={name: entry(value) for name, value in member(values, "files", dict).items()},
        state=specs(values, "state"),
        dynamic=dict(limits(value) for value in member(values, "dynamic", list)),
        ops=words(library, "ops"),
        device=member(values, "device", str),
        proposal_masks=words(values, "proposal_masks"),
        weights=member(values, "weights", str),
        notes=words(values, "notes"),
        dmm_fast=member(values, "dmm_fast", str),
        torch=member(values, "torch", str),
    )


def require_ops(ops: Iterable[str], where: str) -> None:
    """Refuse an export that needs ops which this installation's library does not have."""
    missing = [op for op in ops if not (op.startswith("dmm::") and hasattr(torch.ops.dmm, op.removeprefix("dmm::")))]
    if missing:
        raise ExportError(f"{where}: needs the ops {missing}, which the op library of this dmm_fast does not have")


# ---- what a network's functions take and give ----


@dataclass(frozen=True)
class Sizes:
    """Objects, proposals, frame height and width of an export; None where they may vary."""

    N: int | None = None
    M: int | None = None
    H: int | None = None
    W: int | None = None

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            low, high = LIMITS[name]
            if size is not None and not low <= size <= high:
                raise ExportError(f"export: {name} must be in {low}..{high}, got {size}")
        if (self.H is None) != (self.W is None):
            raise ExportError(f"export: give height and width or neither, got {self.H} and {self.W}")

    def symbol(self, name: str) -> int | str:
        """The size, or its name where it may vary."""
        size = getattr(self, name)
        return name if size is None else size

    @property
    def varying(self) -> list[str]:
        """Names of the sizes that may vary."""
        return [name for name, size in asdict(self).items() if size is None]

    def notes(self) -> list[str]:
        """What is fixed, for people."""
        what = {"N": "object slots, those not in use are not valid", "M": "proposals, padded with scores of -inf"}
        notes = [f"always {getattr(self, name)} {text}" for name, text in what.items() if getattr(self, name) is not None]
        return notes + ([f"frames are {self.H} x {self.W} always"] if self.H is not None else [])


OPEN = Sizes()


class Example:
    """A frame with objects and proposals of the sizes of an export, and what the network's functions take and give.

    `inputs` holds the tensors of "start", "step" and "match", flat and in the manifest's order; `specs` says what these, "add"
    and "drop" take and give.
    """

    def __init__(self, net: DMMNet, sizes: Sizes, kind: str = "full") -> None:
        if kind not in MASKS:
            raise ExportError(f"export: masks must be one of {MASKS}, got {kind!r}")
        device = net.mean.device
        n, m, h, w = sizes.N or 3, sizes.M or 7, sizes.H or 96, sizes.W or 128
        generator = torch.Generator().manual_seed(0)
        frame = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
        corner = torch.rand((m, 2), generator=generator) * 0.5
        boxes = torch.cat([corner, corner + 0.4], 1) * torch.tensor([w, h, w, h])
        x, y = torch.arange(w) + 0.5, torch.arange(h)[:, None] + 0.5
        inside = [(x > x0) & (x < x1) & (y > y0) & (y < y1) for x0, y0, x1, y1 in boxes]
        masks = torch.stack(inside)  # [M, H, W]
        objects = masks[torch.arange(n) % m].roll(2, 2)  # [N, H, W], near proposals
        if kind == "soft":
            masks = torch.rand((m, 28, 28), generator=generator)
        elif kind == "runs":
            masks = encode_runs(masks)
        proposals = Proposals(boxes, torch.linspace(0.9, 0.1, m), masks)
        self.frame, self.objects, self.valid = (t.to(device) for t in (frame, objects, torch.ones(n, dtype=torch.bool)))
        self.proposals = Proposals(*(t.to(device) for t in proposals))
        with torch.no_grad():
            state = net.start(self.frame, self.objects, self.valid)
            # Copies: two of these are one tensor, and a tracer would take the two inputs for one as well.
            self.state = unflat(tensor.clone() for tensor in flat(state))
            self.output, _ = net.step(self.frame, self.proposals, self.state)
        fixed = sizes.H is not None
        self.specs, self.state_specs = self._specs(
            sizes, fixed_features=fixed or net.input_size[0] > 0, fixed_grid=fixed or (net.heavy and net.input_size[0] > 0)
        )
        names = {size for specs in self.specs["step"] for spec in specs for size in spec.shape}
        self.dynamic = {name: limits for name, limits in LIMITS.items() if name in names}
        self.inputs = {
            "start": [self.frame, self.objects, self.valid],
            "step": [self.frame, *self.proposals, *flat(self.state)],
            "match": [torch.rand((2, n, m), device=device), *torch.tensor([[n, 1], [m, 2]], device=device)],
        }

    def add_live(self, live: Callable[[Tensor, State], tuple[Proposals, Output, State]], m: int | str) -> None:
        """List a network with a detector as "live" too, and the detector alone as "proposals". It gives `m` of them."""
        with torch.no_grad():
            (boxes, scores, masks), _, _ = live(self.frame, self.state)
        found = (
            Spec.of("proposals.boxes", boxes, (m, 4)),
            Spec.of("proposals.scores", scores, (m,)),
            Spec.of("proposals.masks", masks, (m, *masks.shape[1:])),
        )
        frame = self.specs["start"][0][:1]
        self.inputs |= {"proposals": [self.frame], "live": [self.frame, *flat(self.state)]}
        # Parts are by proposal: all others of a step's outputs do not depend on the number of proposals.
        outputs = tuple(
            replace(spec, shape=(spec.shape[0], m)) if spec.name == "output.parts" and spec.shape[1] else spec
            for spec in self.specs["step"][1]
        )
        self.specs |= {"proposals": (frame, found), "live": (frame + self.state_specs, found + outputs)}

    def _specs(
        self, sizes: Sizes, fixed_features: bool, fixed_grid: bool
    ) -> tuple[dict[str, tuple[tuple[Spec, ...], tuple[Spec, ...]]], tuple[Spec, ...]]:
        N, M, H, W = (sizes.symbol(name) for name in "NMHW")
        frame = (Spec.of("frame", self.frame, (3, H, W)),)
        boxes, scores, masks = self.proposals
        cells: dict[str, tuple[int | str, ...]] = {"soft": tuple(masks.shape[1:]), "full": (H, W), "runs": ("R",)}
        proposals = (
            Spec.of("proposals.boxes", boxes, (M, 4)),
            Spec.of("proposals.scores", scores, (M,)),
            Spec.of("proposals.masks", masks, (M, *cells[kind_of(masks)])),
        )
        objects = (Spec.of("masks", self.objects, (N, H, W)),)
        grid = tuple(self.state.masks.shape[1:]) if fixed_grid else ("h", "w")
        pixels = (H, W) if self.state.full.numel() else (0, 0)
        shapes = [(N,), (N, self.state.features.size(1)), (N, *grid), (N, *grid), (N, 2), (N, *pixels)]
        state = [Spec.of(f"state.{name}", tensor, shape) for name, tensor, shape in zip(State._fields, self.state, shapes)]
        for k, tensor in enumerate(self.state.hidden):
            level = tuple(tensor.shape[2:]) if fixed_features or tensor[0].numel() == 1 else (f"h{k}", f"w{k}")
            state.append(Spec.of(f"state.hidden.{k}", tensor, (N, tensor.size(1), *level)))
        parts = (N, M if self.output.parts.size(1) else 0)
        decided = (N, H, W) if self.state.full.numel() else (N, *grid)
        image = {"logits": decided, "matched": decided, "labels": (H, W), "parts": parts}
        output = tuple(
            Spec.of(f"output.{name}", tensor, image.get(name, (N,))) for name, tensor in zip(Output._fields, self.output)
        )
        states = tuple(state)

        def slots(name: str) -> tuple[Spec, ...]:
            return (Spec.of(name, self.valid, (N,)),)

        specs = {
            "start": (frame + objects + slots("valid"), states),
            "step": (frame + proposals + states, output + states),
            "add": (frame + objects + slots("new") + states, states),
            "drop": (slots("gone") + states, states),
            "match": (LAYER, ASSIGNMENT),
        }
        return specs, states

    def entries(self, files: Mapping[str, str]) -> dict[str, Entry]:
        """An `Entry` for each function in `files`, which gives the file it is in."""
        return {name: Entry(file, self.specs[name][0], self.specs[name][1]) for name, file in files.items()}


def flat(state: State) -> list[Tensor]:
    """The state's tensors in the manifest's order."""
    return [*state[:-1], *state.hidden]


def unflat(tensors: Iterable[Tensor]) -> State:
    """The inverse of `flat`."""
    tensors = list(tensors)
    fixed = len(State._fields) - 1
    return State(*tensors[:fixed], tensors[fixed:])


def config_of(manifest: Manifest) -> Config:
    """The settings of the exported network; raises ExportError for those of another version."""
    try:
        return Config.from_dict(manifest.config)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{NAME}: its config is none of this dmm_fast ({error})") from None
