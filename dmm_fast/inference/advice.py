"""What to try after a run: a few rules on the figures of `explain`, each with the command to type."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmm_fast.inference.explain import Explanation, Span, Track, spans
from dmm_fast.inference.joining import APART
from dmm_fast.proposals.sources import is_detector, sources

FINE = 0.2  # an object that loses less than this needs no advice
SHARE = 1 / 4  # of an object's loss, from which a part of it is worth a rule, and
LEAST = 0.15  # of J, at least
BAD = 0.3  # of J lost to a part in a frame that is named for it
WHOLE = 0.8  # of its usual area, from which on an object is not hidden
LARGER = 400  # lines of the frame in the network, where objects are small
SMALL = 400  # pixels of an object, in a frame of 240 lines, below which it is small


@dataclass(frozen=True)
class Advice:
    """title: what to try. why: a sentence per object, with its frames. how: what to know. commands: what to type."""

    title: str
    why: list[str]
    how: str
    commands: list[str]


def advise(e: Explanation) -> list[Advice]:
    """What the figures suggest, the costliest first."""
    found = [(cost, advice) for rule in RULES for cost, advice in rule(e)]
    return [advice for _, advice in sorted(found, key=lambda pair: -pair[0])]


Found = Iterator[tuple[float, Advice]]  # what it costs all objects together, and the advice


def _better_proposals(e: Explanation) -> Found:
    """No proposal covers the object: recall is a large part of what it loses."""
    hit = [t for t in e.tracks if _large(t, "recall") and not _small(t, e)]
    why = [
        f"object {t.id}: the best proposal has IoU {1 - t.split['recall']:.2f} on average{_where(e, t, 1 - t.best)}"
        for t in hit
    ]
    given, learn = e.settings["proposals"], _can_learn(e)
    other, text = (
        ({"proposals": "torchvision"}, "Mask R-CNN knows the classes of COCO (downloaded on first use); for other things train a detector "
         "(dmm-fast train-proposals)" + (", or fit the packaged one to the first frame (--online)." if learn else "."))
        if given == "small"
        else ({"proposals": "small"}, "The packaged detector knows no classes; others are torchvision, or one of your own "
              "(dmm-fast train-proposals)." + (" A live detector without classes also learns the first frame with --online." if learn else ""))
    )  # fmt: skip
    commands = [_command(e, "proposals", **other)]
    if learn:
        commands.append(_command(e, "online", online="30", **({} if given == "small" else other)))
    if hit:
        yield _cost(hit, "recall"), Advice("Better proposals", why, text, commands)


def _more_resolution(e: Explanation) -> Found:
    """Small objects are lost by detectors and by refinement: both see frames of a few hundred lines."""
    hit = [t for t in e.tracks if _small(t, e) and (_large(t, "recall") or _large(t, "refinement"))]
    if not hit:
        return
    why = [f"object {t.id}: {_size(t, e):.0f} pixels in a frame of 240 lines; J is {1 - t.split['loss']:.2f}" for t in hit]
    text = "A detector that sees larger frames finds smaller things, and a network that does shows them better."
    given = str(e.settings["proposals"])
    # torchvision may need its weights named, and many models of the hub take frames of one size.
    kept = is_detector(given) and not any(name == "torchvision" or name.startswith("hf:") for name in sources(given))
    detector = ["--detector", given if kept else "small"]
    file = f"{e.run}-larger.json"
    first = ["dmm-fast", "proposals", e.settings["frames"], *detector, "--short-side", str(2 * min(e.size)), "--out", file]
    larger: dict[str, Any] = {}
    if e.settings["preset"] not in ("iou", "detail") and not e.settings.get("short_side"):
        own = e.settings["weights"] or e.settings["backbone"]  # else there are weights for larger frames
        larger = {"short_side": LARGER} if own else {"preset": "detail"}
    commands = [shlex.join(first), _command(e, "larger", proposals=file, **larger)]
    yield _cost(hit, "loss"), Advice("More resolution", why, text, commands)


def _appearance(e: Explanation) -> Found:
    """Matching fails, and it looks at the overlap of masks alone."""
    hit = [t for t in e.tracks if _large(t, "matching")] if e.settings["preset"] == "iou" else []
    why = [f"object {t.id}: IoU {t.split['matching']:.2f} is lost by matching{_where(e, t, t.best - t.matched)}" for t in hit]
    if hit:
        text = "The packaged network compares what objects look like; the preset iou only where they are."
        yield _cost(hit, "matching"), Advice("Appearance", why, text, [_command(e, "small", preset="small")])


def _one_each(e: Explanation) -> Found:
    """Objects share a proposal: an assignment that is rounded gives each its own."""
    hit = [t for t in e.tracks if t.shared.any()] if e.settings["decision"] != "assign" else []
    why = [f"object {t.id} shares its proposal with another{_frames(e, spans(t.shared))}" for t in hit]
    if hit:
        text = "The assignment is rounded, so that no two objects take the same proposal."
        yield _cost(hit, "matching"), Advice("One proposal each", why, text, [_command(e, "assign", decision="assign")])


def _a_mask_there(e: Explanation) -> Found:
    """Matching lost an object: it needs one more mask, in the first bad frame, and both directions."""
    hit, at = [], {}
    for t in e.tracks:
        bad = _goes_wrong(e, t)
        if bad:
            hit.append(t)
            at[t.id] = _well_seen(t, max(bad, key=lambda span: span.last - span.first).first)
    if not hit:
        return
    why = [
        f"object {t.id}: a mask in frame {e.stems[at[t.id]]}, {'the first in which it is well seen since matching went wrong' if e.compared is not None else 'where it may go wrong'}"
        for t in hit
    ]
    text = ("Draw them (dmm-fast app does) as indexed PNGs named like the frames, with the same ids; a mask may hold some objects only. Objects "
            "are followed forward and backward from each, and joined where both ways agree.")  # fmt: skip
    yield (
        _cost(hit, "matching"),
        Advice("A correction", why, text, [*_masks_folder(e), _command(e, "corrected", masks=_masks(e), direction="both")]),
    )


def _goes_wrong(e: Explanation, t: Track) -> list[Span]:
    """Where matching lost an object, if that is what its loss comes from; without truth where it may have."""
    if e.compared is None:
        return [span for span in t.lost_spans if span.last > span.first] + [Span(s.frame, s.frame) for s in t.likely_switches]
    if not (_large(t, "matching") or (not e.proposals and _loss(t) >= FINE)):
        return []
    gap = t.best - t.matched if e.proposals else 1 - t.j
    with np.errstate(invalid="ignore"):
        return spans(t.scored & (gap > BAD))


def _well_seen(t: Track, first: int) -> int:
    """The first frame from this one on in which the object is not mostly hidden: there a mask says what it looks like."""
    if not t.known:
        return first
    seen = np.flatnonzero(t.truth[first:] >= WHOLE * np.median(t.truth[t.truth > 0]))
    return first + int(seen[0]) if len(seen) else first


def _where_passes_part(e: Explanation) -> Found:
    """The passes forward and backward disagree between two masks: one of them is wrong."""
    apart = [join for join in e.joins if join["iou"] < APART]
    why = [f"object {j['object']}: forward and backward agree by IoU {j['iou']:.2f} at best between the frames {j['given'][0]} and {j['given'][1]}"
           for j in apart]  # fmt: skip
    if apart:
        text = "A further mask between these frames says which is right."
        yield (
            len(apart) * FINE,
            Advice(
                "A mask in between", why, text, [*_masks_folder(e), _command(e, "between", masks=_masks(e), direction="both")]
            ),
        )


def _refine_less(e: Explanation) -> Found:
    """The refined masks are worse than the proposals that they are made from."""
    hit = [t for t in e.tracks if _large(t, "refinement") and not _small(t, e)]
    why = [
        f"object {t.id}: refinement takes IoU {t.split['refinement']:.2f} off on average{_where(e, t, t.matched - t.j)}"
        for t in hit
    ]
    found = [("fit the network to the first frame", _command(e, "online", online="30"))] if _can_learn(e) else []
    if e.settings["refine"] != "none":
        found.append(("keep the matched proposals as they are", _command(e, "unrefined", refine="none")))
    if hit and found:
        text, commands = ", or ".join(what for what, _ in found).capitalize() + ".", [command for _, command in found]
        yield _cost(hit, "refinement"), Advice("Other refinement", why, text, commands)


def _follow_back(e: Explanation) -> Found:
    """An object is visible where the run does not follow it: before its first mask, or after its last going backward."""
    hit = [t for t in e.tracks if t.left.any()] if e.settings["direction"] != "both" else []
    why = [f"object {t.id} is visible but not followed{_frames(e, spans(t.left))}" for t in hit]
    if hit:
        text = "It is followed to both sides of its masks."
        yield sum(t.left.mean() for t in hit), Advice("Both directions", why, text, [_command(e, "both", direction="both")])


RULES: tuple[Callable[[Explanation], Found], ...] = (
    _better_proposals, _more_resolution, _appearance, _one_each, _a_mask_there, _where_passes_part, _refine_less, _follow_back,
)  # fmt: skip


def _can_learn(e: Explanation) -> bool:
    """Whether --online is something new, there is a network that can learn, and a single object: it may swap similar ones."""
    return not e.settings["online"] and e.settings["preset"] != "iou" and len(e.tracks) == 1


def _loss(t: Track) -> float:
    return t.split.get("loss", 0.0)


def _large(t: Track, part: str) -> bool:
    """Whether this part of an object's loss is worth a rule."""
    return _loss(t) >= FINE and t.split.get(part, 0.0) >= max(LEAST, SHARE * _loss(t))


def _cost(hit: list[Track], part: str) -> float:
    return sum(t.split.get(part, 0.0) for t in hit)


def _size(t: Track, e: Explanation) -> float:
    """The object's usual size, in pixels of a frame of 240 lines."""
    seen = t.truth if e.compared is not None else t.area
    seen = seen[seen > 0]
    return float(np.median(seen)) * (240 / min(e.size)) ** 2 if len(seen) else np.inf


def _small(t: Track, e: Explanation) -> bool:
    return _size(t, e) < SMALL


def _where(e: Explanation, t: Track, lost: np.ndarray) -> str:
    """The frames in which a part of the loss is bad."""
    with np.errstate(invalid="ignore"):
        return _frames(e, spans(t.scored & (lost > BAD)), "; it is worst in")


def _frames(e: Explanation, where: list[Span], word: str = " in", most: int = 3) -> str:
    """ " in 00003, 00005 to 00012 and 4 more", the longest spans."""
    if not where:
        return ""
    kept = sorted(sorted(where, key=lambda span: span.first - span.last)[:most])
    rest = sum(b - a + 1 for a, b in set(where) - set(kept))
    named = ", ".join(e.stems[a] if a == b else f"{e.stems[a]} to {e.stems[b]}" for a, b in kept)
    return f"{word} {named}" + (f" and {rest} frame{'s' * (rest > 1)} more" if rest else "")


def _masks(e: Explanation) -> str:
    """The folder that further masks go to: that of the run's, or a new one."""
    given = Path(e.settings["masks"])
    return str(given) if given.is_dir() else f"{e.run}-masks"


def _masks_folder(e: Explanation) -> list[str]:
    given, folder = e.settings["masks"], _masks(e)
    if folder == given:
        return []
    first = min((int(np.argmax(t.given)) for t in e.tracks if t.given.any()), default=0)
    return [shlex.join(["mkdir", folder]) + " && " + shlex.join(["cp", given, f"{folder}/{e.stems[first]}.png"])]


OPTIONS = {  # of `dmm-fast segment`, and what leaves them out
    "proposals": "small", "detector_weights": None, "image_id_offset": None, "online": None, "preset": None,
    "backbone": None, "weights": None, "short_side": None, "refine": None, "matcher": "dmm", "decision": "confident", "device": "cpu",
    "precision": "float32",
}  # fmt: skip


def _command(e: Explanation, name: str, **changes: Any) -> str:
    """The run's command with some settings changed, and a folder of its own."""
    settings = {**e.settings, **changes}
    if "proposals" in changes:
        settings |= {"image_id_offset": None, "detector_weights": None}
    words = ["dmm-fast", "segment", settings["frames"], "--masks", settings["masks"], "--out", f"{e.run}-{name}"]
    if settings["direction"] != "forward" or not any(
        t.given[0] for t in e.tracks
    ):  # else it is what the command does by itself
        words += ["--direction", settings["direction"]]
    for key, usual in OPTIONS.items():
        if settings.get(key, usual) not in (usual, None, "DEFAULT") or key in changes:
            words += [f"--{key.replace('_', '-')}", str(settings[key])]
    return shlex.join(words + ["--clean-masks"] * bool(settings.get("clean_masks")))
