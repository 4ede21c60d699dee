"""``dmm-fast explain``: why a run failed, and what to try."""

from __future__ import annotations

import argparse
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import add_command, check_device, count


def add(commands: Any) -> None:
    parser = add_command(
        commands, "explain", run, "why a run failed: proposals, matching or refinement, and what to try",
        "Take a run of dmm-fast segment apart and write RUN/explain.html, one page to read or to pass on.\n\n"
        "With ground truth, what each object's masks miss (1 - J) is split, frame by frame, into\n"
        "  recall      no proposal covers it better\n"
        "  matching    another proposal was taken, or none (the object was lost)\n"
        "  refinement  what the refined mask loses against the proposal; below 0: what it gains\n"
        "and identity switches and lost spans are found. Without it, the page shows scores, spans in which objects were lost,\n"
        "likely switches and where forward and backward passes disagree. Both end in what to try, with the commands to type.\n\n"
        "If the run had a live detector, it runs again, in the frames that have ground truth; --no-proposals leaves that out.",
        ("dmm-fast explain result --gt Annotations/clip", "PNGs named like the frames; not every frame needs one"),
        ("dmm-fast explain result", "without ground truth"),
        ("dmm-fast explain result --gt Annotations/clip --json explain.json --out /tmp/clip.html", "all figures, too"),
    )  # fmt: skip
    parser.add_argument("result", metavar="RUN", help="the folder that dmm-fast segment has written")
    parser.add_argument("--gt", metavar="DIR", help="ground truth: id maps (indexed PNGs) named like the frames")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN/explain.html)")
    parser.add_argument("--json", metavar="FILE", help="write all figures, those of every frame too")
    parser.add_argument(
        "--worst", type=partial(count, least=0), default=6, metavar="N", help="frames to show as pictures (default: 6)"
    )
    parser.add_argument(
        "--no-proposals", action="store_true", help="do not read or find the proposals again: only J, not split"
    )
    parser.add_argument("--frames", metavar="DIR|VIDEO", help="where the run's frames are now, if they were moved")
    parser.add_argument("--proposals", metavar="FILE|DETECTOR", help="where the run's proposals are now, if they were moved")
    parser.add_argument("--device", default="cpu", help="device of a live detector: cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, nothing printed")


def run(a: argparse.Namespace) -> int:
    from dmm_fast.inference.advice import advise
    from dmm_fast.inference.explain import explain
    from dmm_fast.inference.explain_page import write_page
    from dmm_fast.inference.folder import EXPLAINED

    check_device(a.device)
    out = Path(a.out or Path(a.result) / EXPLAINED)
    for path in filter(None, (a.out, a.json)):
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path}: there is no directory {Path(path).parent}")
    explained = explain(
        a.result,
        a.gt,
        frames=a.frames,
        proposals=a.proposals,
        use_proposals=not a.no_proposals,
        device=a.device,
        progress=not a.quiet,
    )
    advice = advise(explained)
    write_page(explained, advice, out, a.worst)
    if a.json is not None:
        explained.to_json(a.json, advice)
    if not a.quiet:
        for note in explained.notes:
            print(f"note: {note}")
        print(explained.table())
        for one in advice:
            print(f"\n{one.title}")
            print("\n".join(textwrap.fill(line, 110, initial_indent="  - ", subsequent_indent="    ") for line in one.why))
            print(textwrap.fill(one.how, 110, initial_indent="  ", subsequent_indent="  "))
            print("\n".join(f"    {command}" for command in one.commands))
        print(f"\n{'page':12}{out}" + (f"\n{'figures':12}{a.json}" if a.json else ""))
    return 0
