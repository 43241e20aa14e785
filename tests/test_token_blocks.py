"""Blocks of a real tokenizer: what is in them, where a loss is taken, what is refused."""

import pytest
import torch
import transformers as hf
from tokenizers_in_tests import CHAT, MARKED_CHAT, VOCABULARY, tokenizer

import lowrank_probe as lp
from lowrank_probe.documents import Document
from lowrank_probe.excerpts import excerpts
from lowrank_probe.texts import prompts
from lowrank_probe.token_blocks import IGNORED, load_tokenizer, to_blocks

TURNS = (
    {"role": "user", "content": "Why is it so?"}, {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "No."}, {"role": "assistant", "content": "Yes, indeed."},
)  # fmt: skip
DOCUMENTS = [Document(text) for text in prompts()]


def judged(blocks, words, row=0):
    """The text on which a loss is taken, in runs."""
    marked = blocks.labels[row] != IGNORED
    runs, run = [], []
    for token, one in zip(blocks.ids[row].tolist(), marked.tolist(), strict=True):
        if one:
            run.append(token)
        elif run:
            runs, run = [*runs, words.decode(run)], []
    return [*runs, words.decode(run)] if run else runs


def test_packed_documents_are_the_text_with_ends_between():
    words = tokenizer()
    stream = [token for one in DOCUMENTS for token in [*words(one.text)["input_ids"], 1]]
    blocks = to_blocks(DOCUMENTS, words, 32)
    n = len(stream) // 32
    assert torch.equal(blocks.ids.flatten(), torch.tensor(stream[: 32 * n]))
    assert torch.equal(blocks.labels, blocks.ids)
    assert blocks.ids.dtype == blocks.labels.dtype == torch.int64
    assert (len(blocks), blocks.n_tokens, blocks.n_documents) == (n, 32 * n, 20)
    assert bool(blocks.attention_mask.all())
    few = to_blocks(DOCUMENTS, words, 32, limit=10)
    assert torch.equal(few.ids, blocks.ids[[(2 * i + 1) * n // 20 for i in range(10)]])  # spread over all of the text
    assert 10 <= few.n_documents < 20


def test_a_part_of_a_long_text_is_from_all_of_it_and_little_is_tokenized():
    words, seen = tokenizer(), []

    def counting(text, **how):
        seen.append(len(text))
        return words(text, **how)

    counting.eos_token_id, counting.bos_token_id, counting.cls_token_id, counting.pad_token_id = 1, None, None, 1
    documents = [Document(f"Story {i}. " + DOCUMENTS[i % 20].text * 400) for i in range(60)]
    blocks = to_blocks(documents, counting, 32, limit=16)
    assert len(blocks) == 16
    assert blocks.n_documents >= 15
    assert sum(seen) <= 16 * 16 * 32 < 0.01 * sum(len(one.text) for one in documents)
    assert torch.equal(to_blocks(documents, words, 32, limit=16).ids, blocks.ids)
    assert to_blocks(documents[:1], words, 32, limit=16).n_documents == 1


def test_an_excerpt_ends_without_an_end_of_text():
    long = Document("never ending story " * 4000)
    parts = [part for _, part in excerpts([long], 4, 8)]
    assert len(parts) == 4
    assert all(part.cut for part in parts)
    assert all(part.text.startswith(("never ", "ending ", "story ")) for part in parts)
    assert 1 not in to_blocks([long], tokenizer(), 8, limit=4).ids
    assert excerpts(DOCUMENTS, 100, 100) == list(enumerate(DOCUMENTS))
    answers = [Document("Yes. " * 50, prompt="Is it?") for _ in range(40)]
    assert all(part is answers[i] for i, part in excerpts(answers, 3, 8))


def test_one_document_a_row_takes_rows_from_all_of_them():
    rows = to_blocks(DOCUMENTS, tokenizer(), 24, packing=False).ids
    few = to_blocks(DOCUMENTS, tokenizer(), 24, packing=False, limit=4).ids
    assert torch.equal(few, rows[[2, 7, 12, 17]])


def test_without_packing_a_document_is_a_row():
    words = tokenizer(begins=True)
    blocks = to_blocks(DOCUMENTS, words, 24, packing=False)
    assert blocks.ids.shape == (20, 24)
    for row, document in enumerate(DOCUMENTS):
        ids = [*words(document.text)["input_ids"], 1][:24]
        assert blocks.ids[row, : len(ids)].tolist() == ids
        assert blocks.labels[row, 1 : len(ids)].tolist() == ids[1:]
        assert (blocks.labels[row, len(ids) :] == IGNORED).all()
        assert int(blocks.attention_mask[row].sum()) == int(blocks.lengths[row]) == len(ids)
    assert (blocks.labels[:, 0] == IGNORED).all()  # nothing predicts the beginning
    assert "longer than 24 tokens" in blocks.notes[0]


def test_the_loss_is_on_the_completion_alone():
    words = tokenizer(begins=True)
    blocks = to_blocks([Document(" because it rains.", prompt="Take an umbrella,")], words, 64, packing=False)
    assert judged(blocks, words) == [" because it rains.</s>"]
    assert words.decode(blocks.ids[0][: int(blocks.lengths[0])]) == "<s>Take an umbrella, because it rains.</s>"


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_the_loss_is_on_the_assistants_turns(template):
    words = tokenizer(chat_template=template)
    blocks = to_blocks([Document("", messages=TURNS)], words, 64, packing=False)
    assert judged(blocks, words) == ["Because.</s>", "Yes, indeed.</s>"]


def test_a_template_that_does_not_repeat_its_generation_prompt():
    words = tokenizer(chat_template=CHAT.replace("%}<|assistant|>{", "%}<|assistant|>thinking: {"))
    blocks = to_blocks([Document("", messages=TURNS)], words, 64, packing=False)
    assert judged(blocks, words) == ["Because.</s>", "Yes, indeed.</s>"]


def test_sequences_without_a_label_are_left_out():
    long = Document("yes", prompt="word " * 60)
    blocks = to_blocks([long, *DOCUMENTS[:2]], tokenizer(), 16, packing=False)
    assert len(blocks) == 2
    assert "1 sequence without any token to predict" in " ".join(blocks.notes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: to_blocks(DOCUMENTS[:2], tokenizer(), 512),
            r"2 documents give \d+ tokens and 0 sequences.*512 tokens",
        ),
        (lambda: to_blocks(DOCUMENTS[:2], tokenizer(), 8, packing=False, least=4), "expected at least 4 documents"),
        (lambda: to_blocks(DOCUMENTS, tokenizer(), 1), "length=1"),
        (lambda: to_blocks(DOCUMENTS, tokenizer(), 8, limit=1, least=2), "1 sequences are too few"),
        (lambda: to_blocks(DOCUMENTS, tokenizer(), 32, vocabulary=200), r"the id 2\d\d, the model has 200"),
        (lambda: to_blocks([Document("", messages=TURNS)], tokenizer(), 8), "has no chat template"),
        (
            lambda: to_blocks(
                [Document("", messages=TURNS)], tokenizer(chat_template="{{ raise_exception('no') }}"), 8
            ),
            "does not take a conversation: no",
        ),
        (
            lambda: to_blocks([Document("", messages=TURNS)], tokenizer(chat_template="{{ messages[0].content }}"), 8),
            "does not show where the assistant",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(lp.ProbeError, match=words):
        call()


def test_the_tokenizer_is_loaded_or_missed(tmp_path):
    saved = tmp_path / "with"
    tokenizer().save_pretrained(saved)
    found = load_tokenizer(tmp_path, saved)
    assert len(found) == VOCABULARY
    assert isinstance(found, hf.PreTrainedTokenizerBase)
    with pytest.raises(lp.ProbeError, match=r"has no tokenizer \(looked for tokenizer\.json"):
        load_tokenizer(tmp_path)
    (saved / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(lp.ProbeError, match="cannot be loaded"):
        load_tokenizer(saved)
