"""The first words of the page: what was compared, what came out, and what cannot be concluded from these rows."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from src.report.groups import Group, short
from src.report.names import differing
from src.report.pairs import difference
from src.report.rows import Found, Row
from src.report.seeds import by_method, over_seeds
from src.report.tables import TRAINED, number, signed

FEW_IMAGES = 100  # a mean over fewer has an interval that hides most differences between methods
FID_NEEDS = 2048  # images; the covariance of Inception's features has no full rank below
ALIKE = 1.1  # sizes within a tenth of each other count as equal
EMBEDDED = "embedded:"


def compared(found: Found, trained: Sequence[Group[Row]], evaluated: Sequence[Group[Row]], costs: Sequence[Group]) -> list[str]:
    """What there is, and for each table of two or more runs who leads and whether that is certain."""
    says = []
    if found.trained:
        tasks = _joined(sorted({row.result.task for row in found.trained}))
        says.append(f"{_some(found.trained)}: {tasks}. {_apart(len(found.trained), 'run', len(trained))}".strip())
    if found.evaluated:
        apart = _apart(len(found.evaluated), "evaluation", len(evaluated))
        says.append(f"Evaluations: {_some(found.evaluated)}. {apart}".strip())
    says += [lead for group in trained if (lead := leader(group))]
    says += [f"Evaluated: {lead}" for group in evaluated if (lead := leader(group))]
    if found.costs:
        modes = {mode: sum(row.result.mode == mode for row in found.costs) for mode in ("measure", "estimate")}
        counts = [f"{n} {word}" for (mode, word) in (("measure", "measured"), ("estimate", "estimated")) if (n := modes[mode])]
        says.append(f"The cost of {len(found.costs)} cells, {_joined(counts)}, in {_count(len(costs), 'table')}.")
    return says


def leader(group: Group[Row]) -> str:
    """Who has the best score of a table, and from whom it is apart for certain; "" for a single method. Of methods that were
    trained more than once, by their means over seeds."""
    rows = [row for row in group.rows if row.main_metric in row.result.metrics]
    if len({row.name or row.result.adapter for row in rows}) < 2:
        return ""
    if any(len(seeds) > 1 for seeds in by_method(rows).values()):
        return _leader_over_seeds(group.title, rows)
    metric = rows[0].main_metric
    sign = -1 if rows[0].result.metrics[metric]["better"] == "lower" else 1
    best, *others = sorted(rows, key=lambda row: -sign * row.result.metrics[metric]["value"])
    said = f"{group.title}: {best.label} has the best {metric}, {number(best.result.metrics[metric]['value'])}."
    sure, unsure = [], []
    for other in others:
        if best.scores is None or other.scores is None or best.ids != other.ids:
            continue
        value, (low, high) = difference(best, other)
        words = f"{other.label} ({signed(value)} [{signed(low)}, {signed(high)}])"
        (sure if sign * (low if sign > 0 else high) > 0 else unsure).append(words)
    said += f" On the same images it is ahead of {_joined(sure)} beyond the 95 % interval." if sure else ""
    return said + (f" It cannot be told apart from {_joined(unsure)}." if unsure else "")


def _leader_over_seeds(title: str, rows: Sequence[Row]) -> str:
    metric = rows[0].main_metric
    sign = -1 if rows[0].result.metrics[metric]["better"] == "lower" else 1
    scores = {
        name: {seed: row.result.metrics[metric]["value"] for seed, row in seeds.items()}
        for name, seeds in by_method(rows).items()
    }
    means = {name: over_seeds(list(of.values()))[0] for name, of in scores.items()}
    best, *others = sorted(means, key=lambda name: -sign * means[name])
    said = f"{title}: {best} has the best mean {metric} over {_count(len(scores[best]), 'seed')}, {number(means[best])}."
    sure, unsure = [], []
    for other in others:
        value, interval = over_seeds(
            [sign * (scores[best][s] - scores[other][s]) for s in scores[best] if s in scores[other]] or [0.0]
        )
        if interval:
            low, high = interval
            (sure if low > 0 else unsure).append(f"{other} (by {signed(value)} [{signed(low)}, {signed(high)}])")
        else:
            unsure.append(f"{other} (fewer than two seeds in common)")
    said += f" Seed by seed it is ahead of {_joined(sure)} beyond the 95 % interval over seeds." if sure else ""
    return said + (f" It cannot be told apart from {_joined(unsure)}." if unsure else "")


def limits(found: Found, trained: Sequence[Group[Row]], evaluated: Sequence[Group[Row]]) -> list[str]:
    """What cannot be concluded, each with the rows that make it so."""
    rows, groups = [*found.trained, *found.evaluated], [*trained, *evaluated]
    says = [*_seeds(groups), *_few(rows), *_many(groups), *_sizes(groups), *_recipes(groups), *_fid(rows)]
    if any(row.result.backbone["id"].startswith(EMBEDDED) for row in rows):
        names = _joined(sorted({short(r.result.backbone["id"]) for r in rows if r.result.backbone["id"].startswith(EMBEDDED)}))
        says.append(
            f"{names}: small networks that were trained on drawn scenes. An order of methods on them is no order on the models "
            "whose family they belong to."
        )
    says += _machine(found.trained)
    if any(row.result.mode == "estimate" for row in found.costs):
        says.append(
            "Estimated costs were computed, not seen: memory is that of tensors, without what an allocator rounds up or a "
            "kernel takes for itself, and times are lower bounds."
        )
    dirty = [row for row in (*rows, *found.costs) if row.result.git_dirty]
    if dirty:
        says.append(
            f"{_count(len(dirty), 'row')} came from code with uncommitted changes: their commit does not hold all of it."
        )
    return says


def _seeds(groups: Iterable[Group[Row]]) -> list[str]:
    counts = [len(seeds) for group in groups for seeds in by_method(group.rows).values()]
    single = sum(count == 1 for count in counts)
    if not single:
        return []
    who = "Every method was" if single == len(counts) else f"{single} of {len(counts)} methods were"
    return [
        f"{who} trained with one seed. Intervals are over held-out images; what another seed would have given is not in them."
    ]


def _few(rows: Sequence[Row]) -> list[str]:
    few = [row for row in rows if row.result.metrics[row.main_metric]["n"] < FEW_IMAGES]
    if not few:
        return []
    counts = sorted({row.result.metrics[row.main_metric]["n"] for row in few})
    return [f"{_count(len(few), 'run')} stood on n = {_joined(map(str, counts))} images: only large differences show."]


def _many(groups: Iterable[Group[Row]]) -> list[str]:
    if max((len(by_method(group.rows)) for group in groups), default=0) < 3:
        return []
    return ["Differences are judged one by one: of twenty where there is none, one lies outside its 95 % interval."]


def _sizes(groups: Iterable[Group[Row]]) -> list[str]:
    unlike = []
    for group in groups:
        sizes = [row.result.trainable_m for row in group.rows if row.result.trainable_m]
        if sizes and max(sizes) > ALIKE * min(sizes):
            unlike.append(f"{group.title} ({min(sizes):.2f} to {max(sizes):.2f} million)")
    return (
        [f"Methods differ in trained parameters, so these are no verdicts on their designs: {_joined(unlike)}."]
        if unlike
        else []
    )


def _recipes(groups: Iterable[Group[Row]]) -> list[str]:
    found = {}  # what differs -> titles
    for group in groups:
        apart = differing([row.result.design or {} for row in group.rows])
        if keys := tuple(title for name, title in TRAINED.items() if name in apart):
            found.setdefault(keys, {})[group.title] = None
    return [
        f"Rows of {_joined(titles)} differ in {_joined(keys)}, which is part of what their numbers compare."
        for keys, titles in found.items()
    ]


def _fid(rows: Sequence[Row]) -> list[str]:
    names = {name for row in rows for name in row.result.metrics}
    counts = [m["n"] for row in rows for name, m in row.result.metrics.items() if name.split("/")[0] in ("fid", "kid")]
    says = (
        [f"FID and KID stand on n = {min(counts):,} images, fewer than {FID_NEEDS:,}."]
        if counts and min(counts) < FID_NEEDS
        else []
    )
    if any(name.startswith(("fid_scenes", "kid_scenes")) for name in names):
        says.append("fid_scenes and kid_scenes see through a small encoder of this project: no other project's FID compares.")
    return says


def _machine(rows: Sequence[Row]) -> list[str]:
    """Runs that overlapped in time on what seems to be one machine; seconds of training are the least that a run took."""
    if not rows:
        return []
    spans = []
    for row in rows:
        end = datetime.fromisoformat(row.result.date)
        machine = (row.result.versions.get("platform"), row.result.device)
        spans.append((machine, end - timedelta(seconds=row.result.train_seconds), end))
    shared = {
        i for i, a in enumerate(spans) for j, b in enumerate(spans) if i != j and a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
    }
    if shared:
        return [
            f"Seconds and images per second: {len(shared)} of {len(rows)} runs overlapped in time on what seems to be one "
            "machine, so each slowed others down, and these numbers rank nothing."
        ]
    return ["Seconds and images per second are as the runs took them; what else ran on the machine is not recorded."]


def _some(rows: Sequence[Row]) -> str:
    adapters = sorted({row.result.adapter for row in rows})
    backbones = sorted({short(row.result.backbone["id"]) for row in rows})
    return f"{_count(len(rows), 'run')} of {_joined(adapters)} on {_joined(backbones)}"


def _apart(rows: int, what: str, tables: int) -> str:
    if tables == 1:
        return "All are of equal conditions and stand in one table." if rows > 1 else ""
    return f"They stand in {_count(tables, 'table')}: a {what} of other conditions never shares one."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _joined(words: Iterable[str]) -> str:
    *most, last = list(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last
