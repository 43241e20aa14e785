"""`probe extract --verify` and `--tied-lora` as processes: what they print, write and exit with."""

import json

import pytest
from test_cli import fails, probe
from test_verification import llama, sides

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A pair whose table is the output head too, and moved."""
    return sides(tmp_path_factory.mktemp("tied"), lambda: llama(tie_word_embeddings=True), ["embed_tokens", "q_proj"])


def written(out):
    """What the run keeps of its verification: (verification.json, the card, the page)."""
    kept = json.loads((out / "probe" / "verification.json").read_text(encoding="utf-8"))
    return kept, (out / "README.md").read_text(encoding="utf-8"), (out / "probe" / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_lora_on_a_tied_table_holds_unmerged_only_and_verify_exits_3(tied, tmp_path):
    asked = ("extract", *tied, "--targets", "embedding,q", "--rank", 32, "--verify")
    stdout, stderr = probe(*asked, "--tied-lora", "--out", tmp_path / "a", code=3)
    assert "does NOT hold" in stdout
    assert "--verify: merged and unmerged differ by" in stderr
    assert "right unmerged, wrong when merged" in stderr
    kept, card, page = written(tmp_path / "a")
    rows = {row["model"]: row["kl_nats"] for row in kept["table"]}
    assert kept["ok"] is False
    assert rows["base+adapter"] < 1e-6 < 1e-3 < rows["base+adapter merged"]
    for text in (card, page):
        assert f"{rows['base+adapter merged']:.4g}" in text
        assert "does NOT hold" in text
        assert "--tied-lora" in text
    assert "**Do not merge it**" in card

    stdout, _ = probe(*asked, "--out", tmp_path / "b")  # the whole table: both ways
    assert "makes): holds" in stdout
    kept, card, page = written(tmp_path / "b")
    assert kept["ok"] is True
    assert "makes): holds." in card
    assert ">base+adapter merged</td>" in page
    told = json.loads((tmp_path / "b" / "probe" / "facts.json").read_text(encoding="utf-8"))["verification"][""]
    assert told["table"] == kept["table"]


def test_tied_lora_without_a_tied_table_says_so(tied, tmp_path):
    told = "--tied-lora changes nothing: no table embed_tokens that is tied"
    _, stderr = probe("extract", *tied, "--targets", "q", "--rank", 2, "--tied-lora", "--out", tmp_path / "a")
    assert told in stderr
    fails("extract", *tied, "--servable", "--tied-lora", "--out", tmp_path / "b", words=["give one of them"])
    assert not (tmp_path / "b").exists()
