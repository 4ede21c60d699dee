"""Sends a directory of images, or the first frames of one, as H.264 in real time: python sender.py DIR URL [FPS] [COUNT]."""

from __future__ import annotations

import sys
import time
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import av
from PIL import Image


def send(folder: Path, url: str, fps: float = 25, count: int = 50) -> None:
    files = sorted(folder.iterdir())
    with av.open(url, "w", format="mpegts", options={"pkt_size": "1316"} if url.startswith("udp") else {}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = Image.open(files[0]).size
        stream.pix_fmt, stream.options = "yuv420p", {"tune": "zerolatency", "preset": "ultrafast", "g": "10"}
        begin = time.monotonic()
        for index, file in enumerate(islice(cycle(files), count)):
            time.sleep(max(0.0, begin + index / fps - time.monotonic()))
            container.mux(stream.encode(av.VideoFrame.from_image(Image.open(file))))
        container.mux(stream.encode())


if __name__ == "__main__":
    folder, url, *numbers = sys.argv[1:]
    send(Path(folder), url, *map(float, numbers[:1]), *map(int, numbers[1:]))
