"""`Tokenizer.encode_input` against transformers, and WordPiece's decoder against the library's."""

import itertools
import time
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from baton.text import Tokenizer, TokenizerFiles

_WORDS = ["relay", "race", "don", "n't", "'s", "'", ".", ",", "!", "?", "??", "x."]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def backend(cleanup: bool = True) -> Backend:
    letters = [chr(code) for code in range(97, 123)]
    words = [*_SPECIAL, *_WORDS, *letters, *(f"##{letter}" for letter in letters), "##s"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    made = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece("##", cleanup)
    made.add_special_tokens(_SPECIAL)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


@pytest.fixture(scope="module")
def theirs() -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(), pad_token="[PAD]", model_input_names=["input_ids"]
    )


OURS = Tokenizer(backend(), TokenizerFiles())
TEXTS = ("relay race", "a", "x. y, z!", "one two three four five")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_tokens", [None, 3, 5, 6, 7, 9, 12])
def test_texts_and_pairs_are_cut_as_transformers_does(
    theirs: transformers.PreTrainedTokenizerFast, side: str, max_tokens: int | None
) -> None:
    theirs.truncation_side = side
    limits = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
    for first, second in itertools.product(TEXTS, (None, *TEXTS)):
        expected = theirs(first, second, return_token_type_ids=True, **limits)
        ids, start = OURS.encode_input(first, second, max_tokens=max_tokens, truncation_side=side)
        assert ids == expected["input_ids"], (first, second)
        types = [0] * len(ids) if start is None else [int(i >= start) for i in range(len(ids))]
        assert types == expected["token_type_ids"]


def test_without_special_tokens() -> None:
    assert OURS.encode_input("a b c", add_special_tokens=False) == (
        OURS.encode("a b c", add_special_tokens=False),
        None,
    )
    ids, _ = OURS.encode_input("a b c", add_special_tokens=False, max_tokens=2)
    assert ids == OURS.encode("a b", add_special_tokens=False)
    assert OURS.encode_input("a b c", max_tokens=1)[0] == OURS.encode("")


def test_cutting_long_texts_costs_no_more_than_reading_them() -> None:
    text = "a " * 3000
    began_s = time.perf_counter()
    for _ in range(2):
        OURS.encode(text)
    alone_s = time.perf_counter() - began_s
    ids, start = OURS.encode_input(text, text, max_tokens=9)
    took_s = time.perf_counter() - began_s - alone_s
    assert (len(ids), start) == (9, 5)
    assert took_s < 5 * alone_s + 0.2


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("pair", ["$A $B:1", "[SEP] $B:1 [CLS] $A:0", "[CLS]:1 $A:1 $B:0 [SEP]:0"])
def test_inputs_are_framed_as_the_post_processor_does(pair: str, add_special_tokens: bool) -> None:
    made = backend()
    made.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    ours = Tokenizer(made, TokenizerFiles())
    for first, second in itertools.product((*TEXTS, ""), (None, *TEXTS, "")):
        expected = made.encode(first, second, add_special_tokens=add_special_tokens)
        ids, start = ours.encode_input(first, second, add_special_tokens=add_special_tokens)
        assert ids == expected.ids
        types = expected.type_ids
        assert start == (types.index(1) if second is not None and 1 in types else None)


def test_the_side_is_the_models() -> None:
    left = Tokenizer(backend(), TokenizerFiles(tokenizer_config={"truncation_side": "left"}))
    assert left.encode_input("a b c", max_tokens=3)[0] == left.encode("c")


@given(st.lists(st.integers(4, 60), max_size=12), st.booleans())
def test_word_pieces_are_decoded_as_the_library_does(ids: list[int], cleanup: bool) -> None:
    made = backend(cleanup)
    assert Tokenizer(made, TokenizerFiles()).decode(ids) == made.decode(ids)


def test_a_folder_with_word_pieces(tmp_path: Path) -> None:
    backend().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("Relay races!")) == "relay races!"
