"""Study: how do the videos of a data set go faster with more processes, and what does a lost machine cost?

    python benchmarks/cluster.py DATASET [--proposals DIR] [--videos 8] [--frames 24] [--work build/cluster]      (make cluster)

DATASET: plain folders with `JPEGImages/VIDEO` and `Annotations/VIDEO`. Takes the first frames of some videos and segments them with the
packaged network by one process, by 1 and 2 processes of torchrun and by a Ray cluster of 1 and of 2 machines with a core each, all on this
machine; then more and longer ones, matching on mask overlap alone, by a cluster of 4 machines of which a worker and a machine are killed in
the middle. Every outcome must be that of one process, byte by byte. What more processes than cores would do is computed: see `model`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from dmm_fast.inference.folder import SHEET
from dmm_fast.inference.on_ray import OnRay
from dmm_fast.inference.sets import SetJob, segment_set

MADE = "made-by-cluster.py"  # in a folder that this script may delete


def cut(source: Path, to: Path, videos: int, frames: int) -> None:
    """The first frames of some videos; they differ in length as videos do, from a half of `frames` to all."""
    names = sorted(path.name for path in (source / "JPEGImages").iterdir())[:videos]
    for place, name in enumerate(names):
        count = frames // 2 + (frames - frames // 2) * (place + 1) // len(names)
        for frame in sorted((source / "JPEGImages" / name).iterdir())[:count]:
            for part, file in (("JPEGImages", frame), ("Annotations", source / "Annotations" / name / f"{frame.stem}.png")):
                if file.exists():
                    (to / part / name).mkdir(parents=True, exist_ok=True)
                    (to / part / name / file.name).symlink_to(file.resolve())


def make_anew(work: Path) -> None:
    """An empty folder; SystemExit where there is one with things in it that are not of this script."""
    if work.exists() and any(work.iterdir()) and not (work / MADE).exists():
        raise SystemExit(
            f"cluster.py: {work} is not empty and was not made by this script: choose another --work, or delete it"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / MADE).touch()


def masks(out: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.glob("*/*.png") if path.name != SHEET}
    assert found, f"{out}: no masks"
    return found


def by_command(job: SetJob, processes: int) -> dict[str, Any]:
    """The command as a user gives it; with torchrun if there are many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *launcher, "-m", "dmm_fast", "segment", "--dataset", job.dataset, "--proposals", job.proposals,
               "--out", job.out, "--quiet"]  # fmt: skip
    subprocess.run(command, check=True)
    return json.loads((Path(job.out) / "summary.json").read_text())


class Cluster:
    """Machines of Ray's on this one, with a core each, and a head that does no videos."""

    def __init__(self, machines: int):
        from ray.cluster_utils import Cluster as Local

        small = {"object_store_memory": 80 << 20}
        self.all = Local(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        self.machines = [self.all.add_node(num_cpus=1, **small) for _ in range(machines)]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: Any) -> None:
        self.all.shutdown()

    def workers(self) -> dict[int, Any]:
        """The processes that are in a video, with their machines."""
        machines = {node.all_processes["raylet"][0].process.pid: node for node in self.machines}
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                busy = any(link.readlink().name == "rows.jsonl" for link in (stat.parent / "fd").iterdir())
            except OSError:  # it has ended
                continue
            if busy and parent in machines:
                found[int(stat.parent.name)] = machines[parent]
        return found

    def kill(self, told: list[str]) -> None:
        """A process in a video, then the machine of another that is in one."""
        while not (found := self.workers()):
            time.sleep(0.01)
        victim = next(iter(found))
        os.kill(victim, signal.SIGKILL)
        told.append("a worker")
        while not (found := self.workers()) or victim in found:
            time.sleep(0.01)
        self.all.remove_node(next(iter(found.values())), allow_graceful=False)
        told.append("a machine")


def model(seconds: list[float], start: float, processes: int) -> float:
    """Seconds that so many processes take: a process starts in `start`, then whoever is done takes the longest video that is left. What
    they share is left out: the storage, a machine's memory bandwidth."""
    free = [start] * processes
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--proposals", type=Path, help="a folder of NAME.json (default: DATASET/proposals)")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("build/cluster"))
    a = parser.parse_args()
    proposals = a.proposals or a.dataset / "proposals"
    make_anew(a.work)
    cut(a.dataset, a.work / "data", a.videos, a.frames)
    cut(a.dataset, a.work / "more", 4 * a.videos, 2 * a.frames)

    def job(out: str, data: str = "data", **options: Any) -> SetJob:
        return SetJob(str(a.work / data), str(a.work / out), proposals=str(proposals), options=options)

    print("| | videos | wall, s | frames/s | load before |\n|---|--:|--:|--:|--:|", flush=True)

    def row(name: str, out: str, run: Any, like: str) -> dict[str, Any]:
        load, began = os.getloadavg()[0], time.perf_counter()
        summary = run()
        wall = time.perf_counter() - began
        assert not summary["failed"] and masks(a.work / out) == masks(a.work / like), f"{name}: not what one process makes"
        frames, inside = summary["frames"], summary["processes"]["seconds"]
        print(f"| {name} | {len(summary['videos'])} | {wall:.1f} | {frames / inside:.2f} | {load:.0f} |", flush=True)
        return summary | {"wall": wall}

    one = row("one process", "one", lambda: by_command(job("one"), 0), "one")
    for count in (1, 2):
        row(f"torchrun, {count}", f"torchrun{count}", lambda count=count: by_command(job(f"torchrun{count}"), count), "one")
    for count in (1, 2):
        with Cluster(count) as cluster:
            engine = OnRay(cluster.all.address)
            row(f"Ray, {count}", f"ray{count}", lambda count=count: segment_set(job(f"ray{count}"), engine=engine), "one")
    segment_set(job("iou", "more", preset="iou"))
    killed: list[str] = []
    with Cluster(4) as cluster:
        threading.Thread(target=cluster.kill, args=(killed,), daemon=True).start()
        run = lambda: segment_set(job("killed", "more", preset="iou"), engine=OnRay(cluster.all.address), progress=True)  # noqa: E731
        row("Ray, 4, overlap alone, a worker and a machine killed", "killed", run, "iou")
    assert killed == ["a worker", "a machine"], f"killed in time: {killed}"

    rate = one["frames"] / sum(one["seconds"].values())
    start = one["wall"] - sum(one["seconds"].values())
    lengths = [len(list(video.iterdir())) for video in (a.dataset / "JPEGImages").iterdir()]
    each = [length / rate for length in lengths]
    print(f"\nThe model, for all {len(lengths)} videos of the data set, {min(lengths)} to {max(lengths)} frames, at {rate:.2f} frames/s, "
          f"{start:.0f} s to start:\n\n| processes | times one |\n|--:|--:|")  # fmt: skip
    for count in (1, 2, 4, 8, 16, 32, 64):
        print(f"| {count} | {model(each, start, 1) / model(each, start, count):.1f} |")


if __name__ == "__main__":
    main()
