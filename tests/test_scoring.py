"""Losses, KL and cosine of real models against transformers' own loss and against the formulas."""

import pytest
import torch
from evaluated import BERT, bare, classifier, fine_tuned, gpt2, masked, moved, t5
from tokenizers_in_tests import CHAT, tokenizer
from torch import nn

import lowrank_probe as lp
from lowrank_probe import scoring
from lowrank_probe.documents import Document
from lowrank_probe.scoring import Scorer, make_task
from lowrank_probe.texts import prompts
from lowrank_probe.token_blocks import IGNORED, to_blocks

CPU = torch.device("cpu")
DOCUMENTS = [Document(text) for text in prompts()]


def scored(base, tuned, blocks, batch=4, mask_id=2, special=(0, 1, 2)):
    """(the scorer, base's score)."""
    config = tuned.config.to_dict() if hasattr(tuned, "config") else {}
    task = make_task(tuned, config, blocks, 0, mask_id, special)
    scorer = Scorer(task, batch, CPU)
    scorer.keep(tuned)
    return scorer, scorer.score(base, "base")


@torch.no_grad()
def test_the_loss_of_a_causal_model_is_transformers_own():
    base, tuned = moved(gpt2)
    blocks = to_blocks(DOCUMENTS, tokenizer(), 24, limit=6)
    scorer, score = scored(base, tuned, blocks)
    expected = base(input_ids=blocks.ids, labels=blocks.labels).loss
    assert scorer.task.merit == "next-token loss"
    assert score.merit.sum() / scorer.weights.sum() == pytest.approx(float(expected), rel=1e-6)
    p, q = (model(input_ids=blocks.ids).logits[:, :-1].double().log_softmax(-1) for model in (tuned, base))
    kl = (p.exp() * (p - q)).sum(-1)
    assert score.kl == pytest.approx(kl.sum(1).numpy(), rel=1e-5)
    assert scorer.kl_weights.tolist() == [23.0] * 6
    itself = scorer.score(tuned, "tuned")
    assert abs(itself.kl).max() < 1e-6


@torch.no_grad()
def test_padding_and_prompts_are_not_judged():
    base, tuned = moved(gpt2)
    documents = [Document(" and so on.", prompt=text[:30]) for text in prompts()[:5]]
    words = tokenizer(chat_template=CHAT)
    turns = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."})
    blocks = to_blocks([*documents, Document("", messages=turns)], words, 48, packing=False)
    scorer, score = scored(base, tuned, blocks)
    for i in range(6):
        end = int(blocks.lengths[i])
        loss = base(input_ids=blocks.ids[i : i + 1, :end], labels=blocks.labels[i : i + 1, :end]).loss
        assert score.merit[i] / scorer.weights[i] == pytest.approx(float(loss), rel=1e-5)
    assert scorer.weights.sum() == blocks.n_tokens


@torch.no_grad()
def test_masked_tokens_are_the_same_15_percent_every_time():
    base, tuned = moved(masked)
    blocks = to_blocks(DOCUMENTS, tokenizer(), 32, limit=20)
    scorer, score = scored(base, tuned, blocks)
    ids, targets = scorer.task.inputs["input_ids"], scorer.task.targets
    chosen = targets != IGNORED
    assert 0.11 < float(chosen.float().mean()) < 0.19
    assert (ids[chosen] == 2).all()
    assert torch.equal(ids[~chosen], blocks.ids[~chosen])
    assert not torch.isin(targets[chosen], torch.tensor([0, 1, 2])).any()
    expected = base(input_ids=ids, labels=targets).loss
    assert score.merit.sum() / scorer.weights.sum() == pytest.approx(float(expected), rel=1e-6)
    again = make_task(tuned, tuned.config.to_dict(), blocks, 0, 2, (0, 1, 2))
    assert torch.equal(again.inputs["input_ids"], ids)
    assert not torch.equal(make_task(tuned, tuned.config.to_dict(), blocks, 1, 2).inputs["input_ids"], ids)
    with pytest.raises(lp.ProbeError, match="no mask token"):
        make_task(tuned, tuned.config.to_dict(), blocks, 0, None)


@torch.no_grad()
def test_an_encoder_decoder_writes_the_second_half():
    base, tuned = moved(t5)
    blocks = to_blocks(DOCUMENTS, tokenizer(), 24, limit=4)
    scorer, score = scored(base, tuned, blocks)
    expected = base(input_ids=blocks.ids[:, :12], labels=blocks.ids[:, 12:].contiguous()).loss
    assert score.merit.sum() / scorer.weights.sum() == pytest.approx(float(expected), rel=1e-6)
    pairs = [Document("yes.", prompt=text[:20]) for text in prompts()[:4]]
    scorer, score = scored(base, tuned, to_blocks(pairs, tokenizer(), 40, packing=False))
    words = tokenizer()
    for i, one in enumerate(pairs):
        target = torch.tensor([[*words("yes.")["input_ids"], 1]])
        source = torch.tensor([words(one.prompt)["input_ids"]])
        assert score.merit[i] / scorer.weights[i] == pytest.approx(float(base(source, labels=target).loss), rel=1e-5)


@torch.no_grad()
def test_a_classifier_is_judged_by_kl():
    base, tuned = moved(classifier, scale=0.2)
    blocks = to_blocks(DOCUMENTS, tokenizer(), 32, packing=False)
    scorer, score = scored(base, tuned, blocks)
    inputs = {"input_ids": blocks.ids, "attention_mask": blocks.attention_mask}
    p, q = (model(**inputs).logits.double().log_softmax(-1) for model in (tuned, base))
    assert scorer.task.merit == "KL to tuned"
    assert score.merit == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), rel=1e-3, abs=1e-7)
    assert scorer.weights.tolist() == [1.0] * 20


@torch.no_grad()
def test_a_model_without_a_head_is_judged_by_cosine():
    base, tuned = moved(bare)
    blocks = to_blocks(DOCUMENTS, tokenizer(), 32, packing=False)
    scorer, score = scored(base, tuned, blocks)
    inputs = {"input_ids": blocks.ids, "attention_mask": blocks.attention_mask}
    p, q = (model(**inputs).last_hidden_state.double() for model in (tuned, base))
    apart = (1 - torch.cosine_similarity(p, q, dim=-1)) * blocks.attention_mask
    assert score.merit == pytest.approx(apart.sum(1).numpy(), rel=1e-4)
    assert scorer.weights.sum() == blocks.lengths.sum()
    assert not score.kl.any()


def test_kept_outputs_are_few_and_evenly_spaced(monkeypatch):
    base, tuned = moved(gpt2)
    blocks = to_blocks(DOCUMENTS, tokenizer(), 24, limit=6)
    every = scored(base, tuned, blocks)[1].kl.sum() / (6 * 23)
    monkeypatch.setattr(scoring, "KEPT_BYTES", 4 * 300 * 50)
    scorer, score = scored(base, tuned, blocks)
    assert scorer.kept.sum() == 50
    assert set(scorer.kl_weights) <= {8.0, 9.0}
    assert score.kl.sum() / 50 == pytest.approx(every, rel=0.3)
    assert sum(len(rows) for rows in scorer.reference) == 50


@torch.no_grad()
def test_any_module_that_gives_logits_is_a_causal_model():
    class Bigrams(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(300, 300)

        def forward(self, ids):
            return self.table(ids)

    model, blocks = Bigrams(), to_blocks(DOCUMENTS, tokenizer(), 24, limit=6)
    scorer, score = scored(model, model, blocks)
    expected = nn.functional.cross_entropy(model(blocks.ids[:, :-1]).flatten(0, 1), blocks.ids[:, 1:].flatten())
    assert score.merit.sum() / scorer.weights.sum() == pytest.approx(float(expected), rel=1e-6)


def test_the_batch_changes_nothing_and_nan_is_named():
    base, tuned = fine_tuned(steps=2)
    blocks = to_blocks(DOCUMENTS, tokenizer(), 24, limit=7)
    one, many = scored(base, tuned, blocks, batch=1)[1], scored(base, tuned, blocks, batch=16)[1]
    assert one.merit == pytest.approx(many.merit, rel=1e-6)
    assert one.kl == pytest.approx(many.kl, rel=1e-3, abs=1e-6)
    scorer, _ = scored(base, tuned, blocks)
    with torch.no_grad():
        tuned.model.norm.weight.fill_(float("nan"))
    with pytest.raises(lp.NumericsError, match="state-00003: the outputs hold NaN"):
        scorer.score(tuned, "state-00003")


def test_a_model_that_needs_more_than_text_is_refused():
    import transformers as hf

    config = hf.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    blocks = to_blocks(DOCUMENTS, tokenizer(), 24, limit=2)
    with pytest.raises(lp.ProbeError, match="ViTModel does not run on text alone"):
        make_task(hf.ViTModel(config), config.to_dict(), blocks, 0, None)
    asks = hf.BertForQuestionAnswering(hf.BertConfig(**BERT)).eval()
    with pytest.raises(lp.ProbeError, match="neither logits nor last hidden states"):
        make_task(asks, asks.config.to_dict(), blocks, 0, None)
