"""Every column of the tables, documented once; `python -m lowrank_probe.columns` prints the README's table.

A `Column` gives the quantity, its unit, its formula and its source. Unknown values are NaN, never a made-up number.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Column:
    """What a column means: one sentence with its formula, its unit, and where the definition comes from."""

    meaning: str
    unit: str = ""
    source: str = ""


_EY: Final = "Eckart & Young 1936; Biderman et al. 2024"
_RV: Final = "Roy & Vetterli 2007"
_MP: Final = "Marchenko & Pastur 1967"
_BN: Final = "Benaych-Georges & Nadakuditi 2012"
_BBP: Final = "Baik, Ben Arous & Péché 2005"

TABLE: Final[dict[str, Column]] = {
    "name": Column("tensor name, as in the base"),
    "layer_type": Column("q, k, v, o, gate, up, down, embedding, … from the name"),
    "layer": Column("layer number; missing outside the blocks"),
    "stack": Column('"encoder", "decoder" or ""'),
    "rows": Column("m, output features"),
    "cols": Column("n, input features"),
    "base_dtype": Column("dtype of the base as stored"),
    "tuned_dtype": Column("dtype of the tuned side as stored; for an adapter that of its factors"),
    "storage": Column("the precision the tuned values really have: a bf16 model saved as F32 says BF16"),
    "method": Column("how σ was computed: gram, svd, krylov (top K) or factored_qr (adapter)"),
    "compute_dtype": Column("dtype of the last arithmetic step"),
    "n_kept": Column("number of singular values computed; fewer than min(m, n) with --top"),
    "n_resolved": Column("leading singular values certain to 1e-6 of themselves"),
    "sigma_error": Column("largest certified |σ̂ − σ| / σ₁ over the values kept"),
    "energy_error": Column("certified error of every energy fraction"),
    "fro_norm": Column("‖ΔW‖_F, from the entries in float64"),
    "base_norm": Column("‖W_base‖_F"),
    "relative_update": Column("‖ΔW‖_F / ‖W_base‖_F"),
    "cosine": Column("⟨W_base, W_tuned⟩ / (‖W_base‖‖W_tuned‖); ≈ 0 for unrelated models"),
    "spectral_norm": Column("σ₁"),
    "nuclear_norm": Column("Σσ"),
    "stable_rank": Column("‖ΔW‖_F² / σ₁²", source="Rudelson & Vershynin 2007"),
    "effective_rank": Column("exp H(σ/Σσ)", source=_RV),
    "energy_effective_rank": Column("exp H(σ²/Σσ²)", source=_RV),
    "participation_ratio": Column("(Σσ²)² / Σσ⁴"),
    "numerical_rank": Column("#{σ > σ₁·max(m, n)·ε(float32)}", source="LAPACK convention"),
    "hard_threshold_rank": Column("#{σ > ω(β)·median σ}", source="Gavish & Donoho 2014"),
    "break_even_rank": Column("mn/(m + n): above it the factors are larger than ΔW"),
    **{
        f"r{100 * p:.0f}": Column(f"smallest r with energy(r) ≥ {p}, of ΔW as stored", source=_EY)
        for p in (0.5, 0.9, 0.95, 0.99)
    },
    **{
        f"null_r{100 * p:.0f}": Column(f"r{100 * p:.0f} of Gaussian noise of the same shape", source=_MP)
        for p in (0.5, 0.9, 0.95, 0.99)
    },
    "relative_r50": Column("best estimate of the true r50 (r50_denoised) / null_r50; 1 = like noise"),
    "relative_r90": Column("best estimate of the true r90 (r90_denoised) / null_r90; 1 = like noise"),
    **{f"energy_{r}": Column(f"Σ_{{i≤{r}}} σ² / ‖ΔW‖_F²", source=_EY) for r in (4, 8, 16, 32, 64)},
    "unchanged_fraction": Column("share of entries with ΔW = 0 exactly"),
    "noise_model": Column(
        'what storage did: "none", "rounding" (independent noise), "dead-zone" (known quantizer) or "quantized"'
    ),
    "noise_std": Column("rms storage error of an entry: √mean(ulp²/12), or of the corrected entries (dead-zone)"),
    "noise_edge": Column(
        "largest σ that storage errors alone produce, simulated with each entry's own size", source="ours"
    ),
    "edge_ratio": Column("noise_edge / (noise_std·(√m + √n)): 1 for evenly rounded weights"),
    "resolved": Column("share of ‖ΔW‖² that the stored entries resolve; below 0.5 nothing is decided", source="ours"),
    "signal_rank": Column(
        "#{σ > 1.05·noise_edge} (1.1· and of the corrected ΔW: dead-zone): at least so many directions are no noise",
        source=_BBP,
    ),
    "denoised_fro_norm": Column("‖ΔW‖_F with the storage error taken out"),
    **{
        f"r{100 * p:.0f}_denoised": Column(
            f"best estimate of the true r{100 * p:.0f}: denoised energy ≥ {p}·denoised_fro_norm²; missing: not reached",
            source=_BN,
        )
        for p in (0.5, 0.9)
    },
    **{
        f"r{100 * p:.0f}_{end}": Column(f"{word} end of the bracket of the true r{100 * p:.0f}", source="ours")
        for p in (0.5, 0.9)
        for end, word in (("low", "lower"), ("high", "upper"))
    },
    "decidable_signal_rank": Column("whether signal_rank can be trusted: resolved ≥ 0.5"),
    "decidable_r50": Column("whether the r50 bracket can be trusted: resolved ≥ 0.5"),
    "decidable_r90": Column("whether the r90 bracket can be trusted: resolved ≥ 0.5"),
    "scale": Column("⟨ΔW, W_base⟩ / ‖W_base‖²: the c of the best fit W_tuned ≈ (1 + c)·W_base"),
    "base_alignment": Column("⟨ΔW, W_base⟩ / (‖ΔW‖‖W_base‖): ±1 where the matrix was only scaled"),
    "zeroed_fraction": Column("share of the entries with W_base ≠ 0 that are exactly 0 in W_tuned"),
    "zeroed_energy": Column("share of ‖ΔW‖² in those entries: 1 where pruning is all that happened"),
    "zero_pattern": Column('what the zeros of W_tuned make: "rows", "columns", "2:4" or ""'),
    "grid_bits": Column("bits of the grid that the values of W_tuned lie on and those of W_base do not; missing: none"),
    "grid_group": Column("consecutive entries of a row that share one scale; cols: a row, rows·cols: the whole matrix"),
    "grid_levels": Column("most distinct values of W_tuned in such a group (a few rows are looked at)"),
    "base_levels": Column("median number of distinct values of W_base in such a group"),
    "seconds": Column("reading and computing this matrix", unit="s"),
}

SUMMARY: Final[dict[str, Column]] = {
    "layer_type": Column("the layer type"),
    "n_matrices": Column("matrices analysed"),
    "relative_update": Column("median ‖ΔW‖_F / ‖W_base‖_F"),
    "stable_rank": Column("median stable rank"),
    "signal_rank": Column("median signal rank; missing where undecidable"),
    "r50_low": Column("median lower end of r50"),
    "r50_high": Column("median upper end of r50"),
    "null_r50": Column("median null r50"),
    "r90_low": Column("median lower end of r90"),
    "r90_high": Column("median upper end of r90"),
    "null_r90": Column("median null r90"),
    **{f"energy_{r}": Column(f"median energy kept by rank {r}, of ΔW as stored") for r in (4, 8, 16, 32, 64)},
    "unchanged_fraction": Column("median share of entries that did not move"),
    "verdict": Column("low-rank at r=…, not low-rank, or undecidable (and why)"),
    "evidence": Column("the numbers that led to the verdict"),
}

LEDGER: Final[dict[str, Column]] = {
    "name": Column("tensor name in the base, or in the tuned side where the base has none"),
    "tuned_name": Column("its name in the tuned side"),
    "status": Column(
        "analysed, unchanged, vector, only in base, only in tuned, shape differs, tied, excluded, not a matrix, "
        "not a weight; "
        "pending in an interrupted run"
    ),
    "layer_type": Column("layer type from the name"),
    "layer": Column("layer number"),
    "base_shape": Column("shape in the base"),
    "tuned_shape": Column("shape in the tuned side"),
    "base_dtype": Column("dtype in the base"),
    "tuned_dtype": Column("dtype in the tuned side"),
    "fro_norm": Column("‖ΔW‖_F where both sides have it"),
    "relative_update": Column("‖ΔW‖_F / ‖W_base‖_F"),
    "note": Column("why, in words"),
}

# Of a trajectory.
SIMILARITY: Final[dict[str, Column]] = {
    "name": Column("tensor name, as in the base"),
    "layer_type": Column("layer type from the name"),
    "layer": Column("layer number; missing outside the blocks"),
    "stack": Column('"encoder", "decoder" or ""'),
    "step_a": Column("label of step A"),
    "step_b": Column("label of step B"),
    "i": Column("directions taken of A"),
    "j": Column("directions taken of B"),
    "phi_left": Column("‖U_A[:, :i]ᵀ U_B[:, :j]‖_F² / min(i, j), output side", source="Hu et al. 2021, eq. 4"),
    "phi_right": Column("the same of V, input side", source="Hu et al. 2021, eq. 4"),
    "phi_random_left": Column("expectation for independent random subspaces: max(i, j)/m"),
    "phi_random_right": Column("expectation for independent random subspaces: max(i, j)/n"),
    "control_left": Column("φ of two random subspaces drawn for this matrix and these steps (seeded)"),
    "control_right": Column("the same on the input side"),
    "phi_ceiling_left": Column(
        "φ that storage noise leaves of two updates with the same directions", source="BGN 2012"
    ),
    "phi_ceiling_right": Column("the same on the input side", source="BGN 2012"),
    "gap_a": Column("σᵢ/σᵢ₊₁ of A: near 1 the i-th direction could as well be the next one"),
    "gap_b": Column("σⱼ/σⱼ₊₁ of B"),
    "trusted": Column("σᵢ of A and σⱼ of B are above the noise edge, and both subspaces are settled"),
}

AMPLIFICATION: Final[dict[str, Column]] = {
    "name": Column("tensor name, as in the base"),
    "layer_type": Column("layer type from the name"),
    "layer": Column("layer number; missing outside the blocks"),
    "stack": Column('"encoder", "decoder" or ""'),
    "step": Column("label of the step"),
    "r": Column("number of directions"),
    "fro_norm": Column("‖ΔW‖_F"),
    "projected_own": Column("‖U_rᵀ W V_r‖_F, U_r, V_r of ΔW", source="Hu et al. 2021, Table 7"),
    "projected_base": Column("the same with W's own leading directions: √Σ_{i≤r} σᵢ(W)²", source="Hu et al. 2021"),
    "projected_random": Column(
        "the same with random directions (seeded); r‖W‖_F/√(mn) in the mean", source="Hu et al."
    ),
    "factor": Column("amplification: ‖ΔW‖_F / ‖U_rᵀ W V_r‖_F", source="Hu et al. 2021, §7.3"),
    "trusted": Column("the first r directions are above the noise edge and settled"),
}

# Of an adapter at other ranks.
RESIZED: Final[dict[str, Column]] = {
    "name": Column("name of the base tensor that is adapted"),
    "layer_type": Column("layer type from the name"),
    "layer": Column("layer number; missing outside the blocks"),
    "rows": Column("m, output features"),
    "cols": Column("n, input features; of a convolution in·kernel"),
    "copies": Column("E, the matrices that share the rank: 1, or the experts of a parameter"),
    "rank_before": Column("R, the rank it had"),
    "rank": Column("r, the rank it has now; 0: ΔW = 0, so it was left out"),
    "rule": Column('what bound the rank: "fixed", "energy", "budget", "max_rank", "its own rank", …'),
    "parameters": Column("E·r·(m + n)"),
    "fro_norm": Column("‖ΔW‖_F of the adapter as it was, ΔW = scaling·B·A"),
    "energy": Column("Σ_{i≤r} σ² / ‖ΔW‖_F²: what any rank r can keep", source=_EY),
    "optimum": Column("√(1 − energy): the least ‖ΔW − BA‖_F / ‖ΔW‖_F of that rank", source=_EY),
    "error": Column("‖ΔW − BA‖_F / ‖ΔW‖_F of the new factors as stored (rounded)"),
}

# Of a merged model.
MERGED: Final[dict[str, Column]] = {
    "name": Column("tensor name, as in the base"),
    "layer_type": Column("layer type from the name"),
    "layer": Column("layer number; missing outside the blocks"),
    "shape": Column("shape as stored"),
    "dtype": Column("dtype as stored"),
    "change": Column('"lora", "whole" (replaced), "rows" (of tokens), "bias", joined by +; "" copied as it is'),
    "adapters": Column("numbers of the adapters that change it, from 1"),
    "fro_norm": Column("‖Σ w·ΔW‖_F"),
    "relative_update": Column("‖Σ w·ΔW‖_F / ‖W_base‖_F"),
    "rounding": Column("‖merged − (base + Σ w·ΔW)‖_F / ‖Σ w·ΔW‖_F: what storing costs of the update"),
    "check": Column(
        "at most 1; the larger of |merged − sum| over half a step of its dtype, entry by entry, and "
        "|sum·x − (W·x + Σ w·scaling·B(A·x))| over the rounding of float64, for random x"
    ),
    "file": Column("the file it is in"),
}

OVERLAP: Final[dict[str, Column]] = {
    "name": Column("tensor name, as in the base; [3]: expert 3"),
    "layer_type": Column("layer type from the name"),
    "layer": Column("layer number; missing outside the blocks"),
    "adapter_a": Column("number of adapter A, from 1"),
    "adapter_b": Column("number of adapter B"),
    "rank_a": Column("rank of A's ΔW, numerically"),
    "rank_b": Column("rank of B's ΔW"),
    "phi_left": Column("‖U_Aᵀ U_B‖_F² / min(rank), output side", source="Hu et al. 2021, eq. 4"),
    "phi_right": Column("‖V_Aᵀ V_B‖_F² / min(rank), input side", source="Hu et al. 2021, eq. 4"),
    "phi_random_left": Column("expectation for independent random subspaces: max(rank)/m"),
    "phi_random_right": Column("the same on the input side: max(rank)/n"),
    "control_left": Column("φ of two random subspaces drawn for this matrix and these adapters (seeded)"),
    "control_right": Column("the same on the input side"),
    "cosine": Column("⟨w_A·ΔW_A, w_B·ΔW_B⟩ / (‖w_A·ΔW_A‖‖w_B·ΔW_B‖)"),
    "sign_conflict": Column("share of the entries that both change, in opposite directions; ½ by chance"),
}


def markdown() -> str:
    """The README's table of columns."""
    lines = ["| column | meaning | source |", "|---|---|---|"]
    for name, column in TABLE.items():
        unit = f" ({column.unit})" if column.unit else ""
        lines.append(f"| `{name}` | {column.meaning.replace('|', chr(92) + '|')}{unit} | {column.source or '–'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())  # noqa: T201
