"""The sdist and the wheel: what is in them, and that the wheel runs in a bare environment with another torch.

DMM_DIST: the folder of finished ones to look at in place of those that the tests build (`make wheel`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DIST = os.environ.get("DMM_DIST")
WEIGHTS = {"small.safetensors", "detail.safetensors", "small-proposals.safetensors", "README.md"}
MEGABYTES = 40


def run(*command, stderr_too: bool = False, **options) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout + result.stderr * stderr_too


def finished(pattern: str) -> Path:
    (path,) = (ROOT / str(DIST)).glob(pattern)
    return path


def modules() -> set[str]:
    """The Python files of the package as they are named where it is installed."""
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "dmm_fast").rglob("*.py")}
    return found | {
        f"dmm_fast/{path.relative_to(ROOT)}" for room in ("kernels", "model") for path in (ROOT / room).glob("*.py")
    }


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Made of what is under version control, as in a clean clone."""
    if DIST:
        return finished("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    for name in run("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0"):
        if (ROOT / name).is_file():  # else it was just deleted
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=folder / "source")
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if DIST:
        return finished("*.whl")
    folder = tmp_path_factory.mktemp("wheel")
    from dmm_fast.ops.library import built_facts  # make wheel looks at wheels in a clone where nothing is built

    built = built_facts().get("cuda_architectures")  # what is compiled already is used again
    environment = {**os.environ, "DMM_CUDA_ARCHITECTURES": built} if built else None
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, ROOT, env=environment)
    (path,) = folder.glob("*.whl")
    return path


def test_contents(wheel):
    """One wheel for every Python 3; all modules of the package, the libraries and the weights; nothing of the tests."""
    assert wheel.name.startswith("dmm_fast-") and f"-py3-none-{'manylinux_2_28' if DIST else 'linux'}_" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert modules() <= names, modules() - names
    for needed in (
        "lib/libdmm_cpu.so",
        "lib/build.json",
        "training/small.yaml",
        "training/detail.yaml",
        "app/static/index.html",
        "app/static/style.css",
        "app/static/main.js",
        "py.typed",
        *(f"weights/{name}" for name in WEIGHTS),
    ):
        assert f"dmm_fast/{needed}" in names
    for needed in ("dmm-config.cmake", "dmm-config-version.cmake", "dmm/segmenter.h", "segmenter.cpp", "CMakeLists.txt"):
        assert f"dmm_fast/cpp/{needed}" in names
    assert not any("_runtime" in name or name.endswith("dmm-segment") for name in names), "compiled for one torch only"
    top = {name.split("/")[0] for name in names}
    assert len(top) == 2 and "dmm_fast" in top, top
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("/test" in name for name in names)
    assert wheel.stat().st_size < MEGABYTES * 1e6
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    required = {line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")}
    assert {line for line in required if "extra ==" not in line} == {"torch>=2.11", "numpy"}


def test_the_sdist_holds_all_that_a_build_needs(sdist):
    """Every source, the weights, no library that was built, no test. `make wheel` builds the wheel from it, without the network."""
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    tracked = set(run("git", "ls-files", cwd=ROOT).split())
    rooms = ("csrc/", "dmm_fast/", "kernels/", "model/", "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    sources = {name for name in tracked if name.startswith(rooms) and (ROOT / name).is_file()}
    assert sources <= names, sources - names
    assert not any(name.startswith(("tests/", "benchmarks/", "dmm_fast/lib")) for name in names)
    assert sdist.stat().st_size < MEGABYTES * 1e6


@pytest.mark.parametrize("name", ["libdmm_cpu.so", "libdmm_cuda.so"])
def test_libraries_load_from_glibc_2_28_on(name):
    """They ask for no newer symbol of the C and C++ libraries than manylinux_2_28 promises."""
    library = ROOT / "dmm_fast" / "lib" / name
    if not library.exists():
        pytest.skip(f"{name} is not built here")
    asked = re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)", run("objdump", "-T", library))
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
    assert asked and not [pair for pair in asked if tuple(map(int, pair[1].split("."))) > newest[pair[0]]]


@pytest.mark.parametrize("name", ["libdmm_cpu.so", "libdmm_cuda.so"])
def test_libraries_speak_the_stable_abi_only(name):
    """No symbol of Python, ATen, c10 or torch's C++ classes: that is what makes one binary last."""
    library = ROOT / "dmm_fast" / "lib" / name
    if not library.exists():
        pytest.skip(f"{name} is not built here")
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    foreign = [s for s in undefined if s.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at"))]
    assert not foreign, foreign


SEGMENTER = """
import sys
import dmm_fast, dmm_fast.inference.run
from dmm_fast.proposals.detector import packaged_detector
dmm_fast.Segmenter(proposer=packaged_detector())
heavy = {"torchvision", "timm", "matplotlib", "onnx", "tensorboard", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("words", [(ROOT / "tests" / "smoke.py", "layer"), ("-c", SEGMENTER)], ids=["layer", "segmenter"])
def test_a_start_imports_nothing_heavy(words):
    """The layer: torch and numpy. The segmenter and its packaged networks: neither torchvision nor timm, each slower than torch."""
    run(sys.executable, *words, cwd=ROOT)


@pytest.mark.parametrize("words", [("-m", "dmm_fast"), ("-m", "dmm_fast", "segment")], ids=["all", "segment"])
def test_help_needs_no_torch(words):
    told = run(sys.executable, "-X", "importtime", *words, "--help", cwd=ROOT, stderr_too=True)
    assert "usage: dmm-fast" in told and not re.search(r"\| +(torch|numpy|PIL)$", told, re.M)


def test_another_torch_in_a_bare_environment(wheel, tmp_path):
    """torch 2.13 without CUDA, Triton, torchvision or nvcc; the wheel was built against the torch of this environment."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    torch = subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0+cpu", "numpy"], capture_output=True, text=True)
    if torch.returncode:
        pytest.skip(f"the CPU build of torch 2.13.0 is not to be had here: {torch.stderr.strip().splitlines()[-1]}")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # pip would find dmm_fast there
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, env=environment)
    output = run(python, ROOT / "tests" / "smoke.py", "layer", cwd=tmp_path, env=environment)
    assert output.startswith("2.13.0+cpu") and str(tmp_path) in output


def test_a_missing_library_says_how_to_mend_it(tmp_path):
    copy = tmp_path / "dmm_fast" / "ops" / "library.py"
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / "dmm_fast" / "ops" / "library.py").read_text())
    result = subprocess.run([sys.executable, copy], capture_output=True, text=True)
    assert result.returncode and "libdmm_cpu.so is missing" in result.stderr and "pip install" in result.stderr


def test_a_build_goes_on_without_the_ninja_it_began_with(tmp_path):
    """pip installs ninja into an environment of the build, which it deletes; build/ stays and names it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ninja = shutil.which("ninja", path=path)
    if ninja is None:
        pytest.skip("there is no ninja")
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(dmm NONE)\ninstall(FILES setup.py DESTINATION .)\n"
    )
    gone, environment = tmp_path / "gone", {**os.environ, "PATH": path, "FORCE_CUDA": "0"}
    gone.symlink_to(ninja)
    run(
        "cmake",
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={gone}",
        "-S",
        tmp_path,
        "-B",
        tmp_path / "build" / "cpu",
        env=environment,
    )
    gone.unlink()
    run(sys.executable, "setup.py", "-q", "build_ext", cwd=tmp_path, env=environment)
    assert list(tmp_path.glob("build/lib*/dmm_fast/lib/build.json"))


def test_after_clean_everything_is_built_again(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for stamp in (".installed", ".built", ".runtime"):
        (tmp_path / ".venv" / stamp).touch()
    run("make", "clean", cwd=tmp_path)
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == [".installed"]  # pip's packages are still there


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
