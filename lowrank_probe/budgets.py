"""What a training run needs: `budget()` → a `Budget` of components with bytes, formula and source; allocates nothing.

Everything is of one card: batch and activations are per card, the rest is divided as `Sharding` says. The peak is the
largest of the phases forward, loss, backward and step; which one it is belongs to the answer. No torch.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from lowrank_probe.accelerators import Accelerator, find_accelerator
from lowrank_probe.activations import Activations, activations
from lowrank_probe.budget_components import STATES, Component, autocast, components, optimizer_bytes
from lowrank_probe.budget_counts import Counts, count, parse_params
from lowrank_probe.errors import ProbeError
from lowrank_probe.model_shapes import ModelShape, model_shape, typical_shape
from lowrank_probe.recipes import ZERO_PAPER, Recipe, adapter_recipe, frozen_bytes, recipe
from lowrank_probe.remote_files import shown
from lowrank_probe.sharding import Sharding
from lowrank_probe.taped_estimates import EAGER
from lowrank_probe.training_steps import Step

SCHEMA_VERSION: Final = 1
# Where a config says how many positions the model has.
_POSITIONS: Final = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
)
# What the comparison shows, in its order: method, precision, optimizer, and the recipe where it is a special one.
COMPARED: Final[tuple[tuple[str, str, str, Recipe | None], ...]] = (
    ("full", "fp32", "adamw", None),
    ("full", "mixed", "adamw", None),
    ("full", "mixed", "adamw", ZERO_PAPER),
    ("full", "bf16", "adamw", None),
    ("full", "bf16", "adamw-8bit", None),
    ("lora", "bf16", "adamw", None),
    ("qlora", "bf16", "adamw", None),
)


@dataclass(frozen=True)
class Budget:
    """The memory of one training run on one card.

    shape: the model, under that name. step: the run. sharding: over which cards. n_parameters: of a size without a
    model. special: a recipe in place of the one that precision and optimizer name. components: bytes by part and phase,
    the last one the reserve. Sizes are bytes.
    """

    shape: ModelShape
    step: Step
    sharding: Sharding = field(default_factory=Sharding)
    n_parameters: int | None = None
    special: Recipe | None = None
    name: str = ""

    @cached_property
    def counts(self) -> Counts:
        return count(self.shape, self.step, self.n_parameters)

    @cached_property
    def recipe(self) -> Recipe:
        """Bytes of a trained parameter: the model's, or the adapter's."""
        if self.step.method == "full":
            return self.special or recipe(self.step.precision, self.step.optimizer)
        return adapter_recipe(self.step.adapter_dtype, self.step.optimizer)

    @cached_property
    def activations(self) -> Activations | None:
        """None where batch and sequence are not given."""
        if self.step.seq is None:
            return None
        adapter = self.step.adapted and not self.sharding.spreads(1)
        cast = self.step.precision != "mixed" or adapter or autocast(self.recipe, self.sharding)
        return activations(self.shape, self.step if cast else replace(self.step, precision="bf16"))

    @cached_property
    def components(self) -> tuple[Component, ...]:
        return components(self.counts, self.step, self.recipe, self.sharding, self.activations, self.unfused)

    @cached_property
    def phases(self) -> Mapping[str, int]:
        """Phase → bytes on one card, with the reserve; {"states": …} where activations are not known."""
        phases = self.components[0].at
        return {phase: sum(one.at[phase] for one in self.components) for phase in phases}

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def total_bytes(self) -> int:
        """Bytes on one card at the peak, with the reserve; without activations where those are not known."""
        return self.phases[self.peak_phase]

    @property
    def reserve_bytes(self) -> int:
        return self.components[-1].at[self.peak_phase]

    @property
    def allocated_bytes(self) -> int:
        """At the peak without the reserve: what torch.cuda.max_memory_allocated counts."""
        return max(self.phases[phase] - self.components[-1].at[phase] for phase in self.phases)

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and states on one card: what does not depend on batch and sequence."""
        found = self if self.activations is None else replace(self, step=replace(self.step, seq=None))
        return sum(one.at[STATES] for one in found.components[:-1])

    @property
    def adapter_file_bytes(self) -> int:
        """Size of adapter_model.safetensors as PEFT saves it; 0 for full fine-tuning."""
        each = 2 if self.step.adapter_dtype == "bfloat16" else 4
        return each * self.counts.adapter + self.counts.adapter_header

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the whole model's weights: 4 bytes a parameter where those that `Trainer` saves are fp32, else 2.

        In mixed precision it trains and saves fp32 ones; DeepSpeed saves 16 bits (accelerate's `get_state_dict`).
        """
        if self.step.method != "full":
            return round(frozen_bytes(self.step.precision)) * self.counts.total
        wide = self.sharding.is_fsdp or autocast(self.recipe, self.sharding)
        return (4 if self.recipe.weights == 4 or (self.recipe.master and wide) else 2) * self.counts.total

    @property
    def knows_activations(self) -> bool:
        return self.step.seq is not None

    @property
    def label(self) -> str:
        """Method and recipe in a word or two: full, fp32 Adam; lora, bf16 base."""
        if self.step.method == "full":
            return f"full, {self.recipe.name}"
        base = "NF4" if self.step.method == "qlora" else "fp32" if self.step.precision == "fp32" else "bf16"
        return f"{self.step.method}, {base} base"

    @property
    def optimizer_each(self) -> float:
        """Bytes of optimizer states a trained parameter: with 8-bit Adam more than the recipe's, for the tables."""
        if self.step.method != "full" or self.step.optimizer != "adamw-8bit":
            return self.recipe.optimizer
        return optimizer_bytes(self.counts, self.recipe) / self.counts.total

    @property
    def frozen_each(self) -> float:
        """Bytes that a frozen parameter of the base takes in the mean: codes, constants, upcasts; 0 where all train."""
        if self.step.method == "full":
            return 0.0
        alone = replace(self, sharding=Sharding(), step=replace(self.step, seq=None))
        names = ("weights", "quantization constants", "fp32 upcasts")
        return sum(one.largest for one in alone.components if one.name in names) / self.counts.total

    @property
    def bytes_each(self) -> str:
        """Bytes a parameter: weights (+ fp32 master) + gradients + optimizer states = sum; what is frozen before it."""
        recipe = self.recipe
        terms = [term for term in (recipe.weights, recipe.master, recipe.gradients) if term]
        terms += [self.optimizer_each] if self.optimizer_each else []
        said = f"{' + '.join(f'{term:.3g}' for term in terms)} = {sum(terms):.3g}"
        return f"{self.frozen_each:.3g} frozen; adapter {said}" if self.counts.adapter else said

    def fits(self, gpu: str | Accelerator) -> bool:
        """Whether one card has room for it, and can run it. Raises `ProbeError` for a GPU that is not known."""
        found = find_accelerator(gpu) if isinstance(gpu, str) else gpu
        return self.total_bytes <= found.usable_bytes and self.runs_on(found)

    def runs_on(self, card: Accelerator) -> bool:
        """Whether what the run needs exists there: 4-bit weights and 8-bit Adam need bitsandbytes' kernels."""
        return card.bitsandbytes or not self.step.needs_bitsandbytes

    def changed(self, **what: Any) -> "Budget":
        """The budget of the same run with other values of its `Step`, such as `checkpointing=True`."""
        found = replace(self, step=replace(self.step, **what))
        if what.keys() <= {"batch", "seq", "checkpointing", "flash", "chunked_loss"}:  # the parameters are the same
            found.__dict__["counts"] = self.counts
        return found

    def total_at(self, what: str, n: int) -> int:
        """`total_bytes` of the same run at another batch or sequence length, kept: several cards ask for the same."""
        if (what, n) not in self._totals:
            self._totals[what, n] = self.changed(**{what: n}).total_bytes
        return self._totals[what, n]

    @cached_property
    def _totals(self) -> dict[tuple[str, int], int]:
        return {}

    def over(self, gpus: int, stage: int) -> "Budget":
        """The budget of one of `gpus` cards at a stage of the same library."""
        found = replace(self, sharding=Sharding(gpus, stage, self.sharding.library if stage >= 2 else "zero"))
        known: dict[str, Any] = {"counts": self.counts, "recipe": self.recipe}
        if autocast(self.recipe, self.sharding) == autocast(self.recipe, found.sharding):
            known["activations"] = self.activations
        found.__dict__.update(known)
        return found

    @cached_property
    def stage_lines(self) -> Mapping[int, tuple[tuple[float, float], ...]]:
        """Stage → for each phase (a, b): one of n ≥ 2 cards holds a + b/n bytes of it."""
        lines = {}
        for stage in (1, 2, 3):
            two, four = (self.over(n, stage).phases.values() for n in (2, 4))
            lines[stage] = tuple((2.0 * y - x, 4.0 * (x - y)) for x, y in zip(two, four, strict=True))
        return lines

    @property
    def positions(self) -> int | None:
        """How many positions the model's config says that it has; None where it says nothing, or they are relative."""
        if any(weight.layer_type == "relative_attention_bias" for weight in self.shape.weights):
            return None
        config = self.shape.config
        inner = config.get("text_config")
        said = [part.get(name) for part in (config, inner) if isinstance(part, Mapping) for name in _POSITIONS]
        return next((value for value in said if isinstance(value, int) and value > 0), None)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What cannot be run as it is asked for, or is other than it looks."""
        return tuple(said for said in (self._too_long, self._too_wide, self._unfused) if said)

    @property
    def _too_long(self) -> str:
        if self.step.seq is None or not self.positions or self.step.seq <= self.positions:
            return ""
        table = any(weight.layer_type == "position_embedding" for weight in self.shape.weights)
        return f"{self.step.seq:,} tokens are more than the model's {self.positions:,} positions: " + (
            "its table of them ends there, so it cannot run this" if table else "its config must be changed for that"
        )

    @property
    def _too_wide(self) -> str:
        """Of an adapter: PEFT takes any rank, but B·A of a matrix (m, n) has at most min(m, n)."""
        if self.step.method == "full":
            return ""
        smallest = min(self.shape.adapted(self.step.targets), key=lambda weight: min(weight.sides))
        m, n = smallest.sides
        if self.step.rank <= min(m, n):
            return ""
        return (
            f"ranks above {min(m, n):,} are more than {smallest.name} ({m:,}, {n:,}) can have, the smallest matrix "
            "adapted here: further rows and columns of A and B only cost memory"
        )

    @property
    def unfused(self) -> bool:
        """Whether PyTorch runs attention without a fused kernel though one is asked for: grouped queries in float32.

        Transformers leaves grouped keys and values to `scaled_dot_product_attention(enable_gqa=True)`; flash's kernel
        takes no float32, the memory-efficient one no groups, so all s² scores of every head are there.
        Source: PyTorch's sdp_utils.cpp and pull request 181528; transformers' `use_gqa_in_sdpa`.
        """
        if self.activations is None or not self.step.flash or self.shape.model_type in EAGER:
            return False
        return any("·ns" in self.activations.formulas[part] for part in ("activations", "working"))

    @property
    def _unfused(self) -> str:
        if not self.unfused:
            return ""
        assert self.step.seq is not None
        n_bytes = 4 * self.step.batch * self.shape.n_heads * self.step.seq**2
        return (
            "PyTorch has no fused attention for grouped queries in float32 on CUDA and falls back to its math kernel: "
            f"{n_bytes / 2**30:,.2f} GiB of scores (4·ns·T bytes) a layer are in these numbers; "
            "--precision bf16 or mixed has the fused one"
        )

    @property
    def _attention(self) -> str:
        if self.unfused:
            return "fused attention asked for but not to be had in float32 with grouped queries"
        if self.shape.model_type in EAGER:
            return "eager attention (the only one that this model has)"
        return f"{'fused' if self.step.flash else 'eager'} attention"

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the numbers take for granted, one sentence each."""
        step, said = self.step, list[str]()
        if self.n_parameters is not None:
            said.append(f"proportions and adapter of {self.shape.source}")
        if not self.knows_activations:
            said.append(
                "activations and logits are not in it: they need --seq (and --batch), or --measure where the model has "
                "no formula for them"
            )
        else:
            said.append(
                f"{step.batch} × {step.seq:,} tokens a card, {'with' if step.checkpointing else 'no'} checkpointing, "
                f"{self._attention}, {'chunked' if step.chunked_loss else 'whole'} loss, "
                "gradients set to None between steps, no padding"
            )
        said += self.cautions
        if self.activations is not None and self.activations.estimated:
            said.append(self.activations.estimated)
        if step.method == "qlora":
            said.append(
                "QLoRA: all linear layers but the output head in 4 bits"
                f"{'' if step.double_quant else ' without double quantization'}, everything else upcast to fp32 by "
                "prepare_model_for_kbit_training, under bf16 autocast; needs bitsandbytes, hence an NVIDIA or AMD GPU"
            )
            if self.counts.stacks:
                said.append(
                    f"stacks of experts ({self.counts.stacks:,} parameters) are no linear layers: not in 4 bits, "
                    f"and upcast like the rest: {4 * self.counts.stacks:,} bytes in fp32"
                )
        return tuple(said)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        step = self.step
        targets = [step.targets] if isinstance(step.targets, str) else list(step.targets)
        return {
            "method": step.method, "recipe": self.recipe.name, "recipe_source": self.recipe.source,
            "bytes_per_trained_parameter": {
                "weights": self.recipe.weights, "master": self.recipe.master, "gradients": self.recipe.gradients,
                "optimizer": self.recipe.optimizer, "total": self.recipe.total,
            },
            "rank": None if step.method == "full" else step.rank,
            "targets": None if step.method == "full" else targets,
            "precision": step.precision, "optimizer": step.optimizer, "batch": step.batch, "seq": step.seq,
            "checkpointing": step.checkpointing, "flash": step.flash, "chunked_loss": step.chunked_loss,
            "adapter_dtype": None if step.method == "full" else step.adapter_dtype,
            "double_quant": step.double_quant if step.method == "qlora" else None,
            "sharding": {"gpus": self.sharding.gpus, "stage": self.sharding.stage, "library": self.sharding.library},
            "n_parameters": self.counts.total, "n_trainable": self.counts.trained,
            "adapter_file_bytes": self.adapter_file_bytes or None, "state_bytes": self.state_bytes,
            "components": [
                {"name": one.name, "bytes": dict(one.at), "formula": one.formula, "source": one.source}
                for one in self.components
            ],
            "phases": dict(self.phases), "peak_phase": self.peak_phase if self.knows_activations else None,
            "activations_known": self.knows_activations, "total_bytes": self.total_bytes,
            "allocated_bytes": self.allocated_bytes, "reserve_bytes": self.reserve_bytes,
            "assumptions": list(self.assumptions),
        }  # fmt: skip

    def __repr__(self) -> str:
        what = "at the peak" if self.knows_activations else "without activations"
        model = self.name or self.shape.source
        return f"<Budget: {model}, {self.label}: {self.total_bytes / 2**30:.2f} GiB on one card {what}>"


def budget(
    model: str | os.PathLike[str] | Mapping[str, Any] | ModelShape | None = None,
    *,
    params: str | float | None = None,
    like: str = "llama",
    method: str = "lora",
    rank: int = 16,
    targets: str | Sequence[str] = "all-linear",
    precision: str = "bf16",
    optimizer: str = "adamw",
    batch: int = 1,
    seq: int | None = None,
    checkpointing: bool | None = None,
    flash: bool = True,
    chunked_loss: bool = False,
    adapter_dtype: str = "float32",
    double_quant: bool = True,
    gpus: int = 1,
    zero: int | None = None,
    fsdp: int | None = None,
) -> Budget:
    """The memory that training needs on one card, from a model's config or headers alone, or from its size.

    model: a directory, config.json, safetensors file, address, hub id, config as a dict; or params (70e9) and a family.
    seq None: activations are not known and not in it. checkpointing None: off, but for QLoRA, as PEFT prepares it.
    double_quant: of QLoRA's constants.
    zero, fsdp: the stage over `gpus` cards. Raises `ProbeError` for what cannot be: a size, a target, a stage.

    >>> found = budget(params=70e9, method="full", precision="fp32")
    >>> found.state_bytes, found.recipe.name, found.fits("H100")
    (1120000000000, 'fp32 Adam', False)
    """
    shape, n_parameters, name = resolve(model, params, like)
    step = Step(
        batch=batch, seq=seq, method=method, rank=rank, targets=targets, precision=precision,  # type: ignore[arg-type]
        optimizer=optimizer, checkpointing=method == "qlora" if checkpointing is None else checkpointing, flash=flash,
        chunked_loss=chunked_loss, adapter_dtype=adapter_dtype,  # type: ignore[arg-type]
        double_quant=double_quant,
    )  # fmt: skip
    if method != "full":
        shape.lora_parameters(rank, targets, method == "dora")  # the errors of rank and targets
    found = Budget(shape, step, sharding(gpus, zero, fsdp), n_parameters, name=name)
    _ = found.recipe, found.activations  # their errors now, not where they are first read
    return found


def compare(
    model: str | os.PathLike[str] | Mapping[str, Any] | ModelShape | None = None,
    *,
    params: str | float | None = None,
    like: str = "llama",
    n_parameters: int | None = None,
    name: str = "",
    **same: Any,
) -> tuple[Budget, ...]:
    """The budgets of the usual methods for one model: `COMPARED`, with everything else as in `budget`.

    n_parameters, name: of a shape that stands for a size, or has another name.
    """
    if not isinstance(model, ModelShape):
        model, n_parameters, name = resolve(model, params, like)
    found = []
    for method, precision, optimizer, special in COMPARED:
        one = budget(model, method=method, precision=precision, optimizer=optimizer, **same)
        found.append(replace(one, n_parameters=n_parameters, special=special, name=name))
    return tuple(found)


def sweep(
    shape: ModelShape,
    methods: Sequence[str],
    ranks: Sequence[int],
    seqs: Sequence[int | None],
    n_parameters: int | None = None,
    name: str = "",
    **same: Any,
) -> tuple[Budget, ...]:
    """The same run at every method, rank and sequence length; full fine-tuning once for all ranks."""
    return tuple(
        replace(
            budget(shape, **same | {"method": method, "rank": rank, "seq": seq}), n_parameters=n_parameters, name=name
        )
        for method in methods
        for rank in (ranks[:1] if method == "full" else ranks)
        for seq in seqs
    )


def sharding(gpus: int, zero: int | None, fsdp: int | None) -> Sharding:
    """The sharding that --gpus, --zero and --fsdp mean together."""
    if zero is not None and fsdp is not None:
        raise ProbeError("--zero and --fsdp: give one of the two")
    if (zero or fsdp) and gpus == 1:
        raise ProbeError(
            f"--{'fsdp' if fsdp else 'zero'} {fsdp or zero} on 1 GPU spreads nothing: give --gpus, such as 8"
        )
    return Sharding(gpus, zero or 0) if fsdp is None else Sharding(gpus, fsdp, "fsdp")


def resolve(
    model: str | os.PathLike[str] | Mapping[str, Any] | ModelShape | None, params: str | float | None, like: str
) -> tuple[ModelShape, int | None, str]:
    """(the model, the number of parameters where only that is known, the model's name)."""
    if (model is None) == (params is None):
        raise ProbeError(
            "give a model (directory, config.json, safetensors file, address, hub id) or --params, one of the two"
        )
    if params is not None:
        n_parameters = parse_params(params)
        return typical_shape(n_parameters, like), n_parameters, ""
    assert model is not None
    return model_shape(model), None, shown(os.fspath(model)) if isinstance(model, str | os.PathLike) else ""
