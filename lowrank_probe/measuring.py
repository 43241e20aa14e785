"""What one real training step holds at its peak, by component and phase: by fake tensors, or on a GPU.

The model is transformers' own, the adapter PEFT's, the optimizer PyTorch's, checkpointing as `Trainer` turns it on; the
weights are random. The optimizer has its state before the step, as in every step but the first. Phases: "forward" up to
the head, "loss" the head and the loss with their backward pass, "backward" the rest of it, "step" the optimizer's.
"""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lowrank_probe.as_on_cuda import AsOnCuda
from lowrank_probe.errors import ProbeError
from lowrank_probe.storages import LiveStorages
from lowrank_probe.trainable_models import trainable_model
from lowrank_probe.training_steps import CHUNKS, COMPONENTS, PHASES, Measured, Step

_OPTIMIZERS: Final[Mapping[str, tuple[Any, dict[str, Any]]]] = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adamw-foreach": (torch.optim.AdamW, {"foreach": True}),
    # Not fused, for which fake tensors have no kernel: they would take real memory. What it holds is the same.
    "sgd": (torch.optim.SGD, {"foreach": True}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
}


def measure_fake(config: Mapping[str, Any], step: Step) -> Measured:
    """The peaks of live storages in one step, counted on fake tensors: any size, no GPU, no memory for values.

    The step runs on the CPU's fake tensors with what CUDA's kernels keep (`as_on_cuda`). Bytes are those of tensors:
    without the allocator's rounding and fragmentation, cuBLAS workspaces and the CUDA context. Raises `ProbeError` for
    what cannot be built or run so.
    """
    started = time.perf_counter()
    tracker = LiveStorages(COMPONENTS)
    model = trainable_model(config, step, torch.device("meta"))
    with FakeTensorMode(), AsOnCuda(), _no_packing():
        _replace_by_fakes(model)
        run = _Run(model, step, torch.device("cpu"))
        for parameter in run.model.parameters():
            trains = parameter.requires_grad and step.adapted
            tracker.hold(parameter, "adapter" if trains else "weights")
        for buffer in run.model.buffers():
            tracker.hold(buffer, "weights")
        for tensor in _states(run.optimizer):
            tracker.hold(tensor, "optimizer")
        tracker.hold(run.ids, "inputs")
        hooks = [p.register_post_accumulate_grad_hook(lambda p: tracker.hold(p.grad, "gradients")) for p in run.trained]
        with tracker, _clear_failure(config, step):
            run.step(tracker.enter)
        for hook in hooks:
            hook.remove()
    peaks = {phase: tracker.peaks[phase].n_bytes for phase in PHASES}
    parts = {phase: {k: v for k, v in tracker.peaks[phase].parts.items() if v} for phase in PHASES}
    return Measured(
        f"fake tensors{_attention(run, step)}",
        peaks,
        parts,
        *run.sizes(),
        time.perf_counter() - started,
        step.batch,
        step.seq,
    )


def measure_cuda(config: Mapping[str, Any], step: Step) -> Measured:
    """`torch.cuda.max_memory_allocated` in each phase of one real step with random weights, on the current GPU; without
    what this process had allocated there before.

    Raises `ProbeError` without a GPU, or where the step does not fit.
    """
    if not torch.cuda.is_available():
        raise ProbeError("no CUDA device: measure with fake tensors instead")
    started = time.perf_counter()
    peaks: dict[str, int] = {}
    entered: list[str] = []

    def enter(phase: str) -> None:
        if entered:
            peaks[entered[-1]] = torch.cuda.max_memory_allocated() - already
        torch.cuda.reset_peak_memory_stats()
        entered.append(phase)

    already = torch.cuda.memory_allocated()
    try:
        device = torch.device("cuda")
        run = _Run(trainable_model(config, step, device), step, device)
        before = torch.cuda.memory_allocated() - already
        with _clear_failure(config, step):
            run.step(enter)
        enter("")
        torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        raise ProbeError(f"out of memory on {torch.cuda.get_device_name()}: {str(error).splitlines()[0]}") from error
    parts = {phase: {"before the step": before, "the rest": peak - before} for phase, peak in peaks.items()}
    how = f"{torch.cuda.get_device_name()}{_attention(run, step)}"
    return Measured(how, peaks, parts, *run.sizes(), time.perf_counter() - started, step.batch, step.seq)


def _attention(run: "_Run", step: Step) -> str:
    """Where fused attention was asked for and the model has none."""
    return " (eager attention, the only one that this model has)" if step.flash and not run.plain._supports_sdpa else ""


class _Run:
    """A model, its optimizer with states, and a batch, on one device."""

    def __init__(self, model: Any, step: Step, device: torch.device) -> None:
        self.model, self.how, self.device = model, step, device
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.trained, step)
        self.ids = torch.randint(0, self.head.weight.shape[0], (step.batch, step.tokens // step.batch), device=device)

    @property
    def plain(self) -> Any:
        """transformers' model, without PEFT around it."""
        return self.model.get_base_model() if self.how.adapted else self.model

    @property
    def head(self) -> Any:
        return self.plain.get_output_embeddings()

    def sizes(self) -> tuple[int, int]:
        """(trainable, all) entries."""
        return sum(p.numel() for p in self.trained), sum(p.numel() for p in self.model.parameters())

    def step(self, enter: Callable[[str], None]) -> None:
        """Forward, loss, backward, optimizer; `enter(phase)` at the start of each of `PHASES`."""

        def at_head(hidden: Tensor) -> None:
            enter("loss")
            if hidden.requires_grad:
                hidden.register_hook(lambda _: enter("backward"))  # type: ignore[no-untyped-call]

        enter("forward")
        hook = self.head.register_forward_pre_hook(lambda _, args: at_head(args[0]))
        mixed = self.how.precision == "mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            if self.how.chunked_loss:
                hook.remove()
                outputs, loss = None, self._chunked(at_head)
            else:
                decoded = {"decoder_input_ids": self.ids} if self.plain.config.is_encoder_decoder else {}
                outputs = self.model(input_ids=self.ids, labels=self.ids, **decoded, **self._cache)
                loss = outputs.loss
        hook.remove()
        if not self.how.held_outputs:
            del outputs
        loss.backward()  # type: ignore[no-untyped-call]
        enter("step")
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def _cache(self) -> dict[str, bool]:
        """No keys and values are kept; an encoder has none."""
        return {"use_cache": False} if "use_cache" in inspect.signature(type(self.plain).forward).parameters else {}

    def _chunked(self, at_head: Callable[[Tensor], None]) -> Tensor:
        """The loss of `CHUNKS` pieces of the tokens, each piece's logits made again in the backward pass."""
        hidden = self.plain.base_model(input_ids=self.ids, **self._cache).last_hidden_state
        at_head(hidden)
        labels = functional.pad(self.ids, (0, 1), value=-100)[:, 1:].reshape(-1)

        def piece(x: Tensor, y: Tensor) -> Tensor:
            return functional.cross_entropy(self.head(x).float(), y, reduction="sum")

        parts = zip(hidden.flatten(0, 1).chunk(CHUNKS), labels.chunk(CHUNKS), strict=True)
        losses = [checkpoint(piece, x, y, use_reentrant=False) for x, y in parts]
        return torch.stack(losses).sum() / self.how.tokens


def _replace_by_fakes(model: nn.Module) -> None:
    """Every parameter and buffer made anew on the CPU, where a fake-tensor mode is on; what is shared stays shared."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in fakes:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    is_parameter = isinstance(old, nn.Parameter)
                    fakes[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                if old is not None:
                    tensors[name] = fakes[id(old)]  # type: ignore[assignment]


def _optimizer(trained: list[nn.Parameter], step: Step) -> torch.optim.Optimizer:
    """The optimizer with its states, which its first step makes."""
    if step.optimizer not in _OPTIMIZERS:
        raise ProbeError(f"optimizer {step.optimizer!r} is not measured; expected one of {', '.join(_OPTIMIZERS)}")
    kind, settings = _OPTIMIZERS[step.optimizer]
    optimizer: torch.optim.Optimizer = kind(trained, lr=1e-5, **settings)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _states(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


@contextlib.contextmanager
def _clear_failure(config: Mapping[str, Any], step: Step) -> Iterator[None]:
    """What a model's code raises while it runs as a `ProbeError`; PEFT wraps some modules that it cannot run."""
    try:
        yield
    except (ProbeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        told = step.targets if isinstance(step.targets, str) else ", ".join(step.targets)
        mend = f"PEFT may be unable to run an adapter on one of {told}: try other targets" if step.adapted else (
            "try another --seq, or leave --measure out"
        )  # fmt: skip
        raise ProbeError(f"model type {config.get('model_type')!r}: the step cannot be run: {why}; {mend}") from error


@contextlib.contextmanager
def _no_packing() -> Iterator[None]:
    """transformers asks the position ids' values whether sequences are packed, which fake tensors cannot answer.

    It then makes a mask of s² entries, and attention repeats grouped keys and values; on a GPU neither happens.
    """
    from transformers import masking_utils

    asked = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked
