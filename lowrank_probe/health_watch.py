"""A `transformers` callback that sees what goes wrong in a training run at the step where it happens.

    watch = HealthWatch(stop_on_nan=True)
    Trainer(..., callbacks=[watch]).train()
    watch.findings(), watch.history, watch.facts()

Trainer hides a non-finite loss (`logging_nan_inf_filter`), and by the time a callback may look at the gradients they
are clipped, which turns one NaN into all NaN. So the loss is taken from the model's own output and the gradients at the
end of every backward pass, before Trainer has either. Step numbers and flags are kept on the device and read where
Trainer itself waits for the device, when it logs; between, a copy is on its way to the host only where it is asked to
stop.
"""

import math
from typing import Any, Final

import pandas as pd
import torch
from torch import nn
from transformers import TrainerCallback

from lowrank_probe.errors import ProbeError
from lowrank_probe.health import HealthFinding, find_health, history_frame
from lowrank_probe.moved_adapters import Adapters

# Slots of the flags on the device. NEVER is a step that no run reaches.
_LOSS, _GRADIENT, _PARAMETER, _BAD_LOSSES = range(4)
NEVER: Final = 2**31 - 1


class HealthWatch(TrainerCallback):  # type: ignore[misc]
    """Collects the facts that `health.find_health` judges. One watch a run.

    stop_on_nan: end the training once a loss or gradient was not finite: on one GPU a step or two later, on several at
    the next logging step, so that all of them stop together. method: "full" where base weights are meant to train;
    None tells by whether the model has an adapter. `history`: what Trainer logged, one row a step, the losses that it
    replaced as missing. Non-finite gradients whose step a gradient scaler (fp16) skipped are counted as skipped steps,
    not as NaN: that is how it looks for its scale.
    """

    def __init__(self, stop_on_nan: bool = False, method: str | None = None) -> None:
        self.stop_on_nan = stop_on_nan
        self.method = method
        self._log: list[dict[str, Any]] = []
        self._collected: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._hidden: list[tuple[int, int]] = []
        self._with_grad: dict[str, None] = {}
        self._skipped = 0
        self._logged = 0
        self._used = False

    @property
    def history(self) -> pd.DataFrame:
        """What Trainer logged, as `health.history_frame`."""
        return history_frame(self._log, self._hidden)

    def facts(self) -> dict[str, Any]:
        """rank, alpha, use_rslora, method, dtype, n_trained, n_steps, n_skipped_steps, n_adapters, n_moved, not_moved,
        base_weights_with_grad, nan_step, nan_source ("loss", "gradient"), nan_parameter, nan_dtype; None: not known."""
        return dict(self._collected)

    def findings(self) -> list[HealthFinding]:
        """`find_health` of what was seen so far."""
        return find_health(self.history, self._collected)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Hook the model; remember where its adapters start."""
        if self._used:
            raise ProbeError("HealthWatch: one watch a run; make another for the next training")
        self._used = True
        named = list(model.named_parameters())
        self._adapters = Adapters(model, named)
        self._trained = [(name, p) for name, p in named if p.requires_grad]
        self._base = [(name, p) for name, p in named if not self._adapters.owns(name)]
        self._step = state.global_step + 1
        self._logged = state.global_step
        self._norms: torch.Tensor | None = None
        device = self._trained[0][1].device if self._trained else args.device
        self._flags = torch.tensor([NEVER, NEVER, -1, 0], device=device)
        self._zero = self._trained[0][1].new_zeros(()) if self._trained else None
        self._copy: _Copy | None = None
        self._alone = args.world_size == 1
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self._compute = autocast or (self._trained[0][1].dtype if self._trained else None)
        self._collected = _adapter_facts(model) | {
            "method": self.method or ("lora" if self._adapters.modules else "full"),
            "dtype": _short(self._compute),
            "n_adapters": len(self._adapters.modules),
            "n_trained": sum(p.numel() for _, p in self._trained),
        }
        # Out of the compiled graph: a hook that registers a hook cannot be traced.
        untraced = torch.compiler.disable(self._after_forward)  # type: ignore[no-untyped-call]
        self._handles = [model.register_forward_hook(untraced)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The number of the step that is being computed, as Trainer will log it."""
        self._step = state.global_step + 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Which weights outside of the adapters hold a gradient; it is gone after the step."""
        if self._collected["method"] != "full":
            self._with_grad |= {name: None for name, p in self._base if p.grad is not None}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Count a non-finite gradient, unless the gradient scaler has thrown it away with its step."""
        norms, self._norms = self._norms, None
        if getattr(optimizer, "step_was_skipped", False):
            self._skipped += 1
        elif norms is not None:
            bad = ~torch.isfinite(norms)
            first = bad.any() & (self._flags[_GRADIENT] == NEVER)
            # The backward pass goes through the model from its end: the last bad one was the first to go bad.
            last = bad.numel() - 1 - bad.flip(0).int().argmax()
            self._flags[_PARAMETER] = torch.where(first, last, self._flags[_PARAMETER])
            self._flags[_GRADIENT] = torch.where(first, self._step, self._flags[_GRADIENT])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where that was asked for and the flags that have arrived say so."""
        if not (self.stop_on_nan and self._alone):
            return
        if self._flags.device.type == "cpu":
            arrived: torch.Tensor | None = self._flags
        elif self._flags.device.type == "cuda":
            self._copy = self._copy or _Copy(self._flags)
            arrived = self._copy.latest(self._flags)
        else:
            return
        if arrived is not None and min(arrived[:2].tolist()) < NEVER:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Read the flags: Trainer has just waited for the device."""
        values = self._flags.tolist()
        if "loss" in logs:
            if values[_BAD_LOSSES]:
                self._hidden.append((self._logged, state.global_step))
                self._flags[_BAD_LOSSES] = 0
            self._logged = state.global_step
        self._collect(state, values)
        if self.stop_on_nan and self._collected["nan_step"] is not None and self._alone:
            control.should_training_stop = True
        elif self.stop_on_nan and not all(map(_finite, (logs.get("loss", 0.0), logs.get("grad_norm", 0.0)))):
            control.should_training_stop = True  # the same numbers on every process

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last facts, and how many adapters moved; the hooks come off."""
        for handle in self._handles:
            handle.remove()
        self._collect(state, self._flags.tolist())
        not_moved = self._adapters.not_moved()
        self._collected |= {
            "n_moved": len(self._adapters.modules) - len(not_moved),
            "not_moved": not_moved,
        }

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Look at the loss, and at the gradients when this pass's backward ends."""
        if not (module.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if hasattr(output, "get") else None
        if loss is not None:
            bad = ~torch.isfinite(loss.detach()).all()
            step = self._flags[_LOSS]
            self._flags[_LOSS] = torch.where(bad, step.clamp(max=self._step), step)
            self._flags[_BAD_LOSSES] += bad
        values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else (output,)
        start = loss if loss is not None else next((v for v in values if getattr(v, "requires_grad", False)), None)
        if start is not None and start.requires_grad:
            start.register_hook(self._backward_begins)

    def _backward_begins(self, grad: torch.Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    @torch.no_grad()
    def _backward_ended(self) -> None:
        """The norm of every gradient so far, in one call; NaN or Inf of a micro-batch stays in their sum."""
        if self._zero is None:
            return
        gradients = [self._zero if p.grad is None or p.grad.is_sparse else p.grad for _, p in self._trained]
        # In float32, as the norm that Trainer clips by: float16's own would overflow where no entry does.
        norms = list(torch._foreach_norm(gradients, 2, dtype=torch.float32))
        if len({(n.device, n.dtype) for n in norms}) > 1:
            norms = [n.to(self._flags.device, torch.float32) for n in norms]
        self._norms = torch.stack(norms)

    def _collect(self, state: Any, values: list[int]) -> None:
        loss, gradient = values[_LOSS], values[_GRADIENT]
        step = min(loss, gradient)
        found: dict[str, Any] = {"nan_step": None, "nan_source": None, "nan_parameter": None, "nan_dtype": None}
        if step < NEVER:
            found |= {"nan_step": step, "nan_source": "loss" if loss <= gradient else "gradient"}
            found["nan_dtype"] = _short(self._compute)
            if gradient < NEVER:
                name, p = self._trained[values[_PARAMETER]]
                found |= {"nan_parameter": name, "nan_dtype": _short(p.dtype)}
        self._collected |= found | {
            "n_steps": state.global_step,
            "n_skipped_steps": self._skipped,
            "base_weights_with_grad": tuple(self._with_grad),
        }
        self._log = state.log_history


class _Copy:
    """The flags on their way to the host, in pinned memory, without waiting for the device."""

    def __init__(self, flags: torch.Tensor) -> None:
        self._host = torch.empty_like(flags, device="cpu", pin_memory=True)
        self._event: torch.cuda.Event | None = None

    def latest(self, flags: torch.Tensor) -> torch.Tensor | None:
        """What has arrived, or None; a new copy starts where none is under way."""
        arrived = None
        if self._event is not None and self._event.query():  # type: ignore[no-untyped-call]
            arrived, self._event = self._host.clone(), None
        if self._event is None:
            self._host.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        return arrived


def _adapter_facts(model: Any) -> dict[str, Any]:
    """Rank, alpha and scale of a PEFT model's active adapter; of several ranks the one of the config."""
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None)
    config = configs.get(active) if isinstance(active, str) else None
    names = {"rank": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora"}
    return {fact: getattr(config, name, None) for fact, name in names.items()}


def _short(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
