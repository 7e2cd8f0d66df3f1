"""What is hardly meant about one map or one list of joints: the findings of `src.data.check`, each (kind, reason, fix)."""

from collections.abc import Iterator

import numpy as np

from src.data.records import Records
from src.data.signals import SIGNALS, read_joints
from src.data.source import Source
from src.tasks.base import Task
from src.tasks.nearness import map_nearness
from src.types import Sample, UserError

BLACK, FLAT = 5, 3  # of 255: at most so bright, and at most so much between darkest and brightest
NOTHING = "it tells an adapter nothing"
WHITE_SHARE = 0.5
TWELVE_BITS = 4096  # values of as many bits stay below it
NORMALISED = 1.5  # the largest coordinate of joints that are shares of a side, with some outside of the picture
OUTSIDE_SHARE = 0.5
Odd = tuple[str, str, str]


def odd_map(signal: str, values: np.ndarray, depth_is: str) -> Iterator[Odd]:
    """For a map as a sample carries it. depth_is: see `check_sources`."""
    kind, what = SIGNALS[signal], f"its {signal} map"
    if kind == "depth" and depth_is == "map":
        yield from _odd_depth_map(values, what)
        return
    gray = values.mean(-1) if values.ndim == 3 else values.astype(np.float32)
    if kind in ("depth", "labels"):  # numbers, and no brightness
        yield from odd_picture(what, gray, 0, 1e-6 * abs(float(gray.max())))
    elif kind == "edges" and (white := float((gray > 127).mean())) > WHITE_SHARE:
        yield "inverted edges", f"{what} is {white:.0%} white", "edges are white on black here; invert the files"
    else:
        yield from odd_picture(what, gray)


def odd_picture(what: str, gray: np.ndarray, black: float = BLACK, flat: float = FLAT) -> Iterator[Odd]:
    """For (H, W) numbers that are at most `black` all over, or differ by at most `flat`."""
    if gray.max() <= black:
        yield "black condition", f"{what} is black all over", NOTHING
    elif np.ptp(gray) <= flat:
        yield "flat condition", f"{what} is one value all over", NOTHING


def odd_condition(task: Task, sample: Sample, seed: int) -> Iterator[Odd]:
    """For the condition that a training would show of a sample, made of a map of the data or of the picture."""
    try:
        shown = task.condition_of(sample, seed)
    except UserError as error:
        reason, _, fix = str(error).removeprefix(f"{sample.id}: ").rpartition("; ")
        yield "unreadable", reason or fix, fix if reason else "give a map that the task can read"
        return
    yield from odd_picture(f"its condition of task={task.name}", shown.mean(-1))


def _odd_depth_map(values: np.ndarray, what: str) -> Iterator[Odd]:
    """For a finished depth map, which is judged as the training will see it."""
    try:
        gray = 255 * map_nearness(values, "")
    except UserError as error:
        fix = "scale them to one of these, or write depth_is=distance or nearness here and task.signal_is in the training"
        yield "unreadable", str(error).removeprefix(": ").rpartition("; ")[0], fix
        return
    if values.dtype == np.uint16 and 0 < values.max() < TWELVE_BITS:
        reason = f"{what} is nearly black: its 16-bit values stay at or below {values.max()}, and white is 65535"
        yield "twelve bits", reason, "save it with 8 bits, or multiply its values"
    else:
        yield from odd_picture(what, gray)


def odd_joints(source: Source, row: int, sample: Sample) -> Iterator[Odd]:
    """For the joints of a sample, in pixels of the picture that they were written for where the source has records."""
    joints, (height, width) = np.asarray(sample.signals["joints"]), sample.image.shape[:2]
    records: Records | None = getattr(source, "records", None)
    if records is not None:
        place = source.rows[row // source.copies]
        joints = read_joints(records.raw(place, "joints"), records.name(place, "joints"))
        height, width = source.probe(row).size
    seen = joints[joints[..., 2] > 0][:, :2] if joints.size else joints.reshape(0, 2)
    if not len(seen):
        yield "black condition", "its joints show nobody", NOTHING
    elif seen.max() <= NORMALISED:
        reason = f"its joints lie within {seen.min():g}..{seen.max():g}, as shares of a side do, and are read as pixels"
        yield "odd joints", reason, f"multiply columns by {width} and rows by {height}"
    elif (out := int(((seen < 0) | (seen > (width, height))).any(1).sum())) > OUTSIDE_SHARE * len(seen):
        (left, top), (right, bottom) = seen.min(0), seen.max(0)
        box = f"columns {left:g}..{right:g} and rows {top:g}..{bottom:g}"
        reason = f"{out} of its {len(seen)} visible joints lie outside of its {width} x {height} pixels, at {box}"
        yield "odd joints", reason, "write (column, row) in pixels of the upright picture; are they another picture's?"
