"""Write an adapter directory that PEFT loads: factors first, tensor by tensor, `adapter_config.json` last.

Legend: B (E, m, r), A (E, r, n), ΔW = B·A for each of the E copies of a target (E = 1 but for stacks of experts).
Every rank is written with alpha = rank, so that the scaling is 1 whatever a reader makes of `alpha_pattern`.
Source: PEFT 0.21, `LoraConfig`, `set_peft_model_state_dict`, `ParamWrapper`, `ModulesToSaveWrapper`.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.adapter_format import CONFIG, WEIGHTS, packed, ranks_and_patterns, target_modules
from lowrank_probe.adapters import read_modules
from lowrank_probe.checkpoints import Checkpoint, open_checkpoint
from lowrank_probe.errors import NumericsError, OutputError, ProbeError
from lowrank_probe.layers import place, sort_key
from lowrank_probe.narrowing import CODES, all_finite, narrowed
from lowrank_probe.outputs import write_directory, write_json
from lowrank_probe.safetensors_files import write_file
from lowrank_probe.targets import Selection, Target, Whole

_HEAD: Final = "lm_head"
_PREFIX: Final = "base_model.model."

Factors = Callable[[Target], tuple[Tensor, Tensor]]


def rounded(factor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The factor as it is stored. Raises `NumericsError` where an entry is not finite, or too large for the dtype."""
    if not all_finite(factor):
        raise NumericsError(f"{name}: its LoRA factors contain NaN or Inf")
    return narrowed(factor, dtype, f"{name}: its LoRA factors reach")


def write_adapter(
    directory: str | os.PathLike[str], selection: Selection, ranks: Mapping[str, int], factors: Factors,
    base: Checkpoint, tuned: Checkpoint, *, dtype: torch.dtype = torch.float32,
    files: Mapping[str, Callable[[Path], Any]] | None = None,
) -> Path:  # fmt: skip
    """Write the adapter of a selection into `directory` and read it back with our own reader. Returns the directory.

    ranks: name of each chosen target → its rank; 0 or missing: no module is written (`Selection.at`).
    factors(target) → B (E, m, r) and A (E, r, n), or (m, r) and (r, n) for E = 1, with ΔW ≈ B·A; asked for one target
    at a time, in the order of `selection.chosen`, and rounded to dtype. files: name → writer of what else goes there.
    The tokenizer of the fine-tune is copied where the vocabulary differs.
    Raises `OutputError` where there is an adapter already or nothing can be written, `NumericsError` for a factor that
    is not finite in `dtype`, `ProbeError` where no target has a rank: PEFT refuses an adapter without one.
    """
    root = Path(directory)
    if (root / CONFIG).exists():
        raise OutputError(f"{root}: holds an adapter already; choose another --out")
    selection = selection.at(ranks)
    modules = [(target, ranks[target.name]) for target in selection.chosen]
    if not modules:
        raise ProbeError(
            "no matrix to adapt: every ΔW asked for is 0, or only norms and tables changed, and PEFT takes no adapter "
            "without LoRA on a matrix (--targets everything puts it on a table, --tied-lora on one that is tied)"
        )
    whole = selection.whole
    keys = _keys([target for target, _ in modules], selection.modules.order)
    config = _config(modules, whole, selection, base, tuned)
    infos: list[tuple[str, str, tuple[int, ...]]] = []
    for target, r in modules:
        infos += [(key, CODES[dtype], shape) for key, shape in zip(keys[target.name], _shapes(target, r), strict=True)]
    carried = [
        (f"{_PREFIX}{module}{'.base_layer' if one.is_bias else ''}.{leaf}", name)
        for one in whole
        for module, tensors in ((one.module, one.tensors), *one.partners.items())
        for leaf, name in tensors.items()
    ]
    for key, name in carried:
        info = tuned.tensors[name]
        infos.append((key, "F32" if info.quantized else info.dtype, info.shape))

    def tensors() -> Iterator[Tensor]:
        for target, _ in modules:
            B, A = factors(target)
            yield from (rounded(factor, dtype, target.name) for factor in _packed(target, B, A))
        for _, name in carried:
            yield tuned.read(name)

    metadata = {"format": "pt"}
    if selection.sizes:
        metadata |= {"base_vocabulary": str(selection.sizes[0]), "tuned_vocabulary": str(selection.sizes[1])}

    def write_config(file: Path) -> None:
        write_json(file, config)
        _check(file.parent, modules)

    files_of_tokenizer = tuned.tokenizer_files if selection.sizes else []
    copied = {file.name: partial(shutil.copyfile, file) for file in files_of_tokenizer}
    return write_directory(
        root, {WEIGHTS: lambda file: write_file(file, infos, tensors(), metadata), **copied, **(files or {}),
               CONFIG: write_config},
    )  # fmt: skip


def _keys(targets: Sequence[Target], order: Sequence[str]) -> dict[str, tuple[str, str]]:
    """target name → the names of lora_A and lora_B in the file.

    PEFT wraps the parameters of one module in each other, the first one registered innermost.
    """
    registered = {name: i for i, name in enumerate(order)}
    nested: dict[str, list[Target]] = {}
    for target in targets:
        if target.by_parameter:
            nested.setdefault(target.module, []).append(target)
    keys = {}
    for target in targets:
        path, weight = f"{_PREFIX}{target.module}", ".weight"
        if target.by_parameter:
            members = sorted(
                nested[target.module], key=lambda one: (registered.get(one.name, -1), sort_key(one.place.layer_type))
            )
            path += ".base_layer" * (len(members) - 1 - members.index(target))
        factor = "lora_"
        if target.kind == "embedding":
            factor, weight = "lora_embedding_", ""
        keys[target.name] = (f"{path}.{factor}A{weight}", f"{path}.{factor}B{weight}")
    return keys


def _shapes(target: Target, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of lora_A and lora_B in the file."""
    m, n = target.shape
    B, A = (torch.empty(target.copies, *shape, device="meta") for shape in ((m, r), (r, n)))
    lora_A, lora_B = _packed(target, B, A)
    return tuple(lora_A.shape), tuple(lora_B.shape)


def _packed(target: Target, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B as PEFT stores them."""
    kernel = target.stored[2:] if target.kind == "conv" else ()
    return packed(B, A, embedding=target.kind == "embedding", kernel=kernel)


def _config(
    modules: Sequence[tuple[Target, int]], whole: Sequence[Whole], selection: Selection, base: Checkpoint,
    tuned: Checkpoint,
) -> dict[str, Any]:  # fmt: skip
    by_module = {target.name: r for target, r in modules if not target.by_parameter}
    by_parameter = {target.name: r for target, r in modules if target.by_parameter}
    saved = [module for one in whole if not one.is_bias for module in (one.module, *one.partners)]
    # PEFT ties only what bears this name, and ties it as a Linear without a bias.
    ties = [list(one.partners) for one in whole if one.partners] + [[_HEAD] for target, _ in modules if target.tied]
    return {
        "peft_type": "LORA",
        "task_type": _task(tuned.config or base.config),
        "base_model_name_or_path": _name(base),
        "inference_mode": True,
        **ranks_and_patterns(by_module, by_parameter),
        "lora_dropout": 0.0,
        "target_modules": target_modules(by_module, selection.modules.names - by_module.keys()),
        "fan_in_fan_out": any(target.kind == "conv1d" for target, _ in modules),
        "bias": "lora_only" if any(one.is_bias for one in whole) else "none",
        "modules_to_save": saved or None,
        "ensure_weight_tying": ties == [[_HEAD]],
        "init_lora_weights": True,
    }


def _name(base: Checkpoint) -> str | None:
    """What PEFT is to load the base by: a path, the hub's own id, or the address; None for a model in memory."""
    told = str(base.path)
    of_hub = told.removeprefix("hf://").partition("@")[0]
    return (of_hub if told.startswith("hf://") else told) if base.files else None


def _task(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type, where it adds nothing to the adapter; for classifiers it would wrap the head unasked."""
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    seq2seq = config.get("is_encoder_decoder") and architecture.endswith(("ForConditionalGeneration", "MTModel"))
    return "SEQ_2_SEQ_LM" if seq2seq else None


def _check(directory: Path, modules: Sequence[tuple[Target, int]]) -> None:
    """Raise `ProbeError` unless our own reader finds every module with its shape and rank, and no other."""
    found = Counter((one.name, one.shape, one.rank, one.scaling) for one in read_modules(open_checkpoint(directory))[0])
    written = Counter[tuple[str, tuple[int, int], int, float]]()
    for target, r in modules:
        name = target.name if target.by_parameter else f"{target.name}.weight"
        written[name, target.shape, r, 1.0] += target.copies
    if found != written:
        odd = min((found - written) + (written - found))
        raise ProbeError(f"{odd[0]}: the adapter does not read back as it was written ({place(odd[0]).layer_type})")
