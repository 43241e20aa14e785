"""Small checkpoints on disk for tests: planted updates, tiny models, adapters."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def orthonormal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, cols, generator=generator, dtype=torch.float64)).Q


def planted(shape: tuple[int, int], s: Tensor, seed: int = 0) -> Tensor:
    """U·diag(s)·Vh in float64 with random orthonormal U (m, r), Vh (r, n)."""
    generator = torch.Generator().manual_seed(seed)
    s = s.double()
    U, V = orthonormal(shape[0], len(s), generator), orthonormal(shape[1], len(s), generator)
    return (U * s) @ V.T


def write(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def write_sharded(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """Two shards and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name].contiguous() for name in members}, directory / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return directory


LLAMA_TYPES = {
    "self_attn.q_proj": (64, 48), "self_attn.k_proj": (32, 48), "mlp.up_proj": (96, 48), "mlp.down_proj": (48, 96),
}  # fmt: skip


def llama_tensors(n_layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights with Llama's names: embedding, blocks, norms."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(80, 48, generator=generator) * 0.02}
    for layer in range(n_layers):
        for module, shape in LLAMA_TYPES.items():
            name = f"model.layers.{layer}.{module}.weight"
            tensors[name] = torch.randn(*shape, generator=generator) * 0.02
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(48)
    tensors["model.norm.weight"] = torch.ones(48)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def add_update(tensors: dict[str, Tensor], relative: float = 0.05, rank: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """The tensors with an exact rank-`rank` update of every matrix and a small change of every vector."""
    tuned = {}
    for i, (name, W) in enumerate(tensors.items()):
        if W.ndim == 2:
            delta = planted((W.shape[0], W.shape[1]), torch.linspace(2, 1, rank), seed + i)
            delta *= relative * torch.linalg.norm(W.double()) / torch.linalg.norm(delta)
        else:
            delta = torch.full_like(W, 0.01, dtype=torch.float64)
        tuned[name] = (W.double() + delta).to(W.dtype)
    return tuned


def sides(
    directory: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], config: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    """(base, tuned) directories of two checkpoints."""
    return write(directory / "base", base, config), write(directory / "tuned", tuned, config)


def pair(directory: Path, dtype: torch.dtype = torch.float32, **update: Any) -> tuple[Path, Path]:
    """(base, tuned) directories of the small Llama with a planted update."""
    tensors = llama_tensors(dtype=dtype)
    config = {"model_type": "llama"}
    return write(directory / "base", tensors, config), write(directory / "tuned", add_update(tensors, **update), config)
