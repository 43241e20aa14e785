"""`extract()` and `probe extract`: at the optimum as written, loaded by PEFT, resumable, honest about what is left."""

import json
import os
import shutil
import subprocess

import numpy as np
import pandas as pd
import peft
import pytest
import torch
import transformers
from logs import kept, killed_when
from pairs import llama_tensors, pair, planted, sides
from safetensors.torch import load_file, save_file
from test_cli import ENVIRONMENT, PROBE, fails, probe

from lowrank_probe.errors import CheckpointError, NumericsError, OutputError, ProbeError, UnchangedError
from lowrank_probe.extraction import extract
from lowrank_probe.options import Options
from lowrank_probe.rank_choice import RankChoice

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def decaying(tmp_path_factory):
    """(base, tuned) of an fp32 pair whose update decays: σ_i ∝ 1/i."""
    base = llama_tensors()
    tuned = {}
    for i, (name, W) in enumerate(base.items()):
        if W.ndim == 2:
            s = 1 / torch.arange(1, min(W.shape) + 1)
            D = planted(W.shape, s, 7 + i)
            tuned[name] = W + (0.05 * torch.linalg.norm(W) / torch.linalg.norm(D) * D).float()
        else:
            tuned[name] = W + 0.01
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return sides(tmp_path_factory.mktemp("decaying"), base, tuned, config)


def differences(base, tuned):
    a, b = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    return {name.removesuffix(".weight"): b[name].double() - a[name].double() for name in a if a[name].ndim == 2}


def written(directory):
    """module → B·A of an adapter's file, scaling 1 as its config says."""
    config = json.loads((directory / "adapter_config.json").read_text())
    factors = load_file(directory / "adapter_model.safetensors")
    products = {}
    for name, B in factors.items():
        if ".lora_B." not in name:
            continue
        module = name.removeprefix("base_model.model.").partition(".lora_B")[0]
        A = factors[name.replace("lora_B", "lora_A")]
        assert config["r"] == config["lora_alpha"] or config["alpha_pattern"]
        products[module] = B.double() @ A.double()
    return products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_at_the_optimum_and_the_ledger_says_its_error(decaying, tmp_path, dtype):
    found = extract(*decaying, tmp_path / "a", ranks=5, dtype=dtype)
    deltas, products = differences(*decaying), written(tmp_path / "a")
    rows = found.ledger.set_index("name")
    adapted = rows[rows["status"] == "adapted"]
    assert set(products) == set(adapted.index) == {f"model.layers.{i}.{m}" for i in range(2) for m in MODULES}
    for name, BA in products.items():
        norm = float(torch.linalg.norm(deltas[name]))
        error = float(torch.linalg.norm(deltas[name] - BA)) / norm
        sigma = torch.linalg.svdvals(deltas[name]).numpy()
        best = float(np.sqrt((sigma[5:] ** 2).sum())) / norm
        assert rows.loc[name, "relative_error"] == pytest.approx(error, abs=1e-7)
        assert (
            rows.loc[name, "optimal_error_low"]
            <= best * (1 + 1e-9)
            <= rows.loc[name, "optimal_error_high"] * (1 + 2e-9)
        )
        assert error <= np.sqrt((1.00005 * best) ** 2 + ({"float32": 1e-6, "bfloat16": 3e-3}[dtype]) ** 2)
        assert rows.loc[name, "energy"] == pytest.approx(1 - error**2, abs=1e-7)


def test_what_is_not_carried_is_told_with_its_share(decaying, tmp_path):
    found = extract(*decaying, tmp_path / "a", ranks=4)
    left = found.ledger[found.ledger["status"] == "not carried"].set_index("name")
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(left.index)
    a, b = (load_file(side / "model.safetensors") for side in decaying)
    squares = {name: float(((b[name].double() - a[name].double()) ** 2).sum()) for name in a}
    total = sum(squares.values())
    told = found.facts["adapters"][""]
    share = sum(squares[name] for name in left.index) / total
    assert told["not_carried"] == pytest.approx(share, rel=1e-6)
    assert left.loc["model.embed_tokens.weight", "share"] == pytest.approx(
        squares["model.embed_tokens.weight"] / total, rel=1e-6
    )
    assert told["carried"] + told["not_carried"] < 1
    assert found.ledger["share"].sum() == pytest.approx(1.0)


def test_several_ranks_come_from_one_factorisation(decaying, tmp_path):
    found = extract(*decaying, tmp_path / "many", ranks=[2, 6])
    assert list(found.adapters) == ["r2", "r6"]
    extract(*decaying, tmp_path / "one", ranks=2)
    for name, BA in written(tmp_path / "many" / "r2").items():
        assert torch.allclose(BA, written(tmp_path / "one")[name], atol=1e-6 * float(torch.linalg.norm(BA)))
    energies = found.ledger.groupby("adapter")["energy"].mean()
    assert energies["r6"] > energies["r2"]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["probe", "r2", "r6"]


def test_energy_takes_the_least_rank_of_every_matrix(decaying, tmp_path):
    found = extract(*decaying, tmp_path / "a", ranks=RankChoice(energy=0.8))
    for name, D in differences(*decaying).items():
        rows = found.ledger[found.ledger["name"] == name]
        if rows["status"].iloc[0:1].tolist() != ["adapted"]:
            continue
        square = torch.linalg.svdvals(D).numpy() ** 2
        least = int(np.searchsorted(np.cumsum(square) / square.sum(), 0.8)) + 1
        assert rows["rank"].item() == least
        assert rows["energy"].item() >= 0.8 - 1e-6


def test_a_budget_in_bytes_bounds_the_file(decaying, tmp_path):
    found = extract(*decaying, tmp_path / "a", ranks=RankChoice(budget={"budget_bytes": 30_000}))
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert 20_000 < size <= 30_000
    assert found.facts["adapters"][""]["n_bytes"] == size


def test_auto_finds_a_planted_rank(tmp_path):
    base, tuned = pair(tmp_path, dtype=torch.bfloat16, relative=0.05, rank=3)
    found = extract(base, tuned, tmp_path / "a", ranks=RankChoice(auto=True))
    adapted = found.ledger[found.ledger["status"] == "adapted"]
    assert set(adapted["rank"]) <= {2, 3}
    assert set(adapted["rule"]) <= {"signal_rank", "r90"}


def test_a_rank_beyond_the_shape_is_capped_and_said(decaying, tmp_path):
    found = extract(*decaying, tmp_path / "a", ranks=400)
    adapted = found.ledger[found.ledger["status"] == "adapted"]
    assert (adapted["rank"] == adapted[["rows", "cols"]].min(axis=1)).all()
    assert set(adapted["rule"]) == {"min(m, n)"}
    assert (adapted["relative_error"] < 1e-6).all()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_base_and_adapter_of_full_rank_are_the_fine_tune_through_peft(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", ranks=48)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert float((adapted(ids).logits - wanted).abs().max()) < 1e-4 * float((before - wanted).abs().max())
        merged = adapted.merge_and_unload()
        assert float((merged(ids).logits - wanted).abs().max()) < 1e-4 * float((before - wanted).abs().max())


def test_identical_models_give_no_adapter(decaying, tmp_path):
    with pytest.raises(UnchangedError, match="identical"):
        extract(decaying[0], decaying[0], tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_nan_names_the_tensor_and_leaves_nothing_that_looks_finished(tmp_path):
    base = llama_tensors()
    tuned = {name: W.clone() for name, W in base.items()}
    tuned["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    tuned["model.layers.0.mlp.up_proj.weight"] += 1
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*contains 1 NaN"):
        extract(*sides(tmp_path, base, tuned, {"model_type": "llama"}), tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    # What was finished holds where the damaged matrix is left out.
    found = extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "a", options=Options(exclude=["model.layers.1.mlp.up_proj"])
    )
    assert found.ledger.set_index("name").loc["model.layers.0.mlp.up_proj", "status"] == "adapted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "rank is 0, expected at least 1"),
        ({"ranks": [4, 4]}, "one is given twice"),
        ({"dtype": "int8"}, "dtype 'int8': expected one of float32, bfloat16, float16"),
        ({"ranks": RankChoice(energy=0.9), "servable": True}, "--servable makes an adapter of one rank"),
        ({"targets": ["nowhere"]}, "nowhere"),
    ],
)
def test_bad_options_are_named(decaying, tmp_path, options, message):
    with pytest.raises(ProbeError) as caught:
        extract(*decaying, tmp_path / "a", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_rules_exclude_each_other():
    with pytest.raises(ProbeError, match="give one"):
        RankChoice(ranks=(4,), energy=0.9)
    with pytest.raises(ProbeError, match="give one"):
        RankChoice()


def test_an_adapter_is_no_fine_tune(decaying, tmp_path):
    extract(*decaying, tmp_path / "a", ranks=2)
    with pytest.raises(ProbeError, match="is an adapter already; probe resize"):
        extract(decaying[0], tmp_path / "a", tmp_path / "b")


def test_an_output_that_holds_something_is_refused(decaying, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="is not empty"):
        extract(*decaying, tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.txt"]


# The command.


def test_the_command_prints_and_writes(decaying, tmp_path):
    stdout, stderr = probe("extract", *decaying, "--rank", "4", "--out", tmp_path / "a")
    assert "base + adapter carries" in stdout
    assert "not carried: model.embed_tokens.weight" in stdout
    assert stderr.startswith("warning: --targets all-linear leaves out 40 % of ‖ΔW‖²")
    rows = pd.read_csv(tmp_path / "a" / "probe" / "ledger.csv")
    assert (rows["status"] == "adapted").sum() == 8
    told, _ = probe("extract", *decaying, "--rank", "2,4", "--out", tmp_path / "b", "--json")
    payload = json.loads(told)
    assert payload["schema_version"] == 1
    assert sorted(payload["facts"]["adapters"]) == ["r2", "r4"]


@pytest.mark.slow
def test_the_command_fails_in_one_line(decaying, tmp_path):
    fails("extract", decaying[0], decaying[0], "--out", tmp_path / "a", words=["identical"], code=3)
    assert "rank is 0" in probe("extract", *decaying, "--rank", "0", "--out", tmp_path / "a", code=2)[1]
    two = "--rank", "4", "--energy", "0.9"
    assert "give one" in probe("extract", *decaying, *two, "--out", tmp_path / "a", code=2)[1]
    assert "not understood" in probe("extract", *decaying, "--budget", "much", "--out", tmp_path / "a", code=2)[1]
    fails("extract", *decaying, "--targets", "nowhere", "--out", tmp_path / "a", words=["nowhere", "q"])
    fails("extract", *decaying, "--budget", "10", "--out", tmp_path / "a", words=["too small"])
    assert "expected a rank" in probe("extract", *decaying, "--rank", "x", "--out", tmp_path / "a", code=2)[1]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_files(decaying, tmp_path):
    probe("extract", *decaying, "--rank", "3", "--out", tmp_path / "whole")
    command = [PROBE, "extract", *map(str, decaying), "--rank", "3", "--out", str(tmp_path / "killed")]
    for _ in range(20):
        killed_when(command, lambda: len(kept(tmp_path / "killed", "factors-")) >= 2, ENVIRONMENT)
        if kept(tmp_path / "killed"):
            break
        shutil.rmtree(tmp_path / "killed")
    else:
        pytest.fail("was never killed in the middle")
    assert not (tmp_path / "killed" / "adapter_config.json").exists()
    n_kept = len(kept(tmp_path / "killed"))
    # Killed once more, while the finished adapter was put in place.
    (tmp_path / "killed" / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / "killed" / "adapter_config.json").write_text("{}")
    fails(
        "extract",
        *decaying,
        "--dtype",
        "bfloat16",
        "--out",
        tmp_path / "killed",
        words=["unfinished work of another run (dtype: float32 there, bfloat16 here)"],
    )
    _, stderr = probe("extract", *decaying, "--rank", "3", "--out", tmp_path / "killed")
    assert f"resumed the interrupted run in {tmp_path / 'killed'}: {n_kept} matrices were finished" in stderr
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed" / ".unfinished").exists()


def test_a_missing_side_is_one_line(decaying, tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        extract(decaying[0], tmp_path / "nothing", tmp_path / "a")


def test_a_model_in_memory_never_takes_over_earlier_work(tmp_path):
    base = llama_tensors()
    tuned = {name: W + 0.01 * torch.randn_like(W) for name, W in base.items()}
    damaged = tuned | {"model.layers.1.mlp.up_proj.weight": torch.full((96, 48), float("nan"))}
    with pytest.raises(NumericsError):
        extract(base, damaged, tmp_path / "a", ranks=4)
    with pytest.raises(OutputError, match="unfinished work"):
        extract(base, tuned, tmp_path / "a", ranks=4)


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("swapped", [False, True])
def test_a_tensor_of_another_shape_is_told_with_its_norm(tmp_path, swapped):
    base = llama_tensors()
    name = "model.layers.1.self_attn.q_proj.weight"
    cut = {key: W + 0.01 for key, W in base.items()} | {name: base[name][:, :40]}
    one, other = (cut, base) if swapped else (base, cut)
    paths = sides(tmp_path, one, other, LLAMA)
    found = extract(*paths, tmp_path / "a", ranks=2)
    line = found.ledger.set_index("name").loc[name]
    assert line["note"].startswith("not in --targets; of another shape than in the base")
    assert line["fro_norm"] == pytest.approx(float(torch.linalg.norm(other[name].double())))
    whole = extract(*paths, tmp_path / "b", ranks=2, targets=["everything"]).ledger.set_index("name")
    # A model is built by the base's config: what is saved in another shape could not be loaded into it.
    assert whole.loc[name, "status"] == "not carried"
    assert "of another shape than in the base" in whole.loc[name, "note"]
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text(encoding="utf-8"))
    assert not any("q_proj" in module for module in config.get("modules_to_save") or ())


def test_tensors_of_one_side_only_are_told(decaying, tmp_path):
    tensors = [load_file(side / "model.safetensors") for side in decaying]
    gone = "model.layers.1.self_attn.q_proj.weight"
    del tensors[1][gone]
    found = extract(*sides(tmp_path, *tensors, LLAMA), tmp_path / "a", ranks=2)
    assert found.ledger.set_index("name").loc[gone, "status"] == "only in base"
    assert f"{gone} is only in the base: an adapter cannot take it away" in found.facts["notes"]
    back = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "b", ranks=2, targets=["everything"])
    assert any("carried whole, and all of it counts as update" in note for note in back.facts["notes"])


def test_only_a_grown_table_is_no_identical_model(tmp_path):
    base = llama_tensors()
    table = torch.cat([base["model.embed_tokens.weight"], torch.ones(3, 48)])
    paths = sides(tmp_path, base, base | {"model.embed_tokens.weight": table}, LLAMA)
    with pytest.raises(ProbeError, match="no matrix to adapt"):
        extract(*paths, tmp_path / "a")


def test_a_budget_in_bytes_pays_for_what_is_carried_whole(decaying, tmp_path):
    found = extract(
        *decaying, tmp_path / "a", ranks=RankChoice(budget={"budget_bytes": 40_000}), targets=["everything"]
    )
    assert 20_000 < (tmp_path / "a" / "adapter_model.safetensors").stat().st_size <= 40_000
    assert (found.ledger["status"] == "carried whole").any()


def test_a_servable_adapter_has_one_rank(decaying, tmp_path):
    found = extract(*decaying, tmp_path / "a", ranks=40, servable=True)
    assert set(found.ledger[found.ledger["status"] == "adapted"]["rank"]) == {32}  # k_proj is (32, 48)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"] == {}
    assert any("32 instead of 40" in note for note in found.facts["notes"])


def test_a_refused_budget_keeps_the_spectra_and_says_so(decaying, tmp_path):
    with pytest.raises(ProbeError, match=r"too small.*kept in .*\.unfinished"):
        extract(*decaying, tmp_path / "a", ranks=RankChoice(budget={"parameters": 10}))
    extract(*decaying, tmp_path / "a", ranks=RankChoice(budget={"parameters": 5_000}))
    assert not (tmp_path / "a" / ".unfinished").exists()


def test_a_smaller_rank_takes_over_what_a_larger_one_finished(decaying, tmp_path):
    with pytest.raises(ProbeError, match="too small"):  # leaves its work
        extract(*decaying, tmp_path / "a", ranks=RankChoice(budget={"parameters": 10}))
    extract(*decaying, tmp_path / "a", ranks=[2, 4])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["probe", "r2", "r4"]


def test_auto_by_its_name_and_no_other_word(tmp_path):
    base, tuned = pair(tmp_path, dtype=torch.bfloat16, relative=0.05, rank=3)
    extract(base, tuned, tmp_path / "a", ranks="auto")
    with pytest.raises(ProbeError, match='expected a rank, several, "auto"'):
        extract(base, tuned, tmp_path / "b", ranks="many")


def test_an_output_where_another_process_works_is_refused(decaying, tmp_path):
    other = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(ProbeError, match="too small"):
            extract(*decaying, tmp_path / "a", ranks=RankChoice(budget={"parameters": 10}))
        (tmp_path / "a" / ".unfinished" / "owner").write_text(f"{os.uname().nodename} {other.pid}")
        with pytest.raises(OutputError, match=f"process {other.pid} is at work there"):
            extract(*decaying, tmp_path / "a")
    finally:
        other.kill()
        other.wait()
    extract(*decaying, tmp_path / "a", ranks=2)


def test_a_nan_that_is_not_carried_is_told(decaying, tmp_path):
    tensors = {side: load_file(directory / "model.safetensors") for side, directory in zip("bt", decaying, strict=True)}
    tensors["t"]["model.norm.weight"][3] = float("nan")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    found = extract(*sides(tmp_path, tensors["b"], tensors["t"], config), tmp_path / "a", ranks=2)
    assert found.ledger.set_index("name").loc["model.norm.weight", "note"].endswith("NaN or Inf in it")


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_whose_name_is_no_text_is_refused_and_a_link_to_it_is_taken(decaying, tmp_path, side):
    odd, link = tmp_path / os.fsdecode(b"odd\xff"), tmp_path / "link"
    shutil.copytree(decaying[side], odd)
    link.symlink_to(odd)
    named, linked = list(decaying), list(decaying)
    named[side], linked[side] = odd, link
    with pytest.raises(OutputError, match=r"odd\\xff: its name is not UTF-8"):
        extract(*named, tmp_path / "a", ranks=2)
    assert not (tmp_path / "a").exists()
    assert extract(*linked, tmp_path / "b", ranks=2).directory == tmp_path / "b"


def test_a_tensor_that_the_base_lacks_is_told_with_its_norm(decaying, tmp_path):
    base, tuned = decaying
    head = torch.full((3, 48), 0.5)
    shutil.copytree(tuned, tmp_path / "tuned")
    save_file(
        {**load_file(tuned / "model.safetensors"), "score.weight": head}, tmp_path / "tuned" / "model.safetensors"
    )
    found = extract(base, tmp_path / "tuned", tmp_path / "a", ranks=2)
    line = found.ledger.set_index("name").loc["score.weight"]
    assert (line["status"], line["fro_norm"]) == ("not carried", pytest.approx(6.0))


@pytest.mark.parametrize("ranks", [np.int64(2), [np.int64(2)], (2,)], ids=repr)
def test_whole_numbers_of_any_kind_are_ranks(decaying, tmp_path, ranks):
    found = extract(*decaying, tmp_path / "a", ranks=ranks)
    assert set(found.ledger.query("status == 'adapted'")["rank"]) == {2}


@pytest.mark.parametrize("ranks", [4.0, [2, "4"], None], ids=repr)
def test_what_is_no_rank_is_named(decaying, tmp_path, ranks):
    with pytest.raises(ProbeError, match="expected a rank, several"):
        extract(*decaying, tmp_path / "a", ranks=ranks)


def test_the_largest_rank_is_a_multiple_too(decaying, tmp_path):
    choice = RankChoice(budget={"parameters": 10**6}, rank_multiple=8, max_rank=12)
    found = extract(*decaying, tmp_path / "a", ranks=choice)
    assert set(found.ledger.query("status == 'adapted'")["rank"]) == {8}
    with pytest.raises(ProbeError, match="max_rank 4 is less than rank_multiple 8"):
        RankChoice(ranks=(16,), rank_multiple=8, max_rank=4)


def test_an_inf_that_is_not_carried_has_an_unknown_share(decaying, tmp_path):
    tensors = {side: load_file(directory / "model.safetensors") for side, directory in zip("bt", decaying, strict=True)}
    tensors["t"]["model.norm.weight"][3] = float("inf")
    paths = sides(tmp_path, tensors["b"], tensors["t"], LLAMA)
    stdout, _ = probe("extract", *map(str, paths), "--rank", "2", "--out", str(tmp_path / "a"))
    assert "model.norm.weight: – of ‖ΔW‖²" in " ".join(stdout.split())


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
def test_state_dicts_of_a_tied_model_merge_as_they_wear(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base, tuned = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    extract(base.state_dict(), tuned.state_dict(), tmp_path / "a", ranks=100, targets=["everything"])
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        worn = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
        torch.testing.assert_close(worn(ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(worn.merge_and_unload()(ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_budget_may_be_text():
    assert RankChoice(budget="10K") == RankChoice(budget={"parameters": 10_000})
    with pytest.raises(ProbeError, match="is not understood"):
        RankChoice(budget="10X")
