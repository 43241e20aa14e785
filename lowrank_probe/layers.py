"""Tensor name → layer type, layer number and stack. Names only; reads nothing.

The types are the field's short names: q k v o qkv · gate up down · embedding position_embedding lm_head · cross_q …
for cross-attention · router. A name that matches no rule falls back to its module's own last name, so that nothing is
left without a type.
"""

import re
from dataclasses import dataclass
from typing import Final

# (pattern on the module's dotted name without ".weight", type). The first match wins; specific ones come first.
_RULES: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(rf"(?:^|\.)(?:{pattern})$"), layer_type)
    for pattern, layer_type in (
        # fused projections
        (r"crossattention\.c_attn", "kv"),
        (r"c_attn|qkv_proj|query_key_value|Wqkv|in_proj|attn\.qkv", "qkv"),
        (r"attention\.wo", "o"),
        (r"attention\.wq", "q"),
        (r"attention\.wk", "k"),
        (r"attention\.wv", "v"),
        # output of attention (before the plain q/k/v names, since both sides end in similar words)
        (r"attention\.output\.dense|attention\.dense|attn\.c_proj|o_proj|out_proj|Wo|attention\.out_lin", "o"),
        (r"self_attn\.dense|self_attention\.dense|SelfAttention\.o|EncDecAttention\.o|attn\.proj|attention\.o", "o"),
        (r"crossattention\.c_proj", "o"),
        # q, k, v
        (r"q_proj|q_attn|query|q_lin|SelfAttention\.q|EncDecAttention\.q|attention\.q", "q"),
        (r"k_proj|key|k_lin|SelfAttention\.k|EncDecAttention\.k|attention\.k", "k"),
        (r"v_proj|value|v_lin|SelfAttention\.v|EncDecAttention\.v|attention\.v", "v"),
        # MLP
        (r"gate_up_proj", "gate_up"),
        (r"gate_proj|wi_0|w1", "gate"),
        (r"up_proj|wi_1|w3|intermediate\.dense|mlp\.c_fc|fc1|fc_1|lin1|wi|dense_h_to_4h|ffn", "up"),
        (r"down_proj|w2|output\.dense|mlp\.c_proj|fc2|fc_2|lin2|wo|dense_4h_to_h|ffn_output", "down"),
        (r"(?:mlp|block_sparse_moe)\.(?:gate|router)|router", "router"),
        # ends of the model
        (r"embed_tokens|wte|word_embeddings|tok_embedding|tok_embeddings|embed_in|shared|token_embedding", "embedding"),
        (r"wpe|position_embeddings|pos_embedding|embed_positions|position_embedding", "position_embedding"),
        (r"token_type_embeddings", "token_type_embedding"),
        (r"lm_head|embed_out|predictions\.decoder|lm_head\.decoder|decoder\.fc_out|output", "lm_head"),
        (r"pooler\.dense", "pooler"),
    )
)
_CROSS: Final = re.compile(r"crossattention|cross_attn|EncDecAttention|encoder_attn|encoder_attention|cross_attention")
_NUMBER: Final = re.compile(r"\.(\d+)(?:\.|$)")
_CONV1D: Final = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)$")

# Order in which types are shown: as data flows through a block.
ORDER: Final = (
    "embedding", "position_embedding", "token_type_embedding", "q", "k", "v", "qkv", "o", "cross_q", "cross_k",
    "cross_v", "cross_kv", "cross_qkv", "cross_o", "gate", "up", "gate_up", "down", "router", "pooler", "lm_head",
)  # fmt: skip

BASE_PREFIXES: Final = (
    "model.", "transformer.", "bert.", "roberta.", "distilbert.", "albert.", "electra.", "deberta.", "gpt_neox.",
    "base_model.", "base_model.model.", "model.model.", "language_model.", "encoder.", "module.", "vit.", "esm.",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor sits: layer type, layer number (None outside the blocks), stack ("", "encoder", "decoder")."""

    layer_type: str
    layer: int | None
    stack: str


def place(name: str) -> Place:
    """Layer type, number and stack of a tensor name.

    >>> place("model.layers.3.self_attn.q_proj.weight")
    Place(layer_type='q', layer=3, stack='')
    """
    module = module_of(name)
    number = _NUMBER.search(module)
    stack = next((s for s in ("encoder", "decoder") if re.search(rf"(?:^|\.){s}\.", module)), "")
    layer_type = next((t for pattern, t in _RULES if pattern.search(module)), None)
    if layer_type is None:
        layer_type = re.sub(r"\.\d+$", "", module).rpartition(".")[2] or module
    if _CROSS.search(module) and layer_type in {"q", "k", "v", "o", "qkv", "kv"}:
        layer_type = f"cross_{layer_type}"
    return Place(layer_type, int(number[1]) if number else None, stack)


def module_of(name: str) -> str:
    """The module's dotted name: the tensor name without its last `.weight` / `.bias` / `_weight` / `_bias`."""
    return re.sub(r"[._](?:weight|bias)$", "", name)


def is_conv1d(name: str, model_type: str | None) -> bool:
    """Whether a 2-D weight is stored (in, out), as GPT-2's `Conv1D` does.

    By the config's model type where there is one, else by GPT-2's own names (no other family uses them with `h.N.`).
    """
    module = module_of(name)
    if not _CONV1D.search(module):
        return False
    if model_type is not None:
        return model_type in {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
    return re.search(r"(?:^|\.)h\.\d+\.(?:attn|mlp|crossattention)\.", module) is not None


def matches(name: str, pattern: str) -> bool:
    """Whether a user's pattern selects a tensor.

    With `*` or a dot it is a glob on the whole name, tried with and without `.weight`, anchored at component
    boundaries; without either it matches any one dotted component, so `q_proj` works. A layer type matches too.
    """
    if "*" not in pattern and "." not in pattern:
        return pattern in name.split(".") or pattern == place(name).layer_type
    body = re.escape(pattern).replace(r"\*", ".*")
    return re.search(rf"(?:^|\.){body}(?:\.|$)", name) is not None


def sort_key(layer_type: str) -> tuple[int, str]:
    """Key that sorts layer types as data flows, unknown ones between the blocks and the head."""
    return (ORDER.index(layer_type), "") if layer_type in ORDER else (len(ORDER) - 2, layer_type)
