"""Checkpoints that are not safetensors files: PyTorch pickles, GGUF, a model or state dict in memory, a hub id.

Each opener gives name → `TensorInfo` and name → loader; nothing is read before a loader is called. Pickles are opened
weights-only (never arbitrary code) and memory-mapped where their format allows it.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.errors import CheckpointError
from lowrank_probe.tensor_info import DTYPES, TensorInfo

Loader = Callable[[], Tensor]
Opened = tuple[dict[str, TensorInfo], dict[str, Loader]]

_DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
# Under these keys training scripts put the state dict among other things.
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "module")


def open_pickle(file: Path) -> Opened:
    """A state dict saved by `torch.save`. Raises `CheckpointError` where it holds anything but named tensors.

    The zip format (torch ≥ 1.6) is memory-mapped; older files are read whole.
    """
    with open(file, "rb") as handle:
        is_zip = handle.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except Exception as error:  # pickle, zip and torch raise errors of a dozen kinds for a damaged file
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        unsafe = re.search(r"(?:GLOBAL|Unsupported global:?) ?([\w.]+)", str(error))
        if unsafe:
            raise CheckpointError(
                f"{file}: holds {unsafe[1]}, not only tensors; unpickling that could run code, so it is refused: "
                "save the state dict alone, as safetensors"
            ) from None
        raise CheckpointError(
            f"{file}: cannot be opened as PyTorch weights ({first[:200]}); damaged? download it again"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: expected a state dict (name → tensor), found {type(content).__name__}")
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping) and all(isinstance(v, Tensor) for v in content[key].values()):
            content = content[key]
            break
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file}: {name} is a {type(value).__name__}, expected a tensor; save the state dict alone"
            )
    return _in_memory({str(name): value for name, value in content.items()}, file)


def open_memory(source: Any) -> tuple[Opened, dict[str, Any], str]:
    """(tensors, config, description) of a state dict or of a model: anything with `state_dict()`.

    Raises `CheckpointError` for tensors on the meta device, a model that wears PEFT adapters, or anything else.
    """
    config: dict[str, Any] = {}
    if hasattr(source, "state_dict"):
        described = type(source).__name__
        if getattr(source, "peft_config", None):
            raise CheckpointError(
                f"{described} wears a PEFT adapter: save it (save_pretrained) and give its directory, or merge it first"
            )
        to_dict = getattr(getattr(source, "config", None), "to_dict", None)
        config = to_dict() if callable(to_dict) else {}
        source = source.state_dict()
    elif isinstance(source, Mapping):
        described = "state dict"
    else:
        raise CheckpointError(
            f"expected a path, a model or a state dict (name → tensor), found {type(source).__name__}"
        )
    for name, value in source.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{described}: {name} is a {type(value).__name__}, expected a tensor")
        if value.is_meta:
            raise CheckpointError(
                f"{described}: {name} is on the meta device and has no values; load the weights first"
            )
    return _in_memory(dict(source), Path(f"({described} in memory)")), config, f"({described} in memory)"


def _in_memory(tensors: Mapping[str, Tensor], file: Path) -> Opened:
    infos, loaders = {}, {}
    for name, tensor in tensors.items():
        dtype = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        infos[name] = TensorInfo(name, tuple(tensor.shape), dtype, file, 0, tensor.numel() * tensor.itemsize)
        loaders[name] = tensor.detach
    return infos, loaders


# GGUF's own names → transformers', for the families whose blocks are LLaMA's.
_GGUF_LLAMA: Final = {"llama", "mistral", "qwen2", "qwen3"}
_GGUF_NAMES: Final = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def open_gguf(file: Path) -> tuple[Opened, dict[str, Any]]:
    """(tensors, config) of a GGUF file: dequantized to float32 by the `gguf` package, block by block on demand.

    LLaMA-like families get transformers' names, and the rows of q and k the order transformers has them in. Raises
    `CheckpointError` without the package, for a damaged file, and (on reading) for a type `gguf` cannot dequantize.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"{file}: reading GGUF needs the gguf package: pip install gguf") from None
    try:
        reader = GGUFReader(file)
    except Exception as error:  # the package raises whatever its parser meets
        raise CheckpointError(f"{file}: is not a readable GGUF file ({str(error)[:200]})") from None
    family = str(_gguf_field(reader, "general.architecture") or "")
    heads = _gguf_field(reader, f"{family}.attention.head_count")
    kv_heads = _gguf_field(reader, f"{family}.attention.head_count_kv") or heads
    infos, loaders = {}, {}
    for tensor in reader.tensors:
        name = _transformers_name(tensor.name) if family in _GGUF_LLAMA else tensor.name
        shape = tuple(int(length) for length in reversed(tensor.shape.tolist()))
        permuted = 0
        if family == "llama" and re.search(r"self_attn\.[qk]_proj\.", name) and heads and kv_heads:
            permuted = int(heads if ".q_proj." in name else kv_heads)
        start = int(tensor.data_offset)
        kind = tensor.tensor_type.name
        is_plain = kind in ("F64", "F32", "F16", "BF16")
        infos[name] = TensorInfo(name, shape, kind, file, start, start + int(tensor.n_bytes), quantized=not is_plain)
        loaders[name] = _gguf_loader(tensor, name, file, shape, permuted)
    config = {"model_type": family, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return (infos, loaders), {key: value for key, value in config.items() if value}


def _gguf_field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _transformers_name(name: str) -> str:
    block, _, rest = name.rpartition("blk.")[2].partition(".") if name.startswith("blk.") else ("", "", name)
    module, _, kind = rest.rpartition(".")
    if module not in _GGUF_NAMES:
        return name
    prefix = f"model.layers.{block}." if block else ""
    return f"{prefix}{_GGUF_NAMES[module]}.{kind}"


def _gguf_loader(tensor: Any, name: str, file: Path, shape: tuple[int, ...], permuted: int) -> Loader:
    def load() -> Tensor:
        from gguf.quants import dequantize

        kind = tensor.tensor_type.name
        if kind in ("F32", "F16", "F64"):
            values = torch.from_numpy(tensor.data.copy())
        elif kind == "BF16":
            values = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16)
        else:
            try:
                values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            except NotImplementedError:
                raise CheckpointError(f"{name} in {file}: the gguf package cannot dequantize {kind}") from None
        values = values.reshape(shape)
        if permuted:  # llama.cpp interleaves the two halves of each head for its rotary embedding
            heads = values.reshape(permuted, values.shape[0] // permuted // 2, 2, *shape[1:])
            values = heads.transpose(1, 2).reshape(shape)
        return values

    return load


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
    (re.compile(r"_blocks$"), "MXFP4"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors (packed integers)"),
)
_SCALES: Final = ("weight_scale_inv", "weight_scale")
_FP8: Final = ("F8_E4M3", "F8_E5M2")


def refuse_codes(path: Any, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` naming the format where tensors are quantization codes, from config or from names."""
    quantization = config.get("quantization_config")
    method = str(quantization.get("quant_method", "")).lower() if isinstance(quantization, Mapping) else ""
    found, evidence = _REFUSED_METHODS.get(method, ""), f"config.json says quant_method {method!r}"
    if not found:
        for name in tensors:
            what = next((what for pattern, what in _REFUSED_NAMES if pattern.search(name)), "")
            if what and (what != "MXFP4" or tensors[name].dtype == "U8"):
                found, evidence = what, f"it holds {name}"
                break
    if found:
        raise CheckpointError(
            f"{path}: is quantized with {found} ({evidence}); its tensors are codes, not weights: dequantize it first "
            "(load it with transformers, model.dequantize(), save_pretrained)"
        )


def fp8_scales(path: Any, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, str]:
    """fp8 weight → its scale tensor. Raises `CheckpointError` where a checkpoint with scales lacks one of them."""
    eights = [name for name, info in tensors.items() if info.dtype in _FP8]
    scales = {}
    for name in eights:
        stem = name.removesuffix("weight")
        scale = next((stem + suffix for suffix in _SCALES if stem + suffix in tensors), "")
        if scale:
            scales[name] = scale
    missing = [name for name in eights if name not in scales]
    if missing and (scales or "quantization_config" in config):
        raise CheckpointError(
            f"{path}: {missing[0]} is {tensors[missing[0]].dtype} but has no {_SCALES[0]} or {_SCALES[1]} beside it "
            f"({len(missing)} of {len(eights)} fp8 tensors); half-quantized? convert the checkpoint again"
        )
    return scales


def dequantize_fp8(W: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """float32 W·scale for a scale of one number, one a row, or one a block of `block` entries (DeepSeek: 128×128).

    W: (m, n) fp8. Raises `ValueError` where the scale's shape fits neither.
    """
    values, scale = W.float(), scale.float()
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.ndim == 1:
        scale = scale[:, None]
    if values.ndim != 2 or scale.ndim != 2:
        raise ValueError(f"scale {tuple(scale.shape)} for a weight {tuple(values.shape)}")
    (m, n), (rows, cols) = values.shape, scale.shape
    height, width = block or (_block(m, rows), _block(n, cols))
    height, width = (1 if rows == m else height), (n if cols == 1 else width)
    if -(-m // height) != rows or -(-n // width) != cols:
        raise ValueError(f"scale {(rows, cols)} for a weight {(m, n)} in blocks of {(height, width)}")
    for i in range(rows):
        part = values[i * height : (i + 1) * height]
        part *= scale[i].repeat_interleave(width)[:n]
    return values


def _block(length: int, count: int) -> int:
    """The power of two that cuts `length` into `count` blocks (scales come without their block size)."""
    size = 1
    while size * count < length:
        size *= 2
    return size


_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?")


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist may be a hub id: `owner/name`, or `owner/name@revision`."""
    return _HUB_ID.fullmatch(path) is not None and not path.startswith((".", "/")) and not path.endswith("/")


def download(hub_id: str) -> Path:
    """The local snapshot of a hub repository: configs and safetensors files only.

    Raises `CheckpointError`: no such repository, no access, no connection, no safetensors in it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = hub_id.partition("@")
    nothing = f"{hub_id}: no such file or directory here, and"
    try:
        root = Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=["*.safetensors", "*.safetensors.index.json",
                                                                  "config.json", "adapter_config.json"],
                ignore_patterns=["*/*"],
            )
        )  # fmt: skip
    except GatedRepoError:
        raise CheckpointError(
            f"{nothing} access to it on the hub is gated: accept its terms, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{nothing} the hub's {name} has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(f"{nothing} the hub has no model {name} (or it is private: `hf auth login`)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        raise CheckpointError(
            f"{nothing} the hub cannot be reached (offline?) and {name} is not in its cache; give a local directory"
        ) from None
    if not any(root.glob("*.safetensors")):
        raise CheckpointError(f"{hub_id}: the hub's {name} holds no safetensors files; download and convert it")
    return root
