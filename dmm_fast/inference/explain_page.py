"""An `Explanation` as one HTML file: tables, plots (SVG) and pictures (JPEG) are all in it, and nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from dmm_fast.files import whole_file
from dmm_fast.inference.advice import Advice
from dmm_fast.inference.explain import COLUMNS, LOSSES, Explanation, Span, Track, columns, heading, spans
from dmm_fast.inference.overlay import object_colours, overlay

# Okabe and Ito, as in the studies' figures.
BEST, TAKEN, RESULT, WRONG = "#0072b2", "#e69f00", "#111111", "#d55e00"
TRUTH = (255, 255, 255)  # its outline in pictures
WIDE, LEAST = 640, 360  # pixels: the widest picture, and what a smaller crop is enlarged to
POINTS = 2000  # of a line at most
PLOT = (880, 150)  # width and height of a plot's inside

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin: 0; } h2 { font-size: 1.15em; margin: 2.2em 0 .5em; } h3 { font-size: 1em; margin: 1.4em 0 .2em; }
p { margin: .4em 0; } .quiet, figcaption { color: #666; font-size: .9em; } ul { margin: .3em 0; padding-left: 1.3em; }
table { border-collapse: collapse; } th { font-weight: 600; color: #666; font-size: .85em; } .scroll { overflow-x: auto; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
tr.mean td { border-top: 2px solid #bbb; font-weight: 600; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; border: 1px solid #0003; }
pre { background: #f5f5f3; padding: .5em .7em; overflow-x: auto; font-size: .85em; margin: .4em 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.advice h3 { margin-top: .2em; } .advice { border-left: 4px solid #0072b2; padding: .1em 0 .1em 1em; margin: 1em 0; }
.shots { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5em; margin-bottom: 1em; } .shots.two { grid-template-columns: repeat(2, 1fr); }
figure { margin: 0; } figure img { width: 100%; display: block; background: #eee; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: #666; }
.key span { margin-right: 1.2em; } .key i { display: inline-block; width: 1.4em; height: 0; border-top: 3px solid; vertical-align: middle; margin-right: .4em; }
.key i.area { height: .8em; border: 0; }
"""

LEGEND = """Score and margin (over the runner-up) are the match's own. Lost: frames in which nothing was matched, the mask before was kept"""
WITH_TRUTH = """, or J is below .1. J: IoU with the truth, in frames in which the object is followed and visible; 1 - J is recall + matching + refinement
loss: less is better, below 0 is a gain. Not followed: visible, but no mask was given yet. Extra: frames with a mask, though the object is not visible"""


def write_page(e: Explanation, advice: Sequence[Advice], path: str | os.PathLike, pictures: int = 6) -> None:
    """Write the page; pictures: of how many of the worst frames."""
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for text in _page(e, advice, pictures):
            file.write(text + "\n")


def _page(e: Explanation, advice: Sequence[Advice], pictures: int) -> Iterator[str]:
    name = escape(os.path.basename(e.settings["frames"]))
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Explained: {name}</title>'
    yield f"<style>{STYLE}</style><h1>Why did it fail? {name}</h1>"
    plural = "s" * (len(e.tracks) != 1)
    yield f'<p class="quiet">{escape(str(e.run))}: {len(e.stems)} frames of {e.size[1]}x{e.size[0]}, {len(e.tracks)} object{plural}</p>'
    yield f"<p>{escape(_verdict(e))}</p>"
    yield from (f'<p class="quiet">Note: {escape(note)}.</p>' for note in e.notes)
    yield _table(e)
    yield "<h2>What to try</h2>"
    yield from map(_advice, advice)
    if not advice:
        yield "<p>Nothing: no object fails by much.</p>"
    shots = _worst(e, pictures)
    if shots:
        yield f"<h2>{'The worst frames' if e.compared is not None else 'Frames to look at'}</h2>"
        if e.compared is not None:
            yield '<p class="quiet">The outline in white is the truth, that in orange the proposal that was taken.</p>'
        yield from _pictures(e, shots)
    yield "<h2>Frame by frame</h2>" + _key(e)
    yield from (_plot(e, track) for track in e.tracks)
    if e.joins:
        yield "<h2>Where forward and backward meet</h2><ul>"
        for join in e.joins:
            told = f"object {join['object']}, given in {join['given'][0]} and {join['given'][1]}: joined in {join['at']}, IoU {join['iou']:.2f}"
            yield f"<li>{escape(told)}</li>"
        yield "</ul>"


def _verdict(e: Explanation) -> str:
    """The outcome in a sentence or two."""
    if e.compared is None:
        likely = sum(len(track.likely_switches) for track in e.tracks)
        lost = sum(track.figures["lost"] for track in e.tracks)
        return (f"Without ground truth these are hints. Likely switches, where a mask hardly overlaps the one before: {likely}. "
                f"Masks that matched nothing: {lost}.")  # fmt: skip
    means = e.means
    if "J" not in means:
        return "No object is visible in a frame with ground truth in which it is followed."
    loss = 100 - round(100 * means["J"])  # in hundredths
    text = f"Mean J {1 - loss / 100:.2f}, compared in {len(e.compared)} of {len(e.stems)} frames. "
    if "recall" not in means:
        return text
    recall, matching, refinement = _rounded([100 * means[name] for name in LOSSES], loss)
    refined = (
        f"- {-refinement / 100:.2f} (refinement wins back)" if refinement < 0 else f"+ {refinement / 100:.2f} (refinement)"
    )
    return text + (f"1 - J is {loss / 100:.2f} = {recall / 100:.2f} (recall: no proposal was better) + {matching / 100:.2f} "
                   f"(matching: another proposal or none was taken) {refined}.")  # fmt: skip


def _rounded(parts: list[float], total: int) -> list[int]:
    """Whole numbers near the parts that add up to the total, which is their rounded sum."""
    whole = [math.floor(part) for part in parts]
    for index in sorted(range(len(parts)), key=lambda i: whole[i] - parts[i])[: total - sum(whole)]:
        whole[index] += 1
    return whole


def _table(e: Explanation) -> str:
    rows = [track.figures for track in e.tracks]
    names = columns(rows)
    legend = LEGEND + (WITH_TRUTH if e.compared is not None else "")
    body = ["".join(_field(name, row.get(name)) for name in names) for row in rows]
    head = "".join(f"<th>{escape(heading(name))}</th>" for name in names)
    means = e.means
    mean = "".join(f"<td>{'mean' if name == 'object' else _number(means.get(name))}</td>" for name in names)
    last = f'<tr class="mean">{mean}</tr>' if len(rows) > 1 and means else ""
    return (
        f'<div class="scroll"><table><tr>{head}</tr>'
        + "".join(f"<tr>{cells}</tr>" for cells in body)
        + last
        + f'</table></div><p class="quiet">{legend}.</p>'
    )


def _field(name: str, value: float | int | None) -> str:
    if name == "object":
        return f"<td>{_dot(int(value or 0))}{value}</td>"
    shade = ""
    if name in LOSSES and value is not None:  # what it costs, or gains
        rgb = "213,94,0" if value > 0 else "0,158,115"
        shade = f' style="background:rgba({rgb},{min(abs(value), 1) * 0.7:.2f})"'
    return f"<td{shade}>{_number(value)}</td>"


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}" if isinstance(value, float) else str(value)


def _dot(label: int) -> str:
    r, g, b = object_colours()[label]
    return f'<span class="dot" style="background:rgb({r},{g},{b})"></span>'


def _advice(one: Advice) -> str:
    why = "".join(f"<li>{escape(line)}</li>" for line in one.why)
    commands = "".join(f"<pre>{escape(command)}</pre>" for command in one.commands)
    return f'<div class="advice"><h3>{escape(one.title)}</h3><ul>{why}</ul><p>{escape(one.how)}</p>{commands}</div>'


# ------------------------------------------------------------------------------------------------------------- pictures


class Shot(NamedTuple):
    frame: int
    track: Track


def _worst(e: Explanation, count: int) -> list[Shot]:
    """The frames to show: where an object is worst, apart from each other, and of as many objects as fail.

    Without ground truth: where a mask jumps or an object becomes lost, then where the match was least sure.
    """
    apart = max(3, len(e.stems) // 12)
    found: list[tuple[float, int, Shot]] = []
    for track in e.tracks:
        if e.compared is not None:
            badness = np.where(track.scored, 1 - track.j, np.nan)
        else:
            badness = np.where(track.followed & ~track.lost, -track.margin, np.nan)
            badness[[at for at, _ in track.likely_switches]] = 2
            badness[[first for first, _ in track.lost_spans]] = 1
        mine: list[int] = []
        for at in np.argsort(-badness, kind="stable"):
            if len(mine) == count or np.isnan(badness[at]):
                break
            if all(abs(at - other) >= apart for other in mine):
                found.append((badness[at] - 0.1 * len(mine), -int(at), Shot(int(at), track)))  # each further one counts less
                mine.append(int(at))
    return sorted(
        (shot for *_, shot in sorted(found, key=lambda one: one[:2], reverse=True)[:count]), key=lambda shot: shot.frame
    )


def _pictures(e: Explanation, shots: list[Shot]) -> Iterator[str]:
    """Of each frame three pictures side by side: the truth, the result, the best proposal; or the frame before and this one."""
    wanted = {shot.frame for shot in shots} | ({max(s.frame - 1, 0) for s in shots} if e.compared is None else set())
    before: tuple[int, np.ndarray] | None = None
    for at, frame in e.source.pick(sorted(wanted)):
        masks = {}
        if e.proposals:
            need = {int(n) for s in shots if s.frame == at for n in (s.track.choice[at], s.track.taken[at]) if n >= 0}
            masks = e.source.some_masks(at, frame, need)
        for shot in shots:
            if shot.frame == at:
                yield _triple(e, shot, frame, masks) if e.compared is not None else _pair(e, shot, frame, before)
        before = at, frame


def _triple(e: Explanation, shot: Shot, frame: np.ndarray, masks: dict[int, np.ndarray]) -> str:
    at, track = shot
    truth = e.source.truth(at)
    assert truth is not None
    true, ids = truth == track.id, e.source.result(at)
    best, taken = masks.get(int(track.choice[at])), masks.get(int(track.taken[at]))
    window = _window([m for m in (true, ids == track.id, best) if m is not None], e.size)
    parts = [(_draw(frame, true * np.uint8(track.id), None, window), "the truth"),
             (_draw(frame, np.where(ids == track.id, ids, 0), true, window), f"the result, J {track.j[at]:.2f}")]  # fmt: skip
    if best is not None:
        same = track.choice[at] == track.taken[at]
        told = (
            "which was taken" if same else "none was taken" if track.lost[at] else f"taken was another, {track.matched[at]:.2f}"
        )
        outline = None if same or taken is None else taken
        parts.append(
            (_draw(frame, best * np.uint8(track.id), true, window, outline), f"the best proposal, {track.best[at]:.2f}; {told}")
        )
    elif e.proposals:
        parts.append((_draw(frame, None, true, window), "no proposal overlaps it"))
    return _figures(e, shot, parts)


def _pair(e: Explanation, shot: Shot, frame: np.ndarray, before: tuple[int, np.ndarray] | None) -> str:
    at, track = shot
    shown = [(at, frame)] if before is None or before[0] != at - 1 else [before, (at, frame)]
    ids = [e.source.result(place) for place, _ in shown]
    window = _window([one == track.id for one in ids], e.size)
    parts = [(_draw(picture, one, None, window), e.stems[place]) for (place, picture), one in zip(shown, ids)]
    return _figures(e, shot, parts)


def _figures(e: Explanation, shot: Shot, parts: list[tuple[str, str]]) -> str:
    at, track = shot
    told = []
    if np.isfinite(track.score[at]):
        told.append(f"score {track.score[at]:.2f}, runner-up {track.runner_up[at]:.2f}")
    told += ["lost"] * bool(track.lost[at]) + ["one proposal with another object"] * bool(track.shared[at])
    if track.holds[at] not in (0, track.id):
        told.append(f"the mask lies on object {track.holds[at]}")
    if e.compared is None and any(at == place for place, _ in track.likely_switches):
        told.append(f"likely switch, IoU {np.nan_to_num(track.steady[at]):.2f} with the mask before")
    figures = "".join(
        f'<figure><img src="data:image/jpeg;base64,{data}" alt=""><figcaption>{escape(text)}</figcaption></figure>'
        for data, text in parts
    )
    head = f"{_dot(track.id)}Object {track.id}, frame {escape(e.stems[at])}"
    return f'<h3>{head}</h3><p class="quiet">{escape("; ".join(told))}</p><div class="shots{" two" * (len(parts) == 2)}">{figures}</div>'


def _window(masks: list[np.ndarray], size: tuple[int, int]) -> tuple[slice, slice]:
    """What to show: all of the masks and a margin, of the frame's shape, at least two fifths of it."""
    rows, columns = (np.flatnonzero(np.any([mask.any(axis) for mask in masks], 0)) for axis in (1, 0))
    if not len(rows):
        return slice(0, size[0]), slice(0, size[1])
    share = max(0.4, 1.2 * (np.ptp(rows) + 1) / size[0], 1.2 * (np.ptp(columns) + 1) / size[1])
    lengths = [min(round(share * side), side) for side in size]
    starts = [
        int(np.clip((at[0] + at[-1] + 1 - length) // 2, 0, side - length))
        for at, length, side in zip((rows, columns), lengths, size)
    ]
    return slice(starts[0], starts[0] + lengths[0]), slice(starts[1], starts[1] + lengths[1])


def _draw(
    frame: np.ndarray,
    ids: np.ndarray | None,
    true: np.ndarray | None,
    window: tuple[slice, slice],
    other: np.ndarray | None = None,
) -> str:
    """A part of a frame with masks tinted, the truth outlined in white, another proposal in orange; JPEG, base64."""
    picture = Image.fromarray(frame[window])
    width = int(np.clip(picture.width, LEAST, WIDE))
    size = width, max(1, round(picture.height * width / picture.width))
    small = np.array(picture.resize(size, Image.Resampling.LANCZOS))

    def scaled(mask: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(mask[window].astype(np.uint8)).resize(size, Image.Resampling.NEAREST))

    if ids is not None:
        small = np.array(overlay(small, scaled(ids), names=False))
    for mask, colour in ((other, tuple(bytes.fromhex(TAKEN[1:]))), (true, TRUTH)):
        if mask is not None:
            inside = scaled(mask) > 0
            small[ndimage.binary_dilation(inside) & ~inside] = 0
            small[inside & ~ndimage.binary_erosion(inside, border_value=1)] = colour
    file = io.BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=82)
    return base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------------- plots


def _key(e: Explanation) -> str:
    lines = [("score", RESULT), ("runner-up", TAKEN)]
    if e.compared is not None:
        lines = [("result, J", RESULT), *([("assigned proposal", TAKEN), ("best proposal", BEST)] if e.proposals else [])]
    parts = [f'<span><i style="color:{colour}"></i>{name}</span>' for name, colour in lines]
    parts.append('<span><i class="area" style="background:#d55e0033"></i>lost</span>')
    parts.append(
        f'<span style="color:{WRONG}">&#9660; {"switch, and to which object" if e.compared is not None else "likely switch"}</span>'
    )
    parts.append("<span>&#9670; given</span>")
    if e.settings["direction"] == "both":
        parts.append('<span><i style="color:#bbb"></i>below: from the backward pass</span>')
    told = "" if len(e.stems) <= POINTS else f'<p class="quiet">Of each {_stride(e)} frames the lowest value is drawn.</p>'
    return f'<p class="quiet key">{"".join(parts)}</p>{told}'


def _stride(e: Explanation) -> int:
    return -(-len(e.stems) // POINTS)


def _plot(e: Explanation, track: Track) -> str:
    """IoU with the truth over the frames; without truth the match's score."""
    (width, height), left, top, length = PLOT, 34, 20, len(e.stems)
    unit = width / max(length - 1, 1)

    def x(at: float) -> float:
        return round(left + unit * at, 1)

    def box(span: Span, y: float, tall: float, colour: str) -> str:
        start, end = max(x(span.first - 0.5), left), min(x(span.last + 0.5), left + width)
        return f'<rect x="{start}" y="{y}" width="{max(end - start, 1):.1f}" height="{tall}" fill="{colour}"/>'

    parts = [f'<svg viewBox="0 0 {left + width + 10} {top + height + 24}" role="img">']
    parts += [box(span, top, height, "#d55e0033") for span in track.lost_spans]
    for value in (0, 0.5, 1):
        y = top + height * (1 - value)
        parts.append(
            f'<path d="M{left} {y}h{width}" stroke="#ddd"/><text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>'
        )
    for at in np.unique(np.linspace(0, length - 1, min(length, 6)).round().astype(int)).tolist():
        parts.append(
            f'<text x="{x(at)}" y="{top + height + 18}" text-anchor="{"end" if at == length - 1 else "middle"}">{escape(e.stems[at])}</text>'
        )
    parts += [box(span, top + height + 1, 3, "#bbb") for span in spans(track.backward)]
    lines = [(track.runner_up, TAKEN, 1.2), (track.score, RESULT, 1.8)]
    if e.compared is not None:
        lines = [(track.best, BEST, 1.5), (track.matched, TAKEN, 1.5), (track.j, RESULT, 1.8)]
    for values, colour, thick in lines:
        path = _line(np.where(track.given, np.nan, values), _stride(e), x, lambda value: top + height * (1 - value))
        parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{thick}" stroke-linejoin="round" stroke-linecap="round"/>'
        )
    for at, to in track.switches if e.compared is not None else track.likely_switches:
        parts.append(f'<path d="M{x(at)} {top}v{height}" stroke="{WRONG}" stroke-dasharray="2 3"/>')
        parts.append(f'<text x="{x(at)}" y="{top - 4}" text-anchor="middle" style="fill:{WRONG}">&#9660;{to or ""}</text>')
    parts += [
        f'<text x="{x(at)}" y="{top + 9}" text-anchor="middle" style="fill:#222">&#9670;</text>'
        for at in np.flatnonzero(track.given).tolist()
    ]
    figures = track.figures
    told = ", ".join(f"{heading(name)} {_number(figures[name])}" for name in COLUMNS[2:8] if figures.get(name) is not None)
    return f'<h3>{_dot(track.id)}Object {track.id}</h3><p class="quiet">{escape(told)}</p>' + "".join(parts) + "</svg>"


def _line(values: np.ndarray, stride: int, x, y) -> str:
    """An SVG path through the values, broken where one is not known and more than one frame lies between; of each `stride` the lowest."""
    known = np.flatnonzero(np.isfinite(values))
    if stride > 1:
        known = np.array(
            [
                group[values[group].argmin()]
                for group in np.split(known, np.flatnonzero(np.diff(known // stride)) + 1)
                if len(group)
            ],
            int,
        )
    gap = max(stride * 2, int(np.median(np.diff(known))) if len(known) > 1 else 1)  # ground truth may have every 5th frame only
    parts = []
    for before, at in pairwise([-(10**9), *known.tolist()]):
        parts.append(f"{'M' if at - before > gap else 'L'}{x(at)} {y(float(np.clip(values[at], 0, 1))):.1f}")
        if at - before > gap:
            parts.append("h0.1")  # so that a single point shows
    return "".join(parts)
