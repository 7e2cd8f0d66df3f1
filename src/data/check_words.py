"""The report of `src.data.check` in lines for reading."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from src.data.check import KINDS, Finding
from src.data.signals import SIGNALS


def lines(report: Mapping[str, Any], worst: int) -> Iterator[str]:
    """A report for reading. worst: how many findings are listed."""
    for split, facts in report["splits"].items():
        yield from _split_lines(split, facts)
    found = [Finding(**f) for f in (*report["problems"], *report["hints"])]
    yield f"duplicates were looked for among {report['duplicates_among']}"
    yield f"problems: {len(report['problems'])}, hints: {len(report['hints'])}" + (", the worst:" if found else "")
    listed = _listed(found, worst)
    for place in listed:
        finding = found[place]
        yield f"  {'' if KINDS[finding.kind] else 'hint: '}{finding.kind}: {finding.split}: {finding}"
    if len(found) > worst:
        rest = Counter(f.kind for place, f in enumerate(found) if place not in listed)
        yield f"  and {len(found) - worst} more: {', '.join(f'{n} {kind}' for kind, n in rest.items())}"


def _listed(found: Sequence[Finding], worst: int) -> list[int]:
    """Places of the findings to list, in their order: the first of each kind before a second of any."""
    seen: set[str] = set()
    again = [bool(f.kind in seen or seen.add(f.kind)) for f in found]
    return sorted(sorted(range(len(found)), key=lambda place: (again[place], place))[:worst])


def _split_lines(split: str, facts: Mapping[str, Any]) -> Iterator[str]:
    kinds = ", ".join(f"{kind} {n}" for kind, n in facts["kinds"].items())
    yield f"{split}: {facts['count']} samples{f' ({kinds})' if kinds else ''}"
    low, middle, high = facts["shorter_side_px"]
    common = ", ".join(f"{w} x {h} ({n})" for h, w, n in facts["commonest_sizes"])
    different = facts["different_sizes"]
    yield f"  sizes: shorter side {low} to {high} px, median {middle}; {different} different, most often {common}"
    if facts["below_resolution"]:
        yield f"  {facts['below_resolution']} pictures are smaller than the resolution"
    low, middle, high = facts["caption_words"]
    empty = f", {facts['captions_empty']} empty" if facts["captions_empty"] else ""
    different = facts["captions_different"]
    yield f"  captions: {low} to {high} words, median {middle}; {different} different{empty}; {_tokens(facts)}"
    bad, n = facts["unreadable_of_decoded"], facts["decoded"]
    rest = ""
    if n < facts["count"]:  # the upper end of the exact 95 % interval for none found is 1 - 0.05^(1/n)
        rest = f", so at most {1 - 0.05 ** (1 / n):.1%} of all (95 %)" if not bad else f", so about {bad / n:.1%} of all"
    yield f"  decoded: {n} of {facts['count']}, {bad} cannot be read{rest}"
    for signal, seen in facts["conditions"].items():
        if seen["maps"]:
            lower = f"values of the lower third larger in {seen['lower_third_larger']} of {seen['maps']}"
            white = "" if SIGNALS[signal] == "depth" else f"median map {seen['white']:.0%} white; "
            yield f"  {signal}: {white}{lower}"


def _tokens(facts: Mapping[str, Any]) -> str:
    if facts["tokens"] is None:
        return "share beyond 77 tokens not counted: no tokenizer on this machine (tokenizer=<folder>)"
    limit, beyond, longest = (facts["tokens"][k] for k in ("limit", "beyond", "longest"))
    return f"{beyond / facts['count']:.1%} beyond {limit} tokens, the longest {longest}"
