"""The loss of a causal language model on held-out blocks, sequence by sequence."""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from lowrank_probe.token_blocks import IGNORED, Blocks


@torch.inference_mode()
def sequence_losses(
    model: Any, blocks: Blocks, batch: int, autocast: AbstractContextManager[Any]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(mean −log p of the next token in nats, number of such tokens) of each sequence, (n,) each.

    The model is in eval mode meanwhile. Each loss is a sum in float64 of float32 terms. NaN where the logits are.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    means, counts = [], []
    for first in range(0, len(blocks), batch):
        rows = slice(first, first + batch)
        ids, labels = blocks.ids[rows].to(device), blocks.labels[rows].to(device)
        with autocast:
            logits = model(input_ids=ids, attention_mask=blocks.attention_mask[rows].to(device)).logits
        judged = labels[:, 1:]
        terms = cross_entropy(
            logits[:, :-1].float().flatten(0, 1), judged.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(judged.shape)
        n = (judged != IGNORED).sum(1)
        sums = terms.double().sum(1) if device.type != "mps" else terms.sum(1)
        means.append((sums / n).cpu().double())
        counts.append(n.cpu())
    model.train(was_training)
    return torch.cat(means).numpy(), torch.cat(counts).numpy()
