"""Every example runs, and what it prints holds."""

import re
import runpy
import sys
from pathlib import Path

import evaluated
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of names in transformers


@pytest.fixture
def run(capsys, monkeypatch):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_has_a_test():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_noise_check(run):
    found, null = map(int, re.search(r"r90 = (\d+), of pure noise (\d+)", run("noise_check.py")).groups())
    assert found < null


def test_spectrum(run, growing):
    base, steps = growing
    assert re.search(r"^q +low-rank at r=\d+", run("spectrum.py", base, steps[-1]), re.MULTILINE)


def test_lora_from_scratch_is_peft_to_rounding(run):
    source = (EXAMPLES / "lora_from_scratch.py").read_text(encoding="utf-8")
    assert sum(bool(line.strip()) for line in source.splitlines()) < 80
    out = run("lora_from_scratch.py")
    gaps = [float(gap) for gap in re.findall(r"\d\.\de[+-]\d\d", out)]
    assert len(gaps) == 3
    assert max(gaps) < 1e-6
    assert "0.weight: trains, and is no factor of LoRA" in out


def test_several_adapters(run):
    out = run("several_adapters.py")
    losses = {
        name: (float(up), float(down)) for name, up, down in re.findall(r"(\w+) +(\d\.\d+) +(\d\.\d+)$", out, re.M)
    }
    assert set(losses) == {"base", "up", "down", "cat", "linear", "merged"}
    assert losses["up"][0] < losses["base"][0] - 0.5
    assert losses["down"][1] < losses["base"][1] - 0.5
    assert losses["merged"] == pytest.approx(losses["cat"], abs=2e-3)
    assert abs(losses["linear"][0] - losses["cat"][0]) > 0.1  # cross terms


def test_safe_merge(run):
    out = run("safe_merge.py")
    gaps = re.findall(r"differ by (\S+), the adapter moves them by (\S+)", out)
    assert len(gaps) == 2
    assert all(float(gap) < 0.02 * float(moved) for gap, moved in gaps)
    assert "new: none" in out
    assert "new: ['lm_head.weight']" in out
    assert re.search(r"refused: .*lora_embedding_A in .*contains NaN or Inf\n  written: nothing", out)


def test_functional_rank(run, tmp_path, monkeypatch):
    base, tuned = evaluated.saved(tmp_path, *evaluated.moved(evaluated.llama))
    monkeypatch.chdir(tmp_path)
    assert re.search(r"^ *all +\d+", run("functional_rank.py", base, tuned), re.MULTILINE)
    assert (tmp_path / "functional-rank" / "report.html").exists()
