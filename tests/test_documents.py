"""Documents from real files of every kind, and a split that nothing leaks through."""

import gzip
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

import lowrank_probe as lp
from lowrank_probe.documents import Document, read_documents, split_documents

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def test_paragraphs_are_documents(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("One,\ntwo.\n\n\n  \nThree.\n", encoding="utf-8")
    assert read_documents(file) == [Document("One,\ntwo."), Document("Three.")]
    assert read_documents(file, limit=1) == [Document("One,\ntwo.")]


def test_lines_of_json_and_rows_of_a_table_are_the_same_documents(tmp_path):
    expected = [
        Document("plain"), Document("42", prompt="6·7 = "), Document("", messages=tuple(TURNS)),
    ]  # fmt: skip
    rows = [{"text": "plain"}, {"prompt": "6·7 = ", "completion": "42", "id": 1}, {"messages": TURNS}]
    lines = "\n\n".join(json.dumps(row) for row in rows) + '\n{"text": " "}\n'
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text(lines, encoding="utf-8")
    packed.write_bytes(gzip.compress(lines.encode()))
    every = [{name: row.get(name) for name in ("text", "prompt", "completion", "messages")} for row in rows]
    parquet.write_table(pa.Table.from_pylist(every), tmp_path / "c.parquet")
    for file in (plain, packed, tmp_path / "c.parquet"):
        assert read_documents(file) == expected, file
    assert [one.digest for one in read_documents(plain)] == [one.digest for one in read_documents(packed)]


def test_every_file_of_a_directory_is_a_document(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("B\n\nb", encoding="utf-8")
    (tmp_path / "a.rst").write_text("A", encoding="utf-8")
    (tmp_path / "z.jsonl").write_text('"Z"\n"z"', encoding="utf-8")
    (tmp_path / ".hidden").write_bytes(b"\xff\xff")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    assert [one.text for one in read_documents(tmp_path)] == ["A", "B\n\nb", "Z", "z"]


def _table(file, columns):
    parquet.write_table(pa.table(columns), file)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b" \n\n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.txt.gz", b"not packed", "is no whole gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "is no whole gzip file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "b", "answer": "c"}\n', "line 2 has no text"),
        ("a.jsonl", b"[1]\n", "found list"),
        ("a.jsonl", b'"\\ud800"\n', "line 1: holds half of a surrogate pair"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: its messages are not a list"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "no turn of the role assistant"),
        ("a.parquet", b"PAR1", "is no parquet file"),
        (
            "a.parquet",
            {"body": ["a"]},
            "expected a column text, columns prompt and completion, or messages, found body",
        ),
        ("a.parquet", {"text": ["a", None]}, "row 2 has no text"),
        ("a.parquet", {"text": [1]}, "row 1 has no text"),
    ],
)
def test_refusals_name_file_and_place(tmp_path, name, content, words):
    file = tmp_path / name
    _table(file, content) if isinstance(content, dict) else file.write_bytes(content)
    with pytest.raises(lp.ProbeError) as caught:
        read_documents(file)
    assert str(caught.value).startswith(str(file))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(lp.ProbeError, match=r"no\.txt: cannot be read: No such file"):
        read_documents(tmp_path / "no.txt")


def test_nothing_leaks_through_the_split():
    documents = [Document(f"text {i}", prompt=f"{i % 7}") for i in range(4000)]
    doubled = documents + documents[::3]
    random.Random(0).shuffle(doubled)
    training, held_out = split_documents(doubled)
    assert len(training) + len(held_out) == 4000  # duplicates are dropped
    assert not {one.digest for one in training} & {one.digest for one in held_out}
    assert 340 < len(held_out) < 460  # 400 ± 3 standard deviations
    again = {one.digest for one in split_documents(documents[:2000])[1]}
    assert again == {one.digest for one in held_out} & {one.digest for one in documents[:2000]}
    assert split_documents(documents, 0.0)[1] == []
    assert split_documents(documents, 1.0)[0] == []
    assert next(one for one in doubled if one in held_out[:5]) == held_out[0]  # in the order they came
    with pytest.raises(lp.ProbeError, match=r"held_out=1\.5"):
        split_documents(documents, 1.5)
