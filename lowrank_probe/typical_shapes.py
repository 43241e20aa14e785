"""`typical_shape`: a number of parameters → the published model of a family that is nearest, scaled where none is near.

Source: Pythia's model card; the other sizes and totals were set down from memory, not read from the models' pages. A
test compares the totals, which a number of heads does not change where q, k and v are equally wide.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from lowrank_probe.errors import ProbeError
from lowrank_probe.shape_families import family_shape
from lowrank_probe.weight_shapes import ModelShape

# family → its model type, what its configs have in common, and name → (hidden, layers, heads, kv heads, intermediate,
# vocabulary, and what else differs).
_Row = tuple[int, int, int, int, int, int, dict[str, Any]]
_TIED: Final[dict[str, Any]] = {"tie_word_embeddings": True}
_H128: Final[dict[str, Any]] = {"head_dim": 128}
_TYPICAL: Final[dict[str, tuple[str, dict[str, _Row]]]] = {
    "llama": ("llama", {
        "SmolLM2-135M": (576, 30, 9, 3, 1536, 49152, _TIED),
        "SmolLM2-360M": (960, 32, 15, 5, 2560, 49152, _TIED),
        "Llama-3.2-1B": (2048, 16, 32, 8, 8192, 128256, _TIED),
        "Llama-3.2-3B": (3072, 28, 24, 8, 8192, 128256, _TIED),
        "Llama-2-7B": (4096, 32, 32, 32, 11008, 32000, {}),
        "Llama-3.1-8B": (4096, 32, 32, 8, 14336, 128256, {}),
        "Llama-2-13B": (5120, 40, 40, 40, 13824, 32000, {}),
        "LLaMA-30B": (6656, 60, 52, 52, 17920, 32000, {}),
        "LLaMA-65B": (8192, 80, 64, 64, 22016, 32000, {}),
        "Llama-2-70B": (8192, 80, 64, 8, 28672, 32000, {}),
        "Llama-3.1-70B": (8192, 80, 64, 8, 28672, 128256, {}),
        "Llama-3.1-405B": (16384, 126, 128, 8, 53248, 128256, {}),
    }),
    "qwen": ("qwen2", {
        "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, _TIED),
        "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, _TIED),
        "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, _TIED),
        "Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, {}),
        "Qwen2.5-14B": (5120, 48, 40, 8, 13824, 152064, {}),
        "Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, {}),
        "Qwen2.5-72B": (8192, 80, 64, 8, 29568, 152064, {}),
    }),
    "mistral": ("mistral", {
        "Mistral-7B": (4096, 32, 32, 8, 14336, 32000, {}),
        "Mistral-Nemo-12B": (5120, 40, 32, 8, 14336, 131072, _H128),
        "Mistral-Small-24B": (5120, 40, 32, 8, 32768, 131072, _H128),
        "Mistral-Large-123B": (12288, 88, 96, 8, 28672, 32768, _H128),
    }),
    "gemma": ("gemma2", {
        "Gemma-2-2B": (2304, 26, 8, 4, 9216, 256000, {}),
        "Gemma-2-9B": (3584, 42, 16, 8, 14336, 256000, {}),
        "Gemma-2-27B": (4608, 46, 32, 16, 36864, 256000, _H128),
    }),
    "gpt2": ("gpt2", {
        "GPT-2": (768, 12, 12, 12, 3072, 50257, {}),
        "GPT-2 medium": (1024, 24, 16, 16, 4096, 50257, {}),
        "GPT-2 large": (1280, 36, 20, 20, 5120, 50257, {}),
        "GPT-2 XL": (1600, 48, 25, 25, 6400, 50257, {}),
        "GPT-3 6.7B": (4096, 32, 32, 32, 16384, 50257, {"n_positions": 2048}),
        "GPT-3 175B": (12288, 96, 96, 96, 49152, 50257, {"n_positions": 2048}),
    }),
    "pythia": ("gpt_neox", {
        "Pythia-70M": (512, 6, 8, 8, 2048, 50304, {}),
        "Pythia-160M": (768, 12, 12, 12, 3072, 50304, {}),
        "Pythia-410M": (1024, 24, 16, 16, 4096, 50304, {}),
        "Pythia-1B": (2048, 16, 8, 8, 8192, 50304, {}),
        "Pythia-1.4B": (2048, 24, 16, 16, 8192, 50304, {}),
        "Pythia-2.8B": (2560, 32, 32, 32, 10240, 50304, {}),
        "Pythia-6.9B": (4096, 32, 32, 32, 16384, 50432, {}),
        "Pythia-12B": (5120, 36, 40, 40, 20480, 50688, {}),
        "GPT-NeoX-20B": (6144, 44, 64, 64, 24576, 50432, {}),
    }),
    "mixtral": ("mixtral", {
        "Mixtral-8x7B": (4096, 32, 32, 8, 14336, 32000, {"num_local_experts": 8, "num_experts_per_tok": 2}),
        "Mixtral-8x22B": (6144, 56, 48, 8, 16384, 32768, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    }),
}  # fmt: skip
LIKE: Final = tuple(_TYPICAL)
# Within this factor of the size asked for, a published model is taken as it is.
_NEAR: Final = 1.25
_SMALLEST, _LARGEST = 10**6, 10**14
SIZES: Final = "expected a number of parameters between 1M and 100T, such as 70B, 7e9 or 135M"


def is_size(n_parameters: float) -> bool:
    """Whether a model may have so many parameters: 1M to 100T; NaN is no number of them."""
    return _SMALLEST <= n_parameters <= _LARGEST


def published(like: str) -> dict[str, dict[str, Any]]:
    """Name → config of the published models of a family. Raises `ProbeError` for a family that is not in `LIKE`."""
    family = next((name for name, (model_type, _) in _TYPICAL.items() if like in (name, model_type)), None)
    if family is None:
        raise ProbeError(f"like {like!r}: no typical models of that family; there are {', '.join(LIKE)}")
    model_type, rows = _TYPICAL[family]
    return {name: _config(model_type, row) for name, row in rows.items()}


def typical_shape(n_parameters: float, like: str = "llama") -> ModelShape:
    """The published model of a family whose size is nearest to `n_parameters` in log scale; `source` names it.

    Where that is more than a factor of 1.25 away it is scaled: width and depth alike, its heads' width, the ratio of
    query to key/value heads, of the MLP's width to the hidden size and the vocabulary kept; `source` says so.
    Raises `ProbeError` for an unknown family, and for a size outside 1M to 100T or that no such model has.
    """
    if not is_size(n_parameters):
        raise ProbeError(f"{n_parameters:g}: {SIZES}")
    shapes = {name: family_shape(config) for name, config in published(like).items()}
    name = min(shapes, key=lambda name: abs(math.log(shapes[name].n_parameters / n_parameters)))
    nearest = shapes[name]
    if 1 / _NEAR <= n_parameters / nearest.n_parameters <= _NEAR:
        return replace(nearest, source=f"typical {like} of that size: {name}")
    scaled = _scaled(nearest, n_parameters)
    if scaled is None:
        sizes = [shape.n_parameters for shape in shapes.values()]
        raise ProbeError(
            f"{_short(n_parameters)} parameters: no typical {like} is that small, its vocabulary of {nearest.vocab:,} "
            f"alone takes more; published ones have {_short(min(sizes))} to {_short(max(sizes))}"
        )
    how = f"{name} scaled to {scaled.n_layers} layers of {scaled.hidden}"
    return replace(scaled, source=f"typical {like} of that size: {how} (none published is near)")


def _short(n: float) -> str:
    """2M, 135M, 8.03B: three digits and a unit, as --params takes it."""
    unit, scale = next((one for one in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if n >= one[1]), ("", 1))
    return f"{n / scale:.3g}{unit}"


def _scaled(near: ModelShape, n_parameters: float) -> ModelShape | None:
    """A model of about that size in the proportions of another; None where its tables alone are larger."""
    factor = (n_parameters / near.n_parameters) ** (1 / 3)
    group = near.n_heads // near.n_kv_heads
    step = near.hidden // math.gcd(near.n_heads, near.hidden) * group  # width of one group of heads
    best: ModelShape | None = None
    for width in range(step, int(near.hidden * factor) + 2 * step, step):
        if width < near.hidden * factor / 2:
            continue
        heads = near.n_heads * width // near.hidden
        sizes = (width, 1, heads, max(1, heads // group), round(near.intermediate * width / near.hidden), near.vocab)
        one = family_shape(_config(near.model_type, (*sizes, _others(near.config))))
        block = sum(weight.n_parameters for weight in one.weights if weight.layers)
        depth = round((n_parameters - one.n_parameters) / block) + 1
        if depth < 1:
            continue
        shape = family_shape(_config(near.model_type, (width, depth, *sizes[2:], _others(near.config))))
        if best is None or _distance(shape, near, n_parameters) < _distance(best, near, n_parameters):
            best = shape
    off = math.inf if best is None else abs(math.log(best.n_parameters / n_parameters))
    return best if off < math.log(1.1) else None


def _distance(shape: ModelShape, near: ModelShape, n_parameters: float) -> float:
    """How far a size is off, and, a tenth as bad, the ratio of width to depth."""
    off = abs(math.log(shape.n_parameters / n_parameters))
    return off + 0.1 * abs(math.log(shape.hidden / shape.n_layers / (near.hidden / near.n_layers)))


def _others(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("tie_word_embeddings", "head_dim", "n_positions", "num_local_experts",
                                         "num_experts_per_tok") if key in config}  # fmt: skip


def _config(model_type: str, row: _Row) -> dict[str, Any]:
    hidden, layers, heads, kv_heads, intermediate, vocab, others = row
    if model_type == "gpt2":
        names = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": intermediate}
        return {"model_type": model_type, **names, "vocab_size": vocab, **others}
    names = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate,
    }  # fmt: skip
    if model_type == "gpt_neox":
        del names["num_key_value_heads"]
    return {"model_type": model_type, **names, "vocab_size": vocab, **others}
