"""The wheel: what is in it, and that it runs in a bare environment with another torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from dmm_fast.ops.library import built_facts

ROOT = Path(__file__).resolve().parent.parent

CHECK = """
import sys, torch
import dmm_fast
assert "triton" not in sys.modules and "torchvision" not in sys.modules and "scipy" not in sys.modules, "a heavy import"
assert not torch.cuda.is_initialized(), "importing must not start CUDA"
cost = torch.rand(3, 5, 50, dtype=torch.float64).requires_grad_()
grad = torch.rand_like(cost)
x, y = dmm_fast.match(cost, n_grad=5), dmm_fast.match(cost, n_grad=5, backend="reference")
assert (x - y).abs().max() < 1e-10
a, b = torch.autograd.grad(x, cost, grad)[0], torch.autograd.grad(y, cost, grad)[0]
assert (a - b).abs().max() < 1e-10
iou = dmm_fast.mask_iou(torch.ones(2, 8, 8, dtype=torch.bool), torch.ones(3, 8, 8, dtype=torch.bool))
assert iou.eq(1).all()
info = dmm_fast.build_info()
assert info["backends"]["cpu"].startswith("native")
print(torch.__version__, dmm_fast.__file__, info["built against torch"])
"""


def run(*command, **options) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = built_facts().get("cuda_architectures")  # what is compiled already is used again
    environment = {**os.environ, "DMM_CUDA_ARCHITECTURES": built} if built else None
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, ROOT, env=environment)
    (path,) = folder.glob("*.whl")
    return path


def test_contents(wheel):
    """One wheel for every Python 3; the package, its two guest rooms and the libraries; nothing of the tests."""
    assert wheel.name.startswith("dmm_fast-") and "-py3-none-linux_" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "lib/libdmm_cpu.so",
        "lib/build.json",
        "ops/match.py",
        "commands/main.py",
        "training/small.yaml",
        "app/server.py",
        "app/static/index.html",
        "app/static/style.css",
        "app/static/main.js",
        "py.typed",
        "kernels/match.py",
        "model/network.py",
    ):
        assert f"dmm_fast/{needed}" in names
    for needed in ("dmm-config.cmake", "dmm-config-version.cmake", "dmm/segmenter.h", "segmenter.cpp", "CMakeLists.txt"):
        assert f"dmm_fast/cpp/{needed}" in names
    assert not any("_runtime" in name or name.endswith("dmm-segment") for name in names), "compiled for one torch only"
    top = {name.split("/")[0] for name in names}
    assert len(top) == 2 and "dmm_fast" in top, top
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("name", ["libdmm_cpu.so", "libdmm_cuda.so"])
def test_libraries_speak_the_stable_abi_only(name):
    """No symbol of Python, ATen, c10 or torch's C++ classes: that is what makes one binary last."""
    library = ROOT / "dmm_fast" / "lib" / name
    if not library.exists():
        pytest.skip(f"{name} is not built here")
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    foreign = [s for s in undefined if s.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at"))]
    assert not foreign, foreign


def test_another_torch_in_a_bare_environment(wheel, tmp_path):
    """torch 2.13 without CUDA, Triton, torchvision or nvcc; the wheel was built against the torch of this environment."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    torch = subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0+cpu", "numpy"], capture_output=True, text=True)
    if torch.returncode:
        pytest.skip(f"the CPU build of torch 2.13.0 is not to be had here: {torch.stderr.strip().splitlines()[-1]}")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    output = run(python, "-c", CHECK, cwd=tmp_path, env=environment)
    assert output.startswith("2.13.0+cpu") and str(tmp_path) in output


def test_a_missing_library_says_how_to_mend_it(tmp_path):
    copy = tmp_path / "dmm_fast" / "ops" / "library.py"
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / "dmm_fast" / "ops" / "library.py").read_text())
    result = subprocess.run([sys.executable, copy], capture_output=True, text=True)
    assert result.returncode and "libdmm_cpu.so is missing" in result.stderr and "pip install" in result.stderr


def test_a_cpp_program_builds_against_the_wheel(wheel, tmp_path):
    """examples/cpp by find_package(dmm), out of the tree: with the sources of an installed wheel, and this torch."""
    import numpy as np
    import torch
    from dmm_fast.model import Config, DMMNet, Proposals
    from dmm_fast.model.masks import mask_boxes
    from PIL import Image

    from dmm_fast.data.masks import write_mask
    from dmm_fast.export import export
    from dmm_fast.proposals.coco import write_coco

    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    package, example = tmp_path / "site" / "dmm_fast", tmp_path / "example"
    shutil.copytree(ROOT / "examples" / "cpp", example)
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    where = [f"-Ddmm_DIR={package / 'cpp'}", f"-DDMM_TORCH={Path(torch.__file__).parent}", "-DCMAKE_BUILD_TYPE=Debug"]
    run("cmake", "-S", example, "-B", example / "build", *where, env=environment)
    run("cmake", "--build", example / "build", "--parallel", "2", env=environment)

    ids = np.zeros((48, 80), np.uint8)
    ids[10:30, 20:50] = 5
    write_mask(tmp_path / "first.png", ids)
    mask = torch.from_numpy(ids > 0)[None]
    write_coco(tmp_path / "p.json", {"1": Proposals(mask_boxes(mask), torch.ones(1), mask)}, ids.shape)
    (tmp_path / "frames").mkdir()
    for k in range(2):
        Image.fromarray(np.zeros((48, 80, 3), np.uint8)).save(tmp_path / "frames" / f"{k}.jpg")
    export("torchscript", DMMNet(Config.preset("iou")), tmp_path / "export")
    words = (tmp_path / "export", tmp_path / "frames", tmp_path / "first.png", tmp_path / "p.json")
    told = run(example / "build" / "follow", *words, env={**environment, "DMM_OPS": str(package / "lib")})
    assert told == "0 object 5: 600 pixels, score 1.000\n1 object 5: 600 pixels, score 1.000\n"


def test_one_version():
    """In the project, the package, the CMake package, the newest entry of the changelog, and the citation."""
    version = re.search(r'^version = "([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    for file, line in (
        ("dmm_fast/__init__.py", f'__version__ = "{version}"'),
        ("csrc/runtime/dmm-config-version.cmake", f"set(PACKAGE_VERSION {version})"),
        ("CITATION.cff", f"version: {version}"),
    ):
        assert line in (ROOT / file).read_text().splitlines(), file
    assert re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version
