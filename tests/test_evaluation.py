"""The functional rank end to end, on real small models: full rank is tuned, rank 0 base, planted rank found, resume."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from evaluated import (
    bare,
    classifier,
    fine_tuned,
    gpt2,
    llama,
    masked,
    mixtral,
    moved,
    phi3,
    saved,
    t5,
    texts,
)
from logs import kept
from peft import LoraConfig, get_peft_model
from tokenizers_in_tests import tokenizer

import lowrank_probe as lp
from lowrank_probe import columns, scoring
from lowrank_probe.documents import Document, read_documents, split_documents
from lowrank_probe.evaluation_models import parameters
from lowrank_probe.texts import prompts
from lowrank_probe.token_blocks import to_blocks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")

FAST = {"length": 32, "sequences": 8, "batch": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(base, tuned) directories: every matrix of a Llama fine-tuned on the text."""
    return saved(tmp_path_factory.mktemp("trained"), *fine_tuned())


@pytest.fixture(scope="module")
def found(trained, text):
    return lp.evaluate(*trained, text, ranks=[0, 1, 4, 16, "full"], **FAST)


def rows(found, group, how="alone"):
    return found.table[(found.table["group"] == group) & (found.table["how"] == how)]


def test_the_tables_are_as_documented(found):
    assert list(found.table.columns) == list(columns.EVALUATION)
    assert list(found.functional.columns) == list(columns.FUNCTIONAL)
    types = ["embedding", "q", "k", "v", "o", "gate", "up", "down"]
    assert list(found.functional["group"]) == [*types, "all", *types]
    assert found.table["how"].tolist()[:2] == ["base", "tuned"]
    assert rows(found, "q")["rank"].tolist() == [0, 1, 4, 16, 32]
    assert rows(found, "q")["full"].tolist() == [False] * 4 + [True]
    assert rows(found, "q")["parameters"].tolist() == [2 * r * 64 for r in (0, 1, 4, 16, 32)]
    assert found.losses.shape == found.kl.shape == (len(found.table), 8)
    assert (found.losses @ found.tokens / found.tokens.sum()) == pytest.approx(found.table["loss"])
    assert (found.kl @ found.kl_tokens / found.kl_tokens.sum()) == pytest.approx(found.table["kl_nats"])
    assert np.exp(found.table["loss"]).tolist() == pytest.approx(found.table["perplexity"].tolist())
    assert (found.table["loss_low"] < found.table["loss"]).all()
    assert (found.table["loss"] < found.table["loss_high"]).all()


def test_full_rank_is_tuned_and_rank_0_of_all_is_the_base(found):
    base, tuned = found.row("base"), found.row("tuned")
    full = found.table[found.table["full"]]
    assert full["loss"].tolist() == pytest.approx([tuned["loss"]] * len(full), abs=1e-5)
    assert (full["kl_nats"].abs() < 1e-6).all()
    none = rows(found, "all", "all").iloc[0]  # norms were not trained
    assert none["loss"] == pytest.approx(base["loss"], abs=1e-6)
    assert none["kept_gain"] == pytest.approx(0, abs=1e-5)
    assert base["kl_nats"] == pytest.approx(none["kl_nats"], rel=1e-4)
    assert tuned["kept_gain"] == 1


def test_the_loss_falls_with_the_rank(found):
    for (group, how), part in found.table[found.table["rank"].notna()].groupby(["group", "how"]):
        assert part["loss"].iloc[0] > part["loss"].iloc[-1], (group, how)
    every = rows(found, "all", "all")
    # From rank 1 on: the first direction of a violent update does harm without the others.
    assert (every["loss"].iloc[1:].diff().dropna() < 0).all()
    assert (every["kl_nats"].iloc[1:].diff().dropna() < 0).all()
    without = [rows(found, group, "leave out")["loss"].iloc[0] for group in ("embedding", "up", "q")]
    assert all(loss < every["loss"].iloc[0] for loss in without)


def test_one_state_is_what_transformers_says_of_those_weights(found, trained):
    import transformers as hf

    base, tuned = (hf.LlamaForCausalLM.from_pretrained(side, dtype=torch.float32).eval() for side in trained)
    documents = sorted((Document(text) for text in prompts()), key=lambda one: one.digest)
    blocks = to_blocks(documents, tokenizer(), 32, limit=8)
    with torch.no_grad():
        for name, W in tuned.named_parameters():
            if "down_proj" in name:
                before = base.get_parameter(name).double()
                U, s, Vh = torch.linalg.svd(W.double() - before, full_matrices=False)
                W.copy_(before + (U[:, :4] * s[:4]) @ Vh[:4])
        expected = float(tuned(input_ids=blocks.ids, labels=blocks.labels).loss)
    row = rows(found, "down").set_index("rank").loc[4]
    assert row["loss"] == pytest.approx(expected, abs=1e-5)


def test_the_functional_rank_is_the_rule_on_the_table(found):
    gain = found.row("base")["loss"] - found.row("tuned")["loss"]
    assert found.facts["gain"] == pytest.approx(gain)
    assert found.facts["tolerance"] == pytest.approx(0.05 * gain)
    for row in found.functional.itertuples():
        part = rows(found, row.group, row.how)
        within = (part["excess"] <= 0.05 * gain).tolist()
        first = min(i for i in range(len(within)) if all(within[i:]))
        assert row.functional_rank == part["rank"].tolist()[first]
        assert row.low <= row.functional_rank <= row.high


def test_a_planted_rank_4_is_judged_4(tmp_path, text):
    sides = saved(tmp_path, *fine_tuned(rank=4, steps=80))
    asked = {"ranks": range(9), "groups": ["all-linear", "down"], "tolerance": "2%", "leave_out": False}
    found = lp.evaluate(*sides, text, **asked, **FAST | {"sequences": 64})
    told = found.functional.set_index("group")
    # At rank 3 some sequences are within the tolerance, on some processors enough for the interval to begin there.
    assert told.loc["all-linear", ["functional_rank", "high"]].tolist() == [4, 4]
    assert told.loc["all-linear", "low"] >= 3
    assert told.loc["down", "functional_rank"] <= 4
    assert rows(found, "all", "all").set_index("rank").loc[4, "excess"] == pytest.approx(0, abs=1e-5)
    assert rows(found, "all", "all").set_index("rank").loc[3, "excess"] > found.facts["tolerance"]


KINDS = {
    "gpt2": (gpt2, "next-token loss", "q"),
    "phi3": (phi3, "next-token loss", "gate"),
    "mixtral": (mixtral, "next-token loss", "expert_down"),
    "bert": (masked, "masked-token loss", "q"),
    "t5": (t5, "next-token loss", "decoder cross_v"),
    "classifier": (classifier, "KL to tuned", "classifier"),
    "bare": (bare, "1 − cosine to tuned", "o"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind, tmp_path, text):
    make, merit, group = KINDS[kind]
    sides = saved(tmp_path, *moved(make, scale=0.2))
    found = lp.evaluate(*sides, text, ranks=[0, 2, "full"], leave_out=False, **FAST | {"sequences": 6})
    assert found.facts["merit"] == merit
    base, tuned = found.row("base"), found.row("tuned")
    full = found.table[found.table["full"]]
    assert full["loss"].tolist() == pytest.approx([tuned["loss"]] * len(full), abs=1e-4)
    assert rows(found, "all", "all").iloc[0]["loss"] == pytest.approx(base["loss"], abs=1e-5)
    distance = "loss" if merit.startswith("1") else "kl_nats"
    assert rows(found, "all", "all")[distance].iloc[0] > rows(found, "all", "all")[distance].iloc[2]
    assert group in set(found.functional["group"])
    assert merit.endswith("loss") == bool(found.table["perplexity"].notna().all())
    assert merit.startswith("1") == bool(found.table["kl_nats"].isna().all())
    assert not any("full rank" in note for note in found.facts["notes"])


def test_an_adapter_is_its_merged_model(tmp_path, text):
    base, _ = moved(llama)
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    worn = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    worn.save_pretrained(tmp_path / "adapter")
    found = lp.evaluate(tmp_path / "base", tmp_path / "adapter", text, ranks=[0, 1, 3, "full"], **FAST)
    assert set(found.functional["group"]) == {"q", "up", "all"}
    every = rows(found, "all", "all")
    assert every.iloc[2]["loss"] == pytest.approx(found.row("tuned")["loss"], abs=1e-5)
    assert every.iloc[0]["loss"] == pytest.approx(found.row("base")["loss"], abs=1e-6)
    assert found.facts["tuned"]["kind"] == "adapter"
    merged = tmp_path / "merged"
    worn.merge_and_unload().save_pretrained(merged)
    tokenizer().save_pretrained(merged)
    again = lp.evaluate(tmp_path / "base", merged, text, ranks=[0, 1, 3, "full"], **FAST)
    assert again.table["loss"].tolist() == pytest.approx(found.table["loss"].tolist(), abs=1e-6)


def test_a_head_that_the_base_lacks_is_the_tuned_models(tmp_path, text):
    base, tuned = moved(classifier)
    base.bert.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer().save_pretrained(tmp_path / "tuned")
    found = lp.evaluate(tmp_path / "base", tmp_path / "tuned", text, ranks=[0, "full"], **FAST)
    assert "classifier" not in set(found.functional["group"])
    assert any("the base has no classifier.bias" in note for note in found.facts["notes"])
    assert found.row("base")["loss"] > 0


def test_models_in_memory_stay_as_they_are(text):
    base, tuned = moved(gpt2)
    before = {name: W.clone() for name, W in parameters(tuned).items()}
    asked = {"ranks": [0, 1], "groups": ["attention", "mlp"], "device": "cpu", "sequences": 8}
    found = lp.evaluate(base, tuned, prompts(), tokenizer=tokenizer(), length=32, **asked)
    assert all(torch.equal(W, before[name]) for name, W in parameters(tuned).items())
    assert list(found.functional["group"]) == ["attention", "mlp", "all", "attention", "mlp"]
    assert found.functional["largest_rank"].tolist() == [1] * 5
    attention = set(found.functional["n_matrices"])
    assert attention == {4 * 2, 2 * 2, 12}  # q, k, v, o; up, down; two layers
    assert "in no group, so as tuned in every state but the base: 2 matrices" in " ".join(found.facts["notes"])
    documents = sorted((Document(text) for text in prompts()), key=lambda one: one.digest)
    blocks = to_blocks(documents, tokenizer(), 32, limit=8)
    again = lp.evaluate(base, tuned, blocks, **asked)
    assert again.table["loss"].tolist() == found.table["loss"].tolist()


def test_vectors_stay_as_tuned_and_are_told(text):
    base, tuned = moved(llama)
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1.5)
    found = lp.evaluate(base, tuned, prompts(), tokenizer=tokenizer(), ranks=[0], leave_out=False, **FAST)
    none, below = rows(found, "all", "all").iloc[0]["loss"], found.row("base")["loss"]
    assert abs(none - below) > 1e-3
    assert any("model.norm.weight (norms, biases) differ too" in note for note in found.facts["notes"])


def test_a_tuned_model_that_gained_nothing_has_a_tolerance_in_nats(text):
    tuned, base = fine_tuned()
    found = lp.evaluate(base, tuned, prompts(), tokenizer=tokenizer(), ranks=[0, 1, 2], leave_out=False, **FAST)
    assert found.facts["tolerance"] == 0.01
    assert any("not better than the base on this text" in note for note in found.facts["notes"])
    assert found.table["kept_gain"].isna().all()


def test_what_is_not_reached_is_told(text, tmp_path):
    sides = fine_tuned()
    asked = {"ranks": [0, 1], "groups": ["everything"], "tolerance": 0.001, "leave_out": False}
    found = lp.evaluate(*sides, prompts(), tokenizer=tokenizer(), **asked, **FAST)
    assert found.functional["functional_rank"].isna().all()
    assert repr(found).endswith("functional rank everything > 1, all > 1>")
    found.save(tmp_path / "run")
    again = lp.load(tmp_path / "run")
    assert again.functional["high"].isna().all()


def test_held_out_documents_alone(trained, tmp_path):
    file = tmp_path / "many.jsonl"
    lines = [json.dumps({"text": f"{number}. {text}"}) for number in range(40) for text in prompts()]
    file.write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    every = lp.evaluate(*trained, file, ranks=[0], groups=["q"], **FAST | {"sequences": 4}).facts["text"]
    part = lp.evaluate(*trained, file, ranks=[0], groups=["q"], held_out=0.1, **FAST | {"sequences": 4}).facts["text"]
    assert every["n_duplicates"] == part["n_duplicates"] == 1
    kept = split_documents(read_documents(file), 0.1)[1]
    alone = lp.evaluate(*trained, kept, ranks=[0], groups=["q"], **FAST | {"sequences": 4}).facts["text"]
    assert alone["sha256"] == part["sha256"] != every["sha256"]


def test_a_run_is_read_back(found, tmp_path):
    found.save(tmp_path / "run")
    again = lp.load(tmp_path / "run")
    assert isinstance(again, lp.Evaluation)
    assert again.table.equals(found.table)
    assert again.functional.equals(found.functional)
    assert np.array_equal(again.losses, found.losses)
    assert repr(again) == repr(found)
    page = lp.report(tmp_path / "run")
    assert "functional rank" in page.read_text(encoding="utf-8")
    (tmp_path / "run" / "losses.npz").write_bytes(b"PK")
    with pytest.raises(lp.CheckpointError, match=r"losses\.npz is not as it was written"):
        lp.load(tmp_path / "run")


KILLED = """
import os, signal, sys
import lowrank_probe as lp
from logs import kept

base, tuned, text, out = sys.argv[1:]

def die(what, done, total):
    if len(kept(out, "state-")) >= 7:
        os.kill(os.getpid(), signal.SIGKILL)

lp.evaluate(base, tuned, text, out=out, ranks=[0, 1, 4, "full"], length=32, sequences=8, device="cpu", on_progress=die)
"""


def test_a_killed_run_goes_on_and_gives_the_same_files(trained, text, tmp_path, monkeypatch):
    asked = FAST | {"ranks": [0, 1, 4, "full"]}
    lp.evaluate(*trained, text, out=tmp_path / "a", **asked)
    command = [sys.executable, "-c", KILLED, *map(str, (*trained, text, tmp_path / "b"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    there = sorted(kept(tmp_path / "b"))
    assert there == ["base", *(f"state-{i:05d}" for i in range(7)), "tuned"]
    with pytest.raises(lp.OutputError, match=r"unfinished work of another run \(options.ranks"):
        lp.evaluate(*trained, text, out=tmp_path / "b", **asked | {"ranks": [0, 1]})
    scored = []
    score = scoring.Scorer.score
    monkeypatch.setattr(
        scoring.Scorer, "score", lambda self, model, name: (scored.append(name), score(self, model, name))[1]
    )
    found = lp.evaluate(*trained, text, out=tmp_path / "b", **asked)
    assert scored[0] == "state-00007"
    assert len(scored) == found.facts["n_states"] - len(there)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}
    assert ".unfinished" not in names
    for name in ("table.csv", "table.parquet", "functional.csv", "losses.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    with pytest.raises(lp.OutputError, match="already holds a finished run"):
        lp.evaluate(*trained, text, out=tmp_path / "b", **asked)


def _fails(error, words, *arguments, **options):
    with pytest.raises(error, match=words) as caught:
        lp.evaluate(*arguments, **FAST | {"ranks": [0]} | options)
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_clear_line(trained, text, tmp_path):
    base, tuned = trained
    little = tmp_path / "little.txt"
    little.write_text("Only this.", encoding="utf-8")
    told = r"little\.txt: too little text: 1 document gives \d+ tokens and 0 sequences; expected at least 128 tokens"
    _fails(lp.ProbeError, told, base, tuned, little)
    _fails(lp.ProbeError, "--length 65: the model has 64 positions", base, tuned, text, length=65)
    _fails(lp.ProbeError, "has no tokenizer", base, base, text)
    _fails(lp.MatchError, r"--targets qq: matches no matrix that differs; there are the layer types embedding q k",
           base, tuned, text, groups=["qq"])  # fmt: skip
    _fails(lp.ProbeError, "expected whole numbers from 0 on", base, tuned, text, ranks=[-1])
    _fails(lp.ProbeError, "tolerance 'much'", base, tuned, text, tolerance="much")
    _fails(lp.ProbeError, "dtype 'int8'", base, tuned, text, dtype="int8")
    _fails(lp.ProbeError, "--held-out 0: would leave no document to judge", base, tuned, text, held_out=0.0)
    _fails(lp.ProbeError, "sequences=2: expected at least 4", base, tuned, text, sequences=2)
    _fails(lp.ProbeError, "models in memory come without a tokenizer", *moved(gpt2), text)
    _fails(lp.ProbeError, "one of each", base, moved(gpt2)[1], text)
    _fails(lp.ProbeError, "a state dict cannot be run", base, {"a": torch.zeros(2, 2)}, text)
    _fails(lp.UnchangedError, "do not differ in any matrix", tuned, tuned, text)
    assert not (tmp_path / "run").exists()


def test_other_shapes_and_missing_weights_are_one_clear_line(trained, text, tmp_path):
    wide = saved(tmp_path / "wide", *moved(lambda: llama(intermediate_size=64)))
    _fails(lp.MatchError, r"gate_proj\.weight: base is \(48, 32\), tuned is \(64, 32\)", trained[0], wide[1], text)
    other = saved(tmp_path / "other", *moved(gpt2))
    _fails(lp.CheckpointError, "GPT2LMHeadModel needs transformer", trained[0], other[1], text)


def test_out_of_memory_is_one_clear_line(trained, text, monkeypatch):
    def too_much(self, model, name):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(scoring.Scorer, "score", too_much)
    _fails(
        lp.ProbeError, "cpu: out of memory with 8 sequences of 32 tokens at once; use a smaller --batch", *trained, text
    )


def test_ranks_beyond_a_matrix_are_left_out_with_a_note(trained, text):
    found = lp.evaluate(*trained, text, ranks=[0, 64], groups=["q"], leave_out=False, **FAST)
    assert rows(found, "q")["rank"].tolist() == [0, 32]
    assert any(re.search(r"beyond the largest.*q \(32\)", note) for note in found.facts["notes"])


def test_bfloat16_says_what_its_noise_is(trained, text):
    found = lp.evaluate(*trained, text, ranks=[0, "full"], groups=["mlp"], leave_out=False, dtype="bfloat16", **FAST)
    exact = lp.evaluate(*trained, text, ranks=[0, "full"], groups=["mlp"], leave_out=False, **FAST)
    assert found.table["loss"].tolist() == pytest.approx(exact.table["loss"].tolist(), abs=0.03)
    assert found.table["loss"].tolist() != exact.table["loss"].tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [llama, mixtral, masked, t5, bare])
def test_a_gpu_gives_the_same_losses(make, tmp_path, text):
    sides = saved(tmp_path, *moved(make, scale=0.2))
    asked = {"ranks": [0, 2, "full"], "leave_out": False, **FAST}
    here, there = (lp.evaluate(*sides, text, **asked | {"device": device}) for device in ("cpu", "cuda"))
    assert there.facts["device"]["type"] == "cuda"
    assert there.table["loss"].tolist() == pytest.approx(here.table["loss"].tolist(), abs=1e-4)
    half = lp.evaluate(*sides, text, **asked | {"device": "cuda", "dtype": "bfloat16"})
    # bfloat16 has 8 bits: T5 without its 1/√d in attention is off by 1.5 % here.
    assert half.table["loss"].tolist() == pytest.approx(here.table["loss"].tolist(), rel=0.03, abs=0.05)
