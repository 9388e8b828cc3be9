"""Ratios between the rows of a work, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import markdown
from benchmarks.speed.settings import DEFAULTS

PEER_DEFAULTS, PEER_BEST, OVER_FLOOR = "peer_defaults_ratio", "peer_best_ratio", "floor_ratio"


def with_ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one work, each with how many times faster than llm-compressor it is, and slower than the floor.

    Only rows of fxcalib are compared with llm-compressor, with its row of defaults and with its fastest row. A ratio
    is None where one of its two was not measured.
    """
    peer = [row for row in rows if row["tool"] == "llmcompressor" and row["seconds"] is not None]
    defaults = next((row["seconds"] for row in peer if row["setting"] == DEFAULTS), None)
    best = min((row["seconds"] for row in peer), default=None)
    floor = next((row["seconds"] for row in rows if row["tool"] == "floor"), None)
    made = []
    for row in rows:
        own = row["seconds"]
        compared = own if row["tool"] == "fxcalib" else None
        above = None if row["tool"] == "floor" else own
        ratios = {
            PEER_DEFAULTS: _ratio(defaults, compared),
            PEER_BEST: _ratio(best, compared),
            OVER_FLOOR: _ratio(above, floor),
        }
        made.append({**row, **ratios})
    return made


def text(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """The works' results, as `command.compare` makes them, as Markdown: all rows, and what the floors consist of."""
    rows = [
        _shown(name, row, str(result["options"]["device"]))
        for name, result in measured.items()
        for row in result["rows"]
    ]
    if not rows:
        return "nothing was measured"
    floors = {
        name: row
        for name, result in measured.items()
        for row in result["rows"]
        if row["tool"] == "floor" and "parts" in row
    }
    parts = list(dict.fromkeys(part for row in floors.values() for part in row["parts"]))
    split = [
        {"floor of": name, **{f"{part}, s": row["parts"].get(part) for part in parts}, "sum, s": row["seconds"]}
        for name, row in floors.items()
    ]
    return "\n\n".join([markdown(rows), *([markdown(split)] if split else [])])


def _shown(work: str, row: Mapping[str, Any], device: str) -> dict[str, object]:
    peak = row.get("peak_host_bytes" if device == "cpu" else "peak_device_bytes")
    setting = f"{row['setting']}: failed" if "error" in row else row.get("skipped", row["setting"])
    return {
        "work": work,
        "tool": "llm-compressor" if row["tool"] == "llmcompressor" else row["tool"],
        "setting": setting,
        "seconds": row["seconds"],
        "peak resident, GiB" if device == "cpu" else "peak on device, GiB": None if peak is None else peak / 2**30,
        "peer defaults / it": row[PEER_DEFAULTS],
        "peer best / it": row[PEER_BEST],
        "it / floor": row[OVER_FLOOR],
    }


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below
