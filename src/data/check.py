"""What is wrong with a data set, in seconds: headers and captions of all samples, and a drawn sample of them decoded.

A problem is a sample that a training would lose, misread or score itself on; a hint is something that is rarely meant, such
as a condition that is black all over. Conditions are those that come with the data, its signals, and with a task those that
it makes:

- Inverted edges: more than half of a map is white. Edges of photographs cover a tenth of a picture or so.
- Flipped depth: in most photographs the ground in the lower third is nearer than what the upper third shows. If it is
  farther in so many of the decoded maps that a fair coin would do so with p < 0.001 (sign test), that is a hint.
- Black all over, or one value all over: such a map tells an adapter nothing.
- Twelve bits in sixteen: values that stay below 4096 of 65536 are those of a camera's raw, and the picture is nearly black;
  so is a finished depth map (depth_is=map), of which values that no rule can scale are a problem.
- Odd joints: all coordinates of a picture are at most 1.5, as shares of a side, or most joints lie outside of it.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from src import rng
from src.data.odd import BLACK, FLAT, odd_condition, odd_joints, odd_map
from src.data.signals import SIGNALS
from src.data.source import BadPair, BadSample, Probe, Source
from src.data.tokens import token_counts
from src.tasks.base import Task
from src.types import UserError

# kind of finding -> whether it is a problem; the worst first
KINDS = {
    "data set": True,
    "unreadable": True,
    "pair": True,
    "caption": True,
    "in both splits": True,
    "flipped depth": False,
    "inverted edges": False,
    "black condition": False,
    "odd joints": False,
    "flat condition": False,
    "flat picture": False,
    "twelve bits": False,
    "twice": False,
}
CONDITION_KINDS = ("inverted edges", "black condition", "odd joints", "flat condition")  # and then the task's says no more
CHUNK = 8  # samples that a worker decodes at a time
TWELVE_BITS = 15  # the high byte of 4095
LEAST_LEAN, SIGN_TEST_P = 0.01, 0.001  # of a map's range: smaller differences say nothing
SIDES, COMMON = (0, 0.5, 1), 5  # quantiles of sizes, and how many of the commonest are listed


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or suspicious with one sample, or, with several names in `id`, with the whole."""

    kind: str
    split: str
    id: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}; {self.fix}"


def check_sources(
    sources: Mapping[str, Source],
    sample: int | None,
    seed: int,
    workers: int,
    tokenizer: str | None,
    depth_is: str,
    faults: Sequence[UserError] = (),
    task: Task | None = None,
) -> dict[str, Any]:
    """Look at every split of a data set -> what report.json holds.

    sample: how many samples of each split are decoded (None: all), drawn by (seed, split); workers: processes that decode;
    tokenizer: see `token_counts`; depth_is: what the numbers of a depth signal mean, `distance`, or `nearness` or `map`;
    faults: what is wrong with the set as a whole, for which a training would refuse it; task: its condition
    of each decoded sample is judged, too.
    """
    report: dict[str, Any] = {"splits": {}}
    findings, pixels = [_of_whole(fault) for fault in faults], defaultdict(list)
    for split, source in sources.items():
        probes = [source.probe(i) for i in range(len(source))]
        for probe in probes:
            findings += [
                _of(bad, _kind(bad, "unreadable" if probe.size is None else "caption"), split) for bad in probe.problems
            ]
        rows = drawn_rows(len(source), sample, seed, split)
        looks = list(_look_at(_Looks(source, rows, depth_is, task, seed), workers))
        known = {(f.id, f.reason) for f in findings}
        for row, look in zip(rows, looks, strict=True):
            found = [Finding(kind, split, *words) for kind, *words in look.findings]
            findings += [f for f in found if (f.id, f.reason) not in known]
            if look.digest:
                pixels[look.digest].append((split, probes[row].id))
        conditions = {
            signal: [look.conditions[signal] for look in looks if signal in look.conditions] for signal in source.signals
        }
        findings += _flipped(conditions, probes[rows[0]].id, split, depth_is)
        report["splits"][split] = _facts(source, probes, looks, conditions, tokenizer)
    files = _file_digests(sources)
    findings += _twins(pixels if files is None else files)
    findings.sort(key=lambda f: (list(KINDS).index(f.kind), f.split, f.id))
    report["duplicates_among"] = "decoded samples" if files is None else "all files"
    report["problems"] = [asdict(f) for f in findings if KINDS[f.kind]]
    report["hints"] = [asdict(f) for f in findings if not KINDS[f.kind]]
    return report


def drawn_rows(count: int, sample: int | None, seed: int, split: str) -> list[int]:
    """Rows to decode, in order: all, or `sample` of them, the same on any machine."""
    if sample is None or sample >= count:
        return list(range(count))
    return sorted(rng.permutation(seed, f"check-{split}", 0, count)[:sample].tolist())


# ---- one sample -------------------------------------------------------------------------------------------------------


@dataclass
class Look:
    """What one decoded sample showed. findings: (kind, id, reason, fix); digest: of its pixels, empty if unreadable;
    conditions: signal -> (share of its map that is white, by how much of its range the lower third exceeds the upper one).
    """

    id: str
    digest: str
    findings: list[tuple[str, str, str, str]]
    conditions: dict[str, tuple[float, float]]


def look(source: Source, row: int, depth_is: str, task: Task | None, seed: int) -> Look:
    """Decode one sample, and judge its picture, its maps and its condition. depth_is, task, seed: see `check_sources`."""
    try:
        sample = source[row]
    except BadSample as bad:
        return Look(source.describe(row)[0], "", [(_kind(bad, "unreadable"), bad.id, bad.reason, bad.fix)], {})
    made = Look(sample.id, hashlib.blake2b(sample.image.tobytes(), digest_size=12).hexdigest(), [], {})
    if max(int(np.ptp(sample.image[..., c])) for c in range(3)) <= FLAT:  # along both axes at once it takes ten times as long
        reason = "black all over" if sample.image.max() <= BLACK else "one colour all over"
        made.findings.append(("flat picture", sample.id, f"its picture is {reason}", "remove it if that is not meant"))
    if sample.image.max() <= TWELVE_BITS and source.probe(row).kind.partition(" ")[2].startswith("I"):
        reason = "its 16-bit values stay below 4096, as 12 bits do: it is nearly black"
        made.findings.append(("twelve bits", sample.id, reason, "multiply them by 16, or save it with 8 bits"))
    for signal in source.signals:
        values = np.asarray(sample.signals[signal])
        if SIGNALS[signal] == "joints":
            made.findings += [(kind, sample.id, reason, fix) for kind, reason, fix in odd_joints(source, row, sample)]
            continue
        gray = values.mean(-1) if values.ndim == 3 else values.astype(np.float32)
        made.conditions[signal] = float((gray > 127).mean()), _lean(gray)
        made.findings += [(kind, sample.id, reason, fix) for kind, reason, fix in odd_map(signal, values, depth_is)]
    if task is not None and not any(kind in CONDITION_KINDS for kind, *_ in made.findings):
        made.findings += [(kind, sample.id, reason, fix) for kind, reason, fix in odd_condition(task, sample, seed)]
    return made


def _lean(gray: np.ndarray) -> float:
    """By how much the mean of the lower third exceeds that of the upper third, as a share of the range; zeros, which stand
    for no measurement in depth maps, are left out. 0 where a third is empty."""
    third = max(1, len(gray) // 3)
    low, high = gray[-third:], gray[:third]
    low, high = low[low > 0], high[high > 0]
    return float((low.mean() - high.mean()) / np.ptp(gray)) if low.size and high.size and np.ptp(gray) > 0 else 0.0


class _Looks(Dataset):
    """Chunks of rows -> their looks; a class of its own so that loader workers can do the work."""

    def __init__(self, source: Source, rows: Sequence[int], *judged_by: Any):
        self.source, self.judged_by, self.chunks = source, judged_by, [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> list[Look]:
        return [look(self.source, row, *self.judged_by) for row in self.chunks[i]]


def _look_at(looks: _Looks, workers: int) -> Iterator[Look]:
    for chunk in DataLoader(looks, batch_size=None, num_workers=workers if len(looks) > 1 else 0):
        yield from chunk


# ---- all of them ------------------------------------------------------------------------------------------------------


def _of(bad: BadSample, kind: str, split: str) -> Finding:
    return Finding(kind, split, bad.id, bad.reason, bad.fix)


def _kind(bad: BadSample, else_: str) -> str:
    return "pair" if isinstance(bad, BadPair) else else_


def _of_whole(fault: UserError) -> Finding:
    reason, _, fix = str(fault).rpartition("; ")
    return Finding("data set", "both", "all of it", reason, fix)


def _flipped(conditions: Mapping[str, list[tuple[float, float]]], example: str, split: str, depth_is: str) -> Iterator[Finding]:
    for signal in (s for s in conditions if SIGNALS[s] == "depth"):
        leans = [lean for _, lean in conditions[signal] if abs(lean) > LEAST_LEAN]
        farther = sum((lean > 0) == (depth_is == "distance") for lean in leans)
        if farther and sign_test(farther, len(leans)) < SIGN_TEST_P:
            other = "nearness" if depth_is == "distance" else "distance"
            reason = (
                f"in {farther} of {len(leans)} {signal} maps, read as {depth_is}, the lower third is farther than the upper"
            )
            fix = f"are near and far exchanged? write depth_is={other} here and task.signal_is={other} in the training"
            yield Finding("flipped depth", split, f"{example} and others", reason, fix)


def sign_test(more: int, count: int) -> float:
    """Probability that a fair coin thrown `count` times shows heads `more` times or oftener."""
    return sum(math.comb(count, k) for k in range(more, count + 1)) / 2**count


def _file_digests(sources: Mapping[str, Source]) -> dict[str, list[tuple[str, str]]] | None:
    """Digest -> the files that have it, of those that share their size with another; None where pictures are no files."""
    by_size = defaultdict(list)
    for split, source in sources.items():
        records = getattr(source, "records", None)
        for row in source.rows if records is not None else ():
            try:
                file = records.raw(row, "image")
            except BadSample:  # named among the unreadable
                continue
            if not isinstance(file, Path):
                return None
            if file.is_file() and file.stat().st_size:
                by_size[file.stat().st_size].append((split, records.ids[row], file))
        if records is None:
            return None
    found = defaultdict(list)
    for split, id, file in (entry for alike in by_size.values() if len(alike) > 1 for entry in alike):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "blake2b").hexdigest()
        if (split, file) not in ((s, f) for s, _, f in found[digest]):  # one picture with several captions is meant
            found[digest].append((split, id, file))
    return {digest: [(split, id) for split, id, _ in alike] for digest, alike in found.items()}


def _twins(digests: Mapping[str, list[tuple[str, str]]]) -> Iterator[Finding]:
    for alike in digests.values():
        for split, id in alike[1:]:
            first_split, first = alike[0]
            if split != first_split:
                reason = f"the same picture as {first} of {first_split}"
                yield Finding("in both splits", split, id, reason, "scores on it are scores on what was trained; remove one")
            else:
                yield Finding("twice", split, id, f"the same picture as {first}", "remove one if that is not meant")


def _facts(
    source: Source, probes: list[Probe], looks: list[Look], conditions: Mapping[str, list], tokenizer: str | None
) -> dict[str, Any]:
    sizes = [p.size for p in probes if p.size]
    short = sorted(min(s) for s in sizes) or [0]
    captions = [p.caption for p in probes]
    words = sorted(len(c.split()) for c in captions)
    tokens = token_counts(captions, tokenizer)
    return {
        "count": len(probes),
        "kinds": dict(Counter(p.kind for p in probes if p.kind).most_common()),
        "shorter_side_px": [short[round(q * (len(short) - 1))] for q in SIDES],
        "commonest_sizes": [[h, w, n] for (h, w), n in Counter(sizes).most_common(COMMON)],
        "different_sizes": len(set(sizes)),
        "below_resolution": sum(min(s) < source.resolution for s in sizes),
        "caption_words": [words[round(q * (len(words) - 1))] for q in SIDES],
        "captions_empty": sum(not c for c in captions),
        "captions_different": len(set(captions)),
        "tokens": tokens,
        "decoded": len(looks),
        "unreadable_of_decoded": sum(not look.digest for look in looks),
        "signals": list(source.signals),
        "conditions": {
            signal: {
                "maps": len(seen),
                "white": float(np.median([white for white, _ in seen])) if seen else None,
                "lower_third_larger": sum(lean > 0 for _, lean in seen),
            }
            for signal, seen in conditions.items()
        },
    }
