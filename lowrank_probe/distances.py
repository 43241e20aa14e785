"""How far one model's outputs are from another's, streamed text by text: KL divergence, agreement, errors.

Legend: P the reference's outputs, Q the other's, (tokens, classes) logits or (tokens, width) hidden states, float32.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Measure = Literal["logits", "hidden states"]
# Rows at once: 32 rows of 150,000 logits in float64 are 38 MB.
_ROWS = 32


@dataclass
class Distance:
    """Sums over the tokens seen so far; `figures` makes means of them."""

    measure: Measure
    n_tokens: int = 0
    kl: float = 0.0
    agreed: int = 0
    absolute: float = 0.0
    reference_absolute: float = 0.0
    squares: float = 0.0
    reference_squares: float = 0.0
    cosines: float = 0.0

    def add(self, P: Tensor, Q: Tensor) -> None:
        """Take in one text: outputs of the reference and of the other, of one shape."""
        if P.device.type == "mps":  # has no float64
            P, Q = P.cpu(), Q.cpu()
        for p, q in zip(torch.split(P, _ROWS), torch.split(Q, _ROWS), strict=True):
            self._add(p.double(), q.double())

    def _add(self, p: Tensor, q: Tensor) -> None:
        self.n_tokens += len(p)
        if self.measure == "logits":
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            self.kl += float((log_p.exp() * (log_p - log_q)).sum())
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            self.absolute += float((p - q).abs().mean(-1).sum())
            self.reference_absolute += float(p.abs().mean(-1).sum())
        else:
            self.squares += float((p - q).square().sum())
            self.reference_squares += float(p.square().sum())
            self.cosines += float(torch.cosine_similarity(p, q, dim=-1).sum())

    @property
    def distance(self) -> float:
        """The one number that grows in proportion to the error: mean |logit error|, or ‖Q − P‖_F / ‖P‖_F."""
        if self.measure == "logits":
            return self.absolute / self.n_tokens
        return math.sqrt(self.squares / self.reference_squares) if self.reference_squares else math.nan

    @property
    def reference(self) -> float:
        """What `distance` is to be compared with: mean |logit| of the reference; 1 for hidden states."""
        return self.reference_absolute / self.n_tokens if self.measure == "logits" else 1.0

    def figures(self) -> dict[str, float]:
        """Column → value; KL(reference ‖ other) in nats a token, means over tokens.

        `mean_abs_logit_error` or `relative_error` is the `distance`.
        """
        if self.measure == "logits":
            return {
                "kl_nats": self.kl / self.n_tokens,
                "top1_agreement": self.agreed / self.n_tokens,
                "mean_abs_logit_error": self.distance,
                "n_tokens": self.n_tokens,
            }
        return {
            "cosine": self.cosines / self.n_tokens,
            "relative_error": self.distance,
            "n_tokens": self.n_tokens,
        }
