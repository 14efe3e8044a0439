"""A byte-level tokenizer for the tiny random models: their ids 0..2 are special, then every byte,
then a few pieces of JSON; ids above are nobody's."""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from baton.text import Tokenizer, TokenizerFiles

PIECES = ['{"', '":', '",', '"}', "},", "[]", "{}", "tr", "ue", "true", "nu", "ll", "null", "12"]


def tiny_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<bos>", "</s>", *alphabet, *PIECES]
    merges = [
        (left, right)
        for word in PIECES
        for left, right in ((word[:i], word[i:]) for i in range(1, len(word)))
        if left in words and right in words
    ]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<bos>", "</s>"])
    return Tokenizer(backend, TokenizerFiles(tokenizer_config={"eos_token": "</s>"}))
