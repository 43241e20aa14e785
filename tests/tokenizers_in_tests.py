"""A small real tokenizer: byte-level BPE of the built-in prompts, that writes any text."""

from functools import lru_cache

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lowrank_probe.texts import prompts

VOCABULARY = 300
SPECIAL = ("<s>", "</s>", "<mask>", "<|user|>", "<|assistant|>")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


def tokenizer(begins: bool = False, **keys):
    """ids 0 <s>, 1 </s> (also padding), 2 <mask>; begins: whether <s> is put before a text."""
    bpe = Tokenizer.from_str(_trained())
    if begins:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    keys = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "mask_token": "<mask>"} | keys
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, **keys)


@lru_cache(maxsize=1)
def _trained():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(prompts(), trainer)
    return bpe.to_str()
