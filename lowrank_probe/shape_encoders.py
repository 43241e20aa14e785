"""BERT and RoBERTa with their masked-language head, T5 with encoder, decoder and head: config → weights."""

from lowrank_probe.errors import CheckpointError
from lowrank_probe.shape_fields import Fields, Sizes, norms, weight
from lowrank_probe.weight_shapes import Weight


def bert(f: Fields) -> tuple[Sizes, list[Weight]]:
    """BERT and RoBERTa; the output head shares the table's weight and takes the bias that lies beside it."""
    hidden, heads, top = f.size("hidden_size"), f.size("num_attention_heads"), f.model_type
    s = Sizes(
        hidden, f.size("num_hidden_layers"), heads, heads, f.share(hidden, heads), f.size("intermediate_size"),
        f.size("vocab_size"), f.flag("tie_word_embeddings", True), False,
    )  # fmt: skip
    block, roberta = f"{top}.encoder.layer.*.", f.model_type == "roberta"
    transform, norm, decoder, bias = (
        ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias") if roberta else
        ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder",
         "cls.predictions.bias")
    )  # fmt: skip
    found = [
        weight(f"{top}.embeddings.word_embeddings", "embedding", (s.vocab, hidden)),
        weight(f"{top}.embeddings.position_embeddings", "embedding",
               (f.size("max_position_embeddings", default=512), hidden)),
        weight(f"{top}.embeddings.token_type_embeddings", "embedding", (f.size("type_vocab_size", default=2), hidden)),
        *norms(f"{top}.embeddings.", ["LayerNorm"], hidden, True),
        *(weight(f"{block}attention.self.{name}", "linear", (hidden, hidden), True, s.blocks)
          for name in ("query", "key", "value")),
        weight(f"{block}attention.output.dense", "linear", (hidden, hidden), True, s.blocks),
        weight(f"{block}intermediate.dense", "linear", (s.intermediate, hidden), True, s.blocks),
        weight(f"{block}output.dense", "linear", (hidden, s.intermediate), True, s.blocks),
        *norms(block, ["attention.output.LayerNorm", "output.LayerNorm"], hidden, True, s.blocks),
        weight(transform, "linear", (hidden, hidden), True), *norms("", [norm], hidden, True),
        weight(decoder, "linear", (s.vocab, hidden), not s.tied, tied=s.tied), *norms("", [bias], s.vocab),
    ]  # fmt: skip
    return s, found


def t5(f: Fields) -> tuple[Sizes, list[Weight]]:
    """T5: relative positions in the first block of either stack; transformers 5 always ties its head."""
    hidden, heads, width = f.size("d_model", "hidden_size"), f.size("num_heads", "num_attention_heads"), f.size("d_kv")
    n_encoder = f.size("num_layers", "num_hidden_layers")
    n_decoder = f.size("num_decoder_layers", default=n_encoder)
    act = f.config.get("feed_forward_proj", "relu")
    if not isinstance(act, str):
        raise CheckpointError(f'config: feed_forward_proj is {act!r}, expected a name such as "relu" or "gated-gelu"')
    gated, inner, ff = act.split("-")[0] == "gated", heads * width, f.size("d_ff")
    s = Sizes(hidden, n_encoder + n_decoder, heads, heads, width, ff, f.size("vocab_size"), True, gated)
    buckets = f.size("relative_attention_num_buckets", default=32)
    found = [weight("shared", "embedding", (s.vocab, hidden))]
    for stack, blocks in (("encoder", range(n_encoder)), ("decoder", range(n_decoder))):
        attentions = ["SelfAttention"] + ["EncDecAttention"] * (stack == "decoder")
        last = len(attentions)
        found.append(weight(f"{stack}.embed_tokens", "embedding", (s.vocab, hidden), tied=True))
        for i, name in enumerate(attentions):
            layer = f"{stack}.block.*.layer.{i}."
            found += [weight(f"{layer}{name}.{x}", "linear", (inner, hidden), layers=blocks) for x in "qkv"]
            found.append(weight(f"{layer}{name}.o", "linear", (hidden, inner), layers=blocks))
            found += norms(layer, ["layer_norm"], hidden, layers=blocks)
        found.append(
            weight(f"{stack}.block.*.layer.0.SelfAttention.relative_attention_bias", "embedding", (buckets, heads),
                   layers=[0])
        )  # fmt: skip
        mlp = f"{stack}.block.*.layer.{last}.DenseReluDense."
        found += [
            weight(f"{mlp}{x}", "linear", (ff, hidden), layers=blocks) for x in (["wi_0", "wi_1"] if gated else ["wi"])
        ]
        found.append(weight(f"{mlp}wo", "linear", (hidden, ff), layers=blocks))
        found += norms(f"{stack}.block.*.layer.{last}.", ["layer_norm"], hidden, layers=blocks)
        found += norms(f"{stack}.", ["final_layer_norm"], hidden)
    found.append(weight("lm_head", "linear", (s.vocab, hidden), tied=True))
    return s, found
