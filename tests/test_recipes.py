"""Recipes: the published sums, and the states that torch's own optimizers really keep."""

import pytest
import torch

from lowrank_probe.errors import ProbeError
from lowrank_probe.recipes import (
    NF4_ABSMAX,
    NF4_CODES,
    NF4_DOUBLE_ABSMAX,
    OPTIMIZERS,
    PRECISIONS,
    ZERO_PAPER,
    adapter_recipe,
    frozen_bytes,
    recipe,
)


@pytest.mark.parametrize(
    ("precision", "optimizer", "total"),
    [
        ("fp32", "adamw", 16), ("mixed", "adamw", 18), ("bf16", "adamw", 8), ("fp32", "sgd-momentum", 12),
        ("fp32", "sgd", 8), ("mixed", "sgd-momentum", 14), ("mixed", "adamw-8bit", 12 + 8 / 256),
        ("bf16", "adamw-8bit", 6 + 8 / 256),
    ],
)  # fmt: skip
def test_published_sums(precision, optimizer, total):
    found = recipe(precision, optimizer)
    assert found.total == total == found.weights + found.master + found.gradients + found.optimizer
    assert OPTIMIZERS[optimizer].label in found.name
    assert found.source


def test_the_zero_papers_sixteen_is_not_fp32s():
    paper, fp32 = ZERO_PAPER, recipe("fp32", "adamw")
    assert paper.total == fp32.total == 16
    assert (paper.weights, paper.gradients, paper.master + paper.optimizer) == (2, 2, 12)


def test_four_bits_with_their_constants():
    plain = NF4_CODES + NF4_ABSMAX
    assert plain == 0.5625
    assert pytest.approx(0.51587, abs=5e-6) == NF4_CODES + NF4_DOUBLE_ABSMAX


MADE = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adamw-foreach": (torch.optim.AdamW, {"foreach": True}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd": (torch.optim.SGD, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MADE)
def test_torchs_optimizers_keep_those_states(name, dtype):
    parameter = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    kind, options = MADE[name]
    optimizer = kind([parameter], lr=1e-3, **options)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(
        state.numel() * state.element_size()
        for state in optimizer.state[parameter].values()
        if isinstance(state, torch.Tensor) and state.dim()
    )
    found = recipe("fp32" if dtype == torch.float32 else "bf16", name)
    assert kept == found.optimizer * parameter.numel()
    assert found.weights == found.gradients == parameter.element_size()
    assert found.transient == (parameter.element_size() if name == "adamw-foreach" else 0)


def test_an_adapter_is_fp32_beside_a_bf16_base():
    assert adapter_recipe("float32", "adamw").total == 16
    assert adapter_recipe("bfloat16", "adamw").total == 8
    assert [frozen_bytes(precision) for precision in PRECISIONS] == [4, 2, 2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: recipe("int8", "adamw"), "precision 'int8': expected one of fp32, bf16, mixed"),
        (lambda: recipe("bf16", "lion"), "optimizer 'lion': expected one of adamw, "),
        (lambda: adapter_recipe("float16", "adamw"), "adapter dtype 'float16': expected float32 or bfloat16"),
    ],
)
def test_what_has_no_recipe_is_refused(call, words):
    with pytest.raises(ProbeError) as refused:
        call()
    assert words in str(refused.value)
