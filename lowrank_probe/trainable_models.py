"""transformers' model with PEFT's adapter, built from a config with random weights, ready to train one step."""

import contextlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lowrank_probe.as_on_cuda import AsOnCuda
from lowrank_probe.built_shapes import model_class
from lowrank_probe.errors import ProbeError
from lowrank_probe.model_shapes import shape_of_config
from lowrank_probe.training_steps import Step


def trainable_model(config: Mapping[str, Any], step: Step, device: torch.device) -> Any:
    """The model with its adapter on a device, ready to train; `ProbeError` where transformers cannot build it.

    An encoder and decoder get as many tokens each. Attention is eager where the model knows no fused one.
    """
    kind = config.get("model_type")
    if step.method == "qlora":
        raise ProbeError(
            "qlora: bitsandbytes' kernels are not measured here, and LoRA's activations are not its own (fp32 between "
            "the layers); leave --measure out: the formula stands alone"
        )
    bf16 = step.precision == "bf16" or (step.precision == "mixed" and step.adapted)
    try:
        architecture, described = model_class(config)
        fused = step.flash and architecture._supports_sdpa
        with device:
            model = architecture._from_config(
                described, dtype=torch.bfloat16 if bf16 else torch.float32,
                attn_implementation="sdpa" if fused else "eager",
            )  # fmt: skip
    except Exception as error:  # whatever the code of a model may raise
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ProbeError(f"model type {kind!r}: transformers cannot build it: {why}") from error
    if model.get_output_embeddings() is None:
        raise ProbeError(f"--measure trains on a language model's loss: {architecture.__name__} has no such head")
    if step.chunked_loss and not architecture.__name__.endswith(("CausalLM", "LMHeadModel")):
        raise ProbeError(f"--loss chunked is measured of decoders alone, which {architecture.__name__} is not")
    if step.adapted:
        with device:
            model = _adapted(model, config, step)
    if step.checkpointing:
        body = model.get_base_model() if step.adapted else model
        # Renamed in transformers 5.20; the old name warns.
        turn_on = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable
        # What `Trainer` asks for. A mode is off in the backward pass, and with it in what is recomputed there.
        fake = {"context_fn": lambda: (contextlib.nullcontext(), AsOnCuda())} if device.type != "cuda" else {}
        turn_on({"use_reentrant": False, **fake})
    return model.train()


def _adapted(model: nn.Module, config: Mapping[str, Any], step: Step) -> Any:
    """The model with PEFT's adapter on what `targets` select, in the dtype that the step asks for."""
    import peft

    weights = shape_of_config(config).adapted(step.targets)
    modules = [re.escape(name) for weight in weights if weight.kind != "parameter" for name in weight.modules()]
    bare = {
        _parameter(model, name): weight for weight in weights if weight.kind == "parameter" for name in weight.modules()
    }
    settings = peft.LoraConfig(
        r=step.rank, lora_alpha=2 * step.rank, target_modules=f"(?:{'|'.join(modules)})" if modules else [],
        target_parameters=list(bare) or None,
        rank_pattern={name: weight.rank_factor * step.rank for name, weight in bare.items() if weight.rank_factor > 1},
        use_dora=step.method == "dora", use_rslora=step.method == "rslora",
        fan_in_fan_out=any(weight.kind == "conv1d" for weight in weights),
    )  # fmt: skip
    with warnings.catch_warnings():
        # peft 0.21 asks transformers for a property that transformers 5.24 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # It takes ranks of parameters, and looks for them among the modules too.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        # Of merging and saving, which nobody does here.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer", UserWarning)
        try:
            adapted = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise ProbeError(f"PEFT does not adapt these targets here: {str(error).partition(chr(10))[0]}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad and step.adapter_dtype == "bfloat16":
            parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def _parameter(model: nn.Module, name: str) -> str:
    """The name of a bare parameter, or of that of a module which is nothing else, as a router."""
    names = dict(model.named_parameters())
    return name if name in names else f"{name}.weight"
