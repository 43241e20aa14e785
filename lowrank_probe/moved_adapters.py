"""Which parameters of a running model belong to its adapters, and which adapters moved since the start."""

from collections.abc import Sequence
from typing import Any

import torch

# What PEFT trains beside the factors: whole copies of modules, rows of tables.
_BESIDE = ("modules_to_save", "trainable_tokens_")


class Adapters:
    """The adapters of a model, as they are when this is made.

    An adapter is a module with trainable parameters under a component `lora_…` of their name (of another PEFT method
    its own prefix). Where one of its parameters is all zero at the start, as LoRA's B is, it moved if one of those no
    longer is; otherwise if any parameter differs from a copy kept on the CPU.
    """

    def __init__(self, model: Any, named: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
        self._prefix = getattr(getattr(model, "base_model", None), "prefix", None) or "lora_"
        configs = getattr(model, "peft_config", None) or {}
        self._biases = any(getattr(config, "bias", "none") not in ("none", None) for config in configs.values())
        modules: dict[str, list[torch.nn.Parameter]] = {}
        for name, p in named:
            module = self._module(name)
            if p.requires_grad and module is not None:
                modules.setdefault(module, []).append(p)
        self._watched: dict[str, list[tuple[torch.nn.Parameter, torch.Tensor | None]]] = {}
        for module, parameters in modules.items():
            zero = [p for p in parameters if not p.detach().any()]
            copies = [(p, p.detach().to("cpu", copy=True)) for p in parameters] if not zero else []
            self._watched[module] = [(p, None) for p in zero] or list(copies)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted modules."""
        return tuple(self._watched)

    def owns(self, name: str) -> bool:
        """Whether PEFT means this parameter to train: a factor, a module to save, a bias where its config says so."""
        components = name.split(".")
        beside = any(c.startswith(_BESIDE) for c in components)
        return self._module(name) is not None or beside or (self._biases and components[-1] == "bias")

    def not_moved(self) -> tuple[str, ...]:
        """Names of the adapted modules whose update is what it was at the start."""
        return tuple(
            module
            for module, watched in self._watched.items()
            if not any(p.detach().any() if start is None else (p.detach().cpu() != start).any() for p, start in watched)
        )

    def _module(self, name: str) -> str | None:
        components = name.split(".")
        at = next((i for i, c in enumerate(components) if c.startswith(self._prefix)), None)
        return None if at is None else ".".join(components[:at]).removeprefix("base_model.model.")
