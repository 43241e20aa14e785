"""The table against float64 references, and the trap tables: planted ranks, swallowed updates, pure noise."""

import math

import numpy as np
import pytest
import torch
from pairs import llama_tensors, pair, planted, write

import lowrank_probe as lp
from lowrank_probe import ProbeError, metrics
from lowrank_probe.columns import TABLE

NAN = math.nan
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
WHOLE_ONLY = [
    "nuclear_norm", "effective_rank", "energy_effective_rank", "participation_ratio", "numerical_rank",
    "hard_threshold_rank",
]  # fmt: skip


def one_matrix(tmp_path, base, tuned, name="q_proj.weight", **options):
    """(row, result) of a pair that holds this one matrix."""
    paths = write(tmp_path / "base", {name: base}), write(tmp_path / "tuned", {name: tuned})
    result = lp.spectrum(*paths, **options)
    assert len(result.table) == 1
    return result.table.iloc[0].to_dict(), result


def gaussian(shape, seed=0, scale=0.02):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def scaled_update(W, delta, relative):
    """W + ΔW in float64 with ‖ΔW‖/‖W‖ = relative."""
    return W.double() + delta * (relative * torch.linalg.norm(W.double()) / torch.linalg.norm(delta))


def svdvals(A):
    return np.linalg.svd(np.asarray(A, dtype=np.float64), compute_uv=False)


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (F16, F64)], ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (64, 20)], ids=str)
def test_row_against_a_float64_svd(tmp_path, dtypes, shape):
    W = gaussian(shape).to(dtypes[0])
    tuned = scaled_update(W, gaussian(shape, 1) @ gaussian((shape[1], shape[1]), 2), 0.1).to(dtypes[1])
    row, result = one_matrix(tmp_path, W, tuned)
    delta = (tuned.double() - W.double()).numpy()
    s = svdvals(delta)
    norm = float(np.linalg.norm(delta))
    np.testing.assert_allclose(result.singular_values["q_proj.weight"], s, rtol=1e-6, atol=1e-7 * s[0])
    near = {"rel": 1e-9}
    expected = {
        "rows": shape[0], "cols": shape[1], "n_kept": min(shape), "layer_type": "q",
        "fro_norm": pytest.approx(norm, **near),
        "base_norm": pytest.approx(float(np.linalg.norm(W.double())), **near),
        "relative_update": pytest.approx(norm / float(np.linalg.norm(W.double())), **near),
        "spectral_norm": pytest.approx(s[0], **near),
        "nuclear_norm": pytest.approx(s.sum(), rel=1e-7),
        "stable_rank": pytest.approx(norm**2 / s[0] ** 2, **near),
        "effective_rank": pytest.approx(metrics.effective_rank(s), rel=1e-7),
        "energy_effective_rank": pytest.approx(metrics.energy_effective_rank(s), **near),
        "participation_ratio": pytest.approx(metrics.participation_ratio(s), **near),
        "numerical_rank": metrics.numerical_rank(s, shape),
        "hard_threshold_rank": metrics.hard_threshold_rank(s, shape),
        "break_even_rank": shape[0] * shape[1] / sum(shape),
        "unchanged_fraction": float((delta == 0).mean()),
        "base_dtype": {F32: "F32", BF16: "BF16", F16: "F16", F64: "F64"}[dtypes[0]],
        "tuned_dtype": {F32: "F32", BF16: "BF16", F16: "F16", F64: "F64"}[dtypes[1]],
        "cosine": pytest.approx(
            float((W.double() * tuned.double()).sum() / W.double().norm() / tuned.double().norm()), abs=1e-6
        ),
    }  # fmt: skip
    for r in (4, 8, 16):
        expected[f"energy_{r}"] = pytest.approx((s[:r] ** 2).sum() / norm**2, abs=1e-9)
    assert {name: row[name] for name in expected} == expected
    for p in (0.5, 0.9, 0.95, 0.99):
        assert row[f"r{100 * p:.0f}"] == np.flatnonzero(np.cumsum(s**2) >= p * norm**2 * (1 - 1e-12))[0] + 1
    assert row["relative_r90"] == row["r90"] / row["null_r90"]
    assert row["sigma_error"] < 1e-6


def test_subtraction_of_wide_sides_is_float64(tmp_path):
    # 2⁻³⁰ beside 1 is gone in float32.
    W = torch.ones(4, 4, dtype=F64)
    delta = planted((4, 4), torch.tensor([1.0])) * 2.0**-30
    row, _ = one_matrix(tmp_path, W.float(), W + delta)
    assert row["fro_norm"] == pytest.approx(2.0**-30, rel=1e-6)
    assert row["unchanged_fraction"] == 0


def test_difference_of_bf16_values_is_exact(tmp_path):
    W = gaussian((32, 32)).bfloat16()
    tuned = scaled_update(W, gaussian((32, 32), 1), 1e-2).bfloat16()
    row, _ = one_matrix(tmp_path, W, tuned)
    delta = tuned.double() - W.double()
    assert row["fro_norm"] == pytest.approx(float(delta.norm()), rel=1e-12)
    assert row["sigma_error"] < 1e-10


@pytest.mark.parametrize("options", [{}, {"top": 4}, {"exact_tail": True}], ids=str)
@pytest.mark.parametrize("small", ["base", "tuned"])
def test_what_float32_loses_of_a_difference_is_in_the_bounds(tmp_path, small, options):
    large, tiny = gaussian((64, 80), 0, 1.0).bfloat16(), gaussian((64, 80), 1, 1e-7).bfloat16()
    base, tuned = (tiny, large) if small == "base" else (large, tiny)
    row, result = one_matrix(tmp_path, base, tuned, **options)
    s = result.singular_values["q_proj.weight"]
    exact = svdvals(tuned.double() - base.double())[: len(s)]
    error = np.abs(s - exact).max()
    lost = float((tuned.double() - base.double() - (tuned.float() - base.float()).double()).norm())
    assert 1e-12 * exact[0] < error <= row["sigma_error"] * s[0]
    assert lost <= row["sigma_error"] * s[0]
    assert row["energy_error"] < 1e-6


@pytest.mark.parametrize("stored_as", [F32, F64])
@pytest.mark.parametrize(("kind", "says"), [(BF16, "BF16"), (F16, "F16")])
def test_storage_is_told_from_the_values_not_the_dtype(tmp_path, stored_as, kind, says):
    W = gaussian((64, 64)).to(kind)
    tuned = scaled_update(W, planted((64, 64), torch.ones(4)), 0.05).to(kind)
    narrow, _ = one_matrix(tmp_path / "narrow", W, tuned)
    wide, _ = one_matrix(tmp_path / "wide", W.to(stored_as), tuned.to(stored_as))
    assert (wide["storage"], wide["noise_model"]) == (says, narrow["noise_model"])
    assert wide["tuned_dtype"] == {F32: "F32", F64: "F64"}[stored_as]
    assert wide["noise_std"] == pytest.approx(narrow["noise_std"], rel=1e-6)
    assert (wide["signal_rank"], wide["r90_high"]) == (narrow["signal_rank"], narrow["r90_high"])


def test_a_true_float32_update_says_f32(tmp_path):
    W = gaussian((32, 32)).float()
    row, _ = one_matrix(tmp_path, W, scaled_update(W, gaussian((32, 32), 1), 1e-2).float())
    assert row["storage"] == "F32"
    assert row["decidable_r90"]


# ---------------------------------------------------------------------------------------------- tiers


def heavy_tail(shape=(96, 160), seed=0):
    W = gaussian(shape, seed).float()
    s = 1.0 / torch.arange(1, min(shape) + 1)
    return W, scaled_update(W, planted(shape, s, seed), 0.3).float()


@pytest.mark.parametrize("top", [1, 4, 16])
def test_top_k_agrees_with_the_whole(tmp_path, top):
    W, tuned = heavy_tail((256, 320))
    full, whole = one_matrix(tmp_path / "full", W, tuned)
    row, result = one_matrix(tmp_path / "top", W, tuned, top=top)
    kept = result.singular_values["q_proj.weight"]
    assert row["method"] == "krylov"
    assert row["n_kept"] == len(kept) >= top
    s = whole.singular_values["q_proj.weight"]
    np.testing.assert_allclose(kept, s[: len(kept)], rtol=1e-6)
    assert np.abs(kept - s[: len(kept)]).max() / s[0] <= row["sigma_error"] + 1e-12
    for r in (4, 8, 16, 32, 64):
        value = row[f"energy_{r}"]
        if r <= len(kept):
            assert value == pytest.approx(full[f"energy_{r}"], abs=max(1e-9, row["energy_error"]))
        else:
            assert math.isnan(value)
    for name in ("fro_norm", "stable_rank", "relative_update"):
        assert row[name] == pytest.approx(full[name], rel=1e-9)
    assert all(math.isnan(row[name]) for name in WHOLE_ONLY if name != "numerical_rank")
    for name in ("r50", "r90", "r95", "r99"):
        assert math.isnan(row[name]) if full[name] > len(kept) else row[name] == full[name]


def test_top_that_does_not_reach_r90_decides_nothing(tmp_path):
    W, tuned = heavy_tail((256, 320))
    row, result = one_matrix(tmp_path, W, tuned, top=2)
    assert math.isnan(row["r90"])
    assert math.isnan(row["r90_high"])
    (verdict,) = result.summary["verdict"]
    assert verdict.startswith("undecidable")
    assert "--top" in result.summary["evidence"][0]


def test_exact_tail_reaches_below_what_the_gram_matrix_resolves(tmp_path):
    s = torch.tensor([1.0, 1e-3, 1e-6, 1e-9, 1e-11])
    W = torch.zeros(40, 30, dtype=F64)
    tuned = planted((40, 30), s)
    row, result = one_matrix(tmp_path, W, tuned, exact_tail=True)
    np.testing.assert_allclose(result.singular_values["q_proj.weight"][:5], s.double(), rtol=1e-3, atol=1e-12)
    assert (row["method"], row["compute_dtype"], row["n_kept"]) == ("svd", "float64", 30)
    gram, _ = one_matrix(tmp_path / "gram", W, tuned)
    assert gram["method"] == "gram"
    assert gram["n_resolved"] < 5


def test_same_seed_same_table_and_another_seed_another_draw(tmp_path):
    paths = pair(tmp_path, dtype=BF16, relative=0.01)
    tables = [lp.spectrum(*paths, seed=seed).table.drop(columns="seconds") for seed in (0, 0, 1)]
    assert tables[0].equals(tables[1])
    assert not tables[0]["noise_edge"].equals(tables[2]["noise_edge"])
    assert tables[0]["fro_norm"].equals(tables[2]["fro_norm"])


def test_table_has_the_documented_columns_and_the_order_data_flows_in(tmp_path):
    base = llama_tensors() | {"lm_head.weight": torch.randn(80, 48)}
    tuned = {name: W + 0.01 * torch.randn_like(W) for name, W in base.items()}
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    assert list(result.table.columns) == list(TABLE)
    assert result.table["layer_type"].tolist() == [
        "embedding", *(2 * ["q", "k", "up", "down"]), "lm_head",
    ]  # fmt: skip
    assert list(result.singular_values) == result.table["name"].tolist()


# ---------------------------------------------------------------------------------------------- the traps


def test_planted_rank_16_in_bf16_is_16(tmp_path):
    W = gaussian((512, 512)).bfloat16()
    tuned = scaled_update(W, planted((512, 512), torch.ones(16)), 1e-2).bfloat16()
    row, result = one_matrix(tmp_path, W, tuned)
    assert row["signal_rank"] == 16
    assert row["decidable_signal_rank"]
    assert row["decidable_r90"]
    assert row["r90_low"] <= 15 <= row["r90_high"] <= 16
    assert row["r99"] > 100, "the raw rank is the trap: storage noise makes it large"
    assert result.summary["verdict"][0].startswith("low-rank at r=1")


@pytest.mark.parametrize("relative", [1e-4, 1e-5])
def test_rank_8_that_storage_swallowed_is_undecidable(tmp_path, relative):
    W = gaussian((512, 512)).bfloat16()
    tuned = scaled_update(W, planted((512, 512), torch.ones(8)), relative).bfloat16()
    row, result = one_matrix(tmp_path, W, tuned)
    assert row["unchanged_fraction"] > 0.9
    assert not row["decidable_signal_rank"]
    assert not row["decidable_r50"]
    assert not row["decidable_r90"]
    assert result.summary["verdict"][0] == "undecidable (storage noise)"
    assert math.isnan(result.summary["signal_rank"][0])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("relative", [0.3, 2e-2])
@pytest.mark.parametrize("shape", [(384, 384), (512, 128), (128, 640), (1024, 64)], ids=str)
def test_pure_noise_is_one_times_null_and_never_low_rank(tmp_path, dtype, relative, shape):
    W = gaussian(shape).to(dtype)
    tuned = scaled_update(W, gaussian(shape, 7), relative).to(dtype)
    row, result = one_matrix(tmp_path, W, tuned)
    assert row["relative_r90"] == pytest.approx(1, abs=0.03)
    assert not result.summary["verdict"][0].startswith("low-rank")


@pytest.mark.parametrize("relative", [1e-3, 3e-3])
def test_noise_that_storage_nearly_swallowed_is_never_low_rank(tmp_path, relative):
    W = gaussian((384, 384)).bfloat16()
    _, result = one_matrix(tmp_path, W, scaled_update(W, gaussian((384, 384), 7), relative).bfloat16())
    assert not result.summary["verdict"][0].startswith("low-rank")


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_an_exact_low_rank_update_is_low_rank(tmp_path, dtype):
    W = gaussian((256, 320)).to(dtype)
    tuned = scaled_update(W, planted((256, 320), torch.linspace(2, 1, 6)), 0.1).to(dtype)
    row, result = one_matrix(tmp_path, W, tuned)
    true = metrics.energy_rank(np.linspace(2, 1, 6), float(np.linalg.norm(np.linspace(2, 1, 6))), 0.9)
    assert row["r90_low"] <= true <= row["r90_high"] <= 6
    assert result.summary["verdict"][0].startswith("low-rank at r=")


def test_base_rounded_counts_the_bases_own_rounding(tmp_path):
    W = gaussian((256, 256))
    tuned = scaled_update(W, planted((256, 256), torch.ones(8)), 2e-2).bfloat16()
    plain, _ = one_matrix(tmp_path / "plain", W.bfloat16(), tuned)
    both, _ = one_matrix(tmp_path / "both", W.bfloat16(), tuned, base_rounded=True)
    assert both["noise_std"] == pytest.approx(math.sqrt(2) * plain["noise_std"], rel=0.05)
    assert both["signal_rank"] == 8


# ---------------------------------------------------------------------------------------------- edges


def test_identical_checkpoints(tmp_path):
    path = write(tmp_path / "m", llama_tensors())
    result = lp.spectrum(path, path)
    assert result.table.empty
    assert list(result.table.columns) == list(TABLE)
    assert result.summary.empty
    assert result.singular_values == {}
    assert result.facts["counts"] == {"unchanged": len(llama_tensors())}
    assert result.facts["related"] is True


def test_a_base_of_zeros_has_no_relative_update(tmp_path):
    row, _ = one_matrix(tmp_path, torch.zeros(8, 8), planted((8, 8), torch.tensor([2.0, 1.0])).float())
    assert math.isnan(row["relative_update"])
    assert row["base_norm"] == 0
    assert row["fro_norm"] == pytest.approx(math.sqrt(5), rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**50])
def test_scale_changes_no_rank(tmp_path, scale):
    W = gaussian((32, 48), scale=1.0).float()
    tuned = scaled_update(W, planted((32, 48), torch.ones(3)), 0.1).float()
    unit, _ = one_matrix(tmp_path / "unit", W, tuned)
    row, _ = one_matrix(tmp_path / "scaled", W * scale, tuned * scale)
    for name in ("r50", "r90", "signal_rank", "decidable_r90", "stable_rank", "numerical_rank"):
        assert row[name] == pytest.approx(unit[name], rel=1e-4), name


def test_a_transposed_pair_has_the_same_numbers(tmp_path):
    W, tuned = heavy_tail()
    row, _ = one_matrix(tmp_path / "a", W, tuned)
    transposed, _ = one_matrix(tmp_path / "b", W.T.contiguous(), tuned.T.contiguous())
    for name in ("fro_norm", "r50", "r90", "null_r90", "effective_rank", "energy_16", "break_even_rank"):
        assert transposed[name] == pytest.approx(row[name], rel=1e-9), name


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there(tmp_path, device):
    with pytest.raises(ProbeError, match=f"--device {device}"):
        lp.spectrum(*pair(tmp_path), device=device)


def test_progress_is_told_for_every_pair_and_ends_at_the_total(tmp_path):
    seen = []
    result = lp.spectrum(*pair(tmp_path), on_progress=lambda *step: seen.append(step))
    assert {name for name, _, _ in seen} == set(result.ledger["name"])
    assert seen[-1][1] == seen[-1][2] == sum(tensor.numel() for tensor in llama_tensors().values())
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_fewer_moved_rows_than_columns_can_be_saved_and_loaded(tmp_path):
    W = 0.02 * torch.randn(400, 64, generator=torch.Generator().manual_seed(5))
    base = {"model.embed_tokens.weight": W.bfloat16()}
    tuned = {"model.embed_tokens.weight": base["model.embed_tokens.weight"].clone()}
    generator = torch.Generator().manual_seed(6)
    tuned["model.embed_tokens.weight"][10:50] += (2e-5 * torch.randn(40, 64, generator=generator)).bfloat16()
    result = lp.spectrum(write(tmp_path / "a", base), write(tmp_path / "b", tuned))
    again = lp.load(result.save(tmp_path / "run"))
    name = "model.embed_tokens.weight"
    assert len(again.singular_values[name]) == 64
    for name, values in result.denoised_values.items():
        np.testing.assert_array_equal(again.denoised_values[name], values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"top": 0}, {"top": 2.5}, {"top": "3"}, {"top": 4, "exact_tail": True}, {"layers": (3, 1)}, {"layers": (-1, 1)},
        {"seed": -1}, {"memory": "8GB"},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_options_are_refused_by_name(tmp_path, wrong):
    with pytest.raises(lp.ProbeError, match=next(iter(wrong))):
        lp.spectrum(*pair(tmp_path), **wrong)


def test_values_that_were_not_kept_are_not_blamed_on_storage(tmp_path):
    base = llama_tensors()
    generator = torch.Generator().manual_seed(3)
    tuned = {name: W + 1e-3 * torch.randn(W.shape, generator=generator) ** 3 for name, W in base.items()}
    sides = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    for options in ({}, {"top": 4}):
        [found] = lp.spectrum(*sides, device="cpu", **options).facts["findings"]
        assert found["kind"] == "full fine-tune"
        assert "storage" not in found["statement"]


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def low_rank(shape, rank, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.02
    B, A = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((shape[0], rank), (rank, shape[1]))
    )
    return W, scale * B @ A


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e-3), (torch.float32, 1e-2)], ids=str)
def test_what_the_method_may_be_wrong_by_is_no_signal(dtype, scale):
    W, D = low_rank((500, 128), 4, scale)
    W = W.to(dtype)
    row = lp.spectrum({Q_PROJ: W}, {Q_PROJ: (W.double() + D).to(dtype)}).table.iloc[0]
    assert (row["signal_rank"], row["r90_low"], row["r90_high"]) == (4, 4, 4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("top", [4, 5, 8])
def test_top_at_the_rank_of_an_update_leaves_nothing_to_share_out(top):
    W, D = low_rank((500, 128), 4, 1e-2)
    row = lp.spectrum({Q_PROJ: W.float()}, {Q_PROJ: (W.float().double() + D).float()}, top=top).table.iloc[0]
    assert (row["r90_low"], row["r90_denoised"], row["r90_high"]) == (4, 4, 4)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_fine_tune_that_was_quantized_and_dequantized_decides_nothing(bits):
    W, D = low_rank((256, 256), 8, 2e-4)
    tuned = (W.bfloat16().double() + D).float()
    step = tuned.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    found = lp.spectrum({Q_PROJ: W.bfloat16()}, {Q_PROJ: ((tuned / step).round() * step).bfloat16()})
    row = found.table.iloc[0]
    assert row["grid_bits"] == bits
    assert not row[["decidable_signal_rank", "decidable_r50", "decidable_r90"]].any()
    assert found.summary["verdict"].str.startswith("undecidable").all()
    if bits == 8:  # a coarser grid is most of the difference
        assert found.facts["findings"][0]["statement"].startswith("An 8-bit quantized fine-tune (")


def test_the_largest_values_alone_cannot_tell_a_merged_lora_of_that_rank():
    names = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in range(2) for kind in "qkvo"]
    pairs = {name: low_rank((192, 192), 32, 4e-4, seed) for seed, name in enumerate(names)}
    base = {name: W.bfloat16() for name, (W, _) in pairs.items()}
    tuned = {name: (base[name].double() + D).bfloat16() for name, (_, D) in pairs.items()}
    said = [lp.spectrum(base, tuned, top=top).facts["findings"][0]["statement"] for top in (None, 40, 32)]
    assert all(text.startswith("A merged LoRA of rank 32") for text in said[:2])
    assert "The 32 largest singular values show no structure" in said[2]
    assert "a merged LoRA of that rank or more could not be told" in said[2]
