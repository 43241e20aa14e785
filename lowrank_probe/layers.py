"""Tensor name → layer type, layer and expert number, stack; LoRA targets per architecture. Names only; reads nothing.

The types are the field's short names: q k v o qkv · gate up down · embedding position_embedding lm_head · cross_q …
for cross-attention · expert_gate … for one expert of a mixture · router. A name that matches no rule falls back to its
module's own last name, so that nothing is left without a type; `is_known` says which ones did.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

# (pattern on the module's dotted name without ".weight", type). The first match wins; specific ones come first.
_RULES: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(rf"(?:^|\.)(?:{pattern})$"), layer_type)
    for pattern, layer_type in (
        # between a tower and the language model; first, since inside they use everybody's names
        (r"(?:multi_modal_projector|mm_projector|merger|patch_merger)\..+|projector", "projector"),
        (r"(?:text|visual|image)_projection|mm_input_projection", "projector"),
        # mixtures of experts: the choice, and experts stacked in one tensor under names of their own
        (r"(?:mlp|block_sparse_moe|feed_forward|ffn|moe|mixer)\.(?:gate|router)", "router"),
        (r"router(?:\.(?:layer|classifier))?", "router"),
        (r"shared_expert_gate", "shared_expert_router"),
        (r"self_attention\.experts\.input_linear", "q"),
        (r"self_attention\.experts\.output_linear", "o"),
        (r"shared_mlp\.input_linear", "gate_up"),
        (r"shared_mlp\.output_linear", "down"),
        (r"(?:mlp|block_sparse_moe)\.input_linear", "expert_gate_up"),
        (r"(?:mlp|block_sparse_moe)\.output_linear", "expert_down"),
        (r"experts\.fc1", "gate_up"),  # Aria
        # state-space and linear-attention blocks: their in_proj is no qkv, their out_proj no attention output
        (r"(?:mixer|mamba|conv)\.in_proj|linear_attn\.in_proj_\w+", "in_proj"),
        (r"(?:mixer|mamba|conv|linear_attn)\.out_proj", "out_proj"),
        (r"x_proj", "x_proj"),
        (r"dt_proj", "dt_proj"),
        (r"A_log", "A_log"),
        # heads; before "output", "dense" and "out_proj", which other rules take for a block's own
        (r"predictions\.transform\.dense|(?:generator_|discriminator_)?predictions\.dense", "head_transform"),
        (r"vocab_transform|lm_head\.dense|^head\.dense|pre_classifier|project_out", "head_transform"),
        (r"(?:classifier|classification_head)\.dense", "head_transform"),
        (r"(?:classifier|classification_head)\.out_proj|classifier(?:\.\d+)?|score|qa_outputs", "classifier"),
        (r"seq_relationship|dense_prediction", "classifier"),
        (r"pooler(?:\.dense)?", "pooler"),
        # fused projections
        (r"(?:crossattention|encoder_attn|multihead_attn)\.c_attn|kv_proj", "kv"),
        (r"c_attn|qkv_proj|query_key_value|Wqkv|wqkv|W_pack|att_proj|(?:attn|attention)\.qkv", "qkv"),
        (r"attention\.self\.in_proj", "qkv"),
        # latent attention (DeepSeek): down to a small width (a) and up again (b)
        (r"q_a_proj", "q_a"),
        (r"q_b_proj", "q_b"),
        (r"kv_a_proj(?:_with_mqa)?", "kv_a"),
        (r"kv_b_proj", "kv_b"),
        # disentangled attention (DeBERTa): projections of the relative positions
        (r"pos_query_proj|pos_q_proj", "pos_q"),
        (r"pos_key_proj|pos_proj", "pos_k"),
        (r"relative_attention_bias|relative_position_bias_table", "relative_attention_bias"),
        # MLPs whose names mean something else elsewhere
        (r"mlp\.Wi", "gate_up"),
        (r"mlp\.Wo|feed_forward\.value", "down"),
        (r"feed_forward\.key", "up"),
        (r"h\.\d+\.mlp\.w1", "up"),  # Qwen 1: w1(x) * silu(w2(x))
        (r"h\.\d+\.mlp\.w2", "gate"),
        # GGUF
        (r"attn_qkv", "qkv"),
        (r"attn_q_a", "q_a"),
        (r"attn_q_b", "q_b"),
        (r"attn_kv_a(?:_mqa)?", "kv_a"),
        (r"attn_kv_b", "kv_b"),
        (r"(?:cross_)?attn_q", "q"),
        (r"(?:cross_)?attn_k", "k"),
        (r"(?:cross_)?attn_v", "v"),
        (r"(?:cross_)?attn_o(?:utput)?", "o"),
        (r"ffn_gate_inp", "router"),
        (r"ffn_gate_inp_shexp", "shared_expert_router"),
        (r"ffn_gate(?:_shexp)?", "gate"),
        (r"ffn_up(?:_shexp)?", "up"),
        (r"ffn_down(?:_shexp)?", "down"),
        (r"ffn_gate_exps", "expert_gate"),
        (r"ffn_up_exps", "expert_up"),
        (r"ffn_gate_up_exps", "expert_gate_up"),
        (r"ffn_down_exps", "expert_down"),
        (r"ssm_in", "in_proj"),
        (r"ssm_out", "out_proj"),
        (r"token_embd", "embedding"),
        (r"position_embd", "position_embedding"),
        (r"token_types", "token_type_embedding"),
        # output of attention (before the plain q/k/v names, since both sides end in similar words)
        (r"attention\.output\.dense|attention\.dense|attn\.c_proj|o_proj|out_proj|Wo|attention\.out_lin", "o"),
        (r"self_attn\.dense|self_attention\.dense|SelfAttention\.o|EncDecAttention\.o", "o"),
        (r"(?:attn|attention)\.proj|attention\.(?:o|wo|output)|attn_out|crossattention\.c_proj|to_out(?:\.0)?", "o"),
        # q, k, v
        (r"q_proj|q_attn|query|query_proj|q_lin|to_q|(?:SelfAttention|EncDecAttention|attention)\.w?q", "q"),
        (r"k_proj|key|key_proj|k_lin|to_k|(?:SelfAttention|EncDecAttention|attention)\.w?k", "k"),
        (r"v_proj|value|value_proj|v_lin|to_v|(?:SelfAttention|EncDecAttention|attention)\.w?v", "v"),
        # MLP
        (r"gate_up_proj", "gate_up"),
        (r"gate_proj|wi_0|w1", "gate"),
        (r"up_proj|wi_1|w3|v1|intermediate\.dense|intermediate_dense|mlp\.c_fc|fc1|fc_1|fc_in|lin1|linear1|wi", "up"),
        (r"dense_h_to_4h|ffn", "up"),
        (r"down_proj|w2|output\.dense|output_dense|mlp\.c_proj|fc2|fc_2|fc_out|lin2|linear2|wo", "down"),
        (r"dense_4h_to_h|ffn_output", "down"),
        # ends of the model
        (r"embed_tokens|wte|word_embeddings|tok_embeddings?|tokens_embed|embed_in|shared|token_embedding", "embedding"),
        (r"backbone\.embeddings|embedding\.word_embeddings", "embedding"),
        (r"wpe|positions?_embed(?:ding)?s?|pos_embed(?:ding)?|embed_positions|rel_embeddings", "position_embedding"),
        (r"token_type_embeddings", "token_type_embedding"),
        (r"patch_embeddings?(?:\.proj(?:ection)?)?|patch_embed\.proj", "patch_embedding"),
        (r"embeddings_project|embedding_hidden_mapping_in|embed_proj|project_in|feature_projection\.projection",
         "embedding_projection"),
        (r"conv\d*|conv1d|conv2d|convolution|conv\.parametrizations\.weight\.original\d", "conv"),
        (r"lm_head|embed_out|predictions\.decoder|lm_head\.decoder|decoder\.fc_out|vocab_projector", "lm_head"),
        (r"generator_lm_head|output_layer|proj_out|^(?:model\.)?output", "lm_head"),
    )
)  # fmt: skip
_CROSS: Final = re.compile(
    r"crossattention|cross_attn|EncDecAttention|encoder_attn|encoder_attention|cross_attention|multihead_attn"
)
_NUMBER: Final = re.compile(r"\.(\d{1,9})(?:\.|$)")
_EXPERT: Final = re.compile(r"(?<![^.])experts\.(?:expert_)?(\d{1,9})(?=\.|$)")
_CONV1D: Final = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)$")
_TOWERS: Final = (
    ("vision", re.compile(r"(?:^|\.)(?:vision_tower|vision_model|vision_encoder|image_encoder|visual)\.")),
    ("audio", re.compile(r"(?:^|\.)(?:audio_tower|audio_model|audio_encoder|speech_encoder)\.")),
    ("text", re.compile(r"(?:^|\.)(?:language_model|text_model|text_encoder|text_decoder)\.")),
)

# Order in which types are shown: as data flows through a block.
ORDER: Final = (
    "embedding", "position_embedding", "token_type_embedding", "patch_embedding", "embedding_projection", "conv",
    "q", "k", "v", "kv", "qkv", "q_a", "q_b", "kv_a", "kv_b", "pos_q", "pos_k", "relative_attention_bias", "expert_q",
    "o", "expert_o", "cross_q", "cross_k", "cross_v", "cross_kv", "cross_qkv", "cross_o",
    "in_proj", "x_proj", "dt_proj", "A_log", "out_proj", "gate", "up", "gate_up", "down", "router",
    "shared_expert_router", "expert_gate", "expert_up", "expert_gate_up", "expert_down", "projector", "pooler",
    "head_transform", "classifier", "lm_head",
)  # fmt: skip

# Model type (config.json) → the modules that LoRA adapts unless told otherwise, as PEFT's target_modules: the q and v
# of every attention, or what holds them. PEFT's own default where it has one (a test compares), as transformers 5
# names the modules in memory: for ViT that is not the name in its checkpoints.
_QV: Final = ("q_proj", "v_proj")
_BERT: Final = ("query", "value")
_MLA: Final = ("q_proj", "q_b_proj", "kv_b_proj")
LORA_TARGETS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "gemma", "gemma2",
         "gemma3", "gemma3_text", "gpt_oss", "llama4", "llama4_text", "glm4", "stablelm", "granitemoe",
         "olmo2", "starcoder2"), _QV,
    ),
    **dict.fromkeys(("opt", "gptj", "gpt_neo", "bart", "marian", "whisper", "clip", "vit", "wav2vec2"), _QV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "albert"), _BERT),
    **dict.fromkeys(("falcon", "gpt_neox", "bloom", "chatglm"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt", "qwen"), ("c_attn",)),
    **dict.fromkeys(("t5", "mt5", "switch_transformers"), ("q", "v")),
    **dict.fromkeys(("mpt", "modernbert", "dbrx"), ("Wqkv",)),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _MLA),
    **dict.fromkeys(("phi3", "codegen"), ("qkv_proj",)),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "distilbert": ("q_lin", "v_lin"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "internlm2": ("wqkv",),
    "mamba": ("in_proj", "x_proj"),
    "mamba2": ("in_proj",),
}  # fmt: skip

BASE_PREFIXES: Final = (
    "model.", "transformer.", "bert.", "roberta.", "distilbert.", "albert.", "electra.", "deberta.", "gpt_neox.",
    "base_model.", "base_model.model.", "model.model.", "language_model.", "encoder.", "module.", "vit.", "esm.",
    "_orig_mod.", "module._orig_mod.", "_orig_mod.module.",  # torch.compile
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor sits: layer type, layer number (None outside the blocks), stack, expert number.

    stack: "vision", "audio" or "text" inside a tower of a model of several, else "encoder", "decoder" or "".
    expert: its number where one tensor is one expert's (`experts.3.w1`), else None.
    """

    layer_type: str
    layer: int | None
    stack: str
    expert: int | None = None


@lru_cache(1 << 16)  # a mixture of experts has so many
def place(name: str) -> Place:
    """Layer type, number, stack and expert of a tensor name.

    >>> place("model.layers.3.self_attn.q_proj.weight")
    Place(layer_type='q', layer=3, stack='', expert=None)
    >>> place("model.layers.3.mlp.experts.7.up_proj.weight")
    Place(layer_type='expert_up', layer=3, stack='', expert=7)
    """
    module = module_of(name)
    expert = _EXPERT.search(module)
    number = _NUMBER.search(_EXPERT.sub("experts", module))
    layer_type, stack = _kind(_numberless(name))
    return Place(layer_type, int(number[1]) if number else None, stack, int(expert[1]) if expert else None)


@lru_cache(1 << 12)
def _kind(name: str) -> tuple[str, str]:
    """(layer type, stack) of a `_numberless` tensor name."""
    module = module_of(name)
    stack = next((tower for tower, pattern in _TOWERS if pattern.search(module)), "")
    if not stack:
        side = re.search(r"(?:^|\.)(encoder|decoder)\.", module)
        stack = side[1] if side else ""
    layer_type = _rule(name) or re.sub(r"\.\d+$", "", module).rpartition(".")[2] or module
    if _CROSS.search(module) and layer_type in {"q", "k", "v", "o", "qkv", "kv"}:
        layer_type = f"cross_{layer_type}"
    if "experts" in module.split(".") and layer_type in {"q", "o", "gate", "up", "gate_up", "down"}:
        layer_type = f"expert_{layer_type}"
    return layer_type, stack


def several_stacks(places: Iterable[tuple[str, str]]) -> bool:
    """Whether (stack, layer type) pairs have some layer type in more than one stack, so that its stack has to be told.

    >>> several_stacks([("encoder", "q"), ("", "embedding")]), several_stacks([("vision", "q"), ("", "q")])
    (False, True)
    """
    different = set(places)
    return len({layer_type for _, layer_type in different}) < len(different)


def labels(stack: Iterable[str], layer_type: Iterable[str], apart: bool | None = None) -> list[str]:
    """The layer type of each matrix as shown and judged: with its stack where a type is in more than one of them.

    apart: whether the stacks are told, where that is settled by more matrices than these (`several_stacks`).

    >>> labels(["vision", "text", ""], ["q", "q", "embedding"])
    ['vision q', 'text q', 'embedding']
    """
    places = list(zip(stack, layer_type, strict=True))
    apart = several_stacks(places) if apart is None else apart
    return [f"{stack} {layer_type}".strip() if apart else layer_type for stack, layer_type in places]


def is_known(name: str) -> bool:
    """Whether a rule gives the tensor its type; else the type is its module's own last name."""
    return _rule(_numberless(name)) is not None


def _numberless(name: str) -> str:
    """The name with 0 for the numbers of its blocks and experts, which no rule tells apart.

    >>> _numberless("model.layers.3.mlp.experts.7.up_proj.weight"), _numberless("up_blocks.2.to_out.1.weight")
    ('model.layers.0.mlp.experts.0.up_proj.weight', 'up_blocks.0.to_out.1.weight')
    """
    return re.sub(r"\.\d+(?=\.(?!(?:weight|bias)$)\D)", ".0", name)


@lru_cache(1 << 12)
def _rule(name: str) -> str | None:
    if name.endswith(("in_proj_weight", "in_proj_bias")):  # torch.nn.MultiheadAttention; `in_proj.weight` is others'
        return "qkv"
    module = module_of(name)
    return next((layer_type for pattern, layer_type in _RULES if pattern.search(module)), None)


def without_expert(name: str) -> str:
    """The name with its expert's number as `*`: one name for the experts of a layer.

    >>> without_expert("model.layers.3.mlp.experts.7.up_proj.weight")
    'model.layers.3.mlp.experts.*.up_proj.weight'
    """
    number = _EXPERT.search(name)
    return name if number is None else f"{name[: number.start(1)]}*{name[number.end(1) :]}"


def starred(name: str) -> str:
    """The name with its layer's and its expert's number as `*`: one name for all layers.

    >>> starred("model.layers.3.mlp.experts.7.up_proj"), starred("encoder.block.2.layer.0.SelfAttention.q")
    ('model.layers.*.mlp.experts.*.up_proj', 'encoder.block.*.layer.0.SelfAttention.q')
    """
    name = without_expert(name)
    return re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1)


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
        return model_type in {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
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
    return (ORDER.index(layer_type), "") if layer_type in ORDER else (ORDER.index("pooler"), layer_type)
