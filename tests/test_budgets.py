"""Budgets: what texts tell wrong, DeepSpeed's and PEFT's own numbers, sums, and every search by brute force."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM

import lowrank_probe as lp
from lowrank_probe.accelerators import find_accelerator
from lowrank_probe.budget_components import CONTEXT
from lowrank_probe.budget_counts import parse_params
from lowrank_probe.budget_fits import cards_by_stage, largest, mends, smallest_card, storage
from lowrank_probe.budget_words import (
    both,
    file_size,
    lora_against_full,
    on_cards,
    on_cards_of_all,
    peak,
    qlora_against_lora,
    unit_of,
    unlike_checkpointing,
)
from lowrank_probe.budgets import COMPARED, Budget, compare, sweep
from lowrank_probe.errors import ProbeError
from lowrank_probe.measuring import measure_fake
from lowrank_probe.model_shapes import typical_shape
from lowrank_probe.recipes import EIGHT_BIT
from lowrank_probe.sharding import Sharding
from lowrank_probe.training_steps import Step

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 11,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip


def part(found, name):
    return next((one.largest for one in found.components if one.name == name), 0)


def test_llama_3_8b_at_rank_16_on_all_linear_layers():
    found = lp.budget(LLAMA_8B, rank=16)
    assert found.counts.adapter == 41_943_040  # 83,886,080 is rank 32's
    assert lp.budget(LLAMA_8B, rank=32).counts.adapter == 83_886_080
    assert found.adapter_file_bytes == pytest.approx(167.8e6, rel=5e-4)  # not 120 MB
    assert lp.budget(LLAMA_8B, adapter_dtype="bfloat16").adapter_file_bytes == pytest.approx(83.9e6, rel=1e-3)


def test_70b_in_fp32_with_adam_is_twice_what_is_often_said():
    found = lp.budget(params="70B", method="full", precision="fp32")
    assert found.state_bytes == 1.12e12
    assert found.recipe.total == 16
    assert lp.budget(params=70e9, method="full").state_bytes == 560e9  # the text's number is pure bf16's


@pytest.mark.parametrize(("config", "codes", "upcast"), [(LLAMA_8B, 5.70, 7.80), (LLAMA_70B, 39.5, 43.7)])
def test_a_base_in_nf4_is_not_half_a_byte_a_parameter(config, codes, upcast):
    found = lp.budget(config, method="qlora")
    low = part(found, "weights") + part(found, "quantization constants")
    assert low / 1e9 == pytest.approx(codes, abs=0.05 if codes > 10 else 0.005)
    assert (low + part(found, "fp32 upcasts")) / 1e9 == pytest.approx(upcast, abs=0.05 if codes > 10 else 0.005)
    assert found.frozen_each == pytest.approx((low + part(found, "fp32 upcasts")) / found.counts.total)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_the_adapters_file_is_as_peft_writes_it(tmp_path):
    for rank, dora in ((4, False), (16, True)):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
        adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", use_dora=dora))
        adapted.save_pretrained(tmp_path / str(rank))
        real = (tmp_path / str(rank) / "adapter_model.safetensors").stat().st_size
        found = lp.budget(TINY, rank=rank, method="dora" if dora else "lora")
        assert found.adapter_file_bytes == pytest.approx(real, rel=0.01)
        assert found.counts.adapter == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_deepspeeds_own_estimates(n):
    total = lp.budget(LLAMA_8B, method="full").counts.total
    module = 128256 * 4096
    two, three = (lp.budget(LLAMA_8B, method="full", precision="mixed", gpus=n, zero=stage) for stage in (2, 3))
    assert two.state_bytes == pytest.approx(4 * total + 16 * total / n, rel=1e-9)
    assert three.state_bytes == pytest.approx(4 * module + 18 * total / n, rel=1e-9)


def test_each_stage_spreads_one_thing_more():
    sizes = [lp.budget(LLAMA_8B, method="full", precision="fp32", gpus=8, zero=stage) for stage in range(4)]
    total = sizes[0].counts.total
    ddp, one, two, three = (found.state_bytes for found in sizes)
    assert ddp == 20 * total  # DDP keeps a second copy of the gradients
    assert one == 8 * total + 8 * total // 8
    assert two == 4 * total + 12 * total // 8
    assert three == pytest.approx(16 * total / 8 + 8 * 128256 * 4096, rel=1e-9)


def test_fsdp_gathers_a_block_or_everything():
    block = max(128256 * 4096, 218_112_000)
    found = lp.budget(LLAMA_8B, method="full", precision="mixed", gpus=8, fsdp=3)
    total = found.counts.total
    assert found.state_bytes == pytest.approx(16 * total / 8 + 3 * 2 * block, rel=1e-9)
    found = lp.budget(LLAMA_8B, method="full", precision="mixed", gpus=8, fsdp=2)
    assert found.state_bytes == pytest.approx(16 * total / 8 + 2 * total, rel=1e-9)
    frozen = lp.budget(LLAMA_8B, gpus=8, fsdp=3)
    assert part(frozen, "weights") == pytest.approx(2 * total / 8, rel=1e-9)
    assert part(frozen, "gathered weights") == 2 * 2 * block


def test_what_a_card_gathers_of_a_4_bit_base_is_as_it_is_stored():
    table, block = 128256 * 4096, 218_112_000 - 2 * 4096
    spread = {"method": "qlora", "gpus": 8}
    module = lp.budget(LLAMA_8B, zero=3, **spread)
    assert part(module, "gathered weights") == 4 * table  # the embedding, upcast to fp32
    assert f"4 B × {table:,} of the largest module" in {one.formula for one in module.components}
    alone = lp.budget(LLAMA_8B, method="qlora")
    base = part(alone, "weights") + part(alone, "fp32 upcasts")
    assert (
        part(lp.budget(LLAMA_8B, fsdp=2, **spread), "gathered weights")
        == base
        == 0.5 * 6_979_321_856 + 4 * 1_050_939_392
    )
    assert part(lp.budget(LLAMA_8B, fsdp=3, **spread), "gathered weights") == 2 * 4 * table
    small = lp.budget(LLAMA_8B | {"vocab_size": 1000}, fsdp=3, **spread)
    assert part(small, "gathered weights") == 2 * (0.5 * block + 4 * 2 * 4096)


def test_eight_bit_adam_keeps_the_tables_in_fp32():
    found = lp.budget(LLAMA_8B, method="full", optimizer="adamw-8bit")
    table, total = 128256 * 4096, found.counts.total
    assert part(found, "optimizer states") == pytest.approx(EIGHT_BIT * (total - table) + 8 * table, rel=1e-9)
    assert found.bytes_each == "2 + 2 + 2.42 = 6.42"


def test_without_double_quantization_four_bits_take_nine_sixteenths_of_a_byte():
    plain, doubled = (lp.budget(LLAMA_8B, method="qlora", double_quant=double) for double in (False, True))
    codes, n = plain.counts.quantizable, plain.counts.n_quantizable
    assert part(plain, "quantization constants") == 4 / 64 * codes + 64 * n  # as bitsandbytes: absmax and 16 floats
    low = 0.5 * codes + part(plain, "quantization constants") - 64 * n
    assert low / codes == 0.5625
    assert part(doubled, "quantization constants") == pytest.approx((1 / 64 + 4 / 16384) * codes + 1092 * n, abs=1)
    assert ["--double-quant" in [mend.option for mend in mends(one)] for one in (plain, doubled)] == [True, False]
    assert "without double quantization" in " ".join(plain.assumptions)
    assert [plain.as_dict()["double_quant"], lp.budget(LLAMA_8B).as_dict()["double_quant"]] == [False, None]


def test_what_needs_bitsandbytes_is_withheld_where_there_is_none():
    for options in ({"method": "qlora"}, {"method": "full", "optimizer": "adamw-8bit"}):
        found = lp.budget(TINY, seq=64, **options)
        for name in ("TPU v5e", "Apple 128GB"):
            card = find_accelerator(name)
            assert found.total_bytes < card.usable_bytes
            assert not found.fits(card)
            assert set(cards_by_stage(found, card).values()) == {None}
            assert largest(found, "batch", card) is None
            assert "bitsandbytes, which has no kernels" in on_cards(found, card)
        assert found.fits("T4") and found.fits("MI300X")  # noqa: PT018
    found = lp.budget(TINY, seq=64)
    assert found.fits("TPU v5e")
    named = [mend.option for mend in mends(found, find_accelerator("TPU v5e"))]
    assert named
    assert not any("qlora" in option or "8bit" in option for option in named)


def test_a_card_without_bf16_is_marked_where_the_run_computes_in_it():
    for name in ("T4", "V100 16GB", "V100 32GB"):
        card = find_accelerator(name)
        assert not card.bf16
        assert "†: no bf16 in hardware" in on_cards(lp.budget(TINY), card)
        assert "†" not in on_cards(lp.budget(TINY, precision="fp32"), card)
        assert f"{card.label}†" in on_cards(lp.budget(TINY, method="qlora", precision="fp32"), card)
    assert "†" not in on_cards(lp.budget(TINY), find_accelerator("L4"))


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora", "rslora"])
@pytest.mark.parametrize("seq", [None, 256])
def test_the_parts_are_the_phases_and_the_largest_phase_is_the_total(method, seq):
    found = lp.budget(TINY, method=method, seq=seq)
    assert list(found.phases) == (["forward", "loss", "backward", "step"] if seq else ["states"])
    for phase, total in found.phases.items():
        assert total == sum(one.at[phase] for one in found.components)
    assert found.total_bytes == max(found.phases.values()) == found.phases[found.peak_phase]
    assert found.components[-1].name == "reserve"
    share = 0.16 if method == "qlora" else 0.05
    rest = found.total_bytes - found.reserve_bytes
    assert found.reserve_bytes == pytest.approx(CONTEXT + share * rest, abs=1)
    assert all(one.formula and one.source for one in found.components)
    assert not seq or found.state_bytes == lp.budget(TINY, method=method).state_bytes


def test_foreach_adam_holds_one_more_copy_in_its_step():
    fused, foreach = (lp.budget(TINY, method="full", seq=64, optimizer=name) for name in ("adamw", "adamw-foreach"))
    copy = 2 * fused.counts.total
    assert foreach.phases["step"] - fused.phases["step"] == pytest.approx(1.05 * copy, abs=2)
    assert foreach.phases["loss"] == fused.phases["loss"]


@pytest.mark.parametrize("gpu", ["T4", "RTX 4090", "H100", "MI355X"])
@pytest.mark.parametrize(
    ("method", "precision"),
    [("full", "fp32"), ("full", "mixed"), ("full", "bf16"), ("lora", "bf16"), ("qlora", "bf16")],
)
def test_the_least_number_of_cards_by_brute_force(method, precision, gpu):
    card = find_accelerator(gpu)
    found = lp.budget(LLAMA_70B, method=method, precision=precision, seq=128, checkpointing=True)
    stages = cards_by_stage(found, card)
    if found.fits(card):
        assert set(stages.values()) == {1}
        return
    assert stages[0] is None
    for stage in (1, 2, 3):
        n = stages[stage]
        if n is None:
            assert not found.over(65536, stage).fits(card)
            continue
        assert found.over(n, stage).fits(card)
        assert n == 2 or not found.over(n - 1, stage).fits(card)
    if stages[3] is not None:
        exact = lp.budget(LLAMA_70B, method=method, precision=precision, seq=128, checkpointing=True,
                          gpus=stages[3], zero=3)  # fmt: skip
        assert exact.fits(card)


@pytest.mark.parametrize("what", ["batch", "seq"])
@pytest.mark.parametrize(("gpu", "flash"), [("RTX 4090", True), ("H100", True), ("H100", False), ("T4", True)])
def test_the_largest_batch_and_sequence_by_brute_force(what, gpu, flash):
    card = find_accelerator(gpu)
    found = lp.budget(LLAMA_8B, seq=700, flash=flash)
    most = largest(found, what, card)
    if most is None:
        assert not found.changed(**{what: 1}).fits(card)
        return
    assert found.changed(**{what: most}).fits(card)
    if most < 8192 or what == "batch":
        assert not found.changed(**{what: most + 1}).fits(card)


def test_a_sequence_ends_with_the_models_positions():
    assert largest(lp.budget(TINY, seq=64), "seq", find_accelerator("B300")) == 512


def test_what_would_save_memory_is_what_it_saves():
    found = lp.budget(LLAMA_8B, seq=1024, batch=4)
    saved = mends(found)
    by_option = {one.option: one for one in saved}
    assert set(by_option) >= {"--checkpointing", "--loss chunked", "--seq 512", "--batch 2", "--dtype bfloat16",
                              "--optimizer adamw-8bit", "--method qlora --checkpointing", "--rank 8"}  # fmt: skip
    assert all(a.saved_bytes >= b.saved_bytes > 0 for a, b in pairwise(saved))
    assert all(one.saved_bytes == found.total_bytes - one.total_bytes for one in saved)
    eager = {
        one.option
        for one in mends(lp.budget(LLAMA_8B, method="full", seq=4096, optimizer="adamw-foreach", flash=False))
    }
    assert "--flash" in eager
    assert not {option for option in eager if option.startswith(("--dtype", "--rank", "--method", "--batch 0"))}


# Option → the argument of `lp.budget` that it gives, and what makes its value of the word behind it.
OPTIONS = {
    "--checkpointing": ("checkpointing", None), "--flash": ("flash", None), "--seq": ("seq", int),
    "--batch": ("batch", int), "--rank": ("rank", int), "--loss": ("chunked_loss", "chunked".__eq__),
    "--optimizer": ("optimizer", str), "--precision": ("precision", str),
    "--dtype": ("adapter_dtype", str), "--method": ("method", str),
}  # fmt: skip


def arguments(option):
    words, found = option.split(), {}
    while words:
        name, read = OPTIONS[words.pop(0)]
        found[name] = True if read is None else read(words.pop(0))
    return found


@pytest.mark.parametrize(
    "run",
    [
        {"method": "lora", "seq": 2048}, {"method": "lora", "seq": 2048, "batch": 2, "checkpointing": True},
        {"method": "lora"}, {"method": "rslora", "seq": 512, "flash": False, "gpus": 4, "zero": 3},
        {"method": "full", "seq": 1024, "optimizer": "adamw-foreach", "precision": "mixed"},
        {"method": "lora", "seq": 256, "precision": "fp32"},
        {"method": "qlora", "seq": 512, "checkpointing": False, "optimizer": "adamw-foreach"},
    ],
    ids=str,
)  # fmt: skip
def test_every_mend_is_the_budget_with_its_option(run):
    offered = mends(lp.budget(LLAMA_8B, **run))
    assert offered
    for one in offered:
        assert one.total_bytes == lp.budget(LLAMA_8B, **run | arguments(one.option)).total_bytes, one.option
        # QLoRA turns checkpointing on by itself: the option is true without that word too.
        if arguments(one.option) == {"method": "qlora", "checkpointing": True}:
            assert one.total_bytes == lp.budget(LLAMA_8B, **run | {"method": "qlora"}).total_bytes


def test_variants_on_disk():
    found = lp.budget(LLAMA_8B)
    (stored,) = storage([found], 100)
    assert stored.full_bytes == 100 * 2 * found.counts.total
    assert stored.adapter_bytes == 2 * found.counts.total + 100 * found.adapter_file_bytes
    several = sweep(found.shape, ["full", "lora", "rslora", "dora"], [4, 8], [32, 64])
    assert [(row.budgets[0].step.rank, {one.step.method for one in row.budgets}) for row in storage(several, 2)] == [
        (4, {"lora", "rslora"}), (8, {"lora", "rslora"}), (4, {"dora"}), (8, {"dora"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("run", "each"),
    [
        ({"method": "full", "precision": "fp32"}, 4), ({"method": "full", "precision": "bf16"}, 2),
        ({"method": "full", "precision": "mixed"}, 4), ({"method": "lora", "precision": "mixed"}, 2),
        ({"method": "full", "precision": "mixed", "gpus": 8, "fsdp": 3}, 4),
        # DeepSpeed's engine has 16-bit weights, and those are saved.
        ({"method": "full", "precision": "mixed", "gpus": 8, "zero": 3}, 2),
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_has_the_weights_that_are_trained(run, each):
    found = lp.budget(LLAMA_8B, **run)
    assert found.checkpoint_bytes == each * found.counts.total


def test_the_comparison_has_every_usual_method():
    rows = compare(params=70e9)
    assert [one.step.method for one in rows] == [method for method, *_ in COMPARED]
    assert [round(one.state_bytes / 1e9) for one in rows[:5]] == [1120, 1260, 1120, 560, 428]
    assert len({one.label for one in rows}) == len(rows)
    assert all(one.counts.total == 70e9 for one in rows)
    assert [one.fits("H100") for one in rows] == [False] * 6 + [True]
    assert smallest_card(rows[-2]).name == "B200"


def test_a_sweep_has_full_fine_tuning_once_for_all_ranks():
    shape = lp.budget(TINY).shape
    found = sweep(shape, ["full", "lora"], [4, 8, 16], [64, 128])
    assert [(one.step.method, one.step.rank, one.step.seq) for one in found] == [
        ("full", 4, 64), ("full", 4, 128), ("lora", 4, 64), ("lora", 4, 128), ("lora", 8, 64), ("lora", 8, 128),
        ("lora", 16, 64), ("lora", 16, 128),
    ]  # fmt: skip


def test_per_card_or_in_total_is_answered_in_words():
    found = lp.budget(LLAMA_70B, seq=512, checkpointing=True)
    said = on_cards(found, find_accelerator("RTX A6000"))
    n = cards_by_stage(found, find_accelerator("RTX A6000"))[3]
    assert "does not fit" in said
    assert "with DDP each holds everything" in said
    assert f"{n} with stage 3" in said
    assert "fits. That is on one card" in on_cards(lp.budget(TINY), find_accelerator("T4"))
    spread = lp.budget(LLAMA_70B, seq=512, checkpointing=True, gpus=8, zero=3)
    assert on_cards(spread, find_accelerator("H100")).startswith("Each of the cards needs")
    *each, all_of_them = on_cards_of_all([found, lp.budget(TINY)], ["a", "b"], find_accelerator("RTX A6000"))
    assert [one[:2] for one in each] == ["a:", "b:"]
    assert not any("second one" in one or "add up" in one for one in each)
    assert "with DDP each holds everything, and where one fits, a second one only takes another batch" in all_of_them


def test_why_lora_is_not_always_smaller_is_answered_in_words():
    found = lp.budget(LLAMA_8B, seq=2048)
    said, full = lora_against_full(found), lp.budget(LLAMA_8B, method="full", seq=2048)
    assert found.activations.saved > full.activations.saved
    assert f"{found.activations.saved / 2**30:.1f} GiB of activations" in said
    assert f"{full.activations.saved / 2**30:.1f} GiB:" in said
    assert "gradients and optimizer states" in lora_against_full(found.changed(checkpointing=True))
    assert "QLoRA saves" in qlora_against_lora(found.changed(method="qlora"))
    assert qlora_against_lora(found) == ""
    assert lora_against_full(full) == lora_against_full(lp.budget(LLAMA_8B)) == ""
    assert found.peak_phase in peak(found)
    assert "unknown" in peak(lp.budget(LLAMA_8B))


@pytest.mark.parametrize("text", ["70B", "70b", "70e9", "7e10", 70e9, "70_000_000_000", "70,000,000,000", "0.07T"])
def test_a_size_however_it_is_written(text):
    assert parse_params(text) == 70_000_000_000


def test_one_limit_of_sizes():
    for text in ("100K", "999_999", "101T"):
        with pytest.raises(ProbeError, match="between 1M and 100T") as parsed:
            parse_params(text)
        with pytest.raises(ProbeError) as typical:
            typical_shape(float(text.replace("K", "e3").replace("T", "e12").replace("_", "")))
        assert str(parsed.value).split(": ")[1:] == str(typical.value).split(": ")[1:]
    assert parse_params("1M") == 10**6
    with pytest.raises(ProbeError, match="published ones have 135M to 406B"):
        typical_shape(1e6)


@pytest.mark.parametrize(
    "run", [{"method": "full"}, {"method": "lora"}, {"method": "full", "checkpointing": True}], ids=str
)
def test_grouped_queries_in_float32_are_told_to_have_no_fused_kernel(run):
    found = lp.budget(TINY, seq=256, precision="fp32", **run)
    assert found.unfused
    assert any("math kernel" in said and "--precision bf16" in said for said in found.cautions)
    assert "not to be had in float32" in " ".join(found.assumptions)
    assert any("math attention" in one.source for one in found.components)
    (mend,) = [one for one in mends(found) if one.option == "--precision bf16"]
    assert "fused attention" in mend.name
    assert mend.total_bytes == found.changed(precision="bf16").total_bytes
    alone = {**TINY, "num_key_value_heads": 4}  # each head has its own keys
    for config, other in ((alone, {}), (TINY, {"precision": "bf16"}), (TINY, {"precision": "mixed"}),
                          (TINY, {"flash": False}), (TINY, {"seq": None})):  # fmt: skip
        fused = lp.budget(config, **{"seq": 256, "precision": "fp32"} | run | other)
        assert not fused.unfused
        assert fused.cautions == ()
    assert not lp.budget(TINY, seq=256, precision="fp32", method="qlora").unfused  # under autocast


def test_that_math_kernel_is_what_a_real_step_has():
    config, step = {**TINY, "num_hidden_layers": 2}, Step(method="full", precision="fp32", seq=256)
    with_scores = measure_fake(config, step).peak
    found = lp.budget(config, method="full", precision="fp32", seq=256)
    assert found.allocated_bytes == pytest.approx(with_scores, rel=0.02)
    fused = lp.budget({**config, "num_key_value_heads": 4}, method="full", precision="fp32", seq=256)
    assert with_scores > 1.3 * fused.allocated_bytes


def test_a_rank_above_the_smallest_matrix_is_noted():
    found = lp.budget(TINY, rank=100_000)
    assert "ranks above 32 are more than model.layers.*.self_attn.k_proj (32, 64) can have" in found.cautions[0]
    assert lp.budget(TINY, rank=32).cautions == lp.budget(TINY, method="full").cautions == ()
    assert lp.budget(TINY, rank=64, targets="q").cautions == ()


def test_small_sizes_have_small_units():
    assert both(68e9) == "68.0 GB (63.3 GiB)"
    assert both(3 * 2**20) == "3.15 MB (3.00 MiB)"
    assert both(2048) == "2.05 kB (2.00 KiB)"
    assert file_size(285_600) == "285.6 kB"
    assert unit_of([lp.budget(TINY)]).binary == "MiB"
    assert unit_of([lp.budget(TINY), lp.budget(LLAMA_8B)]).binary == "GiB"


@pytest.mark.parametrize("text", ["0", "-7B", "nan", "inf", "7GB", "", "7e99", "seven", "1e-3", "B", "12"])
def test_nonsense_sizes_are_refused(text):
    with pytest.raises(ProbeError, match="expected a number of parameters"):
        lp.budget(params=text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": "nothing"}, "matches nothing that LoRA can adapt"), ({"rank": 0}, "rank"),
        ({"zero": 3}, "spreads nothing"),
        ({"fsdp": 1, "gpus": 8}, "--fsdp 1: expected 2"), ({"fsdp": 2, "zero": 2, "gpus": 8}, "one of the two"),
        ({"gpus": 0}, "0 GPUs"), ({"precision": "int8"}, "precision"), ({"optimizer": "lion"}, "optimizer 'lion'"),
        ({"seq": 0}, "seq"), ({"params": "7B"}, "one of the two"), ({"method": "ia3"}, "method"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ProbeError) as refused:
        lp.budget(TINY, **options)
    assert words in str(refused.value)


def test_everything_is_json():
    found = lp.budget(TINY, seq=64)
    told = json.loads(json.dumps(found.as_dict()))
    assert sum(one["bytes"][told["peak_phase"]] for one in told["components"]) == told["total_bytes"]
    assert told["bytes_per_trained_parameter"]["total"] == 16
    assert told["n_trainable"] == found.counts.adapter
    assert lp.budget(TINY).as_dict()["peak_phase"] is None
    assert "GiB on one card" in repr(found)


def test_mixed_precision_is_eighteen_bytes_only_while_there_is_a_graph():
    found = lp.budget(TINY, method="full", precision="mixed", seq=64)
    total = found.counts.total
    weights = {one.name: one.at for one in found.components}
    assert weights["fp32 master weights"]["step"] == 4 * total
    assert weights["weights"]["step"] == 0 < weights["weights"]["loss"] <= 2 * total
    assert lp.budget(TINY, method="full", precision="mixed").state_bytes == 18 * total


def test_a_spread_run_has_the_gradients_share_in_every_phase():
    alone = lp.budget(TINY, method="full", seq=64)
    spread = replace(alone, sharding=Sharding(4, 2))
    for phase in alone.phases:
        own, less = ({one.name: one.at for one in found.components}["gradients"][phase] for found in (alone, spread))
        assert less == pytest.approx(own / 4, abs=1)


def test_experts_in_one_tensor_are_upcast_as_peft_does():
    config = {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    found = lp.budget(config, method="qlora", targets=["q", "v"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    stacks = [x for x in model.parameters() if x.ndim == 3]
    assert {x.dtype for x in stacks} == {torch.float32}
    experts = 2 * 4 * 3 * 64 * 96
    assert found.counts.stacks == experts == sum(x.numel() for x in stacks)
    packed = 2 * (2 * 64 * 64 + 2 * 32 * 64)
    assert found.counts.quantizable == packed
    held = sum(x.nbytes for x in model.parameters()) - 4 * packed
    assert part(found, "weights") + part(found, "fp32 upcasts") == 0.5 * packed + held
    said = next(said for said in found.assumptions if "experts" in said)
    assert f"{4 * experts:,} bytes in fp32" in said
    upcasts = next(one.formula for one in found.components if one.name == "fp32 upcasts")
    assert "stacks of experts" in upcasts
    assert "experts" not in "".join(one.formula for one in lp.budget(TINY, method="qlora").components)


def test_the_meta_device_agrees_on_what_is_quantized():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linear.pop("lm_head")
    found = lp.budget(TINY).counts
    assert found.n_quantizable == len(linear)
    assert found.quantizable == sum(math.prod(module.weight.shape) for module in linear.values())


def test_a_budget_is_a_value():
    a, b = lp.budget(TINY, seq=64), lp.budget(TINY, seq=64)
    assert isinstance(a, Budget)
    assert a == b
    assert a != a.changed(batch=2)


def test_a_comparison_says_which_of_its_methods_are_checkpointed():
    said = unlike_checkpointing(compare(params=8e9, seq=512))
    assert said.startswith(" qlora: with gradient checkpointing")
    assert unlike_checkpointing(compare(params=8e9, seq=512, checkpointing=True)) == ""
    assert unlike_checkpointing(compare(params=8e9)) == ""
