"""Kinds that the ledger shows: only some parts, layers or types moved."""

import pytest
import torch
from updates import BF16, F32, change, findings, fine_tuned, model, of

from lowrank_probe.layers import sort_key


def test_identical_models(tmp_path):
    assert list(findings(tmp_path, model(), model())) == ["identical"]


def test_a_new_head_on_the_base_as_it_was(tmp_path):
    found = findings(tmp_path, model(), model() | {"score.weight": torch.randn(3, 128)})
    assert list(found) == ["head-only"]
    assert "score.weight" in found["head-only"].statement


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("kind", "where", "scope"),
    [
        ("embedding-only", of("embed_tokens"), ("embedding",)),
        ("head-only", of("lm_head"), ("lm_head",)),
        ("norm-only", of("norm"), ("input_layernorm", "norm")),
        ("bias-only", of("bias"), ("q",)),
        ("vectors-only", of("bias", "norm"), ("q", "input_layernorm", "norm")),
    ],
)
def test_only_one_part_moved(tmp_path, kind, where, scope, dtype):
    base = model(dtype, head=True)
    tuned = {
        name: (W.double() * (1 + 0.05 * torch.randn(W.shape, dtype=torch.float64))).to(dtype) if where(name) else W
        for name, W in base.items()
    }
    found = findings(tmp_path, base, tuned)
    assert kind in found
    assert found[kind].scope == tuple(sorted(scope, key=sort_key))
    assert found[kind].evidence["n_unchanged"] == len(base) - found[kind].evidence["n_moved"]
    assert "full fine-tune" not in found
    assert "partially frozen" not in found


def test_only_some_layers_moved(tmp_path):
    base = model(layers=5)
    found = findings(tmp_path, base, change(base, fine_tuned(1e-2), of("layers.1.", "layers.2.", "layers.4.")))
    assert list(found) == ["partially frozen"]
    assert found["partially frozen"].scope == ("layers 1–2, 4",)
    assert "only layers 1–2, 4 of 5 moved; embedding identical" in found["partially frozen"].statement


def test_only_some_types_moved(tmp_path):
    base = model()
    found = findings(tmp_path, base, change(base, fine_tuned(1e-2), of("self_attn")))
    assert list(found) == ["partially frozen"]
    assert found["partially frozen"].scope == ("q", "k", "v", "o")
