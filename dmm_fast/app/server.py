"""The server of the page: routes with numbers only, a feed of events, and the socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
import webbrowser
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dmm_fast.app import runs
from dmm_fast.app.clip import WIDTHS
from dmm_fast.app.exports import EXPORTS
from dmm_fast.app.guard import Guard
from dmm_fast.app.live import DONE, FOLLOWING, Live
from dmm_fast.app.project import BusyError, Project, new_folder, open_project
from dmm_fast.app.worker import Settings, Worker
from dmm_fast.data.video import SUFFIXES
from dmm_fast.files import whole_file
from dmm_fast.inference.folder import RunError
from dmm_fast.inference.overlay import object_colours
from dmm_fast.model import Proposals
from dmm_fast.proposals.base import full_masks
from dmm_fast.proposals.sources import is_detector

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
SMALL_BODY = 1 << 16
KEPT = 4096  # events
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # errors that may go without the request changing
OUTLINE = 640  # pixels of the longer side at which proposals are shown
LEAST_SCORE, MOST = 0.05, 40  # of the proposals shown


class Feed:
    """Events for every page that listens; the last few are kept for one that comes back.

    A timeline is large, and the next one of the same kind and page says all that it said: only that is kept.
    """

    def __init__(self) -> None:
        self._events: dict[Any, tuple[int, str]] = {}
        self._count = 0
        self._lock = threading.Lock()

    def put(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._count += 1
            key = (event["kind"], event.get("by")) if "timeline" in event else self._count
            self._events.pop(key, None)
            self._events[key] = self._count, json.dumps(event)
            if len(self._events) > KEPT:
                del self._events[next(iter(self._events))]

    def since(self, count: int) -> list[tuple[int, str]]:
        with self._lock:
            return [event for event in self._events.values() if event[0] > count]

    @property
    def count(self) -> int:
        return self._count


class Studio:
    """What the server holds: a project (or none yet), its worker, a live source, and the export that is being made."""

    def __init__(self, folder: Path | None, settings: Settings, upload_limit: int = 4 << 30):
        self.folder, self.settings, self.upload_limit = folder, settings, upload_limit
        self.feed = Feed()
        self.project: Project | None = None
        self.worker: Worker | None = None
        self.live: Live | None = None
        self.opened = ""  # tells this project's pictures from those of another that a browser may still have
        self.stopping: Callable[[], bool] = lambda: False
        self.uploading = False
        self._export: threading.Thread | None = None

    def open(self, folder: Path, clip: Path | None) -> tuple[Project, Worker]:
        project = open_project(folder, clip)
        self.worker, self.opened = Worker(project, self.settings, self.feed.put), secrets.token_hex(4)
        self.project = project
        return self.project, self.worker

    def watch(self, source: str) -> None:
        """Open a camera or a stream; see `Live`."""
        if not is_detector(self.settings.proposals):
            raise RunError(f"{self.settings.proposals}: a stream needs a live detector for its proposals, not a file of them")
        self.live = Live(source, self.folder, self.open, self.leave, self.feed.put)

    def leave(self) -> None:
        """No project is open any more."""
        project, worker = self.project, self.worker
        self.project = self.worker = None
        if worker is not None and project is not None:
            worker.stop()
            project.close()

    def close(self) -> None:
        if self.live is not None:
            self.live.close()
        self.leave()

    def export(self, kind: str) -> None:
        project = self.project
        assert project is not None
        if self._export is not None and self._export.is_alive():
            raise HTTPException(409, "another export is being made; wait for it")
        write, name = EXPORTS[kind]
        about = {"kind": "export", "name": kind, "file": name, "of": len(project.clip)}

        def progress(done: int) -> None:
            if self.stopping():
                raise InterruptedError("the server is closing")
            if done % 5 == 0:
                self.feed.put({**about, "done": done})

        def work() -> None:
            try:
                file, began = project.folder / "exports" / name, time.time()
                write(project, file, progress)
                os.utime(file, (began, began))  # what changes from here on need not be in it
                self.feed.put({**about, "done": len(project.clip), "ready": True})
            except Exception as fault:  # the page has to say it, whatever it is
                self.feed.put({**about, "error": str(fault) or type(fault).__name__})

        self._export = threading.Thread(target=work, name="export", daemon=True)
        self._export.start()


def create_app(studio: Studio, token: str, port: int, once: str = "") -> Starlette:
    """The ASGI application. token, once: see `Guard`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(studio.close)

    routes = [
        Route("/", _page),
        Route("/static/{name}", _static),
        Route("/api/state", _state),
        Route("/api/clip", _upload, methods=["POST"]),
        Route("/api/events", _events),
        Route("/api/frames/{index:int}/picture", _picture),
        Route("/api/frames/{index:int}/mask", _mask),
        Route("/api/frames/{index:int}/mask", _paint, methods=["PUT"]),
        Route("/api/frames/{index:int}/proposals", _proposals),
        Route("/api/frames/{index:int}/proposals/{number:int}", _proposal),
        Route("/api/objects", _add_object, methods=["POST"]),
        Route("/api/objects/{label:int}", _change_object, methods=["PATCH", "DELETE"]),
        Route("/api/run", _run, methods=["POST"]),
        Route("/api/stop", _halt, methods=["POST"]),
        Route("/api/live/picture", _live_picture),
        Route("/api/live/{action}", _act_live, methods=["POST"]),
        Route("/api/exports/{kind}", _export, methods=["POST"]),
        Route("/api/exports/{kind}", _exported),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused, ValueError: _wrong, OSError: _wrong, RuntimeError: _wrong}
    guard = Middleware(Guard, token, port, once)
    app = Starlette(routes=routes, lifespan=lifespan, middleware=[guard], exception_handlers=handlers)
    app.state.studio = studio
    return app


async def _refused(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    return JSONResponse({"error": fault.detail}, fault.status_code)


async def _wrong(request: Request, fault: Exception) -> Response:
    status = 409 if isinstance(fault, BusyError) else 507 if isinstance(fault, OSError) and fault.errno in DISK else 400
    return JSONResponse({"error": str(fault)}, status)


def _studio(request: Request) -> tuple[Studio, Project, Worker]:
    studio = request.app.state.studio
    if studio.project is None:
        raise HTTPException(409, "no clip is open yet")
    if request.query_params.get("of", studio.opened) != studio.opened:  # from a page that shows what was open before
        raise HTTPException(410, "another clip, or a new server, is here now")
    if studio.live is not None and studio.live.phase == FOLLOWING:
        raise HTTPException(409, "objects are being followed live; stop first")
    return studio, studio.project, studio.worker


def _frame(request: Request) -> tuple[Project, Worker, int]:
    _, project, worker = _studio(request)
    index = request.path_params["index"]
    if index >= len(project.clip):
        raise HTTPException(404, f"no frame {index}; the clip has {len(project.clip)}")
    return project, worker, index


async def _body(request: Request, limit: int) -> bytes:
    return b"".join([part async for part in _limited(request, limit)])


async def _limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body, refused as soon as it is, or says that it is, larger than the limit."""
    told, size = request.headers.get("content-length", "0"), 0
    if not told.isdecimal() or int(told) > limit:
        raise HTTPException(413, f"at most {limit} bytes are taken here, got {told}")
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"at most {limit} bytes are taken here")
        yield part


async def _json(request: Request) -> dict[str, Any]:
    try:
        value = json.loads(await _body(request, SMALL_BODY) or b"{}")
    except ValueError:
        raise HTTPException(400, "the body must be JSON") from None
    if not isinstance(value, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return value


# ----------------------------------------------------------------------------------------------------------- the page


async def _page(request: Request) -> Response:
    return FileResponse(STATIC / "index.html", media_type="text/html")


async def _static(request: Request) -> Response:
    files = {file.name: file for file in STATIC.iterdir() if file.suffix in TYPES}
    file = files.get(request.path_params["name"])
    if file is None:
        raise HTTPException(404, "no such file")
    return FileResponse(file, media_type=TYPES[file.suffix], headers={"Cache-Control": "no-cache"})


async def _state(request: Request) -> Response:
    studio = request.app.state.studio
    if studio.project is None:
        return JSONResponse({"clip": None, "limit": studio.upload_limit, "seq": studio.feed.count, "live": _live_state(studio)})
    return JSONResponse(await run_in_threadpool(_described, studio))


def _described(studio: Studio) -> dict[str, Any]:
    project, worker = studio.project, studio.worker
    assert project is not None and worker is not None
    height, width = project.clip.size
    return {
        "seq": studio.feed.count,
        "clip": {"name": project.named_by.name, "frames": len(project.clip), "width": width, "height": height,
                 "fps": project.clip.fps, "opened": studio.opened},
        "live": _live_state(studio),
        "folder": str(project.folder.resolve()),
        "objects": [{"id": label, "name": name} for label, name in sorted(project.names.items())],
        "colours": page_colours().tolist(),
        "timeline": project.timeline(),
        "run": worker.state,
        "exports": _made(project),
    }  # fmt: skip


def _made(project: Project) -> dict[str, bool]:
    """The exports that were made, and of each whether masks have changed since."""
    files = {kind: project.folder / "exports" / name for kind, (_, name) in EXPORTS.items()}
    made = {kind: file.stat().st_mtime for kind, file in files.items() if file.exists()}
    if not made:
        return {}
    changed = project.masks.stat().st_mtime
    with os.scandir(project.results) as found:  # the folder's own time is also that of its report
        for entry in found:
            if entry.name.endswith(".png"):
                with contextlib.suppress(FileNotFoundError):  # it is being made again
                    changed = max(changed, entry.stat().st_mtime)
    return {kind: at < changed for kind, at in made.items()}


def page_colours() -> np.ndarray:
    """The palette's hues, softer, for a dark page: uint8 [256, 3]."""
    first = [[239, 106, 91], [110, 199, 118], [232, 205, 88], [98, 146, 240], [202, 122, 218], [82, 198, 207], [188, 191, 199]]
    soft = (0.68 * object_colours() + 0.32 * 176).astype(np.uint8)
    soft[1 : 1 + len(first)] = first
    return soft


async def _upload(request: Request) -> Response:
    """A clip from the browser: it becomes the project's own."""
    studio: Studio = request.app.state.studio
    if studio.project is not None or studio.live is not None:
        raise HTTPException(409, "a clip is open already; start dmm-fast app again for another")
    if studio.uploading:
        raise HTTPException(409, "another clip is being uploaded; wait for it, or start dmm-fast app again for this one")
    name = Path(request.query_params.get("name", ""))
    suffix = name.suffix.lower()
    if not suffix[1:].isalnum() or suffix in SUFFIXES:
        raise HTTPException(400, f"a video file is needed, got {name.name!r}")
    plain = "".join(c if c.isalnum() or c in "-_ " else "_" for c in name.stem)[:60] or "clip"
    folder = studio.folder or Path(f"{plain}.dmm")
    studio.uploading = True
    try:
        with new_folder(folder) as lock:
            file = folder / f"{plain}{suffix}"
            with whole_file(file) as part, part.open("wb") as out:
                async for data in _limited(request, studio.upload_limit):
                    out.write(data)
            lock.close()  # the project takes it
            await run_in_threadpool(studio.open, folder, file)
    finally:
        studio.uploading = False
    return JSONResponse({})


async def _events(request: Request) -> Response:
    """Server-sent events: {"kind": "run" | "frame" | "changed" | "objects" | "export" | "live", ...}."""
    studio: Studio = request.app.state.studio
    asked = request.headers.get("last-event-id") or request.query_params.get("since", "0")
    if not asked.isdecimal():
        raise HTTPException(400, "since must be a number")

    async def stream() -> AsyncIterator[str]:
        seen, quiet = int(asked), 0
        while not studio.stopping():
            events = studio.feed.since(seen)
            for seen, text in events:
                yield f"id: {seen}\ndata: {text}\n\n"
            quiet = 0 if events else quiet + 1
            if quiet % 200 == 199:  # so that a browser that has gone is noticed
                yield ": still here\n\n"
            await asyncio.sleep(0.08)

    return StreamingResponse(stream(), media_type="text/event-stream")


# ------------------------------------------------------------------------------------------------------------- frames


async def _picture(request: Request) -> Response:
    project, _, index = _frame(request)
    width = request.query_params.get("width", "1280")
    if width not in map(str, WIDTHS):
        raise HTTPException(400, f"width must be one of {WIDTHS}, got {width!r}")
    picture = await run_in_threadpool(project.clip.picture, index, int(width))
    return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


async def _mask(request: Request) -> Response:
    """Runs (`dmm_fast.app.runs`); what else is known of the frame is in the header X-Frame."""
    studio: Studio = request.app.state.studio
    project, _, index = _frame(request)

    def read() -> Response:
        with project.lock:
            before, ids = project.status[index], project.ids(index)
            about = json.dumps(project.about(index))
            if project.status[index] != before:  # its result is damaged
                studio.feed.put({"kind": "changed", "timeline": project.timeline(), "by": ""})
        return Response(runs.encode(ids), media_type="application/octet-stream", headers={"X-Frame": about})

    return await run_in_threadpool(read)


async def _paint(request: Request) -> Response:
    """A frame as it was painted: runs in the body; ?given=1,2 the objects touched, ?ends=3 those not followed on."""
    studio, project, worker = _studio(request)
    _, _, index = _frame(request)
    given, ends = (_numbers(request, name) for name in ("given", "ends"))
    data = await _body(request, 4 * project.clip.size[0] * project.clip.size[1])

    def write() -> Response:
        ids = runs.decode(data, project.clip.size)
        if worker.running:  # what it makes would rest on the masks before
            worker.stop()
        project.paint(index, ids, given, ends)
        worker.changed()
        studio.feed.put({"kind": "changed", "timeline": project.timeline(), "by": request.query_params.get("by", "")})
        return JSONResponse(project.about(index))

    return await run_in_threadpool(write)


def _numbers(request: Request, name: str) -> list[int]:
    words = [word for word in request.query_params.get(name, "").split(",") if word]
    if not all(word.isdecimal() and 1 <= int(word) <= 254 for word in words):
        raise HTTPException(400, f"{name} must be object ids, got {request.query_params[name]!r}")
    return [int(word) for word in words]


async def _proposals(request: Request) -> Response:
    """The masks to choose from, small: their rows' runs of background and object in turn, beginning with background."""
    project, worker, index = _frame(request)
    return JSONResponse(await run_in_threadpool(_outlines, worker.proposals, index, project.clip.size))


def _outlines(proposals: Callable[[int], Proposals], index: int, size: tuple[int, int]) -> dict[str, Any]:
    found = proposals(index)
    shrink = min(1.0, OUTLINE / max(size))
    small = (max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink)))
    chosen, masks = _scaled_masks(found, size, small)
    items: list[dict[str, Any]] = []
    for number, mask in zip(chosen, masks):
        area = int(mask.sum())
        if 8 <= area < 0.95 * mask.size and not any(_same(mask, other["mask"]) for other in items):
            items.append({"number": number, "score": round(float(found.scores[number]), 3), "area": area, "mask": mask})
    return {"height": small[0], "width": small[1], "items": [{**item, "mask": _turns(item["mask"])} for item in items]}


def _scaled_masks(found: Proposals, size: tuple[int, int], small: tuple[int, int]) -> tuple[list[int], np.ndarray]:
    """Numbers of the better proposals and their masks bool [M, h, w] at the size shown."""
    scores = found.scores
    best = scores.argsort(descending=True)[:MOST]
    best = best[scores[best] >= min(LEAST_SCORE, float(scores.max()) if len(scores) else 0)]
    some = Proposals(*(part[best] for part in found))
    if found.masks.is_floating_point():  # inside boxes: pasted at the size shown
        scale = torch.tensor([small[1] / size[1], small[0] / size[0]] * 2)
        _, _, masks = full_masks(Proposals(some.boxes * scale, some.scores, some.masks), small)
        return best.tolist(), masks.numpy()
    rows = (np.arange(small[0]) + 0.5) * size[0] / small[0]
    columns = (np.arange(small[1]) + 0.5) * size[1] / small[1]
    picked = np.ix_(rows.astype(int), columns.astype(int))
    one = (full_masks(Proposals(*(part[k : k + 1] for part in some)), size)[2][0].numpy()[picked] for k in range(len(best)))
    return best.tolist(), np.array(list(one)).reshape(len(best), *small)


def _same(mask: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.count_nonzero(mask & other) > 0.95 * np.count_nonzero(mask | other))


def _turns(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[False], mask.ravel()])
    places = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(places, prepend=0, append=mask.size).tolist()


async def _proposal(request: Request) -> Response:
    """One of them at the frame's size, as runs."""
    project, worker, index = _frame(request)
    number = request.path_params["number"]

    def read() -> Response:
        found = worker.proposals(index)
        if number >= len(found.scores):
            raise HTTPException(404, f"no proposal {number}; frame {index} has {len(found.scores)}")
        _, _, masks = full_masks(Proposals(*(part[number : number + 1] for part in found)), project.clip.size)
        return Response(runs.encode(masks[0].numpy().astype(np.uint8)), media_type="application/octet-stream")

    return await run_in_threadpool(read)


# ----------------------------------------------------------------------------------------------- a camera or a stream


def _live(request: Request) -> Live:
    studio: Studio = request.app.state.studio
    if studio.live is None:
        raise HTTPException(409, "no camera or stream is open; start dmm-fast app with one")
    return studio.live


def _live_state(studio: Studio) -> dict[str, Any] | None:
    return studio.live.state if studio.live is not None and studio.live.phase != DONE else None


async def _live_picture(request: Request) -> Response:
    """The newest frame with its masks, as soon as there is one after number ?after; its number and what is known are in X-Live.

    Without a new one within a second the answer is empty (204), with X-Live all the same.
    """
    live, stopping = _live(request), request.app.state.studio.stopping
    after, width = request.query_params.get("after", "0"), request.query_params.get("width", "1280")
    if not after.isdecimal():
        raise HTTPException(400, "after must be a number")
    if width not in map(str, WIDTHS):
        raise HTTPException(400, f"width must be one of {WIDTHS}, got {width!r}")
    for _ in range(50):
        if live.count > int(after) or stopping():
            break
        await asyncio.sleep(0.02)
    number, picture = 0, b""
    if live.count > int(after):
        number, picture = await run_in_threadpool(live.picture, int(width))
    headers = {"X-Live": json.dumps({"number": number, **live.state})}
    return Response(picture, 200 if picture else 204, headers, media_type="image/jpeg")


async def _act_live(request: Request) -> Response:
    """take, back, follow {"record": true}, stop, connect: see `Live`."""
    live, body = _live(request), await _json(request)
    actions: dict[str, Callable[[], None]] = {
        "take": live.take, "back": live.back, "stop": live.stop, "connect": live.connect,
        "follow": lambda: live.follow(body.get("record", True) is not False),
    }  # fmt: skip
    act = actions.get(request.path_params["action"])
    if act is None:
        raise HTTPException(404, f"a live source takes {', '.join(actions)}")
    await run_in_threadpool(act)
    return JSONResponse(live.state)


# --------------------------------------------------------------------------------------------- objects, runs, exports


def _changed(studio: Studio) -> Response:
    described = _described(studio)
    studio.feed.put({"kind": "objects", "objects": described["objects"], "timeline": described["timeline"]})
    return JSONResponse(described)


async def _add_object(request: Request) -> Response:
    studio, project, _ = _studio(request)
    name = (await _json(request)).get("name")
    if name is not None and not isinstance(name, str):
        raise HTTPException(400, "name must be a string")
    label = await run_in_threadpool(project.add_object, name)
    await run_in_threadpool(_changed, studio)
    return JSONResponse({"id": label, "name": project.names[label]})


async def _change_object(request: Request) -> Response:
    studio, project, worker = _studio(request)
    label, body = request.path_params["label"], await _json(request)
    if request.method == "DELETE":
        await run_in_threadpool(worker.stop)
        await run_in_threadpool(project.remove, label)
    elif isinstance(name := body.get("name"), str):
        await run_in_threadpool(project.rename, label, name)
    else:
        raise HTTPException(400, "name must be a string")
    return await run_in_threadpool(_changed, studio)


async def _run(request: Request) -> Response:
    _, _, worker = _studio(request)
    worker.start()
    return JSONResponse(worker.state)


async def _halt(request: Request) -> Response:
    _, _, worker = _studio(request)
    await run_in_threadpool(worker.stop)
    return JSONResponse(worker.state)


async def _export(request: Request) -> Response:
    studio, _, _ = _studio(request)
    if request.path_params["kind"] not in EXPORTS:
        raise HTTPException(404, f"exports are {', '.join(EXPORTS)}")
    studio.export(request.path_params["kind"])
    return JSONResponse({})


async def _exported(request: Request) -> Response:
    _, project, _ = _studio(request)
    _, name = EXPORTS.get(request.path_params["kind"], (None, None))
    if name is None or not (project.folder / "exports" / name).exists():
        raise HTTPException(404, "this has not been exported yet")
    return FileResponse(project.folder / "exports" / name, filename=f"{project.named_by.stem}-{name}")


# --------------------------------------------------------------------------------------------------------- the socket


def make_server(studio: Studio, host: str, port: int | None, once: str = "") -> tuple[uvicorn.Server, socket.socket, str]:
    """A server, the socket it listens at, and the page's address. port: None for 8765 or, where that is taken, any."""
    listener = _listen(host, port)
    port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
    app = create_app(studio, token, port, once)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    studio.stopping = lambda: server.should_exit
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return server, listener, f"http://{shown}:{port}/?token={token}"


def serve(studio: Studio, host: str, port: int | None, browser: bool) -> None:
    """Until Ctrl-C."""
    once = secrets.token_urlsafe(24) if browser else ""
    server, listener, address = make_server(studio, host, port, once)
    if studio.live is not None:
        height, width = studio.live.state["size"]
        print(f"live:    {studio.live.name}  ({width}x{height}); once a frame is taken, the project is {studio.live.folder}")
    elif studio.project is not None:
        print(f"project: {studio.project.folder}  ({len(studio.project.clip)} frames of {studio.project.clip.path})")
    print(f"open:    {address}\nCtrl-C ends it; everything is saved as you go.", flush=True)
    if browser:
        shown = f"{address.partition('=')[0]}={once}"  # the arguments of a browser can be read by every user of the machine
        threading.Timer(0.5, webbrowser.open, [shown]).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def _listen(host: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for attempt in (8765, 0) if port is None else (port,):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, attempt))
            listener.listen(128)
            return listener
        except OSError as fault:
            listener.close()
            problem = fault
    raise OSError(
        f"{host}:{port if port is not None else 8765} cannot be listened at ({problem.strerror}); choose another --port or --host"
    )
