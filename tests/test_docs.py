"""What the pages say is true: links lead somewhere, public names are documented, commands and snippets run.

A page's commands run from top to bottom in a folder that holds what the pages call by the same names everywhere: clip.mp4, frames/, first.png,
masks/, proposals.json, Annotations/clip, the data set DAVIS. Those in `NOT_RUN` are only given to the parser, which refuses unknown options and
values. A Python block runs after those before it on its page, unless a comment above it says why not: `<!-- not run: needs a stream -->`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from dmm_fast.model import Config, DMMNet, Proposals, save_weights
from dmm_fast.model.masks import mask_boxes
from PIL import Image

import dmm_fast
from dmm_fast.commands.main import _parser, main
from dmm_fast.data.masks import ids_to_masks, read_mask, write_mask
from dmm_fast.data.synthetic import Scene
from dmm_fast.data.video import VideoWriter, open_frames
from dmm_fast.proposals.coco import read_coco, write_coco
from dmm_fast.training.config import read_config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CARD = ROOT / "dmm_fast" / "weights" / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), CARD]
SIZE, FRAMES = (48, 80), 4

NOT_RUN = {
    r"camera:|rtsp:|udp:": "needs a camera or a stream",
    r"^dmm-fast app": "serves a page until it is stopped",
    r"^dmm-fast (train|train-proposals) (?!.*--show)": "needs a data set, and an hour; the settings are checked",
    r"^dmm-fast weights runs/": "needs what training wrote",
    r"--online": "learns for half a minute",
    r"--proposals torchvision": "downloads weights",
    r"detectron2:": "needs detectron2",
    r"hf:": "needs a model of the hub",
    r"--engine ray": "starts a cluster; its own tests do",
    r"detector\.safetensors": "needs a trained detector",
    r"--device cuda": "needs a GPU",
    r"^dmm-fast export --format (pt2|onnx) (?!.*--only match)": "compiles for minutes",
    r"^dmm-fast runtime --build": "compiles for a minute; make test does it before",
    r"^dmm-fast study": "studies for minutes",
    r"^dmm-fast doctor": "says what this machine lacks; its own tests run it",
    r"^dmm-fast demo": "made smaller, once, for the folder of every page",
}
OTHERS = {
    "apt-get",
    "cmake",
    "dmm-segment",
    "git",
    "hf",
    "make",
    "pip",
    "python",
    "ssh",
    "torchrun",
}  # programs beside dmm-fast


class Block(NamedTuple):
    language: str  # "sh" or "python"
    text: str
    excuse: str | None  # why it is not run

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command, without comments; continued lines are one command."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def blocks(page: Path) -> list[Block]:
    """The page's commands and Python, from top to bottom."""
    text = page.read_text()
    fences = re.finditer(
        r"^(?:<!-- not run: (?P<excuse>.+) -->\n)?```(?P<language>sh|python)\n(?P<text>.*?)^```$", text, re.M | re.S
    )
    return [Block(f["language"], f["text"], f["excuse"]) for f in fences]


def commands(page: Path) -> list[list[str]]:
    return [words for block in blocks(page) if block.language == "sh" for words in block.commands]


def ours(page: Path) -> list[list[str]]:
    return [words[1:] for words in commands(page) if words[0] == "dmm-fast"]


def reason(words: list[str]) -> str | None:
    command = shlex.join(["dmm-fast", *words])
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """What a heading can be reached by: lower case, punctuation gone, spaces as dashes."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M):
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        found.add(slug)
    return found | set(re.findall(r"^::: (\S+)", page.read_text(), re.M))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    """Files exist, headings too; the site's pages link to nothing outside docs/, which the site does not have."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert DOCS not in page.parents or DOCS in file.parents, f"{target}: is not on the site"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading, there are {sorted(anchors(file))}"


def test_every_page_is_in_the_navigation():
    mentioned = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert mentioned == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


# -------------------------------------------------------------------------------------------------------- public names

RUNTIME = "dmm_fast.runtime"  # the C++ module, built or not
DOORS = ["dmm_fast", "dmm_fast.proposals", "dmm_fast.model", "dmm_fast.export", "dmm_fast.data.clips"]
REFERENCE = set(re.findall(r"^::: (\S+)", "".join(p.read_text() for p in (DOCS / "reference").glob("*.md")), re.M))


def resolve(name: str) -> Any:
    home, _, last = name.rpartition(".")
    return getattr(importlib.import_module(home), last)


def spelled(name: str) -> str:
    """As the reference has it: a function called like its module, `match`, by its full name; the short one would show the module."""
    value = None if name == RUNTIME else resolve(name)
    home = getattr(value, "__module__", "") if inspect.isroutine(value) else ""
    return f"{home}.{value.__name__}" if home.endswith(f".{name.rpartition('.')[2]}") else name


PUBLIC = sorted({spelled(f"{door}.{name}") for door in DOORS for name in importlib.import_module(door).__all__} | REFERENCE)


def constants(module) -> set[str]:
    """Names of a module whose assignment is followed by a docstring."""
    body = ast.parse(inspect.getsource(module)).body
    documented = set()
    for node, after in itertools.pairwise(body):
        if (
            isinstance(node, ast.Assign | ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            documented |= {target.id for target in targets if isinstance(target, ast.Name)}
    return documented


def undocumented(name: str) -> list[str]:
    """`name` and its public methods, as far as they have no docstring of their own or of the class above."""
    if name == RUNTIME:
        return []
    value = resolve(name)
    if inspect.isclass(value):
        doc = value.__dict__.get("__doc__") or ""
        missing = [name] if not doc or doc.startswith(f"{value.__name__}(") else []  # what dataclass and NamedTuple make up
        for member, what in vars(value).items():
            function = what.fget if isinstance(what, property) else getattr(what, "__func__", what)
            if not member.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(getattr(value, member)):
                missing.append(f"{name}.{member}")
        return missing
    if inspect.isroutine(value) or inspect.ismodule(value):
        return [] if value.__doc__ else [name]
    home = name.rpartition(".")[0]
    sources = [importlib.import_module(m) for m in (home, *_modules_of(home))]
    return [] if any(name.rpartition(".")[2] in constants(module) for module in sources) else [name]


def _modules_of(package: str) -> list[str]:
    folder = Path(importlib.import_module(package).__file__).parent
    return [f"{package}.{file.stem}" for file in folder.glob("*.py") if file.stem != "__init__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented_and_in_the_reference(name):
    assert name in REFERENCE, "add it to a page of docs/reference"
    assert name == spelled(name)
    assert not undocumented(name)


def test_the_ops_are_those_of_the_package():
    """dmm_fast.ops is documented as dmm_fast."""
    for name in dmm_fast.ops.__all__:
        assert getattr(dmm_fast, name) is getattr(dmm_fast.ops, name) and name in dmm_fast.__all__


def test_what_the_pages_import_is_in_the_reference():
    imported = set()
    for page in PAGES:
        for block in blocks(page):
            for node in ast.walk(ast.parse(block.text)) if block.language == "python" else []:
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dmm_fast."):
                    imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert imported - {"dmm_fast.runtime.Segmenter"} <= REFERENCE, sorted(imported - REFERENCE)


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_parse(page, capsys):
    """Every command of the page as the real parser takes it, with settings that training knows; other programs by what they name."""
    for words in commands(page):
        while "=" in words[0]:  # FORCE_CUDA=1 pip install .
            words = words[1:]
        if words[0] == "torchrun":
            words = ["dmm-fast", *words[words.index("dmm_fast") + 1 :]]
        program = Path(words[0]).name
        if program == "dmm-fast":
            parsed(words[1:])
        elif program == "make":
            assert re.search(rf"^{words[1] if len(words) > 1 else 'demo'}:", (ROOT / "Makefile").read_text(), re.M), words
        elif program == "pip":
            wanted = set(",".join(re.findall(r"(?:\.|dmm_fast)\[([\w,]+)\]", " ".join(words))).split(",")) - {""}
            known = re.search(r"optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S).group(1)
            assert wanted <= set(re.findall(r"^(\w+) =", known, re.M)), words
        elif program == "python":
            assert words[1] in ("-m", "-c") or (ROOT / words[1]).exists(), words
        elif program == "dmm-segment":
            known = (ROOT / "csrc" / "runtime" / "main.cpp").read_text()
            assert all(f'"{word}"' in known or f"{word} " in known for word in words if word.startswith("--")), words
        else:
            assert program in OTHERS, f"{shlex.join(words)}: what is {program}?"


def parsed(words: list[str]):
    try:
        arguments = _parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"the parser refuses: dmm-fast {shlex.join(words)}")
    if words[0] == "train" and (settings := [word for word in words[2:] if "=" in word and not word.startswith("-")]):
        read_config(words[1], settings)
    return arguments


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_in_the_text_have_these_options(page):
    """`dmm-fast segment --dataset` in a sentence: the command exists, and so does the option."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    choices = _parser()._subparsers._group_actions[0].choices
    for line in re.findall(r"`(dmm-fast [^`]*)`", text):
        words = line.split()[1:]
        assert words[0] in choices or words[0].startswith("--"), line
        options = choices[words[0]]._option_string_actions if words[0] in choices else {}
        for option in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
            assert option in options, line


def test_nothing_is_excused_that_is_not_there():
    said = [shlex.join(["dmm-fast", *words]) for page in PAGES for words in ours(page)]
    assert not [pattern for pattern in NOT_RUN if not any(re.search(pattern, command) for command in said)]


# -------------------------------------------------------------------------------------------------- commands that run


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    """A clip of two objects under every name that the pages use."""
    folder = tmp_path_factory.mktemp("things")
    scene = Scene(7, size=SIZE)
    shots = [scene.render(time) for time in range(FRAMES)]
    found = {}
    for time, (frame, ids) in enumerate(shots):
        masks, scores = (torch.from_numpy(part) for part in scene.proposals(time))
        found[f"{time:05d}"] = Proposals(mask_boxes(masks), scores, masks)
        for place in ("frames", "DAVIS/JPEGImages/480p/bear"):
            save(folder / place / f"{time:05d}.jpg", frame)
        for place in ("Annotations/clip", "results/clip", "DAVIS/Annotations/480p/bear"):
            save(folder / place / f"{time:05d}.png", ids)
    save(folder / "first.png", shots[0][1])
    for time in (0, FRAMES - 1):
        save(folder / "masks" / f"{time:05d}.png", shots[time][1])
    write_coco(folder / "proposals.json", found, SIZE)
    (folder / "DAVIS" / "proposals").mkdir()
    shutil.copy(folder / "proposals.json", folder / "DAVIS" / "proposals" / "bear.json")
    (folder / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "DAVIS" / "ImageSets" / "2017" / "val.txt").write_text("bear\n")
    with VideoWriter(folder / "clip.mp4", SIZE, fps=12) as writer:
        for frame, _ in shots:
            writer.write(frame)
    save_weights(DMMNet(Config.preset("iou")), folder / "net.safetensors")
    assert main(["demo", "--out", str(folder / "demo"), "--frames", "3", "--preset", "iou", "--quiet"]) == 0
    return folder


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(path, picture) if picture.ndim == 2 else Image.fromarray(picture).save(path, quality=95)


@pytest.fixture
def here(things, tmp_path, monkeypatch) -> Path:
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(page: Path, here: Path) -> dict[str, Any]:
    """What snippets take for granted, as the text around them describes it."""
    video = [frame for _, frame in open_frames(here / "clip.mp4").read()]
    ids = read_mask(here / "first.png")
    boxes, scores, masks = read_coco(here / "proposals.json").frame("00001")
    names: dict[str, Any] = {
        "torch": torch, "np": np, "dmm_fast": dmm_fast, "cost": torch.rand(2, 5, 20), "c": 0.5, "n": torch.tensor([5, 3]), "m": torch.tensor([20, 9]),
        "template_costs": torch.rand(3, 2, 4), "link_costs": torch.rand(2, 4, 4),
        "video": video, "frame": video[0], "ids": ids, "masks": ids, "proposals": Proposals(boxes, scores, masks),
    }  # fmt: skip
    if page.name == "export.md":  # tensors in, as the network has them
        given = torch.from_numpy(ids_to_masks(ids)[1])
        names |= {
            "frame": torch.from_numpy(video[0]).permute(2, 0, 1),
            "masks": given,
            "valid": torch.ones(len(given), dtype=torch.bool),
        }
        names |= {name: names[name].numpy() for name in ("cost", "n", "m")}
    if page.name == "deploy.md":
        names |= {"boxes": boxes.numpy(), "scores": scores.numpy(), "masks": masks.numpy()}
    return names


def runs(block: Block) -> bool:
    return not block.excuse and (
        block.language == "python" or any(w[0] == "dmm-fast" and not reason(w[1:]) for w in block.commands)
    )


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs, blocks(page)))], ids=named)
def test_the_page_runs(page, here, capsys):
    known = names(page, here)
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(page), "exec")
            if not block.excuse:
                exec(block.text, known)
            continue
        for words in block.commands:
            if words[0] == "dmm-fast" and not reason(words[1:]):
                code = main(words[1:])
                assert code == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
