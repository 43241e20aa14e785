"""The layers of transformers' decoder models on a `Tape`: what each of them makes and saves in a training step.

Attention is in `taped_attention`, embeddings and loss in `taped_ends`. The code follows transformers' modelling files
and PEFT's layers as far as they make tensors, local names included, since these keep tensors alive. Operators are
CUDA's. Linear layers are named by their layer type.

Legend: T tokens, s sequence, h hidden, q heads·head_dim, K key/value heads·head_dim, f intermediate, V vocabulary, n
heads, k key/value heads, r rank, c the fused q, k and v; n·s scores a token.
Source: transformers 5.24 (modeling_llama.py, modeling_gpt2.py, modeling_gpt_neox.py), PEFT 0.21 (lora/layer.py,
lora/dora.py, lora/bnb.py), bitsandbytes 0.50 (autograd/_functions.py), PyTorch 2.11 (derivatives.yaml,
autocast_mode.cpp, transformers/cuda/attention.cu).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from lowrank_probe.errors import NoFormulaError
from lowrank_probe.model_shapes import ModelShape, Weight
from lowrank_probe.tape import Array, Buffer, Tape
from lowrank_probe.training_steps import Step

_ACTIVATIONS: Final = ("activation_function", "hidden_act", "feed_forward_proj")  # where a config names it
_GELU_NEW: Final = ("gpt2", "gptj", "phi")  # model types whose config class has it where config.json says nothing
_RELU: Final = ("opt", "t5")  # the same of ReLU
# What takes its loss in the logits' own dtype: encoders, with a decoder or without.
_NARROW: Final = ("ForMaskedLM", "ForConditionalGeneration")
_NARROW_TYPES: Final = ("bert", "roberta", "distilbert", "t5")


class TapedModel:
    """The layers of one model in one step on a tape; `taped_blocks` puts them together.

    base: bytes an entry of weights and residual stream; adapter: of the adapter. autocast: linear layers run in bf16
    whatever they get. quantized: those of the blocks have 4-bit weights. trains: the model's own weights are trained.
    adapted: the weights that an adapter is on, by name. layer_norms: its norms have a bias and so are no RMS norms.
    gemma: they are Gemma's. wide_loss: the loss is taken in float32. casts: autocast's copies of weights. held: the
    logits, where the caller keeps them. mask: of the sliding window, while the blocks run.
    """

    def __init__(self, shape: ModelShape, step: Step, tape: Tape) -> None:
        self.shape, self.step, self.tape = shape, step, tape
        self.config: Mapping[str, Any] = shape.config
        self.quantized, self.trains = step.method == "qlora", not step.adapted
        self.autocast = step.precision == "mixed" or self.quantized
        narrow = step.precision == "bf16" or (self.autocast and step.adapted)
        self.base = 2 if narrow and not self.quantized else 4
        self.adapter = 2 if step.adapter_dtype == "bfloat16" else 4
        # A stack of experts may have a bias of the same layer type.
        self.weights = {weight.layer_type: weight for weight in sorted(shape.weights, key=lambda one: len(one.shape))}
        if shape.tied_embeddings and "embedding" in self.weights:  # headers have no tensor of a tied head
            table = replace(self.weights["embedding"], layer_type="lm_head", tied=True)
            self.weights.setdefault("lm_head", table)
        self.adapted = {weight.name: weight for weight in _everywhere(shape, step)}
        self.layer_norms = any(weight.kind == "norm" and weight.bias for weight in shape.weights)
        self.gemma = shape.model_type.startswith("gemma")
        named = str((self.config.get("architectures") or [""])[0])
        self.wide_loss = not named.endswith(_NARROW) and shape.model_type not in _NARROW_TYPES
        self.casts: dict[str, Buffer] = {}
        self.left_autocast = False
        self.held: Array | None = None
        self.mask: Buffer | None = None

    # Linear layers and their adapters

    def linear(self, x: Array, layer_type: str, symbol: str) -> Array:
        """x·Wᵀ + b, with its adapter where it has one."""
        return self.project(x, self.weights[layer_type], symbol)

    def project(self, x: Array, weight: Weight, symbol: str) -> Array:
        """As `linear`, by a weight that shares its layer type with others."""
        if self.quantized and weight.layer_type != "lm_head":
            return self._quantized_linear(x, weight, symbol)
        name = "lm_head" if weight.layer_type == "lm_head" else weight.name
        n_parameters = self.share(weight, math.prod(weight.shape) + weight.bias)
        out = self._matmul(x, name, symbol, n_parameters, self.base, self.trains)
        if weight.name not in self.adapted:
            return out
        return (self._dora if self.step.method == "dora" else self._lora)(x, out, weight, symbol)

    def share(self, weight: Weight, n: int) -> int:
        """n times the share of the blocks that have the weight: the mean of a model whose blocks differ."""
        return round(n * weight.count / self.shape.n_layers) if weight.layers else n

    def _matmul(self, x: Array, name: str, symbol: str, n_parameters: int, item: int, trains: bool) -> Array:
        """It saves x where the weight is trained. Autocast first makes bf16 copies of both."""
        saves: list[Array | Buffer] = []
        # The head's weight is used for every piece of a chunked loss, and where it is tied in the embedding too.
        shared = "" if name != "lm_head" else "embedding" if self.shape.tied_embeddings else name
        if self.autocast:
            x = self.tape.cast(x, 2)
            if item == 4:
                saves.append(self._cast_weight(name, n_parameters))
        if trains:
            saves.append(x)
        return self.tape.op(
            [x], symbol, x.item if self.autocast else item, saves, weight=n_parameters * item * trains, name=shared,
            narrow=2 * n_parameters if self.autocast and item == 4 and trains else 0,
        )  # fmt: skip

    def _cast_weight(self, name: str, n_parameters: int) -> Buffer:
        """Autocast's bf16 copy of a weight, kept until autocast is left; what is recomputed makes it anew."""
        key = f"{self.tape.place}.{name}"
        copy = self.casts.get(key) or self.tape.hold(2 * n_parameters, "casts")
        if not self.left_autocast:
            self.casts[key] = copy
        return copy

    def leave_autocast(self) -> None:
        """The end of the model's forward pass."""
        self.left_autocast = True
        self.casts.clear()

    def _quantized_linear(self, x: Array, weight: Weight, symbol: str) -> Array:
        """x·Wᵀ in bf16 from 4 bits, back in x's own dtype, cloned where it is adapted (bitsandbytes, PEFT's bnb.py)."""
        tape, item = self.tape, x.item
        out = tape.op([tape.cast(x, 2)], symbol, 2)
        out = tape.cast(out, item)
        if weight.name not in self.adapted:
            return out
        out = tape.op([out], symbol, item)
        low_rank = self._low_rank(x, weight, symbol)
        low_rank = tape.op([low_rank], symbol, low_rank.item)
        return tape.add(out, low_rank)

    def _low_rank(self, x: Array, weight: Weight, symbol: str) -> Array:
        """B(A(x))."""
        (m, n), rank = weight.sides, self.step.rank
        r = max(1, self.share(weight, rank))  # a width, whole also where few of the blocks have the weight
        in_a, in_b = self.share(weight, rank * n), self.share(weight, rank * m)
        a = self._matmul(x, f"{weight.name}.A", "r" if r == rank else str(r), in_a, self.adapter, True)
        return self._matmul(a, f"{weight.name}.B", symbol, in_b, self.adapter, True)

    def _lora(self, x: Array, result: Array, weight: Weight, symbol: str) -> Array:
        """result + B(A(x))·scaling in the adapter's dtype, and back."""
        tape, item = self.tape, result.item
        x = tape.cast(x, self.adapter)
        low_rank = self._low_rank(x, weight, symbol)
        low_rank = tape.op([low_rank], symbol, low_rank.item)
        result = tape.add(result, low_rank)
        return tape.cast(result, item)

    def _dora(self, x: Array, result: Array, weight: Weight, symbol: str) -> Array:
        """result + (g − 1)·result + g·B(A(x))·scaling with g = magnitude/‖W + scaling·B·A‖, which is made each time."""
        tape, item, wide = self.tape, result.item, max(self.adapter, self.base)
        m, n = weight.sides
        x = tape.cast(x, self.adapter)
        # B·A by way of an identity matrix, with its graph, and W in the adapter's dtype: names that last to the end.
        run_in = 2 if self.autocast else self.adapter
        matrices = [tape.hold(run_in * (n * n + self.step.rank * n) + self.adapter * m * n)]
        matrices.append(tape.hold(self.adapter * m * n * (self.base != self.adapter)))
        tape.hold(2 * self.adapter * m * n)
        low_rank = self._low_rank(x, weight, symbol)
        before = tape.op([result], symbol, item) if weight.bias else result
        product = tape.size(symbol, wide)
        scaled = tape.op([before], symbol, wide, [before], weight=m * self.adapter, back_scratch=product)
        low_rank = tape.op([low_rank], symbol, wide, [low_rank], back_scratch=product)
        low_rank = tape.op([low_rank], symbol, wide)
        change = tape.add(scaled, low_rank)
        del matrices, scaled, low_rank, before
        result = tape.add(result, change)
        return tape.cast(result, item)

    # Mixtures of experts

    def experts(self, x: Array) -> Array:
        """Σ of the experts that a token meets, each by its weight: one grouped product for all of them at once.

        Source: transformers' integrations/moe.py (grouped_mm_experts_forward), PEFT's ParamWrapper.
        """
        tape, item = self.tape, x.item
        router = self.share(self.weights["router"], math.prod(self.weights["router"].shape)) * self.base * self.trains
        scores = tape.op([x], "E", 4, [x] * self.trains, weight=router, saves_out=True)
        chosen = tape.op([x], "eh", item)
        gate, up = tape.split(self._stack(chosen, "expert_gate_up", "2ef"), ("ef", "ef"))
        out = self._stack(tape.multiply(self.activation(gate), up), "expert_down", "eh")
        del gate, up, chosen
        saves = [out, scores] if scores.node else [scores]
        weighted = tape.op([out, scores], "eh", item, saves)
        del out
        weighted = tape.op([weighted], "eh", item)
        return tape.op([weighted], "h", item)

    def _stack(self, x: Array, layer_type: str, symbol: str) -> Array:
        """x by the stack of experts. An adapter makes the whole stack anew, W + B·A, which backward needs."""
        weight = self.weights[layer_type]
        n_parameters = self.share(weight, math.prod(weight.shape))
        if weight.name not in self.adapted:
            return self._matmul(x, weight.name, symbol, n_parameters, self.base, self.trains)
        rank, (m, n) = self.adapted[weight.name].rank_factor * self.step.rank, weight.sides
        factors = self.share(weight, weight.copies * rank * (m + n))
        made = self.tape.hold(n_parameters * self.base, text=f"{self.base}W")
        kept: list[Array | Buffer] = [x, made, self.tape.hold(factors * self.base, text=f"{self.base}W")]
        return self.tape.op(
            [x], symbol, x.item, kept, weight=factors * self.adapter, back_scratch=n_parameters * self.base
        )

    # Norms, activations, dropout

    def norm(self, x: Array) -> Array:
        """The family's norm, over the last dimension."""
        return self._layer_norm(x) if self.layer_norms else self._rms_norm(x)

    def _rms_norm(self, x: Array) -> Array:
        """x/√mean(x²) in float32, cast back, times the weight; Gemma casts last."""
        tape, symbol, item = self.tape, x.symbol, x.item
        gemma, wide = self.gemma, tape.size(symbol, 4)
        width = tape.widths[symbol] if symbol == "h" else self.shape.head_dim
        x = tape.cast(x, 4)
        y = tape.op([x], symbol, 4, [x, self._rows(symbol)], scratch=wide, back_scratch=3 * wide)
        inner = y if gemma else tape.cast(y, item)
        out = tape.op(
            [inner], symbol, max(inner.item, self.base), [inner] * self.trains, weight=width * self.base * self.trains,
            back_scratch=tape.size(symbol, inner.item) * self.trains,
        )  # fmt: skip
        return tape.cast(out, item) if gemma else out

    def _rows(self, symbol: str) -> Buffer:
        """One float32 for each row that is normalised: a token, or one head of it."""
        rows = {"q": "n", "K": "k"}.get(symbol, "1")
        return self.tape.hold(self.tape.size(rows, 4), text=f"4{rows}")

    def _layer_norm(self, x: Array) -> Array:
        """(x − mean)/deviation·weight + bias; in float32 under autocast."""
        x = self.tape.cast(x, 4) if self.autocast else x
        weight = 2 * self.shape.hidden * self.base * self.trains
        return self.tape.op([x], "h", x.item, [x, self._rows("h"), self._rows("h")], weight=weight)

    def activation(self, x: Array) -> Array:
        """A nonlinearity: one kernel that saves its input, of "relu" its output; "gelu_new", "gelu_fast": operators."""
        tape, symbol = self.tape, x.symbol
        named = (self.config.get(name) for name in _ACTIVATIONS)
        usual = "gelu_new" if self.shape.model_type in _GELU_NEW else "relu" if self.shape.model_type in _RELU else ""
        name = next(filter(None, named), usual)
        if name == "relu":
            return tape.op([x], symbol, x.item, saves_out=True)
        if name == "gelu_fast":
            return self._gelu_fast(x)
        if name not in ("gelu_new", "gated-gelu"):
            return tape.op([x], symbol, x.item, [x])
        item = 4 if self.autocast else x.item
        half = tape.op([x], symbol, x.item)
        inner = tape.cast(x, item)
        inner = tape.op([inner], symbol, item, [inner], back_scratch=2 * tape.size(symbol, item))
        inner = tape.op([inner], symbol, item)
        inner = tape.add(x, inner)
        inner = tape.op([inner], symbol, item)
        inner = tape.op([inner], symbol, item, saves_out=True)
        inner = tape.op([inner], symbol, item)
        return tape.multiply(half, inner)

    def _gelu_fast(self, x: Array) -> Array:
        """½·x·(1 + tanh(x·√(2/π)·(1 + 0.044715·x·x))), as GPT-NeoX-20B's config has it."""
        tape, symbol, item = self.tape, x.symbol, x.item
        half, scaled = tape.op([x], symbol, item), tape.op([x], symbol, item)
        square = tape.multiply(tape.op([x], symbol, item), x)
        inner = tape.multiply(scaled, tape.op([square], symbol, item))
        del scaled, square
        inner = tape.op([inner], symbol, item, saves_out=True)
        inner = tape.op([inner], symbol, item)
        return tape.multiply(half, inner)

    def dropout(self, x: Array, name: str, default: float = 0.0) -> Array:
        """With the config's share; its mask has one byte an entry."""
        if not self.config.get(name, default):
            return x
        mask = self.tape.hold(self.tape.size(x.symbol, 1), text=f"1{x.symbol}")
        return self.tape.op([x], x.symbol, x.item, [mask])


def _everywhere(shape: ModelShape, step: Step) -> list[Weight]:
    """The adapted weights; `NoFormulaError` where an adapter is on some of the layers only, or on none of them."""
    found = list(shape.adapted(step.targets)) if step.adapted else []
    whole = {weight.name: weight.count for weight in shape.weights}
    for weight in found:
        if weight.count != whole[weight.name]:
            raise NoFormulaError(
                f"{weight.name}: no formula for an adapter on some layers only; --measure runs the step instead"
            )
    if found and not any(weight.layers for weight in found):
        raise NoFormulaError(
            f"{found[0].name}: no formula for an adapter outside of the layers alone; --measure runs the step instead"
        )
    return found
