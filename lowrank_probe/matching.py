"""Match two checkpoints strictly, or an adapter with its base, from the headers alone: `match` → the pairs to read.

Nothing is guessed: names match as they are, or after one base-model prefix (`bert.`, `model.`, …) that is said in the
notes. What is not compared goes to the ledger at once.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lowrank_probe import words
from lowrank_probe.adapters import LoraModule, read_modules
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.errors import MatchError
from lowrank_probe.layers import BASE_PREFIXES, Place, is_conv1d, is_known, matches, place
from lowrank_probe.layouts import Part, parts
from lowrank_probe.ledger import ledger_line, tensor_line
from lowrank_probe.modules import Slot, in_memory
from lowrank_probe.options import Options

# Buffers that checkpoints carry beside their weights; anything else that is not a float is refused by name.
_BUFFERS: Final = re.compile(
    r"(?:^|\.)(?:position_ids|token_type_ids|num_batches_tracked|masked_bias|inv_freq|rotary_emb\.\w+)$"
)
# A causal mask is (1, 1, length, length), a trained bias of that name 1-D.
_MASKS: Final = re.compile(r"(?:^|\.)(?:attn|attention)\.bias$")
# A tensor that PEFT has wrapped or added; a few models hold such tensors of their own, on both sides.
_WRAPPED: Final = re.compile(r"\.(?:base_layer|lora_[AB]|lora_embedding_[AB])(?:\.|$)")
_WHOLE: Final = Part()


@dataclass
class Matching:
    """What the headers say: the pairs to read, the ledger lines decided already, and what there is to tell.

    excluded: the pairs that options leave out, each with its ledger line. unequal: the note that names tensors of two
    shapes, of which there is no ΔW ("": none); an adapter may still carry them whole.
    """

    pairs: list["Pair"] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    excluded: list[tuple["Pair", dict[str, Any]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unequal: str = ""


@dataclass(frozen=True)
class Pair:
    """Two tensors to compare, or one matrix inside both, or one LoRA module on its base tensor (None without a base).

    name, tuned_name: of the stored tensors; key: the matrix's own name, such as `…c_attn.weight[q]`.
    note: how the tensor was taken apart.
    """

    name: str
    tuned_name: str
    place: Place
    lora: LoraModule | None = None
    part: Part = _WHOLE
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}[{self.part.label}]" if self.part.label else self.name

    def entries(self, base: Checkpoint | None, tuned: Checkpoint) -> int:
        """Number of entries of the matrix (for progress)."""
        if self.lora is not None:
            return math.prod(self.lora.shape)
        side, name = (tuned, self.tuned_name) if base is None or self.name not in base.tensors else (base, self.name)
        stored = side.tensors[name].shape
        return math.prod(self.part.shape(stored) if len(stored) > 1 else stored)


def match(base: Checkpoint | None, tuned: Checkpoint, options: Options) -> Matching:
    """Pair the tensors of two checkpoints from their headers alone; of `options`, include, exclude, layers and split.

    Raises `MatchError` where the two have no tensor in common, or a pattern selects nothing; `CheckpointError` for a
    dtype that cannot be read.
    """
    result = Matching()
    if tuned.is_adapter:
        _match_adapter(base, tuned, result)
    else:
        if base is None:
            raise MatchError(f"{tuned.path}: is not an adapter, so a base is needed: probe spectrum BASE TUNED")
        if base.is_adapter:
            raise MatchError(f"{base.path}: is an adapter; give the base model first and the adapter second")
        _match_models(base, tuned, result, options.split)
    for side, word in ((base, "base"), (tuned, "tuned")):
        result.notes += [] if side is None else [*side.notes, *_quantized_note(side, word, tuned.is_adapter)]
    _select(result, options)
    for pair in result.pairs:  # from the headers, before any work
        for side, name in ((base, pair.name), (tuned, pair.tuned_name)):
            if side is not None and name in side.tensors:
                side.tensors[name].check_dtype()
    return result


def _quantized_note(side: Checkpoint, word: str, beside_adapter: bool) -> list[str]:
    kinds = sorted({info.dtype for info in side.tensors.values() if info.quantized})
    effect = "its rounding is part of ΔW, so that ranks are undecidable where it takes part"
    if beside_adapter:
        effect = "an adapter's ΔW is free of its rounding, ‖W‖ is not"
    said = f"the {word} side is quantized ({', '.join(kinds)}) and was dequantized to be read: {effect}"
    return [said] if kinds else []


def _refuse_wrapped(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise `MatchError` where one side alone holds factors beside its weights: its change is not in the weights."""
    wrapped = [next(filter(_WRAPPED.search, side.tensors), "") for side in (base, tuned)]
    for side, name, other in zip((base, tuned), wrapped, reversed(wrapped), strict=True):
        if name and not other:
            raise MatchError(
                f"{side.path}: holds {name}: weights inside PEFT's wrapping, or an adapter without its "
                "adapter_config.json; save the adapter (save_pretrained) and give its directory, or the merged model "
                "(merge_and_unload)"
            )


def _match_models(base: Checkpoint, tuned: Checkpoint, result: Matching, split: bool) -> None:
    _refuse_wrapped(base, tuned)
    names = {name: name for name in base.tensors if name in tuned.tensors}
    rest_base = [name for name in base.tensors if name not in names]
    rest_tuned = [name for name in tuned.tensors if name not in names]
    renamed, note = _by_prefix(rest_base, rest_tuned)
    if note:
        result.notes.append(note)
    names.update(renamed)
    if not names:
        mend = "are they the same architecture?"
        if (base.path.suffix == ".gguf") != (tuned.path.suffix == ".gguf"):
            mend = "a GGUF file of this family has GGUF's own names: give GGUF on both sides"
        raise MatchError(
            f"{base.path} and {tuned.path} have no tensor in common (base has {_some(base.tensors)}; "
            f"tuned has {_some(tuned.tensors)}); {mend}"
        )
    taken = set(names.values())
    beyond = 0
    scale_of = {scale: weight for side in (base, tuned) for weight, scale in side.scales.items()}
    for name in base.tensors:
        if name not in names:
            result.ledger.append(_scale_line(name, "", scale_of) or tensor_line(name, "", "only in base"))
    for name in tuned.tensors:
        if name not in taken:
            result.ledger.append(_scale_line("", name, scale_of) or tensor_line("", name, "only in tuned"))
    for name, other in names.items():
        a, b = base.tensors[name], tuned.tensors[other]
        scale = _scale_line(name, other, scale_of)
        if scale:
            result.ledger.append(scale)
        elif a.shape != b.shape:
            note = "vocabulary or head of another size?" if a.shape[1:] == b.shape[1:] else "not the same architecture?"
            result.ledger.append(tensor_line(name, other, "shape differs", note))
        elif (_BUFFERS.search(name) and len(a.shape) != 2) or (_MASKS.search(name) and len(a.shape) == 4):
            result.ledger.append(tensor_line(name, other, "not a weight", "a buffer"))
        elif a.dtype in ("I64", "BOOL") or b.dtype in ("I64", "BOOL"):
            result.ledger.append(tensor_line(name, other, "not a weight", "integer or bool"))
        elif len(a.shape) < 2:
            result.pairs.append(Pair(name, other, place(name)))
        else:
            found, note = parts(name, a.shape, base.config or tuned.config, split=split)
            result.pairs += [Pair(name, other, _place_of(name, part), None, part, note) for part in found]
            if not found:
                result.ledger.append(tensor_line(name, other, "not a matrix", note))
                beyond += math.prod(a.shape)
    if beyond:
        share = beyond / sum(math.prod(info.shape) for info in base.tensors.values())
        result.notes.append(f"{100 * share:.0f} % of the parameters are in tensors that are no matrices: not analysed")
    unknown = sorted({pair.place.layer_type for pair in result.pairs if not _has_type(pair, base)})
    if unknown:
        result.notes.append(
            f"no layer type is known for {_some(unknown, 4)} (model type {base.config.get('model_type')!r}): "
            "named after the module itself"
        )
    result.notes += sorted({pair.note for pair in result.pairs if "kept whole" in pair.note})
    differing = [line["name"] for line in result.ledger if line["status"] == "shape differs"]
    if differing:
        one = len(differing) == 1
        what = "1 tensor differs in shape and is" if one else f"{len(differing)} tensors differ in shape and are"
        result.unequal = f"{what} left out: {_some(differing)}"
    if differing and not result.pairs:
        raise MatchError(
            f"{base.path} and {tuned.path}: every tensor that both have differs in shape (such as {_some(differing)}); "
            "not the same architecture?"
        )


def _match_adapter(base: Checkpoint | None, adapter: Checkpoint, result: Matching) -> None:
    modules, others = read_modules(adapter)
    if base is None:
        result.pairs += [_lora_pair(module.name, module, None) for module in modules]
        for name in others:
            result.ledger.append(tensor_line("", name, "only in tuned", "no base given to compare with"))
        return
    plain = {re.sub(r"^base_model\.model\.", "", name).replace(".base_layer.", "."): name for name in others}
    wanted = list(dict.fromkeys([*(module.name for module in modules), *plain]))
    found = {name: name for name in wanted if name in base.tensors}
    renamed, note = _by_prefix([n for n in base.tensors if n not in found], [n for n in wanted if n not in found])
    if note:
        result.notes.append(note)
    found.update({wanted_name: base_name for base_name, wanted_name in renamed.items()})
    missing = set(wanted) - set(found)
    if missing:
        modules, plain = _as_stored(base, modules, plain, missing)
        found.update({name: name for name in (*(module.name for module in modules), *plain) if name in base.tensors})
    names: dict[str, list[LoraModule]] = {}
    for module in modules:
        names.setdefault(module.name, []).append(module)
    if not any(name in found for name in names):
        raise MatchError(
            f"{adapter.path} adapts no tensor of {base.path} (adapter has {_some(names)}; base has "
            f"{_some(base.tensors)}); is this the base it was trained on?"
        )
    model_type = base.config.get("model_type")
    for name, members in names.items():
        first = members[0]
        if name not in found:
            result.ledger.append(tensor_line("", first.name_A, "only in tuned", f"base has no {name}"))
        elif not first.fits(base.tensors[found[name]].shape, is_conv1d(name, model_type)):
            line = tensor_line(found[name], first.name_A, "shape differs", f"adapter is for {first.shape}")
            result.ledger.append(line)
        else:
            result.pairs += [_lora_pair(found[name], module, base) for module in members]
    adapted = {found[name] for name in names if name in found}
    for name, tensor in plain.items():
        if found.get(name) in adapted:
            note = f"the base's {name}, which peft stores beside its factors: not compared"
            result.ledger.append(tensor_line("", tensor, "only in tuned", note))
        elif name not in found:
            result.ledger.append(tensor_line("", tensor, "only in tuned"))
        elif base.tensors[found[name]].shape != adapter.tensors[tensor].shape:
            result.ledger.append(tensor_line(found[name], tensor, "shape differs"))
        else:
            shape = base.tensors[found[name]].shape
            whole = parts(found[name], shape, base.config, split=False)[0] if len(shape) == 2 else [_WHOLE]
            result.pairs += [Pair(found[name], tensor, place(found[name]), None, part) for part in whole]
    touched = set(found.values())
    for name in base.tensors:
        if name not in touched:
            result.ledger.append(tensor_line(name, "", "unchanged", "not adapted"))


def _lora_pair(name: str, module: LoraModule, base: Checkpoint | None) -> Pair:
    """The pair of one LoRA module; of one of several copies, with its part of the base's stack."""
    part = _WHOLE
    if module.expert is not None:
        stored = base.tensors[name].shape if base else ()
        if len(stored) != 2:
            transposed = stored[1:] == module.shape[::-1]
            if base and module.shape[0] == module.shape[1]:  # the shape does not tell
                transposed = any(one.transposed for one in parts(name, stored, base.config, split=False)[0])
            part = Part(str(module.expert), None, module.expert, transposed)
    return Pair(name, module.name_A, place(name), module, part)


def _as_stored(
    base: Checkpoint, modules: list[LoraModule], plain: dict[str, str], missing: set[str]
) -> tuple[list[LoraModule], dict[str, str]]:
    """The missing modules and other tensors under the names that the base's file has for what they are in memory.

    A parameter that is stored in pieces becomes one module a piece: the rows of its B that are the piece's.
    """
    stored: dict[str, list[tuple[Slot, str]]] = {}
    for name, slot in in_memory(base).slots.items():
        if slot.parameter in missing:
            stored.setdefault(slot.parameter, []).append((slot, name))
    renamed = []
    for module in modules:
        pieces = [one for one in stored.get(module.name, ()) if one[0].expert in (None, module.expert)]
        start = 0
        for _, name in sorted(pieces, key=lambda one: one[0].piece):
            shape = base.tensors[name].shape
            one = replace(module, name=name)
            if len(pieces) > 1:
                one = replace(one, rows=(start, start + shape[0]), shape=(shape[0], module.shape[1]))
                start += shape[0]
            renamed.append(one)
        if not pieces or (len(pieces) > 1 and start != module.shape[0]):
            renamed = [*renamed[: len(renamed) - len(pieces)], module]
    return renamed, {stored[name][0][1] if len(stored.get(name, ())) == 1 else name: plain[name] for name in plain}


def _by_prefix(rest_base: Sequence[str], rest_tuned: Sequence[str]) -> tuple[dict[str, str], str]:
    """base name → tuned name for the one prefix that matches most of what is left, and a sentence that says so."""
    in_base, in_tuned = set(rest_base), set(rest_tuned)
    best: dict[str, str] = {}
    note = ""
    for prefix in BASE_PREFIXES:
        added = {name: prefix + name for name in rest_base if prefix + name in in_tuned}
        dropped = {prefix + name: name for name in rest_tuned if prefix + name in in_base}
        for renamed, side in ((added, "tuned"), (dropped, "base")):
            if len(renamed) > len(best):
                best = renamed
                note = f"{len(renamed)} tensors matched after the prefix '{prefix}' that only the {side} side has"
    return best, note


def _select(result: Matching, options: Options) -> None:
    include, exclude, layers = options.include, options.exclude, options.layers
    kept = []
    every = [pair.name for pair in result.pairs] + [line["name"] or line["tuned_name"] for line in result.ledger]
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(_selects(pattern, pair) for pair in result.pairs) and not any(
                matches(line["name"] or line["tuned_name"], pattern) for line in result.ledger
            ):
                raise MatchError(
                    f"{option} {pattern}: matches none of the {len(every)} tensors (such as {_some(every)})"
                )
    for pair in result.pairs:
        why = ""
        if include and not any(_selects(pattern, pair) for pattern in include):
            why = "not in --include"
        elif any(_selects(pattern, pair) for pattern in exclude):
            why = "--exclude"
        elif layers and not (pair.place.layer is not None and layers[0] <= pair.place.layer <= layers[1]):
            why = f"outside --layers {words.layer_span(layers)}"
        if why:
            result.excluded.append((pair, ledger_line(pair, "excluded", note=why)))
        else:
            kept.append(pair)
    if layers and not kept:
        raise MatchError(f"--layers {words.layer_span(layers)}: no tensor has such a layer number")
    if (include or exclude) and not kept:
        raise MatchError("--include and --exclude leave no tensor that both sides have in one shape")
    result.pairs[:] = kept


def _selects(pattern: str, pair: Pair) -> bool:
    return pattern in (pair.key, pair.place.layer_type) or matches(pair.name, pattern)


def _has_type(pair: Pair, base: Checkpoint) -> bool:
    return len(base.tensors[pair.name].shape) < 2 or pair.part.layer_type is not None or is_known(pair.name)


def _place_of(name: str, part: Part) -> Place:
    where = place(name)
    expert = where.expert if part.expert is None else part.expert
    return replace(where, layer_type=part.layer_type or where.layer_type, expert=expert)


def _scale_line(name: str, tuned_name: str, scale_of: Mapping[str, str]) -> dict[str, Any] | None:
    weight = scale_of.get(name) or scale_of.get(tuned_name)
    return tensor_line(name, tuned_name, "not a weight", f"the scale of {weight}") if weight else None


def _some(names: Any, count: int = 2) -> str:
    listed = list(names)
    return ", ".join(listed[:count]) + (", …" if len(listed) > count else "")
