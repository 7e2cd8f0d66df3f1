"""Exact maps that come with a data set: what each is called, how its file is read and how it is scaled.

A signal's name decides its kind:

- canny: edges, (height, width) or (height, width, 3) uint8; transparent pixels are black. When a map shrinks, each pixel takes
  the brightest of the block that it stands for, so that no line is lost; when it grows, the nearest pixel.
- segmentation: labels, (height, width) uint8 or uint16 as they are written (a palette's indices), by the nearest pixel.
- depth: (height, width), the file's own values: 8- or 16-bit PNG, float or 16-bit TIFF, .npy; uint8 and uint16 stay so, since
  the type says what a finished map's white is, all others are float32. Averaged when it shrinks, linear when it grows. 0 is
  no measurement, and NaN becomes 0; +inf, the sky, the map's largest finite value. A pixel is averaged over what of it was
  measured, and 0 where that is less than half.
- low_resolution, blurred: pictures, (height, width, 3) uint8, read as the image is; smaller ones keep their scale (`Frame`).
- joints: (people, joints, 3) float32: column, row, and a third number that is kept as it is (confidence or visibility, 1
  where the file has none), from JSON or .npy; continuous pixel coordinates of the upright image, (0, 0) its upper left corner.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import cv2
import numpy as np

from src.data.picture import (
    MAX_MEGAPIXELS,
    MEND,
    Raw,
    diagnosis,
    first_bytes,
    header,
    header_of,
    opened,
    read_rgb,
    too_large,
    upright,
)
from src.data.source import BadSample
from src.types import UserError

Kind = Literal["edges", "labels", "depth", "picture", "joints"]
SIGNALS: dict[str, Kind] = {
    "canny": "edges",
    "segmentation": "labels",
    "depth": "depth",
    "low_resolution": "picture",
    "blurred": "picture",
    "joints": "joints",
}
FILTERS = {  # kind -> OpenCV's filter when a map shrinks, and when it grows
    "picture": (cv2.INTER_AREA, cv2.INTER_CUBIC),
    "depth": (cv2.INTER_AREA, cv2.INTER_LINEAR),
    "edges": (None, cv2.INTER_NEAREST_EXACT),  # None: the brightest pixel of each block
    "labels": (cv2.INTER_NEAREST_EXACT, cv2.INTER_NEAREST_EXACT),
}
MAP_SUFFIXES = (".npy", ".json")  # beside those of pictures
LIMBS = ((2, 5), (3, 6), (4, 7), (8, 11), (9, 12), (10, 13))  # right and left of one joint, where a neck is joint 1
MIRRORED = {  # joints per person -> pairs that change places in a mirror
    14: LIMBS,  # the project's own scenes
    17: tuple((i, i + 1) for i in range(1, 17, 2)),  # COCO
    18: (*LIMBS, (14, 15), (16, 17)),  # OpenPose
}
NPY = b"\x93NUMPY"
MAX_JOINT_NUMBERS = 1_000_000  # of one image: 18,000 people
MAX_JSON_MIB = 64


def check_signals(names: Sequence[str], key: str) -> tuple[str, ...]:
    """The names in a fixed order. Raises UserError for one that is no signal."""
    for name in names:
        if name not in SIGNALS:
            raise UserError(f"{key}.{name} is not a signal; known: {', '.join(SIGNALS)}")
    return tuple(n for n in SIGNALS if n in names)


def map_size(signal: str, raw: Any, name: str) -> tuple[int, int] | None:
    """(height, width) of a map from its header; None for joints. Raises BadSample."""
    if SIGNALS[signal] == "joints":
        return None
    if _is_npy(raw, name):
        return npy_size(raw, name)
    found = header(raw, name)
    return found.height, found.width


def npy_size(raw: Raw, name: str) -> tuple[int, int]:
    """The first two sides of an array from the header of its .npy file. Raises BadSample."""
    shape, _, _ = _npy_header(raw, name)
    if 0 in shape[:2]:
        raise BadSample(name, f"an array of shape {shape}", MEND)
    return shape[0], shape[1]


def _npy_header(raw: Raw, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, type, bytes before the values) of a .npy file, within the limits. Raises BadSample."""
    try:
        with raw.open("rb") if isinstance(raw, Path) else io.BytesIO(raw) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            begin = stream.tell()
    except (OSError, ValueError, EOFError, TokenError, RecursionError, MemoryError) as error:  # the last three: of brackets
        raise BadSample(name, f"not a whole .npy file ({' '.join(str(error).split())})", MEND) from error
    if len(shape) < 2:
        raise BadSample(name, f"an array of shape {shape}", "write (height, width)")
    if min(shape) < 0 or dtype.hasobject or not dtype.itemsize:
        raise BadSample(name, f"an array of shape {shape} and type {dtype}", "write plain numbers")
    if np.prod(shape, dtype=float) > MAX_MEGAPIXELS * 1e6:
        raise too_large(name, f"an array of shape {shape}")
    return shape, dtype, begin


def read_map(signal: str, raw: Any, name: str, matte: str = "white") -> np.ndarray:
    """A signal's file as this module's rules say. raw: path or bytes; for joints also nested lists. Raises BadSample."""
    kind = SIGNALS[signal]
    if kind == "joints":
        return read_joints(raw, name)
    if kind == "picture":
        return read_rgb(raw, name, matte)
    if kind == "edges":
        rgb = read_rgb(raw, name, "black")
        return np.ascontiguousarray(rgb[..., 0]) if (rgb == rgb[..., :1]).all() else rgb
    values = _load_npy(raw, name) if _is_npy(raw, name) else _stored_values(raw, name, signal)
    return _as_depth(values, name) if kind == "depth" else values


def _stored_values(raw: Raw, name: str, signal: str) -> np.ndarray:
    """(height, width), the numbers in the file: no scaling, no palette."""
    with opened(raw, name) as image:
        header_of(image, name)
        whole = upright(image, name)
        if whole.mode in ("LA", "1"):
            whole = whole.convert("L")
        elif whole.mode == "P" and signal == "depth":
            whole = whole.convert("RGB")
        values = np.asarray(whole)
    if values.ndim == 3:
        if not (values[..., :3] == values[..., :1]).all():
            fix = "write one channel" if signal == "segmentation" else "write one channel of 8, 16 or 32 bits, or .npy"
            raise BadSample(name, f"a coloured picture ({whole.mode}) where {signal} is expected", fix)
        values = values[..., 0]
    return np.ascontiguousarray(values)


def _as_depth(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
        raise BadSample(name, f"{values.dtype} of shape {values.shape}, not a depth map", "write numbers of (height, width)")
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        raise BadSample(name, "a depth map without one finite value", MEND)
    if not finite.all():
        far = values[finite].max()
        values = np.where(finite, values, np.where(values == np.inf, far, np.float32(0)))
    return values


def read_joints(raw: Any, name: str) -> np.ndarray:
    """-> (people, joints, 3) float32. Raises BadSample.

    Understood are nested lists or arrays (people, joints, 2 or 3), flat lists of 3 numbers per joint for each person, and
    JSON objects that hold either under `joints`, under `people[].pose_keypoints_2d` (OpenPose) or under
    `annotations[].keypoints` (COCO).
    """
    if isinstance(raw, Path | bytes):
        raw = _load_npy(raw, name, MAX_JOINT_NUMBERS) if _is_npy(raw, name) else _load_json(raw, name)
    layouts = ", ".join(map(str, MIRRORED))
    fix = f"write (people, joints, 2 or 3) numbers, with {layouts} joints a person"
    try:
        if isinstance(raw, Mapping):
            raw = _people(raw)
        values = np.asarray(raw, np.float32)
        if not values.size:
            layout = values.shape[1] if values.ndim == 3 else 0
            return np.zeros((0, layout, 3), np.float32)
        if values.ndim == 1 or (values.ndim == 2 and values.shape[1] in (2, 3)):
            values = values[None]
        if values.ndim == 2:
            values = values.reshape(len(values), -1, 3)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadSample(name, f"no list of joints ({' '.join(str(error).split())})", fix) from error
    if values.ndim != 3 or values.shape[1] not in MIRRORED or values.shape[2] not in (2, 3):
        raise BadSample(name, f"joints of shape {values.shape}", fix)
    if not np.isfinite(values).all():
        raise BadSample(name, "joints that are not finite", "write 0, 0, 0 for a joint that is not there")
    return values if values.shape[2] == 3 else np.concatenate([values, np.ones_like(values[..., :1])], 2)


def _people(found: Mapping[str, Any]) -> Any:
    if "joints" in found:
        return found["joints"]
    if "people" in found:
        return [person["pose_keypoints_2d"] for person in found["people"]]
    return [person["keypoints"] for person in found["annotations"]]


def _load_json(raw: Raw, name: str) -> Any:
    try:
        size = raw.stat().st_size if isinstance(raw, Path) else len(raw)
        if size > MAX_JSON_MIB << 20:
            raise BadSample(name, f"JSON of {size} bytes, more than {MAX_JSON_MIB} MiB", MEND)
        return json.loads(raw.read_bytes() if isinstance(raw, Path) else raw)
    except OSError as error:
        raise BadSample(name, *diagnosis(raw, error)) from error
    except RecursionError as error:
        raise BadSample(name, "JSON of too many brackets within brackets", MEND) from error
    except ValueError as error:
        raise BadSample(name, f"not JSON ({error})", MEND) from error


def _is_npy(raw: Any, name: str) -> bool:
    try:
        return isinstance(raw, Path | bytes) and first_bytes(raw).startswith(NPY)
    except OSError as error:
        raise BadSample(name, *diagnosis(raw, error)) from error


def _load_npy(raw: Raw, name: str, most: float = math.inf) -> np.ndarray:
    """The array; nothing is allocated for values that its header claims and the file does not have. most: numbers in it."""
    shape, dtype, begin = _npy_header(raw, name)
    if math.prod(shape) > most:
        raise BadSample(name, f"an array of shape {shape}, more than {most} numbers", MEND)
    try:
        size, claimed = raw.stat().st_size if isinstance(raw, Path) else len(raw), math.prod(shape) * dtype.itemsize
        if size < begin + claimed:
            raise ValueError(f"its header claims {claimed} bytes of values, and {size - begin} are there")
        return np.load(raw if isinstance(raw, Path) else io.BytesIO(raw), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadSample(name, f"not a whole .npy file ({' '.join(str(error).split())})", MEND) from error
