"""What the families of models are written with: `Fields` reads a config, `weight` and its kin make `Weight`s."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_probe.errors import CheckpointError
from lowrank_probe.layers import place
from lowrank_probe.weight_shapes import Kind, Weight


@dataclass(frozen=True)
class Fields:
    """A config, read with its family's defaults; what is missing or no size is a `CheckpointError` that names it."""

    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    def size(self, *names: str, default: int | None = None, null: int | None = None) -> int:
        """The positive integer under the first of `names` that the config has.

        default: where it has none of them. null: where it has one as null, if that means something else.
        """
        name = next((name for name in names if name in self.config), names[0])
        value = self.config.get(name)
        if value is None:
            value = null if name in self.config and null is not None else default
        if value is None:
            raise CheckpointError(
                f"config of model type {self.model_type!r} has no {' or '.join(names)}: expected a positive integer, "
                "found none; give the model's own config.json"
            )
        return _whole(name, value, 1)

    def number(self, name: str, default: int) -> int:
        """As `size`, where 0 is allowed."""
        value = self.config.get(name)
        return _whole(name, default if value is None else value, 0)

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"config: {name} is {value!r}, expected true or false")
        return default if value is None else value

    def share(self, hidden: int, heads: int) -> int:
        """hidden / heads: the width of a head where the config gives none of its own."""
        if hidden % heads:
            raise CheckpointError(
                f"config of model type {self.model_type!r}: hidden size {hidden} is not a multiple of its {heads} "
                "attention heads; give the model's own config.json"
            )
        return hidden // heads


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CheckpointError(f"config: {name} is {value!r}, expected {'a positive' if least else 'an'} integer")
    return value


@dataclass(frozen=True)
class Sizes:
    """The sizes that every family has; `experts` of which `per_token` are used, 0 and 0 where it is no mixture."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    gated: bool = True
    experts: int = 0
    per_token: int = 0

    @property
    def blocks(self) -> range:
        return range(self.layers)


def decoder_sizes(
    f: Fields, *, kv_heads: int | None = None, head_dim: int | None = None, tied: bool = False, gated: bool = True
) -> Sizes:
    """Sizes under Llama's names. kv_heads, head_dim: the family's defaults, where they are numbers of their own."""
    hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
    if head_dim is None and f.config.get("head_dim") is None:
        head_dim = f.share(hidden, heads)
    grouped = f.size("num_key_value_heads", default=kv_heads or heads, null=heads)
    if heads % grouped and f.config.get("num_key_value_heads"):
        raise CheckpointError(
            f"config of model type {f.model_type!r}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {grouped}; give the model's own config.json"
        )
    return Sizes(
        hidden, f.size("num_hidden_layers"), heads, grouped, f.size("head_dim", default=head_dim),
        f.size("intermediate_size"), f.size("vocab_size"), f.flag("tie_word_embeddings", tied), gated,
    )  # fmt: skip


def weight(
    name: str, kind: Kind, shape: tuple[int, ...], bias: bool = False, layers: Iterable[int] | None = None,
    tied: bool = False,
) -> Weight:  # fmt: skip
    """A weight outside the blocks, or one in each of `layers`; a bias has as many entries as there are outputs."""
    numbers = None if layers is None else tuple(layers)
    layer_type = place(name.replace("*", "0")).layer_type
    count = 1 if numbers is None else len(numbers)
    return Weight(name, kind, layer_type, shape, shape[0] if bias else 0, count, numbers or (), tied)


def head(name: str, s: Sizes, bias: bool = False) -> Weight:
    """The output head, (vocabulary, hidden)."""
    return weight(name, "linear", (s.vocab, s.hidden), bias, tied=s.tied)


def attention(prefix: str, s: Sizes, qkv_bias: bool = False, o_bias: bool = False, o: str = "o_proj") -> list[Weight]:
    """q_proj, k_proj, v_proj and the output projection of each block."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return [
        weight(f"{prefix}.q_proj", "linear", (q, s.hidden), qkv_bias, s.blocks),
        weight(f"{prefix}.k_proj", "linear", (kv, s.hidden), qkv_bias, s.blocks),
        weight(f"{prefix}.v_proj", "linear", (kv, s.hidden), qkv_bias, s.blocks),
        weight(f"{prefix}.{o}", "linear", (s.hidden, q), o_bias, s.blocks),
    ]


def gated_mlp(
    prefix: str, s: Sizes, width: int, bias: bool = False, layers: Iterable[int] | None = None
) -> list[Weight]:
    """gate_proj, up_proj and down_proj, `width` wide."""
    numbers = tuple(s.blocks if layers is None else layers)
    return [
        weight(f"{prefix}.gate_proj", "linear", (width, s.hidden), bias, numbers),
        weight(f"{prefix}.up_proj", "linear", (width, s.hidden), bias, numbers),
        weight(f"{prefix}.down_proj", "linear", (s.hidden, width), bias, numbers),
    ]


def plain_mlp(prefix: str, up: str, down: str, s: Sizes, bias: bool, kind: Kind = "linear") -> list[Weight]:
    """Two layers, up to the intermediate size and down again."""
    return [
        weight(f"{prefix}{up}", kind, (s.intermediate, s.hidden), bias, s.blocks),
        weight(f"{prefix}{down}", kind, (s.hidden, s.intermediate), bias, s.blocks),
    ]


def norms(
    prefix: str, names: Iterable[str], width: int, bias: bool = False, layers: Iterable[int] | None = None
) -> list[Weight]:
    """Norms of one width: RMSNorm, or LayerNorm with its bias."""
    return [weight(f"{prefix}{name}", "norm", (width,), bias, layers) for name in names]
