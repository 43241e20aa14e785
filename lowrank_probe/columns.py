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

# Columns that several tables have.
_TENSOR: Final = Column("tensor name, as in the base")
_PLACE: Final = {
    "layer_type": Column("q, k, v, o, gate, up, down, embedding, … from the name"),
    "layer": Column("layer number; missing outside the blocks"),
}
_IN_STACK: Final = _PLACE | {
    "stack": Column('the tower ("vision", "audio", "text"), or "encoder", "decoder"; "" where a model has one stack'),
}
_ADAPTER: Final = Column('which adapter: "" where there is one, else "r4", "r8", …')
_BEFORE_ROUNDING: Final = Column("that of the truncated SVD before its factors are rounded to be stored")
_NORM_OF_COPIES: Final = Column("‖ΔW‖_F over the copies")
_RELATIVE: Final = Column("‖ΔW‖_F / ‖W_base‖_F")
_WHY: Final = Column("why, in words")

TABLE: Final[dict[str, Column]] = {
    "name": _TENSOR,
    **_IN_STACK,
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
    "relative_update": _RELATIVE,
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
        "#{σ > 1.05·noise_edge} (1.1· and of the corrected ΔW: dead-zone): directions that are no independent noise; "
        "capped at r ≤ 8 where a matrix of rank r, stored again, gives ΔW but for noise",
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
    "decidable_signal_rank": Column(
        "whether signal_rank can be trusted: resolved ≥ 0.5, and its end is among the values kept"
    ),
    "decidable_r50": Column("whether the r50 bracket can be trusted: resolved ≥ 0.5"),
    "decidable_r90": Column("whether the r90 bracket can be trusted: resolved ≥ 0.5"),
    "scale": Column("⟨ΔW, W_base⟩ / ‖W_base‖²: the c of the best fit W_tuned ≈ (1 + c)·W_base"),
    "base_alignment": Column("⟨ΔW, W_base⟩ / (‖ΔW‖‖W_base‖): ±1 where the matrix was only scaled"),
    "zeroed_fraction": Column("share of the entries with W_base ≠ 0 that are exactly 0 in W_tuned"),
    "zeroed_energy": Column("share of ‖ΔW‖² in those entries: 1 where pruning is all that happened"),
    "zero_pattern": Column('what the zeros of W_tuned make: "rows", "columns", "2:4" or ""'),
    "grid_bits": Column("bits of the grid that the values of W_tuned lie on and those of W_base do not; missing: none"),
    "grid_axis": Column('along what entries share a scale: "row", "column", or "" (the whole matrix, or no grid)'),
    "grid_group": Column("consecutive entries along it that share one scale; rows·cols: the whole matrix"),
    "grid_levels": Column("most distinct values of W_tuned in such a group (a few lines are looked at)"),
    "base_levels": Column("median number of distinct values of W_base in such a group"),
    "rounded_to": Column(
        '4-bit codebook, "nf4" or "fp4", whose rounding errors ΔW holds beside an update; "" for none'
    ),
    "rounded_side": Column('which side was rounded: "tuned" (an adapter merged into the dequantized base) or "base"'),
    "rounding_energy": Column("share of ‖ΔW‖² that these errors make; missing: none"),
    "rounding_edge": Column("largest σ that they produce, of the errors themselves"),
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
    **_PLACE,
    "base_shape": Column("shape in the base"),
    "tuned_shape": Column("shape in the tuned side"),
    "base_dtype": Column("dtype in the base"),
    "tuned_dtype": Column("dtype in the tuned side"),
    "fro_norm": Column("‖ΔW‖_F where both sides have it"),
    "relative_update": _RELATIVE,
    "note": _WHY,
}

# Of an extraction: one row an adapter and unit, and one for whatever is carried whole or not at all.
EXTRACTION: Final[dict[str, Column]] = {
    "adapter": _ADAPTER,
    "name": Column("module or parameter as PEFT names it, or the tensor that is not carried"),
    "status": Column('"adapted", "rank 0" (nothing kept), "carried whole", "not carried" or "unchanged"'),
    "kind": Column('"linear", "conv1d", "embedding", "conv2d" or "experts"'),
    **_IN_STACK,
    "rows": Column("m, output features of one copy"),
    "cols": Column("n, input features of one copy"),
    "copies": Column("experts that share the rank; 1 for a single matrix"),
    "rank": Column("r of this adapter"),
    "rule": Column(
        "what the rank came from: fixed, energy, budget, signal_rank, r90, half break-even, or what capped it"
    ),
    "parameters": Column("copies·r·(m + n), or the entries of what is carried whole"),
    "fro_norm": _NORM_OF_COPIES,
    "relative_update": _RELATIVE,
    "share": Column("‖ΔW‖_F² of all that changed"),
    "energy": Column("1 − ‖ΔW − BA‖_F² / ‖ΔW‖_F² of the stored factors", source=_EY),
    "relative_error": Column("‖ΔW − BA‖_F / ‖ΔW‖_F of the stored factors"),
    "optimal_error_low": Column(
        "no matrix of this rank has a smaller one: √(1 − Σ_{i≤r} upper σᵢ² / ‖ΔW‖_F²)", source=_EY
    ),
    "optimal_error_high": _BEFORE_ROUNDING,
    "weighted_error": Column(
        "‖Kᵀ(ΔW − BA)L‖_F / ‖KᵀΔWL‖_F of the stored factors, LLᵀ = Σxxᵀ + λ̄I, KKᵀ = Σggᵀ + γ̄I or I, of the inputs "
        "x and output gradients g on the calibration text; missing without one, or for the plain SVD"
    ),
    "weighted_optimal_error": Column("no matrix of this rank has a smaller one (of KᵀΔWL)", source=_EY),
    "method": Column("eigh of the Gram matrix, or certified block Krylov"),
    "note": _WHY,
}

# Of an extraction, by layer type; sums and means over its matrices are of squares.
EXTRACTION_SUMMARY: Final[dict[str, Column]] = {
    "adapter": _ADAPTER,
    "layer_type": Column("layer type, with its stack where it is in several"),
    "n_adapted": Column("modules and parameters that LoRA adapts"),
    "rank_low": Column("the least of their ranks"),
    "rank_high": Column("the largest of their ranks"),
    "parameters": Column("Σ copies·r·(m + n), without what is carried whole"),
    "energy": Column("1 − Σ‖ΔW − BA‖_F² / Σ‖ΔW‖_F² of the stored factors, over what is adapted", source=_EY),
    "relative_error": Column("√(Σ‖ΔW − BA‖_F² / Σ‖ΔW‖_F²) of the stored factors"),
    "optimal_error_low": Column("no matrices of these ranks have a smaller one", source=_EY),
    "optimal_error_high": _BEFORE_ROUNDING,
    "share": Column("‖ΔW‖_F² of all that changed"),
    "carried": Column("the part of it that the factors carry"),
    "truncated": Column("the part that their ranks cut away"),
    "carried_whole": Column("the part in tensors that go whole"),
    "not_carried": Column("the part that the adapter leaves out"),
    "n_unknown": Column("tensors left out whose ‖ΔW‖_F is unknown, and in none of the shares"),
}

# A training run's memory (`probe budget`): one row a run, a part of a run, a run and a card. Bytes are of one card.
BUDGET: Final[dict[str, Column]] = {
    "run": Column("method and recipe; with rank and sequence length where they differ"),
    "method": Column("full, lora, qlora, dora or rslora"),
    "recipe": Column("of what is trained: precision and optimizer"),
    "rank": Column("of the adapter; missing for full fine-tuning"),
    "batch": Column("sequences a card and step"),
    "seq": Column("tokens a sequence; missing where activations are not known"),
    "n_parameters": Column("of the model"),
    "n_trainable": Column("of the adapter, or of the model"),
    "trainable_share": Column("n_trainable / (n_parameters + the adapter's), as PEFT prints it"),
    "bytes_per_trained": Column("weights + fp32 master + gradients + optimizer states of a trained parameter", "B"),
    "bytes_per_frozen": Column("of a parameter of the frozen base in the mean; 0 where all are trained", "B"),
    "state_bytes": Column("weights, gradients, optimizer states: what batch and sequence do not change", "B"),
    "peak_phase": Column('forward, loss, backward or step; "states" where activations are not known'),
    "total_bytes": Column("at the peak, with the reserve", "B"),
    "total_gib": Column("total_bytes / 2³⁰", "GiB"),
    "total_gb": Column("total_bytes / 10⁹", "GB"),
    "adapter_file_bytes": Column("adapter_model.safetensors as PEFT saves it; missing for full fine-tuning", "B"),
    "smallest_card": Column("the smallest common GPU that holds it alone"),
    "priced_card": Column("the card that --price is of: --gpu's, or an H100; missing without --price"),
    "n_cards_priced": Column("the least number of those that hold it; missing where no number is enough"),
    "price_per_hour": Column("n_cards_priced × --price"),
    "source": Column("where the recipe is from"),
}

BUDGET_COMPONENTS: Final[dict[str, Column]] = {
    "component": Column("what takes the memory"),
    "run": BUDGET["run"],
    "forward_gib": Column("when the forward pass peaks", "GiB"),
    "loss_gib": Column("when the loss peaks: logits and their gradient", "GiB"),
    "backward_gib": Column("when the backward pass peaks", "GiB"),
    "step_gib": Column("in the optimizer's step", "GiB"),
    "states_gib": Column("what stays, where activations are not known", "GiB"),
    "formula": Column("how the bytes come about"),
    "source": Column("where the formula is from"),
}

BUDGET_CARDS: Final[dict[str, Column]] = {
    "card": Column("card, chip or computer, with its size as sold"),
    "run": BUDGET["run"],
    "usable_gib": Column("what a process can have of it", "GiB"),
    "usable_from": Column("the total that PyTorch names on it, the HBM that XLA compiles for, or an estimate"),
    "bf16": Column("whether it computes in bfloat16 by hardware"),
    "runs": Column("whether the run can be had there: 4-bit weights and 8-bit Adam need bitsandbytes' kernels"),
    "fits": Column("whether it runs there and one has room"),
    "stage_1": Column("least number of cards with ZeRO stage 1; missing where no number is enough"),
    "stage_2": Column("the same with stage 2 of ZeRO or FSDP"),
    "stage_3": Column("the same with stage 3 of ZeRO or FSDP"),
    "largest_batch": Column("the largest batch that fits on one card at this sequence length"),
    "largest_seq": Column("the longest sequence that fits on one card at this batch, at most the model's positions"),
}

# Energy against rank of an extraction's targets.
CURVES: Final[dict[str, Column]] = {
    "name": Column("module or parameter as PEFT names it"),
    **_IN_STACK,
    "rank": Column("r, up to the largest rank that was factorised"),
    "fro_norm": _NORM_OF_COPIES,
    "energy": Column("1 − ‖ΔW − BA‖_F² / ‖ΔW‖_F² of the stored factors cut to r", source=_EY),
    "energy_upper": Column("no matrix of rank r keeps more", source=_EY),
}

# Of a trajectory.
SIMILARITY: Final[dict[str, Column]] = {
    "name": _TENSOR,
    **_IN_STACK,
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
    "name": _TENSOR,
    **_IN_STACK,
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
    **_PLACE,
    "rows": Column("m, output features"),
    "cols": Column("n, input features; of a convolution in·kernel"),
    "copies": Column("E, the matrices that share the rank: 1, or the experts of a parameter"),
    "rank_before": Column("R, the rank it had"),
    "rank": Column("r, the rank it has now; 0: left out, because ΔW = 0 or by the budget"),
    "rule": Column('what bound the rank: "fixed", "energy", "budget", "max_rank", "its own rank", …'),
    "parameters": Column("E·r·(m + n)"),
    "fro_norm": Column("‖ΔW‖_F of the adapter as it was, ΔW = scaling·B·A"),
    "energy": Column("Σ_{i≤r} σ² / ‖ΔW‖_F²: what any rank r can keep", source=_EY),
    "optimum": Column("√(1 − energy): the least ‖ΔW − BA‖_F / ‖ΔW‖_F of that rank", source=_EY),
    "error": Column("‖ΔW − BA‖_F / ‖ΔW‖_F of the new factors as stored (rounded)"),
}

# Of a merged model.
MERGED: Final[dict[str, Column]] = {
    "name": _TENSOR,
    **_PLACE,
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
    **_PLACE,
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

# Of the functional rank. The loss is what facts["merit"] says; nats where it is one.
_GROUP: Final = {
    "group": Column('layer type or target; "all": every matrix that is truncated; "" for base and tuned'),
    "how": Column(
        '"alone": only this group is truncated; "all"; "leave out": all but this group; "base", "tuned": as they are'
    ),
}
_RESAMPLED: Final = "end of its 95 % interval over resampled sequences"
EVALUATION: Final[dict[str, Column]] = {
    **_GROUP,
    "rank": Column("r; each matrix is truncated to min(r, k), k = min(m, n); 0: the base's own values"),
    "full": Column(
        "whether r is the largest k of the group: nothing is truncated, the weights are computed all the same"
    ),
    "n_matrices": Column("matrices that are truncated"),
    "parameters": Column("Σ r·(m + n): what LoRA of that rank on them has"),
    "loss": Column("mean over the judged tokens of the text", "nats a token"),
    "loss_low": Column(f"lower {_RESAMPLED}", "nats a token"),
    "loss_high": Column(f"upper {_RESAMPLED}", "nats a token"),
    "excess": Column("loss − loss of the tuned model", "nats a token"),
    "excess_low": Column(f"lower {_RESAMPLED}, paired", "nats a token"),
    "excess_high": Column(f"upper {_RESAMPLED}, paired", "nats a token"),
    "kept_gain": Column("(loss of base − loss) / (loss of base − loss of tuned); missing where tuned gained nothing"),
    "perplexity": Column("exp(loss); missing where the loss is none on tokens"),
    "kl_nats": Column("mean KL(tuned ‖ this) over n_kl_tokens evenly spaced outputs; missing without a head", "nats"),
    "n_tokens": Column("outputs that the loss is a mean over"),
    "n_kl_tokens": Column("outputs that kl_nats is a mean over"),
}
FUNCTIONAL: Final[dict[str, Column]] = {
    **_GROUP,
    "n_matrices": Column("matrices that are truncated"),
    "functional_rank": Column(
        "smallest r of the grid whose excess, and that of every larger one, is ≤ tolerance; missing: > largest_rank"
    ),
    "low": Column(
        "lower end of the smallest r, 95 % of resampled sequences: 1 + the largest r of the grid that falls short; "
        "missing: > largest_rank"
    ),
    "high": Column("upper end, an r of the grid; missing: > largest_rank"),
    "largest_rank": Column("the largest r of the grid"),
    "parameters": Column("Σ r·(m + n) at the functional rank; missing where it is not reached"),
    "tolerance_nats": Column("by how much the loss may exceed the tuned model's", "nats a token"),
}

_OF_THE_RUN: Final = {
    "method": Column('"full", or the variant of LoRA: lora, rslora, dora, pissa, lora+'),
    "targets": Column('what it adapts; "" for full'),
}
TRAINING: Final[dict[str, Column]] = {
    "label": Column("the run's directory in runs/"),
    **_OF_THE_RUN,
    "rank": Column("r of the adapter; 0 for full"),
    "seed": Column("of the order of the data, the same for all methods, and of the adapter's start"),
    "lr": Column("peak learning rate"),
    "alpha": Column("α of the adapter; missing for full"),
    "n_trained": Column("trained parameters"),
    "steps": Column("optimizer steps that were taken"),
    "loss": Column("held-out loss at the end; missing where it is not finite", "nats a token"),
    "excess": Column("loss − loss of the full fine-tune of that seed", "nats a token"),
    "lowest_loss": Column("lowest held-out loss on the way", "nats a token"),
    "diverged": Column("whether a loss or gradient was NaN or Inf, on the way or at the end: then it is no evidence"),
    "seconds": Column("of training, its held-out losses included", "s"),
    "tokens_per_s": Column("training tokens over seconds; missing where the run was resumed", "1/s"),
    "peak_bytes": Column("torch.cuda.max_memory_allocated; missing without CUDA", "B"),
    "predicted_bytes": Column("the same as `probe budget` predicts; missing where it has no formula", "B"),
    "health": Column("names of the findings on its health"),
}
HYPOTHESIS: Final[dict[str, Column]] = {
    "layer_type": Column("a group that was trained, or a layer type"),
    "n_matrices": Column("matrices of it that changed in the full run"),
    "verdict": Column("low-rank at r=…, not low-rank, or undecidable"),
    "decided_by": Column("trained, functional or spectral: the evidence that decides"),
    "trained_rank": Column(
        "smallest r from which on LoRA on it alone is within the tolerance of full; missing: > trained_largest"
    ),
    "trained_low": Column("lower end of the smallest r, as `FUNCTIONAL`, over resampled seeds and sequences"),
    "trained_high": Column("upper end"),
    "trained_largest": Column("the largest rank that was trained"),
    "own_rank": Column("smallest r from which on it is within the tolerance of its own largest rank"),
    "trained_excess": Column("mean loss above full at the largest rank", "nats a token"),
    "trained_spread": Column("largest standard deviation over seeds of a rank's loss", "nats a token"),
    "functional_rank": Column("as `FUNCTIONAL`, of the full run with this group truncated alone"),
    "functional_low": Column("as `FUNCTIONAL`'s low"),
    "functional_high": Column("as `FUNCTIONAL`'s high"),
    "functional_largest": Column("the largest rank to which it was truncated"),
    "r90_low": Column("lower end of the rank that holds 90 % of ‖ΔW‖² in the full run, median over its matrices"),
    "r90_high": Column("upper end"),
    "break_even_rank": Column("mn/(m + n), median over its matrices: from there on factors are no smaller"),
    "evidence": Column("what each kind of evidence says"),
    "missing": Column("which evidence would decide it"),
}
EQUAL_PARAMETERS: Final[dict[str, Column]] = {
    "n_parameters": Column("trained parameters"),
    **_OF_THE_RUN,
    "rank": Column("the rank at which it has so many, interpolated"),
    "loss": Column("mean held-out loss over seeds, linear in log parameters between trained ranks", "nats a token"),
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
