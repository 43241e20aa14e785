"""Stored tensor → the module of the loaded model that it becomes part of: the names and kinds that PEFT works with.

A file and the model loaded from it need not agree: transformers 5 stores Mixtral's experts one by one and loads them as
one parameter, stores ViT under names of its own, and a prefix may be missing. For the plain decoders (`_PLAIN`) the
names in the file are the module names. For all others transformers is asked: the model is built from its config on the
meta device (no weights) and its own loading rules say where each tensor goes; importing it takes two seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.layers import is_conv1d, place
from lowrank_probe.layouts import parts

# What LoRA does with a module: its linear layers, GPT-2's Conv1D (stored (in, out)), tables, convolutions, and
# parameters that are no module's weight of these kinds: stacks of experts, routers.
Kind = Literal["linear", "conv1d", "embedding", "conv", "parameter"]

# Decoders that transformers 5 loads under the names in the file, into Linear, Embedding and norms; a test compares.
_PLAIN: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "phi3", "smollm3",
     "starcoder2", "granite", "cohere"}
)  # fmt: skip
_HEAD: Final = "lm_head"


@dataclass(frozen=True)
class Slot:
    """Where one stored tensor goes: `module`.`leaf`, of a module that LoRA adapts as `kind`, or not, and then `why`.

    expert, piece: in a parameter made of several stored tensors: entry of the first dimension, and which of the pieces
    that lie one under the other (gate, then up). transposed: PEFT takes the stack of experts as (experts, in, out).
    """

    module: str
    leaf: str
    kind: Kind | None = None
    why: str = ""
    expert: int | None = None
    piece: int = 0
    transposed: bool = False

    @property
    def parameter(self) -> str:
        """The parameter's name in memory."""
        return f"{self.module}.{self.leaf}" if self.module else self.leaf


@dataclass(frozen=True)
class Modules:
    """The loaded model as far as an adapter needs it.

    slots: stored name → `Slot`. names: of all modules. head: the output head's module, "" where there is none.
    tied: parameter → the one that it is. experts: whether there are stacks of experts. order: the parameters
    as the model registers them; () unknown. note: what to tell.
    """

    slots: Mapping[str, Slot]
    names: frozenset[str]
    head: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    experts: bool = False
    order: tuple[str, ...] = ()
    note: str = ""


def in_memory(side: Checkpoint) -> Modules:
    """The modules that the checkpoint becomes when transformers loads it by the architecture that its config names.

    Where transformers does not know it (no config, code of its own), the names are those in the file; `note` says so.
    """
    config = side.config
    names = list(side.tensors)
    plain = config.get("model_type") in _PLAIN and all(n.startswith(("model.", f"{_HEAD}.")) for n in names)
    causal = all(str(a).endswith("ForCausalLM") for a in config.get("architectures") or ())
    if plain and causal:
        return _by_name(side)
    try:
        return _by_transformers(side)
    except Exception as error:  # whatever a model's own code may raise; the note says what
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        found = _by_name(side)
        return replace(found, note=f"module names are those in the file, transformers could not say: {why}")


def _by_name(side: Checkpoint) -> Modules:
    config = side.config
    slots = {}
    for name, info in side.tensors.items():
        module, _, leaf = name.rpartition(".")
        slots[name] = Slot(module, leaf, *_kind_by_name(name, module, leaf, info.shape, config))
    head = next((slot.module for slot in slots.values() if place(slot.parameter).layer_type == "lm_head"), "")
    tied = {}
    table = next((slot.parameter for slot in slots.values() if place(slot.parameter).layer_type == "embedding"), "")
    if not head and table and any(str(a).endswith("ForCausalLM") for a in config.get("architectures") or ()):
        head = _HEAD
        tied = {f"{head}.weight": table}
    elif head and table and config.get("tie_word_embeddings"):
        tied = {f"{head}.weight": table}
    return Modules(slots, _with_parents(slots) | ({head} if head else set()), head, tied)


def _kind_by_name(
    name: str, module: str, leaf: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> tuple[Kind | None, str]:
    layer_type = place(name).layer_type
    if len(shape) < 2:
        return None, "a vector"
    if len(shape) == 3 and layer_type.startswith("expert_"):
        return "parameter", ""
    if leaf != "weight":
        return None, f"{leaf} is no weight of a module that LoRA adapts"
    if len(shape) > 2:
        return ("conv", "") if parts(name, shape, config)[0] else (None, f"{len(shape)}-D")
    if is_conv1d(name, config.get("model_type")):
        return "conv1d", ""
    return ("embedding" if "embedding" in layer_type and "projection" not in layer_type else "linear"), ""


def _with_parents(slots: Mapping[str, Slot]) -> frozenset[str]:
    found: set[str] = set()
    for slot in slots.values():
        steps = slot.module.split(".")
        found.update(".".join(steps[:i]) for i in range(1, len(steps) + 1))
    return frozenset(found)


def _by_transformers(side: Checkpoint) -> Modules:
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    architectures = side.config.get("architectures") or ()
    if not architectures:
        raise ValueError("its config names no architecture")
    cls = getattr(transformers, architectures[0], None)
    if cls is None:
        raise ValueError(f"{architectures[0]} is none of its models")
    with torch.device("meta"):
        model = cls(cls.config_class.from_dict(dict(side.config)))
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    modules = dict(model.named_modules(remove_duplicate=False))
    state = model.state_dict()
    slots = {}
    for name in side.tensors:
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        module, _, leaf = key.rpartition(".")
        if key not in state:
            slots[name] = Slot(module, leaf, None, f"{architectures[0]} has no {key}")
            continue
        slot = Slot(module, leaf, *kind_of(modules[module], leaf, key, state[key].ndim))
        slot = replace(slot, transposed=bool(getattr(modules[module], "is_transposed", False)))
        slots[name] = slot if pattern is None else _assembled(slot, name, pattern, converter_of[pattern])
    outputs = model.get_output_embeddings()
    return Modules(
        slots, frozenset(modules), next((name for name, module in modules.items() if module is outputs), ""),
        dict(getattr(model, "all_tied_weights_keys", None) or {}),
        any(slot.kind == "parameter" and state[slot.parameter].ndim == 3 for slot in slots.values()), tuple(state),
    )  # fmt: skip


def kind_of(module: Any, leaf: str, key: str, ndim: int) -> tuple[Kind | None, str]:
    """What LoRA makes of one parameter of a module of torch, by PEFT's own tests (`dispatch_default`)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if ndim < 2:
        return None, "a vector"
    if leaf == "weight":
        for cls, kind in ((nn.Embedding, "embedding"), (Conv1D, "conv1d"), (nn.Linear, "linear")):
            if isinstance(module, cls):
                return kind, ""  # type: ignore[return-value]
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return ("conv", "") if module.groups == 1 else (None, f"a convolution in {module.groups} groups")
        if ndim == 2:
            return "parameter", ""
    if ndim == 3 and place(key).layer_type.startswith("expert_"):
        return "parameter", ""
    return None, f"a bare parameter of {type(module).__name__}"


def _assembled(slot: Slot, name: str, pattern: str, rule: Any) -> Slot:
    """The slot of a tensor that is loaded as a part of a parameter: experts side by side, rows one under the other."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    stacked = ("MergeModulelist", 0) in steps
    expert = place(name).expert if stacked else None
    known = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)], [("Concatenate", 0)])
    if steps not in known or len(rule.target_patterns) > 1 or (stacked and expert is None):
        how = ", ".join(step for step, _ in steps)
        return replace(slot, kind=None, why=f"transformers changes it when it loads it ({how})")
    return replace(slot, expert=expert, piece=list(rule.source_patterns).index(pattern))
