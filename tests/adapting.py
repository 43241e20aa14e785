"""A pair of tiny models, the adapter of their difference, and what the real peft makes of it."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from peft import PeftModel

from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.peft_files import write_adapter
from lowrank_probe.selection import select

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
EXPERTS = {"num_key_value_heads": 1, "num_experts_per_tok": 2}
SEQ2SEQ = {"vocab_size": 40, "d_model": 16, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def llama(**config):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"num_key_value_heads": 1} | config))


def gpt2():
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, **tokens))


def qwen2():
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, num_key_value_heads=1))


def qwen3():
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8))


def bert():
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES))


def mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, **EXPERTS, num_local_experts=3))


def qwen2_moe():
    sizes = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SIZES, **EXPERTS, **sizes, num_experts=3))


def qwen3_moe():
    sizes = {"moe_intermediate_size": 12, "head_dim": 8, "mlp_only_layers": [1]}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **EXPERTS, **sizes, num_experts=3))


def gpt_oss():
    rest = {"head_dim": 8, "layer_types": ["full_attention"] * 2, "pad_token_id": 1, "eos_token_id": 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, **EXPERTS, **rest, num_local_experts=3))


def t5():
    return hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def marian():
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("ffn_dim", 24), ("layers", 1), ("attention_heads", 2))}  # fmt: skip
    return hf.MarianMTModel(hf.MarianConfig(**SEQ2SEQ, **sides, max_position_embeddings=32))


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4))


def saved(directory, build, changed=lambda name, p: True, dtype=torch.float32):
    """(base, tuned) directories of a model, before and after a random change of the parameters that `changed` picks."""
    torch.manual_seed(0)
    model = build().to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms are born as zeros and ones
            p += 0.02 * torch.randn_like(p)
    model.save_pretrained(directory / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if changed(name, p):
                p += 0.1 * torch.randn_like(p)
    model.save_pretrained(directory / "tuned")
    return directory / "base", directory / "tuned"


def svd_factors(base, tuned, ranks):
    """factors(target): the leading singular triplets of each copy by torch's own SVD, √σ in each factor."""

    def factors(target):
        r = ranks[target.name]
        B, A = torch.zeros(target.copies, target.shape[0], r), torch.zeros(target.copies, r, target.shape[1])
        for i, delta in enumerate(target.deltas(base, tuned, torch.device("cpu"))):
            if delta is not None:
                U, s, Vh = torch.linalg.svd(delta.dense.double(), full_matrices=False)
                B[i], A[i] = U[:, :r] * s[:r].sqrt(), s[:r, None].sqrt() * Vh[:r]
        return B, A

    return factors


def full_ranks(selection, base, tuned):
    """min(m, n) for every target that changed, 0 for the others."""
    return {
        target.name: min(target.shape) if any(target.deltas(base, tuned, torch.device("cpu"))) else 0
        for target in selection.chosen
    }


def write(directory, pair, targets=("everything",), ranks=None, dtype=torch.float32, **options):
    """(adapter directory, selection): of full rank, so that base + adapter is the fine-tune."""
    base, tuned = (open_checkpoint(side) for side in pair)
    selection = select(base, tuned, targets, **options)
    selection.weigh(base, tuned)
    ranks = ranks(selection) if ranks else full_ranks(selection, base, tuned)
    factors = svd_factors(base, tuned, ranks)
    return write_adapter(Path(directory) / "adapter", selection, ranks, factors, base, tuned, dtype=dtype), selection


@dataclass
class Errors:
    """max |logits − logits of the fine-tune| of the base, of base + adapter, and of the two merged by peft."""

    base: float
    unmerged: float
    merged: float


def errors(pair, adapter, prepare=lambda model: model):
    """What peft makes of the adapter; every weight must be found. prepare: done to the base before loading."""
    tuned, base = load(pair[1]), load(pair[0])
    inputs = _inputs(tuned)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = tuned(**inputs).logits
        before = prepare(base)(**inputs).logits
        model = PeftModel.from_pretrained(base, adapter).eval()
        unmerged = model(**inputs).logits
        merged = model.merge_and_unload().eval()(**inputs).logits
    return Errors(*(float((logits - wanted).abs().max()) for logits in (before, unmerged, merged)))


def load(directory):
    config = hf.AutoConfig.from_pretrained(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(hf, config.architectures[0]).from_pretrained(directory).eval()


def _inputs(model):
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 40, (2, 9), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})
