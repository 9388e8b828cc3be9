"""Documents from files, folders and datasets; sources that do not work say why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxcalib.errors import DataError, OptionError
from fxcalib.sources import _HUB_ID, _streamed, check_source, load_texts


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_each_file_type(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": "eins\nzwei", "n": 1}, {"text": "drei, vier", "n": 2}, {"text": None, "n": 3}]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n"
    files = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "b.json", json.dumps(rows)),
        write(tmp_path / "lines.json", lines),
        write(tmp_path / "strings.json", json.dumps(["eins\nzwei", "drei, vier"])),
        tmp_path / "c.parquet",
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), files[-1])
    for file in files:
        texts = load_texts(file)
        assert texts.documents == ("eins\nzwei", "drei, vier"), file
        assert texts.source == file.name
    csv = write(tmp_path / "d.csv", 'text,n\n"eins\nzwei",1\n"drei, vier",2\n' + f"{'x' * 200_000},3\n")
    assert load_texts(csv).documents == ("eins\nzwei", "drei, vier", "x" * 200_000)
    assert load_texts(write(tmp_path / "e.txt", "one\n\ntwo\n")).documents == ("one\n\ntwo\n",)
    assert str(load_texts(files[0])) == "2 documents, 19 characters, from a.jsonl"


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "x.jsonl", '{"text": "first"}\n')
    write(tmp_path / "notes.md", "not read")
    assert load_texts(str(tmp_path)).documents == ("first", "second")
    with pytest.raises(DataError, match=r"holds no file of the types \.txt, \.jsonl, "):
        load_texts(write(tmp_path / "only" / "notes.md", "").parent)


def test_another_column(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"body": "one", "title": "two", "n": 3}\n')
    assert load_texts(file, column="body").documents == ("one",)
    with pytest.raises(DataError) as caught:
        load_texts(file, column="boddy")
    assert str(caught.value) == (
        f"row 1 of '{file}' has no column 'boddy'; its columns are 'body', 'title', 'n': "
        "name the one that holds the text (did you mean 'body'?)"
    )
    with pytest.raises(DataError, match=r"row 1 of .* holds int in column 'n' where text was expected"):
        load_texts(file, column="n")


def test_parquet_and_csv_name_their_columns_too(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["one"], "n": [1]}), tmp_path / "a.parquet")
    write(tmp_path / "b.csv", "body,n\none,1\n")
    for name in ("a.parquet", "b.csv"):
        with pytest.raises(DataError, match="has no column 'text'; its columns are 'body', 'n'"):
            load_texts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text": \n',
            "not valid jsonl: Expecting value, line 2; mend or remove that line",
        ),
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', "a.jsonl' has no column 'text'; its columns are 'body'"),
        ("a.json", b'["one", ', "not valid json: Expecting value, line 1"),
        ("a.txt", b"\xff\xfe", "not UTF-8 text: invalid start byte at byte 0; save it as UTF-8"),
        ("a.parquet", b"nothing of the sort", "write it again, or give the text as jsonl"),
        ("a.doc", b"", "unknown type; it must be one of .txt, .jsonl, .json, .parquet, .csv"),
        ("a.txt", b" \n", "'a.txt' is empty: no row of it holds text"),
        ("a.jsonl", b"", "'a.jsonl' is empty: no row of it holds text"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_texts(tmp_path / name)
    assert message in str(caught.value)


def test_rows_are_counted_in_the_message_on_a_missing_column(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(DataError, match=r"^row 2 of '"):
        load_texts(file)


def test_a_byte_order_mark_and_upper_case_endings_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_bytes(b"\xef\xbb\xbfeins")
    (tmp_path / "b.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "zwei"}\n')
    (tmp_path / "c.Csv").write_bytes(b"\xef\xbb\xbftext\ndrei\n")
    assert load_texts(tmp_path).documents == ("eins", "zwei", "drei")


def test_a_path_is_never_the_id_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data file 'zzz' does not exist"):
        check_source(Path("zzz"))
    match = check_source("zzz")
    assert match is not None and match["name"] == "zzz"


def test_a_file_that_does_not_exist_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "news.txt", "x")
    with pytest.raises(DataError, match=r"nwes.txt' does not exist; did you mean 'news.txt'\?"):
        load_texts(str(tmp_path / "nwes.txt"))
    with pytest.raises(DataError, match=r"its folder .* does not exist either"):
        load_texts(tmp_path / "no" / "news.txt")


def test_the_built_in_text() -> None:
    calibration, heldout = load_texts(), load_texts("builtin", builtin="heldout")
    assert calibration.source == "builtin text (calibration)"
    assert len(calibration.documents) > len(heldout.documents) > 0
    assert not set(calibration.documents) & set(heldout.documents)


@pytest.mark.parametrize(
    ("source", "name", "config", "split"),
    [
        ("wikitext", "wikitext", None, None),
        ("owner/data:train", "owner/data", None, "train"),
        ("owner/data:train[:500]", "owner/data", None, "train[:500]"),
        ("owner/data:raw-v1:train[10%:20%]", "owner/data", "raw-v1", "train[10%:20%]"),
    ],
)
def test_dataset_names(source: str, name: str, config: str | None, split: str | None) -> None:
    match = _HUB_ID.fullmatch(source)
    assert match is not None
    assert (match["name"], match["config"], match["split"]) == (name, config, split)


def test_a_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^data 'no/such' is no file or folder here, .* or use 'builtin'$"):
        load_texts("no/such:train")


def test_a_stream_is_shuffled_by_its_seed_and_reads_rows_one_by_one(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300))
    write(tmp_path / "stream" / "train.jsonl", rows)
    orders = [
        [str(document) for document in _streamed(str(tmp_path / "stream"), None, "train", None, seed)]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(f"document {i}" for i in range(300))
    with pytest.raises(OptionError, match=r"a part of a split, 'train\[:5\]', cannot be streamed; name .* 'train'"):
        _streamed(str(tmp_path / "stream"), None, "train[:5]", None, 0)


def test_only_what_is_not_here_is_streamed(tmp_path: Path) -> None:
    for source in (write(tmp_path / "a.txt", "x"), tmp_path, None, "builtin"):
        with pytest.raises(OptionError, match="is here already; only datasets of the hub can be streamed"):
            load_texts(source, streaming=True)
    with pytest.raises(OptionError, match="text_column is 'a,'; give a column's name, or several separated"):
        load_texts(column="a,")
