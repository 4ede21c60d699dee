"""What is installed, what was built, what works here, and the command that fixes what does not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from dmm_fast.ops import library

_OPTIONAL = {
    "torchvision": "proposals from Mask R-CNN",
    "timm": "backbones",
    "pycocotools": "proposal files",
    "av": "video files",
    "pillow": "mask and image files",
    "safetensors": "weights and saved states",
    "scipy": "evaluation, regions of masks, the reference of linear_assignment",
    "tqdm": "progress bars",
    "matplotlib": "plots",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def build_info() -> dict:
    """Versions, the backends that were built, and those that work here.

    ``backends`` maps cpu, cuda and triton to what serves them, or to "no: " and the reason; ``mend`` lists what is missing,
    each with the command that fixes it. Asks the driver for its GPUs, which importing dmm_fast never does.
    """
    built, triton = library.built_facts(), _version("triton")
    gpus = []
    if torch.version.cuda is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            gpus.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    no_gpu = "no: no GPU is visible" + ("" if torch.version.cuda else f" to torch {torch.__version__}, a build without CUDA")
    optional = {package: _version(package) for package in _OPTIONAL}
    backends = {
        "cpu": f"native, {library.cpu_capability()}",
        "cuda": f"no: {library.CUDA_MISSING}" if library.CUDA_MISSING else "native" if gpus else no_gpu,
        "triton": "no: not installed" if triton is None else f"triton {triton}" if gpus else no_gpu,
    }
    mend = []
    if gpus and library.CUDA_MISSING:
        mend.append(f"the CUDA kernels ({library.CUDA_MISSING}): install nvcc, then FORCE_CUDA=1 {library.REBUILD}")
    absent = [package for package, version in optional.items() if version is None]
    if absent:
        uses = "; ".join(f"{package}: {_OPTIONAL[package]}" for package in absent)
        mend.append(f"packages of the segmenter ({uses}): pip install 'dmm_fast[vos]'")
    return {
        "dmm_fast": _version("dmm_fast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built against torch": built.get("torch"),
        "CUDA library": library.CUDA_MISSING
        or f"loaded, built with nvcc {built.get('nvcc')} for {built.get('cuda_architectures')}",
        "GPUs": gpus,
        "backends": backends,
        "optional packages": optional,
        "mend": mend,
    }


def doctor() -> tuple[str, bool]:
    """``build_info()`` for a reader, after a small problem was solved and differentiated on every backend that should work.

    Returns the text, and whether everything is there and works.
    """
    from dmm_fast.ops.match import match

    info = build_info()
    healthy = not info["mend"]
    lines = [f"{key:20} {info[key]}" for key in ("dmm_fast", "python", "torch", "built against torch", "CUDA library")]
    lines.append(f"{'GPUs':20} {', '.join(info['GPUs']) or 'none visible'}")
    lines.append("")
    for name, state in info["backends"].items():
        if not state.startswith("no: "):
            cost = torch.rand(5, 50, device="cpu" if name == "cpu" else "cuda", requires_grad=True)
            try:
                match(cost, backend="triton" if name == "triton" else "native").sum().backward()
                state += ": forward and backward work"
            except Exception as error:  # whatever it is, it belongs in this report
                state += f": FAILED: {error}"
                healthy = False
        lines.append(f"{'backend ' + name:20} {state}")
    lines.append("")
    lines += [f"{package:20} {version or 'not installed'}" for package, version in info["optional packages"].items()]
    lines.append("")
    lines += [f"to fix: {item}" for item in info["mend"]] or ["Nothing is missing."]
    return "\n".join(lines), healthy
