"""Many processes: what they make of a data set is what one makes, also where processes and machines are killed in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch

from dmm_fast.commands.main import main
from dmm_fast.inference import on_torchrun
from dmm_fast.inference.demo import make_clip
from dmm_fast.inference.engines import check_shared, running_in
from dmm_fast.inference.folder import REPORT, SHEET, RunError, settle, take
from dmm_fast.inference.on_ray import OnRay
from dmm_fast.inference.passes import Interrupted
from dmm_fast.inference.proposal_sets import ProposalsJob, propose_set
from dmm_fast.inference.sets import SetJob, segment_one, segment_set
from dmm_fast.inference.videos import open_engine

LENGTHS = {"ant": 6, "bee": 150, "cat": 8, "dog": 150}  # two are long enough to be caught in the middle


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Four videos; frames of one made clip, again and again."""
    root = tmp_path_factory.mktemp("zoo")
    make_clip(root / "clip", seed=3, frames=6, size=(48, 80))
    found = json.loads((root / "clip/proposals/koi.json").read_text())
    (root / "proposals").mkdir()
    for name, length in LENGTHS.items():
        images, masks, entries = root / "data/JPEGImages" / name, root / "data/Annotations" / name, []
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        shutil.copyfile(root / "clip/Annotations/koi/00000.png", masks / "00000.png")
        for index, frame in enumerate(islice(cycle([0, 1, 2, 3, 4, 5, 4, 3, 2, 1]), length)):
            (images / f"{index:05d}.jpg").symlink_to(root / f"clip/JPEGImages/koi/{frame:05d}.jpg")
            entries += [e | {"image_id": f"{index:05d}"} for e in found if int(e["image_id"]) == frame]
        (root / "proposals" / f"{name}.json").write_text(json.dumps(entries))
    return root


def job(zoo, out, **more):
    return SetJob(str(zoo / "data"), str(out), proposals=str(zoo / "proposals"), options={"preset": "iou"}, **more)


@pytest.fixture(scope="module")
def alone(zoo):
    """What one process makes of it."""
    out = zoo / "alone"
    assert not segment_set(job(zoo, out))["failed"]
    return out


def made(out):
    """All files by name, with their bytes: of reports what does not differ from run to run; the sheet shows no more than the masks."""
    files = {}
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        if path.name == REPORT:
            report = json.loads(path.read_text())
            files[name] = {key: report[key] for key in ("frames", "objects", "notes", "size")}
        elif path.is_file() and path.name != "summary.json":
            files[name] = path.name if path.name == SHEET else path.read_bytes()
    return files


def working_on(out, names=("bee", "dog"), but=()):
    """(process, video): waits for a process that has written some frames of a video, but is not done with it."""
    due = time.monotonic() + 120
    while time.monotonic() < due:
        for folder in Path("/proc").glob("[0-9]*/fd"):
            try:
                opened = [os.readlink(file) for file in folder.iterdir()]
            except OSError:  # it has ended, or is another user's
                continue
            for path in map(Path, opened):
                if path.name == "rows.jsonl" and path.is_relative_to(out) and int(folder.parent.name) not in but:
                    run = path.parent.parent  # OUT/NAME or, on Ray, OUT/.running-TOKEN/NAME.TOKEN
                    if run.name.split(".")[0] in names and len(list(run.glob("*.png"))) > 3:
                        return int(folder.parent.name), run.name.split(".")[0]
        time.sleep(0.002)
    raise AssertionError("nobody works on a long video")


# ------------------------------------------------------------------------------------------------------------- torchrun


def words(zoo, out, *more):
    return [
        *map(str, ("segment", "--dataset", zoo / "data", "--proposals", zoo / "proposals", "--out", out, "--preset", "iou")),
        *more,
    ]


def torchrun(*command, restarts=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts),
                "--monitor-interval", "0.2", "-m", "dmm_fast"]  # fmt: skip
    return subprocess.Popen([*launcher, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, errors = process.communicate(timeout=200)
    return process.returncode, out, errors


def test_torchrun_makes_what_one_process_makes(zoo, alone, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(zoo / "data", data, symlinks=True)
    shutil.rmtree(data / "Annotations/cat")
    out = tmp_path / "out"
    command = words(zoo, out)
    command[2] = str(data)
    code, shown, errors = ended(torchrun(*command))
    assert code == 1 and "exitcode  : 3" in errors and "dmm-fast: cat: no masks" in errors
    assert "3 videos, 306 frames" in shown and "1 failed" in shown and shown.count("by many processes (torchrun)") == 1
    lines = [line for line in errors.splitlines() if "frames/s; all:" in line]
    assert len(lines) == 3 and "ant" in lines[2] and lines[2].endswith("00:00 left")  # the longest first; each said once
    assert made(out) == {name: value for name, value in made(alone).items() if "cat" not in name}
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["videos"]) == ["ant", "bee", "dog"] and summary["processes"]["processes"] == 2
    assert sorted(path.name for path in out.iterdir()) == ["ant", "bee", "dog", "first-masks", "summary.json"]


def test_a_killed_process_of_torchrun(zoo, alone, tmp_path):
    """Its video is done by the next call, and where torchrun starts its processes again, by the same call."""
    out = tmp_path / "out"
    process = torchrun(*words(zoo, out))
    killed, name = working_on(out)
    os.kill(killed, signal.SIGKILL)
    code, _, errors = ended(process)
    assert code == 1 and "Signal 9 (SIGKILL)" in errors and not (out / name / REPORT).exists()
    process = torchrun(*words(zoo, out), restarts=1)
    again, name = working_on(out)
    os.kill(again, signal.SIGKILL)
    code, shown, errors = ended(process)
    assert code == 0, errors
    assert "4 videos, 314 frames" in shown and "0 failed" in shown
    assert made(out) == made(alone)


def ranks(zoo, out):
    """The two processes as torchrun starts them, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = ("import sys; from dmm_fast.inference import on_torchrun as t; t.LOST, t.BEAT = 4, .2; "
            "from dmm_fast.commands.main import main; sys.exit(main(sys.argv[1:]))")  # fmt: skip
    for rank in "01":
        more = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        yield subprocess.Popen([sys.executable, "-c", code, *words(zoo, out)], env=os.environ | more, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_vanishes_is_not_waited_for(zoo, alone, tmp_path, dies):
    """As with a machine that is lost; the first process has the list."""
    out = tmp_path / "out"
    both = list(ranks(zoo, out))
    killed, name = working_on(out, but=[both[1 - dies].pid])
    assert killed == both[dies].pid
    both[dies].kill()
    code, shown, errors = ended(both[1 - dies])
    both[dies].communicate()
    if dies == 0:
        assert code in (2, 130, -signal.SIGTERM) and ("the store of torchrun is gone" in errors or "onnection" in errors)
    else:
        assert code == 2 and f"no sign of process 1 for 4 s, which had {name}; the other videos are done" in errors
        assert json.loads((out / "summary.json").read_text())["left"] == [name]
    segment_set(job(zoo, out))
    assert made(out) == made(alone)


# ------------------------------------------------------------------------------------------------------------------ Ray


@pytest.fixture(scope="module")
def cluster():
    """Three machines of Ray's on this one: a head that does no videos, two with a core."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("RAY_worker_niceness", "RAY_USAGE_STATS_ENABLED")}
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    size = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **size})
    cluster.machines = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def in_thread(does):
    """Run something beside the test, which must not fail."""
    raised = []

    def run():
        try:
            does()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def end():
        thread.join(130)
        assert not thread.is_alive() and not raised, raised

    return end


def test_ray_makes_what_one_process_makes_though_a_worker_and_then_a_machine_are_killed(
    zoo, alone, cluster, tmp_path, capsys, monkeypatch
):
    out, engine = tmp_path / "out", OnRay(cluster.address)
    killed = []

    def kill():
        pid, name = working_on(out)
        os.kill(pid, signal.SIGKILL)
        killed.append(name)
        pid, name = working_on(out, but=[pid])
        raylet = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        machine = next(node for node in cluster.machines if node.all_processes["raylet"][0].process.pid == raylet)
        cluster.remove_node(machine, allow_graceful=False)
        killed.append(name)

    end = in_thread(kill)
    summary = segment_set(job(zoo, out), engine=engine, progress=True)
    end()
    shown = capsys.readouterr().err
    assert not summary["failed"] and list(summary["videos"]) == list(LENGTHS) and summary["processes"]["engine"] == "ray"
    assert shown.count("its process was killed") >= 2 and all(f"{name}: its process was killed" in shown for name in killed)
    assert "frames/s; all: 314 of 314 frames" in shown
    assert made(out) == made(alone)
    assert sorted(path.name for path in out.iterdir()) == [*LENGTHS, "first-masks", "summary.json"]

    import ray

    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")  # workers then stay from one call to the next

    # A stop saves what is in work, and one process goes on from there.
    stopped, cancel, told = tmp_path / "stopped", ray.cancel, threading.Event()

    def stop():
        pid, _ = working_on(stopped, ["bee"])
        os.kill(pid, signal.SIGSTOP)  # on a busy machine it would else be done before Ray tells it
        try:
            os.kill(os.getpid(), signal.SIGINT)
            assert told.wait(60)
        finally:
            os.kill(pid, signal.SIGCONT)

    end = in_thread(stop)
    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="repeat the command to continue"):
        patched.setattr(ray, "cancel", lambda task: (cancel(task), told.set()))
        segment_set(job(zoo, stopped), ["ant", "bee"], engine=engine)
    end()
    saved = json.loads((stopped / "bee/unfinished/progress.json").read_text())["next"]
    assert 3 < saved < LENGTHS["bee"] and not list(stopped.glob(".running*"))
    segment_set(job(zoo, stopped))
    assert made(stopped) == made(alone)

    # A video whose process is killed each time is given up; so is a call that no machine can do.
    last = tmp_path / "last"

    def kill_twice():
        pid, _ = working_on(last, ["dog"])
        os.kill(pid, signal.SIGKILL)
        os.kill(working_on(last, ["dog"], but=[pid])[0], signal.SIGKILL)

    end = in_thread(kill_twice)
    summary = segment_set(job(zoo, last), ["dog", "cat"], engine=OnRay(cluster.address, retries=1))
    end()
    assert list(summary["videos"]) == ["cat"] and "its process was killed (" in summary["failed"]["dog"]["error"]
    assert not (last / "dog").exists()
    with pytest.raises(RunError, match="no machine of the cluster has 64 CPUs and 0 GPUs.*--cpus-per-video"):
        segment_set(job(zoo, last), engine=OnRay(cluster.address, cpus=64))

    # A worker that is asked to end, not killed: the video goes on elsewhere.
    end = in_thread(lambda: os.kill(working_on(tmp_path / "asked", ["dog"])[0], signal.SIGTERM))
    assert not segment_set(job(zoo, tmp_path / "asked"), ["dog"], engine=engine, progress=True)["failed"]
    end()
    assert "dog: its process was killed" in capsys.readouterr().err

    # Proposals, and what is wrong on a worker's machine alone.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a task of Ray's has: the last digits of scores depend on it
    for number, engine in enumerate((None, OnRay(cluster.address))):
        propose_set(ProposalsJob(str(zoo / "data"), str(tmp_path / f"p{number}")), ["ant", "cat"], engine=engine)
    torch.set_num_threads(threads)
    assert made(tmp_path / "p0") == made(tmp_path / "p1")
    assert set(made(tmp_path / "p1")) == {"ant.json", "cat.json", "detector.txt"}
    away = SetJob(str(zoo / "data"), str(tmp_path / "away"), proposals=str(zoo / "proposals"), options={"device": "cuda:99"})
    with pytest.raises(RunError, match=f"on the machine {socket.gethostname()}: device cuda:99 cannot be used here"):
        segment_set(away, ["ant"], engine=OnRay(cluster.address))


# ------------------------------------------------------------------------------------------- two processes, one video


def test_of_two_processes_with_one_video_each_leaves_it_whole(zoo, alone, tmp_path):
    out = tmp_path / "out"
    done = []
    with running_in(out) as running:
        work = lambda: done.append(segment_one(job(zoo, out), "bee", apart=running))  # noqa: E731
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == 2 and not list(running.iterdir())
    assert made(out) == {name: value for name, value in made(alone).items() if "bee" in name}


def test_a_folder_takes_anothers_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    settle(tmp_path / "a", tmp_path / "out")
    settle(tmp_path / "b", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [path.name for path in (tmp_path / "out").iterdir()] == [
        "b"
    ]
    assert take(tmp_path / "out", tmp_path / "mine") and not take(tmp_path / "out", tmp_path / "yours")


def test_results_that_lie_on_another_disk(tmp_path):
    (tmp_path / "out/.running-killed").mkdir(parents=True)
    with running_in(tmp_path / "out") as running:
        check_shared(running, 0)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [running.name]  # what a killed call has left goes
        with pytest.raises(RunError, match="another run is working there"), running_in(tmp_path / "out"):
            pass
        check_shared(running, 0)
    with pytest.raises(RunError, match="--out must be storage that all machines share"):
        check_shared(running, 0)


def test_overwriting_apart(zoo, tmp_path):
    """The old result stays until the new one is whole; after an error none is left."""
    out = tmp_path / "out"
    segment_set(job(zoo, out), ["ant"])
    before, running = (out / "ant" / REPORT).stat().st_ino, out / ".running-0"
    running.mkdir()
    assert segment_one(job(zoo, out, overwrite=True), "ant", apart=running)["frames"] == 6
    assert (out / "ant" / REPORT).stat().st_ino != before
    broken = SetJob(str(zoo / "data"), str(out), proposals=str(tmp_path), overwrite=True, options={"preset": "iou"})
    found = json.loads((zoo / "proposals/ant.json").read_text())
    for entry in found:
        if entry["image_id"] == "00004":
            entry["segmentation"]["counts"] = [1]  # which is noticed when that frame is read
    (tmp_path / "ant.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="00004"):
        segment_one(broken, "ant", apart=running)
    assert not (out / "ant").exists() and not (out / "first-masks/ant").exists()


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_engines_that_cannot_be(zoo, tmp_path, monkeypatch, capsys):
    def fails(*more, message, command=words):
        assert main([*command(zoo, tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()

    fails("--engine", "dask", message="--engine is ray or ray:HOST:PORT, got 'dask'")
    fails("--engine", "ray:", message="--engine is ray or ray:HOST:PORT, got 'ray:'")
    fails("--retries", "2", message="it needs --engine ray")
    fails("--engine", "ray", "--gpus-per-video", ".5", message="GPUs are used with --device cuda")
    fails("--engine", "ray", "--gpus-per-video", "0", "--device", "cuda", message="a video needs a part of a GPU")
    with pytest.raises(SystemExit):
        main([*words(zoo, tmp_path / "out"), "--engine", "ray", "--cpus-per-video", "1.5"])
    assert "must be a part of one or a whole number, got '1.5'" in capsys.readouterr().err
    single = [str(zoo / "data/JPEGImages/ant"), "--masks", "m.png", "--out", str(tmp_path / "out"), "--engine", "ray"]
    fails(message="--engine belongs to a data set", command=lambda *_: ["segment", *single])
    fails(message="--engine belongs to a data set", command=lambda *_: ["proposals", *single[:1], *single[3:]])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        fails("--engine", "ray", message="--engine ray needs Ray: pip install 'dmm_fast[ray]'")
    with monkeypatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            patch.setenv(name, value)
        fails("--engine", "ray", message="--engine ray under torchrun: take one of them")
        fails(message="torchrun shares out the videos of a data set", command=lambda *_: ["segment", *single[:-2]])
    pytest.importorskip("ray")
    fails("--engine", "ray:127.0.0.1:1", message="--engine ray:127.0.0.1:1: nobody answers there")
    fails("--engine", "ray:head", message="takes the HOST:PORT of the cluster's head")


def test_an_engine_by_name(monkeypatch):
    assert open_engine("ray:10.0.0.1:6379", gpus=0.25) == OnRay("10.0.0.1:6379", gpus=0.25)
    assert type(open_engine()).__name__ == "Alone"
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not on_torchrun.under_torchrun()  # torchrun with one process


# ------------------------------------------------------------------------------------------------------------ proposals


def test_proposals_of_a_set(zoo, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "JPEGImages").mkdir(parents=True)
    for name in ("ant", "cat"):
        (data / "JPEGImages" / name).symlink_to(zoo / "data/JPEGImages" / name)
    (data / "Annotations").symlink_to(zoo / "data/Annotations")
    (data / "JPEGImages/bad").mkdir()
    (data / "JPEGImages/bad/00000.jpg").write_bytes(b"no picture")
    command = ["proposals", "--dataset", str(data), "--out", str(out)]
    assert main(command) == 3
    shown = capsys.readouterr()
    assert "dmm-fast: bad: " in shown.err and "proposals of 2 videos" in shown.out and "1 failed" in shown.out
    assert sorted(path.name for path in out.iterdir()) == ["ant.json", "cat.json", "detector.txt"]
    before = (out / "ant.json").stat().st_ino
    (out / "cat.json").unlink()
    assert main([*command, "--sequences", "ant,cat"]) == 0
    assert "ant: finished before, 6 frames" in capsys.readouterr().err and (out / "ant.json").stat().st_ino == before
    assert (out / "cat.json").exists()
    assert main([*command, "--sequences", "ant", "--top", "3"]) == 2
    assert "holds proposals of the detector small, not small top 3; --overwrite replaces them" in capsys.readouterr().err
    assert main([*command, "--sequences", "emu"]) == 2 and "no video emu here, of 3" in capsys.readouterr().err
