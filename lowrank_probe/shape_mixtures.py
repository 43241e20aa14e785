"""Mixtures of experts: their weights, what one token meets of them, and what LoRA means on them.

Legend: E experts, k of them a token, m out, n in. transformers 5 holds the experts of a layer as two stacks,
`mlp.experts.gate_up_proj` (E, 2·width, hidden) and `mlp.experts.down_proj` (E, hidden, width); in files they may be one
by one. The router, `mlp.gate` (E, hidden), is a bare parameter too.
"""

import math
from collections.abc import Iterable
from typing import Final

from lowrank_probe.errors import CheckpointError
from lowrank_probe.shape_fields import Fields, Sizes, attention, decoder_sizes, gated_mlp, head, norms, weight
from lowrank_probe.weight_shapes import REWRITTEN, Weight

_BLOCK: Final = "model.layers.*."


def _experts(s: Sizes, layers: Iterable[int]) -> list[Weight]:
    """Stacks and router; `s.intermediate` is the width of one expert."""
    numbers = tuple(layers)
    return [
        weight(f"{_BLOCK}mlp.gate", "parameter", (s.experts, s.hidden), layers=numbers),
        weight(f"{_BLOCK}mlp.experts.gate_up_proj", "parameter", (s.experts, 2 * s.intermediate, s.hidden),
               layers=numbers),
        weight(f"{_BLOCK}mlp.experts.down_proj", "parameter", (s.experts, s.hidden, s.intermediate), layers=numbers),
    ]  # fmt: skip


def _with_experts(s: Sizes, intermediate: int, experts: int, per_token: int) -> Sizes:
    if per_token > experts:
        raise CheckpointError(f"config: num_experts_per_tok is {per_token}, expected at most its {experts} experts")
    return Sizes(
        s.hidden, s.layers, s.heads, s.kv_heads, s.head_dim, intermediate, s.vocab, s.tied, True, experts, per_token
    )


def _around(s: Sizes) -> list[Weight]:
    return [
        weight("model.embed_tokens", "embedding", (s.vocab, s.hidden)),
        *norms(_BLOCK, ["input_layernorm", "post_attention_layernorm"], s.hidden, layers=s.blocks),
        *norms("model.", ["norm"], s.hidden), head("lm_head", s),
    ]  # fmt: skip


def mixtral(f: Fields) -> tuple[Sizes, list[Weight]]:
    """Mixtral: every layer's MLP is a mixture."""
    s = decoder_sizes(f, kv_heads=8)
    s = _with_experts(s, s.intermediate, f.size("num_local_experts", "num_experts"), f.size("num_experts_per_tok"))
    return s, [*_around(s), *attention(f"{_BLOCK}self_attn", s), *_experts(s, s.blocks)]


def qwen_moe(f: Fields) -> tuple[Sizes, list[Weight]]:
    """Qwen2-MoE, with a shared expert behind a gate of its own, and Qwen3-MoE; some layers may be dense."""
    second = f.model_type == "qwen2_moe"
    dense = decoder_sizes(f, kv_heads=16 if second else 4)
    experts = f.size("num_experts", "num_local_experts")
    s = _with_experts(dense, f.size("moe_intermediate_size"), experts, f.size("num_experts_per_tok"))
    step, without = f.size("decoder_sparse_step", default=1), f.config.get("mlp_only_layers") or []
    sparse = [i for i in s.blocks if i not in without and (i + 1) % step == 0]
    if second:
        found = attention(f"{_BLOCK}self_attn", s, f.flag("qkv_bias", True))
        found += gated_mlp(f"{_BLOCK}mlp.shared_expert", s, f.size("shared_expert_intermediate_size"), layers=sparse)
        found.append(weight(f"{_BLOCK}mlp.shared_expert_gate", "linear", (1, s.hidden), layers=sparse))
    else:
        bias = f.flag("attention_bias", False)
        found = attention(f"{_BLOCK}self_attn", s, bias, bias)
        found += norms(f"{_BLOCK}self_attn.", ["q_norm", "k_norm"], s.head_dim, layers=s.blocks)
    found += _experts(s, sparse)
    found += gated_mlp(f"{_BLOCK}mlp", s, dense.intermediate, layers=[i for i in s.blocks if i not in sparse])
    return s, [*_around(s), *(one for one in found if one.count)]


def active_parameters(weights: Iterable[Weight], per_token: int) -> int:
    """Σ parameters, of a stack of E experts k/E: what one token meets. Tables, router, shared experts count whole."""
    return sum(
        one.count * per_token * math.prod(one.shape[1:]) if _is_stack(one) and per_token else one.n_parameters
        for one in weights
    )


def mixture_notes(model_type: str, weights: Iterable[Weight], per_token: int) -> tuple[str, ...]:
    """What a reader of a mixture's counts must know; () where there are no stacks of experts."""
    stack = next((one for one in weights if _is_stack(one)), None)
    if stack is None:
        return ()
    share = (
        f"{per_token} of {stack.copies} experts a layer" if per_token else "all experts, since no config says how many"
    )
    active = (
        f"memory holds all parameters; active ones, what one token meets, are {share}, and tables, attention, routers "
        "and shared experts whole"
    )
    if model_type in REWRITTEN:
        linear = (
            "all-linear here adapts experts and routers too, gate and up, fused in one stack, at twice the rank: PEFT "
            "0.21 takes what was linear in transformers 4"
        )
    else:
        linear = (
            "all-linear adapts no stack of experts and no router, which are bare parameters in transformers 5; targets "
            "mlp, expert types or everything count them as PEFT's target_parameters, rank · experts · (m + n)"
        )
    return active, linear


def _is_stack(one: Weight) -> bool:
    return one.kind == "parameter" and len(one.shape) == 3
