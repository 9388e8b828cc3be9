"""The English text that the embedded model was trained on, and that it is calibrated and evaluated with.

It is the Python standard library's own documentation, so no data set has to be downloaded: the language reference
that `pydoc` serves (`pydoc_data.topics`, the calibration and the held-out split), and for training also the
library's source files with their docstrings and comments. The text differs between Python versions, so the splits are
made by a hash of the topic's name: a topic that is held out on one version is held out on every other.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from fxcalib.errors import DataError

_HELD_OUT_ONE_IN = 8
_SKIPPED_FOLDERS = {"site-packages", "pydoc_data"}


def documentation(split: Literal["calibration", "heldout"]) -> list[str]:
    """The topics of this Python's language reference that belong to `split`, one text per topic, ordered by name.

    About 12% of the topics are held out. Topics quote each other (`for` is also a part of `compound`), so paragraphs
    that occur in a held-out topic are dropped from the calibration topics; they are compared without regard to case,
    punctuation and line breaks. Raises `DataError` where this Python comes without `pydoc_data`.
    """
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "the built-in text is missing: this Python has no module 'pydoc_data'; "
            "install the full standard library (on Debian: libpython3-stdlib) or pass your own text"
        ) from error
    if split == "heldout":
        return [topics[name] for name in sorted(topics) if _is_held_out(name)]
    return _calibration_topics(topics, held_out_keys(topics))


def training_text(stdlibs: Sequence[Path]) -> list[str]:
    """Everything to train on: the calibration topics and all source files of each folder in `stdlibs`.

    A folder is a standard library (`lib/python3.12`) of any Python version; nothing in it is imported. A paragraph
    that is held out in any of them, or in the running Python, occurs nowhere in the result; a paragraph that repeats,
    from one version to the next or within one, is kept once, so that the model cannot learn it by heart.
    The order depends on the folders' order and contents alone.
    """
    versions = [_read_topics(folder) for folder in stdlibs]
    held_out = {paragraph_key(p) for text in documentation("heldout") for p in paragraphs(text)}
    for topics in versions:
        held_out |= held_out_keys(topics)
    texts = documentation("calibration")
    for topics in versions:
        texts += _calibration_topics(topics, held_out)
    for folder in stdlibs:
        for file in sorted(folder.rglob("*.py")):
            if not _SKIPPED_FOLDERS.intersection(file.relative_to(folder).parts):
                with contextlib.suppress(UnicodeDecodeError):  # some test files are in another encoding on purpose
                    texts.append(file.read_text(encoding="utf-8"))
    dropped = set(held_out)
    result = []
    for text in texts:
        kept = []
        for paragraph in paragraphs(text):
            key = paragraph_key(paragraph)
            if key not in dropped:
                kept.append(paragraph.rstrip())
                dropped.add(key)
        result.append("\n\n".join(kept))
    return [text for text in result if text]


def paragraphs(text: str) -> list[str]:
    """The parts of `text` between blank lines."""
    return [part for part in re.split(r"\n(?:[ \t]*\n)+", text) if part.strip()]


def paragraph_key(paragraph: str) -> str:
    """What two paragraphs have in common that differ only in case, punctuation, quoting or line breaks."""
    return " ".join(re.findall(r"\w+", paragraph.lower()))


def held_out_keys(topics: Mapping[str, str]) -> set[str]:
    """The `paragraph_key` of every paragraph of the held-out topics."""
    return {paragraph_key(p) for name, text in topics.items() if _is_held_out(name) for p in paragraphs(text)}


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def _calibration_topics(topics: Mapping[str, str], held_out: set[str]) -> list[str]:
    texts = (_without(topics[name], held_out) for name in sorted(topics) if not _is_held_out(name))
    return [text for text in texts if text]


def _without(text: str, held_out: set[str]) -> str:
    return "\n\n".join(p.rstrip() for p in paragraphs(text) if paragraph_key(p) not in held_out)


def _read_topics(stdlib: Path) -> dict[str, str]:
    file = stdlib / "pydoc_data" / "topics.py"
    if not file.is_file():
        raise DataError(f"{stdlib} is no standard library: it has no pydoc_data/topics.py; pass a folder that has one")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    literals = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    return dict(ast.literal_eval(literals[0]))
