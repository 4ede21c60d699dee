"""Object masks on disk: indexed PNGs in the DAVIS layout, read with every check that users need, written atomically.

An *id map* is a uint8 array [H, W]: 0 is background, 1..254 are objects; 255 is the field's "void" label.
Nothing is guessed silently: what has one meaning is converted and noted, everything else is refused with a `MaskError`
that names the file and the rule.
"""

from __future__ import annotations

import os
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dmm_fast.data.strays import find_strays, remove_strays
from dmm_fast.files import whole_file

VOID = 255
MAX_FLAT_COLOURS = 32  # more colours than this are a picture, not a mask


class MaskError(ValueError):
    """A mask file that cannot be read as object ids without guessing."""


class MaskWarning(UserWarning):
    """A mask file had to be converted; the message says how."""


def _pascal_palette() -> np.ndarray:
    """The Pascal VOC colours, uint8 [256, 3]: bits 0, 1, 2 of an id are the top bits of R, G, B; 3, 4, 5 the next."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= (ids >> bit & 1).astype(np.uint8) << (7 - bit // 3)
    return colours


_COLOURS = _pascal_palette()
PALETTE: bytes = _COLOURS.tobytes()  # 768 bytes, as PIL's putpalette takes them


def _pack(rgb: np.ndarray) -> np.ndarray:
    """Colours [..., 3] uint8 as one integer each, [...] int32."""
    r, g, b = (rgb[..., channel].astype(np.int32) for channel in range(3))
    return r << 16 | g << 8 | b


def _colour_table() -> tuple[np.ndarray, np.ndarray]:
    """Sorted packed colours and their ids. DAVIS's own files have 191 where Pascal's formula gives 192; both count."""
    davis = _COLOURS[:22].copy()  # from 22 on DAVIS's palette is grey: those say nothing of the id
    davis[davis == 192] = 191
    table = {int(code): i for colours in (davis, _COLOURS) for i, code in enumerate(_pack(colours))}
    codes = np.array(sorted(table), np.int32)
    return codes, np.array([table[code] for code in codes.tolist()], np.uint8)


_CODES, _CODE_IDS = _colour_table()


# ---------------------------------------------------------------------------------------------------------- reading


def _open(path: str | os.PathLike) -> tuple[str, np.ndarray]:
    """Kind ("index", "grey" or "colour") and pixels, uint8 [H, W] or [H, W, 3]."""
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        raise MaskError(f"{path}: not an image file that Pillow can read") from None
    except (OSError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # no such file, no permission: Python says it well
            raise
        raise MaskError(f"{path}: the image is damaged or cut short ({error})") from None
    if image.format in ("JPEG", "MPO", "WEBP"):
        raise MaskError(f"{path}: a {image.format} file smears object ids; save masks as indexed PNG")
    pixels = np.array(image)  # a copy: Pillow's own is read-only
    if image.mode == "P":
        return "index", pixels
    if image.mode in ("1", "L"):
        return "grey", pixels.astype(np.uint8)
    if image.mode.startswith("I"):
        return "grey", _narrow(path, pixels)
    if image.mode == "RGBA" and (pixels[..., 3] == 255).all():
        return _colour_or_grey(pixels[..., :3])
    if image.mode == "RGB":
        return _colour_or_grey(pixels)
    rule = "has transparent pixels" if image.mode in ("RGBA", "LA", "PA") else f"has pixel mode {image.mode}"
    raise MaskError(f"{path}: {rule}; a mask must be an indexed PNG (one object id per pixel)")


def _narrow(path: str | os.PathLike, pixels: np.ndarray) -> np.ndarray:
    """16- or 32-bit grey as uint8, where that loses nothing."""
    values = np.unique(pixels)
    if values[0] >= 0 and values[-1] <= 255:
        return pixels.astype(np.uint8)
    if set(values.tolist()) <= {0, 65535}:
        return np.where(pixels > 0, 255, 0).astype(np.uint8)
    raise MaskError(f"{path}: 16-bit values up to {values[-1]}; object ids must fit 0..254")


def _colour_or_grey(rgb: np.ndarray) -> tuple[str, np.ndarray]:
    """An RGB image of which black and white are the only colours is a 0/255 mask; any other is read by colour."""
    grey = rgb[..., 0]
    if (rgb == grey[..., None]).all() and ((grey == 0) | (grey == 255)).all():
        return "grey", np.ascontiguousarray(grey)
    return "colour", rgb


def _flat(labels: np.ndarray) -> np.ndarray:
    """Pixels [H, W] bool that lie in a 2x2 block of one value: areas of a mask do, interpolated edges do not."""
    block = (labels[:-1, :-1] == labels[1:, :-1]) & (labels[:-1, :-1] == labels[:-1, 1:]) & (labels[:-1, :-1] == labels[1:, 1:])
    flat = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(2, 2):
        flat[y : y + block.shape[0], x : x + block.shape[1]] |= block
    return flat


def _check_grey(path: str | os.PathLike, grey: np.ndarray) -> None:
    """Refuse grey levels that come from anti-aliasing, interpolation or a photograph."""
    values = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))
    between = (grey > values[0]) & (grey < values[-1])
    if values[-1] > 63 and len(values) > 4 and 2 * np.count_nonzero(_flat(grey) & between) < np.count_nonzero(between):
        raise MaskError(
            f"{path}: {len(values)} grey levels, most of them only along edges: anti-aliased or interpolated; "
            f"save the mask as an indexed PNG and resize it with nearest neighbour only"
        )


def _ids_from_colours(path: str | os.PathLike, rgb: np.ndarray) -> np.ndarray:
    """Ids [H, W] of an RGB image whose colours are all exactly the palette's."""
    codes = _pack(rgb)
    nearest = np.searchsorted(_CODES, codes).clip(max=len(_CODES) - 1)
    unknown = _CODES[nearest] != codes
    if not unknown.any():
        return _CODE_IDS[nearest]
    y, x = np.argwhere(unknown)[0]
    where = f"{np.count_nonzero(unknown)} pixels, e.g. {tuple(rgb[y, x].tolist())} at x={x}, y={y}"
    if 2 * np.count_nonzero(_flat(codes) & unknown) < np.count_nonzero(unknown):
        raise MaskError(
            f"{path}: RGB instead of indexed PNG, with anti-aliased edges ({where} between the palette's "
            f"colours); save the mask as an indexed PNG without anti-aliasing"
        )
    raise MaskError(
        f"{path}: RGB instead of indexed PNG, with colours that are not the DAVIS palette's ({where}); "
        f"save the mask as an indexed PNG"
    )


def check_size(path: str | os.PathLike, ids: np.ndarray, size: tuple[int, int] | None) -> None:
    """`size` is (H, W), or None for any."""
    if size is not None and ids.shape != tuple(size):
        turned = ids.shape == tuple(size)[::-1]
        how = "frames are read upright: turn the mask too" if turned else "resize the mask with nearest neighbour"
        raise MaskError(
            f"{path}: wrong size: the mask is {ids.shape[1]}x{ids.shape[0]}, the frames are {size[1]}x{size[0]} (width x height); {how}"
        )


def read_ids(path: str | os.PathLike) -> np.ndarray:
    """The ids a file stores, as they are: uint8 [H, W], void (255) included. What evaluation reads.

    Indexed and grey PNGs give their values (1-bit: 0 and 1), RGB gives ids where every colour is exactly the palette's
    (black and white alone: 0 and 255). Raises `MaskError` for everything else.
    """
    kind, pixels = _open(path)
    if kind == "colour":
        return _ids_from_colours(path, pixels)
    if kind == "grey":
        _check_grey(path, pixels)
    return pixels


def is_indexed(path: str | os.PathLike) -> bool:
    """Whether the file is an indexed image, which can only be an id map."""
    with Image.open(path) as image:
        return image.mode == "P"


def read_binary(path: str | os.PathLike) -> np.ndarray:
    """One object's mask, bool [H, W], whatever its edges (SegTrack's are grey): two values are background and object,
    of more grey levels those above 127 are the object."""
    kind, pixels = _open(path)
    if kind == "index":
        if len(objects := np.unique(pixels[pixels > 0]).tolist()) > 1:
            raise MaskError(f"{path}: ids {_listed(objects)} in the mask of one object")
        return pixels > 0
    if kind == "colour":
        if (pixels != pixels[..., :1]).any():
            raise MaskError(f"{path}: colours in the mask of one object; expected black, white and greys")
        pixels = pixels[..., 0]
    levels = np.unique(pixels[pixels > 0])
    if len(levels) > 1 and levels[-1] <= 127:
        raise MaskError(f"{path}: grey levels up to {levels[-1]} are not the mask of one object")
    return pixels > (127 if len(levels) > 1 else 0)


def _object_ids(
    path: str | os.PathLike, size: tuple[int, int] | None, number_colours: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Ids without void, and what was converted."""
    kind, pixels = _open(path)
    check_size(path, pixels[..., 0] if kind == "colour" else pixels, size)
    if kind == "colour":
        if number_colours and (numbered := _number_colours(pixels)):
            return numbered
        ids, notes = _drop_void(_ids_from_colours(path, pixels))
        return ids, ["RGB instead of indexed PNG: every colour is exactly the palette's, read as its id", *notes]
    if kind == "index":
        return _drop_void(pixels)
    _check_grey(path, pixels)
    values = np.unique(pixels)
    objects = values[(values != 0) & (values != VOID)].tolist()
    if VOID in values and not objects:
        return (pixels == VOID).astype(np.uint8), ["0/255 mask: 255 read as the object"]
    if VOID in values and objects != list(range(1, len(objects) + 1)):
        raise MaskError(
            f"{path}: grey values {_listed([*objects, VOID])} may be object ids with void or several grey "
            f"levels of one mask; save the mask as an indexed PNG with ids 1, 2, ..."
        )
    return _drop_void(pixels)


def _drop_void(ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    void = ids == VOID
    if not void.any():
        return ids, []
    return np.where(void, np.uint8(0), ids), [f"{np.count_nonzero(void)} void pixels (255) read as background"]


def _number_colours(rgb: np.ndarray) -> tuple[np.ndarray, list[str]] | None:
    """Ids in reading order for flat colours on black that are not the palette's; None where this is not such a mask."""
    codes = _pack(rgb)
    colours, first, labels = np.unique(codes, return_index=True, return_inverse=True)
    labels = labels.reshape(codes.shape)
    solid = np.unique(labels[_flat(codes)])
    if np.isin(colours, _CODES).all() or colours[0] != 0 or not len(solid) == len(colours) <= MAX_FLAT_COLOURS:
        return None
    order = np.argsort(first[1:])  # colours[0] is black
    number = np.zeros(len(colours), np.uint8)
    number[1 + order] = np.arange(1, len(colours))
    named = ", ".join(f"#{colours[1 + i]:06x} -> {n}" for n, i in enumerate(order, start=1))
    return number[labels], [f"RGB instead of indexed PNG: colours on black numbered in reading order: {named}"]


def _listed(values: list[int], most: int = 8) -> str:
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")


def read_mask(path: str | os.PathLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """Object ids of one mask file, uint8 [H, W], without void; may be empty.

    `size` is the (H, W) the mask must have. A conversion (exact palette RGB, a 0/255 mask as one object, void as
    background) is reported as a `MaskWarning`; what is ambiguous raises `MaskError`.
    """
    ids, notes = _object_ids(path, size)
    for note in notes:
        warnings.warn(f"{path}: {note}", MaskWarning, stacklevel=2)
    return ids


def without_strays(path: str | os.PathLike, ids: np.ndarray, clean: bool = False) -> tuple[np.ndarray, list[str]]:
    """Refuse ids [H, W] that anti-aliasing, interpolation or compression has made (see `find_strays`), or clean them away.

    clean: stray pixels get the nearest id that was drawn. -> ids and what was done. Raises `MaskError`.
    """
    strays = find_strays(ids)
    if not strays.smoothed:
        return ids, []
    if strays.dithered:
        raise MaskError(
            f"{path}: dithered or compressed with loss: its areas are patterns of several ids ({strays}), so which is meant "
            f"is unknown; save the mask as an indexed PNG without dithering and anti-aliasing"
        )
    if not clean:
        raise MaskError(
            f"{path}: an anti-aliased or interpolated picture: {strays}, along the outlines; save the mask as an indexed PNG "
            f"without anti-aliasing, resize it with nearest neighbour only, or give them to their neighbours (--clean-masks)"
        )
    cleaned, left = ids, strays
    for _ in range(3):  # what lay between two stray ids may now lie between two others
        cleaned = remove_strays(cleaned, left)
        if not (left := find_strays(cleaned)).smoothed:
            break
    else:
        raise MaskError(f"{path}: still looks anti-aliased or interpolated after cleaning: {left}; save it again without")
    gone = sorted(set(np.unique(ids).tolist()) - set(np.unique(cleaned).tolist()))
    removed = f"; ids {_listed(gone)} are gone" if gone else ""
    return cleaned, [f"cleaned: {strays}, along the outlines, given to the nearest other id{removed}"]


def read_first_masks(
    path: str | os.PathLike, size: tuple[int, int] | None = None, clean: bool = False
) -> tuple[np.ndarray, list[str]]:
    """The masks that start a video, from one id map or a directory: ids uint8 [H, W] and notes for the user.

    A directory holds one id map, or one mask per object, disjoint; a mask's name gives its id where all names are
    numbers in 1..254, else ids count 1, 2, ... in name order. Besides `read_mask`'s conversions, an RGB mask in flat
    colours on black is numbered in reading order. Notes tell every conversion, gaps in the ids and ids that are hardly
    seen. Stray ids are refused, or cleaned away (`without_strays`). Raises `MaskError` also where there is no object.
    """
    path = Path(path)
    files = _mask_files(path) if path.is_dir() else [path]
    if len(files) > 1:
        return _read_object_files(path, files, size)
    ids, notes = _object_ids(files[0], size, number_colours=True)
    ids, cleaned = without_strays(files[0], ids, clean)
    notes += cleaned
    objects = np.unique(ids[ids > 0]).tolist()
    if not objects:
        raise MaskError(f"{files[0]}: no object: every pixel is background" + "".join(f" ({note})" for note in notes))
    if objects[-1] != len(objects):
        notes.append(f"gaps in the object ids: {_listed(objects)}; kept as they are")
    thin = sorted(set(objects) - set(np.unique(ids[_flat(ids)]).tolist()))
    if len(thin) > 1:
        notes.append(f"ids {_listed(thin)} occur only as specks or thin lines: was the mask interpolated?")
    return ids, notes


def _mask_files(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.suffix.lower() in (".png", ".bmp") and file.name[0] != "."]
    if not files:
        raise MaskError(f"{folder}: no mask: the directory holds no PNG file")
    return sorted(files, key=lambda file: (int(file.stem) if file.stem.isdecimal() else -1, file.name))


def _read_object_files(folder: Path, files: list[Path], size: tuple[int, int] | None) -> tuple[np.ndarray, list[str]]:
    """One file per object."""
    named = [int(file.stem) if file.stem.isdecimal() else 0 for file in files]
    by_name = len(set(named)) == len(files) and min(named) >= 1 and max(named) < VOID
    numbers = named if by_name else range(1, len(files) + 1)
    if len(files) >= VOID:
        raise MaskError(f"{folder}: {len(files)} mask files; ids go up to {VOID - 1}")
    owner = {number: file.name for number, file in zip(numbers, files)}
    notes = ["one object per file: " + ", ".join(f"{name} -> {number}" for number, name in owner.items())]
    ids = np.zeros((0, 0), np.uint8)
    hint = "if the directory holds one mask per frame, give the first frame's file instead"
    for number, file in zip(numbers, files):
        mask, converted = _object_ids(file, ids.shape if ids.size else size, number_colours=True)
        notes += [f"{file.name}: {note}" for note in converted]
        values = np.unique(mask[mask > 0]).tolist()
        if len(values) > 1:
            raise MaskError(
                f"{file}: object ids {_listed(values)} in a directory of {len(files)} files, where each "
                f"must hold one object; {hint}"
            )
        if not values:
            raise MaskError(f"{file}: no object: every pixel is background")
        ids = ids if ids.size else np.zeros(mask.shape, np.uint8)
        taken = ids[mask > 0]
        if taken.any():
            raise MaskError(
                f"{file}: overlaps {owner[int(taken.max())]} at {np.count_nonzero(taken)} pixels, so which "
                f"object is in front is unknown; {hint}"
            )
        ids[mask > 0] = number
    return ids, notes


# ---------------------------------------------------------------------------------------------------------- writing


def write_mask(path: str | os.PathLike, ids: np.ndarray) -> None:
    """Write ids [H, W] uint8 as a PNG with the DAVIS palette; the file appears whole or not at all."""
    if not isinstance(ids, np.ndarray) or ids.dtype != np.uint8 or ids.ndim != 2:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise MaskError(f"write_mask: ids must be a uint8 array [H, W], got {found}")
    image = Image.fromarray(ids)
    image.putpalette(PALETTE)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG", compress_type=zlib.Z_RLE)  # twice as fast; masks are runs of one value


# ------------------------------------------------------------------------------------------- id maps and mask stacks


def ids_to_masks(ids):
    """Object ids (every value but 0, ascending) and their masks bool [N, H, W]; numpy or torch, as `ids` [H, W] is."""
    unique = np.unique(ids) if isinstance(ids, np.ndarray) else ids.unique()
    objects = unique[unique != 0]
    return objects.tolist(), ids[None] == objects[:, None, None]  # [N, H, W]


def masks_to_ids(masks, object_ids: list[int], threshold: float = 0.5):
    """One id map uint8 [H, W] from N masks, bool or scores [N, H, W]; numpy or torch, as `masks` is.

    A pixel goes to the object with the highest score there, if that is above `threshold`; of equal scores (or two bool
    masks) the first wins. `object_ids` are N ids in 1..254.
    """
    if len(object_ids) != len(masks) or not all(0 < i < VOID for i in object_ids):
        raise MaskError(
            f"masks_to_ids: {len(masks)} masks need {len(masks)} object ids in 1..{VOID - 1}, got {list(object_ids)}"
        )
    if isinstance(masks, np.ndarray):
        scores, ids = masks.astype(np.float32), np.zeros(masks.shape[1:], np.uint8)
        best = np.full(masks.shape[1:], threshold, np.float32)
    else:
        scores, ids = masks.float(), masks.new_zeros(masks.shape[1:]).byte()
        best = scores.new_full(masks.shape[1:], threshold)
    for score, object_id in zip(scores, object_ids):  # [H, W]
        wins = score > best
        ids[wins] = object_id
        best[wins] = score[wins]
    return ids
