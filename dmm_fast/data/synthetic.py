"""A koi pond: video made on the spot, with exact masks and imperfect proposals.

Textured fish bend as they swim, pass under and over each other and below drifting lily pads, while the bed of the pond
moves with the camera and light plays on it. A scene is a function of its settings and seed, and a frame a function of
the scene and its number, so any frame can be made at any time, alone and in any order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

KOI = {  # base, patches, spots
    "kohaku": ((246, 240, 228), (226, 74, 32), None),
    "sanke": ((248, 242, 232), (214, 58, 30), (28, 28, 34)),
    "yamabuki": ((250, 196, 60), (255, 226, 130), None),
    "asagi": ((112, 142, 176), (196, 210, 220), (216, 96, 52)),
    "showa": ((38, 36, 42), (232, 88, 36), (244, 238, 226)),
    "midori": ((150, 176, 84), (206, 214, 140), (52, 66, 40)),
    "beni": ((216, 60, 36), (250, 140, 80), None),
}
BEDS = (((26, 52, 54), (92, 122, 104)), ((34, 46, 60), (110, 116, 112)), ((44, 58, 40), (128, 126, 88)))


@dataclass(frozen=True)
class SceneConfig:
    """What a scene holds. Sizes and speeds are in fractions of the frame's shorter side, and per frame."""

    size: tuple[int, int] = (240, 432)  # H, W
    objects: int = 4
    strangers: int = 1  # fish that nobody asks for: not in the masks, but in the proposals
    pads: int = 2  # lily pads, which hide what swims below them
    length: tuple[float, float] = (0.42, 0.62)  # of a fish
    speed: float = 0.016
    bend: float = 0.09  # how far the tail swings, of a fish's length
    camera: float = 0.006  # the camera's speed over the bed
    miss: float = 0.06  # chance that a visible object has no proposal
    jitter: float = 1.6  # error of a proposal's outline, pixels at 240 rows
    clutter: int = 6  # proposals of nothing, per frame


@dataclass(frozen=True)
class Clip:
    """frames uint8 [T, H, W, 3] RGB, ids uint8 [T, H, W] (0 background), proposals: per frame (masks, scores)."""

    frames: np.ndarray
    ids: np.ndarray
    proposals: list[tuple[np.ndarray, np.ndarray]]


def synthetic_clip(seed: int = 0, frames: int = 40, size: tuple[int, int] = (240, 432), objects: int = 4, **config) -> Clip:
    """The first ``frames`` frames of the scene with this seed; config: further fields of SceneConfig."""
    scene = Scene(seed, SceneConfig(size=size, objects=objects, **config))
    rendered = [scene.render(time) for time in range(frames)]
    return Clip(
        np.stack([image for image, _ in rendered]),
        np.stack([ids for _, ids in rendered]),
        [scene.proposals(time) for time in range(frames)],
    )


class Scene:
    """``render(time)`` gives a frame and its object ids, ``proposals(time)`` masks [M, H, W] and scores [M] for it."""

    def __init__(self, seed: int = 0, config: SceneConfig | None = None, **changes):
        self.seed = seed
        self.config = dataclasses.replace(config or SceneConfig(), **changes)
        rng = np.random.default_rng([seed, 0])
        height, width = self.config.size
        if min(height, width) < 16 or not 1 <= self.config.objects <= 254:
            raise ValueError(f"a scene needs 16x16 pixels and 1 to 254 objects, got {self.config}")
        count = self.config.objects + self.config.strangers
        coats = rng.permutation(list(KOI))
        self.fish = [_Fish(rng, self.config, KOI[coats[index % len(KOI)]], index / count) for index in range(count)]
        depths = rng.permutation(count)
        # Bottom first: what comes later hides what came before. Ids 1..objects go to the first fish.
        self._order = [int(index) for index in depths]
        self.pads = [_Pad(rng, self.config) for _ in range(self.config.pads)]
        dark, bright = BEDS[rng.integers(len(BEDS))]
        self._bed = _noise_image(rng, 512, dark, bright)  # [512, 512, 3], tiles
        self._light = [_noise(rng, 256, base=6) for _ in range(2)]
        self._heading, self._drift = rng.uniform(0, 2 * math.pi, 2)

    # ------------------------------------------------------------------------------------------------------- pictures

    def render(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        """-> (frame uint8 [H, W, 3] RGB, ids uint8 [H, W])."""
        canvas = self._water(time)  # float32 [H, W, 3]
        ids = np.zeros(self.config.size, np.uint8)
        for index in self._order:
            layer = self.fish[index].draw(time)
            _cast_shadow(canvas, layer, self._unit)
            label = index + 1 if index < self.config.objects else 0
            _paint(canvas, ids, layer, label)
        for pad in self.pads:
            layer = pad.draw(time)
            _cast_shadow(canvas, layer, self._unit)
            _paint(canvas, ids, layer, 0)
        canvas *= self._caustics(time)[..., None]
        return np.clip(canvas, 0, 255).astype(np.uint8), ids

    @property
    def _unit(self) -> float:
        """Pixels per shorter side; a pixel at 240 rows is unit / 240."""
        return float(min(self.config.size))

    def _water(self, time: int) -> np.ndarray:
        """The bed of the pond, seen by a camera that travels and sways."""
        height, width = self.config.size
        zoom = 300 / self._unit
        travel = self.config.camera * time
        x = travel * math.cos(self._heading) + 0.05 * math.sin(0.05 * time + self._drift)
        y = travel * math.sin(self._heading) + 0.05 * math.cos(0.04 * time)
        columns = (np.arange(width) + x * self._unit) * zoom
        rows = (np.arange(height) + y * self._unit) * zoom
        return _sample_grid(self._bed, rows, columns)

    def _caustics(self, time: int) -> np.ndarray:
        """Light on the water, a factor around 1: bright lines where two moving noises cross zero together, [H, W]."""
        height, width = self.config.size
        zoom = 200 / self._unit
        total = np.zeros(())
        for sign, noise in zip((1, -1), self._light):
            rows = np.arange(height) * zoom + sign * 0.9 * time
            columns = np.arange(width) * zoom + 0.7 * time
            total = total + _sample_grid(noise[..., None], rows, columns)[..., 0]
        return 0.94 + 0.34 * np.exp(-(((total - 1) * 9) ** 2))

    # ------------------------------------------------------------------------------------------------------ proposals

    def proposals(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        """What a fair detector might give: -> (masks bool [M, H, W], scores float32 [M], best first).

        Visible fish and pads with uncertain outlines, some missed, some found twice, as a part, or together with a
        neighbour; and clutter.
        """
        rng = np.random.default_rng([self.seed, 1, time])
        found: list[tuple[np.ndarray, float]] = []
        visible = [mask for mask in self._visible(time) if mask.sum() > 60 * (self._unit / 240) ** 2]
        for mask in visible:
            if rng.random() >= self.config.miss:
                found.append((self._blur(rng, mask), rng.uniform(0.7, 0.99)))
            if rng.random() < 0.3:
                found.append((self._blur(rng, mask, 2.5), rng.uniform(0.3, 0.8)))
            if rng.random() < 0.3:
                found.append((self._blur(rng, _half(rng, mask)), rng.uniform(0.2, 0.7)))
        for mask, other in zip(visible, visible[1:]):
            if rng.random() < 0.25:
                found.append((self._blur(rng, mask | other), rng.uniform(0.2, 0.6)))
        for _ in range(self.config.clutter):
            found.append((self._blob(rng), rng.uniform(0.02, 0.4)))
        found = sorted((item for item in found if item[0].any()), key=lambda item: -item[1])
        masks = np.stack([mask for mask, _ in found]) if found else np.zeros((0, *self.config.size), bool)
        return masks, np.array([score for _, score in found], np.float32)

    def _visible(self, time: int) -> Iterator[np.ndarray]:
        """The visible part of every fish and pad, bool [H, W]."""
        cover = np.zeros(self.config.size, np.uint8)
        layers = [self.fish[index].draw(time, texture=False) for index in self._order]
        layers += [pad.draw(time, texture=False) for pad in self.pads]
        for number, layer in enumerate(layers, 1):
            cover[layer.window][layer.alpha > 0.5] = number
        for number in range(1, len(layers) + 1):
            yield cover == number

    def _blur(self, rng: np.random.Generator, mask: np.ndarray, strength: float = 1.0) -> np.ndarray:
        """The mask with its outline moved in and out, smoothly, by about jitter * strength pixels."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows) == 0:
            return mask
        margin = 4 + int(3 * self.config.jitter * strength * self._unit / 240)
        window = (
            slice(max(rows[0] - margin, 0), rows[-1] + margin + 1),
            slice(max(columns[0] - margin, 0), columns[-1] + margin + 1),
        )
        part = mask[window]
        distance = ndimage.distance_transform_edt(part) - ndimage.distance_transform_edt(~part)
        wobble = ndimage.zoom(rng.normal(size=(5, 7)), np.array(part.shape) / (5, 7), order=1, grid_mode=True, mode="nearest")
        out = np.zeros_like(mask)
        out[window] = distance + (wobble + rng.normal() * 0.5) * self.config.jitter * strength * self._unit / 240 > 0
        return out

    def _blob(self, rng: np.random.Generator) -> np.ndarray:
        height, width = self.config.size
        radii = rng.uniform(0.04, 0.25, 2) * self._unit
        angle = rng.uniform(0, math.pi)
        y, x = np.ogrid[:height, :width]
        y, x = y - rng.uniform(0, height), x - rng.uniform(0, width)
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        return self._blur(rng, (along / radii[0]) ** 2 + (across / radii[1]) ** 2 < 1, 2)


# ------------------------------------------------------------------------------------------------------ what is painted


@dataclass(frozen=True)
class _Layer:
    """A thing on the canvas: alpha float32 [h, w] and colour float32 [h, w, 3] (or None) in a window of the frame."""

    window: tuple[slice, slice]
    alpha: np.ndarray
    colour: np.ndarray | None


class _Fish:
    """A body around a spine that bends like a travelling wave, with tail, fins, eyes and a coat of patches."""

    def __init__(self, rng: np.random.Generator, config: SceneConfig, coat: tuple, phase: float):
        self.size = config.size
        unit = min(config.size)
        self.length = rng.uniform(*config.length) * unit
        self.width = rng.uniform(0.13, 0.17)
        self.bend, self.beat = config.bend, rng.uniform(0.28, 0.4)
        self.phase = rng.uniform(0, 2 * math.pi)
        self.base, self.patches, self.spots = coat
        self.coat = _noise(rng, 128, base=4)
        self.dots = _noise(rng, 128, base=7)
        # The path: an ellipse around the middle with a slower wave on it; always smooth, mostly inside the frame.
        self.centre = np.array([0.5, 0.5]) + rng.uniform(-0.1, 0.1, 2)  # x, y of the frame
        self.radii = rng.uniform((0.2, 0.16), (0.36, 0.32))
        self.start = 2 * math.pi * phase + rng.uniform(-0.3, 0.3)
        circumference = math.pi * (self.radii[0] * config.size[1] + self.radii[1] * config.size[0])
        self.rate = 2 * math.pi * config.speed * unit / circumference * rng.uniform(0.8, 1.25) * rng.choice([-1, 1])
        self.sway = rng.uniform(0.03, 0.08), rng.uniform(0, 2 * math.pi)

    def position(self, time: float) -> np.ndarray:
        """x, y in pixels."""
        angle = self.start + self.rate * time
        wave = self.sway[0] * np.sin(2.3 * angle + self.sway[1] + np.array([0, 1.7]))
        place = self.centre + self.radii * (math.cos(angle), math.sin(angle)) + wave
        return place * self.size[::-1]

    def draw(self, time: int, texture: bool = True) -> _Layer:
        middle = self.position(time)
        forward = self.position(time + 0.5) - self.position(time - 0.5)
        forward = forward / np.hypot(*forward)
        window = _window(middle, 0.62 * self.length, self.size)
        y, x = np.mgrid[window].astype(np.float32)
        x, y = (x - middle[0]) / self.length, (y - middle[1]) / self.length
        along = x * forward[0] + y * forward[1]  # 0.5 at the snout, -0.5 at the tail's end
        across = y * forward[0] - x * forward[1]
        across = across - self._spine(along, time)
        half = self._half_width(along)
        edge = half - np.abs(across)  # > 0 inside
        fins = self._fins(along, across, time)
        inside = np.maximum(edge, fins)
        alpha = np.clip(inside * self.length + 0.5, 0, 1).astype(np.float32)
        colour = self._colour(along, across, half, edge, fins) if texture else None
        return _Layer(window, alpha, colour)

    def _spine(self, along: np.ndarray, time: float) -> np.ndarray:
        """Sideways place of the spine: a wave that runs to the tail and grows on its way."""
        back = np.clip(0.5 - along, 0, 1.1)
        return self.bend * (0.1 + back**2) * np.sin(5 * back - self.beat * time + self.phase)

    def _half_width(self, along: np.ndarray) -> np.ndarray:
        """Half the body's width: a rounded head, a long taper, and a tail fin that opens behind -0.3."""
        back = np.clip(0.5 - along, 0, 1)  # 0 at the snout
        body = self.width * np.sqrt(np.clip(back / 0.28, 0, 1)) * np.clip(1.06 - 0.98 * np.clip(back - 0.2, 0, 1) / 0.62, 0, 1)
        tail = 0.115 * np.clip((back - 0.74) / 0.26, 0, 1) ** 0.8
        half = np.maximum(np.maximum(body, np.where(back > 0.7, 0.016, 0)), tail)
        return np.where(np.abs(along) < 0.5, half, -0.02).astype(np.float32)

    def _fins(self, along: np.ndarray, across: np.ndarray, time: float) -> np.ndarray:
        """Two paddling ellipses beside the head; > 0 inside, in lengths."""
        paddle = 0.5 + 0.15 * math.sin(0.7 * self.beat * time + self.phase)
        x = along - 0.18
        y = np.abs(across) - 0.8 * self.width
        forward, outward = x * math.cos(paddle) + y * -math.sin(paddle), x * math.sin(paddle) + y * math.cos(paddle)
        return (1 - np.hypot((outward - 0.05) / 0.1, (forward + 0.02) / 0.042)) * 0.042

    def _colour(
        self, along: np.ndarray, across: np.ndarray, half: np.ndarray, edge: np.ndarray, fins: np.ndarray
    ) -> np.ndarray:
        body = np.clip(across / np.maximum(half, 0.02), -1, 1)  # -1..1 across the back
        u, v = (along + 0.5) * 90, (across + 0.5) * 90
        colour = np.broadcast_to(np.float32(self.base), (*along.shape, 3)).copy()
        _mix(colour, self.patches, _step(_sample(self.coat, v, u), 0.54, 0.03))
        if self.spots is not None:
            _mix(colour, self.spots, _step(_sample(self.dots, v * 1.3, u * 1.3), 0.63, 0.03))
        scales = 0.5 + 0.5 * np.cos(along * 150) * np.cos(across * 110)
        colour *= (0.95 + 0.07 * scales)[..., None]
        fin = (along < -0.26) | (edge < 0)  # tail and side fins: lighter, with rays
        rays = 0.86 + 0.12 * np.cos(np.where(edge < 0, along * 260, body * 26))
        colour[fin] = (0.45 * colour[fin] + 0.55 * (np.float32(self.base) * 0.5 + 120)) * rays[fin][:, None]
        shade = 0.52 + 0.5 * np.sqrt(np.clip(1 - body**2, 0, 1)) + 0.16 * np.exp(-(((body + 0.25) / 0.2) ** 2))
        colour *= np.where(fin, 0.92, shade)[..., None]
        eyes = np.hypot(along - 0.41, np.abs(across) - 0.62 * self.width) < 0.017
        colour[eyes] = (18, 18, 22)
        return colour


class _Pad:
    """A lily pad: a notched disk with veins, drifting on the water above everything."""

    def __init__(self, rng: np.random.Generator, config: SceneConfig):
        self.size, unit = config.size, min(config.size)
        self.radius = rng.uniform(0.1, 0.17) * unit
        self.place = rng.uniform(0.15, 0.85, 2) * config.size[::-1]
        self.drift = rng.uniform(-0.002, 0.002, 2) * unit
        self.turn, self.spin = rng.uniform(0, 2 * math.pi), rng.uniform(-0.01, 0.01)
        self.hue = np.array([rng.uniform(60, 100), rng.uniform(130, 165), rng.uniform(50, 80)], np.float32)

    def draw(self, time: int, texture: bool = True) -> _Layer:
        middle = self.place + self.drift * time
        window = _window(middle, self.radius + 2, self.size)
        y, x = np.mgrid[window].astype(np.float32)
        x, y = x - middle[0], y - middle[1]
        radius = np.hypot(x, y) / self.radius
        angle = np.arctan2(y, x) + self.turn + self.spin * time
        angle = (angle + math.pi) % (2 * math.pi) - math.pi
        notch = np.abs(angle) * radius * self.radius - 0.22 * (radius * self.radius)  # > 0 outside the notch
        inside = np.minimum((1 + 0.02 * np.cos(7 * angle) - radius) * self.radius, notch)
        alpha = np.clip(inside + 0.5, 0, 1).astype(np.float32)
        if not texture:
            return _Layer(window, alpha, None)
        veins = np.exp(-((np.abs((angle * 7 / math.pi + 0.5) % 1 - 0.5) * radius * 8) ** 2))
        shade = 0.72 + 0.25 * radius + 0.18 * veins
        rim = np.clip((radius - 0.93) * 14, 0, 1)[..., None]
        colour = self.hue * shade[..., None] * (1 - 0.35 * rim) + rim * np.array([60, 30, 20], np.float32)
        return _Layer(window, alpha, colour.astype(np.float32))


def _window(middle: np.ndarray, reach: float, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns within reach of (x, y), inside the frame; empty outside."""
    spans = []
    for place, limit in zip(middle[::-1], size):
        low = min(max(int(math.floor(place - reach)), 0), limit)
        spans.append(slice(low, max(min(int(math.ceil(place + reach)) + 1, limit), low)))
    return spans[0], spans[1]


def _paint(canvas: np.ndarray, ids: np.ndarray, layer: _Layer, label: int) -> None:
    alpha = layer.alpha[..., None]
    canvas[layer.window] += alpha * (layer.colour - canvas[layer.window])
    ids[layer.window][layer.alpha > 0.5] = label


def _cast_shadow(canvas: np.ndarray, layer: _Layer, unit: float) -> None:
    """Darkens what lies below, a little down and to the right of the thing."""
    if layer.alpha.size == 0:
        return
    soft = ndimage.uniform_filter(layer.alpha, size=max(int(0.03 * unit), 1), mode="constant")
    step = int(0.025 * unit)
    rows, columns = (slice(span.start + step, span.stop + step) for span in layer.window)
    below = canvas[rows, columns]
    below *= 1 - 0.4 * soft[: below.shape[0], : below.shape[1], None]


def _half(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The part of a mask on one side of a line through its middle."""
    y, x = np.nonzero(mask)
    angle = rng.uniform(0, 2 * math.pi)
    side = (x - x.mean()) * math.cos(angle) + (y - y.mean()) * math.sin(angle) > 0
    out = np.zeros_like(mask)
    out[y[side], x[side]] = True
    return out


# ------------------------------------------------------------------------------------------------------------ textures


def _noise(rng: np.random.Generator, size: int, base: int, octaves: int = 5) -> np.ndarray:
    """Smooth noise that tiles, float32 [size, size] in 0..1; base: coarse cells per side."""
    total = np.zeros((size, size))
    for octave in range(octaves):
        cells = base << octave
        if cells >= size:
            break
        grid = rng.normal(size=(cells, cells))
        total += ndimage.zoom(grid, size / cells, order=3, mode="grid-wrap", grid_mode=True) / 1.9**octave
    low, high = np.quantile(total, [0.01, 0.99])
    return np.clip((total - low) / (high - low), 0, 1).astype(np.float32)


def _noise_image(rng: np.random.Generator, size: int, dark: tuple, bright: tuple) -> np.ndarray:
    """A bed of sand and pebbles between two colours, float32 [size, size, 3]."""
    sand, pebbles, tint = _noise(rng, size, 5), _noise(rng, size, 28, octaves=2), _noise(rng, size, 3, octaves=2)
    level = 0.65 * sand + 0.35 * _step(pebbles, 0.55, 0.08) * (0.5 + 0.5 * pebbles)
    colour = np.array(dark, np.float32) + level[..., None] * (np.array(bright, np.float32) - np.array(dark, np.float32))
    return (colour * (0.85 + 0.3 * tint[..., None] * np.array([1.0, 0.95, 0.8], np.float32))).astype(np.float32)


def _sample_grid(texture: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear look-up on the grid rows x columns of a texture [S, S, C] that tiles: [H, W, C]. Separable, so fast."""
    for axis, places in ((0, rows), (1, columns)):
        low = np.floor(places).astype(int)
        part = (places - low).astype(np.float32).reshape([-1 if axis == dim else 1 for dim in range(3)])
        size = texture.shape[axis]
        near, far = texture.take(low % size, axis), texture.take((low + 1) % size, axis)
        texture = near + part * (far - near)
    return texture


def _sample(texture: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear look-up at any places of a texture [S, S] that tiles."""
    return ndimage.map_coordinates(texture, [rows, columns], order=1, mode="grid-wrap")


def _step(values: np.ndarray, at: float, softness: float) -> np.ndarray:
    return np.clip((values - at) / softness + 0.5, 0, 1)


def _mix(colour: np.ndarray, other: tuple, weight: np.ndarray) -> None:
    colour += weight[..., None] * (np.array(other, np.float32) - colour)
