"""Every column of every table is documented, and the README says the same."""

from pathlib import Path

import pytest
from pairs import pair

import lowrank_probe as lp
from lowrank_probe import columns
from lowrank_probe.layers import place

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- columns -->", "<!-- /columns -->"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return lp.spectrum(*pair(tmp_path_factory.mktemp("pair")))


@pytest.mark.parametrize("table", ["table", "summary", "ledger"])
def test_every_column_is_documented_in_its_order(result, table):
    documented = {"table": columns.TABLE, "summary": columns.SUMMARY, "ledger": columns.LEDGER}[table]
    assert list(getattr(result, table).columns) == list(documented)


@pytest.mark.parametrize(
    "table",
    [
        columns.TABLE,
        columns.SUMMARY,
        columns.LEDGER,
        columns.SIMILARITY,
        columns.AMPLIFICATION,
        columns.EXTRACTION,
        columns.EXTRACTION_SUMMARY,
        columns.CURVES,
        columns.RESIZED,
        columns.MERGED,
        columns.OVERLAP,
        columns.EVALUATION,
        columns.FUNCTIONAL,
    ],
)
def test_every_column_has_a_meaning(table):
    assert all(column.meaning and column.meaning == column.meaning.strip() for column in table.values())


def test_a_stack_is_what_layers_gives_in_every_table():
    words = {place(name).stack for name in ("vision_tower.a", "audio_tower.a", "encoder.a", "decoder.a")}
    tables = (columns.TABLE, columns.EXTRACTION, columns.CURVES, columns.SIMILARITY, columns.AMPLIFICATION)
    for table in tables:
        assert all(f'"{word}"' in table["stack"].meaning for word in words)


def test_every_status_that_occurs_is_documented():
    package = Path(lp.__file__).parent
    source = "".join(
        (package / file).read_text(encoding="utf-8")
        for file in ("matching.py", "deltas.py", "spectra.py", "spectrum_work.py", "pair_results.py")
    )
    meaning = columns.LEDGER["status"].meaning
    statuses = (
        "analysed", "unchanged", "vector", "only in base", "only in tuned", "shape differs", "tied", "excluded",
        "not a weight", "pending",
    )  # fmt: skip
    for status in statuses:
        assert f'"{status}"' in source
        assert status in meaning


def test_markdown_has_one_line_a_column():
    lines = columns.markdown().splitlines()
    assert len(lines) == len(columns.TABLE) + 2
    assert all(line.replace("\\|", "").count("|") == 4 for line in lines)
    assert [line.split("`")[1] for line in lines[2:]] == list(columns.TABLE)


def test_readme_has_the_generated_table():
    text = README.read_text(encoding="utf-8")
    if START not in text:
        pytest.fail(f"the README has no {START}")
    assert text.count(START) == text.count(END) == 1
    assert text.partition(START)[2].partition(END)[0].strip() == columns.markdown()
