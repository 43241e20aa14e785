"""Configurations of published models, as their config.json has them, for the budget benchmarks. No downloads."""

from collections.abc import Mapping
from typing import Any, Final


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _pythia(hidden: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "vocab_size": vocab, "max_position_embeddings": 2048, "rotary_pct": 0.25,
        "use_parallel_residual": True, "tie_word_embeddings": False,
    }  # fmt: skip


MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "SmolLM-135M": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "SmolLM-360M": _llama(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
    "Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256),
    "Qwen2.5-0.5B": _llama(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True) | {"model_type": "qwen2"},
    "Qwen2.5-7B": _llama(3584, 18944, 28, 28, 4, 152064) | {"model_type": "qwen2"},
    "Qwen3-1.7B": _llama(2048, 6144, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True)
    | {"model_type": "qwen3"},
    "Mistral-7B": _llama(4096, 14336, 32, 32, 8, 32000, sliding_window=4096) | {"model_type": "mistral"},
    "GPT-2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    "Pythia-1.4B": _pythia(2048, 24, 16, 50304),
    "Pythia-6.9B": _pythia(4096, 32, 32, 50432),
}  # fmt: skip
