"""Quantization codes, by config and by names: refused by the name of their format. No torch."""

import re
from collections.abc import Mapping
from typing import Any, Final

from lowrank_probe.errors import CheckpointError
from lowrank_probe.tensor_info import TensorInfo

# Quantized formats whose tensors are codes: subtracting them would be nonsense.
_REFUSED_METHODS: Final = {
    "bitsandbytes": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes",
    "gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ", "quanto": "Quanto", "vptq": "VPTQ",
    "higgs": "HIGGS", "spqr": "SpQR", "auto-round": "AutoRound", "mxfp4": "MXFP4", "quark": "Quark",
    "bitnet": "BitNet", "torchao": "torchao",
}  # fmt: skip
_REFUSED_NAMES: Final = (
    (re.compile(r"\.weight\.(?:absmax|quant_map|nested_absmax|quant_state\..+)$|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.qzeros$|\.qweight$"), "GPTQ or AWQ"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.weight\._data$"), "Quanto"),
    (re.compile(r"\.codebooks$"), "AQLM"),
    (re.compile(r"_blocks$"), "MXFP4"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors (packed integers)"),
)


def quantization_method(config: Mapping[str, Any]) -> str:
    """What config.json's quantization_config names, in lower case; "" where it has none."""
    said = config.get("quantization_config")
    return str(said.get("quant_method", "")).lower() if isinstance(said, Mapping) else ""


def code_format(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[str, str]:
    """(format, evidence) where tensors are quantization codes, from config or from names; ("", "") where not."""
    method = quantization_method(config)
    if method in _REFUSED_METHODS:
        return _REFUSED_METHODS[method], f"config.json says quant_method {method!r}"
    for name in tensors:
        what = next((what for pattern, what in _REFUSED_NAMES if pattern.search(name)), "")
        if what and (what != "MXFP4" or tensors[name].dtype == "U8"):
            return what, f"it holds {name}"
    return "", ""


def refuse_codes(path: Any, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` naming the format where tensors are quantization codes."""
    found, evidence = code_format(tensors, config)
    if found:
        raise CheckpointError(
            f"{path}: is quantized with {found} ({evidence}); its tensors are codes, not weights: dequantize it first "
            "(load it with transformers, model.dequantize(), save_pretrained)"
        )
