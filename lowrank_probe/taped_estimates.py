"""Blocks of models without a family's block of their own, on a `Tape`: estimates from the layers that a model has.

Where a block is one attention and one MLP or mixture of experts, its norms say how they are put together. Any other is
a chain of its linear layers: what autograd keeps is each one's input, and its output where something nonlinear follows.

Legend: as in `taped_models`; e experts a token; a number stands for a width of its own.
"""

import itertools
from collections.abc import Callable
from typing import Final

from lowrank_probe.errors import NoFormulaError
from lowrank_probe.model_shapes import ModelShape
from lowrank_probe.tape import Array
from lowrank_probe.taped_blocks import BLOCKS, attend, feed_forward
from lowrank_probe.taped_models import TapedModel
from lowrank_probe.weight_shapes import Weight

# Model types whose attention, of all tokens with all, transformers 5 runs in no fused kernel.
EAGER: Final = frozenset({
    "bloom", "deberta", "deberta-v2", "gemma2", "gpt_neo", "gpt_oss", "ibert", "luke", "megatron-bert", "mpnet", "mpt",
    "mvp", "nllb-moe", "openai-gpt", "rembert", "roformer", "switch_transformers", "t5gemma", "vaultgemma", "xglm",
})  # fmt: skip
_BACK: Final = ("o", "down", "cross_o", "expert_down")  # what goes back to the residual stream
_POST: Final = "post_feedforward_layernorm"
# Where a config names the residual branches' dropout, and model types that have 0.1 where config.json says nothing.
_DROPOUTS: Final = ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "dropout_rate", "dropout")
_DROPS: Final = ("bert", "roberta", "t5", "opt", "distilbert")


def block_of(shape: ModelShape) -> tuple[Callable[[TapedModel, Array], Array], str]:
    """(block, "") of the model's family, or one of the layers that there are, and why it is an estimate.

    Raises `NoFormulaError` for a model whose blocks are no attention and MLPs.
    """
    if shape.model_type in BLOCKS:
        return BLOCKS[shape.model_type], ""
    there = {weight.layer_type for weight in shape.weights if weight.layers}
    name = shape.model_type or "a model without a config"
    if not shape.n_layers or not shape.hidden or not there & {"o", "cross_o"}:
        raise NoFormulaError(f"{name}: no formula for its activations; --measure runs the step instead")
    if not shape.tied_embeddings and "lm_head" not in {weight.layer_type for weight in shape.weights}:
        raise NoFormulaError(f"{name}: no formula for its loss, since it has no language model's head")
    alike = all(weight.count == shape.n_layers for weight in shape.weights if weight.layers and len(weight.shape) > 1)
    attention = {"q", "k", "v"} <= there or "qkv" in there
    mlp = "expert_gate_up" in there or ("down" in there and there & {"up", "gate_up"})
    if alike and attention and mlp and "cross_o" not in there:
        return _any_block, f"estimate: generic block of {name}, one attention and one MLP put together by its norms"
    return _mean_block, f"estimate: generic block of {name}, the mean of its blocks as a chain of their linear layers"


def _any_block(model: TapedModel, x: Array) -> Array:
    """The two on a norm of the stream each, on the same, or with norms behind them too, as many as there are."""
    tape, there = model.tape, model.weights
    n = sum(w.count for w in model.shape.weights if w.kind == "norm" and w.layers and w.shape == (model.shape.hidden,)
            and w.layer_type not in ("q_norm", "k_norm")) // model.shape.n_layers  # fmt: skip
    behind = n >= 4 or (_POST in there and n == 2)
    y = model.norm(x) if n != 2 or not behind else x
    attended = _drop(model, attend(model, y))
    attended = model.norm(attended) if behind else attended
    if n == 1:
        return tape.add(tape.add(x, attended), _drop(model, _mlp(model, y)))
    del y
    x = tape.add(x, attended)
    del attended
    y = _drop(model, _mlp(model, model.norm(x) if n != 2 or not behind else x))
    return tape.add(x, model.norm(y) if behind else y)


def _mlp(model: TapedModel, x: Array) -> Array:
    """The MLP, or the experts and what all tokens share beside them."""
    if "expert_gate_up" not in model.weights:
        return feed_forward(model, x)
    out = model.experts(x)
    if "down" not in model.weights:
        return out
    shared = feed_forward(model, x)
    if "shared_expert_router" in model.weights:
        shared = model.tape.multiply(model.tape.op([x], "1", x.item, [x] * model.trains, saves_out=True), shared)
    return model.tape.add(out, shared)


def _drop(model: TapedModel, x: Array) -> Array:
    name = next((name for name in _DROPOUTS if name in model.config), _DROPOUTS[0])
    return model.dropout(x, name, 0.1 * (model.shape.model_type in _DROPS))


def _mean_block(model: TapedModel, x: Array) -> Array:
    """Every linear layer of a mean block in turn, those of one parent and input width on the same input."""
    tape, last, normed = model.tape, x, dict[str, Array]()
    groups = _groups(model.shape)
    for (parent, width), group in groups:
        if group[0].layer_type == "expert_gate_up":
            x = last = tape.add(x, model.experts(model.norm(x)))
            continue
        symbol = _symbol(model, group[0], width)
        if width == model.shape.hidden and group[0].layer_type not in _BACK:
            if parent not in normed:
                normed[parent] = model.norm(x)
            last = normed[parent]
        if last.symbol != symbol:
            last = tape.op([last], symbol, last.item)
        outs = [model.project(last, one, _symbol(model, one, one.sides[0])) for one in group]
        if group[0].layer_type in _BACK:
            y = _drop(model, outs.pop())
            x = last = tape.add(x, y if y.symbol == "h" else tape.op([y], "h", y.item))
        elif any(one.layer_type in ("q", "qkv", "cross_q") for one in group):
            last = _attended(model, outs, group[0])
        elif group[0].layer_type == "gate" and len(outs) == 2:
            last = tape.multiply(model.activation(outs[0]), outs[1])
        else:
            last = tape.op(outs, outs[-1].symbol, outs[-1].item, outs)
        del outs
    return x


def _groups(shape: ModelShape) -> list[tuple[tuple[str, int], list[Weight]]]:
    """((parent, input width), the linear layers of the blocks that share an input), in the model's order."""
    linear = ("linear", "conv1d")
    found = [w for w in shape.weights if w.layers and (w.kind in linear or w.layer_type == "expert_gate_up")]
    groups = itertools.groupby(found, lambda w: (w.name.rpartition(".")[0], w.sides[1], w.layer_type in _BACK))
    return [((parent, width), list(group)) for (parent, width, _), group in groups]


def _symbol(model: TapedModel, weight: Weight, width: int) -> str:
    """ "h" for the stream's own width, else the width in the mean of the blocks as a number."""
    mean = model.share(weight, width)
    return "h" if mean == model.shape.hidden else str(mean)


def _attended(model: TapedModel, outs: list[Array], first: Weight) -> Array:
    """softmax(q·kᵀ)·v, by a fused kernel or with its scores."""
    tape, scores = model.tape, str(model.share(first, model.tape.widths["ns"]))
    symbol, item = outs[0].symbol, outs[0].item
    if model.step.flash:
        kept = [tape.hold(tape.size(str(model.share(first, model.shape.n_heads)), 4), text="4n")]
        if "relative_attention" in model.weights and not first.layer_type.startswith("cross_"):
            # A bias of every head, once for all sequences, that each layer lays out anew.
            kept.append(tape.hold(item * tape.tokens // model.step.batch * model.tape.widths[scores], text="mask"))
        return tape.op(outs, symbol, item, [*outs, *kept], saves_out=True)
    made = tape.op(outs, scores, 4, outs, saves_out=True)
    made = tape.cast(made, item)
    return tape.op([made, outs[-1]], symbol, item, [made, outs[-1]])
