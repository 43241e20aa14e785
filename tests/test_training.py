"""Reference adapters on a tiny model: every part of a training, its resumption, and what cannot be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from evaluated import gpt2, llama, masked, mixtral
from tokenizers_in_tests import tokenizer

import lowrank_probe as lp
from lowrank_probe import training, training_checks, training_fits
from lowrank_probe.demo_text import read_prose
from lowrank_probe.errors import CheckpointError, MatchError, NumericsError, OutputError, ProbeError
from lowrank_probe.running_models import quiet
from lowrank_probe.training_fits import Setting, load_model, run_fit
from lowrank_probe.training_plan import FULL, Fit, Plan
from lowrank_probe.training_terminal import print_training

RECIPE = lp.Recipe(steps=12, batch=4, length=32, evaluations=2)
RATES = {"full": 3e-3, "lora": 1e-2}


def words(directory, n=60, size=400):
    """Short documents of real prose, as jsonl."""
    prose = "\n".join(read_prose(n * size * 2))
    file = directory / "text.jsonl"
    rows = [json.dumps({"text": prose[i * size : (i + 1) * size]}) for i in range(n)]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def model(directory, make=llama):
    torch.manual_seed(0)
    made = make()
    made.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    return directory / "base"


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    return model(root), words(root)


@pytest.fixture(scope="module")
def trained(sides, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    found = lp.train(
        *sides, out, ranks=[1, 4], targets=["attention", "mlp"], seeds=2, lr=RATES, recipe=RECIPE, device="cpu"
    )
    return found, out


def test_every_run_is_there_and_learnt(trained):
    found, out = trained
    assert len(found.runs) == 2 + 2 * 2 * 2
    assert found.runs["loss"].notna().all()
    assert found.full_loss < found.base_loss - 0.05
    adapters = found.runs[found.runs["method"] == "lora"]
    assert (adapters["loss"] < found.base_loss + 0.01).all()
    assert adapters["loss"].mean() < found.base_loss - 0.02
    assert (adapters.groupby("rank")["n_trained"].max().diff().dropna() > 0).all()
    for label in found.runs["label"]:
        kept = {path.name for path in (out / "runs" / label).iterdir()}
        assert kept == {"facts.json", "history.csv", "losses.npy", "model" if label.startswith("full") else "adapter"}


def test_losses_are_those_of_the_saved_weights(trained, sides):
    """Loaded anew, by transformers and by peft, the model of a run has the loss that the run reports."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found, out = trained
    held_out = found.losses["base"].shape[0]
    assert held_out >= 8
    full = AutoModelForCausalLM.from_pretrained(out / "runs/full-s0/model")
    with quiet():
        worn = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(sides[0]), out / "runs/lora-r4-mlp-s1/adapter"
        )
    for label, one in (("full-s0", full), ("lora-r4-mlp-s1", worn)):
        tuned = one if label == "full-s0" else one.merge_and_unload()
        again = lp.evaluate(
            AutoModelForCausalLM.from_pretrained(sides[0]), tuned, held_out_blocks(sides), ranks=[0], device="cpu",
            sequences=held_out, tokenizer=tokenizer(),
        )  # fmt: skip
        assert again.row("tuned")["loss"] == pytest.approx(found.runs.set_index("label").loc[label, "loss"], abs=1e-4)


def held_out_blocks(sides):
    from lowrank_probe.documents import read_documents, split_documents
    from lowrank_probe.token_blocks import to_blocks

    return to_blocks(split_documents(read_documents(sides[1]), 0.1)[1], tokenizer(), RECIPE.length)


def test_runs_of_one_seed_see_the_same_batches(trained, sides, tmp_path):
    """The first step's loss is the base's on the same batch, whatever is trained; another seed has other batches."""
    histories = trained[0].histories
    first = histories[histories["step"] == 1].set_index("label")["loss"]
    s0, s1 = first[[name.endswith("s0") for name in first.index]], first[[name.endswith("s1") for name in first.index]]
    assert np.ptp(s0) < 1e-5
    assert np.ptp(s1) < 1e-5
    assert abs(s0.iloc[0] - s1.iloc[0]) > 1e-4


def test_adapters_have_the_rank_they_were_given(trained):
    """fp64 B·A has numerical rank ≤ r."""
    from safetensors.torch import load_file

    _, out = trained
    for rank in (1, 4):
        tensors = load_file(out / f"runs/lora-r{rank}-mlp-s0/adapter/adapter_model.safetensors")
        names = [name for name in tensors if "lora_A" in name]
        assert len(names) == 2 * 3
        for name in names:
            delta = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
            assert int(torch.linalg.matrix_rank(delta)) <= rank


def test_the_verdict_joins_all_evidence(trained):
    found, _ = trained
    table = found.verdict.set_index("layer_type")
    assert list(table.index[:2]) == ["attention", "mlp"]
    assert {"q", "k", "v", "o", "gate", "up", "down", "embedding"} <= set(table.index)
    assert table.loc[["attention", "mlp"], "trained_largest"].eq(4).all()
    assert table.loc["q", ["trained_rank", "trained_largest"]].isna().all()
    assert table["functional_largest"].notna().all()
    for row in table.itertuples():
        assert row.verdict.startswith(("low-rank at r=", "not low-rank", "undecidable"))
        assert bool(row.decided_by) != bool(row.missing)


def test_full_rank_of_the_functional_part_is_the_tuned_model(trained):
    table = trained[0].evaluation.table
    full = table[table["full"] & (table["how"] != "tuned")]
    assert len(full) > 3
    assert (full["excess"].abs() < 1e-4).all()


def test_the_recommended_config_is_one_that_was_trained(trained):
    found, _ = trained
    best = found.facts["recommendation"]
    assert f"r={best['rank']}, lora_alpha=32" in best["lora_config"]
    assert set(best["modules"]) <= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert best["lr"] == RATES["lora"]


def test_it_is_read_back_as_it_was_written(trained):
    found, out = trained
    again = lp.load(out)
    assert isinstance(again, lp.Training)
    for name in ("runs", "verdict", "histories"):
        a, b = getattr(again, name), getattr(found, name)
        assert list(a.columns) == list(b.columns)
        assert a.to_csv(index=False, float_format="%.10g") == b.to_csv(index=False, float_format="%.10g")
    assert set(again.losses) == set(found.losses)
    assert json.loads(again.to_json())["verdict"] == json.loads(found.to_json())["verdict"]
    (out / "runs.csv").rename(out / "runs.bak")
    try:
        with pytest.raises(CheckpointError, match="not a complete run directory"):
            lp.load(out)
    finally:
        (out / "runs.bak").rename(out / "runs.csv")


def test_the_same_command_again_trains_nothing(trained, sides):
    found, out = trained
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("facts.json")}
    same = replace(RECIPE, stop_on_nan=True, save_s=1.0, report_to=("tensorboard",))  # which change no result
    again = lp.train(
        *sides, out, ranks=[1, 4], targets=["attention", "mlp"], seeds=2, lr=RATES, recipe=same, device="cpu"
    )
    assert before == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("facts.json")}
    assert again.verdict.to_csv() == found.verdict.to_csv()


def one_run(sides, folder, fit, recipe=RECIPE):
    """The facts of one run, without the conclusions of a whole training."""
    shape = training_checks.shape_of(sides[0])
    plan = Plan((fit.rank,), (fit.targets,), (0,))
    modules = {fit.targets: training_checks.adapted_modules(shape, fit.targets, plan)}
    blocks, _ = training._blocks(*sides, recipe, 0.1, True, shape)
    return run_fit(fit, Setting(sides[0], *blocks, recipe, modules, torch.device("cpu")), folder)


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa", "lora+"])
def test_variants_train_and_load_as_lora(variant, sides, tmp_path, trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    facts = one_run(sides, tmp_path, Fit(variant, 4, "mlp", 0, 3e-3, 12))
    assert facts["loss"] < trained[0].base_loss
    base = AutoModelForCausalLM.from_pretrained(sides[0])
    with quiet():
        worn = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    blocks = held_out_blocks(sides)
    with torch.inference_mode():
        loss = worn(input_ids=blocks.ids, labels=blocks.labels).loss
    assert float(loss) == pytest.approx(facts["loss"], abs=2e-3)  # over tokens and over sequences of one length


@pytest.mark.parametrize(("make", "targets"), [(gpt2, "all-linear"), (mixtral, "all-linear"), (mixtral, "attention")])
def test_other_architectures(make, targets, sides, tmp_path):
    base = model(tmp_path, make)
    recipe = lp.Recipe(steps=2, batch=4, length=32, evaluations=1)
    facts = one_run((base, sides[1]), tmp_path / "run", Fit("lora", 2, targets, 0, 1e-2, 2), recipe)
    assert facts["n_trained"] == lp.budget(base, method="lora", rank=2, targets=[targets]).counts.adapter


def test_the_search_finds_a_rate_and_tells_what_it_tried(sides, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SEARCH_STEPS", 4)
    monkeypatch.setattr(training, "MOST_RATES", 4)
    found = lp.train(
        *sides, tmp_path / "run", ranks=[2], targets=["mlp"], seeds=1, recipe=lp.Recipe(steps=4, batch=4, length=32),
        device="cpu",
    )  # fmt: skip
    assert len(found.searches) == 8
    for method in ("full", "lora"):
        tried = found.searches[found.searches["method"] == method].set_index("lr")["loss"]
        assert found.facts["rates"][method] == tried.idxmin()
        at_an_end = found.facts["rates"][method] in (tried.index.min(), tried.index.max())
        assert at_an_end == any(note.startswith(f"{method}: its best learning rate") for note in found.facts["notes"])


def test_tensorboard_has_one_run_a_label(sides, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    recipe = lp.Recipe(steps=2, batch=4, length=32, evaluations=1, report_to=("tensorboard",))
    found = lp.train(
        *sides, tmp_path / "run", ranks=[1], targets=["mlp"], seeds=1, lr=RATES, recipe=recipe, device="cpu"
    )
    assert {path.name for path in (tmp_path / "run/tensorboard").iterdir()} == {"full-s0", "lora-r1-mlp-s0"}
    for label, history in found.histories.groupby("label"):
        events = EventAccumulator(str(tmp_path / "run/tensorboard" / label)).Reload()
        logged = [(one.step, one.value) for one in events.Scalars("train/loss")]
        kept = history[history["loss"].notna()]
        assert [step for step, _ in logged] == list(kept["step"])
        assert [value for _, value in logged] == pytest.approx(list(kept["loss"]), rel=1e-3)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


COMMAND = (
    "import sys, lowrank_probe as lp\n"
    "lp.train(sys.argv[1], sys.argv[2], sys.argv[3], ranks=[1], targets=['mlp'], seeds=1, device='cpu',"
    " lr={'full': 3e-3, 'lora': 1e-2}, recipe=lp.Recipe(steps=16, batch=4, length=32, save_s=0.0, evaluations=2))\n"
)


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was_and_ends_the_same(sides, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [sys.executable, "-c", COMMAND, *map(str, sides)]
    subprocess.run([*arguments, str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*arguments, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = killed / "runs/full-s0/checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "facts.json").exists()
    subprocess.run([*arguments, str(killed)], check=True, capture_output=True)
    first, second = (lp.load(root) for root in (whole, killed))
    assert json.loads((killed / "runs/full-s0/facts.json").read_text())["resumed"]
    assert not checkpoints.exists()
    for label, losses in first.losses.items():
        np.testing.assert_allclose(second.losses[label], losses, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(sides, tmp_path):
    """torchrun on two CPUs: one directory, the first process's; each sees its own half of the batches."""
    script = tmp_path / "train.py"
    script.write_text(COMMAND.replace("steps=16", "steps=4"), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command = [sys.executable, *launcher]
    done = subprocess.run(
        [*command, *map(str, sides), str(tmp_path / "run")], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = lp.load(tmp_path / "run")
    assert len(found.runs) == 2
    assert found.full_loss < found.base_loss


def refused(sides, tmp_path, **changes):
    arguments = {"ranks": [1], "targets": ["mlp"], "seeds": 1, "lr": RATES, "recipe": RECIPE, "device": "cpu"}
    with pytest.raises(ProbeError) as error:
        lp.train(*sides, tmp_path / "run", **(arguments | changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    return str(error.value), error.type


def test_what_cannot_be_is_one_line_and_leaves_nothing(sides, tmp_path):
    said, _ = refused(sides, tmp_path, recipe=lp.Recipe(length=128, steps=2))
    assert said == "--length 128: the model has 64 positions; give at most 64"
    said, kind = refused(sides, tmp_path, ranks=[1, 33])
    assert kind is MatchError
    assert "rank 33 is above what" in said
    assert "give ranks up to 32" in said
    said, kind = refused(sides, tmp_path, targets=["experts"])
    assert kind is MatchError
    assert "there are the layer types embedding q k v o gate up down" in said
    said, _ = refused(sides, tmp_path, lr={"lora": 1e-3})
    assert said == "lr: no learning rate for full; given are lora"
    said, _ = refused(sides, tmp_path, lr="fast")
    assert said.startswith("lr fast: expected auto")
    said, _ = refused(sides, tmp_path, lr="1e30")
    assert said == "lr 1e30: expected auto, a rate above 0 and below 100 such as 2e-4, or method=rate"
    said, _ = refused(sides, tmp_path, recipe=replace(RECIPE, report_to=("tensorbord",)))
    assert said.startswith("--report-to tensorbord: expected a logger of Trainer that is installed; installed are ")
    said, _ = refused(sides, tmp_path, recipe=replace(RECIPE), tolerance="-3%")
    assert said.startswith("tolerance '-3%': expected nats such as 0.01")
    with pytest.raises(ProbeError, match="alpha: expected a number above 0, found inf"):
        replace(RECIPE, alpha=float("inf"))
    said, _ = refused(sides, tmp_path, seeds=0)
    assert said == "seeds: expected at least 1"
    short = tmp_path / "short.txt"
    short.write_text("One line.\n\nAnother.\n", encoding="utf-8")
    said, _ = refused((sides[0], short), tmp_path)
    assert "too little text" in said
    assert "expected at least" in said
    (tmp_path / "bare").mkdir()
    llama().save_pretrained(tmp_path / "bare")
    said, _ = refused((tmp_path / "bare", sides[1]), tmp_path)
    assert "has no tokenizer" in said
    (tmp_path / "encoder").mkdir()
    said, kind = refused((model(tmp_path / "encoder", masked), sides[1]), tmp_path)
    assert kind is CheckpointError
    assert said.endswith("BertForMaskedLM sees the tokens to come (expected a causal language model)")
    (tmp_path / "broken").mkdir()
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    said, kind = refused((model(tmp_path / "broken", lambda: broken), sides[1]), tmp_path)
    assert kind is NumericsError
    assert "is NaN or Inf (model.layers.1.mlp.up_proj.weight has NaN or Inf); is the checkpoint whole?" in said
    said, kind = refused((tmp_path / "none", sides[1]), tmp_path)
    assert kind is CheckpointError
    assert "no such file or directory (expected a checkpoint directory, file, address or hub id, owner/name)" in said


@pytest.mark.slow
def test_a_hub_id_is_its_snapshot_in_the_cache_or_told_to_be_out_of_reach(sides, tmp_path):
    """In a process of its own: the hub's client reads its variables when it is imported."""
    snapshot = tmp_path / "hub/hub/models--org--tiny/snapshots" / ("0" * 40)
    shutil.copytree(sides[0], snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    code = (
        "import sys, lowrank_probe as lp\n"
        "found = lp.train(sys.argv[1], sys.argv[2], 'run', ranks=[1], targets=['mlp'], seeds=1, device='cpu',"
        " lr={'full': 3e-3, 'lora': 1e-2}, recipe=lp.Recipe(steps=2, batch=4, length=32, evaluations=1))\n"
        "print(found.facts['model']['hub_id'])"
    )

    def run(name):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
        return subprocess.run(
            [sys.executable, "-c", code, name, str(sides[1])], capture_output=True, text=True, cwd=tmp_path,
            env=environment, check=False,
        )  # fmt: skip

    assert run("org/tiny").stdout == "org/tiny\n"
    assert (
        "nobody/nothing: no such file or directory here, and the hub cannot be reached" in run("nobody/nothing").stderr
    )


def test_another_training_in_the_directory_is_refused(trained, sides):
    _, out = trained
    named = r"another plan \(plan.ranks: \[1, 4\] there, \[2\] here\)"
    with pytest.raises(OutputError, match=f"holds a training with {named}"):
        lp.train(*sides, out, ranks=[2], targets=["attention", "mlp"], seeds=2, lr=RATES, recipe=RECIPE, device="cpu")


def test_a_damaged_run_is_named_and_how_to_mend_it(trained, sides, tmp_path):
    out = shutil.copytree(trained[1], tmp_path / "run")
    (out / "facts.json").unlink()
    losses = out / "runs/lora-r1-mlp-s0/losses.npy"
    losses.write_bytes(losses.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"losses\.npy: cannot be read: .*; remove .* runs lora-r1-mlp-s0 again"):
        lp.train(
            *sides, out, ranks=[1, 4], targets=["attention", "mlp"], seeds=2, lr=RATES, recipe=RECIPE, device="cpu"
        )


def test_two_trainings_at_once_in_one_directory_are_refused(trained, sides):
    _, out = trained
    same = {"ranks": [1, 4], "targets": ["attention", "mlp"], "seeds": 2, "lr": RATES, "recipe": RECIPE}
    with subprocess.Popen(["sleep", "60"]) as other:
        (out / ".owner").write_text(f"{os.uname().nodename} {other.pid}", encoding="utf-8")
        with pytest.raises(OutputError, match=f"run: process {other.pid} is at work there; choose another --out"):
            lp.train(*sides, out, **same, device="cpu")
        other.kill()
    lp.train(*sides, out, **same, device="cpu")  # what a killed one left is taken over
    assert not (out / ".owner").exists()


def test_out_of_memory_tells_what_is_needed_and_what_would_fit(sides, tmp_path, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(training_fits, "_run", too_large)
    with pytest.raises(ProbeError) as error:
        lp.train(*sides, tmp_path / "run", ranks=[1], targets=["mlp"], seeds=1, lr=RATES, recipe=RECIPE, device="cpu")
    said = str(error.value)
    assert said.startswith(
        "full-s0: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB); probe budget predicts"
    )
    assert "try --batch 2 --accumulation 2 or --checkpointing" in said


def test_an_adapter_that_diverges_is_told_and_is_no_evidence(sides, tmp_path):
    found = lp.train(
        *sides, tmp_path / "run", ranks=[1], targets=["mlp"], seeds=1, lr={"full": 3e-3, "lora": 50.0},
        recipe=lp.Recipe(steps=12, batch=4, length=32, evaluations=2, alpha=1e6), device="cpu",
    )  # fmt: skip
    row = found.runs.set_index("label").loc["lora-r1-mlp-s0"]
    assert row["health"]
    mlp = found.verdict.set_index("layer_type").loc["mlp"]
    assert mlp["trained_largest"] is pd.NA
    assert mlp["trained_rank"] is pd.NA
    assert "r=1 " in mlp["evidence"]


def diverging(*labels):
    """`run_fit`, of which the runs of these labels diverge."""

    def run(fit, setting, folder, on_step=None):
        with pytest.MonkeyPatch.context() as patch:
            if fit.label in labels:
                patch.setattr(training_fits, "load_model", overflowing)
            return run_fit(fit, setting, folder, on_step)

    return run


def overflowing(directory):
    """The model with a head whose loss is finite and whose first step is not."""
    made = load_model(directory)
    made.register_forward_hook(lambda module, inputs, output: blown(output) if module.training else None)
    return made


def blown(output):
    output["loss"] = output["loss"] * float("inf")
    return output


@pytest.mark.parametrize("stop_on_nan", [False, True])
def test_a_full_run_that_diverges_leaves_page_and_table_and_decides_nothing(
    stop_on_nan, sides, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training, "run_fit", diverging("full-s0"))
    recipe = lp.Recipe(steps=2, batch=4, length=32, evaluations=1, stop_on_nan=stop_on_nan)
    how = {"ranks": [1], "targets": ["mlp"], "lr": RATES, "recipe": recipe, "device": "cpu"}
    found = lp.train(*sides, tmp_path / "run", seeds=1, **how)
    assert found.spectrum is None
    assert found.evaluation is None
    assert found.verdict[["layer_type", "verdict", "missing"]].values.tolist() == [
        ["mlp", "undecidable", "a full fine-tune that did not diverge"]
    ]
    assert found.facts["health"][0]["name"] == "nan"
    again = lp.load(tmp_path / "run")
    assert again.spectrum is None
    assert list(again.runs["diverged"]) == [True, False]
    print_training(again)
    assert "full fine-tune diverged" in capsys.readouterr().out
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "a full fine-tune that did not diverge" in page
    assert "0 matrices" not in page
    assert "ranks" not in again.figures


@pytest.mark.slow
def test_another_seeds_sound_full_run_serves_instead(sides, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "run_fit", diverging("full-s0", "lora-r1-mlp-s1"))
    recipe = lp.Recipe(steps=8, batch=4, length=32, evaluations=1)
    found = lp.train(
        *sides, tmp_path / "run", ranks=[1, 2], targets=["mlp"], seeds=2, lr=RATES, recipe=recipe, device="cpu"
    )
    assert found.facts["full"] == {"outcome": "gained", "looked_at": "full-s1"}
    assert "full-s0 diverged: spectrum and functional rank are of full-s1" in found.facts["notes"]
    row = found.verdict.set_index("layer_type").loc["mlp"]
    assert row["trained_largest"] == 2
    assert "r=1 diverged" in row["evidence"]
    assert set(found.verdict["layer_type"]) > {"mlp", "q", "down"}


def test_the_full_run_has_no_rank(trained):
    full = trained[0].runs[trained[0].runs["method"] == FULL]
    assert full["rank"].eq(0).all()
    assert full["alpha"].isna().all()
    assert full["excess"].eq(0).all()
