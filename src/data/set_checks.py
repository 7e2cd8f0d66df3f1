"""What a set of records is refused for before a picture is decoded: its number, names that stand twice, headers, shapes.

A "scan" is the header of one record's image, or what is wrong with that record.
"""

from collections.abc import Callable, Sequence

from src.data.framing import Aspect, Framing, Small, same_aspect
from src.data.picture import Header
from src.data.source import BadPair, BadSample, Split, note_once, refuse_set
from src.types import UserError

HELD_OUT_PART = 10  # of how many images one is held out where the configuration wants more than there are
Scan = Header | BadSample


def split_rows(rows: list[int], val_images: int, split: Split, where: str) -> list[int]:
    """The rows of a split: the last `val_images` are held out. Raises UserError where nothing is left to train on."""
    if val_images < 1:
        raise UserError(f"data.val_images={val_images}: at least 1 must be held out")
    if len(rows) <= val_images:
        fits = max(1, len(rows) // HELD_OUT_PART)
        fix = f"write data.val_images={fits}" if len(rows) > 1 else "give it more"
        error = UserError(f"{where} holds {len(rows)} images, and data.val_images={val_images} leaves none to train on; {fix}")
        if len(rows) < 2:
            raise error
        refuse_set(error)
        val_images = fits
    return rows[:-val_images] if split == "train" else rows[-val_images:]


def refuse_twins(ids: Sequence[str], where: str) -> None:
    """Refuse an id that stands more than once; see `refuse_set`."""
    twins = first_twins(ids)
    if twins:
        refuse_set(UserError(f"{where}: the same id stands twice: {', '.join(twins)}; rename one of each"))


def first_twins(names: Sequence[str]) -> list[str]:
    """The first 10 names that stand more than once."""
    seen: set[str] = set()
    return list(dict.fromkeys(n for n in names if n in seen or seen.add(n)))[:10]


def check_pair(name: str, signal: str, size: tuple[int, int], image: tuple[int, int]) -> None:
    """Refuse a map whose aspect ratio is not its image's: whichever were cropped would be a guess. Raises BadSample."""
    if not same_aspect(size, image):
        reason = f"the {signal} map is {size[1]} x {size[0]} pixels, its image {image[1]} x {image[0]} (upright)"
        raise BadPair(name, reason, "crop and turn both alike")


def refuse_bad(scans: Sequence[Scan], where: str) -> None:
    """Raise one UserError for all records that are bad, if there are any; a single one speaks for itself."""
    bad = [s for s in scans if isinstance(s, BadSample)]
    if len(bad) == 1:
        raise bad[0]
    if bad:
        first = ", ".join(f"{b.id} ({b.reason})" for b in bad[:10])
        fix = "mend or remove them, or write data.on_bad_sample=skip"
        raise UserError(f"{len(bad)} of {len(scans)} samples of {where} cannot be read: {first}; {fix}")


def without_small(rows: list[int], scans: Sequence[Scan], framing: Framing, where: str) -> list[int]:
    """The rows whose pictures fill their frame, or cannot be read; says once how many are left out. scans: of all records."""
    small = [r for r in rows if _is(framing.is_small, scans[r])]
    if small:
        line = f"{len(small)} of {len(rows)} pictures of {where} are smaller than their frame and left out"
        note_once(f"small {where}", line)
    left = set(small)
    return [r for r in rows if r not in left]


def check_shapes(
    ids: Sequence[str], scans: Sequence[Scan], framing: Framing, small_images: Small, aspect: Aspect, where: str
) -> None:
    """Refuse pictures that are smaller than their frame or lose an edge to it, where the configuration wants that, and say
    once how many are scaled up. ids and scans go together. Raises UserError."""
    count = len(ids)
    faults = f"of {where} are smaller than their frame"
    small = [p for p in range(count) if _is(framing.is_small, scans[p])]
    if small and small_images == "refuse":
        fix = "write data.small_images=upscale or drop, or a smaller resolution"
        raise UserError(f"{len(small)} of {count} pictures {faults}: {_sized(ids, scans, small)}; {fix}")
    if small:
        note_once(f"small {where} {count}", f"{len(small)} of {count} pictures {faults} and scaled up")
    cut = [p for p in range(count) if _is(framing.cuts, scans[p])] if aspect == "refuse" else []
    if cut:
        fix = "write data.aspect=crop, or give them a bucket in data.buckets"
        raise UserError(f"{len(cut)} of {count} pictures of {where} would lose an edge: {_sized(ids, scans, cut)}; {fix}")


def _is(test: Callable[[tuple[int, int]], bool], scan: Scan) -> bool:
    return not isinstance(scan, BadSample) and test((scan.height, scan.width))


def _sized(ids: Sequence[str], scans: Sequence[Scan], places: Sequence[int]) -> str:
    return ", ".join(f"{ids[p]} ({scans[p].width} x {scans[p].height})" for p in places[:10])
