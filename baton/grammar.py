"""Structured output: from a specification to a matcher that says which tokens may come next.

llguidance does the work (Earley parsing over a lexer of derivatives; it compiles in milliseconds
and has limits on everything). Here is how it is told about a model's tokens, what each kind of
specification means in its language, and a cache. Never imports torch: the gateway compiles too, to
refuse a bad specification before a worker sees it.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from baton.errors import Cause, InvalidRequest
from baton.text.tokenizer import Tokenizer
from baton.types import StructuredKind, StructuredOutput

PARAM = "structured_outputs"
MAX_DEPTH = 32  # of JSON texts
MAX_CACHED = 256  # compiled grammars
# Their texts together: a compiled one takes up to a hundred times as much as its text.
MAX_CACHED_CHARS = 4 << 20
MAX_MESSAGE = 200  # characters of what the compiler says
# About 50 k units of fuel a millisecond: what is over is refused as too complex.
# Not to be followed to its end: a text that can only go on in one way, because some have no end
# (`start: /a+/ start`) and the compiler has no limit for that. Said last, since the last one holds.
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
_LIMITS = LLParserLimits(
    initial_lexer_fuel=4_000_000, max_lexer_states=100_000, verbose_errors=False
)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)


class Grammars:
    """Compiled grammars of one model. Thread-safe.

    Made without cost; the first grammar loads the tokenizer and its table of tokens.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Tokenizer] | None,
        vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        """
        Args:
            load_tokenizer: called at most once; None: there is none, nothing can be compiled.
            vocab_size: width of the logits; ids that the tokenizer lacks are never allowed.
        """
        self.vocab_size = vocab_size
        self._load_tokenizer = load_tokenizer
        self._eos_token_ids = [i for i in eos_token_ids if i < vocab_size]
        self._tokenizer: LLTokenizer | None = None
        self._special: Mapping[str, int] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._compiled: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()

    @property
    def is_loaded(self) -> bool:
        """Whether the table of tokens is there."""
        return self._tokenizer is not None

    def __contains__(self, spec: StructuredOutput) -> bool:
        """Whether `matcher` answers at once."""
        with self._lock:
            return spec in self._compiled

    def matcher(self, spec: StructuredOutput) -> LLMatcher:
        """A matcher at the start of the output; the caller's own.

        Raises:
            InvalidRequest: the specification means nothing, nothing matches it, or it is too
                complex; `param` is `structured_outputs`.
        """
        with self._lock:
            compiled = self._compiled.get(spec)
            if compiled is not None:
                self._compiled.move_to_end(spec)
                return compiled.deep_copy()
        made = self.compile(spec)
        with self._lock:
            self._compiled[spec] = made
            self._make_room()
            return made.deep_copy()

    def _make_room(self) -> None:
        num_chars = sum(len(spec.text) for spec in self._compiled)
        while num_chars > MAX_CACHED_CHARS or len(self._compiled) > MAX_CACHED:
            oldest, _ = self._compiled.popitem(last=False)
            num_chars -= len(oldest.text)

    def forget(self, spec: StructuredOutput) -> None:
        """Compile it anew the next time."""
        with self._lock:
            self._compiled.pop(spec, None)

    def compile(self, spec: StructuredOutput) -> LLMatcher:
        """As `matcher`, not from the cache nor into it."""
        tokenizer = self._loaded()
        matcher = LLMatcher(
            tokenizer, to_llguidance(spec, self._special), log_level=0, limits=_LIMITS
        )
        if matcher.is_error():
            raise InvalidRequest(_readable(matcher.get_error()), PARAM)
        if not any(matcher.compute_bitmask()) or matcher.is_error():
            raise InvalidRequest("no text fits this specification", PARAM)
        return matcher

    def _loaded(self) -> LLTokenizer:
        with self._loading:
            if self._tokenizer is None:
                if self._load_tokenizer is None or not self._eos_token_ids:
                    message = "structured output needs a model with a tokenizer and an EOS token"
                    raise InvalidRequest(message, PARAM, Cause.UNSUPPORTED)
                tokenizer = self._load_tokenizer()
                eos = self._eos_token_ids
                vocabulary = _Vocabulary(tokenizer, self.vocab_size, eos[0])
                self._special = {tokenizer.token_text(i): i for i in vocabulary.special_token_ids}
                self._tokenizer = LLTokenizer(
                    TokenizerWrapper(vocabulary), n_vocab=self.vocab_size, eos_token=eos
                )
            return self._tokenizer


def to_llguidance(spec: StructuredOutput, special_tokens: Collection[str] = ()) -> str:
    """The grammar in llguidance's own notation, a dialect of Lark's. `special_tokens`: texts of the
    model's.

    Raises:
        InvalidRequest: the text is not what its kind says.
    """
    try:
        return _lark(spec, special_tokens) + _NO_FORCING
    except InvalidRequest:
        raise
    except Exception as error:  # the library's converters raise what they like
        raise InvalidRequest(_readable(str(error)), PARAM) from error


def _lark(spec: StructuredOutput, special_tokens: Collection[str]) -> str:
    match spec.kind:
        case StructuredKind.JSON_OBJECT:
            return _json_grammar({"type": "object"}, spec.any_whitespace)
        case StructuredKind.JSON_SCHEMA:
            return _json_grammar(_json(spec.text), spec.any_whitespace)
        case StructuredKind.REGEX:
            (grammar,) = json.loads(LLMatcher.grammar_from_regex(spec.text))["grammars"]
            return str(grammar["lark_grammar"])
        case StructuredKind.CHOICE:
            return _choice_grammar(json.loads(spec.text))
        case StructuredKind.GRAMMAR:
            return any_to_lark(spec.text)
        case StructuredKind.STRUCTURAL_TAG:
            return _tag_grammar(_json(spec.text), special_tokens)


def _readable(message: str) -> str:
    """What is wrong, in one line; the compiler also shows the text around it, and its state."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    reason = next((line for line in lines if line.startswith("error: ")), lines[0])
    return f"not a usable specification: {reason.removeprefix('error: ')[:MAX_MESSAGE]}"


def _json(text: str) -> object:
    """The parsed text; its depth is looked at first, because parsers recurse."""
    depth = 0
    for part in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0)
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"a schema must not nest deeper than {MAX_DEPTH}", PARAM)
    return json.loads(text)


def _json_grammar(schema: object, any_whitespace: bool) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise InvalidRequest("a JSON schema is an object", PARAM)
    options: Any = {"whitespace_flexible": any_whitespace}
    whole = json.loads(LLMatcher.grammar_from_json_schema(schema, defaults=options))
    return f"start: %json {json.dumps(whole['grammars'][0]['json_schema'])}"


def _choice_grammar(choices: object) -> str:
    is_list = isinstance(choices, list) and bool(choices)
    if not is_list or not all(isinstance(text, str) and text for text in choices):  # type: ignore[attr-defined]
        raise InvalidRequest("choice must be a list of texts, none of them empty", PARAM)
    texts = [json.dumps(text, ensure_ascii=False) for text in choices]  # type: ignore[attr-defined]
    return "start: " + " | ".join(texts)


def _tag_grammar(tag: object, special_tokens: Collection[str]) -> str:
    """Free text in which every trigger starts one of the structures."""
    match tag:
        case {"structures": [_, *_] as structures, "triggers": [_, *_] as triggers}:
            tags = [_struct_tag(structure, triggers) for structure in structures]
        case _:
            raise InvalidRequest("a structural tag has structures and triggers", PARAM)
    are_special = [one.trigger in special_tokens for one in tags]
    if any(are_special) and not all(are_special):
        message = "the triggers of a structural tag are special tokens, or none of them is"
        raise InvalidRequest(message, PARAM)
    return StructTag.to_grammar(tags, assume_special=all(are_special))


def _struct_tag(structure: object, triggers: Sequence[object]) -> StructTag:
    match structure:
        case {"begin": str() as begin, "end": str() as end, **rest}:
            schema = rest.get("schema") or {}
        case _:
            raise InvalidRequest("a structure has begin, schema and end", PARAM)
    for trigger in triggers:
        if isinstance(trigger, str) and trigger and begin.startswith(trigger):
            return StructTag(trigger=trigger, begin=begin, grammar=json.dumps(schema), end=end)
    raise InvalidRequest("a structure's begin starts with none of the triggers", PARAM)
