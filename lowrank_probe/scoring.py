"""How well a model does on blocks of text, sequence by sequence: loss, and KL divergence or cosine to the tuned one.

Legend: n sequences, T positions, V classes. What is measured depends on the head:
    next-token loss     causal models, −log p(token) in nats; of an encoder–decoder, the second half given the first
    masked-token loss   15 % of the tokens masked, the same in every state
    KL to tuned         any other head with logits: KL(tuned ‖ state) in nats
    1 − cosine to tuned no head: of the last hidden states
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lowrank_probe.errors import NumericsError, ProbeError
from lowrank_probe.token_blocks import IGNORED, Blocks

Merit = Literal["next-token loss", "masked-token loss", "KL to tuned", "1 − cosine to tuned"]
MASKED_SHARE: Final = 0.15
# Of the tuned model's outputs, at evenly spaced positions.
KEPT_BYTES: Final = 256 << 20
# Rows of logits at once.
_ROWS: Final = 256


@dataclass(frozen=True)
class Task:
    """What is fed and what is judged.

    inputs: keyword of the model's forward → (n, …). targets: (n, T), what the T outputs are to predict; −100 where
    nothing is judged; None where there is nothing to predict, and `rows` (n, T) says which outputs count.
    """

    merit: Merit
    inputs: Mapping[str, Tensor]
    targets: Tensor | None
    rows: Tensor

    @property
    def has_loss(self) -> bool:
        """Whether the merit is a loss on the text, in nats a token."""
        return self.targets is not None


@dataclass
class Score:
    """merit, kl: (n,) sums over the judged outputs of each sequence; kl over those that are kept, zeros without."""

    merit: NDArray[np.float64]
    kl: NDArray[np.float64]


def make_task(model: nn.Module, config: Mapping[str, Any], blocks: Blocks, seed: int, mask_id: int | None,
              special: Sequence[int] = ()) -> Task:  # fmt: skip
    """The task for this model on these blocks. mask_id: the tokenizer's; special: ids that are never masked.

    Raises `ProbeError` where a masked model's tokenizer has no mask, or the model does not run on text alone.
    """
    name = type(model).__name__
    inputs = {"input_ids": blocks.ids, "attention_mask": blocks.attention_mask}
    if config.get("is_encoder_decoder") and name.endswith("ForConditionalGeneration"):
        return _encoder_decoder(model, blocks)
    if name in _names("MASKED_LM"):
        return _masked(blocks, seed, mask_id, special)
    if name in _names("CAUSAL_LM"):
        return _causal(inputs, blocks)
    try:
        out = run(model, {key: value[:1] for key, value in inputs.items()}, torch.device("cpu"))
    except Exception as error:  # it wants an image, speech, other keywords
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProbeError(f"{name} does not run on text alone: {said}") from None
    logits = logits_of(out)
    if logits is None:
        if not hasattr(out, "last_hidden_state"):
            raise ProbeError(f"{name} gives neither logits nor last hidden states: nothing to judge it by")
        return Task("1 − cosine to tuned", inputs, None, blocks.attention_mask.bool())
    per_token = logits.ndim == 3 and logits.shape[1] == blocks.ids.shape[1]
    if per_token and (name.endswith("ForConditionalGeneration") or not config):
        return _causal(inputs, blocks)
    rows = blocks.attention_mask.bool() if per_token else torch.ones(len(blocks), 1, dtype=torch.bool)
    return Task("KL to tuned", inputs, None, rows)


def _causal(inputs: Mapping[str, Tensor], blocks: Blocks) -> Task:
    targets = torch.cat([blocks.labels[:, 1:], torch.full_like(blocks.labels[:, :1], IGNORED)], dim=1)
    return Task("next-token loss", inputs, targets, targets != IGNORED)


def _names(which: str) -> set[str]:
    from transformers.models.auto import modeling_auto

    return set(getattr(modeling_auto, f"MODEL_FOR_{which}_MAPPING_NAMES").values())


def _encoder_decoder(model: Any, blocks: Blocks) -> Task:
    """The encoder reads a sequence up to its first judged token, or its first half; the decoder writes the rest."""
    n = len(blocks)
    given = (blocks.labels == IGNORED).long().cumprod(1).sum(1)
    halves = torch.where(given > 1, given, (blocks.lengths + 1) // 2).clamp(min=1)
    ids, mask = torch.zeros(n, int(halves.max()), dtype=torch.long), torch.zeros(n, int(halves.max()), dtype=torch.long)
    longest = max(1, int((blocks.lengths - halves).max()))
    targets = torch.full((n, longest), IGNORED)
    for row, (half, end) in enumerate(zip(halves.tolist(), blocks.lengths.tolist(), strict=True)):
        ids[row, :half], mask[row, :half] = blocks.ids[row, :half], 1
        targets[row, : end - half] = blocks.labels[row, half:end]
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    # From labels a model would make the same, and a loss of its own beside it.
    read = {"labels": targets} if shifted is None else {"decoder_input_ids": shifted(labels=targets)}
    inputs = {"input_ids": ids, "attention_mask": mask, **read}
    return Task("next-token loss", inputs, targets, targets != IGNORED)


def _masked(blocks: Blocks, seed: int, mask_id: int | None, special: Sequence[int]) -> Task:
    if mask_id is None:
        raise ProbeError("a masked language model is judged on masked tokens, and the tokenizer has no mask token")
    drawn = torch.rand(blocks.ids.shape, generator=torch.Generator().manual_seed(seed))
    open_to = (blocks.labels != IGNORED) & ~torch.isin(blocks.ids, torch.tensor(list(special), dtype=torch.long))
    chosen = open_to & (drawn < MASKED_SHARE)
    if not bool(chosen.any()):
        raise ProbeError("too little text: none of its tokens is masked; give more text")
    inputs = {"input_ids": blocks.ids.masked_fill(chosen, mask_id), "attention_mask": blocks.attention_mask}
    targets = blocks.ids.masked_fill(~chosen, IGNORED)
    return Task("masked-token loss", inputs, targets, chosen)


@torch.inference_mode()
def run(model: nn.Module, inputs: Mapping[str, Tensor], device: torch.device) -> Any:
    """The model's outputs on one batch. A module without a config gets the ids alone."""
    moved = {key: value.to(device) for key, value in inputs.items()}
    return model(**moved) if hasattr(model, "config") else model(moved["input_ids"])


def logits_of(out: Any) -> Tensor | None:
    """The logits in a model's output, or the tensor that it is."""
    if isinstance(out, Tensor):
        return out
    found = getattr(out, "logits", None)
    return found if isinstance(found, Tensor) else None


@dataclass
class Scorer:
    """Runs a model on a task, `batch` sequences at a time, against what it kept of the tuned model.

    kept: (n, T) which outputs of the tuned model are kept, evenly spaced so that they take at most `KEPT_BYTES`.
    """

    task: Task
    batch: int
    device: torch.device
    kept: Tensor = field(default_factory=lambda: torch.zeros(0))
    reference: list[Tensor] = field(default_factory=list)

    @property
    def n_sequences(self) -> int:
        return len(self.task.rows)

    @property
    def weights(self) -> NDArray[np.float64]:
        """(n,) what a sequence's merit is a sum over: judged tokens, or kept outputs."""
        counted = self.task.rows if self.task.has_loss else self.kept
        return counted.sum(1).double().numpy()

    @property
    def kl_weights(self) -> NDArray[np.float64]:
        """(n,) outputs of each sequence at which KL is taken."""
        return self.kept.sum(1).double().numpy()

    def keep(self, tuned: nn.Module) -> None:
        """Keep the tuned model's log-probabilities, or its unit hidden states."""
        self.reference = []
        for i, values in self._outputs(tuned):
            if not len(self.kept):
                self._space(values.shape[-1])
            self.reference.append(self._compared(values[self._kept_rows(i, values.device)]))

    def score(self, model: nn.Module, name: str) -> Score:
        """The merit and KL of every sequence. Raises `NumericsError` naming the state for NaN or Inf."""
        merit: list[Tensor] = []
        kl: list[Tensor] = []
        distance = _one_minus_cosine if self.task.merit == "1 − cosine to tuned" else _kl
        for i, values in self._outputs(model):
            kl.append(_summed(distance, self.reference[i], values[self._kept_rows(i, values.device)]))
            if self.task.targets is not None:
                merit.append(_summed(_nll, self.task.targets[i][self.task.rows[i]].to(values.device), values))
        told = torch.stack(kl).cpu().double().numpy()
        found = torch.stack(merit).cpu().double().numpy() if merit else told.copy()
        if not (np.isfinite(found).all() and np.isfinite(told).all()):
            raise NumericsError(f"{name}: the outputs hold NaN or Inf; try --dtype float32")
        return Score(found, told if distance is _kl else np.zeros(self.n_sequences))

    def _outputs(self, model: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """The judged outputs (rows, V) of each sequence, with its number."""
        for first in range(0, self.n_sequences, self.batch):
            at = slice(first, min(first + self.batch, self.n_sequences))
            out = run(model, {key: value[at] for key, value in self.task.inputs.items()}, self.device)
            values = logits_of(out) if self.task.merit != "1 − cosine to tuned" else out.last_hidden_state
            assert values is not None
            values = values.unsqueeze(1) if values.ndim == 2 else values
            for i, own in enumerate(values, first):
                yield i, own[self.task.rows[i].to(own.device)]

    def _kept_rows(self, i: int, device: torch.device) -> Tensor:
        return self.kept[i][self.task.rows[i]].to(device)

    def _compared(self, values: Tensor) -> Tensor:
        if self.task.merit == "1 − cosine to tuned":
            return functional.normalize(values.float(), dim=-1)
        return values.float().log_softmax(-1)

    def _space(self, classes: int) -> None:
        """Choose which outputs are kept, by their number of classes."""
        count = int(self.task.rows.sum())
        n = max(1, min(count, KEPT_BYTES // (4 * classes)))
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[torch.from_numpy(np.linspace(0, count - 1, n).round().astype(np.int64))] = True
        self.kept = self.task.rows.clone()
        self.kept[self.task.rows] = chosen


def _summed(measure: Callable[[Tensor, Tensor], Tensor], told: Tensor, values: Tensor) -> Tensor:
    """Σ measure(told, values) over the rows, some at a time."""
    pairs = zip(torch.split(told, _ROWS), torch.split(values, _ROWS), strict=True)
    return sum((measure(one, other).sum() for one, other in pairs), torch.zeros((), device=values.device))


def _nll(targets: Tensor, logits: Tensor) -> Tensor:
    """−log p(target) of each row."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def _kl(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL(p ‖ q) of each row as Σ p·log(p/q) − p + q: every term is at least 0, so that no digits cancel."""
    log_q = logits.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return (p * (log_p - log_q) - p + q).sum(-1)


def _one_minus_cosine(unit: Tensor, states: Tensor) -> Tensor:
    """1 − cosine of each row as ‖u − v‖²/2 of unit vectors, which keeps the digits near 0."""
    return (unit - functional.normalize(states.float(), dim=-1)).square().sum(-1) / 2
