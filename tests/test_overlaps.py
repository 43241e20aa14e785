"""How the updates of two adapters overlap: planted ones."""

import json

import pytest
import torch
from safetensors.torch import save_file

import lowrank_probe as lp

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")


def factors_of(adapter, B, A):
    """An adapter of one module from its factors, scaling 1."""
    adapter.mkdir()
    tensors = {"q.lora_A.weight": A.contiguous(), "q.lora_B.weight": B.contiguous()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": len(A), "lora_alpha": len(A)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def test_overlap_of_planted_updates(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    save_file({"q.weight": random(60, 50)}, tmp_path / "base.safetensors")
    B, A = random(60, 4), random(4, 50)
    one = factors_of(tmp_path / "one", B, A)
    same = factors_of(tmp_path / "same", B @ torch.diag(torch.tensor([1.0, 2, 3, 4])), A)
    left = factors_of(tmp_path / "left", B @ random(4, 4), random(4, 50))
    chance = factors_of(tmp_path / "chance", random(60, 4), random(4, 50))
    paths = [one, same, left, chance]
    overlap = lp.merge(tmp_path / "base.safetensors", paths, tmp_path / "out", weights=[1, -1, 1, 1]).overlap
    rows = {(row["adapter_a"], row["adapter_b"]): row for row in overlap.to_dict("records")}
    assert set(rows) == {(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)}
    assert rows[1, 2]["phi_left"] == pytest.approx(1)
    assert rows[1, 2]["phi_right"] == pytest.approx(1)
    assert rows[1, 2]["sign_conflict"] > 0.8  # weight −1
    assert rows[1, 2]["cosine"] < -0.8
    assert rows[1, 3]["phi_left"] == pytest.approx(1)
    for a, b in ((1, 4), (2, 4), (3, 4)):
        assert abs(rows[a, b]["phi_left"] - 4 / 60) < 0.1
        assert abs(rows[a, b]["phi_right"] - 4 / 50) < 0.1
        assert 0.4 < rows[a, b]["sign_conflict"] < 0.6
        assert abs(rows[a, b]["cosine"]) < 0.2
    assert all(row["phi_random_left"] == 4 / 60 and row["phi_random_right"] == 4 / 50 for row in rows.values())
    assert all(abs(row["control_left"] - 4 / 60) < 0.1 for row in rows.values())
    U, V = B.double() @ A.double(), (B @ torch.diag(torch.tensor([1.0, 2, 3, 4]))).double() @ A.double()
    assert rows[1, 2]["cosine"] == pytest.approx(-float((U * V).sum() / (U.norm() * V.norm())))
    assert rows[1, 2]["sign_conflict"] == pytest.approx(float((U * V > 0).double().mean()), abs=2e-3)
