"""What docs/benchmarks.md says, from the files in docs/benchmarks alone: no clock, no machine, no figure of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from text import microseconds, table

DOCS = Path(__file__).resolve().parent.parent / "docs"
DATA, PAGE = DOCS / "benchmarks", DOCS / "benchmarks.md"

HEAD = """# Benchmarks

Speed against peers, accuracy against published results, and where others are better. The whole page is generated: figures come from the files in
`docs/benchmarks`, one per section, as the command above each table stored them; the closing paragraphs name every peer that was faster or better.
[How fast](performance.md) explains the figures, [How accurate](accuracy.md) the data.

```sh
pip install transformers omegaconf torch-linear-assignment    # peers that need not be there
make benchmarks                                               # all that needs no data, then this page
make benchmarks DATA=data PEERS='--peer cutie=Cutie'          # accuracy, and a clone of Cutie, too: seven minutes on two cores
python benchmarks/page.py measure layer                       # one section
python benchmarks/page.py gpu out/gpu_report/results.jsonl    # what gpu_report.py measured on a GPU
python benchmarks/page.py write                               # this page again
```

**A ratio is a peer's time over ours, measured in turns in the same run: above 1, ours is faster.** Layer, assignment and the steps around the layer were compared with the
peer's result or with the float64 reference before they were timed.
"""

# Published J on the validation set of DAVIS 2016; the other published figures are the paper's own tables.
DAVIS_2016 = {"SiamMask": 71.8, "OSMN": 74.0, "OSVOS": 79.8, "RGMP": 81.5, "OnAVOS": 86.2, "STM": 88.7}

CONTESTANTS = {  # of the layer, as rows
    "ours": "**`match`**",
    "Listing 1": "Listing 1, the paper's code",
    "batched eager": "batched PyTorch, eager",
    "compiled": "the same, each gradient step under `torch.compile`",
    "sinkhorn": "Sinkhorn, 50 rounds, eager (another answer)",
    "match_prices": "`match_prices` (ours too, another answer)",
}
KINDS = {"uniform": "uniform", "integers": "integers 0 to 9", "clustered": "clustered", "product": "i j, the longest paths"}
NAMES = {"linear assignment": "torch-linear-assignment", "sinkhorn": "Sinkhorn", "triton": "ours in Triton"}  # on a GPU
OURS = "dmm_fast"


class Section(NamedTuple):
    title: str
    text: Callable[[dict[str, Any]], Iterator[str]]


def page(folder: Path) -> str:
    """docs/benchmarks.md, from the stored files alone."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        path = folder / f"{name}.json"
        parts.append(f"## {section.title}\n")
        if not path.exists():
            parts.append(f"Not measured yet: `python benchmarks/page.py {'gpu' if name == 'gpu' else f'measure {name}'}`.\n")
            continue
        stored = json.loads(path.read_text())
        parts += [heading(stored), *(f"{text}\n" for text in section.text(stored))]
    return "\n".join(parts)


def heading(stored: dict[str, Any]) -> str:
    """Command, date, machine, versions: what every table stands under."""
    facts = dict(stored["machine"])
    where = [facts.pop("GPU", None), facts.pop("CPU", None), facts.pop("instructions", None)]
    ours = f"dmm_fast {facts.pop('dmm_fast')} at {facts.pop('commit')}"
    facts.pop("torch", None)  # among the versions
    where += [f"{name} {value}" for name, value in facts.items() if name != "CUDA library"]
    packages = [ours, *(f"{name} {value}" for name, value in stored["versions"].items())]
    lines = [f"`{stored['command']}`, {stored['date']}", ", ".join(filter(None, where)), ", ".join(packages)]
    return ". ".join(lines) + ".\n"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:,.0f}x"


def slower(rows: list[tuple[str, str, float]], more: str = "") -> str:
    """The closing paragraph, from (case, peer, ratio): every peer that was faster or hardly slower. more: what no ratio says."""
    lines = []
    for word, least, most in (("faster", 0, 0.98), ("hardly slower", 0.98, 1.1)):
        found: dict[str, list[str]] = {}
        for case, peer, ratio in rows:
            if least <= ratio < most:
                found.setdefault(peer, []).append(f"{case} ({times(ratio)})")
        lines += [f"- {peer} is {word}: {'; '.join(cases)}." for peer, cases in found.items()]
    lines = lines or ["- No peer is faster in any row."]
    return "\n".join(["**What is slower or worse.**", "", *lines, *([f"- {more}"] if more else [])])


def busy(stored: dict[str, Any]) -> Iterator[str]:
    """Where other work took part in wall-clock times."""
    facts = stored["machine"]
    if facts["load at the end"] > facts["threads"] + 1:
        yield (
            f"**The machine was busy: load {facts['load at the end']} on {facts['cores']} cores, of which this run was {facts['threads']}.** On a quiet machine all these times "
            "are shorter."
        )


def notes(stored: dict[str, Any]) -> Iterator[str]:
    if stored.get("notes"):
        yield "\n".join(f"- {note}" for note in stored["notes"])


# ---- sections ----


def layer(stored: dict[str, Any]) -> Iterator[str]:
    cases: dict[str, dict[str, tuple[float, float]]] = {}  # "B=1 forward": contestant: (us per problem, ratio)
    for row in stored["rows"]:
        case = cases.setdefault(f"B = {row['case'].partition(' B=')[2].replace('+', ' + ')}", {})
        if row["case"].startswith("match_prices"):
            case["match_prices"] = (row["us per problem"], 1 / row["ratio"])
        else:
            case["ours"] = (row["us per problem"], 1)
            case[row["peer"]] = (row["peer us per problem"], row["ratio"])
    yield "5 templates x 50 proposals, float32, 40 x 5 rounds; us of CPU time per problem on one thread, and the ratio."
    cells = [
        [label, *(cell_of(case.get(name), bare=name == "ours") for case in cases.values())]
        for name, label in CONTESTANTS.items()
        if any(name in case for case in cases.values())
    ]
    yield table(["", *cases], cells)
    yield (
        'Batched PyTorch gives the same answer. Listing 1 as printed carries Dykstra\'s corrections from step to step (`dykstra="carry"`), which is as much work. Sinkhorn solves another problem (entropic), `match_prices` the same as `match` in '
        "fewer rounds ([variants](variants.md)). The C library keeps freed memory, which favours the peers."
    )
    yield from notes(stored)
    yield slower(
        [(name, CONTESTANTS[peer].replace("**", ""), ratio) for name, case in cases.items() for peer, (_, ratio) in case.items() if peer != "ours"],
        "All ran on one thread. With more threads, batched PyTorch and `match` use them for a large batch. Compiling takes seconds for every new batch size; that is not counted.",
    )  # fmt: skip


def cell_of(found: tuple[float, float] | None, bare: bool = False) -> str:
    if found is None:
        return "-"
    us = microseconds(found[0] * 1e-6)
    return f"**{us}**" if bare else f"{us}, {times(found[1])}"


def assignment(stored: dict[str, Any]) -> Iterator[str]:
    grid: dict[str, dict[str, str]] = {}
    ratios = []
    for row in stored["rows"]:
        _, shape, kind, batch = row["case"].split()
        line = grid.setdefault(f"{shape.replace('x', ' x ')}, {batch[2:]}", {})
        line[kind] = line.get(kind, f"{microseconds(row['us per problem'] * 1e-6)}") + f", {times(row['ratio'])}"
        ratios.append((f"{shape} {kind}", row["peer"], row["ratio"]))
    peers = list(dict.fromkeys(row["peer"] for row in stored["rows"]))
    yield (
        f"`linear_assignment`, us of CPU time per problem on one thread, then the ratio to {' and to '.join(f'`{peer}`' for peer in peers)} "
        "looped over the batch. Total costs agreed."
    )
    yield table(
        ["n x m, batch", *(KINDS[kind] for kind in KINDS)],
        [[name, *(line.get(kind, "-") for kind in KINDS)] for name, line in grid.items()],
    )
    yield from notes(stored)
    yield slower(
        ratios,
        "torch-linear-assignment is made for GPUs. Ours has not run on one: its time there is [predicted](performance.md#on-a-gpu-predicted-not-measured).",
    )


def vision(stored: dict[str, Any]) -> Iterator[str]:
    yield (
        "CPU time of a call on one thread; then each peer's, and the ratio. Grids are the packaged network's; `paste_combine` takes 10 templates and 50 proposals "
        "at 854 x 480."
    )
    yield pairs(stored["rows"])
    yield from notes(stored)
    yield slower(
        ratios_of(stored["rows"]),
        "Peers that make whole masks (82 MB) depend on memory: from run to run, their times differ by up to a factor of two. Ours hardly change, so the ratios vary as much.",
    )


def ratios_of(rows: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    return [(row["case"].rpartition(", ")[0], row["peer"], row["ratio"]) for row in rows]


def pairs(rows: list[dict[str, Any]]) -> str:
    """A line for each case, its peers side by side."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        case = row["case"].rpartition(", ")[0]
        line = lines.setdefault(case, [case, milliseconds(row["us per problem"]), ""])
        line[2] += "; " * bool(line[2]) + f"{row['peer']} {milliseconds(row['peer us per problem'])}, {times(row['ratio'])}"
    return table(["case", "ours, ms", "peers: ms, ratio"], list(lines.values()))


def milliseconds(us: float) -> str:
    return f"{us * 1e-3:.3g}" if us < 1e6 else f"{us * 1e-3:,.0f}"


def rate(ms: float) -> str:
    return f"{1e3 / ms:.2g}" if ms > 10 else f"{1e3 / ms:.0f}"


def segmenter(stored: dict[str, Any]) -> Iterator[str]:
    rows = stored["rows"]
    counts = sorted({row["objects"] for row in rows})
    found = {(row["name"], row["input"], row["objects"]): row for row in rows}
    yield (
        "A frame of a generated 427 x 240 video, from the decoded frame to its masks on the host, median ms of wall-clock time, and the time as a multiple of "
        "ours with live proposals. Given proposals (50 a frame) come from a file, so finding them is not counted. **The peers' weights are random: time only.**"
    )
    header = ["", "network's input"]
    for count in counts:
        header += [f"{counted(count)}, ms", "frames/s", "of live"]
    cells = []
    for name, size in dict.fromkeys((row["name"], row["input"]) for row in rows):
        line = [f"**{name}**" if name.startswith(OURS) else name, size]
        for count in counts:
            row = found.get((name, size, count))
            line += [milliseconds(1e3 * row["ms"]), rate(row["ms"]), times(row["live"])] if row else ["-"] * 3
        cells.append(line)
    yield table(header, cells)
    yield (
        "1024 x 1024 is the default of SAM 2 and EdgeTAM, whatever the video's size; 320 x 320 has as many pixels as 427 x 240. The peers need no detector: compare "
        "them with live. Their memories were full."
    )
    yield from busy(stored)
    yield from notes(stored)
    others = [row for row in rows if not row["name"].startswith(OURS)]
    yield slower(
        [
            (f"{row['objects']} object{'s' * (row['objects'] > 1)}, live", f"{row['name']} at {row['input']}", row["live"])
            for row in others
        ]
        + [
            (f"{row['objects']} object{'s' * (row['objects'] > 1)}, given", f"{row['name']} at {row['input']}", row["given"])
            for row in others
        ],
        "Speed is not accuracy: SAM 2, EdgeTAM and Cutie were trained on far more video, and their published scores are well above DMM-Net's.",
    )


def gpu(stored: dict[str, Any]) -> Iterator[str]:
    yield (
        "**An older commit, before today's packaged weights.** The exact assignment, `unmatched_cost`, the ops of the grid, several videos at once and all "
        "later fixes have not run on a GPU ([what, and what is predicted](performance.md#gpu))."
    )
    rows = stored["layer"]
    for row in rows:
        row["peers"] = {NAMES.get(name, name): each for name, each in row["peers"].items()}
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    for backward in (False, True):
        shown = [row for row in rows if row["backward"] == backward]
        using = [name for name in names if any(name in row["peers"] for row in shown)]
        yield f"The layer, 5 x 50, 40 x 5, {'forward and backward' if backward else 'forward'}: us, and the ratio to our call (graphs: to our kernels)."
        cells = []
        for row in shown:
            line = [f"{row['batch']}", microseconds(row["kernel"]), microseconds(row["call"])]
            for name in using:
                each = row["peers"].get(name)
                line.append(f"{microseconds(each['time'])}, {times(each['ratio'])}" if each else "-")
            cells.append(line)
        yield table(["B", "ours, kernels", "ours, call", *using], cells)
    ratios = [
        (row["case"], name, each["ratio"]) for row in rows for name, each in row["peers"].items() if name != "match_prices"
    ]
    for row in stored["memory"]:
        yield f"Peak memory of {row['case']}: {row['ours'] / 1e6:.0f} MB; batched eager {row['batched eager'] / 1e6:,.0f} MB."
    if stored["frames"]:
        yield "A frame of the packaged network, ms of wall-clock time; the peers have random weights: time only."
        lines = [(row["size"], row["objects"], f"**{OURS}**, {way_of(row)}", row["ms"]) for row in stored["frames"]]
        lines += [(row["size"], row["objects"], row["name"], row["ms"]) for row in stored["peers"]]
        lines.sort(key=lambda line: (line[0][0], line[1], line[3]))
        yield table(
            ["", "frame", "objects", "ms"], [[name, f"{w}x{h}", f"{count}", f"{ms:.1f}"] for (h, w), count, name, ms in lines]
        )
        ratios += list(rivals(stored["frames"], stored["peers"]))
    if stored["vision"]:
        yield "The steps around the layer, device time with cold caches."
        yield pairs(stored["vision"])
        ratios += ratios_of(stored["vision"])
    yield from notes(stored)
    yield slower(ratios, "`match_prices` is mostly faster than `match`, but it is ours too and gives another answer.")


def rivals(frames: list[dict[str, Any]], peers: list[dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """Every frame of ours against each peer's of that height with as many objects, or, where there is none, with the most below that."""
    for row in frames:
        near: dict[str, dict[str, Any]] = {}
        for peer in sorted(peers, key=lambda peer: peer["objects"]):
            if peer["size"][0] == row["size"][0] and peer["objects"] <= row["objects"]:
                near[peer["name"]] = peer
        what = f"{row['size'][1]}x{row['size'][0]}, {counted(row['objects'])}, {way_of(row)}"
        for name, peer in near.items():
            with_fewer = f", with {counted(peer['objects'])}," if peer["objects"] < row["objects"] else ""
            yield what, f"{name}{with_fewer}", peer["ms"] / row["ms"]


def way_of(frame: dict[str, Any]) -> str:
    return ", ".join([frame["proposals"], frame["kind"], *[frame["dtype"]] * (frame["dtype"] != "float32")])


def counted(objects: int) -> str:
    return f"{objects} object{'s' * (objects > 1)}"


OWN = ("given", "live", "detail given", "detail live")  # of the ways that are measured, those with a network


def accuracy(stored: dict[str, Any]) -> Iterator[str]:
    rows = stored["rows"]
    worse: list[str] = []  # whose J is better than ours
    cost: list[str] = []  # what live proposals lose
    captions = {
        "held out": "**Five DAVIS 2016 videos, 427 x 240, that no training has seen.** J / F of the inner frames, as DAVIS scores.",
        "objects": "**Two clips by object**, at full size.",
        "foreground": "**Two clips at 854 x 480, all objects scored as one, beside the published masks of other systems**, scored by the same evaluator. "
        "DMM-Net has two objects to follow, the others one.",
    }
    for kind, caption in captions.items():
        some = [row for row in rows if row["set"] == kind]
        if not some:
            continue
        yield caption
        videos = list(dict.fromkeys(row["video"] for row in some))
        ways = list(dict.fromkeys(row["way"] for row in some))
        found = {(row["way"], row["video"]): row for row in some}
        cells = []
        for way in ways:
            scores = [found[way, video] for video in videos if (way, video) in found]
            mean = [sum(row[name] for row in scores) / len(scores) for name in ("J", "F")]
            cells.append(
                [f"**{way}**" if way.startswith(OURS) else way, *(score(row["J"], row["F"]) for row in scores), score(*mean)]
            )
        yield table(["", *(f"{video} ({found[ways[0], video]['objects']})" for video in videos), "mean"], cells)
        ours = {
            way: {video: found[f"{OURS}, {way}", video]["J"] for video in videos} for way in OWN if f"{OURS}, {way}" in ways
        }
        given, live = ours["given"], ours["live"]
        for way in ways:
            if way.removeprefix(f"{OURS}, ") in OWN:
                continue
            for video in videos:
                theirs = found[way, video]["J"]
                better = [f"{name} {score(own[video])}" for name, own in ours.items() if theirs > own[video]]
                worse += [f"{way} on {video} ({score(theirs)}; {', '.join(better)})"] if better else []
        lost = [
            f"{video} ({score(given[video])} to {score(live[video])})" for video in videos if live[video] < given[video] - 0.01
        ]
        cost += lost
    speed = ", ".join(f"{way} {value:.1f}" for way, value in stored["frames/s"].items())
    yield f"Frames per second on the five videos, from decoding to writing, in the same run: {speed}."
    yield from busy(stored)
    yield from notes(stored)
    yield from published()
    lines = [f"- A better J than ours: {line}." for line in worse]
    lines += [f"- With live proposals, J is more than .01 lower than with given ones on {', '.join(cost)}."] if cost else []
    lines.append(
        "- The packaged network is small and was trained on 25 videos. The paper's own networks must be trained first: their rows are not reproduced here."
    )
    yield "\n".join(["**What is slower or worse.**", "", *lines])


def score(*values: float) -> str:
    return " / ".join(f"{value:.3f}".removeprefix("0") for value in values)


def published() -> Iterator[str]:
    """The paper's tables side by side, and DAVIS 2016: other videos than ours."""
    from dmm_fast.inference.benchmark import SOURCE, TABLES

    columns = {
        "DAVIS 2017 J": (2, "J"),
        "F": (2, "F"),
        "YouTube-VOS G": (1, "G"),
        "SegTrack v2 mIoU*": (3, "mIoU*"),
        "mIoU†": (3, "mIoU†"),
    }
    lines: dict[str, dict[str, float | None]] = {}
    for name, (number, column) in columns.items():
        for method, online, values in TABLES[number].rows:
            key = f"{method}, online" if online else method
            lines.setdefault(key, {})[name] = values[TABLES[number].columns.index(column)]
    for method, j in DAVIS_2016.items():
        key = f"{method}, online" if method in ("OSVOS", "OnAVOS") else method
        lines.setdefault(key, {})["DAVIS 2016 J"] = j
    header = ["DAVIS 2016 J", *columns]
    cells = [
        [
            f"**{method}**" if method.startswith("DMM-Net") else method,
            *("-" if line.get(name) is None else f"{line[name]:.1f}" for name in header),
        ]
        for method, line in sorted(lines.items(), key=lambda item: item[0].lower())
    ]
    yield (
        "**Published, on validation sets that are not here.** None of it was measured here, and no row can be compared with ours above: the videos differ. "
        "`dmm-fast benchmark` makes our row if you have the data ([how](datasets.md))."
    )
    yield table(["percent", *header], cells)
    yield f"{SOURCE}, Tables 1 to 3; DAVIS 2016 as the methods' authors published it."


SECTIONS = {
    "layer": Section("The layer, on a CPU thread", layer),
    "assignment": Section("Exact assignment, on a CPU thread", assignment),
    "vision": Section("The steps around the layer, on a CPU thread", vision),
    "segmenter": Section("The segmenter, on a CPU", segmenter),
    "gpu": Section("On a GPU", gpu),
    "accuracy": Section("Accuracy", accuracy),
}
