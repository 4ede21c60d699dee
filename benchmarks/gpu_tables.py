"""From results.jsonl of gpu_report.py to Markdown: ``python benchmarks/gpu_tables.py DIR``. Needs nothing installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from text import microseconds as us
from text import table

NAME = "performance_gpu.md"


def read_results(out: Path) -> list[dict]:
    """The rows so far."""
    return read_rows(out / "results.jsonl")


def read_rows(path: Path) -> list[dict]:
    """Rows of a file that may not exist yet, without one that a killed process left half written."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "table" in row:
            rows.append(row)
    return rows


def append_row(out: Path, row: dict) -> None:
    """In one write, as others append too; on a line of its own, whatever the last one lacks."""
    with (out / "results.jsonl").open("a+b") as results:
        end = results.seek(0, 2)
        results.seek(max(end - 1, 0))
        torn = end > 0 and results.read(1) != b"\n"
        results.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def check_machine(out: Path, **facts: str | None) -> None:
    """SystemExit where the rows so far are of another commit or GPU: a row itself does not say of which it is."""
    for row in read_results(out):
        if row["table"] == "machine" and any(row.get(key) != value for key, value in facts.items()):
            theirs = {key: row.get(key) for key in facts}
            raise SystemExit(f"{out}: its rows are of {described(theirs)}, this is {described(facts)}: choose another --out")


def machine_of(path: Path, rows: list[dict]) -> dict:
    """What the rows of a file belong to. SystemExit where they do not say, or are of several commits."""
    machines = [{key: value for key, value in row.items() if key != "table"} for row in rows if row["table"] == "machine"]
    commits = {row["commit"] for row in machines}
    if len(commits) != 1:
        raise SystemExit(f"{path}: rows of {len(commits)} commits, not of one: is it results.jsonl of gpu_report.py?")
    return machines[-1]


def described(facts: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def merged(rows: list[dict]) -> list[dict]:
    """One row per case of the layer: peers measured in a later part of the plan join the first."""
    cases: dict[str, dict] = {}
    for row in rows:
        if row["table"] == "match":
            kept = cases.setdefault(row["case"], row)
            kept["peers"].update(row["peers"])
            kept["skipped"].update(row["skipped"])
    return list(cases.values())


def render(out: Path) -> str:
    """Everything measured so far; also written to performance_gpu.md."""
    rows = read_results(out)
    machines = [row for row in rows if row["table"] == "machine"]
    texts = ["; ".join(f"{key} {value}" for key, value in row.items() if key != "table") + "." for row in machines]
    for section in (steps, parts, videos, compiled, decisions, layer, peers, memory, vision, refused):
        try:
            texts += section(rows)
        except (KeyError, TypeError, ValueError) as error:  # rows of another version of this script: the other tables count
            texts.append(f"{section.__name__}: no table, {type(error).__name__}: {error}")
    text = "\n\n".join(texts) + "\n"
    (out / NAME).write_text(text)
    return text


def steps(rows: list[dict]) -> Iterator[str]:
    """Whole frames of a segmenter, given and live proposals."""
    found = [row for row in rows if row["table"] == "step"]
    if not found:
        return
    yield "A frame of the packaged network, ms (median); wall-clock, the GPU waited for after every frame."
    header = ["frame", "objects", "proposals", "", "ms", "p99", "frames/s", "memory grown"]
    cells = [
        [f"{row['size'][1]}x{row['size'][0]}", str(row["objects"]), row["proposals"], f"{row['kind']}, {row['dtype']}",
         f"{row['ms']:.2f}", f"{row['p99']:.2f}", f"{1e3 / row['ms']:.0f}", f"{row['grown']} B in {row['frames']}"]
        for row in found
    ]  # fmt: skip
    yield table(header, cells)


def parts(rows: list[dict]) -> Iterator[str]:
    """A live frame part by part, sizes side by side."""
    found = [row for row in rows if row["table"] == "parts"]
    if not found:
        return
    names = list(dict.fromkeys(name for row in found for name in row["seconds"]))
    yield "A live frame part by part, 3 objects, 50 proposals, us: kernels alone (graph replay), then the whole eager call."
    header = [text for row in found for text in (f"{row['size'][1]}x{row['size'][0]}", "call")]
    cells = [
        [name, *(us(row["seconds"].get(name, {}).get(way)) for row in found for way in ("kernel", "call"))] for name in names
    ]
    yield table(["", *header], cells)


def videos(rows: list[dict]) -> Iterator[str]:
    """Several videos at once in one process."""
    found = [row for row in rows if row["table"] == "videos"]
    if not found:
        return
    yield "Videos at once in one process, 3 objects and 50 proposals each: frames per second, summed."
    cells = [
        [f"{row['size'][1]}x{row['size'][0]}", row["proposals"], f"{row['videos']}", f"{row['frames'] / row['seconds']:.0f}"]
        for row in found
    ]
    yield table(["frame", "proposals", "videos", "frames/s"], cells)


def decisions(rows: list[dict]) -> Iterator[str]:
    """Ways to decide, from a cost on the device to an answer on the device."""
    found = [row for row in rows if row["table"] == "decisions"]
    if not found:
        return
    names = list(dict.fromkeys(name for row in found for name in row["seconds"]))
    yield "Decisions, 5x50, us per problem, the copy to the host and back included where there is one."
    cells = [[f"{row['batch']}", *(us(row["seconds"].get(name)) for name in names)] for row in found]
    yield table(["B", *names], cells)


def layer(rows: list[dict]) -> Iterator[str]:
    """The layer alone: kernels, calls, limits."""
    match = merged(rows)
    forward = {_key(row): row for row in match if not row["backward"]}
    backward = {_key(row): row for row in match if row["backward"]}
    for setting in dict.fromkeys((row["n_grad"], row["n_proj"]) for row in match):
        keys = [key for key in dict.fromkeys([*forward, *backward]) if key[3:] == setting]
        cells = []
        for key in keys:
            line = [f"{key[1]}x{key[2]}", f"{key[0]}"]
            for row in (forward.get(key), backward.get(key)):
                share = f"{row['limit'] / row['kernel']:.0%}" if row and row["limit"] else "-"
                line += [us(row["kernel"]), us(row["call"]), us(row["limit"]), share] if row else ["-"] * 4
            cells.append(line)
        header = ["n x m", "B", "forward", "call", "limit", "share", "with backward", "call", "limit", "share"]
        setting = f"{setting[0]}x{setting[1]}"
        yield f"Ours at {setting}, us: kernels alone (graph replay), whole eager call, predicted limit and its share."
        yield table(header, cells)


def _key(row: dict) -> tuple[int, ...]:
    return tuple(row[name] for name in ("batch", "n", "m", "n_grad", "n_proj"))


def peers(rows: list[dict]) -> Iterator[str]:
    """The layer's peers, and what was not run and why."""
    match = merged(rows)
    for backward in (False, True):
        shown = [row for row in match if row["backward"] == backward and row["peers"]]
        if not shown:
            continue
        names = list(dict.fromkeys(peer for row in shown for peer in row["peers"]))
        cells = []
        for row in shown:
            line = [f"{row['n']}x{row['m']} {row['n_grad']}x{row['n_proj']}", f"{row['batch']}", us(row["call"])]
            found = [row["peers"].get(peer) for peer in names]
            cells.append(line + [f"{us(each['time'])} ({each['ratio']:,.1f}x)" if each else "-" for each in found])
        title = "Forward and backward" if backward else "Forward"
        yield f"{title}, us per call; in brackets the ratio to ours in the same run (graphs against ours as a graph)."
        yield table(["n x m", "B", "ours", *names], cells)
    skipped = {f"{peer}: {row['case']}: {why}" for row in match for peer, why in row["skipped"].items()}
    if reasons := sorted(reason for reason in skipped if any(word in reason for word in (" GB", "would take", "memory"))):
        yield "Not run:\n" + "\n".join(f"- {reason}" for reason in reasons)


def memory(rows: list[dict]) -> Iterator[str]:
    for row in rows:
        if row["table"] == "memory":
            sizes = {key: value for key, value in row.items() if isinstance(value, int)}
            yield f"Peak memory of {row['case']}, beyond its inputs (outputs: X and the gradient of the cost)."
            yield table(["", "MB"], [[key, f"{value / 1e6:,.1f}"] for key, value in sizes.items()])


def vision(rows: list[dict]) -> Iterator[str]:
    found = [row for row in rows if row["table"] == "vision"]
    if found:
        yield "Mask IoU, Eq. 8, and to and from the grid.\n\n" + found[-1]["text"]


def compiled(rows: list[dict]) -> Iterator[str]:
    for row in rows:
        if row["table"] == "pt2":
            yield (
                f"The packaged network exported as {row['kind']} in {row['seconds']:.0f} s: {row['ms']:.2f} ms a step "
                f"(median of {row['frames']}, {row['size'][1]}x{row['size'][0]}, 3 objects, soft; other stages ran beside it)."
            )


def refused(rows: list[dict]) -> Iterator[str]:
    """What failed, and what the time did not suffice for."""
    done = {(row.get("name"), row["case"]) for row in rows if row["table"] in ("match", "step", "parts")}
    failed = {row["case"]: row["error"] for row in rows if row["table"] == "failed"}
    failed = {case: error for case, error in failed.items() if case not in {case for _, case in done}}
    if failed:
        lines = [f"- {case}: {error}" for case, error in list(failed.items())[:10]]
        yield f"REFUSED, {len(failed)} cases, the first of them:\n" + "\n".join(lines)
    cut = {row["name"]: row["case"] for row in rows if row["table"] == "cut" and (row["name"], row["case"]) not in done}
    if cut:
        yield "Cut for time:\n" + "\n".join(f"- {name}: from {case} on" for name, case in cut.items())


if __name__ == "__main__":
    print(render(Path(sys.argv[1])))
