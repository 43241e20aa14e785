"""Activation-aware extraction of models trained on real text: better on held-out text, never worse where it chose."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
import transformers as hf
from logs import heads, kept
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_cli import fails, probe
from test_verification import IDS, tokenizer

from lowrank_probe.calibration import Calibration
from lowrank_probe.calibration_text import AT_LEAST, PARTS, read_calibration
from lowrank_probe.demo_text import read_code, read_prose
from lowrank_probe.errors import ProbeError
from lowrank_probe.extraction import extract
from lowrank_probe.rank_choice import RankChoice

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
LENGTH = 64
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip


def blocks(words, texts):
    ids = [token for text in texts for token in words(text)["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def fit(model, rows, steps, lr, generator, words=""):
    """A few steps of AdamW, of all or the matrices named so; masked tokens for an encoder, the next for a decoder."""
    learned = [one for name, one in model.named_parameters() if not words or (words in name and one.ndim == 2)]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
    masked = isinstance(model, hf.BertForMaskedLM)
    model.train()
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (16,), generator=generator)]
        labels = ids.clone()
        if masked:
            hidden = torch.rand(ids.shape, generator=generator) < 0.2
            labels[~hidden] = -100
            ids = ids.masked_fill(hidden, 1)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of prose, one paragraph a document, that no fine-tune has seen."""
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("\n\n".join(read_prose(250_000)[12:])[:60_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module", params=["llama", "bert"])
def trained(request, tmp_path_factory):
    """(base, tuned): trained on code, then on prose, with a tokenizer."""
    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    words, generator = tokenizer(), torch.Generator().manual_seed(0)
    if request.param == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **IDS, tie_word_embeddings=False))
    else:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = hf.BertForMaskedLM(hf.BertConfig(**SIZES, **dropout, pad_token_id=1))
    code = read_code(200_000)
    random.Random(0).shuffle(code)
    fit(model, blocks(words, [one[:20_000] for one in code]), 120, 3e-3, generator)
    model.save_pretrained(directory / "base")
    fit(model, blocks(words, read_prose(250_000)[:12]), 40, 1e-3, generator, "layer")
    model.save_pretrained(directory / "tuned")
    words.save_pretrained(directory / "tuned")
    return directory / "base", directory / "tuned"


def by_way(found, label):
    """(weighted by, ridge) → line of what was tried for one adapter."""
    told = found.facts["calibration"]["tried"]
    return {(one["weighted_by"], one["ridge"]): one for one in told if one["adapter"] == label}


@pytest.mark.slow
def test_better_than_plain_on_text_that_decided_nothing(trained, text, tmp_path):
    found = extract(*trained, tmp_path / "a", ranks=[4, 8, 16], calibration=Calibration(text))
    for label in ("r4", "r8", "r16"):
        ways = by_way(found, label)
        (chosen,) = [one for one in ways.values() if one["chosen"]]
        plain = ways["plain SVD", "inf"]
        sure = [one for one in ways.values() if one["choice_high"] < 0]
        assert chosen["choice"] == min(one["choice"] for one in sure) < plain["choice"]
        assert chosen["weighted_by"] != "plain SVD"
        assert chosen["report"] < 0.97 * plain["report"]
        assert chosen["report_low"] < chosen["report"] - plain["report"] < chosen["report_high"] < 0
        assert len(ways) == 8
    told = found.facts["calibration"]
    assert told["plain"] == []
    assert told["stays_tuned"] == []
    assert all(told["n_tokens"][part] >= AT_LEAST[part] for part in PARTS)
    rows = found.ledger[found.ledger["status"] == "adapted"]
    assert (rows["weighted_error"] <= rows["weighted_optimal_error"] * 1.001 + 1e-5).all()
    assert (rows["weighted_error"] >= rows["weighted_optimal_error"] * (1 - 1e-6) - 1e-6).all()
    # The plain optimum is of ‖ΔW − BA‖, which the weighted factors do not reach.
    assert (rows["relative_error"] > rows["optimal_error_low"]).all()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["probe", "r16", "r4", "r8"]


@pytest.mark.slow
def test_the_reported_distance_is_that_of_the_adapter_through_peft(trained, text, tmp_path):
    found = extract(*trained, tmp_path / "a", ranks=2, calibration=Calibration(text))
    (chosen,) = [one for one in found.facts["calibration"]["tried"] if one["chosen"]]
    parts = read_calibration(text, trained[::-1], 300, 126)  # as positions may count from 2
    load = hf.LlamaForCausalLM if "llama" in str(trained[0]) else hf.BertForMaskedLM
    tuned, base = (load.from_pretrained(side, dtype=torch.float32).eval() for side in trained[::-1])

    def distance(model, part):
        kl, rows = 0.0, 0
        with torch.no_grad():
            for ids in parts.sequences[part]:
                p, q = (one(input_ids=ids[None]).logits[0].double().log_softmax(-1) for one in (tuned, model))
                kl, rows = kl + float((p.exp() * (p - q)).sum()), rows + len(ids)
        return kl / rows

    assert distance(base, "report") == pytest.approx(found.facts["calibration"]["base"]["report"], rel=1e-3)
    adapted = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    for part in PARTS[1:]:
        assert distance(adapted, part) == pytest.approx(chosen[part], rel=1e-2)


@pytest.mark.slow
def test_a_budget_goes_by_weighted_energies(trained, text, tmp_path):
    choice = RankChoice(budget={"parameters": 20_000})
    found = extract(*trained, tmp_path / "a", ranks=choice, calibration=Calibration(text))
    told = found.facts["adapters"][""]
    assert 18_000 < told["n_parameters"] <= 20_000
    ways = by_way(found, "")
    (chosen,) = [one for one in ways.values() if one["chosen"]]
    assert chosen["weighted_by"] != "plain SVD"
    plain = extract(*trained, tmp_path / "b", ranks=choice)
    ranks = [one.ledger.set_index("name").query("status == 'adapted'")["rank"] for one in (found, plain)]
    assert not ranks[0].equals(ranks[1])
    assert chosen["report"] < ways["plain SVD", "inf"]["report"]


@pytest.mark.slow
def test_a_matrix_without_a_rank_by_its_plain_energy_gets_one_by_what_it_does(trained, text, tmp_path):
    base, tuned = trained
    shutil.copytree(tuned, tmp_path / "tuned")
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    name = next(key for key in after if key.endswith(("layers.1.mlp.down_proj.weight", "1.output.dense.weight")))
    small = {name: before[name] + 0.05 * (after[name] - before[name])}  # of the plain budget it gets nothing
    loud = next(key for key in after if key.endswith(("layers.1.mlp.up_proj.weight", "1.intermediate.dense.weight")))
    after |= small | {loud: after[loud] * 30}  # its inputs are large
    save_file(after, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    choice = RankChoice(budget={"parameters": 6_000})
    found = extract(base, tmp_path / "tuned", tmp_path / "a", ranks=choice, calibration=Calibration(text))
    plain = extract(base, tmp_path / "tuned", tmp_path / "b", ranks=choice)
    rows, others = (one.ledger[one.ledger["kind"] != ""].set_index("name") for one in (found, plain))
    (chosen,) = [one for one in found.facts["calibration"]["tried"] if one["chosen"]]
    assert chosen["weighted_by"] != "plain SVD"
    assert ((others["rank"] == 0) & (rows["rank"] > 0)).any()
    adapted = rows[rows["status"] == "adapted"]
    for end in ("low", "high"):
        assert adapted[f"optimal_error_{end}"].notna().all()
    assert (adapted["optimal_error_low"] <= adapted["optimal_error_high"]).all()
    assert (adapted["optimal_error_high"] <= adapted["relative_error"] + 1e-6).all()
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for target, rank in adapted["rank"].items():
        assert weights[f"base_model.model.{target}.lora_A.weight"].shape[0] == rank
        delta = after[f"{target}.weight"].double() - before[f"{target}.weight"].double()
        s = torch.linalg.svdvals(delta)
        optimum = float(s[rank:].norm() / s.norm())
        assert rows.loc[target, "optimal_error_high"] == pytest.approx(optimum, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_experts_that_no_token_meets_take_part_and_say_so(text, tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 16, "num_key_value_heads": 1}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **IDS, num_local_experts=4, num_experts_per_tok=1))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :3] *= 30  # so that the inputs' directions matter
        for name, W in model.named_parameters():
            if name.endswith("gate.weight"):  # one of the first two is always above 0
                W[1], W[2:] = -W[0], 0.0
        model.save_pretrained(tmp_path / "base")
        for name, W in model.named_parameters():
            if "experts" in name:
                changed = W[3:] if "layers.0." in name else W[1:]  # of layer 0 what no token meets alone
                changed += 0.02 * torch.randn(changed.shape)
            elif "_proj" in name:
                W += 0.02 * torch.randn(W.shape)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer().save_pretrained(tmp_path / "tuned")
    found = extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "a", targets=["everything"],
        ranks=RankChoice(budget={"parameters": 16_000}), calibration=Calibration(text, ((False, 1e-3), (True, 0.1))),
    )  # fmt: skip
    (chosen,) = [one for one in found.facts["calibration"]["tried"] if one["chosen"]]
    assert chosen["weighted_by"] != "plain SVD"
    rows = found.ledger[found.ledger["kind"] == "parameter"].set_index("name")
    alone, beside = (rows.loc[f"model.layers.{layer}.mlp.experts.gate_up_proj"] for layer in (0, 1))
    assert alone["note"] == "plain SVD for expert 3: no token of the calibration text was routed there"
    assert beside["note"] == "plain SVD for 2 of 4 experts: no token of the calibration text was routed there"
    assert alone["rule"] == "budget"
    assert 1 <= alone["rank"] < beside["rank"]
    assert alone["relative_error"] == pytest.approx(alone["optimal_error_high"], rel=1e-4)
    assert "model.layers.0.mlp.experts.gate_up_proj" in found.facts["calibration"]["plain"]


@pytest.mark.slow
def test_a_frozen_matrix_beside_an_energy(trained, text, tmp_path):
    base, tuned = trained
    shutil.copytree(tuned, tmp_path / "tuned")
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    name = next(key for key in after if key.endswith(("q_proj.weight", "query.weight")))
    save_file(after | {name: before[name]}, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    found = extract(
        base, tmp_path / "tuned", tmp_path / "a", ranks=RankChoice(energy=0.5), calibration=Calibration(text)
    )
    status = found.ledger.set_index("name")["status"]
    assert status[name.removesuffix(".weight")] == "unchanged"
    assert (status == "adapted").sum() > 3


def test_what_a_killed_run_has_finished_is_taken(trained, text, tmp_path, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowrank_probe.calibration.compare", stop)
    with pytest.raises(KeyboardInterrupt):
        extract(*trained, tmp_path / "a", ranks=4, calibration=Calibration(text))
    before = heads(tmp_path / "a")
    assert kept(tmp_path / "a", "moments-")
    monkeypatch.undo()

    def look(*args, **more):
        assert heads(tmp_path / "a") == before
        raise KeyboardInterrupt

    monkeypatch.setattr("lowrank_probe.calibration.compare", look)
    with pytest.raises(KeyboardInterrupt):
        extract(*trained, tmp_path / "a", ranks=4, calibration=Calibration(text))


KILLED = """
import os, signal, sys
from logs import kept
from lowrank_probe.calibration import Calibration
from lowrank_probe.extraction import extract

base, tuned, out, text = sys.argv[1:]

def die(what, done, total):
    if what == "second moments" and len(kept(out, "moments-")) >= 4:
        os.kill(os.getpid(), signal.SIGKILL)

extract(base, tuned, out, ranks=4, calibration=Calibration(text, ((True, 1.0),), limit_bytes=400_000), on_progress=die)
"""


@pytest.mark.slow
def test_a_run_killed_between_two_passes_ends_in_the_same_files(trained, text, tmp_path):
    asked = {"ranks": 4, "calibration": Calibration(text, ((True, 1.0),), limit_bytes=400_000)}
    whole = extract(*trained, tmp_path / "a", **asked)
    command = [sys.executable, "-c", KILLED, *trained, tmp_path / "b", text]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    n_left = len(kept(tmp_path / "b", "moments-"))
    again = extract(*trained, tmp_path / "b", **asked)
    assert 4 <= n_left < len(again.ledger[again.ledger["status"] == "adapted"])
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    assert whole.facts["calibration"] == again.facts["calibration"]
    pd.testing.assert_frame_equal(whole.ledger, again.ledger)


# The text.


def test_parts_are_alike_and_a_long_document_is_one_of_many(trained, tmp_path):
    file = tmp_path / "a.jsonl"
    generator = random.Random(0)
    documents = [f"{i} " + "some words " * int(30 * 2 ** generator.uniform(0, 6)) for i in range(96)]
    documents.append("a long book of many words " * 20_000)
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    found = read_calibration(file, [trained[1]], 300, 128)
    assert [found.n_documents(part) for part in PARTS] == [49, 24, 24]
    for part in PARTS[1:]:
        counts = [0] * 24
        for number, ids in zip(found.documents[part], found.sequences[part], strict=True):
            counts[number] += len(ids)
        assert max(counts) <= 0.15 * found.n_tokens(part)
    # Those that end at their limit have equally many; the others would by the lengths of their documents.
    assert found.n_tokens("choice") == pytest.approx(found.n_tokens("report"), rel=0.1)


def test_no_document_is_in_two_parts_and_parts_end_at_their_limit(trained, tmp_path):
    file = tmp_path / "a.jsonl"
    documents = [f"{i} " + "word and other words " * 30 for i in range(900)]
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents * 2), encoding="utf-8")
    found = read_calibration(file, [trained[1]], 300, 128)
    words = hf.AutoTokenizer.from_pretrained(trained[1])
    starts = {part: {words.decode(ids).split()[0] for ids in found.sequences[part]} for part in PARTS}
    numbers = [{one for one in starts[part] if one.isdigit()} for part in PARTS]
    assert all(numbers)
    assert not numbers[1] & (numbers[0] | numbers[2])
    assert not numbers[0] & numbers[2]
    assert 32768 <= found.n_tokens("moments") < 32768 + 128
    assert all(len(ids) <= 128 for part in PARTS for ids in found.sequences[part])
    again = read_calibration(file, [trained[1]], 300, 128)
    assert again.word == found.word
    assert read_calibration(file, [trained[1]], 300, 64).word != found.word


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (
            ["too short"] * 30,
            r"1 documents .* expected at least 2048, 256, 256, .* in 24 documents; give it in more .*",
        ),
        (
            [f"{i} " + "some more words here, " * 400 for i in range(23)],
            r"23 documents .* in 24 documents; give it in more documents",
        ),
        ([f"{i} some words here" for i in range(60)], r"60 documents .* give about \d+ times as much"),
    ],
)
def test_too_little_text_says_how_much_is_needed(trained, tmp_path, documents, message):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(documents), encoding="utf-8")
    with pytest.raises(ProbeError, match=f"too little text: {message}"):
        extract(*trained, tmp_path / "a", calibration=Calibration(file))
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_run_is_said_before_any_work(trained, text, tmp_path):
    with pytest.raises(ProbeError, match=r"--calibration needs a tokenizer; found none in .*base"):
        read_calibration(text, [trained[0]], 300, 128)
    config = json.loads((trained[1] / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((trained[1] / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Nothing"]}))
    with pytest.raises(ProbeError, match=r"--calibration runs the fine-tune, which transformers cannot: .*Nothing"):
        extract(trained[0], tmp_path, tmp_path / "a", calibration=Calibration(text))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("ways", [(), ((False, 0.0),), ((False, 1e-4),), ((True, math.inf),)])
def test_ridges_are_finite_and_positive(ways):
    with pytest.raises(ProbeError, match="expected \\(two-sided, ridge\\)"):
        Calibration("text.txt", ways=ways)


@pytest.mark.slow
def test_the_command(trained, text, tmp_path):
    stdout, _ = probe("extract", *trained, "--rank", "8", "--calibration", text, "--out", tmp_path / "a")
    lines = [line.split() for line in stdout.splitlines()]
    assert sum("chosen" in line for line in lines) == 1
    assert any(line[:2] == ["plain", "SVD"] for line in lines)
    assert "KL(tuned ‖ base + adapter), nats a row" in stdout
    fails(
        "extract", *trained, "--calibration", tmp_path / "none.txt", "--out", tmp_path / "b", words=["none.txt"]
    )  # fmt: skip
