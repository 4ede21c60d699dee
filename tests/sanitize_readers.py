"""make sanitize, second half: the runtime's readers on damaged files, under AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/sanitize_readers.py [COUNT]      mutations per kind of file, 2000 by default
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize-readers"
STRANGE = (b"-1", b"0", b"1e999", b"99999999999999999999", b"null", b'""', b"[]", b"{}", b"\\u", b"\\ud800", b"\xff", b"NaN")


def build() -> Path:
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    configure = ["cmake", "-S", ROOT / "csrc" / "runtime", "-B", BUILD, "-DDMM_SANITIZE=ON"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", BUILD, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return BUILD / "dmm-read"


def mutations(blob: bytes, count: int, seed: int):
    """Damaged copies: bytes changed, cut out or doubled, numbers made strange, the end cut off."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(blob)
        for _ in range(int(generator.integers(1, 4))):
            at, kind = int(generator.integers(len(changed) or 1)), generator.integers(6)
            strange = STRANGE[int(generator.integers(len(STRANGE)))]
            if kind == 0 and changed:
                changed[at] = int(generator.integers(256))
            elif kind == 1:
                del changed[at : at + int(generator.integers(1, 9))]
            elif kind == 2:
                changed[at:at] = changed[at : at + int(generator.integers(1, 30))]
            elif kind == 3:
                changed[at:at] = strange
            elif kind == 4 and generator.random() < 0.2:
                del changed[at:]
            elif number := re.search(rb"\d+", bytes(changed[at:])):
                changed[at + number.start() : at + number.end()] = strange
        yield bytes(changed)


def samples() -> dict[str, list[bytes]]:
    """Whole files of each kind, small."""
    from PIL import Image

    rgb = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    ids = Image.fromarray((rgb[..., 0] > 128).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6

    def image(picture: Image.Image, kind: str, **options) -> bytes:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        return file.getvalue()

    palette = ids.copy()
    palette.putpalette([0, 0, 0, 255, 0, 0])
    entry = {"image_id": "7", "score": 0.5, "bbox": [1, 2, 3.5, 4], "segmentation": {"size": [24, 32], "counts": "hdo05"}}
    counts = {**entry, "image_id": 7, "segmentation": {"size": [24, 32], "counts": [100, 20, 648]}}
    tensors = {"ids": {"dtype": "U8", "shape": [2, 3], "data_offsets": [0, 6]}, "__metadata__": {"dmm_fast": '{"a": 1}'}}
    header = json.dumps(tensors).encode()
    return {
        "json": [json.dumps({"a": [1, -2.5e3, "\u00e9\U0001f600\n", None, True, {}], "b": {"c": []}}).encode()],
        "proposals": [json.dumps([entry, counts]).encode()],
        "safetensors": [len(header).to_bytes(8, "little") + header + bytes(range(6))],
        "frame": [
            image(Image.fromarray(rgb), "PNG"), image(Image.fromarray(rgb), "JPEG", exif=exif),
            image(Image.fromarray(rgb), "JPEG", progressive=True), image(palette, "PNG", bits=1),
        ],
        "mask": [image(palette, "PNG", bits=2), image(ids, "PNG"), image(palette, "PNG")],
    }  # fmt: skip


def manifests() -> list[bytes]:
    from dmm_fast.model import Config, DMMNet

    from dmm_fast.export import export

    with tempfile.TemporaryDirectory() as folder:
        export("torchscript", DMMNet(Config.preset("iou")), folder)
        return [(Path(folder) / "manifest.json").read_bytes()]


def main(count: int) -> None:
    program = build()
    for kind, blobs in {**samples(), "manifest": manifests()}.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for index, blob in enumerate(
                change for k, whole in enumerate(blobs) for change in mutations(whole, count // len(blobs), k)
            ):
                path = Path(folder) / str(index)
                if kind == "manifest":  # is read from its folder
                    path.mkdir()
                    (path / "manifest.json").write_bytes(blob)
                else:
                    path.write_bytes(blob)
                paths.append(path)
            told = []
            for at in range(0, len(paths), 500):
                result = subprocess.run(
                    [program, kind, *paths[at : at + 500]], capture_output=True, text=True, errors="replace"
                )
                if result.returncode:
                    raise SystemExit(f"{kind}: {result.stderr[-4000:]}")
                told += result.stdout.splitlines()
        read = sum(line.startswith("read ") for line in told)
        print(f"{kind}: {len(paths)} damaged files, {read} still readable, no findings")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
