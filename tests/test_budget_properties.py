"""What holds of every budget: parts make the whole, more of it never takes less, more cards never hold more each."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shape_configs import CONFIGS, OTHERS, configs

from lowrank_probe.accelerators import accelerators, find_accelerator
from lowrank_probe.activations import activations
from lowrank_probe.budget_fits import cards_by_stage, largest, mends, smallest_card, storage
from lowrank_probe.budgets import Budget
from lowrank_probe.errors import NoFormulaError
from lowrank_probe.model_shapes import shape_of_config
from lowrank_probe.recipes import OPTIMIZERS, PRECISIONS
from lowrank_probe.sharding import Sharding
from lowrank_probe.training_steps import Step

# Of every family its last variant (mixtures whose blocks differ among them), and a mixture that no table has.
SHAPES = [shape_of_config(configs(name)[-1]) for name in CONFIGS]
SHAPES.append(shape_of_config(next(one for one in OTHERS if one["model_type"] == "deepseek_v3")))
DIFFERENT = [one for one in SHAPES if any(0 < len(w.layers) < one.n_layers and w.kind == "linear" for w in one.weights)]
LENGTHS = st.integers(1, 96)
METHODS = ("full", "lora", "qlora", "dora", "rslora")
slow = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def budgets(draw, seq=LENGTHS):
    """A budget that has a formula; of few cards and any stage."""
    shape, method = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(METHODS))
    targets = "all-linear"
    if method == "dora" and any(weight.kind == "parameter" for weight in shape.adapted(targets)):
        method = "lora"  # PEFT has no DoRA of bare parameters
    step = Step(
        batch=draw(st.integers(1, 4)), seq=draw(seq), method=method, rank=draw(st.integers(1, 24)), targets=targets,
        precision=draw(st.sampled_from(list(PRECISIONS))), optimizer=draw(st.sampled_from(list(OPTIMIZERS))),
        checkpointing=draw(st.booleans()), flash=draw(st.booleans()), chunked_loss=draw(st.booleans()),
        adapter_dtype=draw(st.sampled_from(["float32", "bfloat16"])), double_quant=draw(st.booleans()),
    )  # fmt: skip
    library = draw(st.sampled_from(["zero", "fsdp"]))
    stage = draw(st.integers(2 if library == "fsdp" else 0, 3))
    return Budget(shape, step, Sharding(draw(st.integers(1, 5)), stage, library))


@slow
@given(budgets(st.one_of(st.none(), LENGTHS)))
def test_the_parts_are_the_whole(found):
    assert len({one.name for one in found.components}) == len(found.components)
    assert all(n >= 0 for one in found.components for n in one.at.values())
    for phase, total in found.phases.items():
        assert total == sum(one.at[phase] for one in found.components)
    assert found.total_bytes == max(found.phases.values())
    assert found.total_bytes == found.phases[found.peak_phase]
    assert 0 < found.state_bytes < found.total_bytes
    assert found.allocated_bytes < found.total_bytes
    assert found.counts.trained > 0
    assert sum(found.shape.by_type().values()) == found.counts.total
    told = found.as_dict()
    assert sum(part["bytes"][found.peak_phase] for part in told["components"]) == told["total_bytes"]


@slow
@given(budgets(), st.sampled_from(["batch", "seq", "rank"]), st.integers(1, 40))
def test_more_of_anything_never_takes_less(found, what, more):
    larger = found.changed(**{what: getattr(found.step, what) + more})
    for phase, total in found.phases.items():
        assert larger.phases[phase] >= total, phase
    assert larger.adapter_file_bytes >= found.adapter_file_bytes


@slow
@given(budgets(), st.integers(2, 40), st.integers(1, 40), st.sampled_from([1, 2, 3]))
def test_more_cards_never_hold_more_each(found, n, more, stage):
    few, many = found.over(n, stage), found.over(n + more, stage)
    for phase, total in few.phases.items():
        assert many.phases[phase] <= total, phase
    assert found.over(n, 0).phases == found.over(n + more, 0).phases  # DDP holds everything


@slow
@given(budgets(), st.sampled_from(["batch", "seq"]), st.floats(0.62, 2.0))
def test_the_largest_is_the_last_that_fits(found, what, gb):
    card = find_accelerator(f"{gb:.3f}GB")
    n = largest(found, what, card)
    if n is None:
        assert not found.changed(**{what: 1}).fits(card)
        return
    assert found.changed(**{what: n}).fits(card)
    end = found.positions if what == "seq" else 2**20
    assert n == end or not found.changed(**{what: n + 1}).fits(card)


@slow
@given(budgets())
def test_cards_mends_and_storage_agree_with_the_sums(found):
    card = find_accelerator("1.2GB")
    for stage, n in cards_by_stage(found, card).items():
        if n is not None and n > 1:
            assert found.over(n, stage).fits(card)
            assert n == 2 or not found.over(n - 1, stage).fits(card)
    for one in mends(found):
        assert 0 < one.saved_bytes == found.total_bytes - one.total_bytes
    (stored,) = storage([found], 3)
    (kept,) = stored.budgets
    assert kept == (found if found.counts.adapter else found.changed(method="lora"))
    assert stored.full_bytes == 3 * kept.checkpoint_bytes
    assert stored.adapter_bytes == kept.checkpoint_bytes + 3 * kept.adapter_file_bytes
    small = smallest_card(found)
    assert small is None or found.fits(small)
    assert [one for one in accelerators() if found.fits(one)] == [
        one for one in accelerators() if found.total_bytes <= one.usable_bytes and found.runs_on(one)
    ]


@slow
@given(budgets())
def test_checkpointing_keeps_no_more(found):
    kept, again = (found.changed(checkpointing=on).activations.saved for on in (False, True))
    assert again <= kept


@pytest.mark.parametrize("shape", DIFFERENT, ids=lambda shape: shape.model_type)
def test_where_blocks_differ_every_rank_has_its_parameters(shape):
    first, *more = (activations(shape, Step(seq=16, rank=rank)).peaks["step"].gradients for rank in (1, 2, 3, 20))
    assert more == pytest.approx([2 * first, 3 * first, 20 * first], rel=0.02)
    assert first > 0.8 * 4 * shape.lora_parameters(1)  # routers' adapters are not in the blocks


def test_a_model_whose_blocks_differ_is_among_them():
    assert {one.model_type for one in DIFFERENT} >= {"qwen2_moe", "deepseek_v3"}
    with pytest.raises(NoFormulaError):
        activations(SHAPES[0], Step(seq=8, targets=["lm_head"]))
