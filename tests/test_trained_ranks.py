"""Trained evidence and the verdict, on losses whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from pairs import add_update, llama_tensors, write

import lowrank_probe as lp
from lowrank_probe.functional_ranks import Tolerance
from lowrank_probe.hypothesis import judge, recommend
from lowrank_probe.trained_ranks import equal_parameters, trained_ranks, yardstick

RANKS = (1, 2, 4, 8, 16)
N = 40


def made(excess, seeds=(0, 1), groups=("mlp",), noise=1e-3, gain=1.0):
    """(runs, losses, weights, base): LoRA of rank r is excess(group, r) above full on every sequence, with noise."""
    generator = np.random.default_rng(0)
    weights = generator.integers(50, 100, N).astype(float)
    text = generator.normal(3.0, 0.5, N)  # how hard a sequence is: the same for all
    rows, losses = [], {}
    for seed in seeds:
        losses[f"full-s{seed}"] = text + generator.normal(0, noise, N)
        rows.append(("full", 0, "", seed, f"full-s{seed}", 1e-4, np.nan, 10_000))
        for group in groups:
            for rank in RANKS:
                label = f"lora-r{rank}-{group}-s{seed}"
                losses[label] = text + excess(group, rank) + generator.normal(0, noise, N)
                rows.append(("lora", rank, group, seed, label, 1e-3, 32.0, 100 * rank * (1 + (group == "attention"))))
    runs = pd.DataFrame(rows, columns=["method", "rank", "targets", "seed", "label", "lr", "alpha", "n_trained"])
    runs["diverged"] = False
    runs["loss"] = [float(np.average(losses[label], weights=weights)) for label in runs["label"]]
    return runs, losses, weights, text + gain


def test_the_sufficient_rank_is_found_with_its_interval():
    runs, losses, weights, base = made(lambda _, rank: 0.4 if rank < 4 else 0.01)
    (found,) = trained_ranks(runs, losses, weights, base, Tolerance(share=0.05))
    assert (found.sufficient.rank, found.sufficient.low, found.sufficient.high) == (4, 3, 4)
    assert found.full.tolerance == pytest.approx(0.05, abs=0.002)
    assert found.full.outcome == "gained"
    assert np.allclose(found.excess, [0.4, 0.4, 0.01, 0.01, 0.01], atol=1e-3)
    assert (found.low <= found.excess).all()
    assert (found.excess <= found.high).all()
    assert found.levelled_off
    assert found.own.rank == 4


def test_sequences_are_paired_so_that_hard_text_does_not_widen_the_interval():
    runs, losses, weights, base = made(lambda _, rank: 0.1)
    (found,) = trained_ranks(runs, losses, weights, base, Tolerance(0.2))
    assert (found.high - found.low < 0.002).all()


def test_seeds_that_disagree_widen_the_interval():
    runs, losses, weights, base = made(lambda _, rank: 0.0)
    losses["lora-r4-mlp-s1"] = losses["lora-r4-mlp-s1"] + 0.2
    (found,) = trained_ranks(runs, losses, weights, base, Tolerance(0.15))
    assert found.sufficient.rank == 1
    assert (found.sufficient.low, found.sufficient.high) == (1, 8)
    assert found.spread[RANKS.index(4)] == pytest.approx(0.2 / np.sqrt(2), rel=0.05)


def diverge(runs, losses, *labels):
    """As a training leaves runs that diverged."""
    for label in labels:
        losses[label] = np.full(N, np.nan)
    at = runs["label"].isin(labels)
    return runs.assign(diverged=at, loss=runs["loss"].mask(at))


def test_a_rank_that_diverged_says_nothing_of_others():
    runs, losses, weights, base = made(lambda _, rank: 0.4 if rank < 4 else 0.01)
    runs = diverge(runs, losses, "lora-r16-mlp-s0")
    (found,) = trained_ranks(runs, losses, weights, base, Tolerance(share=0.05))
    assert found.ranks == (1, 2, 4, 8)
    assert found.failed == {16: "diverged"}
    assert found.sufficient.rank == 4
    row = judge(spectrum(), None, [found]).iloc[0]
    assert (row["verdict"], row["trained_largest"]) == ("low-rank at r=4", 8)
    assert "r=16 diverged" in row["evidence"]


@pytest.mark.parametrize(("excess", "missing"), [(0.0, "a LoRA run that did not diverge"),
                                                 (2.0, "a LoRA run that gains on this text")])  # fmt: skip
def test_where_every_adapter_failed_there_is_no_trained_evidence(excess, missing):
    runs, losses, weights, base = made(lambda _, rank: excess)
    if not excess:
        runs = diverge(runs, losses, *[label for label in losses if label.startswith("lora") and label.endswith("s1")])
    (found,) = trained_ranks(runs, losses, weights, base, Tolerance(share=0.05))
    row = judge(spectrum(), None, [found]).iloc[0]
    assert (row["verdict"], row["trained_largest"], row["trained_rank"]) == ("undecidable", pd.NA, pd.NA)
    assert missing in row["missing"].split("; ")


def test_a_seed_whose_full_run_diverged_is_left_out_and_without_any_nothing_is_decided():
    runs, losses, weights, base = made(lambda _, rank: 0.01)
    (found,) = trained_ranks(diverge(runs, losses, "full-s0"), losses, weights, base, Tolerance(share=0.05))
    assert found.full.seeds == (1,)
    assert found.sufficient.rank == 1
    runs = diverge(runs, losses, "full-s0", "full-s1")
    trained = trained_ranks(runs, losses, weights, base, Tolerance(share=0.05))
    assert trained[0].full.outcome == "diverged"
    table = judge(None, None, trained)
    assert table[["layer_type", "verdict", "missing"]].values.tolist() == [
        ["mlp", "undecidable", "a full fine-tune that did not diverge"]
    ]
    best = recommend(runs, trained, 4.0)
    assert np.isnan(best.share)
    assert best.good_enough


def test_a_full_run_that_gained_nothing_decides_nothing_and_a_share_of_it_falls_back_on_nats():
    runs, losses, weights, base = made(lambda _, rank: -0.2, gain=-0.1)
    (found,) = trained_ranks(runs, losses, weights, base, Tolerance(share=0.05))
    assert found.full.outcome == "no gain"
    assert found.full.tolerance == 0.01
    assert found.sufficient.rank == 1
    row = judge(spectrum(), None, [found]).iloc[0]
    assert (row["verdict"], row["missing"]) == ("undecidable", "a full fine-tune that gains on this text")


def test_a_gain_that_may_be_chance_is_none():
    runs, losses, weights, base = made(lambda _, rank: 0.0, noise=0.5, gain=0.001)
    assert yardstick(runs, losses, weights, base, Tolerance(share=0.05)).outcome == "no gain"


def test_equal_parameters_compares_groups_where_both_are():
    runs, *_ = made(lambda group, rank: 0.1 * (group == "attention") + 0.1 / rank, groups=("attention", "mlp"))
    table = equal_parameters(runs, points=3)
    assert set(table["targets"]) == {"attention", "mlp"}
    assert table["n_parameters"].min() == 200
    assert table["n_parameters"].max() == 1600
    at = table[table["n_parameters"] == 1600].set_index("targets")
    both = table.pivot(index="n_parameters", columns="targets", values="loss")
    assert (both["mlp"] < both["attention"]).all()
    assert at["rank"].to_dict() == pytest.approx({"attention": 8, "mlp": 16})


def test_the_smallest_good_adapter_is_recommended():
    runs, losses, weights, base = made(
        lambda group, rank: (0.2 if group == "attention" else 0.0) + (0.3 if rank < 4 else 0.01),
        groups=("attention", "mlp"),
    )
    trained = trained_ranks(runs, losses, weights, base, Tolerance(share=0.05))
    start = float(np.average(base, weights=weights))
    best = recommend(runs, trained, start)
    assert (best.targets, best.rank, best.lr, best.alpha) == ("mlp", 4, 1e-3, 32.0)
    assert best.against_full == pytest.approx(0.01, abs=0.002)
    assert best.share == pytest.approx(0.99, abs=0.002)
    assert best.good_enough
    runs["loss"] += 0.7 * (runs["method"] != "full")
    assert not recommend(runs, trained, start).good_enough
    assert recommend(runs, trained, float(runs["loss"].min()) - 0.1) is None  # none is better than the base
    config = best.lora_config(["up_proj", "down_proj"])
    peft = pytest.importorskip("peft")
    made_config = eval(config, {"LoraConfig": peft.LoraConfig})
    assert made_config.r == 4
    assert made_config.target_modules == {"down_proj", "up_proj"}


def functional(rank, low, high, gain=1.0, group="mlp"):
    """An evaluation of one group truncated alone, as far as a verdict reads it."""
    from lowrank_probe.columns import EVALUATION
    from lowrank_probe.evaluation_runs import Evaluation

    sides = [{"how": how, "excess_low": gain, "excess": gain} for how in ("base", "tuned")]
    row = {"group": group, "how": "alone", "functional_rank": rank, "low": low, "high": high, "largest_rank": 32,
           "tolerance_nats": 0.05}  # fmt: skip
    nothing = np.empty(0)
    return Evaluation(
        pd.DataFrame(sides, columns=list(EVALUATION)), pd.DataFrame([row]), nothing, nothing, nothing, nothing, {}
    )


@pytest.mark.parametrize(
    ("ends", "verdict", "missing"),
    [
        ((1, 1, 2), "low-rank at r=2", ""),
        ((0, 0, 1), "undecidable", "text on which this update matters"),
        ((0, 0, 0), "undecidable", "text on which this update matters"),
        ((4, 0, 16), "undecidable", "its loss at more ranks from 0 to 16, or more held-out text"),
        ((16, 15, 32), "not low-rank", ""),
        # 4 falls short and 32 does not: whether 8 is enough was not looked at.
        ((32, 5, 32), "undecidable", "its loss at more ranks from 5 to 32"),
        ((None, None, None), "not low-rank", ""),
    ],
)
def test_functional_evidence_needs_an_update_that_matters(ends, verdict, missing):
    row = judge(spectrum(), functional(*ends)).set_index("layer_type").loc["mlp"]
    assert row["verdict"] == verdict
    assert missing in row["missing"]
    row = judge(spectrum(), functional(*ends, gain=-1.0)).set_index("layer_type").loc["mlp"]
    assert row["verdict"] == "undecidable"
    assert "a full fine-tune that gains on this text" in row["missing"]


def verdict(excess, seeds=(0, 1)):
    """The row of mlp where only trained evidence is there; break-even is not known, so it is given by a spectrum."""
    runs, losses, weights, base = made(excess, seeds)
    trained = trained_ranks(runs, losses, weights, base, Tolerance(share=0.05))
    return judge(spectrum(), None, trained).set_index("layer_type").loc["mlp"]


def spectrum(k=32):
    """A spectrum of two mlp matrices that decides nothing itself."""
    from lowrank_probe.columns import TABLE
    from lowrank_probe.runs import Result

    rows = [
        dict.fromkeys(TABLE, np.nan)
        | {"name": f"model.layers.0.mlp.{name}_proj.weight", "layer_type": name, "stack": "", "layer": 0,
           "break_even_rank": k / 2, "decidable_r90": False, "decidable_r50": False, "decidable_signal_rank": False}
        for name in ("up", "down")
    ]  # fmt: skip
    return Result(pd.DataFrame(rows), pd.DataFrame(), {})


def test_spectral_evidence_gives_way_where_its_rank_falls_short_in_loss(tmp_path):
    base = llama_tensors()
    found = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", add_update(base, rank=4)))
    row = judge(found, functional(4, 3, 4, group="q")).set_index("layer_type").loc["q"]
    assert (row["verdict"], row["decided_by"]) == ("low-rank at r=4", "functional")
    row = judge(found, functional(32, 3, 32, group="q")).set_index("layer_type").loc["q"]
    assert row["decided_by"] == "spectral"
    rank = int(row["verdict"].removeprefix("low-rank at r="))
    row = judge(found, functional(32, rank + 1, 32, group="q")).set_index("layer_type").loc["q"]
    assert row["verdict"] == "undecidable"
    assert f"r={rank} holds the energy, and falls short in loss" in row["evidence"]
    row = judge(found, functional(None, None, None, group="q")).set_index("layer_type").loc["q"]
    assert row["verdict"] in ("not low-rank", "undecidable")


def test_the_verdict_follows_trained_evidence():
    row = verdict(lambda _, rank: 0.4 if rank < 4 else 0.01)
    assert (row["verdict"], row["decided_by"]) == ("low-rank at r=4", "trained")
    row = verdict(lambda _, rank: 0.9 / rank**0.5)  # still falling at 16, above half of break-even
    assert (row["verdict"], row["decided_by"]) == ("not low-rank", "trained")


def test_a_loss_that_levels_off_above_full_decides_nothing():
    row = verdict(lambda _, rank: 0.4 if rank < 4 else 0.2)
    assert row["verdict"] == "undecidable"
    assert "levelled off at r=4" in row["evidence"]


def test_one_seed_is_not_enough():
    row = verdict(lambda _, rank: 0.0, seeds=(0,))
    assert row["verdict"] == "undecidable"
    assert "a second seed" in row["missing"]
