"""`probe resize` and `probe merge`: exit codes, what goes to stdout and what to stderr."""

import json

import pytest
from test_adapters import adapt, llama
from test_cli import fails, probe
from test_resizing import zeroed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")


def test_resize_says_why_a_module_is_left_out(tmp_path):
    _, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj", "o_proj", "up_proj"])
    zeroed(adapter, "layers.1.self_attn.q_proj")
    _, stderr = probe("resize", adapter, "--budget", 60, "--out", tmp_path / "small")
    zero, rankless = stderr.splitlines()[:2]
    assert zero == "note: left out because its B·A is zero: model.layers.1.self_attn.q_proj.weight"
    assert rankless.startswith("note: left out because the budget gives it no rank: model.layers.")
    assert rankless.endswith(" more")


@pytest.mark.slow
def test_the_commands(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj", "up_proj"])
    small, merged, again, free = (tmp_path / name for name in ("small", "merged", "again", "x"))
    stdout, stderr = probe("resize", adapter, "--rank", 2, "--out", small)
    assert stderr == f"adapter: {small}\n"
    assert "keeps" in stdout
    stdout, stderr = probe("merge", base, adapter, small, "--weight", 1, "--weight", -0.5, "--out", merged)
    assert "1, 2" in stdout
    assert stdout.index("cosine") < stdout.index("tensors changed")
    assert stderr == f"model: {merged}\n"
    stdout, stderr = probe("merge", base, adapter, "--out", again, "--json", "--quiet")
    assert json.loads(stdout)["facts"]["n_changed"] == 4
    assert stderr == ""
    assert fails("merge", base, adapter, "--out", again) == f"error: {again}: is not empty; choose another --out\n"
    fails("merge", base, adapter, "-o", free, "--verify", "--device", "cuda:99", words=["--device cuda:99: found "])
    for wrong in (
        ("resize", adapter, "--out", free),
        ("resize", adapter, "--out", free, "--rank", 2, "--energy", 0.5),
        ("resize", adapter, "--out", free, "--energy", 2),
        ("resize", adapter, "--rank", 2),
        ("resize", adapter, "--rank", 2, "--out", free, "--dtype", "int8"),
        ("extract", base, base, "--dtype", "int8", "--out", free),
        ("extract", base, base, "--rank", 0, "--out", free),
        ("extract", base, base, "--rank", 4, "--energy", 0.5, "--out", free),
        ("resize", adapter, "--out", free, "--budget", "much"),
        ("merge", base, adapter, "--out", free, "--device", "cpu"),
        ("merge", base, adapter, "--out", free, "--weight", "nan"),
        ("merge", base, adapter, "--out", free, "--weight", 1, "--weight", 2),
        ("merge", base, "--out", free),
    ):
        assert probe(*wrong, code=2)[0] == ""
    assert not free.exists()
