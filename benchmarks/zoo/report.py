"""Records as tables of scores and lists of what failed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.results import markdown
from benchmarks.zoo.building import EAGER, SDPA
from benchmarks.zoo.scoring import DECODER, DEFAULT, LINEAR

Record = dict[str, Any]
Scores = list[dict[str, Any]]

ALL = "all"


def table(records: Iterable[Record]) -> str:
    """Markdown: one row for each category and tool, and one for all categories together; counts of architectures."""
    rows = summary(records)
    return markdown(rows) if rows else "no architecture was scored"


def summary(records: Iterable[Record]) -> list[dict[str, object]]:
    """The rows of `table`: how many architectures have each quality under both sets of targets with eager attention,
    all of them with sdpa, everything with the decoder's layers only, and everything; linear targets count apart."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    tools: dict[str, None] = {}
    for record in records:
        tools[record["tool"]] = None
        groups[record["category"], record["tool"]].append(record)
    for name in tools:
        together = [record for (_, tool), found in groups.items() if tool == name for record in found]
        groups[ALL, name] = together
    return [_row(category, tool, found) for (category, tool), found in groups.items()]


def _row(category: str, tool: str, found: Sequence[Record]) -> dict[str, object]:
    scored = [record for record in found if is_scored(record)]

    def count(quality: Callable[[dict[str, Any]], bool], attention: str = EAGER, targets: str | None = None) -> str:
        of = [_select(record["scores"], attention, targets) for record in scored]
        of = [scores for scores in of if scores or (attention == EAGER and targets != LINEAR)]
        return f"{sum(bool(scores) and all(map(quality, scores)) for scores in of)}/{len(of)}"

    return {
        "category": category,
        "tool": tool,
        "traced": count(lambda s: s["traced"]),
        "alone": count(lambda s: s["alone"]),
        "exact": count(lambda s: s["exact"]),
        "other batches": count(lambda s: s["others"]),
        "type": count(lambda s: s["same_type"]),
        "all but type": count(lambda s: s["alone"] and s["exact"] and s["others"]),
        "default targets": count(lambda s: s["full"], targets=DEFAULT),
        "decoder only": count(lambda s: s["full"], targets=DECODER),
        "sdpa": count(lambda s: s["full"], attention=SDPA),
        "linear targets": count(lambda s: s["full"], targets=LINEAR),
        "full": f"{sum(map(is_full, scored))}/{len(scored)}",
        "silently wrong": sum(any(s["wrong"] for s in _select(r["scores"], EAGER)) for r in scored),
        "wrong, sdpa": sum(any(s["wrong"] for s in _select(r["scores"], SDPA)) for r in scored),
    }


def _select(scores: Scores, attention: str, targets: str | None = None) -> Scores:
    wanted = (targets,) if targets else (DEFAULT, DECODER)
    return [s for s in scores if s["attention"] == attention and s["targets"] in wanted]


def is_scored(record: Record) -> bool:
    """Whether the model runs eagerly and gives the same bits twice."""
    return bool(record["built"]) and bool(record["deterministic"])


def is_full(record: Record) -> bool:
    """Whether nothing is amiss with layers as targets, either set of them and any attention."""
    scores = [s for s in record["scores"] if s["targets"] != LINEAR]
    return not record.get("crash") and bool(scores) and all(s["full"] for s in scores)


def failures(records: Iterable[Record]) -> list[str]:
    """One line for each architecture with anything amiss: tool, name, where, and the cause."""
    lines = []
    for record in records:
        failed = next((s for s in record.get("scores", ()) if not s["full"]), None)
        if not is_scored(record) or (failed is None and is_full(record)):
            continue
        where = f"{failed['targets']} targets, {failed['attention']} attention" if failed else "process"
        wrong = next((f"WRONG with {s['attention']} attention, " for s in record["scores"] if s["wrong"]), "")
        why = (failed and failed["cause"]) or record.get("crash") or record.get("error") or "unknown"
        lines.append(f"{record['tool']}: {record['name']}: {wrong}{where}: {why}")
    return lines


def disturbed(records: Iterable[Record]) -> list[str]:
    """One line for each architecture that a tool left other than it was."""
    return [
        f"{record['tool']}: {record['name']}: the model no longer gives its bits afterwards"
        for record in records
        if is_scored(record) and not all(s["restored"] for s in record["scores"])
    ]


def unscored(records: Iterable[Record]) -> list[str]:
    """One line for each architecture that takes no part, with the reason; and for what was left out of the others."""
    lines: dict[str, None] = {}
    for record in records:
        if not record["built"]:
            reason = record.get("reason") or record.get("crash") or record.get("error")
            lines[f"{record['name']}: not built ({record.get('stage', 'process')}): {reason}"] = None
        elif not record["deterministic"]:
            lines[f"{record['name']}: not deterministic: its eager forward gives other bits the second time"] = None
        else:
            if record.get("sdpa"):
                lines[f"{record['name']}: not scored with sdpa: {record['sdpa']}"] = None
            if not record["sensitive"]:
                lines[f"{record['name']}: scored, but its output does not depend on its input"] = None
    return list(lines)


def text(records: Sequence[Record]) -> str:
    """The whole report."""
    sections = [table(records)]
    for title, lines in (
        ("not in full", failures(records)),
        ("left changed", disturbed(records)),
        ("not scored", unscored(records)),
    ):
        if lines:
            sections.append("\n".join([f"{title} ({len(lines)}):", *(f"- {line}" for line in lines)]))
    return "\n\n".join(sections)
