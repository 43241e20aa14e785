"""`probe budget` as a user has it: a real process, its exit code, its stdout, its stderr."""

import json
import re

import pandas as pd
import pytest
from test_budgets import LLAMA_8B, TINY
from test_cli import fails, probe

from lowrank_probe.accelerators import accelerators

MAMBA = {"model_type": "mamba", "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory with a Llama-3-8B's config.json in `8b` and a tiny one's in `tiny`."""
    root = tmp_path_factory.mktemp("models")
    for name, config in (("8b", LLAMA_8B), ("tiny", TINY), ("mamba", MAMBA)):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def row(stdout, start):
    return next(line for line in stdout.splitlines() if line.strip().startswith(start))


def test_a_size_alone_is_one_screen_with_every_recipe_named():
    stdout, stderr = probe("budget", "--params", "70e9")
    assert stderr == ""
    assert len(stdout.splitlines()) <= 24
    assert max(map(len, stdout.splitlines())) <= 120
    assert re.search(r"full, fp32 Adam +4 \+ 4 \+ 8 = 16 +1,120 +1,043 ", stdout)
    assert re.search(r"full, mixed precision Adam +2 \+ 4 \+ 4 \+ 8 = 18 +1,260 +1,173 ", stdout)
    assert re.search(r"full, ZeRO paper's mixed Adam +2 \+ 4 \+ 2 \+ 8 = 16 +1,120 ", stdout)
    assert re.search(r"full, pure bf16 Adam +2 \+ 2 \+ 4 = 8 +560.0 +521.5 ", stdout)
    assert "207,093,760 trainable" in stdout
    assert "828.5 MB" in row(stdout, "lora")
    assert "none" in row(stdout, "full, fp32")
    assert "unknown without --seq" in " ".join(stdout.split())
    assert probe("budget", "--params", "70B")[0] == stdout
    assert "Qwen2.5-72B" in probe("budget", "--params", "70B", "--like", "qwen")[0]


def test_a_model_is_counted_by_layer_type(models):
    stdout, _ = probe("budget", models / "8b")
    assert f"{models / '8b'}: 8,030,261,248 parameters (config.json)" in stdout
    assert "gate 1,879,048,192" in stdout
    assert "41,943,040 trainable (0.5196 % of all)" in stdout
    again, _ = probe("budget", models / "8b" / "config.json")
    assert again.splitlines()[1:] == stdout.splitlines()[1:]


def test_one_run_in_full(models):
    stdout, _ = probe(
        "budget", models / "8b", "--method", "lora", "--seq", "2048", "--targets", "q,v", "--price", "2.5"
    )
    for word in ("weights", "adapter", "gradients", "optimizer states", "activations", "logits", "reserve", "sum"):
        assert row(stdout, word)
    assert "6,815,744 trainable" in stdout
    assert re.search(r"The (forward pass|loss|backward pass|optimizer's step) peaks, at ", stdout)
    assert "--checkpointing" in row(stdout, "checkpointing")
    assert "1 × 2.5 = 2.50" in row(stdout, "H100")
    explained, _ = probe("budget", models / "8b", "--method", "lora", "--seq", "2048", "--explain")
    assert "autocast_adapter_dtype=True" in " ".join(explained.split())
    assert "·V·" in explained


def test_lists_make_a_table(models):
    stdout, _ = probe("budget", models / "8b", "--rank", "4,8,256", "--seq", "512,2048", "--method", "lora,dora,full")
    rows = [line.split() for line in stdout.splitlines() if re.match(r" +(lora|dora|full) ", line)]
    assert [(cells[0], cells[1], cells[2]) for cells in rows] == [
        (method, rank, seq)
        for method in ("lora", "dora", "full")
        for rank in (("4", "8", "256") if method != "full" else ("–",))
        for seq in ("512", "2,048")
    ]
    assert [cells[3] for cells in rows[:6:2]] == ["10,485,760", "20,971,520", "671,088,640"]


def test_the_exit_code_says_whether_it_fits(models):
    options = ("budget", models / "8b", "--method", "full", "--precision", "fp32")
    assert "does not fit" in probe(*options, "--gpu", "H100", code=3)[0]
    _, stderr = probe(*options, "--gpu", "rtx4090", "--quiet", code=3)
    assert stderr == "--gpu rtx4090: this does not fit on one RTX 4090 (24 GB)\n"
    assert "fits" in probe(*options, "--gpu", "H200")[0]
    assert "Each of the cards" in probe(*options, "--gpu", "H100", "--gpus", "4", "--zero", "3")[0]
    probe("budget", models / "8b", "--gpu", "H100")  # some methods of the comparison do
    probe("budget", "--params", "1T", "--gpu", "T4", code=3)
    probe("budget", models / "8b", "--method", "qlora,full", "--rank", "4,8", "--gpu", "RTX 4090", code=3)


def test_json_is_one_object(models):
    stdout, stderr = probe(
        "budget", models / "8b", "--method", "lora", "--seq", "1024", "--gpu", "L40S", "--storage", "20",
        "--price", "1",
        "--json",
    )  # fmt: skip
    assert stderr == ""
    told = json.loads(stdout)
    assert told["schema_version"] == 1
    assert told["model"]["by_type"]["q"] == 536_870_912
    (one,) = told["budgets"]
    assert one["n_trainable"] == 41_943_040
    assert one["total_bytes"] == one["phases"][one["peak_phase"]]
    assert sum(part["bytes"][one["peak_phase"]] for part in one["components"]) == one["total_bytes"]
    assert told["gpu"]["name"] == "L40S"
    assert told["gpu"]["fits"] == [one["total_bytes"] <= told["gpu"]["usable_bytes"]]
    assert [card["name"] for card in one["cards"]] == ["L40S"]
    assert told["storage"]["full_bytes"] == 20 * 2 * 8_030_261_248
    saved = [mend["saved_bytes"] for mend in one["mends"]]
    assert saved == sorted(saved, reverse=True)
    compared = json.loads(probe("budget", "--params", "7B", "--json")[0])
    assert len(compared["budgets"]) == 7
    assert len(compared["budgets"][0]["cards"]) == sum(card.common for card in accelerators())
    assert compared["gpu"] is None


def test_a_directory_holds_the_page_and_the_tables(models, tmp_path):
    out = tmp_path / "run"
    stdout, stderr = probe("budget", models / "tiny", "--seq", "128", "--rank", "4,8", "--out", out)
    assert stderr == f"report: {out / 'report.html'}\n"
    assert sorted(file.name for file in out.iterdir()) == [
        "budget.json", "budgets.csv", "cards.csv", "components.csv", "report.html",
    ]  # fmt: skip
    runs = pd.read_csv(out / "budgets.csv")
    told = json.loads((out / "budget.json").read_text())
    assert list(runs["total_bytes"]) == [one["total_bytes"] for one in told["budgets"]]
    parts = pd.read_csv(out / "components.csv")
    assert parts.groupby("run", sort=False)["loss_gib"].sum().tolist() == pytest.approx(
        [one["phases"]["loss"] / 2**30 for one in told["budgets"]]
    )
    fails("budget", models / "tiny", "--out", out, words=["is not empty", "choose another --out"])
    assert "n_trainable" in runs
    assert stdout


def test_what_n_variants_take_on_disk(models):
    stdout, _ = probe("budget", models / "8b", "--storage", "100")
    assert re.search(r"100 full checkpoints +16.1 GB +1,606 GB ", stdout)
    assert re.search(r"one base and 100 adapters, lora, qlora r=16 +167.8 MB +32.8 GB .* 48.9 ×", stdout)
    stdout, _ = probe("budget", models / "8b", "--rank", "4,256", "--storage", "100")
    assert len(re.findall(r"one base and 100 adapters, lora r=(?:4|256) ", stdout)) == 2


@pytest.mark.slow
def test_measured_beside_the_formula(models):
    stdout, _ = probe("budget", models / "tiny", "--method", "lora", "--seq", "64", "--measure", "--json")
    told = json.loads(stdout)
    measured, one = told["measured"]["peaks"], told["budgets"][0]
    for phase in ("forward", "loss", "backward", "step"):
        formula = one["phases"][phase] - one["components"][-1]["bytes"][phase]
        assert formula == pytest.approx(measured[phase], rel=0.01)
    rows = told["measured"]["beside_formula"]
    assert set(rows) >= {"weights", "adapter", "gradients", "optimizer", "activations", "logits", "sum"}
    for name in ("weights", "adapter", "gradients", "optimizer"):
        for formula, real in rows[name].values():
            assert formula == pytest.approx(real, rel=0.01)
    mixed = ("--method", "full", "--precision", "mixed")
    stdout, _ = probe("budget", models / "tiny", *mixed, "--seq", "64", "--measure")
    assert "measured by fake tensors" in stdout
    offs = re.findall(r"([+-][\d.]+) %", row(stdout, "off by"))
    assert len(offs) == 4
    assert all(abs(float(off)) < 1 for off in offs)


@pytest.mark.slow
def test_without_a_formula_the_measurement_stands_alone(models):
    run = ("budget", models / "mamba", "--method", "full", "--seq", "8", "--measure")
    stdout, stderr = probe(*run, "--gpu", "T4")
    assert "note: mamba: no formula for its activations: only the measurement knows them" in stderr
    assert len(row(stdout, "activations  ").split()) == 5
    assert "off by" not in stdout
    assert re.search(
        r"with the reserve a card needs .* T4 \(16 GB\) has 14.6 GiB for it: fits", " ".join(stdout.split())
    )
    told = json.loads(probe(*run, "--json")[0])["measured"]
    assert told["beside_formula"] is None
    assert told["total_bytes"] > max(told["peaks"].values()) > 0
    _, stderr = probe(*run, "--gpu", "0.5GB", "--quiet", code=3)
    assert "does not fit on one 0.5 GB card" in stderr


def test_an_estimate_is_marked(models, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "olmo2"}))
    for options in ([], ["--method", "lora"], ["--rank", "4,8"]):
        stdout, _ = probe("budget", tmp_path, "--seq", "64", *options)
        assert "estimate: generic block of olmo2" in " ".join(stdout.split())
        assert "estimate:" not in probe("budget", models / "tiny", "--seq", "64", *options)[0].replace("*: an", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{}/nothing"], ["no such file or directory"]),
        (["{}/8b", "--targets", "foo"], ["foo", "q_proj", "all-linear"]),
        (["{}/mamba", "--method", "full", "--seq", "64"], ["mamba: no formula for its activations", "--measure"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_line(models, options, words):
    fails("budget", *(option.format(models) for option in options), words=words)


@pytest.mark.parametrize("options", [["--method", "ia3"], ["--rank", "a"], ["--seq", "1k"], ["--loss", "half"],
                                     ["--batch", "0"], ["--zero", "4"], ["--measure"], ["--precision", "mixed"],
                                     ["--optimizer", "sgd"], ["--explain"], ["--explain", "--rank", "4,8"],
                                     ["--method", "full", "--rank", "8"], ["--method", "full", "--targets", "q"],
                                     ["--method", "full", "--dtype", "bfloat16"],
                                     ["--method", "lora", "--no-double-quant"], ["--rank", ""],
                                     ["--like", "llama"], ["--price", "inf"], ["--price", "nan"],
                                     ["--method", "qlora", "--precision", "fp32"],
                                     ["--method", "lora", "--seq", "8", "--gpus", "2", "--measure"]])  # fmt: skip
def test_wrong_usage_is_exit_2(models, options):
    stdout, stderr = probe("budget", models / "8b", *options, code=2)
    assert stdout == ""
    assert "Invalid value" in stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--params", "0"], ["--params: 0:", "such as 70B"]), (["--params", "7GB"], ["7GB"]),
        (["--params", "nan"], ["nan"]), (["--params", "100K"], ["--params: 100K: expected", "between 1M and 100T"]),
        (["--params", "1e40"], ["between 1M and 100T"]), ([], ["give a model", "--params"]),
        (["--params", "7B", "--like", "mamba"], ["--like: 'mamba'", "llama"]),
        (["{}/8b", "--params", "7B"], ["one of the two"]),
        (["{}/8b", "--rank", "0"], ["--rank", "found 0"]), (["{}/8b", "--rank", "9" * 20], ["at most 1,000,000"]),
        (["{}/8b", "--seq", "9" * 20], ["--seq", "at most"]), (["{}/8b", "--seq", "4,0"], ["--seq", "found 0"]),
        (["{}/8b", "--gpu", "H10"], ["--gpu: GPU 'H10' is not known; nearest: H100"]),
        (["{}/8b", "--zero", "3"], ["--zero: 3 on 1 GPU spreads nothing", "--gpus"]),
        (["{}/8b", "--zero", "1", "--fsdp", "2", "--gpus", "2"], ["one of the two"]),
        (["{}/8b", "--method", "lora", "--optimizer", "lion"], ["--optimizer: 'lion'", "adamw-8bit"]),
        (["{}/8b", "--method", "lora", "--precision", "int8"], ["--precision: 'int8': expected fp32, bf16 or mixed"]),
        (["{}/8b", "--method", "lora", "--dtype", "float16"], ["'float16': expected float32 or bfloat16"]),
        (["{}/8b", "--method", "lora", "--measure"], ["--measure: needs --seq"]),
        (["--params", "7B", "--method", "lora", "--seq", "8", "--measure"], ["--measure: needs a model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_bad_value_of_an_option_is_wrong_usage(models, options, words):
    stdout, stderr = probe("budget", *(option.format(models) for option in options), code=2)
    assert stdout == ""
    said = " ".join(stderr.replace("│", " ").split())
    for word in words:
        assert word in said


def test_cards_without_bf16_or_bitsandbytes_are_marked_everywhere(models, tmp_path):
    qlora = ("budget", models / "tiny", "--method", "qlora", "--seq", "64")
    stdout, _ = probe(*qlora, "--no-double-quant", "--out", tmp_path / "out")
    assert "T4 (16 GB)†" in row(stdout, "T4")
    assert " no‡" in row(stdout, "TPU v6e")
    assert "†: no bf16 in hardware. ‡: no kernels of bitsandbytes" in " ".join(stdout.split())
    assert "0.0625 B" in stdout
    cards = pd.read_csv(tmp_path / "out" / "cards.csv").set_index("card")
    assert not cards.loc["T4 (16 GB)†", "bf16"]
    assert not cards.loc["TPU v6e (32 GB)", "runs"]
    assert "†: no bf16 in hardware" in (tmp_path / "out" / "report.html").read_text()
    told = json.loads(probe(*qlora, "--gpu", "TPU v6e", "--json", code=3)[0])
    assert told["gpu"]["bitsandbytes"] is False
    assert told["budgets"][0]["cards"][0]["runs"] is False
    assert "†: no bf16 in hardware" in " ".join(probe("budget", models / "tiny")[0].split())


def test_a_list_of_ranks_is_loras_and_takes_its_precision(models):
    stdout, _ = probe("budget", models / "tiny", "--rank", "4,8", "--optimizer", "sgd", "--precision", "fp32", "--json")
    assert {(one["method"], one["optimizer"], one["precision"]) for one in json.loads(stdout)["budgets"]} == {
        ("lora", "sgd", "fp32")
    }


def test_what_only_activations_need_is_told_without_a_sequence(models):
    _, stderr = probe("budget", models / "tiny", "--batch", "4", "--no-flash")
    assert "note: --batch 4 changes nothing without --seq" in stderr
    assert "note: --no-flash changes nothing" in stderr
    assert probe("budget", models / "tiny", "--batch", "4", "--quiet")[1] == ""


def test_a_price_is_told_of_every_run(models):
    stdout, _ = probe("budget", models / "tiny", "--price", "2.5")
    assert len(re.findall(r" 1 +2\.50 *$", stdout, re.MULTILINE)) == 7
    assert "price: an hour of the least number of H100 (80 GB) cards" in " ".join(stdout.split())
    wide, _ = probe("budget", "--params", "70e9", "--price", "12.5", "--gpu", "48GB", code=3)
    assert "…" not in wide
    assert "cards: how many 48 GB cards hold it" in " ".join(wide.split())
    run = ("budget", models / "tiny", "--rank", "4,8", "--price", "2.5", "--gpu", "T4")
    stdout, _ = probe(*run)
    assert len(re.findall(r"lora .* fits +1 +2\.50 *$", stdout, re.MULTILINE)) == 2
    told = json.loads(probe(*run, "--json")[0])
    assert told["price"] == {"card": "T4", "one_card_an_hour": 2.5}
    assert [(one["n_cards_priced"], one["price_per_hour"]) for one in told["budgets"]] == [(1, 2.5)] * 2


def test_what_stands_for_a_size_is_named_in_json(models):
    model = json.loads(probe("budget", "--params", "8e9", "--json")[0])["model"]
    assert (model["n_parameters"], model["n_active"], model["by_type"]) == (8 * 10**9, None, None)
    assert model["typical"]["n_parameters"] == sum(model["typical"]["by_type"].values()) == 8_030_261_248
    model = json.loads(probe("budget", models / "tiny", "--json")[0])["model"]
    assert model["typical"] is None
    assert model["n_parameters"] == sum(model["by_type"].values()) == model["n_active"]


def test_tiny_models_are_told_in_units_of_theirs(models):
    for options in ([], ["--method", "lora", "--seq", "32"]):
        stdout, _ = probe("budget", models / "tiny", *options)
        assert "MiB" in stdout
        assert "GiB on one card" not in stdout
        assert "saves GiB" not in stdout


def test_a_rank_that_no_matrix_has_is_noted(models):
    for options in (["--method", "lora"], ["--method", "lora,full"], []):
        stdout, _ = probe("budget", models / "tiny", "--rank", "100000", *options)
        assert "note: ranks above 32 are more than model.layers.*.self_attn.k_proj" in stdout
    stdout, _ = probe("budget", models / "tiny", "--method", "full", "--precision", "fp32", "--seq", "64")
    assert "note: PyTorch has no fused attention for grouped queries in float32" in stdout


def test_an_unknown_model_type_is_one_short_line(models, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    stderr = fails("budget", tmp_path, words=["nearest: llama"])
    assert len(stderr) < 400


def test_more_tokens_than_positions_are_told(models, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ))  # fmt: skip
    for model, seq, words in (
        (models / "8b", "8193", "its config must be changed"),
        (tmp_path, "65", "cannot run this"),
    ):
        for options in ([], ["--method", "lora"], ["--rank", "4,8"]):
            assert words in " ".join(probe("budget", model, "--seq", seq, *options)[0].split())
    assert "positions:" not in probe("budget", models / "8b", "--seq", "8192")[0]


def test_a_config_without_what_is_needed_names_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA_8B.items() if k != "hidden_size"}))
    fails("budget", tmp_path, words=["hidden_size"])
