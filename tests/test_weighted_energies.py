"""Energies under one budget against what an update does to the loss: tables, experts, with and without gradients."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_moments import CPU, loss_of, mixtral, sequences
from test_verification import llama

from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.extraction_jobs import pieces_of
from lowrank_probe.extraction_work import Work
from lowrank_probe.moments import Moments, collect
from lowrank_probe.options import Options
from lowrank_probe.selection import select
from lowrank_probe.unfinished import Unfinished
from lowrank_probe.weighting import Weighting


def energies(tmp_path, make, updates, ridge=1e-3):
    """(moments, target → its piece 0, function (two-sided) → {name: ‖KᵀΔWL‖_F² as a budget takes it})."""
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(file)
    for name, update in updates.items():
        tensors[name] = tensors[name] + update
    save_file(tensors, file, {"format": "pt"})
    sides = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned")
    selection = select(*sides, ["everything"])
    store = Unfinished(tmp_path / "out", {"a": 1})
    moments = Moments(store, "text")
    pieces = [piece for target in selection.chosen for piece in pieces_of(target)]
    collect(model, loss_of(model), sequences(), pieces, moments)
    work = Work(*sides, selection.chosen, store, CPU, Options())

    def found(two_sided):
        one = replace(work, weighting=Weighting(moments, ridge, two_sided, 60))
        one.spectra(None)
        return {target.name: one.unit(target).fro_norm ** 2 for target in selection.chosen}

    return moments, {piece.target.name: piece for piece in pieces if piece.copy == 0}, found


def test_a_table_s_energy_is_of_the_rows_that_the_text_looks_up(tmp_path):
    update = torch.zeros(300, 32)
    update[:20] = 0.01 * torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    name = "model.embed_tokens"
    counts = torch.bincount(torch.cat(sequences()), minlength=300).double()
    moments, pieces, found = energies(tmp_path, llama, {f"{name}.weight": update})
    weights = counts + 1e-3 * counts.mean()
    G = moments.gradients(pieces[name], CPU).double()
    D = update.double() * weights.sqrt()[:, None]
    mean = moments.mean_gradient(pieces[name])
    assert mean == pytest.approx(float(G.trace()) / 32, rel=1e-6)
    assert found(False)[name] == pytest.approx(mean * float(D.square().sum()), rel=1e-4)
    two_sided = float(torch.trace(D @ (G + 1e-3 * mean * torch.eye(32, dtype=torch.float64)) @ D.T))
    assert found(True)[name] == pytest.approx(two_sided, rel=1e-4)


def test_rows_that_the_text_never_looks_up_weigh_as_much_as_the_ridge(tmp_path):
    seen = torch.bincount(torch.cat(sequences()), minlength=300) > 0
    name = "model.embed_tokens"
    told = []
    for i, rows in enumerate((seen, ~seen)):
        update = torch.zeros(300, 32)
        update[rows.nonzero()[:20, 0]] = 0.01
        _, _, found = energies(tmp_path / str(i), llama, {f"{name}.weight": update})
        told.append((found(False)[name], found(True)[name]))
    for often, never in zip(*told, strict=True):
        assert 0 < never < 2e-3 * often


def test_experts_count_by_what_a_token_does_in_them_not_by_how_many_they_meet(tmp_path):
    generator = torch.Generator().manual_seed(0)
    layer = "model.layers.0.block_sparse_moe.experts"
    updates = {f"{layer}.{e}.w2.weight": 0.01 * torch.randn(32, 16, generator=generator) for e in range(4)}
    moments, pieces, found = energies(tmp_path, mixtral, updates)
    name = "model.layers.0.mlp.experts.down_proj"
    expected = {False: 0.0, True: 0.0}
    for e in range(4):
        piece = replace(pieces[name], copy=e)
        n, D = moments.n_tokens(piece), updates[f"{layer}.{e}.w2.weight"].double()
        assert 0 < n < 60
        C, G = (
            M.double() + 1e-3 * M.double().diagonal().mean() * torch.eye(len(M), dtype=torch.float64)
            for M in (moments.inputs(piece, CPU), moments.gradients(piece, CPU))
        )
        # Means over its own rows, times all that pass: (60/n)·n·n = 60·n of the means' product.
        expected[True] += 60 / n * float(torch.trace(D @ C @ D.T @ G))
        expected[False] += 60 / n * float(torch.trace(D @ C @ D.T)) * moments.mean_gradient(piece)
    for two_sided, energy in expected.items():
        assert found(two_sided)[name] == pytest.approx(energy, rel=1e-4)
