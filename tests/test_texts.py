"""Text from files and prompts: what is read, and what is refused in one line."""

import json

import pytest

import lowrank_probe as lp
from lowrank_probe.texts import prompts, read_texts


def test_prompts_are_twenty_short_paragraphs_in_several_scripts():
    found = prompts()
    assert len(found) == 20
    assert len(set(found)) == 20
    assert all(20 < len(text) < 400 for text in found)
    assert any("def " in text for text in found)
    for letters in ("Äpfel", "é", "дождь", "今天", "ます", "29 * 3 = 87"):
        assert any(letters in text for text in found), letters


def test_paragraphs_and_jsonl(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("One,\ntwo.\n\n\n  \nThree.\n", encoding="utf-8")
    assert read_texts(plain) == ["One,\ntwo.", "Three."]
    assert read_texts(plain, limit=1) == ["One,\ntwo."]
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"text": "a\n\nb", "id": 1}) + "\n\n" + json.dumps("c") + "\n", encoding="utf-8")
    assert read_texts(lines) == ["a\n\nb", "c"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b" \n\n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "b", "answer": "c"}\n', "line 2 has no text"),
        ("a.jsonl", b"[1]\n", "found list"),
    ],
)
def test_refusals_name_file_and_line(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(lp.ProbeError) as caught:
        read_texts(file)
    assert str(caught.value).startswith(str(file))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(lp.ProbeError, match=r"no\.txt: cannot be read: No such file"):
        read_texts(tmp_path / "no.txt")
