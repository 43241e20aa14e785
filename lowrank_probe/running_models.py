"""Models as `transformers` runs them and `peft` adapts them: load, wear adapters, merge, round, outputs. In float32.

Everything is read from local files, and no code of a checkpoint's own is run. float32 holds every bf16 and fp16 weight
exactly, so that what differs between two states of a model is the weights and not the arithmetic.
"""

import gc
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.distances import Measure
from lowrank_probe.errors import NumericsError, ProbeError, printable
from lowrank_probe.torch_dtypes import DTYPES

# An adapter and its weight in the sum.
Weighted = tuple[Path, float]


def first_line(error: object) -> str:
    """The first line of an error, the next one with it where it ends in a colon; its type where it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    told = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return printable(told[:300]) if told else type(error).__name__


class CannotRun(Exception):  # noqa: N818 - a reason, not a failure
    """transformers cannot load a model, or not run it on text; the reason is its text."""


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Without transformers' progress bars and reports; gives the list in which peft's own warnings are kept."""
    from transformers.utils import logging as hf_logging

    said: list[str] = []
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        for warning in caught:
            line = f"warning from {Path(warning.filename).stem}: {first_line(warning.message)}"
            if (
                issubclass(warning.category, UserWarning)
                and "peft" in Path(warning.filename).parts
                and line not in said
            ):
                said.append(line)
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@dataclass(frozen=True)
class Kind:
    """How a pair is run: the class (that of the base), the name of the tuned side's, both vocabularies and numbers of
    labels, the longest text."""

    cls: Any
    tuned_class: str
    base_vocabulary: int
    tuned_vocabulary: int
    n_labels: tuple[int, int]
    max_tokens: int

    @property
    def vocabulary(self) -> int:
        """The tokens that both sides know: the ids below this number."""
        return min(self.base_vocabulary, self.tuned_vocabulary)


def find_kind(base: Path, tuned: Path) -> Kind:
    """The class and sizes from both config.json. Raises `CannotRun` where there is none for text."""
    import transformers

    configs = [_config(directory) for directory in (base, tuned)]
    names = configs[0].architectures or [""]
    cls: Any = getattr(transformers, names[0], None)
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model:
        raise CannotRun(f"{base / 'config.json'}: transformers has no class for architectures {names}")
    if cls.main_input_name != "input_ids":
        raise CannotRun(f"{base}: {cls.__name__} takes {cls.main_input_name}, not text")
    texts = [config.get_text_config() for config in configs]
    sizes = [size for config in texts if isinstance(size := getattr(config, "vocab_size", None), int)]
    if len(sizes) < 2:
        raise CannotRun(f"{base}: {cls.__name__} has no vocab_size in its config")
    # RoBERTa counts positions from 2.
    positions = [getattr(config, "max_position_embeddings", None) for config in texts]
    longest = min([p - 2 for p in positions if isinstance(p, int) and p > 2], default=1 << 30)
    tuned_class = (configs[1].architectures or names)[0]
    return Kind(cls, tuned_class, sizes[0], sizes[1], (configs[0].num_labels, configs[1].num_labels), longest)


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise CannotRun(f"{directory}: no config.json")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a stranger's config sets off
        raise CannotRun(f"{directory / 'config.json'}: {first_line(error)}") from None


def load(directory: Path, kind: Kind, device: torch.device) -> tuple[Any, list[str]]:
    """(the model in float32 for inference, the weights of its head that the files lack).

    Raises `CannotRun` where it does not load or weights below the head are missing.
    """
    try:
        model, found = kind.cls.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        model = model.to(device).eval()
    except Exception as error:  # damaged or foreign checkpoints, too little memory
        raise CannotRun(f"{directory}: {kind.cls.__name__} cannot be loaded: {first_line(error)}") from None
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    trunk = "" if model.base_model is model else f"{model.base_model_prefix}."
    below = [name for name in missing if name.startswith(trunk)]
    if below:
        raise CannotRun(f"{directory}: {kind.cls.__name__} needs {below[0]}, which the files lack")
    model.config.use_cache = False
    return model, missing


def outputs(model: Any, ids: Tensor, measure: Measure, kind: Kind, device: torch.device) -> Tensor:
    """(rows, classes) float32 logits of the common tokens, or (tokens, width) last hidden states, for one sequence.

    Raises `NumericsError` for NaN or Inf.
    """
    out = _run(model, ids, measure == "hidden states", device)
    values = out.logits if measure == "logits" else _hidden(out)
    values = values.reshape(-1, values.shape[-1]).float()
    if measure == "logits":
        values = values[:, : kind.vocabulary]
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(f"{type(model).__name__}: its outputs hold NaN or Inf")
    return values  # type: ignore[no-any-return]


def find_measure(model: Any, ids: Tensor, missing: Sequence[str], kind: Kind, device: torch.device) -> Measure:
    """Logits where both sides have the same head, else last hidden states; `missing`: what the tuned one's lacks.

    Raises `CannotRun` where it does not run on text alone.
    """
    try:
        out = _run(model, ids, True, device)
        _hidden(out)
    except Exception as error:  # needs an image, a position, a kernel that is not there
        raise CannotRun(f"{type(model).__name__} does not run on text alone: {first_line(error)}") from None
    same_head = not missing and len(set(kind.n_labels)) == 1
    return "logits" if same_head and getattr(out, "logits", None) is not None else "hidden states"


@torch.inference_mode()
def _run(model: Any, ids: Tensor, with_states: bool, device: torch.device) -> Any:
    return _forward(model, ids, with_states, device)


def sampled_loss(model: Any, ids: Tensor, measure: Measure, device: torch.device, generator: torch.Generator) -> Tensor:
    """Σ_rows −log p(y), y drawn from the model's own p; of hidden states h, Σ ⟨h, ε⟩ with standard normal ε.

    Its gradients' second moments are, in the mean over draws, the Fisher information, that is the curvature of
    KL(model ‖ other), or of ‖h − other‖². With a graph, so not under inference mode.
    """
    out = _forward(model, ids, measure == "hidden states", device)
    values = out.logits if measure == "logits" else _hidden(out)
    values = values.reshape(-1, values.shape[-1]).float()
    if measure == "hidden states":
        noise = torch.randn(values.shape, generator=generator).to(device)
        return torch.sum(values * noise)
    log_p = values.log_softmax(-1)
    # Gumbel's trick, drawn on the host: the same on every device.
    uniform = torch.rand(values.shape, generator=generator).clamp_min(1e-30).to(device)
    drawn = (log_p.detach() - (-uniform.log()).log()).argmax(-1, keepdim=True)
    return torch.sum(-log_p.gather(1, drawn))


def _forward(model: Any, ids: Tensor, with_states: bool, device: torch.device) -> Any:
    ids = ids.to(device)[None]
    inputs = {"input_ids": ids}
    config = model.config
    if config.is_encoder_decoder:  # the text at both ends, the decoder's shifted by one
        keys = ("decoder_start_token_id", "pad_token_id", "bos_token_id")
        start = next((token for key in keys if (token := getattr(config, key, None)) is not None), 0)
        inputs["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    return model(**inputs, output_hidden_states=with_states)


def _hidden(out: Any) -> Any:
    """The last hidden states that a model's head reads."""
    if getattr(out, "last_hidden_state", None) is not None:
        return out.last_hidden_state
    return (getattr(out, "decoder_hidden_states", None) or out.hidden_states)[-1]


def resize(model: Any, kind: Kind) -> None:
    """Give the base the tuned side's number of tokens, as an adapter with a grown table needs."""
    if kind.base_vocabulary != kind.tuned_vocabulary:
        model.resize_token_embeddings(kind.tuned_vocabulary, mean_resizing=False)


def wear(model: Any, adapters: Sequence[Weighted], device: torch.device) -> tuple[Any, list[str]]:
    """(the model with Σ weight·adapter as peft computes it, the adapters' tensors that peft did not take).

    Raises `ProbeError` where peft cannot load one.
    """
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    names = ["default", *(f"adapter{i}" for i in range(1, len(adapters)))]
    worn: Any = None
    ignored: list[str] = []
    for name, (path, _) in zip(names, adapters, strict=True):
        try:
            if worn is None:
                config = PeftConfig.from_pretrained(str(path.absolute()))
                config.inference_mode = True
                worn = PeftModel(model, config, adapter_name=name)
            taken = worn.load_adapter(str(path.absolute()), name, torch_device=str(device))
        except Exception as error:  # each layer type raises its own
            raise ProbeError(f"{path}: peft cannot load it on this base: {first_line(error)}") from None
        ignored += [*taken.unexpected_keys, *taken.missing_keys]
    if len(names) > 1:
        worn.base_model.set_adapter(names)
    for module in worn.modules():
        if isinstance(module, LoraLayer):
            for name, (_, weight) in zip(names, adapters, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
    return worn.to(device).eval(), ignored


def merge(worn: Any) -> Any:
    """The plain model with the adapters merged into its weights, by peft. Raises `ProbeError` where it cannot."""
    try:
        return worn.merge_and_unload(safe_merge=True).eval()
    except (ValueError, RuntimeError, TypeError) as error:  # NaN, a layer that cannot be merged, shapes
        raise ProbeError(f"peft cannot merge the adapter: {first_line(error)}") from None


def free(device: torch.device) -> None:
    """Give back what a model held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def stored_exactly(model: Any, directory: Path) -> tuple[torch.dtype, set[str]]:
    """(the dtype of most of a checkpoint's bytes, the parameters whose values it holds exactly): what a merged
    checkpoint of the same dtypes rounds."""
    sizes = dict.fromkeys(DTYPES, 0)
    for info in open_checkpoint(directory).tensors.values():
        if info.dtype in sizes:
            sizes[info.dtype] += math.prod(info.shape) * DTYPES[info.dtype].itemsize
    dtype = DTYPES[max(sizes, key=lambda name: sizes[name])]
    if dtype.itemsize >= 4:
        return dtype, set()
    return dtype, {name for name, p in model.named_parameters() if torch.equal(p.to(dtype).to(p.dtype), p)}


@torch.no_grad()
def round_to(model: Any, dtype: torch.dtype, names: set[str]) -> None:
    """Round the named parameters to a dtype, in place."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.copy_(parameter.to(dtype))
