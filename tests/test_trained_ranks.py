"""Trained evidence and the verdict, on losses whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from lowrank_probe.functional_ranks import Tolerance
from lowrank_probe.hypothesis import judge, recommend
from lowrank_probe.trained_ranks import equal_parameters, trained_ranks

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
    runs["loss"] = [float(np.average(losses[label], weights=weights)) for label in runs["label"]]
    return runs, losses, weights, text + gain


def test_the_sufficient_rank_is_found_with_its_interval():
    runs, losses, weights, base = made(lambda _, rank: 0.4 if rank < 4 else 0.01)
    (found,) = trained_ranks(runs, losses, weights, base, Tolerance(share=0.05))
    assert (found.sufficient.rank, found.sufficient.low, found.sufficient.high) == (4, 4, 4)
    assert found.tolerance == pytest.approx(0.05, abs=0.002)
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


def test_a_run_that_diverged_is_never_good_enough():
    runs, losses, weights, base = made(lambda _, rank: 0.0)
    losses["lora-r16-mlp-s0"] = np.full(N, np.nan)
    (found,) = trained_ranks(runs, losses, weights, base, Tolerance(0.1))
    assert found.sufficient.rank is None
    assert np.isinf(found.excess[-1])


def test_without_a_gain_a_share_falls_back_on_nats():
    runs, losses, weights, base = made(lambda _, rank: 0.005, gain=-0.1)
    (found,) = trained_ranks(runs, losses, weights, base, Tolerance(share=0.05))
    assert found.tolerance == 0.01
    assert found.sufficient.rank == 1


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
    best = recommend(runs, trained)
    assert (best.targets, best.rank, best.lr, best.alpha) == ("mlp", 4, 1e-3, 32.0)
    assert best.against_full == pytest.approx(0.01, abs=0.002)
    config = best.lora_config(["up_proj", "down_proj"])
    peft = pytest.importorskip("peft")
    made_config = eval(config, {"LoraConfig": peft.LoraConfig})
    assert made_config.r == 4
    assert made_config.target_modules == {"down_proj", "up_proj"}


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
