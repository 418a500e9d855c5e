"""The tiny models' tokenizer: byte-level BPE in which every word of the tiny world is one token."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nla_hub.tiny.document import BOS, END, role_mark

__all__ = ["CHAT_TEMPLATE", "MARKER", "ROLES", "build_tokenizer"]

EOS, PAD = "<|eos|>", "<|pad|>"
ROLES = ("user", "assistant", "system", "tool")
# U+32A5, an enclosed ideograph that no ordinary text contains: the place that a vector takes in an AV prompt.
MARKER = "㊥"
TAGS = (MARKER, "<v>", "</v>", "<text>", "</text>", "<explanation>", "</explanation>")

# One turn is "<|role|> content<|end|>"; the blank belongs to the first word of the content.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in " + str(list(ROLES)) + " %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# A word takes the blank before it, digits stand alone, so do punctuation marks: stable pieces in every context.
PIECES = r" ?\p{L}+(?:-\p{L}+)*| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s"


def build_tokenizer(
    texts: Iterable[str], *, merges: int = 160, min_count: int = 2, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """A tokenizer for `texts`: 256 bytes, `merges` learned pairs, and each piece seen `min_count` times as one token.

    Whole words are looked up before any merge (`ignore_merges`), so the table needs no word prefixes; everything
    else still encodes, byte by byte at worst, and decodes to itself.
    """
    texts = list(texts)
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    specials = [PAD, BOS, EOS, END, *map(role_mark, ROLES)]
    marks = re.compile("|".join(map(re.escape, (*specials, *TAGS))))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    size = len(alphabet) + merges
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    plain = [part for text in texts for part in marks.split(text) if part]
    learner.train_from_iterator(plain, trainer)
    learned: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]

    pieces = Counter(piece for part in plain for piece, _ in split.pre_tokenize_str(part))
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    kept: list[tuple[str, str]] = []
    for left, right in learned:
        kept.append((left, right))
        vocabulary.setdefault(left + right, len(vocabulary))
    for piece in sorted(pieces):
        if pieces[piece] >= min_count:
            vocabulary.setdefault(piece, len(vocabulary))

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=kept, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[END, *map(role_mark, ROLES)],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
