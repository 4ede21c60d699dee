"""The studies: Theorem 1's inequalities, exact projections, and tiny runs of both commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dmm_fast.model import Config, DMMNet, Proposals, packaged, read_weights
from dmm_fast.model.masks import mask_boxes
from PIL import Image
from torch import Tensor, nn

import dmm_fast
from dmm_fast.commands import main as cli
from dmm_fast.data.clips import Clip, noisy_proposals
from dmm_fast.data.masks import write_mask
from dmm_fast.learning.losses import cosine_loss, soft_iou_loss
from dmm_fast.proposals.coco import CocoWriter
from dmm_fast.studies import convergence, matching
from dmm_fast.studies.convergence import bounds, descend, guarantee, project


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- convergence


@pytest.mark.parametrize(("n", "m", "scale"), [(5, 100, 1.0), (4, 4, 1.0), (5, 6, 3.0), (1, 7, 5.0), (3, 9, 0.01)])
def test_projection_is_the_nearest_feasible_point(n: int, m: int, scale: float):
    """p is nearest to z in a convex set exactly if <z - p, y - p> <= 0 for all its y; the largest is an assignment problem."""
    z = scale * (random(6, n, m, seed=n * m) - 0.3)
    p = project(z)
    worst = dmm_fast.feasibility(p)
    assert all(float(value.max()) < 1e-9 for value in worst.values()), worst
    corner = dmm_fast.hungarian(-(z - p))
    assert float(((z - p) * (corner - p)).sum((1, 2)).max()) < 1e-9


def test_projection_leaves_feasible_points_alone():
    inside = torch.full((2, 3, 8), 1 / 8, dtype=torch.float64)
    assert torch.allclose(project(inside), inside, atol=1e-12)


def test_the_study_watches_the_layer_itself():
    cost, start = random(3, 5, 30), random(3, 5, 30, seed=1)
    run = descend(cost, start, 17, 4, 0.1)
    torch.testing.assert_close(run.average, dmm_fast.match(cost, start, n_grad=17, n_proj=4, lr=0.1), atol=1e-12, rtol=0)
    least = (cost * dmm_fast.hungarian(cost)).sum((1, 2))
    torch.testing.assert_close(run.gap[-1], (cost * run.average).sum((1, 2)) - least)


@pytest.mark.parametrize("n_proj", [5, 50])
@pytest.mark.parametrize("lr", [0.01, 0.1])
@pytest.mark.parametrize("size", [(5, 100), (6, 8)])
def test_theorem_1(size: tuple[int, int], lr: float, n_proj: int):
    """Eq. 16 at every step, with the projection error that was measured; contested costs (6 x 8) too."""
    cost, start = random(4, *size), random(4, *size, seed=1)
    run = descend(cost, start, 60, n_proj, lr)
    delta, lower, upper = bounds(cost, run, lr)
    assert (run.distance <= delta + 1e-12).all()
    assert (lower - 1e-12 <= run.gap).all() and (run.gap <= upper).all()
    # Not vacuous: the bound on the distance is near what is measured somewhere, and the gap has come down.
    assert (run.distance > 0.01 * delta).any() and (run.gap[-1] < run.gap[0]).all()


def test_theorem_1_wants_a_small_step():
    cost = random(1, 3, 10)
    run = descend(cost, torch.full_like(cost, 0.1), 2, 5, 5.0)
    with pytest.raises(ValueError, match="Theorem 1 asks for lr < r_0"):
        bounds(cost, run, 5.0)


def test_the_promised_steps_are_enough():
    row = guarantee(random(2, 3, 12), epsilon=0.9, lr=0.1)
    assert row["delta"] <= row["allowed"] and row["n_grad"] == 184  # ceil(6 * 2.75 / 0.09), r_0^2 = 3 (1 - 1 / 12)
    assert row["gap"] <= 0.9 and row["distance"] <= 0.9


def test_convergence_command(tmp_path, capsys):
    arguments = ["study", "convergence", "--out", str(tmp_path / "new"), "--proposals", "12", "--costs", "2", "--starts", "2"]
    arguments += ["--templates", "3", "--n-grad", "12", "--n-proj", "2,6", "--lr", "0.05,0.1", "--epsilon", "0.9"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| 0.05 | 2 |" in printed and "| 0.1 | 6 |" in printed and "| 0.9 |" in printed
    result = json.loads((tmp_path / "new/convergence.json").read_text())
    assert all(row["holds"] for row in result["theorem"]) and len(result["runs"]) == 4
    picture = (tmp_path / "new/convergence.svg").read_text()
    assert "Theorem 1 holds" in picture and "lr 0.05" in picture


def test_step_sizes_are_checked_before_anything_runs(monkeypatch):
    monkeypatch.setattr(convergence, "descend", lambda *_: pytest.fail("a run"))
    with pytest.raises(ValueError, match="Theorem 1 asks for lr"):
        convergence.study(convergence.Settings(lr=(0.01, 5.0)))


def test_more_step_sizes_than_colours_are_all_drawn(tmp_path):
    rates = tuple(0.01 * k for k in range(1, 1 + len(convergence.COLOURS) + 1))
    sizes = {"templates": 2, "proposals": 4, "costs": 1, "starts": 1, "n_grad": 3, "n_proj": (2,), "epsilon": (2.0,)}
    convergence.draw(convergence.study(convergence.Settings(lr=rates, **sizes)), tmp_path / "study.svg")
    assert (tmp_path / "study.svg").read_text().count(f"lr {rates[-1]:g}") >= 2


@pytest.mark.parametrize(
    ("change", "words"),
    [({"templates": 9, "proposals": 4}, "templates <= proposals"), ({"lr": (0.1, 0.0)}, "lr must be positive"),
     ({"n_proj": ()}, "n_proj must be positive")],
)  # fmt: skip
def test_settings_say_what_is_wrong(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        convergence.Settings(**change)


# ----------------------------------------------------------------------------------------------------------- matching


def squares(length: int = 4, objects: int = 3, size: tuple[int, int] = (64, 96), seed: int = 0) -> Clip:
    """Coloured squares that move over noise, with noisy proposals; the last object is hidden in the last frame."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 80, (length, 3, *size)).astype(np.uint8)
    ids = np.zeros((length, *size), np.uint8)
    for number in range(1, objects + 1):
        y, x = rng.integers(0, (size[0] - 24, size[1] - 24 - 3 * length))
        for t in range(length - (number == objects)):
            ids[t, y : y + 20, x + 3 * t : x + 3 * t + 22] = number
            frames[t, :, y : y + 20, x + 3 * t : x + 3 * t + 22] = rng.integers(100, 255, (3, 1, 1))
    masks = torch.from_numpy(ids[:, None] == np.arange(1, objects + 1)[:, None, None])
    proposals = [noisy_proposals(mask, rng) for mask in masks]
    return Clip(torch.from_numpy(frames), masks, proposals, "squares")


@pytest.fixture(scope="module")
def net() -> DMMNet:
    torch.manual_seed(0)
    return DMMNet(Config(backbone="tf_efficientnet_lite0", iou_weight=0.3)).eval()


@pytest.fixture(scope="module")
def masks(net: DMMNet) -> matching.Masks:
    return matching.Masks(matching.track(net, squares()))


@torch.no_grad()
def test_matching_without_pixels_is_the_networks_own(net: DMMNet, masks: matching.Masks):
    clip = squares()
    state = net.start(clip.frames[0], clip.masks[0], torch.ones(3, dtype=torch.bool))
    matches = matching.unroll(net, nn.Identity(), masks, "layer")
    for match, frame, proposals in zip(matches, clip.frames[1:], clip.proposals[1:]):
        output, state = net.step(frame, proposals, state)
        assert match.proposal.tolist() == output.proposal.tolist()
        for source, own in zip(match.sources, state.masks):
            assert torch.equal(masks.of(source[0])[source[1]], own)


@pytest.mark.parametrize("soft", [False, True])
def test_losses_from_counts_are_those_of_the_masks(net: DMMNet, masks: matching.Masks, soft: bool):
    clip, checked = squares(), 0
    for match in matching.unroll(net, nn.Identity(), masks, "layer"):
        proposals, true = clip.proposals[match.k + 1], clip.masks[match.k + 1]
        m = len(proposals.scores)
        share = match.x[:, :m] / match.x.sum(1, keepdim=True)
        if not soft:
            if (match.proposal < 0).any():
                continue
            share = torch.eye(m)[match.proposal]
        pasted = torch.einsum("nm,mhw->nhw", share, proposals.masks.float())
        # A sum of overlapping masks may exceed 1; the soft IoU of losses.py is the same function of it.
        expected = torch.stack([soft_iou_loss(pasted, true), cosine_loss(match.cosine, proposals.masks.float(), true.float())])
        torch.testing.assert_close(matching.losses(match, masks.counts(match.k), soft), expected, atol=1e-4, rtol=1e-4)
        checked += 1
    assert checked


@pytest.mark.parametrize(
    ("matcher", "soft", "flows"), [("hungarian", False, False), ("layer", False, True), ("layer", True, True)]
)
def test_only_the_layer_carries_the_gradient_of_the_masks(net, masks, matcher: str, soft: bool, flows: bool):
    width = masks.track.templates.size(1)
    embed = nn.Linear(width, width, bias=False)
    nn.init.eye_(embed.weight)
    loss = sum(matching.losses(m, masks.counts(m.k), soft)[0] for m in matching.unroll(net, embed, masks, matcher))
    loss.backward()
    assert (float(embed.weight.grad.abs().max()) > 1e-6) == flows


def test_scores_are_of_the_frames_that_show_an_object(net: DMMNet, masks: matching.Masks):
    scores = matching.score(net, nn.Identity(), [masks], "hungarian", False).objects
    assert len(scores) == 3 and all(0 <= value <= 1 for pair in scores for value in pair)
    assert matching.score(net, nn.Identity(), [masks], "hungarian", True).objects != scores  # without the last frame
    assert masks.score((-1, 0), 0, 0)[0] == pytest.approx(dmm_fast.mask_iou(*(squares().masks[i, :1] for i in (0, 1))).item())


def test_no_matcher_beats_the_best_proposals(net: DMMNet, masks: matching.Masks):
    mean = {m: np.mean(matching.score(net, nn.Identity(), [masks], m, False).objects, 0)[0] for m in matching.UNTRAINED}
    assert mean["truth"] == max(mean.values()) > 0.5


@torch.no_grad()
def test_twins_share_a_proposal_unless_assigned_one_to_one():
    """Two squares that look the same, and cosine alone to tell them apart: each takes the best of all proposals, which is one."""
    masks = torch.zeros(3, 2, 64, 96, dtype=torch.bool)
    masks[:, 0, 8:24, 8:24] = masks[:, 1, 40:56, 72:88] = True
    frames = 255 * masks.any(1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)
    proposals = [Proposals(mask_boxes(mask), torch.tensor([0.9, 0.8]), mask) for mask in masks]
    torch.manual_seed(0)
    net = DMMNet(Config(backbone="tf_efficientnet_lite0", pool="mask", iou_weight=0.0)).eval()
    twins = matching.track(net, Clip(frames, masks, proposals, "twins"))
    twins = matching.Masks(twins._replace(templates=twins.templates[:1].expand(2, -1)))  # alike to the last bit
    contested = [matching.contests(net, nn.Identity(), twins)]
    assert contested == [{(0, 0), (0, 1), (1, 0), (1, 1)}]
    together = matching.score(net, nn.Identity(), [twins], "independent", contested=contested)
    assert (together.shared, together.doubled, together.contested) == (1.0, 1.0, 0.5)  # one of the two is right
    for matcher in ("greedy", "hungarian", "rounded"):
        apart = matching.score(net, nn.Identity(), [twins], matcher, contested=contested)
        assert apart.shared == apart.doubled == 0.0 and apart.contested in (0.0, 1.0)


def test_duplicates_are_suppressed():
    masks = torch.zeros(4, 10, 10, dtype=torch.bool)
    masks[0, :5], masks[1, :4], masks[2, :6], masks[3, 7:] = True, True, True, True
    found = Proposals(mask_boxes(masks), torch.tensor([0.5, 0.9, 0.8, 0.1]), masks)
    assert matching.distinct(found, 1.0).scores.tolist() == found.scores.tolist()
    assert matching.distinct(found, 0.7).scores.tolist() == pytest.approx([0.9, 0.8, 0.1])
    assert matching.distinct(found, 0.5).scores.tolist() == pytest.approx([0.9, 0.1])
    assert matching.distinct(Proposals(*(part[:0] for part in found)), 0.5).scores.tolist() == []


def test_tuning_lowers_its_loss_and_repeats(net: DMMNet, masks: matching.Masks):
    settings = matching.Settings("", "", ("x",), steps=12, batch=1)
    embed, curve = matching.tune(net, [masks], matching.TUNED["tuned layer"], 2, 0, settings)
    again, same = matching.tune(net, [masks], matching.TUNED["tuned layer"], 2, 0, settings)
    assert curve == same and torch.equal(embed.weight, again.weight)
    assert sum(curve[-1]) < sum(curve[0])


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three short videos with proposals in a plain folder layout."""
    for name in ("a", "b", "c"):
        clip = squares(length=12, objects=2, seed=ord(name))
        for kind in ("JPEGImages", "Annotations"):
            (tmp_path / kind / name).mkdir(parents=True)
        (tmp_path / "proposals").mkdir(exist_ok=True)
        with CocoWriter(tmp_path / "proposals" / f"{name}.json", (64, 96)) as writer:
            for t, (frame, truth, proposals) in enumerate(zip(clip.frames, clip.masks, clip.proposals)):
                Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / f"JPEGImages/{name}/{t:05d}.png")
                ids = (truth * torch.arange(1, 3, dtype=torch.uint8)[:, None, None]).amax(0).numpy()
                write_mask(tmp_path / f"Annotations/{name}/{t:05d}.png", ids)
                writer.add(f"{t:05d}", proposals)
    return tmp_path


def command(videos: Path) -> list[str]:
    sizes = "--held-out c --short-side 64 --clips 2 --val-clips 1 --val-frames 3"
    return ["study", "matching", str(videos), "--proposals", str(videos / "proposals"), *sizes.split()]


def test_matching_command(videos: Path, tmp_path: Path, capsys, monkeypatch, net: DMMNet):
    monkeypatch.setattr(matching, "imagenet_weights", lambda name: net.backbone.state_dict())
    out = tmp_path / "out"
    arguments = [*command(videos), *"--unroll 1,2 --steps 2 --batch 1 --seeds 2 --out".split(), str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("| Hungarian |", "tuned with it detached, unroll 1 |", "tuned through it, unroll 2 |", "s.e. over seeds"):
        assert words in printed
    result = json.loads((out / "matching.json").read_text())
    assert len(result["rows"]) == 6 + 2 * 6 * 2
    assert "J of the matched masks" in (out / "matching.svg").read_text()

    del result["rows"][-2:]  # as if it had been stopped: the rest is kept, the last is run again
    result["rows"][0]["pasted"] = [[0.125, 0.125]] * len(result["rows"][0]["pasted"])
    (out / "matching.json").write_text(json.dumps(result))
    assert cli.main(arguments) == 0
    again = json.loads((out / "matching.json").read_text())
    assert len(again["rows"]) == 30 and again["rows"][0] == result["rows"][0]

    capsys.readouterr()
    kept = (out / "matching.json").read_bytes()
    assert cli.main([*arguments, "--seeds", "1"]) == 0  # the first alone is told, and none is lost
    assert " ± " in printed and " ± " not in capsys.readouterr().out
    assert cli.main([*arguments, "--lr", "0.5"]) == 2
    assert "has rows of other settings (lr); choose another --out" in capsys.readouterr().err
    with (videos / "proposals" / "a.json").open("a") as file:
        file.write("\n")
    assert cli.main(arguments) == 2
    assert "has rows of other settings (proposals' contents)" in capsys.readouterr().err
    assert (out / "matching.json").read_bytes() == kept


def test_tracks_are_made_again_where_proposals_have_changed(videos: Path, tmp_path: Path, monkeypatch):
    made = []

    def track(net: DMMNet, clip: Clip, overlap: float) -> matching.Track:
        made.append(clip.name)
        return matching.Track(clip.name, torch.zeros(1, 1), clip.masks[0, 0].byte(), [])

    monkeypatch.setattr(matching, "track", track)
    settings = matching.Settings(
        str(videos), str(videos / "proposals"), ("c",), weights="small", pool="mask", clips=2, val_clips=1, val_frames=3
    )
    for _ in range(2):
        matching.prepare(settings, tmp_path, progress=False)
    assert len(made) == 2 + 1 + 1
    with (videos / "proposals" / "a.json").open("a") as file:
        file.write("\n")
    matching.prepare(settings, tmp_path, progress=False)
    assert len(made) == 2 * 4


def test_matching_command_on_alike_objects_with_packaged_weights(videos: Path, tmp_path: Path, capsys):
    how = "--kind alike --objects 2,3 --copies 2 --suppress 0.6 --pool mask --weights small --unroll 2 --steps 1 --batch 1 --seeds 1"
    arguments = [*command(videos), *how.split(), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| matching | alike clips J |" in printed and "| alike clips | one proposal for two |" in printed
    rows = json.loads((tmp_path / "out/matching.json").read_text())["rows"]
    assert len(rows) == 6 + 5 * 2 and all(len(row["pairs"]) == 3 for row in rows)
    assert all(row["pairs"][0] == 0 for row in rows if row["decide"] in ("greedy", "hungarian", "rounded", "truth"))


def test_tuning_starts_from_trained_weights():
    settings = matching.Settings("", "", ("x",), weights="small", pool="mask")
    own = read_weights(packaged("small"))
    assert torch.equal(matching.first_embed(settings, 496).weight, own["embed.weight"])
    state = matching.frozen_net(settings).backbone.state_dict()
    assert all(torch.equal(tensor, own[f"backbone.{name}"]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"kind": "twins"}, "kind must be one of"), ({"objects": (2,)}, "objects must be two numbers"),
     ({"suppress": 0.0}, "suppress is an IoU above 0")],
)  # fmt: skip
def test_matching_settings_say_what_is_wrong(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        matching.Settings("", "", ("x",), **change)


def test_matching_says_what_is_wrong(videos: Path, tmp_path: Path, capsys):
    arguments = ["study", "matching", str(videos), "--proposals", str(videos / "proposals"), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--held-out", "a,b,c"]) == 2
    assert "none is left to train on" in capsys.readouterr().err
    assert cli.main([*arguments, "--held-out", "z"]) == 2
    assert "no video z" in capsys.readouterr().err
