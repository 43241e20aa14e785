"""Similarity of updates and their amplification: planted subspaces, the random control by simulation."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from pairs import add_update, llama_tensors, orthonormal, planted, write
from steps import Q

import lowrank_probe as lp
from lowrank_probe import subspaces
from lowrank_probe.checkpoints import open_checkpoint


def test_phi_of_planted_subspaces_is_exact(angled, angled_trajectory):
    table, angles = angled_trajectory.similarity, angled[3]
    assert set(zip(table["i"], table["j"], strict=True)) == {(i, j) for i in (1, 2, 4, 8, 16) for j in (1, 2, 4, 8, 16)}
    for row in table.to_dict("records"):
        expected = (np.cos(angles[: min(row["i"], row["j"])]) ** 2).mean()
        assert row["phi_left"] == pytest.approx(expected, abs=1e-10)
        assert row["phi_right"] == pytest.approx(expected, abs=1e-10)
    assert table["trusted"].all()
    s = np.linspace(3, 1, 16)
    gaps = dict(zip(table["i"], table["gap_a"], strict=True))
    assert gaps[4] == pytest.approx(s[3] / s[4], rel=1e-10)
    assert gaps[16] > 1e10


def test_phi_by_its_definition_and_its_limits():
    generator = torch.Generator().manual_seed(0)
    A, B = orthonormal(40, 5, generator), orthonormal(40, 7, generator)
    phi = subspaces.similarity(A, B)
    assert phi.shape == (5, 7)
    for i, j in ((1, 1), (3, 7), (5, 2)):
        assert phi[i - 1, j - 1] == pytest.approx(np.linalg.norm(A[:, :i].T @ B[:, :j]) ** 2 / min(i, j), rel=1e-12)
    np.testing.assert_allclose(subspaces.similarity(A, A @ orthonormal(5, 5, generator))[4, 4], 1, rtol=1e-12)
    np.testing.assert_allclose(subspaces.similarity(B[:, :3], B[:, 3:]), 0, atol=1e-15)
    np.testing.assert_allclose(subspaces.similarity(A[:, :2], A)[1, 4], 1, rtol=1e-12)


@pytest.mark.parametrize(("i", "j", "m"), [(1, 1, 20), (2, 8, 40), (8, 8, 64), (16, 4, 30)])
def test_phi_of_random_subspaces_by_simulation(i, j, m):
    drawn = np.array(
        [
            subspaces.similarity(
                *(subspaces.random_directions(m, r, f"{n} {side}") for r, side in ((i, "a"), (j, "b")))
            )
            for n in range(600)
        ]
    )[:, -1, -1]
    expected = subspaces.random_similarity(i, j, m)
    assert expected == max(i, j) / m
    assert abs(drawn.mean() - expected) < 4 * drawn.std() / math.sqrt(len(drawn))


def test_the_control_is_seeded_and_has_the_stated_mean(growing):
    first, again, other = (lp.trajectory(*growing, seed=seed).similarity for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(first["control_left"], other["control_left"])
    np.testing.assert_allclose(first["phi_left"], other["phi_left"], rtol=1e-9)
    for side, size in (("left", "rows"), ("right", "cols")):
        excess = first[f"control_{side}"] / first[f"phi_random_{side}"]
        assert excess.mean() == pytest.approx(1, abs=0.1), size


def test_true_overlap_against_a_simulated_spiked_matrix():
    shape, s = (200, 500), torch.tensor([6.0, 4.0, 2.5, 1.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    U, V = orthonormal(200, 4, generator), orthonormal(500, 4, generator)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(500)
    edge = 1 + math.sqrt(200 / 500)
    found_U, found_s, found_Vh = torch.linalg.svd((U * s) @ V.T + noise, full_matrices=False)
    left, right = subspaces.true_overlap(found_s[:4].numpy(), edge, shape)
    np.testing.assert_allclose(left, (found_U[:, :4] * U).sum(0).numpy() ** 2, atol=0.05)
    np.testing.assert_allclose(right, (found_Vh[:4].T * V).sum(0).numpy() ** 2, atol=0.05)
    swapped = subspaces.true_overlap(found_s[:4].numpy(), edge, shape[::-1])
    np.testing.assert_allclose(swapped, (right, left))
    assert [list(x) for x in subspaces.true_overlap(np.array([0.9 * edge]), edge, shape)] == [[0.0], [0.0]]
    assert list(subspaces.true_overlap(np.ones(2), 0.0, shape)[0]) == [1, 1]


def test_storage_in_bf16_limits_phi_as_stated_and_takes_the_trust_away(tmp_path):
    generator = torch.Generator().manual_seed(5)
    W = (0.02 * torch.randn(300, 400, generator=generator)).bfloat16()
    delta = planted((300, 400), torch.tensor([10.0, 8, 6, 4, 0.5, 0.45, 0.4, 0.35]))
    delta *= 0.012 * W.double().norm() / delta.norm()
    paths = [write(tmp_path / "base", {Q: W})]
    for label, factor in (("a", 1.0), ("b", 1.3)):  # the same directions: without rounding φ = 1
        paths.append(write(tmp_path / label, {Q: (W.double() + factor * delta).bfloat16()}))
    found = lp.trajectory(paths[0], paths[1:])
    (row,) = found.results["a"].table.to_dict("records")
    assert row["noise_model"] == "rounding"
    table = found.similarity[found.similarity["i"] == found.similarity["j"]].set_index("i")
    signal = row["signal_rank"]
    assert 4 <= signal < 16
    assert table["trusted"].to_dict() == {i: i <= signal for i in (1, 2, 4, 8, 16)}
    assert table["phi_left"][8] < 0.97
    for side in ("left", "right"):
        for i in (1, 2, 4, 8):
            assert table[f"phi_{side}"][i] == pytest.approx(table[f"phi_ceiling_{side}"][i], abs=0.05)
    amplification = found.amplification.set_index("r")["trusted"]
    assert amplification[1].all()
    assert not amplification[16].any()


def test_what_rounding_leaves_of_one_direction_is_not_trusted(tmp_path):
    generator = torch.Generator().manual_seed(5)
    W = (0.02 * torch.randn(768, 768, generator=generator)).bfloat16()
    delta = torch.outer(torch.randn(768, generator=generator), torch.randn(768, generator=generator))
    paths = [write(tmp_path / "base", {Q: W})]
    for label, factor in (("a", 1.0), ("b", 1.3)):
        update = delta.double() * (0.03 * factor * W.double().norm() / delta.norm())
        paths.append(write(tmp_path / label, {Q: (W.double() + update).bfloat16()}))
    found = lp.trajectory(paths[0], paths[1:])
    (row,) = found.results["a"].table.to_dict("records")
    assert (row["noise_model"], row["signal_rank"]) == ("rounding", 1)
    assert np.count_nonzero(found.results["a"].singular_values[Q] > 1.05 * row["noise_edge"]) > 3
    table = found.similarity[found.similarity["i"] == found.similarity["j"]].set_index("i")
    assert table["trusted"].to_dict() == {i: i == 1 for i in table.index}


def test_swallowed_updates_are_not_trusted(tmp_path):
    base = llama_tensors(1, dtype=torch.bfloat16)
    steps = [write(tmp_path / f"s{i}", add_update(base, relative=2e-4, seed=i)) for i in (1, 2)]
    found = lp.trajectory(write(tmp_path / "base", base), steps)
    assert not found.similarity["trusted"].any()
    figure = found.figures["similarity"]
    grey = figure.data[1]
    assert grey.text[0][1] == "?"
    assert grey.z[0][1] is not None
    assert figure.data[0].z[0][1] is None
    assert found.figures["r90"].data[1].text[0] == "?"


def test_a_subspace_without_a_gap_is_not_trusted(tmp_path):
    W = torch.randn(60, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    delta = planted((60, 50), torch.tensor([3.0, 2, 2, 1]))
    paths = [write(tmp_path / name, {Q: W + factor * delta}) for name, factor in (("base", 0), ("a", 1), ("b", 2))]
    table = lp.trajectory(paths[0], paths[1:]).similarity.set_index(["i", "j"])
    assert table["gap_a"][2, 2] == pytest.approx(1, abs=1e-9)
    assert {i: bool(table["trusted"][i, i]) for i in (1, 2, 4)} == {1: True, 2: False, 4: True}


def test_amplification_against_dense_numpy(angled, angled_trajectory):
    W = open_checkpoint(angled[0]).read(Q).numpy()
    base_values = np.linalg.svd(W, compute_uv=False)
    for row in angled_trajectory.amplification.to_dict("records"):
        delta = open_checkpoint(angled[1 if row["step"] == "a" else 2]).read(Q).numpy() - W
        U, _, Vh = np.linalg.svd(delta)
        r = row["r"]
        own = np.linalg.norm(U[:, :r].T @ W @ Vh[:r].T)
        assert row["fro_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert row["projected_own"] == pytest.approx(own, rel=1e-9)
        assert row["factor"] == pytest.approx(np.linalg.norm(delta) / own, rel=1e-9)
        assert row["projected_base"] == pytest.approx(np.linalg.norm(base_values[:r]), rel=1e-12)
        assert row["projected_random"] == pytest.approx(r * np.linalg.norm(W) / math.sqrt(W.size), rel=3 / r)
        assert row["trusted"]
