"""`select`: base, fine-tune, --targets → what an adapter carries by LoRA, what whole, what not. Reads headers only."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.errors import MatchError
from lowrank_probe.layers import LORA_TARGETS, matches, place, sort_key
from lowrank_probe.ledger import ledger_line, tensor_line
from lowrank_probe.matching import Matching, Pair, match
from lowrank_probe.modules import Modules, Slot, in_memory
from lowrank_probe.options import Options
from lowrank_probe.targets import Selection, Target, Whole

# PEFT rewrites modules of these names to parameters of the experts, wherever they are, in a model that has experts
# (`_convert_peft_config_moe`): there a linear layer is reached by the name of its parameter.
_REWRITTEN: Final = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
_NOT_ASKED: Final = "not in --targets"
_NOT_SERVED: Final = "more than LoRA on a linear layer: not in a servable adapter"


@dataclass(frozen=True)
class _Stored:
    """One tensor of the fine-tune, and where it goes. pair: None where the base has no tensor of its name and shape."""

    slot: Slot
    base_name: str
    tuned_name: str
    pair: Pair | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.slot.parameter, self.base_name, self.tuned_name)))

    @property
    def is_vector(self) -> bool:
        return self.slot.why == "a vector"


def select(
    base: Checkpoint, tuned: Checkpoint, targets: Sequence[str] = ("all-linear",), *,
    include: Sequence[str] = (), exclude: Sequence[str] = (), layers: tuple[int, int] | None = None,
    servable: bool = False, tied_lora: bool = False,
) -> Selection:  # fmt: skip
    """What an adapter for these targets carries, from the headers alone; nothing is read, so a ΔW may still be 0.

    targets: each one of
    - "all-linear": every linear layer and Conv1D but the output head, PEFT's meaning; stacks of experts are none.
    - "everything": all that changed: LoRA where it can, norms, tied, grown and new tables whole, biases of what LoRA
      adapts.
    - "default": the modules that LoRA adapts by default in this architecture (`layers.LORA_TARGETS`).
    - a layer type (`q`, `embedding`, `expert_gate`) or a pattern as `layers.matches` takes it, of a name in the file
      or in memory; it picks norms too, and `bias` picks the biases of what LoRA adapts.
    servable: LoRA on linear layers only, no module whole, no bias. tied_lora: LoRA on a table that is tied to the
    output head, which then holds unmerged only (PEFT ties it where it is named `embed_tokens`); else, and without
    tied_lora, such a table is carried whole.
    Raises `MatchError` for a target that matches nothing, listing what there is; else as `matching.match`.
    """
    matching = match(base, tuned, Options(include=include, exclude=exclude, layers=layers, split=False))
    by_tuned = bool(tuned.config.get("architectures"))
    modules = in_memory(tuned if by_tuned else base)
    result = Selection(modules=modules, matching=matching, notes=[*matching.notes, *filter(None, [modules.note])])
    result.left_out += matching.excluded
    stored, excluded = _stored(matching, modules, by_tuned)
    asked = _Asked(targets, str(tuned.config.get("model_type") or base.config.get("model_type") or ""), modules.head)
    rest: dict[str, list[_Stored]] = {}
    for parameter, members in _grouped(stored, lambda one: one.slot.parameter).items():
        if members[0].slot.kind is None or members[0].pair is None:
            rest.setdefault(members[0].slot.module, []).extend(members)
            continue
        target = "a part of it is excluded" if parameter in excluded else _target(members, modules, base)
        if isinstance(target, str):
            _leave_out(result, members, target)
        elif not asked.picks(members, target):
            _leave_out(result, members, _NOT_ASKED)
        elif servable and (target.kind not in ("linear", "conv1d") or target.by_parameter):
            _leave_out(result, members, _NOT_SERVED)
        elif target.tied and not (tied_lora and target.module.endswith("embed_tokens")):
            _carry_tied(result, target.name, members, "tied table", stored)
        else:
            result.chosen.append(target)
    _rest(result, rest, asked, excluded, servable, stored)
    asked.check(stored)
    for line in (line for line in matching.ledger if line["status"] == "not a matrix"):
        pair = Pair(line["name"], line["tuned_name"], place(line["name"]))
        result.left_out.append((pair, line | {"status": "left out"}))
    told = {line["tuned_name"] for _, line in result.left_out}
    told |= {name for one in result.whole for name in one.tensors.values()}
    matching.ledger[:] = [line for line in matching.ledger if line["tuned_name"] not in told]
    _notes(result, base, tuned)
    return result


def _grouped(stored: Iterable[_Stored], key: Callable[[_Stored], str]) -> dict[str, list[_Stored]]:
    groups: dict[str, list[_Stored]] = {}
    for one in stored:
        groups.setdefault(key(one), []).append(one)
    return groups


def _stored(matching: Matching, modules: Modules, by_tuned: bool) -> tuple[list[_Stored], set[str]]:
    """The tensors of the fine-tune that could be carried, and the parameters that options exclude."""

    def slot(base_name: str, tuned_name: str) -> Slot | None:
        found = modules.slots.get(tuned_name if by_tuned else base_name)
        shared = found and modules.tied.get(found.parameter)
        if found is None or not shared:
            return found
        if any(other.parameter == shared for other in modules.slots.values()):
            return replace(found, kind=None, why=f"tied to {shared}")
        module, _, leaf = shared.rpartition(".")
        return replace(found, module=module, leaf=leaf, kind="embedding" if found.kind else None)

    both: list[tuple[str, str, Pair | None]] = [(pair.name, pair.tuned_name, pair) for pair in matching.pairs]
    wanted = [line for line in matching.ledger if line["status"] in ("shape differs", "only in tuned")]
    both += [(x["name"] if x["status"] == "shape differs" else "", x["tuned_name"], None) for x in wanted]
    stored = [_Stored(found, a, b, pair) for a, b, pair in both if (found := slot(a, b)) is not None]
    gone = [slot(pair.name, pair.tuned_name) for pair, _ in matching.excluded]
    return stored, {one.parameter for one in gone if one is not None}


def _target(members: Sequence[_Stored], modules: Modules, base: Checkpoint) -> Target | str:
    """The target of one parameter from the tensors that make it up, or why it is none."""
    slot = members[0].slot
    copies: dict[int, list[tuple[int, Pair]]] = {}
    for one in members:
        assert one.pair is not None
        part = one.pair.part
        number = part.expert if one.slot.expert is None else one.slot.expert
        transposed = slot.transposed if part.expert is not None else slot.kind == "conv1d"
        pair = replace(one.pair, part=replace(part, transposed=transposed))
        copies.setdefault(number or 0, []).append((one.slot.piece, pair))
    pieces = []
    for number in range(max(copies) + 1):
        if number not in copies:
            return f"expert {number} of {max(copies) + 1} is missing"
        pieces.append(tuple(pair for _, pair in sorted(copies[number], key=lambda item: item[0])))
    shapes = [[pair.part.shape(base.tensors[pair.name].shape) for pair in pairs] for pairs in pieces]
    if any(found != shapes[0] for found in shapes) or len({n for _, n in shapes[0]}) > 1:
        return "its experts differ in shape"
    m, n = sum(rows for rows, _ in shapes[0]), shapes[0][0][1]
    first = pieces[0][0]
    stacked = len(pieces) > 1 or first.part.expert is not None or slot.expert is not None
    in_file = base.tensors[first.name].shape
    stored = (len(pieces), *((n, m) if slot.transposed else (m, n))) if stacked else (m, *in_file[1:])
    if slot.kind == "conv1d":
        stored = (n, m)
    last = slot.module.rpartition(".")[2]
    by_parameter = slot.kind == "parameter" or (slot.kind == "linear" and modules.experts and last in _REWRITTEN)
    where = first.place if len(members) == 1 else replace(place(slot.parameter), expert=None)
    return Target(
        slot.parameter if by_parameter else slot.module, slot.kind or "linear", where, (m, n), tuple(pieces), stored,
        by_parameter, slot.transposed and stacked, tied=slot.parameter in modules.tied.values(),
    )  # fmt: skip


def _rest(
    result: Selection, rest: dict[str, list[_Stored]], asked: "_Asked", excluded: set[str], servable: bool,
    stored: Sequence[_Stored],
) -> None:  # fmt: skip
    """What LoRA does not adapt: modules carried whole, biases of adapted modules; the others are left out."""
    adapted = {target.name: target for target in result.chosen if not target.by_parameter}
    inside = {target.module for target in result.chosen} | {whole.module for whole in result.whole}
    with_partners = {name for one in result.whole for held in one.partners.values() for name in held.values()}
    for module, every in rest.items():
        members = [one for one in every if one.tuned_name not in with_partners]
        if not members:
            continue
        bias_only = all(one.slot.leaf == "bias" and one.pair is not None for one in members)
        if not asked.picks(members):
            _leave_out(result, members, _not_asked(members))
        elif servable:
            _leave_out(result, members, _NOT_SERVED)
        elif bias_only and module in adapted:
            result.whole.append(_whole(module, members, "bias"))
        elif any(one.slot.parameter in excluded for one in members):
            _leave_out(result, members, "a part of it is excluded")
        elif module in inside or bias_only:
            _leave_out(result, members, "a bias of a module that is not adapted" if bias_only else members[0].slot.why)
        elif why := _why_not_whole(module, members, result):
            _leave_out(result, members, why)
        else:
            _carry_tied(result, module, members, _reason(members), stored)


def _not_asked(members: Sequence[_Stored]) -> str:
    """Why something is left out that the targets do not name; LoRA cannot adapt what the base has in no such shape."""
    if all(one.pair is not None for one in members):
        return _NOT_ASKED
    what = "of another shape than in the base" if members[0].base_name else "not in the base"
    return f"{_NOT_ASKED}; {what}, so that it could only be carried whole"


def _reason(members: Sequence[_Stored]) -> str:
    if all(one.pair is not None for one in members):
        return "norm"
    return "new module" if all(not one.base_name for one in members) else "another size"


def _why_not_whole(module: str, members: Sequence[_Stored], result: Selection) -> str:
    """Why `modules_to_save` cannot carry a module: it wraps it with all it holds, and finds it by a raw `endswith`."""
    if any(one.pair is None and one.base_name and place(one.tuned_name).layer is not None for one in members):
        return "of another shape than in the base, which no vocabulary or head explains: PEFT could not load it"
    known = result.modules.names
    if any(name.startswith(f"{module}.") for name in known) or not module:
        return f"a parameter of {module or 'the model itself'}, which holds other modules"
    odd = next((one for one in members if one.slot.kind is None and not one.is_vector), None)
    if odd is not None:
        return odd.slot.why
    if len({one.slot.leaf for one in members}) < len(members):
        return "stored in pieces, and not in both checkpoints in one shape"
    inner = re.compile(rf"(?:^|.*\.){module}(?:$|\..*)")
    clash = [name for name in known if name.endswith(module) and name != module]
    clash += [target.name for target in result.chosen if inner.match(target.name)]
    return f"PEFT finds modules to save by how a name ends, and so would take {clash[0]} too" if clash else ""


def _whole(module: str, members: Sequence[_Stored], why: str) -> Whole:
    return Whole(
        module, {one.slot.leaf: one.tuned_name for one in members},
        {one.slot.leaf: one.base_name for one in members if one.base_name}, why,
    )  # fmt: skip


def _carry_tied(
    result: Selection, module: str, members: Sequence[_Stored], why: str, stored: Sequence[_Stored]
) -> None:
    """Carry a module whole, and with it all modules that share its weight."""
    tied, order = result.modules.tied, result.modules.order
    names = {one.slot.parameter: one.tuned_name for one in stored}
    partners: dict[str, dict[str, str]] = {}
    for other in [name.rpartition(".")[0] for name, source in tied.items() if source == f"{module}.weight"]:
        held = [name for name in order if name.rpartition(".")[0] == other] or [f"{other}.weight"]
        sources = {name.rpartition(".")[2]: tied.get(name, name) for name in held}
        if not all(source in names for source in sources.values()):
            _leave_out(result, members, f"{other}, which is tied to it, has tensors that are in no file")
            return
        partners[other] = {leaf: names[source] for leaf, source in sources.items()}
    result.whole.append(replace(_whole(module, members, why), partners=partners))


def _leave_out(result: Selection, members: Iterable[_Stored], why: str) -> None:
    for one in members:
        if one.pair is not None:
            result.left_out.append((one.pair, ledger_line(one.pair, "left out", why)))
        else:
            result.left_out.append((None, tensor_line(one.base_name, one.tuned_name, "left out", why)))


class _Asked:
    """--targets: what they pick, and which of them picked nothing."""

    def __init__(self, targets: Sequence[str], model_type: str, head: str) -> None:
        if isinstance(targets, str) or not targets:
            raise MatchError(f'targets are a list, such as ["all-linear"] or ["q", "v"], found {targets!r}')
        self.targets, self.head = tuple(targets), head
        self.default = LORA_TARGETS.get(model_type, ())
        self.unused = set(targets)
        if "default" in targets and not self.default:
            raise MatchError(f"--targets default: none known for model type {model_type!r}; name the layer types")

    def picks(self, members: Sequence[_Stored], target: Target | None = None) -> bool:
        names = {name for one in members for name in one.names}
        # A bias goes with the rest of its module; on its own only where biases are asked for.
        names = {name for name in names if not name.endswith("bias")} or names
        picked = [pattern for pattern in self.targets if self._picks(pattern, names, target)]
        self.unused -= set(picked)
        return bool(picked)

    def _picks(self, pattern: str, names: set[str], target: Target | None) -> bool:
        if pattern == "everything":
            return True
        if pattern in ("all-linear", "default"):
            if target is None or target.kind not in ("linear", "conv1d"):
                return False
            if pattern == "default":
                return target.module.rpartition(".")[2] in self.default
            return target.module not in (self.head, "score", "classifier")
        if all(name.endswith("bias") for name in names) and not pattern.endswith("bias"):
            return False
        types = {place(name).layer_type for name in names} | ({target.place.layer_type} if target else set())
        return pattern in types or any(matches(name, pattern) for name in names)

    def check(self, stored: Sequence[_Stored]) -> None:
        """Raise `MatchError` for a target that picked nothing."""
        if self.unused:
            types = {place(one.tuned_name).layer_type for one in stored if one.slot.kind is not None}
            example = next((one.slot.module for one in stored if one.slot.kind is not None), "")
            raise MatchError(
                f"--targets {min(self.unused)}: matches nothing; there are the layer types "
                f"{' '.join(sorted(types, key=sort_key))}, and modules such as {example}"
            )


def _notes(result: Selection, base: Checkpoint, tuned: Checkpoint) -> None:
    """What whoever loads the adapter must know."""
    if any(target.tied for target in result.chosen):
        result.notes.append("LoRA is on a table that is tied to the output head: right unmerged, wrong when merged")
    for whole in result.whole:
        leaf = "weight"
        old = base.tensors[whole.base[leaf]].shape if leaf in whole.base else ()
        new = tuned.tensors[whole.tensors[leaf]].shape if leaf in whole.tensors else ()
        if len(old) == 2 and len(new) == 2 and old != new and place(whole.tensors[leaf]).layer_type == "embedding":
            result.sizes = (old[0], new[0])
            result.notes.append(
                f"the vocabulary has {old[0]} words in the base and {new[0]} in the fine-tune: call "
                f"model.resize_token_embeddings({new[0]}) on the base before the adapter is loaded"
            )
