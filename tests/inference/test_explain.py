"""Why a run failed: the split adds up, what is found is there, every advised command can be typed, the page stands alone."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from pycocotools import mask as coco

from dmm_fast.commands.main import _parser, main
from dmm_fast.data.masks import MaskError, read_ids, write_mask
from dmm_fast.evaluation import evaluate, jaccard
from dmm_fast.inference import explain_page
from dmm_fast.inference.advice import advise
from dmm_fast.inference.demo import make_clip
from dmm_fast.inference.explain import ExplainError, Span, Switch, Track, explain, spans
from dmm_fast.inference.explain_page import write_page
from dmm_fast.inference.run import segment

SIZE, LENGTH = (96, 160), 9


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The synthetic koi: four objects, proposals, the truth of every frame, and a run on them."""
    root = tmp_path_factory.mktemp("clip")
    make_clip(root, seed=7, frames=LENGTH, size=SIZE)
    segment(
        root / "JPEGImages/koi",
        root / "Annotations/koi/00000.png",
        root / "run",
        proposals=root / "proposals/koi.json",
        preset="iou",
    )
    return root


@pytest.fixture
def run(clip, tmp_path):
    """A copy of the run, to be changed."""
    shutil.copytree(clip / "run", tmp_path / "run")
    return tmp_path / "run"


def gt(clip):
    return clip / "Annotations/koi"


def rewrite(run, change):
    """Change the report."""
    report = json.loads((run / "report.json").read_text())
    change(report)
    (run / "report.json").write_text(json.dumps(report))


def entry(report, frame, label):
    return next(e for e in report["frames"][frame]["objects"] if e["id"] == label)


def test_the_split_adds_up_to_what_evaluation_measures(clip):
    e = explain(clip / "run", gt(clip))
    measured = evaluate(gt(clip), clip / "run", "davis", frames="after-first")
    for track, row in zip(e.tracks, measured.per_object, strict=True):
        split = track.split
        assert split["recall"] + split["matching"] + split["refinement"] == pytest.approx(split["loss"], abs=1e-12)
        assert 1 - split["loss"] == pytest.approx(row["J"], abs=1e-12) and track.scored.sum() == LENGTH - 1
        assert (
            (track.best[1:] >= track.matched[1:]).all()
            and np.isnan(track.matched[0])
            and track.given.tolist() == [True] + [False] * 8
        )
    assert e.means["J"] == pytest.approx(measured.summary["J"])
    assert any(track.split["recall"] > 0.01 for track in e.tracks)


@pytest.mark.filterwarnings("ignore:__array__")  # pycocotools
def test_the_best_and_the_assigned_proposal_are_the_files_own(clip):
    e = explain(clip / "run", gt(clip))
    found = sorted(
        (r for r in json.loads((clip / "proposals/koi.json").read_text()) if r["image_id"] == "00005"),
        key=lambda r: -r["score"],
    )
    masks = [coco.decode(one["segmentation"]) > 0 for one in found]
    report = json.loads((clip / "run/report.json").read_text())
    for track in e.tracks:
        overlaps = [jaccard(mask, read_ids(gt(clip) / "00005.png") == track.id) for mask in masks]
        assert track.best[5] == pytest.approx(max(overlaps), abs=1e-6) and track.choice[5] == int(np.argmax(overlaps))
        assert track.matched[5] == pytest.approx(overlaps[entry(report, 5, track.id)["proposal"]], abs=1e-6)


def wrong_match(run, clip):
    """Object 1 takes object 2's mask and proposal in the frames 4 and 5, is lost in 6, and found again."""
    e = explain(clip / "run", gt(clip))
    for frame in (4, 5):
        ids = read_ids(run / f"{frame:05d}.png")
        truth = read_ids(gt(clip) / f"{frame:05d}.png")
        ids[ids == 1] = 0
        ids[truth == 2] = 1
        write_mask(run / f"{frame:05d}.png", ids)

    def change(report):
        for frame in (4, 5):
            entry(report, frame, 1)["proposal"] = int(e.tracks[1].choice[frame])
        entry(report, 6, 1).update(proposal=None, score=0.0, runner_up=0.1, lost=True)

    rewrite(run, change)
    return e


def test_a_wrong_match_is_a_switch_a_lost_span_and_a_loss_of_matching(clip, run):
    before = wrong_match(run, clip)
    e = explain(run, gt(clip))
    track, other = e.tracks[0], before.tracks[0]
    assert track.switches == [Switch(4, 2), Switch(6, 1)] and track.lost_spans == [Span(4, 6)]
    assert (track.best == other.best)[1:].all()
    assert (track.matched[4:7] < 0.05).all() and track.matched[6] == 0 and track.j[6] == other.j[6]
    assert track.split["matching"] - other.split["matching"] == pytest.approx(
        (other.matched - track.matched)[4:7].sum() / (LENGTH - 1)
    )
    assert e.tracks[0].shared[4] and e.tracks[1].shared[4]
    named = {one.title: one for one in advise(e)}
    assert "object 1: a mask in frame 00004" in named["A correction"].why[0]
    assert named["One proposal each"].why[0] == "object 1 shares its proposal with another in 00004 to 00005"
    assert "--decision assign" in named["One proposal each"].commands[0]


def test_without_truth_a_jump_is_a_likely_switch(clip, run):
    wrong_match(run, clip)
    e = explain(run)
    assert e.compared is None and not e.proposals and e.tracks[0].likely_switches == [Switch(4, 0)]
    assert e.tracks[0].lost_spans == [Span(6, 6)] and "J" not in e.table() and "likely switches" in e.table()
    assert "frame 00004" in advise(e)[0].why[0] or "frame 00004" in advise(e)[1].why[0]
    assert not explain(clip / "run").tracks[0].likely_switches


def test_ground_truth_of_some_frames_and_of_some_objects(clip, tmp_path):
    folder = tmp_path / "gt"
    folder.mkdir()
    for frame in (0, 4, 8):
        ids = read_ids(gt(clip) / f"{frame:05d}.png")
        ids[ids == 3] = 255  # void: background
        write_mask(folder / f"{frame:05d}.png", ids)
    whole = explain(clip / "run", gt(clip))
    e = explain(clip / "run", folder)
    assert e.compared == [0, 4, 8] and e.tracks[0].scored.nonzero()[0].tolist() == [4, 8]
    assert e.tracks[0].j[4] == whole.tracks[0].j[4] and np.isnan(e.tracks[0].j[5])
    assert e.tracks[2].split == {} and any("object 3 is in no frame of the ground truth" in note for note in e.notes)
    assert e.tracks[2].figures["extra"] == 2
    write_page(e, advise(e), tmp_path / "page.html")
    e.to_json(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["per_frame"][0]["j"][5] is None


def test_visible_but_not_followed(clip, tmp_path):
    segment(
        clip / "JPEGImages/koi",
        gt(clip) / "00003.png",
        tmp_path / "run",
        proposals=clip / "proposals/koi.json",
        preset="iou",
        direction="forward",
    )
    e = explain(tmp_path / "run", gt(clip))
    assert e.tracks[0].left.nonzero()[0].tolist() == [0, 1, 2] and e.tracks[0].scored.sum() == LENGTH - 4
    (both,) = [one for one in advise(e) if one.title == "Both directions"]
    assert "--direction both" in both.commands[0] and "00000 to 00002" in both.why[0]


def test_a_live_detector_finds_the_same_again(clip, tmp_path):
    """Without refinement the mask of a single object is the proposal that was matched."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for frame in range(3):
        shutil.copy(clip / f"JPEGImages/koi/{frame:05d}.jpg", frames)
    write_mask(tmp_path / "first.png", (read_ids(gt(clip) / "00000.png") == 1).astype(np.uint8))
    segment(frames, tmp_path / "first.png", tmp_path / "run", refine="none")
    e = explain(tmp_path / "run", gt(clip))
    track = e.tracks[0]
    found = track.followed & ~track.lost
    assert (
        found.any()
        and track.matched[found] == pytest.approx(track.j[found], abs=1e-6)
        and "finds now, in the 3 frames" in e.notes[0]
    )
    rewrite(tmp_path / "run", lambda report: report["settings"].update(online="30"))
    e = explain(tmp_path / "run", gt(clip))
    assert not e.proposals and "learnt the first frame" in e.notes[0] and set(e.tracks[0].split) == {"loss"}


# ------------------------------------------------------------------------------------------------------------- advice


def figures(clip, best, matched, j, area=2000, **settings):
    """The run's explanation with figures of object 1 in place of its own, the other objects being fine."""
    e = explain(clip / "run", gt(clip))
    track = Track.empty(1, LENGTH)
    track.given[0], track.followed[1:] = True, True
    track.truth[:], track.best[1:], track.matched[1:], track.j[1:] = area, best, matched, j
    return replace(e, tracks=[track], settings=e.settings | {"preset": None} | settings)


@pytest.mark.parametrize(
    "best, matched, j, settings, title, words",
    [
        (0.3, 0.3, 0.3, {}, "Better proposals", "--proposals small"),
        (0.3, 0.3, 0.3, {"proposals": "small"}, "Better proposals", "--proposals torchvision"),
        (0.9, 0.2, 0.2, {}, "A correction", "--direction both"),
        (0.9, 0.2, 0.2, {"preset": "iou"}, "Appearance", "--preset small"),
        (0.9, 0.9, 0.4, {}, "Other refinement", "--online 30"),
        (0.3, 0.3, 0.3, {"area": 20}, "More resolution", "--short-side 192"),
        (0.3, 0.3, 0.3, {"area": 20}, "More resolution", "--preset detail"),
        (0.3, 0.3, 0.3, {"area": 20, "weights": "mine.safetensors"}, "More resolution", "--short-side 400"),
        (0.9, 0.9, 0.85, {}, None, None),
    ],
)
def test_rules(clip, best, matched, j, settings, title, words):
    given = advise(figures(clip, best, matched, j, **settings))
    assert (title in [one.title for one in given]) if title else given == []
    for one in given:
        assert one.title != title or ("object 1" in one.why[0] and words in " ".join(one.commands))
        assert "iou" not in settings.values() or "--online" not in " ".join(one.commands)  # nothing there can learn


def test_online_is_for_single_objects(clip):
    """With several similar ones it may swap them: neither the commands nor the texts name it."""
    for three in [(0.3, 0.3, 0.3), (0.9, 0.9, 0.4)]:
        for given in ("small", "file.json"):
            e = figures(clip, *three, proposals=given)
            several = replace(e, tracks=[*e.tracks, replace(e.tracks[0], id=2)])
            assert "online" in str(advise(e)) and advise(several) and "online" not in str(advise(several))
    (other,) = advise(several)
    assert other.how == "Keep the matched proposals as they are." and "--refine none" in other.commands[0]
    (other,) = advise(figures(clip, 0.9, 0.9, 0.4, refine="none"))
    assert other.how == "Fit the network to the first frame." and len(other.commands) == 1


def test_a_small_object_is_told_with_its_j(clip):
    (why,) = next(one for one in advise(figures(clip, 0.3, 0.3, 0.28, area=20)) if one.title == "More resolution").why
    assert re.fullmatch(r"object 1: \d+ pixels in a frame of 240 lines; J is 0\.28", why)
    for settings in ({"preset": "iou"}, {"preset": "detail"}, {"short_side": 300}):  # nothing to enlarge, or done
        (one,) = [one for one in advise(figures(clip, 0.3, 0.3, 0.28, area=20, **settings)) if one.title == "More resolution"]
        assert "--short-side 400" not in one.commands[1]
        assert ("--preset detail" in one.commands[1]) == (settings == {"preset": "detail"})


def test_every_advised_command_can_be_typed(clip, run):
    wrong_match(run, clip)
    asked = {
        "masks": "it's first.png",
        "backbone": None,
        "preset": "small",
        "precision": "bfloat16",
        "image_id_offset": -1,
        "clean_masks": True,
    }
    told = [
        explain(run, gt(clip)),
        explain(run),
        *(figures(clip, *three, **asked) for three in [(0.3, 0.3, 0.3), (0.9, 0.2, 0.2), (0.9, 0.9, 0.3)]),
    ]
    told.append(figures(clip, 0.3, 0.3, 0.3, area=20, proposals="torchvision"))
    commands = [command for e in told for one in advise(e) for command in one.commands]
    assert len(commands) > 8
    for command in commands:
        words = shlex.split(command)
        assert words[0] in ("dmm-fast", "mkdir")
        if words[0] == "dmm-fast":
            parsed = _parser().parse_args(words[1:])
            if getattr(parsed, "masks", None) == "it's first.png":
                assert parsed.precision == "bfloat16" and parsed.clean_masks and parsed.preset == "small"


# --------------------------------------------------------------------------------------------------------------- page


def test_the_table_says_that_its_losses_are_losses(clip, tmp_path):
    e = explain(clip / "run", gt(clip))
    head, *_, last = e.table().splitlines()
    assert re.search("J +recall loss +matching loss +refinement loss", head)
    assert last == "(recall, matching and refinement loss add up to 1 - J: less is better, below 0 is a gain)"
    write_page(e, [], tmp_path / "page.html", 0)
    page = (tmp_path / "page.html").read_text()
    assert "<th>recall loss</th>" in page and "recall + matching + refinement\nloss: less is better" in page
    assert "recall" in e.tracks[0].figures and "recall" in e.means  # the keys of the JSON file
    assert "less is better" not in explain(clip / "run", gt(clip), use_proposals=False).table()


@pytest.mark.parametrize(
    "best, matched, j, sum_",
    [
        (0.41, 0.40, 0.62, "1 - J is 0.38 = 0.59 (recall: no proposal was better) + 0.01 (matching: another proposal or none was taken) "
         "- 0.22 (refinement wins back)."),
        (0.9, 0.9, 0.7, "1 - J is 0.30 = 0.10 (recall: no proposal was better) + 0.00 (matching: another proposal or none was taken) "
         "+ 0.20 (refinement)."),
    ],
)  # fmt: skip
def test_the_verdict_is_a_sum(clip, best, matched, j, sum_):
    assert explain_page._verdict(figures(clip, best, matched, j)).endswith(sum_)


def test_the_sum_of_the_verdict_is_right_after_rounding(clip):
    for best, matched, j in np.sort(np.random.default_rng(0).random((60, 3)), 1)[:, ::-1]:
        best, matched, j = (best, matched, j) if j < 0.3 else (matched, j, best)  # refinement loses, or wins back
        text = explain_page._verdict(figures(clip, best, matched, j))
        mean, loss, *parts = (
            int(sign.strip("= ") + digits.replace(".", "")) for sign, digits in re.findall(r"(\+ |- |)(\d\.\d\d)", text)
        )
        assert mean == round(100 * j) and loss == 100 - mean == sum(parts)
        assert np.abs(np.array(parts) / 100 - [1 - best, best - matched, matched - j]).max() < 0.01


class Balanced(HTMLParser):
    """Every element is closed by its own end."""

    ALONE = ("meta", "img", "path", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in self.ALONE

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(clip, run, tmp_path):
    wrong_match(run, clip)
    hostile = tmp_path / '<script>alert("x")</script>&'
    hostile.mkdir(parents=True)
    shutil.copytree(clip / "JPEGImages/koi", hostile / "koi <b>")
    rewrite(run, lambda report: report["settings"].update(frames=str(hostile / "koi <b>"), masks="<i>.png"))
    for truth in (gt(clip), None):
        e = explain(run, truth)
        write_page(e, advise(e), tmp_path / "page.html", 4)
        page = (tmp_path / "page.html").read_text()
        parser = Balanced()
        parser.feed(page)
        assert parser.open == ["html"] and len(parser.sources) == (12 if truth else 8)
        assert all(source.startswith("data:image/jpeg;base64,") for source in parser.sources)
        assert not re.search(r"https?://|<script|<b>|<i>\.png|url\(", page) and "&lt;b&gt;" in page
        assert page.count("<svg") == 4 and "frame 00004" in page


def test_long_clips_are_drawn_with_few_points_and_keep_their_lows(monkeypatch):
    values = np.full(10_000, 0.9)
    values[5_003] = 0.05
    values[100:200] = np.nan
    path = explain_page._line(values, 5, lambda x: x, lambda y: y)
    assert len(re.findall("[ML]", path)) <= explain_page.POINTS and "5003 0.1" in path and path.count("M") == 2


def test_spans():
    assert spans(np.array([1, 1, 0, 0, 1], bool)) == [Span(0, 1), Span(4, 4)] and spans(np.zeros(3, bool)) == []


# ------------------------------------------------------------------------------------------------- command and errors


def test_command(clip, run, tmp_path, capsys):
    wrong_match(run, clip)
    assert main(["explain", str(run), "--gt", str(gt(clip)), "--json", str(tmp_path / "e.json"), "--worst", "2"]) == 0
    told = capsys.readouterr().out
    assert (
        "recall loss  matching loss  refinement loss" in told and "A correction" in told and str(run / "explain.html") in told
    )
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["per_frame"][0]["switches"] == [["00004", 2], ["00006", 1]] and content["advice"][0]["commands"]
    assert (run / "explain.html").read_text().count("<img") == 6
    assert main(["explain", str(run), "--out", str(tmp_path / "none.html"), "--quiet"]) == 0 and capsys.readouterr().out == ""
    segment(
        clip / "JPEGImages/koi",
        gt(clip) / "00000.png",
        run,
        proposals=clip / "proposals/koi.json",
        preset="iou",
        overwrite=True,
    )
    assert not (run / "explain.html").exists()  # it was another run's


def test_errors_say_what_to_do(clip, run, tmp_path):
    with pytest.raises(ExplainError, match="no report.json here; give the folder that dmm-fast segment"):
        explain(tmp_path, gt(clip))
    with pytest.raises(ExplainError, match="no PNG has the name of a frame of the run"):
        explain(run, clip / "proposals")
    with pytest.raises(ExplainError, match="nowhere: no such directory"):
        explain(run, clip / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    write_mask(other / "00004.png", np.ones((48, 80), np.uint8))
    with pytest.raises(MaskError, match="wrong size: the mask is 80x48, the frames are 160x96"):
        explain(run, other)
    write_mask(other / "00004.png", np.full(SIZE, 9, np.uint8))
    with pytest.raises(
        ExplainError, match=r"none of the run's objects \(1, 2, 3, 4\) is in ground truth, which is there for 1 of"
    ):
        explain(run, other)
    with pytest.raises(ExplainError, match="gone.json: the run's proposals are gone; .*--no-proposals"):
        explain(run, gt(clip), proposals=tmp_path / "gone.json")
    moved = tmp_path / "moved.json"
    shutil.copy(clip / "proposals/koi.json", moved)
    explain(run, gt(clip), proposals=moved)
    found = json.loads((clip / "proposals/koi.json").read_text())
    fewer = [one for one in found if one["image_id"] != "00005"]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    with pytest.raises(ExplainError, match="fewer.json: is not the file that this run read"):
        explain(run, gt(clip), proposals=tmp_path / "fewer.json")
    rewrite(run, lambda report: report["settings"].update(frames="/moved"))
    e = explain(run, gt(clip))
    with pytest.raises(ExplainError, match="the run's frames cannot be read .* name them with --frames"):
        write_page(e, [], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    e = explain(run, gt(clip), frames=clip / "JPEGImages/koi")
    write_page(e, [], tmp_path / "page.html")
    (run / "00002.png").unlink()
    with pytest.raises(ExplainError, match="00002.png: the run's mask of this frame is gone"):
        explain(run, gt(clip))
    (run / "unfinished").mkdir()
    with pytest.raises(ExplainError, match="the run is not finished; repeat its command with --resume"):
        explain(run, gt(clip))
