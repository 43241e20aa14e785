"""The shape of a model that the table of families does not have: transformers builds it on the meta device."""

import difflib
from collections.abc import Mapping
from typing import Any, Final

from lowrank_probe.errors import CheckpointError
from lowrank_probe.layers import place, starred
from lowrank_probe.shape_families import FAMILIES
from lowrank_probe.shape_mixtures import active_parameters, mixture_notes
from lowrank_probe.weight_shapes import Kind, ModelShape, Weight

# Tried in this order where the config names no architecture.
_AUTO: Final = ("CausalLM", "Seq2SeqLM", "MaskedLM", "")
_HEADS: Final = ("score", "classifier")
_MOST_SAID: Final = 300  # characters of what transformers says


def built_shape(config: Mapping[str, Any]) -> ModelShape:
    """Every weight of the model that transformers builds from a config; `source` says so.

    Raises `CheckpointError` with what transformers says where it cannot, as of an unknown model type.
    """
    try:
        model = _model(dict(config))
    except Exception as error:  # whatever the code of a model may raise
        raise CheckpointError(_why(str(config.get("model_type")), error)) from None
    weights = _weights(model)
    inner = model.config.get_text_config()
    outputs = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    named = names.get(id(outputs), "") or next((name for name in _HEADS if hasattr(model, name)), "")
    hidden, heads = _number(inner, "hidden_size", "d_model", "n_embd"), _number(inner, "num_attention_heads", "n_head")
    per_token = _number(
        inner, "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "num_selected_experts"
    )
    table = next((one for one in weights if one.layer_type == "embedding"), None)
    return ModelShape(
        str(config.get("model_type")), "transformers (meta device)", weights, hidden,
        _number(inner, "num_hidden_layers", "num_layers", "n_layer"), heads,
        _number(inner, "num_key_value_heads", "num_kv_heads") or heads,
        _number(inner, "head_dim", "d_kv") or (hidden // heads if heads else 0),
        _number(inner, "intermediate_size", "d_ff", "ffn_dim", "n_inner"),
        _number(inner, "vocab_size") or (table.shape[0] if table else 0),
        any(one.layer_type in ("gate", "gate_up", "expert_gate", "expert_gate_up") for one in weights),
        any(one.tied and one.name == named for one in weights), dict(config),
        active_parameters(weights, per_token), named,
        mixture_notes(str(config.get("model_type")), weights, per_token),
    )  # fmt: skip


def _why(model_type: str, error: Exception) -> str:
    """Why there is no such model: the nearest names where transformers knows no such type, else its first line."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, [*FAMILIES, *CONFIG_MAPPING], n=9)
        names = ", ".join(list(dict.fromkeys(near))[:3])
        return (
            f"config of model type {model_type[:80]!r}: neither this package nor transformers knows it; "
            f"{f'nearest: {names}' if names else 'none is spelled like it'}"
        )
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    said = said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]} …"
    return (
        f"config of model type {model_type!r}: is in no table of families here, and transformers cannot build it: "
        f"{said}"
    )


def _model(config: dict[str, Any]) -> Any:
    import torch

    architecture, read = model_class(config)
    with torch.device("meta"):
        return architecture._from_config(read)


def model_class(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """(transformers' class of the model that is counted, the config as its own class).

    The architecture that the config names, else the family's, else the first of `_AUTO`. Raises what transformers does.
    """
    import transformers

    usual = FAMILIES[config["model_type"]][0] if config.get("model_type") in FAMILIES else None
    architecture = getattr(transformers, str((config.get("architectures") or [usual])[0]), None)
    if architecture is not None:
        return architecture, architecture.config_class.from_dict(dict(config))
    read = transformers.AutoConfig.for_model(config.get("model_type")).from_dict(dict(config))
    for task in _AUTO:
        known = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")._model_mapping
        if type(read) in known:
            found = known[type(read)]
            return found[0] if isinstance(found, tuple) else found, read
    raise ValueError("it has no such model")


def _weights(model: Any) -> tuple[Weight, ...]:
    """The parameters of a model, put together by name without its numbers, kind and shape."""
    from lowrank_probe.modules import kind_of

    seen: set[int] = set()
    found: dict[tuple[str, Kind, tuple[int, ...], int, bool], list[int | None]] = {}
    transposed = set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for leaf, parameter in own.items():
            key = f"{name}.{leaf}" if name else leaf
            tied = id(parameter) in seen
            seen.add(id(parameter))
            if leaf == "bias" and "weight" in own:
                continue
            kind, _ = kind_of(module, leaf, key, parameter.ndim)
            shape = tuple(parameter.shape)
            bias = own["bias"] if leaf == "weight" and "bias" in own and own["bias"] is not None else None
            n_bias = 0 if bias is None or id(bias) in seen else bias.numel()
            where = place(key)
            stars = starred(name if leaf == "weight" else key)
            if getattr(module, "is_transposed", False):
                transposed.add(stars)
            oriented = shape[::-1] if kind == "conv1d" else shape
            found.setdefault((stars, kind or "norm", oriented, n_bias, tied), []).append(where.layer)
    return tuple(
        Weight(
            name, kind, place(name.replace("*", "0")).layer_type, shape, bias, len(layers),
            tuple(sorted({layer for layer in layers if layer is not None})), tied, transposed=name in transposed,
        )
        for (name, kind, shape, bias, tied), layers in found.items()
    )  # fmt: skip


def _number(config: Any, *names: str) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), 0)
