"""The plots of docs/performance.md: time against batch, time against n x m, ratio to peers.

    python benchmarks/plots.py cpu                   measures this machine's CPU for a minute, draws docs/plots/cpu.svg
    python benchmarks/plots.py gpu RESULTS.jsonl     draws docs/plots/gpu.svg from what gpu_report.py wrote

What was measured is kept beside the plot as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "plots"
# One colour per contestant in every panel; a direction is a line style.
COLOURS = {
    "ours": "#0072b2",
    "batched eager": "#d55e00",
    "batched eager, graph": "#e69f00",
    "compiled": "#009e73",
    "compiled, graph": "#56b4e9",
    "sinkhorn": "#cc79a7",
    "linear assignment": "#999999",
    "triton": "#f0e442",
    "limit": "#000000",
}
CPU_BATCHES = [1, 4, 16, 64, 256, 1024]


def measure_cpu() -> dict:
    """Rows like those of ``bench_match.measure_gpu``: ours in ``kernel`` and ``call``, batched eager as the peer."""
    import core
    from bench_match import SHAPES, Case, batched, limit, ours, validate

    cases = [Case(batch) for batch in CPU_BATCHES] + [Case(256, n, m) for n, m in SHAPES if (n, m) != (5, 50)]
    rows = []
    with core.one_thread():
        for case in [*cases, *(Case(case.batch, case.n, case.m, backward=True) for case in cases)]:
            validate(case, ours(case))
            functions = {"ours": case.call(ours(case)), "batched eager": case.call(batched(case))}
            times = core.medians(core.compare(functions, core.cpu_time, rounds=3))
            peer = {"time": times["batched eager"], "ratio": times["batched eager"] / times["ours"]}
            sizes = {key: getattr(case, key) for key in ("batch", "n", "m", "n_grad", "n_proj", "backward")}
            timed = {"kernel": times["ours"], "call": times["ours"], "limit": limit(case)}
            rows.append({**sizes, **timed, "peers": {"batched eager": peer}})
    return {"machine": core.machine("cpu"), "unit": "s", "rows": rows}


def read_gpu(path: Path) -> dict:
    from gpu_tables import machine_of, merged, read_rows

    rows = read_rows(path)
    kept = [row for row in merged(rows) if row["n_grad"] == 40]
    return {"machine": machine_of(path, rows), "unit": "s", "rows": kept}


def draw(data: dict, path: Path) -> None:
    rows, machine = data["rows"], data["machine"]
    sizes = {row["batch"] for row in rows if (row["n"], row["m"]) != (5, 50)}
    batch = max(sizes & {256, 4096} or sizes or {1})
    figure, (by_batch, by_size, ratios) = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")

    def line(axes, rows, x, y, name, backward):
        points = sorted((x(row), y(row)) for row in rows if y(row))
        label = f"{name}{', with backward' if backward else ''}"
        style = dict(color=COLOURS.get(name, "#7f7f7f"), linestyle="--" if backward else "-", linewidth=1.6)
        if points:
            axes.plot(*zip(*points), marker="" if name == "limit" else "o", markersize=3.5, label=label, **style)

    def peer(name, key):
        return lambda row: row["peers"].get(name, {}).get(key)

    for backward in (False, True):
        chosen = [row for row in rows if row["backward"] == backward]
        paper = [row for row in chosen if (row["n"], row["m"]) == (5, 50)]
        shapes = [row for row in chosen if row["batch"] == batch]
        names = [name for name in COLOURS if any(name in row["peers"] for row in paper)]
        for axes, part, x in ((by_batch, paper, lambda r: r["batch"]), (by_size, shapes, lambda r: r["n"] * r["m"])):
            line(axes, part, x, lambda row: row["kernel"] / row["batch"] * 1e6, "ours", backward)
            line(axes, part, x, lambda row: row["limit"] and row["limit"] / row["batch"] * 1e6, "limit", backward)
        for name in names:
            line(by_batch, paper, lambda r: r["batch"],
                 lambda row: (peer(name, "time")(row) or 0) / row["batch"] * 1e6, name, backward)  # fmt: skip
            line(ratios, paper, lambda r: r["batch"], peer(name, "ratio"), name, backward)

    titles = (
        "5 x 50, 40 x 5: time per problem",
        f"B = {batch}, 40 x 5: time per problem",
        "5 x 50, 40 x 5: peer over ours",
    )
    for axes, title in zip((by_batch, by_size, ratios), titles):
        axes.set(title=title, xscale="log", yscale="log", xlabel="batch", ylabel="us")
        axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    by_size.set_xlabel("n x m")
    ratios.set_ylabel("ratio")
    handles = {label: handle for axes in (by_batch, by_size) for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(
        f"{machine.get('GPU', machine.get('CPU'))}, torch {machine['torch']}, dmm_fast at {machine['commit']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=("cpu", "gpu"))
    parser.add_argument("results", type=Path, nargs="?", help="gpu: results.jsonl of gpu_report.py; cpu: draw this JSON again")
    args = parser.parse_args()
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dmm_fast", "font.size": 9})
    if args.device == "gpu" and args.results is None:
        parser.error("gpu needs the results.jsonl that gpu_report.py wrote")
    if args.device == "gpu":
        data = read_gpu(args.results)
    else:
        data = json.loads(args.results.read_text()) if args.results else measure_cpu()
    draw(data, FOLDER / f"{args.device}.svg")


if __name__ == "__main__":
    main()
