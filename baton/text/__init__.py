"""Texts and token ids: tokenizer, chat template, detokenizer, stop strings. Never imports torch."""

from baton.text.bad_words import bad_words_token_ids
from baton.text.chat_template import ChatTemplate, message_text
from baton.text.detokenizer import IncrementalDetokenizer
from baton.text.output_text import OutputText
from baton.text.pool import TokenizerPool
from baton.text.stop_strings import StopStringMatcher
from baton.text.tokenizer import Tokenizer, TokenizerFiles

__all__ = [
    "ChatTemplate",
    "IncrementalDetokenizer",
    "OutputText",
    "StopStringMatcher",
    "Tokenizer",
    "TokenizerFiles",
    "TokenizerPool",
    "bad_words_token_ids",
    "message_text",
]
