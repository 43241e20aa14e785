"""Tiny random models of the architectures on which extraction is hard, and the perturbation that plays the fine-tune."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers as tf
from torch import Tensor

VOCAB: Final = 128
HIDDEN: Final = 64
UPDATE_RANK: Final = 4
RELATIVE: Final = 0.1
BIAS: Final = 0.02 * HIDDEN**0.5
SHARED: Final[dict[str, Any]] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER: Final = SHARED | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Case:
    """title, special: for the table. cls: the class that builds and loads it. grown: rows of the tuned table, 0 as the base's."""

    title: str
    special: str
    cls: Any
    config: Callable[[], Any]
    grown: int = 0
    seq2seq: bool = False

    def build(self) -> Any:
        """The base. Biases, which start at zero, get the size that W·x has there: as in a trained model they count."""
        model = self.cls(self.config())
        with torch.no_grad():
            for W in model.parameters():
                if W.requires_grad and not W.any():
                    W.normal_(std=BIAS)
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Random tokens of the base's vocabulary, 4 × 12; all of the grown one where it grew."""
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(3, self.grown or VOCAB, (4, 12), generator=generator)
        words = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return words | ({"decoder_input_ids": tokens.roll(1, 1)} if self.seq2seq else {})


def perturb(model: Any, generator: torch.Generator) -> None:
    """Adds RELATIVE of its norm to each trainable parameter.

    Matrices (m, n) get rank UPDATE_RANK, stacks (E, m, n) that rank in each of the E, vectors any direction.
    """
    with torch.no_grad():
        for W in model.parameters():
            if not W.requires_grad:
                continue
            if W.ndim < 2:
                D = torch.randn(W.shape, generator=generator)
            else:
                r = min(UPDATE_RANK, *W.shape[-2:])
                B, A = (
                    torch.randn(*W.shape[:-1], r, generator=generator),
                    torch.randn(*W.shape[:-2], r, W.shape[-1], generator=generator),
                )
                D = B @ A
            W += D * (RELATIVE * float(torch.linalg.norm(W)) / float(torch.linalg.norm(D)))


CASES: Final[dict[str, Case]] = {
    "gpt2": Case("GPT-2", "`Conv1D` stores (in, out); tied head", tf.GPT2LMHeadModel, lambda: tf.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)),
    "qwen2": Case("Qwen2", "biases on q, k, v", tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**DECODER, tie_word_embeddings=False)),
    "qwen3_moe": Case("Qwen3-MoE", "experts: one 3-D parameter in memory", tf.Qwen3MoeForCausalLM, lambda: tf.Qwen3MoeConfig(
        **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=16, tie_word_embeddings=False)),
    "mixtral": Case("Mixtral", "experts: per expert on disk, fused in memory", tf.MixtralForCausalLM, lambda: tf.MixtralConfig(
        **DECODER, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)),
    "tied": Case("Llama, tied head", "one table is input and output", tf.LlamaForCausalLM, lambda: tf.LlamaConfig(
        **DECODER, tie_word_embeddings=True)),
    "grown": Case("Llama, larger vocabulary", f"{VOCAB} → {VOCAB + 8} rows", tf.LlamaForCausalLM, lambda: tf.LlamaConfig(
        **DECODER, tie_word_embeddings=False), grown=VOCAB + 8),
    "bert": Case("BERT", "encoder; biases, LayerNorms, tied decoder", tf.BertForMaskedLM, lambda: tf.BertConfig(
        **SHARED, intermediate_size=96, max_position_embeddings=64)),
    "t5": Case("T5", "encoder–decoder; shared table, relative positions", tf.T5ForConditionalGeneration, lambda: tf.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_ff=96, d_kv=16, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0), seq2seq=True),
    "marian": Case("Marian", "encoder–decoder; biases, one table for three", tf.MarianMTModel, lambda: tf.MarianConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=0, forced_eos_token_id=None), seq2seq=True),
}  # fmt: skip
