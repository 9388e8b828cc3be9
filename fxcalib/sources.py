"""Where texts come from: a file, a folder of files, a dataset of the Hugging Face hub, or what the package ships."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fxcalib.errors import DataError, nearest

BUILTIN = "builtin"
DEFAULT_COLUMN = "text"
ENCODING = "utf-8-sig"
"""UTF-8, with or without the byte order mark that some editors put first."""
FILE_TYPES = (".txt", ".jsonl", ".json", ".parquet", ".csv")

_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:]+))??(:(?P<split>[^:\[]+(\[[^\]]*\])?))?")


@dataclass(frozen=True)
class Texts:
    """Documents and where they are from."""

    documents: tuple[str, ...]
    source: str
    """Readable name: the name of a file or folder, a dataset id, or `builtin text (calibration)`."""

    def __str__(self) -> str:
        return f"{len(self.documents)} documents, {sum(map(len, self.documents)):,} characters, from {self.source}"


def load_texts(
    source: str | Path | None = None,
    *,
    column: str | None = None,
    builtin: Literal["calibration", "heldout"] = "calibration",
) -> Texts:
    """The documents of `source`, in its order:

    - None or `builtin`: text that the package ships, its part `builtin`
    - a `.txt` file: one document; `.jsonl`, `.json` (a list), `.csv` and `.parquet` files: one document per row
    - a folder: all such files in it, by name, subfolders included
    - `id`, `id:split` or `id:config:split` of a `datasets` dataset, as in `wikitext:wikitext-2-raw-v1:train[:500]`;
      without a split, `train` or the only one

    `column` names the column of tables that holds the text, `text` by default. Rows without a value are left out.

    Raises DataError for a source that cannot be found or read, a file type or column that does not exist, a row that
    holds no text, and for no documents at all.
    """
    column = DEFAULT_COLUMN if column is None else column
    if source is None or str(source) == BUILTIN:
        from fxcalib.embedded.text import documentation

        return Texts(tuple(documentation(builtin)), f"builtin text ({builtin})")
    path = Path(source).expanduser()
    match = check_source(source)
    if match is not None:
        documents, name = _hub(match["name"], match["config"], match["split"], column), str(source)
    elif path.is_dir():
        documents, name = _folder(path, column), path.resolve().name
    else:
        documents, name = _file(path, column), path.name
    if not any(document.strip() for document in documents):
        raise DataError(f"data {name!r} is empty: no row of it holds text; choose another source or column")
    return Texts(documents, name)


def check_source(source: str | Path) -> re.Match[str] | None:
    """The parts `name`, `config` and `split` of a dataset's id; None for what is here. Nothing is read or fetched.

    Raises DataError for a file that does not exist: every `Path`, and a name that ends as a data file's or is no id.
    """
    path = Path(source).expanduser()
    if str(source) == BUILTIN or path.exists():
        return None
    match = None if isinstance(source, Path) or _kind(path) in FILE_TYPES else _HUB_ID.fullmatch(source)
    if match is None:
        raise DataError(f"data file {str(source)!r} does not exist; {_similar(path)}")
    return match


def _folder(folder: Path, column: str) -> tuple[str, ...]:
    files = sorted(file for file in folder.rglob("*") if _kind(file) in FILE_TYPES and file.is_file())
    if not files:
        raise DataError(
            f"data folder {str(folder)!r} holds no file of the types {', '.join(FILE_TYPES)}; give another folder"
        )
    return tuple(document for file in files for document in _file(file, column))


def _kind(path: Path) -> str:
    """Ending of a file's name, in lower case."""
    return path.suffix.lower()


def _file(path: Path, column: str) -> tuple[str, ...]:
    if _kind(path) not in FILE_TYPES:
        raise DataError(f"data file {str(path)!r} has an unknown type; it must be one of {', '.join(FILE_TYPES)}")
    name = repr(str(path))
    try:
        if _kind(path) == ".txt":
            return (path.read_text(encoding=ENCODING),)
        if _kind(path) == ".parquet":
            return _parquet(path, column)
        return tuple(_column(_rows(path), column, name))
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


def _parquet(path: Path, column: str) -> tuple[str, ...]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _require(column, file.schema_arrow.names, repr(str(path)))
        values = file.read(columns=[column]).column(column).to_pylist()
    except pyarrow.ArrowInvalid as error:
        cause = str(error).splitlines()[0].rstrip(". ")
        raise DataError(
            f"data file {str(path)!r} is not valid parquet: {cause}; write it again, or give the text as jsonl"
        ) from error
    return tuple(_column(({column: value} for value in values), column, repr(str(path))))


def _hub(name: str, config: str | None, split: str | None, column: str) -> tuple[str, ...]:
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data {name!r} is no file or folder here, and could not be had as a dataset of the hub: {cause}; "
            f"check the name (id, id:split or id:config:split) and the network, or use {BUILTIN!r}"
        ) from error
    finally:
        if not shown:
            datasets.enable_progress_bars()
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) > 1:
            raise DataError(f"dataset {name!r} has no split 'train'; name one of {', '.join(loaded)} as {name}:split")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    _require(column, loaded.column_names, repr(name))
    return tuple(_column(loaded.select_columns([column]), column, repr(name)))


def _column(rows: Iterable[Any], column: str, name: str) -> Iterator[str]:
    """The texts in `column` of `rows`, which are mappings or bare strings."""
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping):
            _require(column, [str(key) for key in row if key is not None], f"row {number} of {name}")
            row = row[column]
        if row is None:
            continue
        if not isinstance(row, str):
            raise DataError(
                f"row {number} of {name} holds {type(row).__name__} in column {column!r} where text was expected; "
                "name a column of text"
            )
        yield row


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
