"""Where documents come from: a file, a folder of files, a dataset of the Hugging Face hub, or what the package ships.

A document is plain text, a chat, or a prompt with its completion; the columns of a table say which.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fxcalib.chat import Chat, Completion, Document, characters, is_empty, messages_of
from fxcalib.errors import DataError, OptionError, nearest

BUILTIN = "builtin"
DEFAULT_COLUMNS = (("text",), ("messages",), ("conversations",), ("prompt", "completion"))
"""The first of these that a table has is read where no column was named."""
ENCODING = "utf-8-sig"
"""UTF-8, with or without the byte order mark that some editors put first."""
FILE_TYPES = (".txt", ".jsonl", ".json", ".parquet", ".csv")

_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:]+))??(:(?P<split>[^:\[]+(\[[^\]]*\])?))?")


SHUFFLE_ROWS = 1000
"""Rows of a stream that are held, and drawn from, to shuffle it."""


@dataclass(frozen=True)
class Stream:
    """Documents that are fetched when they are asked for, in an order that a seed has chosen; the same each time."""

    open: Callable[[], Iterator[Document]]

    def __iter__(self) -> Iterator[Document]:
        return self.open()


@dataclass(frozen=True)
class Texts:
    """Documents and where they are from."""

    documents: Sequence[Document] | Stream
    source: str
    """Readable name: the name of a file or folder, a dataset id, or `builtin text (calibration)`."""

    def __str__(self) -> str:
        if isinstance(self.documents, Stream):
            return f"documents streamed from {self.source}"
        length = sum(map(characters, self.documents))
        return f"{len(self.documents)} documents, {length:,} characters, from {self.source}"


def load_texts(
    source: str | Path | None = None,
    *,
    column: str | Sequence[str] | None = None,
    builtin: Literal["calibration", "heldout"] = "calibration",
    streaming: bool = False,
    seed: int = 0,
) -> Texts:
    """The documents of `source`, in its order:

    - None or `builtin`: text that the package ships, its part `builtin`
    - a `.txt` file: one document; `.jsonl`, `.json` (a list), `.csv` and `.parquet` files: one document per row
    - a folder: all such files in it, by name, subfolders included
    - `id`, `id:split` or `id:config:split` of a `datasets` dataset, as in `wikitext:wikitext-2-raw-v1:train[:500]`;
      without a split, `train` or the only one. With `streaming` its rows are fetched as they are needed, shuffled by
      `seed`, instead of all of it first.

    `column` names the column of tables that is read, or several, also separated by commas, that are joined: the last
    of them is the completion. A column of text gives text, one of lists of messages (`role` and `content`, or `from`
    and `value`) gives chats. By default the first of `text`, `messages`, `conversations`, or `prompt` and `completion`.
    Rows without a value are left out.

    Raises DataError for a source that cannot be found or read, a file type or column that does not exist, a row that
    holds something else, and for no documents at all; OptionError for a stream of what is no dataset of the hub.
    """
    columns = columns_of(column)
    match = check_source(BUILTIN if source is None else source, streaming=streaming)
    if source is None or str(source) == BUILTIN:
        from fxcalib.embedded.text import documentation

        return Texts(tuple(documentation(builtin)), f"builtin text ({builtin})")
    path = Path(source).expanduser()
    if match is not None:
        if streaming:
            return Texts(_streamed(match["name"], match["config"], match["split"], columns, seed), str(source))
        documents, name = _hub(match["name"], match["config"], match["split"], columns), str(source)
    elif path.is_dir():
        documents, name = _folder(path, columns), path.resolve().name
    else:
        documents, name = _file(path, columns), path.name
    if all(map(is_empty, documents)):
        raise DataError(f"data {name!r} is empty: no row of it holds text; choose another source or column")
    return Texts(documents, name)


def columns_of(column: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of columns, given one by one or separated by commas; None where the table is to decide.

    Raises OptionError for no name at all.
    """
    if column is None:
        return None
    names = column.split(",") if isinstance(column, str) else column
    columns = tuple(name.strip() for name in names if isinstance(name, str) and name.strip())
    if not columns or len(columns) != len(names):
        raise OptionError(f"text_column is {column!r}; give a column's name, or several separated by commas")
    return columns


def check_source(source: str | Path, *, streaming: bool = False) -> re.Match[str] | None:
    """The parts `name`, `config` and `split` of a dataset's id; None for what is here. Nothing is read or fetched.

    Raises DataError for a file that does not exist: every `Path`, and a name that ends as a data file's or is no id;
    OptionError for a stream of what is here.
    """
    path = Path(source).expanduser()
    if str(source) == BUILTIN or path.exists():
        if streaming:
            raise OptionError(f"data {str(source)!r} is here already; only datasets of the hub can be streamed")
        return None
    match = None if isinstance(source, Path) or _kind(path) in FILE_TYPES else _HUB_ID.fullmatch(source)
    if match is None:
        raise DataError(f"data file {str(source)!r} does not exist; {_similar(path)}")
    return match


def _folder(folder: Path, columns: tuple[str, ...] | None) -> tuple[Document, ...]:
    files = sorted(file for file in folder.rglob("*") if _kind(file) in FILE_TYPES and file.is_file())
    if not files:
        raise DataError(
            f"data folder {str(folder)!r} holds no file of the types {', '.join(FILE_TYPES)}; give another folder"
        )
    return tuple(document for file in files for document in _file(file, columns))


def _kind(path: Path) -> str:
    """Ending of a file's name, in lower case."""
    return path.suffix.lower()


def _file(path: Path, columns: tuple[str, ...] | None) -> tuple[Document, ...]:
    if _kind(path) not in FILE_TYPES:
        raise DataError(f"data file {str(path)!r} has an unknown type; it must be one of {', '.join(FILE_TYPES)}")
    name = repr(str(path))
    try:
        if _kind(path) == ".txt":
            return (path.read_text(encoding=ENCODING),)
        if _kind(path) == ".parquet":
            return _parquet(path, columns)
        return tuple(_documents(_rows(path), columns, name))
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file {name} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8, "
            "as `iconv -f ENCODING -t UTF-8` does"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"data file {name} is not valid {_kind(path)[1:]}: {error.msg}, line {error.lineno}; "
            "mend or remove that line"
        ) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"data file {name} cannot be read: {error}; give another file") from error


def _rows(path: Path) -> Iterator[Any]:
    """The rows of a `.csv`, `.jsonl` or `.json` file; the last may hold a list or one value a line."""
    if _kind(path) == ".csv":
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents are longer than the 128 KiB of the default
        with path.open(encoding=ENCODING, newline="") as file:
            yield from csv.DictReader(file)
        return
    text = path.read_text(encoding=ENCODING)
    if _kind(path) == ".json" and text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, "\n" * (number - 1) + line, number - 1 + error.pos) from error


def _parquet(path: Path, columns: tuple[str, ...] | None) -> tuple[Document, ...]:
    import pyarrow
    from pyarrow import parquet

    name = repr(str(path))
    try:
        file = parquet.ParquetFile(path)
        chosen = _chosen(columns, file.schema_arrow.names, name)
        rows = file.read(columns=list(chosen)).to_pylist()
    except pyarrow.ArrowInvalid as error:
        cause = str(error).splitlines()[0].rstrip(". ")
        raise DataError(
            f"data file {str(path)!r} is not valid parquet: {cause}; write it again, or give the text as jsonl"
        ) from error
    return tuple(_documents(rows, chosen, name))


def _hub(name: str, config: str | None, split: str | None, columns: tuple[str, ...] | None) -> tuple[Document, ...]:
    loaded = _dataset(name, config, split, streaming=False)
    chosen = _chosen(columns, loaded.column_names, repr(name))
    return tuple(_documents(loaded.select_columns(list(chosen)), chosen, repr(name)))


def _streamed(name: str, config: str | None, split: str | None, columns: tuple[str, ...] | None, seed: int) -> Stream:
    if split is not None and "[" in split:
        raise OptionError(
            f"a part of a split, {split!r}, cannot be streamed; name the whole split {split.split('[')[0]!r}"
        )
    shuffled = _dataset(name, config, split, streaming=True).shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
    return Stream(lambda: _documents(_fetched(shuffled, name), columns, repr(name)))


def _fetched(rows: Iterable[Any], name: str) -> Iterator[Any]:
    try:
        yield from rows
    except (OSError, RuntimeError) as error:
        raise DataError(f"the stream of {name!r} broke off: {error}; try again, or without streaming") from error


def _dataset(name: str, config: str | None, split: str | None, *, streaming: bool) -> Any:
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data {name!r} is no file or folder here, and could not be had as a dataset of the hub: {cause}; "
            f"check the name (id, id:split or id:config:split) and the network, or use {BUILTIN!r}"
        ) from error
    finally:
        if not shown:
            datasets.enable_progress_bars()
    if isinstance(loaded, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if "train" not in loaded and len(loaded) > 1:
            raise DataError(f"dataset {name!r} has no split 'train'; name one of {', '.join(loaded)} as {name}:split")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return loaded


def _documents(rows: Iterable[Any], columns: tuple[str, ...] | None, name: str) -> Iterator[Document]:
    """The documents in `rows`, which are mappings or bare strings."""
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of {name}"
        values = [row]
        if isinstance(row, Mapping):
            columns = _chosen(columns, [str(key) for key in row if key is not None], where)
            values = [row[column] for column in columns]
        if values[-1] is None:
            continue
        yield _document(values, columns or (), where)


def _document(values: Sequence[Any], columns: Sequence[str], where: str) -> Document:
    *before, last = values
    if not before and isinstance(last, list):
        return Chat(messages_of(last, where))
    for column, value in zip(columns or ("",), values, strict=True):
        if not isinstance(value, str) and not (value is None and before):
            raise DataError(
                f"{where} holds {type(value).__name__} in column {column!r} where text was expected; "
                "name a column of text"
            )
    if not before:
        return str(last)
    prompt = before[0] or ""
    for value in before[1:]:
        prompt = Completion(prompt, value or "").text
    return Completion(prompt, last)


def _chosen(columns: tuple[str, ...] | None, there: Sequence[str], name: str) -> tuple[str, ...]:
    """The columns to read, which are all there."""
    if columns is None:
        columns = next((usual for usual in DEFAULT_COLUMNS if set(usual) <= set(there)), DEFAULT_COLUMNS[0])
    for column in columns:
        _require(column, there, name)
    return columns


def _require(column: str, columns: Iterable[str], name: str) -> None:
    columns = list(columns)
    if column not in columns:
        raise DataError(
            f"{name} has no column {column!r}; its columns are {', '.join(map(repr, columns))}: "
            f"name the one that holds the text ({nearest(column, columns)})"
        )


def _similar(path: Path) -> str:
    """A next step for a file that does not exist."""
    if not path.parent.is_dir():
        return f"its folder {str(path.parent)!r} does not exist either"
    names = [entry.name for entry in path.parent.iterdir() if _kind(entry) in FILE_TYPES or entry.is_dir()]
    return nearest(path.name, names) if names else f"{str(path.parent)!r} holds no data files"
