"""GGUF files: headers, and rows dequantized on demand by the `gguf` package.

LLaMA-like families get the names of transformers' checkpoints, and the rows of q and k the order they have there; a
stack of experts becomes one tensor an expert. Other families keep GGUF's own names.
Source: `convert_hf_to_gguf.py` of llama.cpp.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.errors import CheckpointError
from lowrank_probe.tensor_info import Loader, Opened, TensorInfo

_NAMES: Final = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_MIXTRAL: Final = _NAMES | {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2", "ffn_up_exps": "block_sparse_moe.experts.*.w3",
}  # fmt: skip
_QWEN_MOE: Final = _NAMES | {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.*.gate_proj", "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
# Family → GGUF's names → transformers', * for an expert's number. GGUF calls Mixtral a llama.
_FAMILIES: Final = {
    "llama": _MIXTRAL, "mistral": _NAMES, "qwen2": _NAMES, "qwen3": _NAMES, "qwen2moe": _QWEN_MOE,
    "qwen3moe": _QWEN_MOE,
}  # fmt: skip
_PART: Final = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_PLAIN: Final = ("F64", "F32", "F16", "BF16")

# What the package's parser raises where it meets damage.
_DAMAGE: Final = (ValueError, LookupError, OverflowError, TypeError, OSError)


def open_gguf(file: Path) -> tuple[Opened, dict[str, Any]]:
    """(tensors, config) of a GGUF file, or of all the parts of a split one.

    Raises `CheckpointError` without the `gguf` package, for a damaged file, a missing part, heads that do not fit their
    matrix, and (on reading) for a type that `gguf` cannot dequantize.
    """
    first = _reader(file)
    parts = _parts(file, int(_field(file, first, "split.count") or 1))
    readers = [first if part == file else _reader(part) for part in parts]
    family = str(_field(parts[0], readers[0], "general.architecture") or "")
    keys = {
        "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length", "hidden_size": "embedding_length",
    }  # fmt: skip
    found = {key: _field(parts[0], readers[0], f"{family}.{gguf_key}") for key, gguf_key in keys.items()}
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    infos: dict[str, TensorInfo] = {}
    loaders: dict[str, Loader] = {}
    for part, reader in zip(parts, readers, strict=True):
        for tensor in reader.tensors:
            stored = _Stored(tensor, part, _permuted(tensor, part, family, found))
            name = _transformers_name(tensor.name, _FAMILIES.get(family, {}))
            if "*" in name:
                for expert in range(stored.shape[0]):
                    one = name.replace("*", str(expert))
                    infos[one], loaders[one] = stored.info(one, expert), replace(stored, expert=expert).rows
            else:
                infos[name], loaders[name] = stored.info(name), stored.rows
    # Head counts may be lists, one a layer; where layers differ there is none for the whole model.
    config = {key: _one(value) for key, value in found.items()} | {"model_type": family}
    return (infos, loaders), {key: value for key, value in config.items() if value}


def _reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"{file}: reading GGUF needs the gguf package: pip install gguf") from None
    try:
        return GGUFReader(file)
    except _DAMAGE as error:
        raise CheckpointError(f"{file}: is not a readable GGUF file ({str(error)[:200]})") from None


def _parts(file: Path, count: int) -> list[Path]:
    """All files of a split model, in order; the file itself where it is whole."""
    if count == 1:
        return [file]
    name = _PART.fullmatch(file.name)
    if name is None or int(name[2]) != count:
        raise CheckpointError(
            f"{file}: is one of {count} parts, expected to be named …-00001-of-{count:05}.gguf beside the others; "
            "give it that name, or merge the parts with llama-gguf-split --merge"
        )
    parts = [file.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise CheckpointError(
            f"{file}: is one of {count} parts, and {missing[0]} is not beside it; is the download complete?"
        )
    return parts


def _field(file: Path, reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except _DAMAGE as error:
        raise CheckpointError(f"{file}: its {key} cannot be read ({error}); download it again") from None


def _one(value: Any) -> Any:
    return value if not isinstance(value, list) else value[0] if len(set(value)) == 1 else None


def _transformers_name(name: str, names: dict[str, str]) -> str:
    block = re.match(r"blk\.(\d+)\.", name)
    module, _, kind = name[block.end() if block else 0 :].rpartition(".")
    if module not in names:
        return name
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{names[module]}.{kind}"


def _permuted(tensor: Any, file: Path, family: str, config: dict[str, Any]) -> int:
    """The number of heads whose rows llama.cpp has put in another order; 0 for none."""
    name = re.fullmatch(r"blk\.(\d+)\.attn_([qk])\.(?:weight|bias)", tensor.name)
    if family != "llama" or name is None:
        return 0
    key = "num_attention_heads" if name[2] == "q" else "num_key_value_heads"
    heads, rows = config[key], int(tensor.shape[-1])
    if isinstance(heads, list):
        heads = heads[int(name[1])] if int(name[1]) < len(heads) else None
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise CheckpointError(
            f"{file}: {tensor.name} has {rows} rows, expected heads of an even number of rows, and head_count "
            f"{'is missing' if heads is None else f'says {heads} heads'}; damaged? convert it again"
        )
    return heads


@dataclass(frozen=True)
class _Stored:
    """One tensor of a file, or one `expert` of a stack.

    permuted: heads whose rows are in llama.cpp's order, which interleaves the two halves of each head (rotary
    embedding); 0: as transformers has them.
    """

    tensor: Any
    file: Path
    permuted: int = 0
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As transformers counts it: the reverse of GGUF's order."""
        return tuple(int(length) for length in reversed(self.tensor.shape.tolist()))

    def info(self, name: str, expert: int | None = None) -> TensorInfo:
        kind, shape = self.tensor.tensor_type.name, self.shape
        start, n_bytes = int(self.tensor.data_offset), int(self.tensor.n_bytes)
        if expert is not None:
            n_bytes //= shape[0]
            start, shape = start + expert * n_bytes, shape[1:]
        return TensorInfo(name, shape, kind, self.file, start, start + n_bytes, quantized=kind not in _PLAIN)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first dimension; of other rows nothing is dequantized, but where permuted."""
        data = self.tensor.data if self.expert is None else self.tensor.data[self.expert]
        shape = self.shape if self.expert is None else self.shape[1:]
        if not self.permuted:
            return self._values(data[start:stop]).reshape(stop - start, *shape[1:])
        heads = self._values(data).reshape(self.permuted, shape[0] // self.permuted // 2, 2, *shape[1:])
        return heads.transpose(1, 2).reshape(shape)[start:stop]

    def _values(self, data: Any) -> Tensor:
        from gguf.quants import dequantize

        kind = self.tensor.tensor_type.name
        if kind in _PLAIN:
            values = torch.from_numpy(data.copy())
            return values.view(torch.bfloat16) if kind == "BF16" else values
        try:
            return torch.from_numpy(dequantize(data, self.tensor.tensor_type))
        except NotImplementedError:
            raise CheckpointError(
                f"{self.tensor.name} in {self.file}: the gguf package cannot dequantize {kind}; convert it to F16 or "
                "Q8_0 with llama-quantize --allow-requantize"
            ) from None
