"""Estimates of families without formulas of their own against one real training step on fake tensors, at real sizes.

Mixtures of experts, parallel blocks, encoders, an encoder with a decoder, attention without a fused kernel: the budget
marks them "estimate: generic block"; this says how far off they are. Writes docs/benchmarks-budget-estimates.md.

    python benchmarks/budget_estimates.py            # about 10 minutes on 2 cores
    python benchmarks/budget_estimates.py --quick    # the three smallest, writes nothing
"""

import argparse
import math
from collections.abc import Mapping
from typing import Any, Final

from accuracy import publish
from budget_grid import GIB, said

from lowrank_probe.budgets import Budget
from lowrank_probe.measuring import measure_fake
from lowrank_probe.model_shapes import model_shape
from lowrank_probe.training_steps import Step

BAR: Final = 0.15


def _config(
    kind: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, **more,
    }  # fmt: skip


# Sizes of the published models. No downloads.
FAMILIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "BERT-base": _config("bert", 768, 3072, 12, 12, 12, 30522, hidden_dropout_prob=0.1, tie_word_embeddings=True),
    "T5-base": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12,
        "num_heads": 12, "dropout_rate": 0.1,
    },
    "OPT-1.3B": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "word_embed_proj_dim": 2048, "dropout": 0.1,
    },
    "Phi-2": _config("phi", 2560, 10240, 32, 32, 32, 51200, hidden_act="gelu_new", partial_rotary_factor=0.4),
    "GPT-J-6B": {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64},
    "Falcon-7B": {
        "model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32,
        "num_attention_heads": 71, "multi_query": True, "parallel_attn": True, "bias": False,
    },
    "BLOOM-7B1": {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "Gemma-2-2B": _config("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256, tie_word_embeddings=True),
    "Gemma-3-1B": _config("gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256, tie_word_embeddings=True),
    "OLMo-2-7B": _config("olmo2", 4096, 11008, 32, 32, 32, 100352),
    "Qwen1.5-MoE-A2.7B": _config(
        "qwen2_moe", 2048, 5632, 24, 16, 16, 151936, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    "Qwen3-30B-A3B": _config(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "Mixtral-8x7B": _config("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
}  # fmt: skip
STEPS: Final = (
    Step(method="full"), Step(method="full", checkpointing=True), Step(method="lora"),
    Step(method="lora", checkpointing=True),
    Step(method="lora", targets="attention", checkpointing=True),
)  # fmt: skip
HEADS: Final = ["model", "run", "fake tensors, GiB", "estimate, GiB", "difference", "beside the weights", "peaks in"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the three smallest; writes nothing")
    quick = parser.parse_args().quick
    rows, worst = [], ("", 0.0)
    for model in list(FAMILIES)[: 3 if quick else None]:
        seq = 512 if model.startswith(("BERT", "T5")) else 1024
        for step in STEPS:
            off, cells = run(model, Step(**{**vars(step), "batch": 2, "seq": seq}))
            print(" | ".join(cells), flush=True)
            rows.append(cells)
            worst = max(worst, (f"{model}, {said(step)}", off), key=lambda one: abs(one[1]))
    verdict = (
        f"{len(rows)} runs within {100 * BAR:g} % of the measured peak; worst {100 * worst[1]:+.1f} % ({worst[0]})"
    )
    publish("budget_estimates", "Estimates of families without formulas", NOTE, [("", HEADS, rows)],
            [(verdict, abs(worst[1]) <= BAR)], write=not quick, page="benchmarks-budget-estimates")  # fmt: skip
    return 0 if abs(worst[1]) <= BAR else 1


def run(model: str, step: Step) -> tuple[float, list[str]]:
    """(estimate / measured − 1 of the peak, cells)."""
    found, real = Budget(model_shape(FAMILIES[model]), step), measure_fake(FAMILIES[model], step)
    assert found.activations is not None
    assert found.activations.estimated
    assert found.counts.trained == real.n_trainable
    off = found.allocated_bytes / real.peak - 1
    held = ("weights", "adapter", "optimizer", "inputs")
    made = real.peak - sum(real.components[real.phase].get(name, 0) for name in held)
    own = found.activations.peaks[real.phase]
    alone = own.total / made - 1 if made > 0.01 * real.peak else math.nan
    phase = found.peak_phase
    return off, [
        model, f"{said(step)}, {step.batch} × {step.seq}", f"{real.peak / GIB:.3f}", f"{found.allocated_bytes / GIB:.3f}",
        f"{100 * off:+.1f} %", "–" if math.isnan(alone) else f"{100 * alone:+.1f} %",
        phase if phase == real.phase else f"{phase}; measured {real.phase}",
    ]  # fmt: skip


NOTE: Final = (
    "As in the grid of the families that have formulas: transformers' model, PEFT's adapter (fp32, rank 16), torch's fused "
    'AdamW, bf16, on fake tensors. The difference is of the whole peak; "beside the weights" of all that the step makes '
    "beside weights, adapter and states, gradients included, in the phase that was measured to peak. An adapter on all-linear of a mixture of experts is on "
    "its stacks too, where PEFT says so: each adapted stack is made anew, whole, and kept for the backward pass."
)

if __name__ == "__main__":
    raise SystemExit(main())
