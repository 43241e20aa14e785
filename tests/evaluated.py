"""Small real models of many kinds, base and tuned, that the tests of `probe eval` look at."""

import copy

import torch
import transformers as hf
from tokenizers_in_tests import VOCABULARY, tokenizer

from lowrank_probe.documents import Document
from lowrank_probe.texts import prompts
from lowrank_probe.token_blocks import to_blocks

SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
BERT = SMALL | {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 1}


def llama(**changes):
    config = {**SMALL, **IDS, "intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**config | changes))


def gpt2():
    config = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**config, bos_token_id=0, eos_token_id=1))


def phi3():
    config = {**SMALL, **IDS, "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 1}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**config))


def neox():
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, intermediate_size=48, max_position_embeddings=64))


def mixtral():
    config = {**SMALL, **IDS, "intermediate_size": 24, "max_position_embeddings": 64, "num_key_value_heads": 1}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**config, num_local_experts=3, num_experts_per_tok=2))


def t5():
    config = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**config, pad_token_id=1, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0)
    )


def masked():
    return hf.BertForMaskedLM(hf.BertConfig(**BERT))


def classifier():
    return hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3))


def bare():
    return hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False)


def texts(directory):
    """The built-in prompts as a file."""
    file = directory / "text.txt"
    file.write_text("\n\n".join(prompts()), encoding="utf-8")
    return file


def moved(make, scale=0.05, seed=0):
    """(base, tuned) in memory: every matrix of the base is changed by a falling spectrum, no vector is."""
    torch.manual_seed(seed)
    base = make().eval()
    with torch.no_grad():  # so that the outputs of a tiny random model are not all but constant
        for W in base.parameters():
            if W.ndim >= 2:
                W.mul_(4)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for W in tuned.parameters():
            if W.ndim >= 2:
                U, s, Vh = torch.linalg.svd(torch.randn(W.shape), full_matrices=False)
                W += scale * (U * s[..., None, :] * 0.6 ** torch.arange(s.shape[-1])) @ Vh
    return base, tuned


def saved(directory, base, tuned):
    """(base, tuned) directories, with a tokenizer beside the tuned one."""
    base.save_pretrained(directory / "base")
    tuned.save_pretrained(directory / "tuned")
    tokenizer().save_pretrained(directory / "tuned")
    return directory / "base", directory / "tuned"


def fine_tuned(make=llama, rank=None, steps=40):
    """(base, tuned): fine-tuned on the prompts for real; every matrix, or factors of one rank in every linear layer."""
    torch.manual_seed(0)
    base = make()
    tuned = copy.deepcopy(base)
    factors = {}
    for name, W in tuned.named_parameters():
        W.requires_grad_(rank is None and W.ndim == 2)
        if rank is not None and name.endswith("_proj.weight"):
            factors[name] = (torch.zeros(W.shape[0], rank), torch.randn(rank, W.shape[1]) / W.shape[1] ** 0.5)
    trained = [F.requires_grad_() for pair in factors.values() for F in pair] or [
        W for W in tuned.parameters() if W.requires_grad
    ]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    blocks = to_blocks([Document(text) for text in prompts()], tokenizer(), 32)
    for _ in range(steps):
        worn = {name: base.get_parameter(name).detach() + B @ A for name, (B, A) in factors.items()}
        found = torch.func.functional_call(tuned, worn, (), {"input_ids": blocks.ids, "labels": blocks.labels})
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, (B, A) in factors.items():
            tuned.get_parameter(name).copy_(base.get_parameter(name) + B @ A)
    return base.eval(), tuned.eval()
