"""Layouts: every split against what the model's own forward code does with the tensor."""

import json

import pytest
import torch
import transformers as hf
from torch import nn
from torch.overrides import TorchFunctionMode

from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.layouts import Part, Rows, parts

DECODER = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 32, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
FALCON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
MOE = DECODER | {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 1, "head_dim": 4}
DEBERTA = MHA | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}

# family: (model, config, the fused tensor)
FUSED = {
    "gpt2": (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**GPT2), "h.0.attn.c_attn"),
    "openai-gpt": (hf.OpenAIGPTLMHeadModel, lambda: hf.OpenAIGPTConfig(**GPT2), "h.0.attn.c_attn"),
    "gpt_neox": (hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**MHA), "layers.0.attention.query_key_value"),
    "gpt_neox_japanese": (
        hf.GPTNeoXJapaneseForCausalLM, lambda: hf.GPTNeoXJapaneseConfig(**MHA | {"intermediate_multiple_size": 2}),
        "layers.0.attention.query_key_value",
    ),
    "bloom": (
        hf.BloomForCausalLM, lambda: hf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=4),
        "h.0.self_attention.query_key_value",
    ),
    "persimmon": (
        hf.PersimmonForCausalLM, lambda: hf.PersimmonConfig(**MHA, qk_layernorm=False),
        "layers.0.self_attn.query_key_value",
    ),
    "falcon, multi-query": (
        hf.FalconForCausalLM, lambda: hf.FalconConfig(**FALCON), "h.0.self_attention.query_key_value",
    ),
    "falcon, one key a head": (
        hf.FalconForCausalLM, lambda: hf.FalconConfig(**FALCON, multi_query=False),
        "h.0.self_attention.query_key_value",
    ),
    "falcon, new decoder": (
        hf.FalconForCausalLM, lambda: hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
        "h.0.self_attention.query_key_value",
    ),
    "phi3": (hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**DECODER), "layers.0.self_attn.qkv_proj"),
    "gpt_bigcode, multi-query": (
        hf.GPTBigCodeForCausalLM, lambda: hf.GPTBigCodeConfig(**GPT2), "h.0.attn.c_attn",
    ),
    "gpt_bigcode, one key a head": (
        hf.GPTBigCodeForCausalLM, lambda: hf.GPTBigCodeConfig(**GPT2, multi_query=False), "h.0.attn.c_attn",
    ),
    "mpt": (
        hf.MptForCausalLM, lambda: hf.MptConfig(vocab_size=40, d_model=16, n_layers=1, n_heads=4, max_seq_len=32),
        "blocks.0.attn.Wqkv",
    ),
    "modernbert": (
        hf.ModernBertForMaskedLM, lambda: hf.ModernBertConfig(**MHA, cls_token_id=1, sep_token_id=2),
        "layers.0.attn.Wqkv",
    ),
    "codegen": (
        hf.CodeGenForCausalLM, lambda: hf.CodeGenConfig(**GPT2, rotary_dim=4), "h.0.attn.qkv_proj",
    ),
    "deberta": (hf.DebertaForMaskedLM, lambda: hf.DebertaConfig(**DEBERTA), "layer.0.attention.self.in_proj"),
    "dbrx": (
        hf.DbrxForCausalLM,
        lambda: hf.DbrxConfig(vocab_size=40, d_model=16, n_layers=1, n_heads=4, max_seq_len=32,
                              attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
                              ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 1}),
        "attn.Wqkv",
    ),
    "minimax": (
        hf.MiniMaxForCausalLM, lambda: hf.MiniMaxConfig(**MOE, layer_types=["linear_attention"], block_size=4),
        "layers.0.self_attn.qkv_proj",
    ),
}  # fmt: skip


class Products(TorchFunctionMode):
    """Records the operands of every product of two computed tensors, flattened."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("matmul", "__matmul__", "bmm", "baddbmm", "scaled_dot_product_attention"):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            self.operands += [t.detach().flatten() for t in tensors[-2:]]
        return func(*args, **kwargs)


def is_parallel(a, b):
    """Equal up to a positive factor: some models scale q before the product, some after."""
    return a.numel() == b.numel() and nn.functional.cosine_similarity(a, b, dim=0).item() > 1 - 1e-5


def built(kind, config):
    """The model with weights large enough to tell from one another and no biases."""
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter.data)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter.data, std=0.3)
    return model.eval()


def saved(tmp_path, kind, config):
    """(the model in memory, its checkpoint as transformers writes it)."""
    model = built(kind, config)
    model.save_pretrained(tmp_path)
    return model, open_checkpoint(tmp_path)


def named(checkpoint, ending):
    found = [name for name in checkpoint.tensors if name.endswith(ending)]
    assert len(found) == 1, (ending, sorted(checkpoint.tensors))
    return found[0]


@pytest.mark.parametrize("family", FUSED)
def test_parts_are_the_q_k_v_that_attention_multiplies(family, tmp_path):
    kind, make, ending = FUSED[family]
    model, checkpoint = saved(tmp_path, kind, make())
    name = named(checkpoint, f"{ending}.weight")
    W = checkpoint.read(name)
    found, note = parts(name, tuple(W.shape), checkpoint.config)
    assert [(part.label, part.layer_type) for part in found] == [("q", "q"), ("k", "k"), ("v", "v")], note
    assert note == "split into q, k, v"

    # One token: whatever the model does to bring heads together, a flattened operand is head after head, positions
    # turn nothing, and the product of the q and k of each head is taken before that of the weights and v.
    inputs = []
    fused = next(module for path, module in model.named_modules() if path.endswith(ending))
    fused.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().reshape(1, -1)))
    with torch.no_grad(), Products() as products:
        model(torch.tensor([[3]]))
    after = nn.functional.silu if family == "minimax" else nn.Identity()  # the one that bends its q, k and v
    q, k, v = (after(inputs[0] @ part.take(W).T).flatten() for part in found)
    head_dim = 4
    for wanted in (q, k, v):
        repeated = wanted.view(-1, head_dim).repeat_interleave(q.numel() // wanted.numel(), dim=0).flatten()
        assert any(is_parallel(seen, each) for seen in products.operands for each in (wanted, repeated)), family
    order = [
        next(i for i, seen in enumerate(products.operands) if is_parallel(seen[: each.numel()], each))
        for each in (q[:head_dim], k[:head_dim], v[:head_dim])
    ]
    assert order[1] == order[0] + 1, "q is the left operand, k the right one of the same product"
    assert order[2] > order[1]
    sizes = [part.shape(tuple(W.shape)) for part in found]
    assert sizes == [tuple(part.take(W).shape) for part in found]
    assert sum(m for m, _ in sizes) * sizes[0][1] == W.numel()


def test_gpt2_cross_attention_holds_k_and_v_only(tmp_path):
    model, checkpoint = saved(tmp_path, hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, add_cross_attention=True))
    name = named(checkpoint, "h.0.crossattention.c_attn.weight")
    W = checkpoint.read(name)
    found, note = parts(name, tuple(W.shape), checkpoint.config)
    assert ([part.layer_type for part in found], note) == (["cross_k", "cross_v"], "split into k, v")
    states = torch.randn(1, 1, 16)
    with torch.no_grad(), Products() as products:
        model(torch.tensor([[3]]), encoder_hidden_states=states)
    k, v = ((states[0] @ part.take(W).T).flatten() for part in found)
    seen = [next(i for i, x in enumerate(products.operands) if is_parallel(x, each)) for each in (k, v)]
    assert seen[0] < seen[1]
    query = named(checkpoint, "h.0.crossattention.q_attn.weight")
    assert parts(query, (16, 16), checkpoint.config) == ([Part(transposed=True)], "")


def test_multihead_attention_of_torch():
    attention = nn.MultiheadAttention(16, 4)
    W = attention.in_proj_weight.detach()
    x = torch.randn(3, 16)
    name = "decoder.layers.0.multihead_attn.in_proj_weight"
    found, _ = parts(name, tuple(W.shape), {})
    assert [part.layer_type for part in found] == ["cross_q", "cross_k", "cross_v"]
    for part, each in zip(found, nn.functional._in_projection_packed(x, x, x, W), strict=True):
        torch.testing.assert_close(x @ part.take(W).T, each)


@pytest.mark.parametrize(
    ("name", "rows", "config", "q_rows", "v_rows"),
    [
        # from their own code: InternLM 2 "(h gs d)" with gs = query heads a group + 2; Qwen 1 and Baichuan in thirds;
        # ChatGLM 2-4 "[heads, groups, groups]", or heads of (q, k, v) without multi-query
        ("layers.0.attention.wqkv.weight", 32,
         {"model_type": "internlm2", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16},
         [*range(8), *range(16, 24)], [*range(12, 16), *range(28, 32)]),
        ("transformer.h.0.attn.c_attn.weight", 48,
         {"model_type": "qwen", "num_attention_heads": 4, "kv_channels": 4, "hidden_size": 16},
         [*range(16)], [*range(32, 48)]),
        ("model.layers.0.self_attn.W_pack.weight", 48, {"model_type": "baichuan"}, [*range(16)], [*range(32, 48)]),
        ("transformer.encoder.layers.0.self_attention.query_key_value.weight", 32,
         {"model_type": "chatglm", "num_attention_heads": 4, "kv_channels": 4, "multi_query_attention": True,
          "multi_query_group_num": 2},
         [*range(16)], [*range(24, 32)]),
        ("transformer.layers.0.attention.query_key_value.weight", 24,
         {"model_type": "chatglm", "num_attention_heads": 2, "hidden_size": 8},
         [*range(4), *range(12, 16)], [*range(8, 12), *range(20, 24)]),
    ],
)  # fmt: skip
def test_layouts_of_models_with_code_of_their_own(name, rows, config, q_rows, v_rows):
    W = torch.arange(float(rows)).repeat(16, 1).T.contiguous()
    found, note = parts(name, (rows, 16), config)
    assert note == "split into q, k, v"
    taken = {part.label: part.take(W)[:, 0].int().tolist() for part in found}
    assert (taken["q"], taken["v"]) == (q_rows, v_rows)
    assert sorted(row for rows_of in taken.values() for row in rows_of) == list(range(rows))


def test_qkv_of_a_vision_tower():
    config = hf.Blip2VisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
                                  image_size=8, patch_size=4)  # fmt: skip
    model = built(hf.Blip2VisionModel, config)
    attention = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn"))
    W = attention.qkv.weight.detach()
    name = "vision_model.encoder.layers.0.self_attn.qkv.weight"
    found, _ = parts(name, tuple(W.shape), {"model_type": "blip-2", "text_config": {"model_type": "opt"}})
    x = torch.randn(1, 1, 16)
    with torch.no_grad(), Products() as products:
        attention(x)
    for part in found:
        assert any(is_parallel(seen, (x[0] @ part.take(W).T).flatten()) for seen in products.operands), part.label
    assert [part.label for part in found] == ["q", "k", "v"]


@pytest.mark.parametrize(
    ("kind", "make", "fused", "block"),
    [
        (hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**DECODER), "mlp.gate_up_proj", "layers.0.mlp"),
        (hf.Glm4ForCausalLM, lambda: hf.Glm4Config(**DECODER, head_dim=4), "mlp.gate_up_proj", "layers.0.mlp"),
        (hf.ModernBertForMaskedLM, lambda: hf.ModernBertConfig(**MHA, cls_token_id=1, sep_token_id=2), "mlp.Wi",
         "layers.0.mlp"),
        (hf.GraniteMoeSharedForCausalLM,
         lambda: hf.GraniteMoeSharedConfig(**DECODER | {"intermediate_size": 12, "shared_intermediate_size": 24},
                                           num_local_experts=2, num_experts_per_tok=1),
         "shared_mlp.input_linear", "layers.0.shared_mlp"),
    ],
)  # fmt: skip
def test_gate_is_the_half_that_goes_through_the_activation(kind, make, fused, block, tmp_path):
    model, checkpoint = saved(tmp_path, kind, make())
    name = named(checkpoint, f"{fused}.weight")
    W = checkpoint.read(name)
    found, note = parts(name, tuple(W.shape), checkpoint.config)
    assert ([part.layer_type for part in found], note) == (["gate", "up"], "split into gate, up")
    mlp = next(module for path, module in model.named_modules() if path.endswith(block))
    down = [module for module in mlp.modules() if isinstance(module, nn.Linear)][-1]
    act = next(module for module in mlp.modules() if type(module).__module__.endswith("activations"))
    x = torch.randn(3, 16)
    gate, up = (part.take(W) for part in found)
    with torch.no_grad():
        torch.testing.assert_close(down(act(x @ gate.T) * (x @ up.T)), mlp(x))


LLAMA4 = MOE | {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 1}
# family: (model, config, whether a stored expert is (in, out))
STACKED = {
    "gpt_oss": (hf.GptOssForCausalLM, lambda: hf.GptOssConfig(**MOE), True),
    "gpt_oss, square": (hf.GptOssForCausalLM, lambda: hf.GptOssConfig(**MOE | {"intermediate_size": 8}), True),
    "llama4": (hf.Llama4ForCausalLM, lambda: hf.Llama4TextConfig(**LLAMA4), True),
    "llama4, square": (
        hf.Llama4ForCausalLM, lambda: hf.Llama4TextConfig(**LLAMA4 | {"intermediate_size": 8}), True,
    ),
    "aria": (
        hf.AriaTextForCausalLM, lambda: hf.AriaTextConfig(**DECODER, moe_num_experts=3, moe_topk=1), True,
    ),
    "granitemoe": (hf.GraniteMoeForCausalLM, lambda: hf.GraniteMoeConfig(**MOE), False),
    "granitemoe, square": (
        hf.GraniteMoeForCausalLM, lambda: hf.GraniteMoeConfig(**MOE | {"intermediate_size": 8}), False,
    ),
}  # fmt: skip
FUSED_EXPERTS = ("experts.gate_up_proj", "experts.fc1.weight", "block_sparse_moe.input_linear.weight")
DOWN_EXPERTS = ("experts.down_proj", "experts.fc2.weight", "block_sparse_moe.output_linear.weight")


def run_expert(experts, expert, x, count=3):
    with torch.no_grad():
        if type(experts).__name__ == "Llama4TextExperts":
            return experts(x.repeat(count, 1)).view(count, *x.shape)[expert]
        rows = len(x)
        return experts(x, torch.full((rows, 1), expert), torch.ones(rows, 1))


@pytest.mark.parametrize("family", STACKED)
def test_an_expert_of_a_stack_computes_what_the_model_computes(family, tmp_path):
    kind, make, transposed = STACKED[family]
    model, checkpoint = saved(tmp_path, kind, make())
    found = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(FUSED_EXPERTS + DOWN_EXPERTS):
            W = checkpoint.read(name)
            pieces, note = parts(name, info.shape, checkpoint.config)
            assert note == "3 experts" + (", each split into gate, up" if name.endswith(FUSED_EXPERTS) else "")
            assert {piece.transposed for piece in pieces} == {transposed}
            for piece in pieces:
                label = piece.label if "." in piece.label else f"{piece.label}.down"
                found[label] = piece.take(W)
                assert tuple(found[label].shape) == piece.shape(info.shape)
    experts = next(module for path, module in model.named_modules() if path.endswith("experts"))
    x = torch.randn(2, 16)
    for expert in range(3):
        gate, up, down = (found[f"{expert}.{label}"] for label in ("gate", "up", "down"))
        if family.startswith("gpt_oss"):  # its own nonlinearity, on its own interleaved input
            fused = torch.stack([x @ gate.T, x @ up.T], dim=-1).flatten(1)
            hidden = experts._apply_gate(fused)
        else:
            hidden = nn.functional.silu(x @ gate.T) * (x @ up.T)
        torch.testing.assert_close(hidden @ down.T, run_expert(experts, expert, x), rtol=1e-4, atol=1e-5)


def test_gpt_oss_gate_is_the_even_rows(tmp_path):
    """The gate's own rows set to zero silence the expert; the up rows' do not."""
    model, _ = saved(tmp_path, *STACKED["gpt_oss"][:1], STACKED["gpt_oss"][1]())
    experts = next(module for path, module in model.named_modules() if path.endswith("experts"))
    W = experts.gate_up_proj.data
    found, _ = parts("model.layers.0.mlp.experts.gate_up_proj", tuple(W.shape), model.config.to_dict())
    for label, silent in (("1.up", False), ("1.gate", True)):
        next(part for part in found if part.label == label).take(W).zero_()
        assert (run_expert(experts, 1, torch.ones(1, 16)).abs().max().item() == 0.0) == silent
    assert run_expert(experts, 0, torch.ones(1, 16)).abs().max().item() > 0


def test_experts_as_mixtral_holds_them_in_memory():
    model = built(hf.MixtralForCausalLM, hf.MixtralConfig(**MOE))
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(2, 16)
    taken = {}
    for name, W in model.state_dict().items():
        if "experts." in name:
            for part in parts(name, tuple(W.shape), model.config.to_dict())[0]:
                taken[part.label if "." in part.label else f"{part.label}.down"] = part.take(W)
    for expert in range(3):
        gate, up, down = (taken[f"{expert}.{label}"] for label in ("gate", "up", "down"))
        wanted = run_expert(experts, expert, x)
        torch.testing.assert_close((nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T, wanted, rtol=1e-4, atol=1e-6)


def test_qwen3_vl_moe_stores_its_experts_transposed(tmp_path):
    text = MOE | {"moe_intermediate_size": 12, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 16,
              "num_position_embeddings": 4, "deepstack_visual_indexes": [0]}  # fmt: skip
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model, checkpoint = saved(tmp_path, hf.Qwen3VLMoeForConditionalGeneration, config)
    experts = model.model.language_model.layers[0].mlp.experts
    for ending, held in (("experts.gate_up_proj", experts.gate_up_proj), ("experts.down_proj", experts.down_proj)):
        name = named(checkpoint, ending)
        W = checkpoint.read(name)
        found, _ = parts(name, tuple(W.shape), checkpoint.config)
        torch.testing.assert_close(torch.cat([part.take(W) for part in found]), held.detach().flatten(0, 1))
    name = named(checkpoint, "blocks.0.attn.qkv.weight")
    assert parts(name, checkpoint.tensors[name].shape, checkpoint.config)[1] == "split into q, k, v"


def test_convolutions_are_out_by_everything_else():
    conv = nn.Conv2d(3, 16, kernel_size=(4, 2), stride=(4, 2), bias=False)
    found, note = parts("vit.embeddings.patch_embeddings.projection.weight", (16, 3, 4, 2), {"model_type": "vit"})
    assert (found, note) == ([Part()], "")
    image = torch.randn(1, 3, 4, 2)
    M = found[0].take(conv.weight.detach())
    assert tuple(M.shape) == found[0].shape((16, 3, 4, 2)) == (16, 24)
    torch.testing.assert_close(image.flatten(1) @ M.T, conv(image).flatten(1))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("backbone.layers.0.mixer.conv1d.weight", (32, 1, 4), (32, 4)),
        ("model.encoder.conv1.weight", (16, 8, 3), (16, 24)),
        ("feature_extractor.conv_layers.0.conv.weight", (8, 1, 3), (8, 3)),
        ("stages.0.downsample.1.weight", (8, 4, 2, 2), (8, 16)),
        ("visual.patch_embed.proj.weight", (8, 3, 2, 4, 4), (8, 96)),
        ("vit.embeddings.position_embeddings", (1, 5, 16), (5, 16)),
    ],
)
def test_tensors_of_more_dimensions(name, shape, expected):
    (part,), note = parts(name, shape, {})
    assert note == ""
    assert part.shape(shape) == expected == tuple(part.take(torch.empty(shape)).shape)
    assert (part.layer_type == "conv") == (name == "stages.0.downsample.1.weight")


@pytest.mark.parametrize(
    ("name", "shape", "config", "note"),
    [
        ("model.norm.weight", (16,), {}, "vector"),
        ("model.embed_tokens.weight", (0, 16), {}, "empty"),
        ("model.layers.0.mlp.experts.down_proj", (0, 16, 24), {}, "empty"),
        ("vit.embeddings.cls_token", (1, 1, 16), {}, "3-D: not analysed"),
        ("some.thing", (2, 3, 4), {}, "3-D: not analysed"),
        ("encoder.pos_embed", (1, 4, 4, 8), {}, "4-D: not analysed"),
        ("model.layers.0.self_attn.diagonal_decay", (1, 4, 4, 4), {}, "4-D: not analysed"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (3, 48), {"model_type": "gpt_oss"}, "biases of 3 experts"),
    ],
)
def test_what_is_no_matrix_has_no_part_and_a_reason(name, shape, config, note):
    assert parts(name, shape, config) == ([], note)


QKV = "transformer.h.0.self_attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("name", "shape", "config", "reason"),
    [
        (QKV, (48, 16), {}, "no model type in the config"),
        (QKV, (48, 16), {"model_type": "foo"}, "layout of 'foo' is not known"),
        (QKV, (48, 16), {"model_type": "bloom"}, "the config does not give its numbers of heads"),
        (QKV, (40, 16), {"model_type": "bloom", "n_head": 4, "hidden_size": 16},
         "4 and 4 heads of 4 in the config are not its 40 rows"),
        (QKV, (48, 16), {"model_type": "falcon", "num_attention_heads": 4, "hidden_size": 16},
         "4 and 1 heads of 4 in the config are not its 48 rows"),
        ("blocks.0.attn.qkv.weight", (40, 16), {}, "its 40 rows are not three times its 16 columns"),
        ("model.layers.0.mlp.gate_up_proj.weight", (48, 16), {"model_type": "phi3", "intermediate_size": 20},
         "no intermediate size in the config is half of its 48 rows"),
        ("model.layers.0.mlp.gate_up_proj.weight", (48, 16), {}, "no model type in the config"),
    ],
)  # fmt: skip
def test_a_fused_matrix_is_kept_whole_where_its_layout_is_not_sure(name, shape, config, reason):
    found, note = parts(name, shape, config)
    assert found == [Part()]
    assert note.startswith("fused ")
    assert note.endswith(f" kept whole: {reason}")


@pytest.mark.parametrize(
    ("name", "shape", "config", "labels", "note"),
    [
        ("transformer.encoder.layers.0.mlp.dense_h_to_4h.weight", (48, 16),
         {"model_type": "chatglm", "ffn_hidden_size": 24}, ["gate", "up"], "split into gate, up"),
        ("transformer.encoder.layers.0.mlp.dense_h_to_4h.weight", (48, 16),
         {"model_type": "chatglm", "ffn_hidden_size": "big"}, [""], ""),
        ("model.layers.0.mlp.shared_experts.gate_up_proj.weight", (48, 16),
         {"model_type": "foo", "moe_intermediate_size": 24, "n_shared_experts": "two"}, ["gate", "up"],
         "split into gate, up"),
        ("transformer.h.0.mlp.dense_h_to_4h.weight", (48, 16),
         {"model_type": "bloom", "ffn_hidden_size": 24}, [""], ""),
        ("model.layers.0.mlp.shared_experts.gate_up_proj.weight", (48, 16),
         {"model_type": "foo", "moe_intermediate_size": 12, "n_shared_experts": 2}, ["gate", "up"],
         "split into gate, up"),
        ("model.embed_tokens_extend.audio_embed.encoder.encoders.0.feed_forward_in.gate_up_proj.weight", (48, 16),
         {"model_type": "phi4_multimodal", "intermediate_size": 24}, [""],
         "fused gate_up kept whole: order of 'phi4_multimodal' is not known here"),
        ("transformer.blocks.0.ffn.experts.mlp.w2", (72, 16), {"model_type": "dbrx"}, [""],
         "experts one under the other kept whole"),
        ("model.layers.0.mlp.experts.2.gate_up_proj.weight", (48, 16),
         {"model_type": "foo", "moe_intermediate_size": 24}, ["gate", "up"], "split into gate, up"),
    ],
)  # fmt: skip
def test_other_fused_and_stacked_tensors(name, shape, config, labels, note):
    found, said = parts(name, shape, config)
    assert ([part.label for part in found], said) == (labels, note)
    if ".experts.2." in name:
        assert [part.layer_type for part in found] == ["expert_gate", "expert_up"]


def test_experts_of_an_unknown_orientation_are_kept_whole_each():
    found, note = parts("model.layers.0.mlp.experts.gate_up_proj", (3, 32, 16), {})
    assert [part.label for part in found] == ["0", "1", "2"]
    assert note == "3 experts, fused gate_up kept whole: which side is in and which is out is not known"


def test_no_split_keeps_fused_matrices_and_separates_experts():
    config = {"model_type": "gpt2"}
    assert parts("h.0.attn.c_attn.weight", (16, 48), config, split=False) == ([Part(transposed=True)], "")
    found, note = parts("layers.0.mlp.experts.gate_up_proj", (3, 48, 16), {"model_type": "mixtral"}, split=False)
    assert ([part.shape((3, 48, 16)) for part in found], note) == ([(48, 16)] * 3, "3 experts")


@pytest.mark.parametrize(
    ("part", "stored", "exact"),
    [
        (Part(), (6, 4), True),
        (Part(transposed=True), (4, 6), True),
        (Part(table=True), (1, 6, 4), True),
        (Part(), (6, 2, 3), True),
        (Part(rows=Rows(1, 6, 2, 4)), (6, 4), True),
        (Part(rows=Rows(3, 2, 1, 2)), (6, 4), False),
        (Part(rows=Rows(2, 3, 1, 3)), (6, 4), False),
        (Part(transposed=True, rows=Rows(1, 6, 2, 4)), (4, 6), False),
        (Part(expert=2), (3, 6, 4), True),
        (Part(expert=2, transposed=True), (3, 4, 6), True),
        (Part(expert=1, rows=Rows(1, 6, 3, 6)), (3, 6, 4), True),
        (Part(expert=1, transposed=True, rows=Rows(3, 2, 1, 2)), (3, 4, 6), False),
    ],
)
def test_a_span_holds_the_part(part, stored, exact):
    W = torch.arange(torch.tensor(stored).prod().item()).view(stored).float()
    M = part.take(W)
    assert tuple(M.shape) == part.shape(stored)
    first, count = part.span(stored)
    assert (count == M.numel()) == exact
    torch.testing.assert_close(part.take_span(W.flatten()[first : first + count], stored), M)
    if part.expert is not None:
        torch.testing.assert_close(part.take(W[part.expert]), M)


@pytest.mark.parametrize("rows", [Rows(1, 6, 2, 4), Rows(3, 2, 0, 1)])
def test_one_run_or_single_rows_are_a_view(rows):
    W = torch.randn(6, 4)
    assert rows.take(W).untyped_storage().data_ptr() == W.untyped_storage().data_ptr()
    assert rows.take(W.T.contiguous().T).shape == (rows.count, 4)


def test_config_of_a_text_decoder_inside_another_model(tmp_path):
    """GPT-2 as the decoder of a vision model: Conv1D and its layout are told by the inner config."""
    vision = hf.ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
                          image_size=8, patch_size=4)  # fmt: skip
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, hf.GPT2Config(**GPT2))
    hf.VisionEncoderDecoderModel(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    name = named(checkpoint, "h.0.attn.c_attn.weight")
    found, note = parts(name, checkpoint.tensors[name].shape, json.loads((tmp_path / "config.json").read_text()))
    assert note == "split into q, k, v"
    assert all(part.transposed for part in found)
