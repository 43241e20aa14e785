"""Stored tensor → the matrices that lie in it: experts, fused q, k, v, fused gate and up, convolutions.

Legend: m out, n in. A stored tensor is (m, n), (n, m) where the layer keeps its weight transposed, (experts, …) for a
stack of experts, (out, in, kernel…) for a convolution. A fused tensor is split only where the model type is one whose
layout is known and the counts of its config agree with the shape; else it is one matrix, and the note says why.

Source of the layouts: the forward code of the models in `transformers` 5 (the tests run it) and, for the models that
come with their own code, that code: Qwen 1, ChatGLM 2–4, InternLM 2, Baichuan.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from lowrank_probe.layers import is_conv1d, is_known, module_of, place

# Fused q, k, v one after the other: q of all heads, k of all, v of all.
_CONCATENATED: Final = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "mpt", "dbrx", "modernbert", "phi3", "phi3_v",
     "phi4_multimodal", "phi4mm", "qwen", "baichuan", "bark", "nomic_bert"}
)  # fmt: skip
# Head by head: q, k, v of head 0, q, k, v of head 1, …
_PER_HEAD: Final = frozenset(
    {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "deberta", "minimax", "minimax_text_01"}
)
# One key/value group after the other: the group's q heads, its k, its v.
_GROUPED: Final = frozenset({"internlm2", "RefinedWeb"})
# Names that mean three equal parts one after the other in every model that uses them.
_ALWAYS_THIRDS: Final = re.compile(r"(?:attn|attention)\.qkv$|att_proj$|W_pack$")
# Stacks of experts stored (experts, in, out); all other models' are (experts, out, in).
_TRANSPOSED_EXPERTS: Final = frozenset(
    {"gpt_oss", "openai_privacy_filter", "llama4", "llama4_text", "aria", "aria_text", "qwen3_vl_moe",
     "qwen3_vl_moe_text"}
)  # fmt: skip
_INTERLEAVED_GATE_UP: Final = frozenset({"gpt_oss"})
_TOWER_CONFIGS: Final = {
    "vision": ("vision_config",),
    "audio": ("audio_config", "speech_config"),
    "encoder": ("encoder", "encoder_config"),
    "decoder": ("decoder", "decoder_config"),
}
_TEXT_CONFIGS: Final = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of each of `groups` consecutive blocks of `group_rows` rows.

    One run of rows is groups = 1; per-head interleaving is groups = heads; even rows are group_rows = 2, start = 0.
    """

    groups: int
    group_rows: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.groups * (self.stop - self.start)

    def take(self, M: Tensor) -> Tensor:
        """Those rows of M (groups · group_rows, n); a view where they are one run or evenly spaced single rows."""
        if self.groups == 1:
            return M[self.start : self.stop]
        if self.stop - self.start == 1:
            return M[self.start :: self.group_rows]
        return M.reshape(self.groups, self.group_rows, -1)[:, self.start : self.stop].reshape(self.count, -1)


@dataclass(frozen=True)
class Part:
    """One matrix (m, n) inside a stored tensor.

    label: "" the whole tensor; "q", "k", "v", "gate", "up"; "3" expert 3; "3.gate" its gate. layer_type: replaces
    `place(name).layer_type`; None keeps it. expert: index into the first dimension. transposed: stored (in, out).
    rows: which of the m output rows (after the transpose); None all. table: stored (1, m, n).
    """

    label: str = ""
    layer_type: str | None = None
    expert: int | None = None
    transposed: bool = False
    rows: Rows | None = None
    table: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """(m, n) from the shape of the stored tensor; a convolution is (out, in·kernel)."""
        if self.table or self.expert is not None:
            stored = stored[1:]
        m, n = stored[0], math.prod(stored[1:])
        if self.transposed:
            m, n = n, m
        return (self.rows.count if self.rows else m), n

    def take(self, W: Tensor) -> Tensor:
        """The (m, n) matrix out of the stored tensor, or out of its expert's slice (2-D); a view where possible."""
        if self.table or (self.expert is not None and W.ndim == 3):
            W = W[self.expert or 0]
        M = W.flatten(1) if W.ndim > 2 else W
        if self.transposed:
            M = M.T
        return self.rows.take(M) if self.rows else M

    def span(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """(first element, number of elements): the shortest run of the flat stored tensor that contains the part.

        The run is the part and nothing else for a whole tensor, an expert, and one run of rows not transposed;
        otherwise (rows of every head, transposed rows) it is the expert's slice or the whole tensor.
        """
        first, count = 0, math.prod(stored)
        if self.expert is not None:
            count //= stored[0]
            first = self.expert * count
        if self._is_row_run:
            assert self.rows is not None
            width = self.shape(stored)[1]
            first, count = first + self.rows.start * width, self.rows.count * width
        return first, count

    def take_span(self, run: Tensor, stored: tuple[int, ...]) -> Tensor:
        """The (m, n) matrix out of the 1-D run of elements that `span` names."""
        if self._is_row_run:
            return run.view(self.shape(stored))
        return self.take(run.view(stored[1:] if self.expert is not None else stored))

    @property
    def _is_row_run(self) -> bool:
        return self.rows is not None and self.rows.groups == 1 and not self.transposed


def parts(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], *, split: bool = True
) -> tuple[list[Part], str]:
    """The matrices of one stored tensor and a note: "split into q, k, v", "8 experts", why one is kept whole, or "".

    config: config.json as a dict, nested or not; {} where there is none. `split=False` keeps fused matrices whole
    (experts stay apart). No part: a vector (note "vector"), an empty tensor ("empty"), one that is no matrix
    ("3-D: not analysed", "biases of 8 experts").

    >>> parts("h.0.attn.c_attn.weight", (16, 48), {"model_type": "gpt2", "n_head": 4, "n_embd": 16})[1]
    'split into q, k, v'
    """
    if 0 in shape:
        return [], "empty"
    if len(shape) < 2:
        return [], "vector"
    config = _section(name, config)
    if len(shape) == 2:
        return _matrix(name, shape, config, split)
    layer_type = place(name).layer_type
    if len(shape) == 3 and layer_type.startswith("expert_"):
        return _experts(name, shape, layer_type, config, split)
    if layer_type == "position_embedding":
        return ([Part(table=True)], "") if len(shape) == 3 and shape[0] == 1 else ([], f"{len(shape)}-D: not analysed")
    named = layer_type in ("conv", "patch_embedding") or "conv" in name
    if (len(shape) == 3 and named) or (len(shape) in (4, 5) and (named or name.endswith("weight"))):
        return [Part(layer_type=None if is_known(name) else "conv")], ""
    return [], f"{len(shape)}-D: not analysed"


def _matrix(name: str, shape: tuple[int, ...], config: Mapping[str, Any], split: bool) -> tuple[list[Part], str]:
    layer_type = place(name).layer_type
    if layer_type.startswith("expert_") and re.search(r"experts\.\w*_bias$", name):
        return [], f"biases of {shape[0]} experts"
    transposed = is_conv1d(name, config.get("model_type"))
    whole = [Part(transposed=transposed)]
    if layer_type.startswith("expert_") and place(name).expert is None:
        return whole, "experts one under the other kept whole"
    m, n = whole[0].shape(shape)
    cross = layer_type.startswith("cross_")
    fused = layer_type.removeprefix("cross_").removeprefix("expert_")
    if not split:
        return whole, ""
    if fused in ("qkv", "kv"):
        rows = _qkv(name, m, n, fused, config)
    elif fused == "gate_up" or (fused == "up" and _is_fused_up(name, m, config)):
        rows = _gate_up(name, m, config)
    else:
        return whole, ""
    if isinstance(rows, str):
        return whole, f"fused {fused} kept whole: {rows}"
    prefix = "cross_" if cross else ("expert_" if layer_type.startswith("expert_") else "")
    found = [Part(label, prefix + label, None, transposed, run) for label, run in rows.items()]
    return found, "split into " + ", ".join(rows)


def _qkv(name: str, m: int, n: int, fused: str, config: Mapping[str, Any]) -> dict[str, Rows] | str:
    """label → rows of a fused projection with m rows, or why its layout is not known."""
    model_type = config.get("model_type")
    heads, kv_heads, head_dim = _counts(config)
    if fused == "kv":
        equal = model_type in _CONCATENATED and m == 2 * n
        return _run(m, k=m // 2, v=m // 2) if equal else f"layout of {model_type!r} is not known"
    if name.endswith("in_proj_weight") or _ALWAYS_THIRDS.search(module_of(name)):
        return _run(m, q=n, k=n, v=n) if m == 3 * n else f"its {m} rows are not three times its {n} columns"
    if model_type is None:
        if is_conv1d(name, None) and m == 3 * n:
            return _run(m, q=n, k=n, v=n)
        return "no model type in the config"
    layout = _layout(model_type, name, config)
    if not layout:
        return f"layout of {model_type!r} is not known"
    if layout == "one kv head":
        layout, kv_heads = "concatenated", 1
    if layout == "per head" or (layout == "concatenated" and kv_heads is None):
        kv_heads = heads
    if layout == "four blocks":  # CodeGen: as for four devices; q, v, k in each
        third, rest = divmod(m, 12)
        if rest or m != 3 * n:
            return f"its {m} rows are not four times three equal blocks"
        return {x: Rows(4, 3 * third, i * third, (i + 1) * third) for x, i in (("q", 0), ("k", 2), ("v", 1))}
    if not (heads and kv_heads and head_dim):
        return "the config does not give its numbers of heads"
    if heads % kv_heads or (heads + 2 * kv_heads) * head_dim != m:
        return f"{heads} and {kv_heads} heads of {head_dim} in the config are not its {m} rows"
    if layout == "concatenated":
        return _run(m, q=heads * head_dim, k=kv_heads * head_dim, v=kv_heads * head_dim)
    q, block = heads // kv_heads * head_dim, (heads // kv_heads + 2) * head_dim
    return {
        "q": Rows(kv_heads, block, 0, q),
        "k": Rows(kv_heads, block, q, q + head_dim),
        "v": Rows(kv_heads, block, q + head_dim, block),
    }


def _layout(model_type: str, name: str, config: Mapping[str, Any]) -> str:
    """ "concatenated", "one kv head" (the same, multi-query), "per head", "grouped", "four blocks"; "" unknown."""
    if module_of(name).endswith("attn_qkv"):  # GGUF's own order, whatever the family's
        return "concatenated"
    if model_type in _CONCATENATED:
        return "concatenated"
    if model_type in _PER_HEAD:
        return "per head"
    if model_type in _GROUPED:
        return "grouped"
    if model_type in ("falcon", "RefinedWebModel"):
        if config.get("new_decoder_architecture", False):
            return "grouped"
        return "one kv head" if config.get("multi_query", True) else "per head"
    if model_type == "gpt_bigcode" and "crossattention" not in name:
        return "one kv head" if config.get("multi_query", True) else "per head"
    if model_type == "chatglm":
        return "concatenated" if config.get("multi_query_attention", False) else "per head"
    return "four blocks" if model_type == "codegen" else ""


def _is_fused_up(name: str, m: int, config: Mapping[str, Any]) -> bool:
    """ChatGLM's dense_h_to_4h: gate and up, one after the other, from version 2 on."""
    glm = config.get("model_type") == "chatglm" and name.endswith("dense_h_to_4h.weight")
    return glm and m == 2 * (_first(config, "ffn_hidden_size") or 0)


def _gate_up(name: str, m: int, config: Mapping[str, Any]) -> dict[str, Rows] | str:
    """Gate and up of a fused projection with m rows; the gate is the half that goes through the activation."""
    model_type = config.get("model_type")
    if model_type is None:
        return "no model type in the config"
    widths = {
        2 * width
        for key, value in config.items()
        if re.search(r"intermediate|ffn|expert.*(?:dim|size)", key)
        for width in (value if isinstance(value, list) else [value])
        if isinstance(width, int)
    }
    # One tensor for all shared experts is as wide as all of them.
    shared = _first(config, "n_shared_experts", "num_shared_experts") or 1
    if m % 2 or not (m in widths or m / shared in widths):
        return f"no intermediate size in the config is half of its {m} rows"
    if "audio" in name or "speech" in name:  # Phi-4's audio encoder puts up first
        return f"order of {model_type!r} is not known here"
    half = m // 2
    if model_type in _INTERLEAVED_GATE_UP:
        return {"gate": Rows(half, 2, 0, 1), "up": Rows(half, 2, 1, 2)}
    return _run(m, gate=half, up=half)


def _experts(
    name: str, shape: tuple[int, ...], layer_type: str, config: Mapping[str, Any], split: bool
) -> tuple[list[Part], str]:
    """One part an expert, or two where gate and up are fused."""
    count = shape[0]
    transposed = _is_transposed(shape, layer_type, config)
    note = f"{count} experts"
    rows: dict[str, Rows] | str = ""
    if layer_type == "expert_gate_up" and split:
        rows = "which side is in and which is out is not known"
        if transposed is not None:
            rows = _gate_up(name, shape[2] if transposed else shape[1], config)
        note += f", fused gate_up kept whole: {rows}" if isinstance(rows, str) else ", each split into gate, up"
    if isinstance(rows, str):
        return [Part(str(e), None, e, bool(transposed)) for e in range(count)], note
    return [
        Part(f"{e}.{label}", f"expert_{label}", e, bool(transposed), run)
        for e in range(count)
        for label, run in rows.items()
    ], note


def _is_transposed(shape: tuple[int, ...], layer_type: str, config: Mapping[str, Any]) -> bool | None:
    """Whether experts are stored (in, out): by the hidden size where it is one side only, else by the model type."""
    hidden = _first(config, "hidden_size", "n_embd", "n_embed", "d_model")
    if hidden in shape[1:] and shape[1] != shape[2]:
        return (shape[1] == hidden) == (layer_type in ("expert_gate_up", "expert_gate", "expert_up", "expert_q"))
    model_type = config.get("model_type")
    return model_type in _TRANSPOSED_EXPERTS if model_type else None


def _run(m: int, **lengths: int) -> dict[str, Rows]:
    """label → rows for parts that lie one after the other."""
    found, start = {}, 0
    for label, length in lengths.items():
        found[label] = Rows(1, m, start, start + length)
        start += length
    return found


def _counts(config: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Numbers of query heads and key/value heads, and a head's width, as far as the config gives them."""
    attention = config.get("attn_config") if isinstance(config.get("attn_config"), Mapping) else {}
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    kv_heads = _first(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
    kv_heads = kv_heads or _first(attention or {}, "kv_n_heads")
    head_dim = _first(config, "head_dim", "kv_channels")
    hidden = _first(config, "hidden_size", "n_embd", "n_embed", "d_model")
    if head_dim is None and heads and hidden and hidden % heads == 0:
        head_dim = hidden // heads
    return heads, kv_heads, head_dim


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((value for key in keys if isinstance(value := config.get(key), int) and value > 0), None)


def _section(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a nested config that describes this tensor's tower, over the keys of the whole."""
    thinker = config.get("thinker_config")
    if isinstance(thinker, Mapping):
        config = {**config, **thinker}
    keys = _TOWER_CONFIGS.get(place(name).stack, _TEXT_CONFIGS)
    inner = next((config[key] for key in keys if isinstance(config.get(key), Mapping)), None)
    return {**config, **inner} if inner is not None else config
