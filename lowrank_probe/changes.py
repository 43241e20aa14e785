"""What merging changes: for every tensor of the base the changes that adapters make to it, from headers and configs.

Nothing is left over: a tensor of an adapter that has no place in the base is an error. `merging` carries it out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn

import torch

from lowrank_probe.adapters import LoraModule, read_modules
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.errors import CheckpointError, MatchError
from lowrank_probe.layers import is_conv1d, place
from lowrank_probe.layouts import Part
from lowrank_probe.matching import match
from lowrank_probe.options import Options

Kind = Literal["lora", "whole", "rows", "bias"]
_CAUSAL: Final = ("ForCausalLM", "LMHeadModel")
_HEADED: Final = ("ForMaskedLM", "ForConditionalGeneration", "MTModel", "ForPreTraining")
_TOKENS: Final = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Change:
    """What one adapter does to one tensor: `weight` times ΔW.

    kind: "lora", ΔW = scaling·B·A of `module`, of the matrix `part` (`conv1d`: stored (in, out)); "whole",
    ΔW = T − W with T the tensor; "rows", the same for the rows `rows` only; "bias", ΔW = scaling·tensor.
    tensor: its name in the adapter, for "lora" that of lora_A. number: which adapter it is, from 0.
    """

    number: int
    adapter: Checkpoint
    weight: float
    kind: Kind
    tensor: str
    module: LoraModule | None = None
    part: Part = field(default_factory=Part)
    conv1d: bool = False
    rows: tuple[int, ...] = ()


@dataclass
class Plan:
    """changes: name of the tensor to be written → what adapters do to it; the name is the base's, or in `added`.

    added: name of a tensor that the base does not store → the one whose values it has (an output head that was tied).
    untied: the head is no longer tied to its table. resized: name → the new shape of a table of more or fewer rows.
    tokenizer: the adapter whose tokenizer the merged model needs. notes: what to tell.
    """

    changes: dict[str, list[Change]] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    untied: bool = False
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokenizer: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)


def plan(base: Checkpoint, adapters: Sequence[Checkpoint], weights: Sequence[float]) -> Plan:
    """The changes of every adapter, in their order; no tensor is read but small ones that two sides of a table share.

    Raises `MatchError` naming tensor and adapter for what does not fit the base, `CheckpointError` for what is no
    adapter, or none that can be added.
    """
    made = Plan()
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        if not adapter.is_adapter:
            raise CheckpointError(f"{adapter.path}: is not an adapter (expected a directory with adapter_config.json)")
        _Planner(base, adapter, number, weight, made).run()
    _tie(base, made)
    for name in made.resized:
        if len(made.changes[name]) > 1 or made.changes[name][0].weight != 1:
            raise MatchError(
                f"{name}: an adapter replaces it by a table of {made.resized[name][0]} rows, the base has "
                f"{base.tensors[made.added.get(name, name)].shape[0]}: that can be merged alone and with weight 1 only"
            )
    return made


@dataclass(frozen=True)
class _Planner:
    """One adapter's changes, added to the plan."""

    base: Checkpoint
    adapter: Checkpoint
    number: int
    weight: float
    made: Plan

    def run(self) -> None:
        matching = match(self.base, self.adapter, Options())
        self.made.notes += [note for note in matching.notes if note not in self.made.notes]
        modules = {module.name_A: module for module in read_modules(self.adapter)[0]}
        model_type = self.base.config.get("model_type")
        seen = set()
        for pair in matching.pairs:
            if pair.lora is not None:
                conv1d = not pair.lora.kernel and not pair.lora.is_embedding and is_conv1d(pair.name, model_type)
                self._add(pair.name, "lora", pair.tuned_name, module=pair.lora, part=pair.part, conv1d=conv1d)
            elif (pair.name, pair.tuned_name) not in seen:
                seen.add((pair.name, pair.tuned_name))
                self._add(pair.name, "whole", pair.tuned_name)
        names = {pair.lora.name_B: pair.name for pair in matching.pairs if pair.lora is not None}
        for line in matching.ledger:
            if line["status"] == "shape differs":
                self._other_shape(line["name"], line["tuned_name"], modules)
            elif line["status"] == "only in tuned":
                self._unplaced(line["tuned_name"], modules, names)

    def _add(self, name: str, kind: Kind, tensor: str, **more: Any) -> None:
        change = Change(self.number, self.adapter, self.weight, kind, tensor, **more)
        self.made.changes.setdefault(name, []).append(change)

    def _other_shape(self, name: str, tensor: str, modules: Mapping[str, LoraModule]) -> None:
        stored, found = self.base.tensors[name].shape, self.adapter.tensors[tensor].shape
        table = place(name).layer_type in ("embedding", "lm_head")
        if tensor not in modules and table and found[1:] == stored[1:] and found[0] != stored[0]:
            self._add(name, "whole", tensor)
            self.made.resized[name] = found
            self.made.tokenizer = self.adapter
            return
        self._differs(name, stored, modules[tensor].shape if tensor in modules else found)

    def _differs(self, name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> NoReturn:
        raise MatchError(
            f"{name}: {self.base.path} has {stored}, {self.adapter.path} is for {shape}; is this the base it was "
            "trained on?"
        )

    def _unplaced(self, tensor: str, modules: Mapping[str, LoraModule], names: Mapping[str, str]) -> None:
        """A tensor of the adapter that matching found no counterpart for."""
        module = modules.get(tensor)
        plain = re.sub(r"^base_model\.model\.", "", tensor).replace(".base_layer.", ".")
        name = module.name if module else plain
        table = _table(self.base)
        if tensor.endswith(".lora_B.bias"):
            self._bias(tensor, modules, names)
        elif plain.endswith(_TOKENS):
            self._tokens(tensor, plain.removesuffix(_TOKENS))
        elif (
            module is None and self._stored(name) is not None
        ):  # the base's own tensor, which peft stores beside its factors
            known = str(self._stored(name))
            if self.base.tensors[known].shape != self.adapter.tensors[tensor].shape:
                self._other_shape(known, tensor, modules)
            else:
                self._add(known, "whole", tensor)
        elif module is None and (tied := self._tied(name, self.adapter.tensors[tensor].shape)):
            self._alias(tied, tensor)
        elif table and place(name).layer_type == "lm_head" and name.endswith("weight"):
            shape = module.shape if module else self.adapter.tensors[tensor].shape
            stored = self.base.tensors[table].shape
            if not module and shape[1:] == stored[1:] and shape[0] != stored[0]:
                self.made.resized[name] = shape
            elif shape != stored:
                self._differs(name, stored, shape)
            self.made.added[name] = table
            self._add(name, "lora" if module else "whole", tensor, module=module)
        else:
            raise MatchError(
                f"{self.adapter.path}: holds {tensor}, for which {self.base.path} has no place; is this the base it "
                "was trained on?"
            )

    def _tied(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The base's name of a tensor that models of its kind have under this one, too: a table of words that both
        towers look up (T5, BART), the bias of an output head (BERT)."""
        near = re.sub(r"\.decoder\.bias$", ".bias", name)
        if near == name and name.endswith(".embed_tokens.weight"):
            near = _table(self.base) or name
        known = self.base.tensors.get(near)
        return near if near != name and known is not None and known.shape == shape else None

    def _alias(self, name: str, tensor: str) -> None:
        """Another copy of what replaces a tensor of the base; one is enough where all are alike."""
        own = [one for one in self.made.changes.get(name, ()) if one.number == self.number]
        if not own:
            self._add(name, "whole", tensor)
        elif own[0].kind != "whole" or not torch.equal(self.adapter.read(own[0].tensor), self.adapter.read(tensor)):
            raise MatchError(
                f"{self.adapter.path}: {tensor} differs from {own[0].tensor}, and {self.base.path} has both as {name}; "
                "keep the adapter unmerged"
            )

    def _stored(self, name: str) -> str | None:
        """The base's name for it: the same, or the only one that ends in it or that it ends in."""
        if name in self.base.tensors:
            return name
        near = [one for one in self.base.tensors if one.endswith(f".{name}") or name.endswith(f".{one}")]
        return near[0] if len(near) == 1 else None

    def _bias(self, tensor: str, modules: Mapping[str, LoraModule], names: Mapping[str, str]) -> None:
        weight = tensor.removesuffix("bias") + "weight"
        module = next((one for one in modules.values() if one.name_B == weight), None)
        bias = names.get(weight, "").removesuffix("weight") + "bias"
        if module is None or bias not in self.base.tensors:
            raise MatchError(
                f"{self.adapter.path}: holds {tensor} (lora_bias), but the base has no {bias} to add it to; keep the "
                "adapter unmerged"
            )
        self._add(bias, "bias", tensor, module=module)

    def _tokens(self, tensor: str, module: str) -> None:
        listed = self.adapter.config.get("trainable_token_indices")
        if isinstance(listed, Mapping):
            listed = next((rows for key, rows in listed.items() if f".{module}".endswith(f".{key}")), None)
        name = self._stored(f"{module}.weight")
        count = self.adapter.tensors[tensor].shape[0]
        if name is None or not isinstance(listed, Sequence) or len(listed) != count:
            raise MatchError(
                f"{self.adapter.path}: {tensor} holds {count} rows, trainable_token_indices in its config gives "
                f"{listed if listed is None else len(listed)} of {name or module}"
            )
        rows = tuple(int(row) for row in listed)
        if not all(0 <= row < self.base.tensors[name].shape[0] for row in rows):
            raise MatchError(f"{self.adapter.path}: trainable_token_indices go beyond the rows of {name}")
        self._add(name, "rows", tensor, rows=rows)


def _tie(base: Checkpoint, made: Plan) -> None:
    """An output head that is tied to its table: both get the same change, or it is written apart."""
    table = _table(base)
    if table is None:
        return
    heads = [name for name in base.tensors if place(name).layer_type == "lm_head" and name.endswith("weight")]
    head = heads[0] if heads else next(iter(made.added), "")
    architectures = [str(one) for one in base.config.get("architectures") or ()]
    if not head and any(one.endswith(_CAUSAL) for one in architectures):
        head = "lm_head.weight"
    if not head:
        if table in made.changes and any(one.endswith(_HEADED) for one in architectures):
            made.notes.append(f"{table}: an output head that is tied to it changes with it; unmerged, peft keeps it")
        return
    if heads and not any(section.get("tie_word_embeddings") for section in sections(base.config)):
        return
    shared = [change for change in made.changes.get(table, ()) if change.kind == "rows"]
    of_table, of_head = made.changes.get(table, []), [*made.changes.get(head, ()), *shared]
    if not of_table and not of_head:
        return
    if _same_changes(of_table, of_head):
        if not heads:
            for known in (made.changes, made.added, made.resized):
                known.pop(head, None)
        return
    if made.resized:
        raise MatchError(
            f"{table}: has another number of rows in an adapter, but its tied {head} does not change alike; keep the "
            "adapter unmerged, or untie the base first"
        )
    made.changes[head] = of_head
    made.untied = True
    if not heads:
        made.added[head] = table
    made.notes.append(
        f"{head} is tied to {table}, and the adapters do not change both alike: written apart "
        "(tie_word_embeddings false), as base and adapters compute"
    )


def _same_changes(a: Sequence[Change], b: Sequence[Change]) -> bool:
    def order(change: Change) -> tuple[int, str]:
        return change.number, change.kind

    if [order(change) for change in sorted(a, key=order)] != [order(change) for change in sorted(b, key=order)]:
        return False
    pairs = zip(sorted(a, key=order), sorted(b, key=order), strict=True)
    return all(x is y or _same_values(x, y) for x, y in pairs)


def _same_values(x: Change, y: Change) -> bool:
    if x.kind == "lora" and x.module and y.module:
        sides = zip(x.module.read(x.adapter), y.module.read(y.adapter), strict=True)
        return x.module.scaling == y.module.scaling and all(torch.equal(p, q) for p, q in sides)
    return torch.equal(x.adapter.read(x.tensor), y.adapter.read(y.tensor))


def _table(base: Checkpoint) -> str | None:
    """The one table of words, None where there is none or there are several."""
    tables = [
        name for name, info in base.tensors.items() if place(name).layer_type == "embedding" and len(info.shape) == 2
    ]
    return tables[0] if len(tables) == 1 else None


def sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and the configs of its towers."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping) and "model_type" in value:
            yield value
