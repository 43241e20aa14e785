"""Base and tuned model on the host, in float32, of one class: from directories, hub ids, adapters, or memory."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowrank_probe import hub
from lowrank_probe import running_models as running
from lowrank_probe.checkpoints import Checkpoint, open_checkpoint
from lowrank_probe.errors import CheckpointError, MatchError, ProbeError
from lowrank_probe.facts import side_facts
from lowrank_probe.remote_files import refuse_addresses
from lowrank_probe.running_models import CannotRun
from lowrank_probe.words import some

# Positions that a model counts but no text gets: RoBERTa's family counts from its padding id on.
_OFFSET_POSITIONS: Final = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "longformer", "mpnet", "esm"}
)
_SAME: Final = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "id2label",
    "label2id", "problem_type", "num_labels", "_attn_implementation", "attn_implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Sides:
    """The two models, ready to be compared.

    model: the tuned one, float32, on the host. base: name → the base's float32 parameters; what the base's files lack
    (a new head) is as tuned. config: config.json as a dict ({} where the model has none). directories: where a
    tokenizer may be. facts: of either side, as `facts.side_facts`.
    """

    model: nn.Module
    base: Mapping[str, Tensor]
    config: Mapping[str, Any]
    directories: tuple[Path, ...]
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    tuned: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids, where the config says it."""
        size = self._text.get("vocab_size")
        return size if isinstance(size, int) else None

    @property
    def positions(self) -> int | None:
        """The longest text in tokens, where the config says it."""
        found = next(
            (n for key in ("max_position_embeddings", "n_positions", "max_seq_len") if (n := self._text.get(key))), None
        )
        if not isinstance(found, int) or "relative_attention_num_buckets" in self._text:  # T5's family has no limit
            return None
        return found - 2 if self.config.get("model_type") in _OFFSET_POSITIONS else found

    @property
    def _text(self) -> Mapping[str, Any]:
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config().to_dict() if hasattr(config, "get_text_config") else {}
        aliases = {key: getattr(config, key, None) for key in ("vocab_size", "max_position_embeddings")}
        return {**{k: v for k, v in aliases.items() if v is not None}, **text}


def open_sides(base: Any, tuned: Any) -> Sides:
    """Load or take both sides; tuned may be a PEFT adapter's directory, which is merged into the base by peft.

    Raises `ProbeError` where one cannot be read or run, `MatchError` where they are not of one shape.
    """
    in_memory = [isinstance(side, nn.Module) for side in (base, tuned)]
    if any(in_memory):
        if not all(in_memory):
            raise ProbeError("expected two paths or two models in memory, found one of each")
        return _from_memory(base, tuned)
    refuse_addresses(base, tuned)
    checkpoints = open_checkpoint(base), open_checkpoint(tuned)
    for side in (base, tuned):
        if isinstance(side, str | os.PathLike) and not Path(side).exists():  # a hub id, then, and its weights are here
            hub.download_tokenizer(os.fspath(side))
    for side, what in zip(checkpoints, ("base", "tuned"), strict=True):
        if not side.files:
            raise ProbeError(f"{what}: a state dict cannot be run; give a model or its directory")
    if checkpoints[0].is_adapter:
        raise CheckpointError(f"{checkpoints[0].path}: is an adapter (expected the base model)")
    try:
        with running.quiet() as said:
            found = _from_files(*checkpoints)
    except CannotRun as reason:
        raise CheckpointError(str(reason)) from None
    notes = [*checkpoints[0].notes, *checkpoints[1].notes, *found.notes, *said]
    return Sides(
        found.model, found.base, found.config, found.directories, found.facts, tuple(notes), parameters(found.model)
    )


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """name → values of the parameters, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _from_files(base: Checkpoint, tuned: Checkpoint) -> Sides:
    where, other = _directory(base), _directory(tuned)
    notes: list[str] = []
    absent: list[str] = []
    device = torch.device("cpu")
    if tuned.is_adapter:
        kind = running.find_kind(where, where)
        before, _ = _load(where, kind)
        model, ignored = running.wear(_load(where, kind)[0], [(other, 1.0)], device)
        if ignored:
            raise CheckpointError(f"{other}: peft does not load {len(ignored)} of its tensors, such as {ignored[0]}")
        model = running.merge(model)
    else:
        kind = running.find_kind(other, other)
        model, lacking = _load(other, kind)
        needed = [name for name in lacking if "pooler" not in name]
        if needed:
            raise CannotRun(f"{other}: {kind.cls.__name__} needs {needed[0]}, which the files lack")
        before, absent = _load(where, kind)
        absent = sorted({*absent, *lacking})  # a pooler that neither has is made up on both sides, and is no update
    trunk = "" if model.base_model is model else f"{model.base_model_prefix}."
    below = [name for name in absent if name.startswith(trunk) and "pooler" not in name]
    if below:
        raise CannotRun(f"{where}: {kind.cls.__name__} needs {below[0]}, which the files lack")
    values = parameters(before)
    values |= {name: W for name, W in parameters(model).items() if name in absent}
    told = [name for name in absent if "pooler" not in name]
    if told:
        notes.append(f"the base has no {some(told)}: there the tuned model's own are used in every state")
    notes += _config_notes(before.config.to_dict(), model.config.to_dict())
    facts = {"base": side_facts(base), "tuned": side_facts(tuned)}
    return Sides(model, values, model.config.to_dict(), (other, where), facts, tuple(notes))


def _load(directory: Path, kind: running.Kind) -> tuple[Any, list[str]]:
    """(the model in float32 on the host, the parameters that the files lack). Raises `CannotRun`."""
    try:
        model, found = kind.cls.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # damaged or foreign checkpoints, too little memory
        raise CannotRun(f"{directory}: {kind.cls.__name__} cannot be loaded: {running.first_line(error)}") from None
    model.config.use_cache = False
    return model.eval(), sorted(found["missing_keys"])


def _directory(side: Checkpoint) -> Path:
    path = side.local_path
    return path if path.is_dir() else path.parent


def _config_notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    differ = sorted(key for key in {*before, *after} if key not in _SAME and before.get(key) != after.get(key))
    return [f"the configs differ in {some(differ)}: the base is run with the tuned model's"] if differ else []


def _from_memory(base: nn.Module, tuned: nn.Module) -> Sides:
    facts = {}
    for side, what in ((base, "base"), (tuned, "tuned")):
        if getattr(side, "peft_config", None):
            raise MatchError(f"{what}: wears a PEFT adapter; merge it first (merge_and_unload)")
        mark = sha256()
        for name, W in parameters(side).items():
            mark.update(f"{name} {float(torch.linalg.vector_norm(W.double()))!r}".encode())
        facts[what] = {"path": f"({type(side).__name__} in memory)", "kind": "model", "norms": mark.hexdigest()[:16]}
    config: Any = getattr(tuned, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    values = {name: W.float().cpu() for name, W in parameters(base).items()}
    model = copy.deepcopy(tuned).float().cpu().eval()  # the caller's own stays as it is
    return Sides(model, values, told, (), facts, (), parameters(model))
