"""Real weights from package registries: what we say about pairs whose story is known."""

import math

import numpy as np
import pytest
import real_models
import torch
from ledgers import check_complete
from pairs import planted, write

import lowrank_probe as lp
from lowrank_probe.checkpoints import open_checkpoint

pytestmark = pytest.mark.slow


def check_values(result, base, tuned, every=1):
    """Singular values, norms and ranks of every `every`-th matrix against a float64 SVD of the stored difference."""
    sides = open_checkpoint(base), open_checkpoint(tuned)
    tuned_names = dict(zip(result.ledger["name"], result.ledger["tuned_name"], strict=True))
    for row in result.table.to_dict("records")[::every]:
        name, _, part = row["name"].partition("[")
        a, b = sides[0].read(name).double(), sides[1].read(tuned_names[name]).double()
        if part:  # torch's in_proj_weight: q, k and v one after the other
            a, b = (W.chunk(3)["qkv".index(part[0])] for W in (a, b))
        delta = (b - a).numpy()
        expected = np.linalg.svd(delta, compute_uv=False)
        s = result.singular_values[row["name"]]
        np.testing.assert_allclose(s[expected > 2e-5 * expected[0]], expected[expected > 2e-5 * expected[0]], rtol=1e-6)
        assert row["fro_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-9)
        assert row["relative_update"] == pytest.approx(np.linalg.norm(delta) / float(a.norm()), rel=1e-9)
        energy = np.cumsum(expected**2) / (expected**2).sum()
        assert row["r90"] == np.flatnonzero(energy >= 0.9 - 1e-12)[0] + 1
        for r in (4, 16, 64):
            assert row[f"energy_{r}"] == pytest.approx(energy[min(r, len(energy)) - 1], abs=1e-9)


def checked(base, tuned, every=1):
    """`lp.spectrum` of a pair, its ledger and its values checked."""
    result = lp.spectrum(base, tuned)
    check_complete(result, base, tuned)
    check_values(result, base, tuned, every)
    return result


@pytest.fixture(scope="module")
def anarcii():
    return real_models.anarcii()


@pytest.mark.parametrize("tuned", ["tcr", "shark"])
def test_anarcii_from_antibodies_to(anarcii, tuned):
    result = checked(anarcii["antibody"], anarcii[tuned])
    counts = result.facts["counts"]
    assert counts.get("shape differs", 0) == (3 if tuned == "tcr" else 0), counts
    assert counts["analysed"] == result.table["name"].str.partition("[")[0].nunique() > 10
    assert {"only in base", "only in tuned"}.isdisjoint(counts)
    assert result.facts["related"] is True
    told = [note.partition(":")[0] for note in result.facts["notes"]]
    assert told == (["3 tensors differ in shape and are left out"] if tuned == "tcr" else [])
    assert set(result.table["storage"]) == {"F32"}
    assert result.table["decidable_r90"].all()


def test_anarcii_ledger_names_what_has_another_vocabulary(anarcii):
    result = lp.spectrum(anarcii["antibody"], anarcii["tcr"])
    lines = result.ledger[result.ledger["status"] == "shape differs"]
    assert (lines["base_shape"] != lines["tuned_shape"]).all()
    assert all("vocabulary or head" in note for note in lines["note"])


def test_sapiens_heavy_and_light_are_unrelated():
    models = real_models.sapiens()
    result = checked(models["VH"], models["VL"])
    assert result.facts["related"] is False
    assert abs(result.facts["median_cosine"]) < 0.1
    assert set(result.summary["verdict"]) == {"unrelated weights"}
    assert set(result.table["layer_type"]) >= {"embedding", "q", "k", "v", "o", "up", "down"}


@pytest.fixture(scope="module")
def rxnfp():
    return real_models.rxnfp()


@pytest.mark.parametrize("tuned", ["bert_ft", "bert_ft_10k_25s"])
def test_rxnfp_from_pretrained_to(rxnfp, tuned):
    result = checked(rxnfp["bert_pretrained"], rxnfp[tuned], every=7)
    assert result.facts["related"] is True
    status = dict(zip(result.ledger["name"], result.ledger["status"], strict=True))
    assert {status[name] for name in status if name.startswith("cls.")} == {"only in base"}
    counts = result.table["layer_type"].value_counts()
    assert {counts[layer_type] for layer_type in ("q", "k", "v", "o", "up", "down")} == {12}
    assert set(result.table["layer"].dropna()) == set(range(12))
    if tuned == "bert_ft":
        (note,) = result.facts["notes"]
        assert "'bert.'" in note
        assert "base side" in note
        blocks = result.table[result.table["layer"].notna()]
        assert float(blocks["relative_update"].median()) == pytest.approx(0.216, abs=0.02)
    else:
        assert result.facts["notes"] == []
        assert {status[name] for name in status if name.startswith("classifier.")} == {"only in tuned"}


def test_rxnmapper_loads_and_is_identical_to_itself():
    path = real_models.rxnmapper()
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["model_type"] == "albert"
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert tuple(tensor.shape) == info.shape
        if tensor.is_floating_point():
            assert math.isfinite(float(tensor.double().norm()))
    result = lp.spectrum(path, path)
    assert result.table.empty
    check_complete(result, path, path)
    assert set(result.ledger["status"]) <= {"unchanged", "tied", "not a weight"}


def test_smollm2_with_a_planted_update_of_its_own_weights(tmp_path):
    path = real_models.smollm2()
    checkpoint = open_checkpoint(path)
    names = [f"model.layers.{i}.{module}.weight" for i in (0, 29) for module in ("self_attn.k_proj", "mlp.down_proj")]
    base = {name: checkpoint.read(name) for name in names}
    tuned = {}
    for i, (name, W) in enumerate(base.items()):
        delta = planted(tuple(W.shape), torch.ones(8), seed=i)
        tuned[name] = (W.double() + 2e-2 * delta * W.double().norm() / delta.norm()).to(W.dtype)
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    assert set(result.table["storage"]) == {"BF16"}
    assert result.table["signal_rank"].tolist() == [8] * 4
    assert (result.table["r90_low"] <= 8).all()
    assert (result.table["r90_high"] >= 8).all()
    assert all(verdict.startswith("low-rank at r=8") for verdict in result.summary["verdict"])
