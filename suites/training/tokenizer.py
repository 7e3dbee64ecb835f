"""A byte-level BPE tokenizer, trained on the text that its model is trained on."""

from __future__ import annotations

from typing import Any

from ..text import Text

END = "<|endoftext|>"
"""Begins a text; the tokenizer never adds it by itself."""


def train(text: Text, vocabulary: int) -> Any:
    """Return a transformers tokenizer with so many tokens: END, the 256 bytes, and merges by frequency."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.content], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
