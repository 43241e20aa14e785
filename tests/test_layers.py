"""Layer types: every matrix of the families we name, from checkpoints that transformers itself writes."""

import copy

import peft
import pytest
import torch
import transformers as hf
from pairs import llama_tensors
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.layers import (
    LORA_TARGETS,
    ORDER,
    Place,
    is_conv1d,
    is_known,
    matches,
    module_of,
    place,
    sort_key,
    without_expert,
)
from lowrank_probe.layouts import parts

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TOKENS | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
ENCODER = TOKENS | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "type_vocab_size": 2,
}  # fmt: skip
GPT2 = TOKENS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
BART = TOKENS | {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
MOE = DECODER | {
    "num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}  # fmt: skip
DEEPSEEK = DECODER | {
    "q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 12,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2,
}  # fmt: skip
DEBERTA = ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SPLIT, LLAMA_MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
CROSS = ("cross_q", "cross_k", "cross_v", "cross_o")
EXPERT = ("expert_gate", "expert_up", "expert_down")


def block(*types, n=2):
    return dict.fromkeys(types, n)


LLAMA = {**block(*SPLIT, *LLAMA_MLP), "embedding": 1, "lm_head": 1}
FUSED = {**block("qkv", "o", "up", "down"), "embedding": 1}
BERT = {**block(*SPLIT, "up", "down"), "embedding": 1, "position_embedding": 1, "token_type_embedding": 1}
SEQ2SEQ = {**block(*SPLIT, "up", "down", n=4), **block(*CROSS), "embedding": 1}
LATENT = {
    **block("q_a", "q_b", "kv_a", "kv_b", "o"), **block("gate", "up", "down"), **block(*EXPERT, n=4), "router": 1,
    "embedding": 1, "lm_head": 1,
}  # fmt: skip

# family: (model, config, how many matrices of each type its checkpoint holds)
FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER), LLAMA),
    "llama-classifier": (
        hf.LlamaForSequenceClassification, hf.LlamaConfig(**DECODER),
        {**block(*SPLIT, *LLAMA_MLP), "embedding": 1, "classifier": 1},
    ),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**DECODER), LLAMA),
    "mixtral": (
        hf.MixtralForCausalLM, hf.MixtralConfig(**MOE),
        {**block(*SPLIT, "router"), **block(*EXPERT, n=6), "embedding": 1, "lm_head": 1},
    ),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**DECODER), LLAMA),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**DECODER), LLAMA),
    "qwen2_moe": (
        hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig(**MOE),
        {**LLAMA, **block("router", "shared_expert_router"), **block(*EXPERT, n=6)},
    ),
    "qwen3_moe": (
        hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**MOE),
        {**block(*SPLIT, "router"), **block(*EXPERT, n=6), "embedding": 1, "lm_head": 1},
    ),
    "gemma": (
        hf.GemmaForCausalLM, hf.GemmaConfig(**DECODER | {"tie_word_embeddings": True}),
        {**block(*SPLIT, *LLAMA_MLP), "embedding": 1},
    ),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**DECODER), LLAMA),
    "gemma3_text": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**DECODER), LLAMA),
    "gemma3": (
        hf.Gemma3ForConditionalGeneration,
        hf.Gemma3Config(text_config=DECODER, vision_config=VISION | {"vision_use_head": False}, mm_tokens_per_image=4),
        {**block(*SPLIT, "up", "down", n=4), "gate": 2, "embedding": 1, "position_embedding": 1, "patch_embedding": 1,
         "projector": 1},
    ),
    "llama4_text": (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(**MOE | {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 2}),
        {**LLAMA, "router": 1, "expert_gate_up": 1, "expert_down": 1},
    ),
    "falcon": (
        hf.FalconForCausalLM, hf.FalconConfig(**TOKENS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        FUSED,
    ),
    "gpt_neox": (
        hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**ENCODER, tie_word_embeddings=False), {**FUSED, "lm_head": 1},
    ),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig(**TOKENS, hidden_size=16, n_layer=2, n_head=2), FUSED),
    "phi": (
        hf.PhiForCausalLM, hf.PhiConfig(**DECODER), {**block(*SPLIT, "up", "down"), "embedding": 1, "lm_head": 1},
    ),
    "phi3": (
        hf.Phi3ForCausalLM, hf.Phi3Config(**DECODER),
        {**block("qkv", "o", "gate_up", "down"), "embedding": 1, "lm_head": 1},
    ),
    "glm4": (
        hf.Glm4ForCausalLM, hf.Glm4Config(**DECODER),
        {**block(*SPLIT, "gate_up", "down"), "embedding": 1, "lm_head": 1},
    ),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2), {**FUSED, "position_embedding": 1}),
    "gpt2-cross": (
        hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, add_cross_attention=True),
        {**FUSED, **block("cross_q", "cross_kv", "cross_o"), "position_embedding": 1},
    ),
    "openai-gpt": (hf.OpenAIGPTLMHeadModel, hf.OpenAIGPTConfig(**GPT2), {**FUSED, "position_embedding": 1}),
    "gpt_bigcode": (hf.GPTBigCodeForCausalLM, hf.GPTBigCodeConfig(**GPT2), {**FUSED, "position_embedding": 1}),
    "gptj": (
        hf.GPTJForCausalLM, hf.GPTJConfig(**GPT2, rotary_dim=4),
        {**block(*SPLIT, "up", "down"), "embedding": 1, "lm_head": 1},
    ),
    "codegen": (
        hf.CodeGenForCausalLM, hf.CodeGenConfig(**GPT2 | {"n_head": 4}, rotary_dim=4), {**FUSED, "lm_head": 1},
    ),
    "mpt": (
        hf.MptForCausalLM, hf.MptConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=2, max_seq_len=32), FUSED,
    ),
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig(**TOKENS, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=32, word_embed_proj_dim=8),
        {**block(*SPLIT, "up", "down"), "embedding": 1, "position_embedding": 1, "embedding_projection": 1,
         "head_transform": 1},
    ),
    "bert": (
        hf.BertForPreTraining, hf.BertConfig(**ENCODER), {**BERT, "pooler": 1, "head_transform": 1, "classifier": 1},
    ),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**ENCODER), {**BERT, "head_transform": 1}),
    "roberta-classifier": (
        hf.RobertaForSequenceClassification, hf.RobertaConfig(**ENCODER),
        {**BERT, "head_transform": 1, "classifier": 1},
    ),
    "modernbert": (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(**DECODER | {"tie_word_embeddings": True}, cls_token_id=1, sep_token_id=2),
        {**block("qkv", "o", "gate_up", "down"), "embedding": 1, "head_transform": 1},
    ),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(**TOKENS, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32),
        {**block(*SPLIT, "up", "down"), "embedding": 1, "position_embedding": 1, "head_transform": 1},
    ),
    "albert": (  # its two layers are one
        hf.AlbertForPreTraining, hf.AlbertConfig(**ENCODER, embedding_size=8),
        {**block(*SPLIT, "up", "down", n=1), "embedding": 1, "position_embedding": 1, "token_type_embedding": 1,
         "embedding_projection": 1, "pooler": 1, "head_transform": 1, "classifier": 1},
    ),
    "electra": (
        hf.ElectraForPreTraining, hf.ElectraConfig(**ENCODER, embedding_size=8),
        {**BERT, "embedding_projection": 1, "head_transform": 1, "classifier": 1},
    ),
    "deberta": (
        hf.DebertaForMaskedLM, hf.DebertaConfig(**DEBERTA),
        {**block("qkv", "o", "up", "down", "pos_q", "pos_k"), "embedding": 1, "position_embedding": 2,
         "token_type_embedding": 1, "head_transform": 1},
    ),
    "deberta-v2": (
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config(**DEBERTA, share_att_key=False, embedding_size=8, conv_kernel_size=3),
        {**BERT, "position_embedding": 2, **block("pos_q", "pos_k"), "embedding_projection": 1, "conv": 1, "pooler": 1,
         "classifier": 1},
    ),
    "t5": (
        hf.T5ForConditionalGeneration, hf.T5Config(**T5), {**SEQ2SEQ, "relative_attention_bias": 2},
    ),
    "t5-gated": (
        hf.T5ForConditionalGeneration, hf.T5Config(**T5, feed_forward_proj="gated-gelu"),
        {**SEQ2SEQ, "gate": 4, "relative_attention_bias": 2},
    ),
    "mt5": (
        hf.MT5ForConditionalGeneration, hf.MT5Config(**T5),
        {**SEQ2SEQ, "gate": 4, "relative_attention_bias": 2},
    ),
    "switch_transformers": (
        hf.SwitchTransformersForConditionalGeneration,
        hf.SwitchTransformersConfig(**T5, num_decoder_layers=2, num_experts=3, num_sparse_encoder_layers=1,
                                    num_sparse_decoder_layers=1),
        {**SEQ2SEQ, "up": 2, "down": 2, "router": 2, **block("expert_up", "expert_down", n=6),
         "relative_attention_bias": 2},
    ),
    "bart": (
        hf.BartForConditionalGeneration, hf.BartConfig(**BART), {**SEQ2SEQ, "position_embedding": 2},
    ),
    "marian": (hf.MarianMTModel, hf.MarianConfig(**BART), SEQ2SEQ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(**BART, num_mel_bins=8, max_source_positions=16, max_target_positions=16),
        {**SEQ2SEQ, "position_embedding": 2, "conv": 2},
    ),
    "vit": (
        hf.ViTForImageClassification, hf.ViTConfig(**VISION),
        {**block(*SPLIT, "up", "down"), "patch_embedding": 1, "position_embedding": 1, "classifier": 1},
    ),
    "clip": (
        hf.CLIPModel,
        hf.CLIPConfig(text_config={**ENCODER}, vision_config=VISION, projection_dim=8),
        {**block(*SPLIT, "up", "down", n=4), "embedding": 1, "position_embedding": 2, "patch_embedding": 1,
         "projector": 2},
    ),
    "wav2vec2": (
        hf.Wav2Vec2Model,
        hf.Wav2Vec2Config(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                          conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2), num_feat_extract_layers=2,
                          num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
        {**block(*SPLIT, "up", "down"), "embedding_projection": 1, "conv": 4},
    ),
    "gpt_oss": (
        hf.GptOssForCausalLM, hf.GptOssConfig(**MOE),
        {**block(*SPLIT, "router", "expert_gate_up", "expert_down"), "embedding": 1, "lm_head": 1},
    ),
    "deepseek_v2": (hf.DeepseekV2ForCausalLM, hf.DeepseekV2Config(**DEEPSEEK), LATENT),
    "deepseek_v2-lite": (
        hf.DeepseekV2ForCausalLM, hf.DeepseekV2Config(**DEEPSEEK | {"q_lora_rank": None}),
        {"q": 2, **{key: count for key, count in LATENT.items() if key not in ("q_a", "q_b")}},
    ),
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**DEEPSEEK), LATENT),
    "granitemoe": (
        hf.GraniteMoeForCausalLM, hf.GraniteMoeConfig(**MOE),
        {**block(*SPLIT, "router", "expert_gate_up", "expert_down"), "embedding": 1, "lm_head": 1},
    ),
    "qwen3_next": (
        hf.Qwen3NextForCausalLM,
        hf.Qwen3NextConfig(**MOE, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
                           linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=4),
        {**block(*SPLIT, "out_proj", "conv", n=1), "in_proj": 2, **block(*LLAMA_MLP, "router", "shared_expert_router"),
         **block(*EXPERT, n=6), "embedding": 1, "lm_head": 1},
    ),
    "mamba": (
        hf.MambaForCausalLM, hf.MambaConfig(**TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4),
        {**block("in_proj", "x_proj", "dt_proj", "out_proj", "A_log", "conv"), "embedding": 1},
    ),
    "mamba2": (
        hf.Mamba2ForCausalLM,
        hf.Mamba2Config(**TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8,
                        n_groups=1),
        {**block("in_proj", "out_proj", "conv"), "embedding": 1, "lm_head": 1},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(checkpoint as transformers saves it, the model in memory, expected counts)."""
    kind, config, expected = FAMILIES[request.param]
    torch.manual_seed(0)
    model = kind(config)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return open_checkpoint(directory), model, expected


def test_every_matrix_of_a_family_has_its_type(family):
    checkpoint, _, expected = family
    found = {}
    for name, info in checkpoint.tensors.items():
        matrices, _ = parts(name, info.shape, checkpoint.config, split=False)
        if matrices and not name.endswith("bias"):
            found.setdefault(place(name).layer_type, []).append(name)
            assert is_known(name), name
    assert {layer_type: len(names) for layer_type, names in found.items()} == expected, found
    assert set(found) <= set(ORDER), "every type has its place in the order of the report"


def test_no_part_of_a_family_is_left_without_a_type_in_the_order(family):
    checkpoint, _, _ = family
    for name, info in checkpoint.tensors.items():
        for part in parts(name, info.shape, checkpoint.config)[0]:
            if not name.endswith("bias"):
                assert (part.layer_type or place(name).layer_type) in ORDER, (name, part)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
def test_default_targets_are_what_peft_would_adapt_and_are_found_by_peft(family):
    _, model, _ = family
    model_type = model.config.model_type
    targets = LORA_TARGETS[model_type]
    if model_type in PEFT_TARGETS:
        assert set(targets) == set(PEFT_TARGETS[model_type])
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=list(targets)))
    names = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    types = {place(name.removesuffix(".lora_A.default")).layer_type.removeprefix("cross_") for name in names}
    assert names
    assert types <= {"q", "v", "qkv", "kv", "q_b", "kv_b", "in_proj", "x_proj", "up", "down"}


def test_every_matrix_of_a_block_has_its_number_and_stack(family):
    checkpoint, model, _ = family
    for name, info in checkpoint.tensors.items():
        where = place(name)
        blocks = any(f".{i}." in name.replace("experts.", "") for i in range(2))
        assert (where.layer is not None) == blocks, name
        if getattr(model.config, "is_encoder_decoder", False) and blocks and len(info.shape) == 2:
            assert where.stack in ("encoder", "decoder")
            assert where.stack + "." in name


def test_conv1d_is_told_by_the_model_itself(family):
    checkpoint, model, _ = family
    modules = dict(model.named_modules())
    for name, info in checkpoint.tensors.items():
        if len(info.shape) != 2:
            continue
        module = modules.get(module_of(name))
        stored_in_out = type(module).__name__ == "Conv1D"
        assert is_conv1d(name, model.config.model_type) == stored_in_out, name
        if checkpoint.config["model_type"] != "gpt_bigcode":  # GPT-2's names on plain linear layers
            assert is_conv1d(name, None) == stored_in_out, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Place("q", 3, "")),
        ("model.layers.31.mlp.gate_up_proj.weight", Place("gate_up", 31, "")),
        ("model.layers.0.self_attn.qkv_proj.weight", Place("qkv", 0, "")),
        ("gpt_neox.layers.2.attention.query_key_value.weight", Place("qkv", 2, "")),
        ("gpt_neox.layers.2.attention.dense.weight", Place("o", 2, "")),
        ("gpt_neox.layers.2.mlp.dense_4h_to_h.weight", Place("down", 2, "")),
        ("distilbert.transformer.layer.1.attention.q_lin.weight", Place("q", 1, "")),
        ("distilbert.transformer.layer.1.attention.out_lin.weight", Place("o", 1, "")),
        ("distilbert.transformer.layer.1.ffn.lin2.weight", Place("down", 1, "")),
        ("model.layers.4.block_sparse_moe.gate.weight", Place("router", 4, "")),
        ("model.layers.4.block_sparse_moe.experts.7.w1.weight", Place("expert_gate", 4, "", 7)),
        ("model.layers.4.block_sparse_moe.experts.7.w2.weight", Place("expert_down", 4, "", 7)),
        ("model.layers.4.block_sparse_moe.experts.7.w3.weight", Place("expert_up", 4, "", 7)),
        ("model.layers.4.mlp.experts.0.gate_proj.weight", Place("expert_gate", 4, "", 0)),
        ("encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight", Place("expert_up", 1, "encoder", 2)),
        ("experts.3.w1.weight", Place("expert_gate", None, "", 3)),
        ("model.layers.4.mlp.experts.gate_up_proj", Place("expert_gate_up", 4, "")),
        ("model.layers.4.mlp.shared_experts.gate_proj.weight", Place("gate", 4, "")),
        ("model.layers.4.self_attn.kv_a_proj_with_mqa.weight", Place("kv_a", 4, "")),
        ("backbone.layers.2.mixer.in_proj.weight", Place("in_proj", 2, "")),
        ("transformer.layers.2.self_attn.in_proj_weight", Place("qkv", 2, "")),
        ("decoder.layers.2.multihead_attn.in_proj_weight", Place("cross_qkv", 2, "decoder")),
        ("transformer.h.3.mlp.w1.weight", Place("up", 3, "")),
        ("transformer.h.3.mlp.w2.weight", Place("gate", 3, "")),
        ("layers.3.feed_forward.w1.weight", Place("gate", 3, "")),
        ("layers.3.attention.wo.weight", Place("o", 3, "")),
        ("model.layers.3.mlp.Wo.weight", Place("down", 3, "")),
        ("model.visual.blocks.5.attn.qkv.weight", Place("qkv", 5, "vision")),
        ("model.visual.merger.linear_fc1.weight", Place("projector", None, "vision")),
        ("model.language_model.layers.5.self_attn.q_proj.weight", Place("q", 5, "text")),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", Place("up", 0, "vision")),
        ("decoder.bert.encoder.layer.0.attention.self.key.weight", Place("k", 0, "decoder")),
        ("encoder.layer.0.attention.self.key.weight", Place("k", 0, "encoder")),
        ("blk.3.attn_q.weight", Place("q", 3, "")),
        ("blk.3.attn_kv_a_mqa.weight", Place("kv_a", 3, "")),
        ("blk.3.ffn_down_exps.weight", Place("expert_down", 3, "")),
        ("blk.3.ffn_gate_inp_shexp.weight", Place("shared_expert_router", 3, "")),
        ("blk.3.ffn_up_shexp.weight", Place("up", 3, "")),
        ("dec.blk.3.cross_attn_o.weight", Place("cross_o", 3, "")),
        ("lm_head.weight", Place("lm_head", None, "")),
        ("output.weight", Place("lm_head", None, "")),
        ("score.weight", Place("classifier", None, "")),
        ("classifier.3.weight", Place("classifier", 3, "")),
        ("anything", Place("anything", None, "")),
    ],
)
def test_place_by_hand(name, expected):
    assert place(name) == expected


def test_a_name_that_no_rule_knows_is_told():
    assert not is_known("model.layers.0.new_thing.weight")
    assert place("model.layers.0.new_thing.weight").layer_type == "new_thing"
    assert is_known("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.4.mlp.experts.17.up_proj.weight", "model.layers.4.mlp.experts.*.up_proj.weight"),
        ("encoder.block.1.mlp.experts.expert_2.wi.weight", "encoder.block.1.mlp.experts.expert_*.wi.weight"),
        ("model.layers.4.mlp.experts.gate_up_proj", "model.layers.4.mlp.experts.gate_up_proj"),
        ("model.layers.4.mlp.shared_experts.0.up_proj.weight", "model.layers.4.mlp.shared_experts.0.up_proj.weight"),
    ],
)  # fmt: skip
def test_experts_of_a_layer_have_one_name(name, group):
    assert without_expert(name) == group


def test_every_family_with_a_default_of_peft_has_ours():
    assert {"llama", "mistral", "gemma2", "phi", "opt", "bloom", "t5", "bert", "gpt2"} <= set(PEFT_TARGETS)
    ours = {config.model_type for _, config, _ in FAMILIES.values()}
    assert ours & set(PEFT_TARGETS) <= set(LORA_TARGETS)


def test_conv1d_names_of_another_family_are_not_conv1d():
    assert not is_conv1d("transformer.h.0.attn.c_proj.weight", "llama")
    assert not is_conv1d("blocks.0.attn.c_proj.weight", None)


@pytest.mark.parametrize(
    ("pattern", "selects"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj.weight"),
        ("q", "model.layers.0.self_attn.q_proj.weight"),
        ("embedding", "model.embed_tokens.weight"),
        ("layers.1", "model.layers.1.mlp.up_proj.weight"),
        ("*mlp*", "model.layers.1.mlp.up_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("layers.*.mlp", "model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_patterns_select(pattern, selects):
    assert matches(selects, pattern)
    others = [name for name in llama_tensors() if not matches(name, pattern)]
    assert others, "a pattern that selects everything tests nothing"


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("layers.1", "model.layers.11.mlp.up_proj.weight"),
        ("proj", "model.layers.0.self_attn.q_proj.weight"),
        ("norm", "model.layers.0.input_layernorm.weight"),
        ("ayers.1", "model.layers.1.mlp.up_proj.weight"),
        ("layers.1.mlp", "model.layers.1xmlp.weight"),
    ],
)
def test_patterns_keep_to_whole_components(pattern, name):
    assert not matches(name, pattern)


def test_types_sort_as_data_flows_and_unknown_ones_before_the_head():
    assert sorted(["lm_head", "dense", "down", "q", "embedding"], key=sort_key) == [
        "embedding", "q", "down", "dense", "lm_head",
    ]  # fmt: skip
    assert sorted(ORDER, key=sort_key) == list(ORDER)


@pytest.mark.parametrize(
    ("name", "layer_type", "layer"),
    [
        ("blocks.2.attn1.to_out.0.weight", "o", 2),
        ("blocks.2.attn1.to_out.1.weight", "to_out", 2),  # the dropout beside it
        ("net.3.1.weight", "3", 3),
        ("net.4.1.weight", "4", 4),
        ("h.7.mlp.w1.weight", "up", 7),
        ("layers.7.mlp.w1.weight", "gate", 7),
        ("layers.9223372036854775808.mlp.w1.weight", "gate", None),  # no number of a layer
    ],
)
def test_numbers_that_tell_types_apart(name, layer_type, layer):
    assert (place(name).layer_type, place(name).layer) == (layer_type, layer)
