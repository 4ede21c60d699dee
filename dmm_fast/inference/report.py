"""The report of a run: what `OUT/report.json` says of its frames and objects."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from dmm_fast.inference.segmenter import ObjectResult


def speed(count: int, seconds: dict[str, float]) -> dict[str, Any]:
    total = sum(seconds.values())
    return {
        "frames": count,
        "fps": round(count / total, 2) if total else None,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def by_object(rows: list[dict]) -> dict[str, dict[str, Any]]:
    """Per object: the first frame it was given in, frames followed, in how many of those it was lost or shared its proposal
    with another object (one of the two is then hidden), mean score where it was not lost."""
    given: dict[int, str] = {}
    for row in rows:
        for entry in row["objects"]:
            if "given" in entry:
                given.setdefault(entry["id"], row["frame"])
    summary = {}
    for label, frame in given.items():
        followed = [e for row in rows for e in row["objects"] if e["id"] == label and "given" not in e]
        scores = [entry["score"] for entry in followed if not entry["lost"]]
        summary[str(label)] = {
            "given": frame,
            "frames": len(followed),
            "lost": len(followed) - len(scores),
            "shared": sum(label in sharing(row) for row in rows),
            "mean_score": round(float(np.mean(scores)), 4) if scores else None,
        }
    return summary


def row_of(found: ObjectResult) -> dict[str, Any]:
    score, runner_up = (round(value, 4) + 0.0 for value in (found.score, found.runner_up))  # + 0.0: no "-0.0"
    return {"id": found.id, "proposal": found.proposal, "score": score, "runner_up": runner_up, "lost": found.lost}


def remark(row: dict, short: bool = False) -> str:
    """What is worth a word about a frame. short: without the word object, which tells an id from a number of objects."""
    lost = [entry["id"] for entry in row["objects"] if entry.get("lost")]
    parts = (("lost", lost), ("one mask for", sharing(row)))
    told = ((what if short else f"{what} object{'s' * (len(ids) > 1)}", ids) for what, ids in parts if ids)
    return "; ".join(f"{what} {', '.join(map(str, ids))}" for what, ids in told)


def sharing(row: dict) -> list[int]:
    """Objects of a frame that matched a proposal which another object matched too."""
    taken = Counter(entry.get("proposal") for entry in row["objects"])
    return [e["id"] for e in row["objects"] if e.get("proposal") is not None and taken[e["proposal"]] > 1]
