"""`ModelShape`: every weight of a model by name, kind and shape, and exact counts of its parameters and of LoRA's.

Legend: m out, n in, r rank, E experts. No torch: shapes are tuples of integers.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from lowrank_probe.errors import MatchError
from lowrank_probe.layers import LORA_TARGETS, matches, sort_key

# As `modules.Kind`, and "norm" for what LoRA never adapts: norms, bare vectors.
Kind = Literal["linear", "conv1d", "embedding", "conv", "norm", "parameter"]

ATTENTION: Final = frozenset(
    {"q", "k", "v", "kv", "qkv", "q_a", "q_b", "kv_a", "kv_b", "o", "expert_q", "expert_o",
     "cross_q", "cross_k", "cross_v", "cross_kv", "cross_qkv", "cross_o"}
)  # fmt: skip
MLP: Final = frozenset(
    {"gate", "up", "gate_up", "down", "expert_gate", "expert_up", "expert_gate_up", "expert_down"}
)  # fmt: skip
_GROUPS: Final = {"attention": ATTENTION, "mlp": MLP}
# Model types for which PEFT (0.21, `_convert_peft_config_moe`) takes the names that a mixture's layers had in
# transformers 4 for the stacks of experts and routers of transformers 5; these names. A test compares.
_MIXTRAL: Final = frozenset({"gate", "w1", "w2", "w3"})
_QWEN: Final = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})
REWRITTEN: Final[dict[str, frozenset[str]]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(
        ("qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "afmoe", "beam",
         "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
         "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash",
         "mellum", "olmoe", "sarvam_mla", "solar_open"),
        _QWEN,
    ),
}  # fmt: skip
_STACKS: Final = frozenset({"gate", "gate_up_proj", "down_proj"})  # what those names have become


@dataclass(frozen=True)
class Weight:
    """One kind of module that is `count` times in the model: its weight, and its bias where it has one.

    name: the module in memory (transformers 5), number of layer and of expert as `*`:
    "model.layers.*.self_attn.q_proj"; of a bare parameter its own name. layer_type: as `layers.place` gives it.
    shape: (m, n) of a linear layer, and of GPT-2's Conv1D, which stores (n, m); (rows, width) of a table;
    (out, in, kernel…) of a convolution; as stored, (E, m, n), of a stack of experts; (n,) of a norm. bias: entries of
    its bias, 0 without. layers: the numbers of the layers it is in, () outside of them. tied: the weight is another
    one's and counts 0 (its bias, where it has one, counts). rank_factor: how many ranks PEFT gives it for one that is
    asked for (`ModelShape.adapted` sets it). transposed: a stack of experts stored (E, n, m).
    """

    name: str
    kind: Kind
    layer_type: str
    shape: tuple[int, ...]
    bias: int = 0
    count: int = 1
    layers: tuple[int, ...] = ()
    tied: bool = False
    rank_factor: int = 1
    transposed: bool = False

    @property
    def n_parameters(self) -> int:
        """Entries of all `count` of them, biases included; a tied weight has none of its own."""
        return self.count * ((0 if self.tied else math.prod(self.shape)) + self.bias)

    @property
    def sides(self) -> tuple[int, int]:
        """(m, n) as LoRA sees one matrix: one expert of a stack, a convolution's (out, in·kernel)."""
        if self.kind == "parameter" and len(self.shape) == 3:
            m, n = self.shape[1:]
            return (n, m) if self.transposed else (m, n)
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def copies(self) -> int:
        """Matrices in one of them: E for a stack of experts, else 1."""
        return self.shape[0] if self.kind == "parameter" and len(self.shape) == 3 else 1

    def lora_parameters(self, rank: int, dora: bool = False) -> int:
        """rank·(m + n) for each of them, for each expert of a stack; + m each with DoRA, a table's width.

        Source: PEFT's `lora.Linear`, `lora.Embedding`, `lora.ParamWrapper`; Liu et al. 2024 (DoRA), section 4.1.
        """
        m, n = self.sides
        magnitude = (n if self.kind == "embedding" else m) if dora else 0
        return self.count * (self.copies * self.rank_factor * rank * (m + n) + magnitude)

    def modules(self) -> Iterator[str]:
        """The name of each of them, with its numbers."""
        if "*" not in self.name:
            yield self.name
            return
        for layer in self.layers or (0,):
            name = self.name.replace("*", str(layer), 1)
            for expert in range(self.count // max(1, len(self.layers))):
                yield name.replace("*", str(expert), 1)


@dataclass(frozen=True)
class ModelShape:
    """A model as far as its memory depends on it; what its config says and each of its weights.

    model_type, config: config.json's. source: what it was counted from, for the reader. n_layers: blocks, of encoder
    and decoder together. intermediate: of one expert in a mixture. gated: the MLP has gate and up projections.
    n_active: parameters that one token meets: of a stack of experts the share `experts per token / experts`, all else
    whole, tables, routers and shared experts included; the whole model where it is no mixture. head: the output head's
    module. notes: what a reader must know, one sentence each. A number that the source does not tell is 0.
    """

    model_type: str
    source: str
    weights: tuple[Weight, ...]
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool
    tied_embeddings: bool
    config: Mapping[str, Any]
    n_active: int
    head: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def n_parameters(self) -> int:
        """All parameters; what is tied counts once."""
        return sum(weight.n_parameters for weight in self.weights)

    @property
    def experts_per_token(self) -> int:
        """How many of a stack of experts one token meets, as `n_active` has it; 0 where it is no mixture."""
        stacks = [weight for weight in self.weights if weight.kind == "parameter" and len(weight.shape) == 3]
        one_each = sum(weight.count * math.prod(weight.shape[1:]) for weight in stacks)
        rest = self.n_parameters - sum(weight.n_parameters for weight in stacks)
        return (self.n_active - rest) // one_each if stacks else 0

    def by_type(self) -> dict[str, int]:
        """layer type → its parameters, biases included, as data flows through a block."""
        found: dict[str, int] = {}
        for weight in sorted(self.weights, key=lambda weight: sort_key(weight.layer_type)):
            found[weight.layer_type] = found.get(weight.layer_type, 0) + weight.n_parameters
        return found

    def adapted(self, targets: Sequence[str] | str = ("all-linear",)) -> tuple[Weight, ...]:
        """The weights that LoRA adapts for these targets, each with how many of it; norms are never among them.

        targets: one, or a list, each one of
        - "all-linear": as PEFT means it, every Linear and Conv1D but the output head (a classifier's too, as with its
          task type SEQ_CLS). In a mixture of experts whose
          layers transformers 5 holds as stacks, PEFT 0.21 takes what was linear in transformers 4: the experts (gate
          and up, which are one there, get twice the rank) and the router; so for Mixtral and Qwen3-MoE, but not for
          Qwen2-MoE, where the stacks stay as they are.
        - "everything": all that LoRA can adapt: the output head, tables, stacks of experts and routers too.
        - "default": the modules that LoRA adapts by default in this architecture (`layers.LORA_TARGETS`).
        - "attention", "mlp": their projections, stacks of experts included, but no router.
        - a layer type (`q`, `expert_down`) or a pattern as `layers.matches` takes it, of a module's name.
        A stack of experts that is not part of "all-linear" is one of PEFT's `target_parameters`.
        Raises `MatchError` for a target that matches nothing, listing what there is.
        """
        asked = [targets] if isinstance(targets, str) else list(targets)
        if not asked:
            raise MatchError('targets are a list, such as ["all-linear"] or ["q", "v"], found none')
        unused, found = set(asked), []
        for weight in self.weights:
            if weight.kind == "norm" or len(weight.shape) < 2:
                continue
            picked = {target: part for target in asked if (part := self._part(weight, target)) is not None}
            unused -= set(picked)
            if picked:
                whole = {name: part for part in picked.values() for name in part.modules()}
                layers = tuple(i for i in weight.layers if any(i in part.layers for part in picked.values()))
                factor = max(part.rank_factor for part in picked.values())
                found.append(replace(weight, count=len(whole), layers=layers, rank_factor=factor))
        if unused:
            raise MatchError(self._nothing(min(unused)))
        return tuple(found)

    def lora_parameters(self, rank: int, targets: Sequence[str] | str = ("all-linear",), dora: bool = False) -> int:
        """Trainable parameters of a LoRA adapter: Σ rank·(m + n), and with DoRA + m a module.

        The rank may be larger than min(m, n); PEFT allows that. Raises `MatchError` for a rank below 1, as `adapted`,
        and where DoRA is asked for on stacks of experts or routers, which PEFT refuses.
        """
        if rank < 1:
            raise MatchError(f"rank {rank}: a rank is at least 1")
        adapted = self.adapted(targets)
        stack = next((weight for weight in adapted if weight.kind == "parameter"), None)
        if dora and stack is not None:
            raise MatchError(
                f"DoRA: PEFT cannot adapt {stack.name}, a bare parameter, with it; leave it out with targets such as "
                "attention, or use plain LoRA"
            )
        return sum(weight.lora_parameters(rank, dora) for weight in adapted)

    def _part(self, weight: Weight, target: str) -> Weight | None:
        """What of a weight a target picks, or None."""
        if target == "everything":
            return weight
        if target == "all-linear":
            return self._linear(weight)
        last = weight.name.rpartition(".")[2]
        if target == "default":
            if self.model_type not in LORA_TARGETS:
                raise MatchError(f"targets default: none known for model type {self.model_type!r}; name layer types")
            return weight if last in LORA_TARGETS[self.model_type] else None
        if target in _GROUPS:
            return weight if weight.layer_type in _GROUPS[target] else None
        if target == weight.layer_type or matches(weight.name, target):
            return weight
        if not re.search(r"\d", target):
            return None
        names = [name for name in weight.modules() if matches(name, target)]
        layers = tuple(i for i in weight.layers if any(i == number for name in names for number in _numbers(name)[:1]))
        return replace(weight, count=len(names), layers=layers) if names else None

    def _linear(self, weight: Weight) -> Weight | None:
        last = weight.name.rpartition(".")[2]
        old_names = REWRITTEN.get(self.model_type, frozenset())
        if old_names and weight.kind == "parameter" and last in _STACKS:
            return replace(weight, rank_factor=2) if last == "gate_up_proj" else weight
        if weight.kind not in ("linear", "conv1d") or weight.name == self.head or last in old_names:
            return None
        return weight

    def _nothing(self, target: str) -> str:
        able = [weight for weight in self.weights if weight.kind != "norm" and len(weight.shape) > 1]
        types = sorted({weight.layer_type for weight in able}, key=sort_key)
        names = dict.fromkeys(weight.name.rpartition(".")[2] for weight in able)
        return (
            f"targets {target}: matches nothing that LoRA can adapt; there are the layer types {' '.join(types)}, the "
            f"modules {' '.join(names)}, and all-linear, everything, default, attention, mlp"
        )


def _numbers(name: str) -> list[int]:
    return [int(step) for step in name.split(".") if step.isdigit()]
