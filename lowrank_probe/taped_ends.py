"""What is before and behind the blocks, on a `Tape`: embeddings; head, logits and loss, whole or in pieces.

Legend: as in `taped_models`.
"""

import math
from functools import partial

from lowrank_probe.tape import HEAD, Array
from lowrank_probe.taped_attention import length, masked
from lowrank_probe.taped_models import TapedModel
from lowrank_probe.training_steps import CHUNKS


def embed(model: TapedModel) -> Array:
    """Token and position embeddings; checkpointing always wants their gradient (`enable_input_require_grads`)."""
    tape, family = model.tape, model.shape.model_type
    x = tape.array("h", model.base)
    if masked(model) and model.step.flash:  # one byte an entry for all sequences; each layer makes its own of it
        model.mask = tape.hold(length(model) ** 2, text="mask")
    if model.trains:
        tables = {kind: w for kind, w in model.weights.items() if kind in ("embedding", "position_embedding")}
        x = tape.leaf(x, {kind: math.prod(w.shape) * model.base for kind, w in tables.items()})
    elif model.step.checkpointing:
        x = tape.leaf(x)
    if model.mask and model.step.checkpointing and x.node:  # an argument of every block, also when it is run again
        x.node.saved.append(model.mask)
    if family == "gpt2":
        x = model.dropout(x, "embd_pdrop", 0.1)
    return tape.op([x], "h", x.item) if model.gemma else x


def loss_of(model: TapedModel, hidden: Array) -> Array:
    """Head, logits and loss; chunked, the pieces of the tokens one by one, and again in the backward pass."""
    tape, model.mask = model.tape, None
    if not model.step.chunked_loss:
        logits = _logits(model, hidden)
        model.held = logits if model.step.held_outputs else None
        return _cross_entropy(model, logits)
    pieces = tape.split(hidden, "h" * CHUNKS)
    with tape.at(HEAD, math.ceil(model.step.tokens / CHUNKS)):
        losses = [tape.checkpoint(partial(_piece, model), pieces.pop()) for _ in range(CHUNKS)]
        total = losses.pop()
        while losses:
            total = tape.add(total, losses.pop())
    return total


def _piece(model: TapedModel, hidden: Array) -> Array:
    return _cross_entropy(model, _logits(model, hidden))


def _logits(model: TapedModel, hidden: Array) -> Array:
    """By the head; Gemma 2 bounds them by a tanh."""
    tape, logits = model.tape, model.linear(hidden, "lm_head", "V")
    if not model.config.get("final_logit_softcapping", model.shape.model_type == "gemma2"):
        return logits
    logits = tape.op([logits], "V", logits.item)
    logits = tape.op([logits], "V", logits.item, saves_out=True)
    return tape.op([logits], "V", logits.item)


def _cross_entropy(model: TapedModel, logits: Array) -> Array:
    """In float32, where the model takes it so; what is saved is the log-softmax."""
    tape = model.tape
    wide = tape.cast(logits, 4) if model.wide_loss or model.autocast else logits
    log_softmax = tape.op([wide], "V", wide.item, saves_out=True)
    return tape.op([log_softmax], "1", 4)
