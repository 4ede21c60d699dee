"""``dmm-fast app``: a page in the browser to make first masks, run, correct and export."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import (
    add_command,
    add_detector_options,
    add_model_options,
    check_device,
    complain,
    count,
    model_options,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add(commands: Any) -> None:
    parser = add_command(
        commands, "app", run, "make masks, run, correct and export in the browser",
        "Open a clip in a page of your browser. Click what the detector proposes, or paint, to give objects their first\n"
        "masks; run; look; correct a frame and follow again from there; export masks, a video, cut-outs or tracks.\n\n"
        "All of it is saved in a project folder as you go. If the server is killed or the browser closed, you lose only the\n"
        "current stroke: start the command again. Other commands read the folder too:\n"
        "  PROJECT/masks     the masks you gave, for segment --masks\n"
        "  PROJECT/results   a mask for every frame; segment --out PROJECT/results --resume goes on with a run\n\n"
        "Only this machine can reach the page, and only with the token in the address that is printed.\n"
        "Needs: pip install 'dmm_fast[vos,app]'",
        ("dmm-fast app clip.mp4", "a new project in clip.dmm/, or the one that is there"),
        ("dmm-fast app camera:0", "a camera, or a stream (rtsp://..): take a frame, give masks, follow it live"),
        ("dmm-fast app --project clip.dmm", "go on with a project"),
        ("dmm-fast app", "choose a video in the browser"),
        ("dmm-fast app frames/ --device cuda --no-browser", "a directory of images, on a GPU; open the address yourself"),
        ("ssh -L 8765:127.0.0.1:8765 host dmm-fast app clip.mp4 --no-browser --port 8765",
         "on another machine, with the page on yours: the safe way to work remotely"),
    )  # fmt: skip
    parser.add_argument(
        "clip", nargs="?", metavar="VIDEO|FRAMES_DIR|SOURCE",
        help="a video file, a directory of images, or a camera or stream: camera:0, /dev/video0, rtsp://.., udp://.., tcp://..",
    )  # fmt: skip
    parser.add_argument(
        "--project", metavar="DIR",
        help="where everything is kept (default: here, the clip's name with .dmm; for a camera or stream also the time)",
    )  # fmt: skip
    parser.add_argument(
        "--proposals", default="small", metavar="FILE|DETECTOR",
        help="what can be clicked, and what a run chooses from: small (packaged, default), torchvision, FILE.safetensors, "
        "hf:MODEL, detectron2:CONFIG[:WEIGHTS], a COCO results file, or several with commas; as for segment",
    )  # fmt: skip
    server = parser.add_argument_group("server")
    server.add_argument("--port", type=partial(count, least=0), metavar="N", help="(default: 8765, or a free one)")
    server.add_argument("--no-browser", action="store_true", help="print the address only")
    server.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="listen at another address than this machine's own (default: 127.0.0.1). The token is still needed, but "
        "the connection is not encrypted: prefer ssh -L, as above",
    )  # fmt: skip
    server.add_argument(
        "--upload-limit", type=partial(count, least=1), default=4, metavar="GB", help="limit for videos you upload (default: 4)"
    )
    add_model_options(parser)
    add_detector_options(parser)


def run(a: argparse.Namespace) -> int:
    try:
        from dmm_fast.app.server import Studio, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ImportError(f"the page needs the package {error.name}: pip install 'dmm_fast[vos,app]'") from None
    from dmm_fast.app.worker import Settings
    from dmm_fast.data.stream import is_stream
    from dmm_fast.proposals.sources import DETECTORS, split

    check_device(a.device)
    for file in split(a.proposals)[1]:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: no such proposals file; a detector is {DETECTORS}")
    model = model_options(a)
    settings = Settings(a.proposals, a.detector_weights, model.pop("weights"), model.pop("device"), model.pop("graph"), model)
    studio = Studio(Path(a.project) if a.project else None, settings, a.upload_limit << 30)
    clip = Path(a.clip) if a.clip else None
    if is_stream(a.clip):
        studio.watch(a.clip)
    elif clip is not None or studio.folder is not None and (studio.folder / "project.json").exists():
        name = f"{clip.stem if clip.is_file() else clip.resolve().name}.dmm" if clip else ""
        studio.open(studio.folder or Path(name), clip)
    if a.host not in LOOPBACK:
        complain(f"others can reach this server at {a.host}, and the connection is not encrypted: give the address, which "
                 "holds the token, to nobody else")  # fmt: skip
    serve(studio, a.host, a.port, not a.no_browser)
    return 0
