"""Closed forms of activations: against the real step on fake tensors, and against formulas that can be written down."""

import subprocess
import sys
from dataclasses import replace

import pytest
import transformers
from transformers import AutoConfig

from lowrank_probe.activations import activations
from lowrank_probe.errors import NoFormulaError, ProbeError
from lowrank_probe.measuring import measure_fake
from lowrank_probe.model_shapes import shape_of_config
from lowrank_probe.taped_estimates import EAGER
from lowrank_probe.training_steps import PHASES, Step

# Of middle size, so that lower-order terms do not vanish; six blocks, so that the closed form extrapolates.
SAME = {
    "vocab_size": 3000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "llama": {"model_type": "llama", **SAME},
    "llama, one head each, tied": {
        "model_type": "llama", **SAME, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "mistral, in its window": {"model_type": "mistral", **SAME, "sliding_window": 512},
    "mistral, beyond its window": {"model_type": "mistral", **SAME, "sliding_window": 64},
    "qwen2": {"model_type": "qwen2", **SAME, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SAME, "head_dim": 64},
    "gemma": {"model_type": "gemma", **SAME, "head_dim": 64, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 3000, "n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 512},
    "gpt_neox": {"model_type": "gpt_neox", **SAME, "intermediate_size": 1024, "rotary_pct": 0.25},
    "phi3": {"model_type": "phi3", **SAME, "pad_token_id": 0},
    "starcoder2": {"model_type": "starcoder2", **SAME, "sliding_window": None},
    "gpt_neox, one after the other": {
        "model_type": "gpt_neox", **SAME, "intermediate_size": 1024, "use_parallel_residual": False,
    },
}  # fmt: skip
LLAMA = CONFIGS["llama"]


def check(config, step, bar=0.01):
    """Every phase's and so the step's peak: states as measured, the rest in closed form."""
    found, real = activations(shape_of_config(config), step), measure_fake(config, step)
    whole = {}
    for phase in PHASES:
        states = sum(real.components[phase].get(part, 0) for part in ("weights", "adapter", "optimizer"))
        whole[phase] = states + found.peaks[phase].total
    assert max(whole.values()) == pytest.approx(real.peak, rel=bar)
    assert whole[real.phase] == pytest.approx(real.peak, rel=bar)
    return found, real


METHODS = {
    "full": {"method": "full"}, "full, checkpointing": {"method": "full", "checkpointing": True},
    "lora": {"method": "lora"}, "lora, checkpointing": {"method": "lora", "checkpointing": True},
    "dora": {"method": "dora"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in ("llama", "gpt2", "gpt_neox") for method in METHODS]
    + [(family, method) for family in CONFIGS for method in ("full", "lora, checkpointing")
       if family not in ("llama", "gpt2", "gpt_neox")],
)  # fmt: skip
def test_within_one_per_cent_of_the_real_step(family, method):
    check(CONFIGS[family], Step(batch=2, seq=128, rank=8, **METHODS[method]))


@pytest.mark.parametrize(("family", "more"), [
    ("llama", {"method": "full", "precision": "mixed"}),
    ("llama, one head each, tied", {"method": "full", "precision": "mixed", "checkpointing": True}),
    ("gpt2", {"method": "full", "precision": "mixed", "checkpointing": True}),
    ("gpt_neox", {"method": "lora", "precision": "mixed"}),
    ("llama", {"method": "full", "precision": "fp32"}),
    ("gpt2", {"method": "full", "flash": False}),
    ("llama", {"method": "lora", "flash": False, "checkpointing": True}),
    ("llama", {"method": "full", "chunked_loss": True}),
    ("gpt_neox", {"method": "lora", "chunked_loss": True, "checkpointing": True}),
    ("llama", {"method": "lora", "adapter_dtype": "bfloat16"}),
    ("llama", {"method": "rslora", "held_outputs": True}),
], ids=str)  # fmt: skip
def test_options_are_within_two_per_cent_of_the_real_step(family, more):
    check(CONFIGS[family], Step(batch=2, seq=128, rank=8, **more), bar=0.02)


@pytest.mark.parametrize(
    ("family", "named"),
    [("llama", "gelu_new"), ("gpt_neox", "gelu_new"), ("gpt_neox", "gelu_fast")],
)
def test_the_nonlinearity_that_a_config_names_decides_what_is_saved(family, named):
    check({**CONFIGS[family], "hidden_act": named}, Step(batch=2, seq=128, rank=8))


def test_gpt_2_names_its_nonlinearity_elsewhere():
    check({**CONFIGS["gpt2"], "activation_function": "gelu"}, Step(batch=2, seq=128, rank=8, method="full"))


@pytest.mark.parametrize("family", ["mistral, beyond its window", "phi3", "starcoder2"])
@pytest.mark.parametrize("method", ["full", "lora, checkpointing"])
def test_a_sequence_beyond_the_window_has_a_mask(family, method):
    # As published configs are: without use_sliding_window. So long that the mask matters.
    config = {**CONFIGS[family], "sliding_window": 64}
    found, _ = check(config, Step(batch=2, seq=768, rank=8, **METHODS[method]), bar=0.003)
    assert "(mask)" in found.formulas["activations"]


def test_a_window_that_the_sequence_does_not_fill_has_none():
    config = {**CONFIGS["phi3"], "sliding_window": 129}
    found, _ = check(config, Step(batch=2, seq=128, method="full"))
    assert "(mask)" not in found.formulas["activations"]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "mlp", ["q_proj", "lm_head"]])
def test_targets_decide_what_is_saved(targets):
    check(LLAMA, Step(batch=2, seq=128, rank=8, method="lora", targets=targets))


@pytest.mark.parametrize("n_layers", [1, 4, 5])
def test_few_blocks(n_layers):
    check({**LLAMA, "num_hidden_layers": n_layers}, Step(batch=2, seq=128, method="lora"))


def test_saved_tensors_of_llama_are_those_of_the_text_book():
    config = {**LLAMA, "num_hidden_layers": 2}
    T, h, q, K, f, n, r = 2 * 128, 256, 256, 64, 704, 8, 8
    full = activations(shape_of_config(config), Step(batch=2, seq=128, method="full"))
    assert full.saved == 2 * T * (16 * h + 4 * q + 4 * K + 8 * f + 4 * n + 8) + T * (8 * h + 4)
    assert full.formulas["activations"].startswith("2 × T·(16h + 4q + 4K + 8f + 4n + 8) + T·(8h + 4)")
    # All of q, k, v, o, gate, up, down: 4·(inputs of each) and 4r each; the first block has no gradient to its input.
    adapted = Step(batch=2, seq=128, method="lora", rank=r)
    lora = activations(shape_of_config(config), adapted)
    inputs = 4 * (3 * h + q + 2 * h + f) + 7 * 4 * r
    block = 8 * h + 4 * q + 4 * K + 6 * f + inputs + 4 * n + 8
    assert lora.saved == T * (2 * block - 4 * h - 4) + T * (4 * h + 4)
    outputs = 6 * (q + 2 * K + h + 2 * f + h)
    dora = activations(shape_of_config(config), replace(adapted, method="dora"))
    assert dora.saved == lora.saved + 2 * T * outputs
    again = activations(shape_of_config(config), replace(adapted, checkpointing=True))
    assert again.recomputed == T * block
    assert again.saved == 2 * 2 * h * T + T * (4 * h + 4)


def test_qlora_passes_on_float32_and_so_saves_more_than_lora():
    # Compared once with bitsandbytes' layers and PEFT's on fake tensors: 0.0 % off. Norms keep the stream itself, and
    # each adapter a bf16 copy of its input but o, whose input attention has saved; gate, up and SiLU are float32.
    T, h, q, K, f, n, r = 2 * 128, 256, 256, 64, 704, 8, 8
    shape, step = shape_of_config({**LLAMA, "num_hidden_layers": 2}), Step(batch=2, seq=128, method="qlora", rank=r)
    block = 8 * h + 4 * q + 4 * K + 12 * f + 2 * (5 * h + f) + 7 * 2 * r + 4 * n + 8
    found = activations(shape, step)
    assert found.saved == T * (2 * block - 4 * h - 4) + T * (4 * h + 4)
    checkpointed, lora = (
        activations(shape, replace(step, checkpointing=True, method=method)) for method in ("qlora", "lora")
    )
    assert checkpointed.saved - lora.saved == 2 * 2 * h * T  # 4h a token and block against 2h
    # The float32 head's bf16 copy.
    assert checkpointed.peaks["loss"].casts >= 2 * 3000 * h


def test_logits_are_twelve_bytes_an_entry():
    T, V = 2 * 128, 3000
    step = Step(batch=2, seq=128)
    found = {held: activations(shape_of_config(LLAMA), replace(step, held_outputs=held)).logits for held in (0, 1)}
    assert 0 <= found[0] - 12 * T * V < 3000
    assert found[1] - found[0] == 2 * T * V


def test_gradients_grow_from_phase_to_phase():
    shape = shape_of_config(LLAMA)
    peaks = activations(shape, Step(batch=1, seq=16, method="full")).peaks
    assert peaks["forward"].gradients == 0
    assert peaks["step"].gradients == 2 * shape.n_parameters
    assert peaks["loss"].gradients <= peaks["backward"].gradients <= peaks["step"].gradients
    assert peaks["step"].total == peaks["step"].gradients


def test_rank_barely_moves_the_peak_and_length_does():
    shape = shape_of_config(LLAMA)
    small, large, long = (
        activations(shape, Step(batch=1, seq=seq, rank=rank)).peaks["loss"].total
        for rank, seq in ((8, 256), (16, 256), (8, 512))
    )
    assert small < large < 1.02 * small
    assert long == pytest.approx(2 * small, rel=0.01)


MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 176}
ESTIMATED = {
    "mixtral": {"model_type": "mixtral", **SAME, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe", **SAME, **MIXTURE, "num_experts": 8, "shared_expert_intermediate_size": 352,
    },
    "falcon": {
        "model_type": "falcon", "vocab_size": 3000, "hidden_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 8,
    },
    "bloom": {"model_type": "bloom", "vocab_size": 3000, "hidden_size": 256, "n_layer": 6, "n_head": 8},
    "phi": {"model_type": "phi", **SAME, "num_key_value_heads": 8},
    "bert": {"model_type": "bert", **SAME, "num_key_value_heads": 8},
    "t5": {
        "model_type": "t5", "vocab_size": 3000, "d_model": 256, "d_kv": 32, "d_ff": 704, "num_layers": 6,
        "num_heads": 8,
    },
    "gemma2": {"model_type": "gemma2", **SAME, "head_dim": 32},
    "olmo2": {"model_type": "olmo2", **SAME},
    "opt": {
        "model_type": "opt", "vocab_size": 3000, "hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 8, "word_embed_proj_dim": 256,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", **SAME, **MIXTURE, "num_key_value_heads": 8, "n_routed_experts": 8,
        "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in ESTIMATED for method in ("full", "lora, checkpointing")]
    + [("mixtral", "lora"), ("phi", "lora"), ("t5", "lora")],
)
def test_another_family_is_an_estimate_and_says_so(family, method):
    found, _ = check(ESTIMATED[family], Step(batch=2, seq=128, rank=8, **METHODS[method]), bar=0.08)
    assert found.estimated.startswith(f"estimate: generic block of {family}, ")
    assert not activations(shape_of_config(LLAMA), Step(seq=8)).estimated


def test_an_adapter_on_experts_keeps_the_whole_stack_made_anew():
    shape = shape_of_config(ESTIMATED["mixtral"])
    plain, adapted = (
        activations(shape, Step(batch=2, seq=128, rank=8, targets=t)) for t in ("attention", "all-linear")
    )
    stacks = 6 * 2 * 4 * 3 * 704 * 256
    assert adapted.saved - plain.saved > stacks
    assert "(adapted stacks of experts)" in adapted.formulas["activations"]


def test_headers_alone_are_an_estimate_by_the_widths_of_the_weights():
    shape = shape_of_config(LLAMA)
    bare = replace(shape, config={}, model_type="", n_heads=0, n_kv_heads=0, head_dim=0)
    step = Step(batch=2, seq=128)
    assert activations(bare, step).saved == pytest.approx(activations(shape, step).saved, rel=0.02)


def test_blocks_without_attention_have_no_formula():
    config = {"model_type": "mamba", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    with pytest.raises(NoFormulaError, match=r"mamba: no formula.*--measure"):
        activations(shape_of_config(config), Step(seq=8, targets=["in_proj"]))


def test_some_layers_only_and_no_length_have_no_formula():
    with pytest.raises(NoFormulaError, match="some layers only"):
        activations(shape_of_config(LLAMA), Step(seq=8, targets=["model.layers.0.self_attn.q_proj"]))
    for outside in ("lm_head", "embedding"):
        with pytest.raises(NoFormulaError, match="outside of the layers alone"):
            activations(shape_of_config(LLAMA), Step(seq=8, targets=[outside]))
    with pytest.raises(ProbeError, match="--seq"):
        activations(shape_of_config(LLAMA), Step())


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"rank": 0}, {"seq": 0}, {"method": "ia3"}, {"precision": "fp8"}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ProbeError, match=next(iter(wrong))):
        Step(**wrong)


def test_a_model_without_a_language_models_head_has_no_formula():
    config = {"model_type": "vit", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 96}  # fmt: skip
    with pytest.raises(NoFormulaError, match="no language model's head"):
        activations(shape_of_config(config), Step(seq=8))


def test_a_tied_head_that_headers_leave_out_is_the_table():
    shape = shape_of_config(CONFIGS["llama, one head each, tied"])
    bare = replace(shape, weights=tuple(weight for weight in shape.weights if weight.layer_type != "lm_head"))
    assert activations(bare, Step(seq=8)) == activations(shape, Step(seq=8))


def test_attention_without_a_fused_kernel_is_known():
    for model_type in EAGER - {"gemma2", "gpt_oss"}:
        config = AutoConfig.for_model(model_type)
        known = [m for name in ("CausalLM", "Seq2SeqLM", "MaskedLM") if type(config) in
                 (m := getattr(transformers, f"AutoModelFor{name}")._model_mapping)]  # fmt: skip
        assert not known[0][type(config)]._supports_sdpa, model_type


def test_it_imports_no_torch():
    names = "('torch', 'transformers', 'pandas')"
    code = f"import sys, lowrank_probe.activations; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
