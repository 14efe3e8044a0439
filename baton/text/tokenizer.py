"""A model's tokenizer and what its files say about texts: special ids, chat template, defaults.

Only `tokenizers` and Jinja are needed, so the gateway starts without torch or transformers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from baton.errors import InvalidRequest
from baton.text.chat_template import ChatTemplate
from baton.text.detokenizer import IncrementalDetokenizer, TokenBytes
from baton.text.input_frame import InputFrame

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# The fields of generation_config.json that are defaults of a request, as in vLLM.
_DEFAULTS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What surrounds tokenizer.json in a model's folder; absent files are empty."""

    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_map: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # name → Jinja source

    @classmethod
    def read(cls, folder: Path) -> "TokenizerFiles":
        config = _read_json(folder / "tokenizer_config.json")
        return cls(
            tokenizer_config=config,
            special_tokens_map=_read_json(folder / "special_tokens_map.json"),
            generation_config=_read_json(folder / "generation_config.json"),
            model_config=_read_json(folder / "config.json"),
            chat_templates=_read_templates(folder, config),
        )

    def special_tokens(self) -> dict[str, str]:
        """ "eos_token" → "</s>" and so on, as templates see them."""
        merged = {**self.special_tokens_map, **self.tokenizer_config}
        texts = {name: _token_text(merged.get(name)) for name in _SPECIAL_TOKENS}
        return {name: text for name, text in texts.items() if text}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files win over tokenizer_config.json, where a template is a string or a list of {name,
    template}."""
    inline = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list):
        templates = {entry["name"]: entry["template"] for entry in inline}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    main = folder / "chat_template.jinja"
    if main.is_file():
        templates["default"] = main.read_text(encoding="utf-8")
    return templates


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def locate(model: str, revision: str | None = None) -> Path:
    """The folder with a model's tokenizer files: `model` itself if it is one, else fetched from the
    Hugging Face hub (or its local cache).

    Raises:
        ValueError: neither a folder nor a repository that can be read.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{model!r} is neither a folder nor a readable model on the hub: {error}"
        ) from error


class Tokenizer:
    """Texts to ids and back. Thread-safe; encoding releases the interpreter lock."""

    def __init__(self, backend: Backend, files: TokenizerFiles) -> None:
        """`backend` is owned from here on: missing special tokens are added, truncation and padding
        switched off."""
        backend.no_truncation()
        backend.no_padding()
        special = files.special_tokens()
        _add_missing_tokens(backend, files.tokenizer_config, special)
        self._backend = backend
        self._frames: dict[tuple[bool, bool], InputFrame] = {}
        self._token_bytes = TokenBytes(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._id_of(special.get("bos_token"))
        self.eos_token_id = self._id_of(special.get("eos_token"))
        self.eos_token_ids = self._eos_token_ids(files)
        self.truncation_side = str(files.tokenizer_config.get("truncation_side", "right"))
        self.chat_template = (
            ChatTemplate(files.chat_templates, special)
            if "default" in files.chat_templates
            else None
        )
        self.sampling_defaults: Mapping[str, float] = {
            name: files.generation_config[name]
            for name in _DEFAULTS
            if files.generation_config.get(name) is not None
        }

    @classmethod
    def from_pretrained(cls, model: str, *, revision: str | None = None) -> "Tokenizer":
        """Reads a local folder or a hub repository.

        Raises:
            ValueError: not found, no tokenizer.json, or one that cannot be used.
        """
        folder = locate(model, revision)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{model!r} has no tokenizer.json (fast tokenizers only)")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: {error}") from error
        return cls(backend, TokenizerFiles.read(folder))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens written out in it count as such. `add_special_tokens` adds
        what the model's post-processor adds (a BOS, usually)."""
        # The library's call for one text keeps the interpreter lock, which may be many seconds.
        (made,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return made.ids

    def encode_input(
        self,
        text: str,
        second: str | None = None,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        truncation_side: str | None = None,
    ) -> tuple[list[int], int | None]:
        """Ids of what a pooling model reads: one text or two, cut to `max_tokens` so that the
        special tokens around them stay. Of two, the longer one is cut first.

        Args:
            truncation_side: "left" or "right", where tokens go; None = as the model's files say.

        Returns: the ids, and where those of `second` begin.
        """
        frame = self._frame(second is not None, add_special_tokens)
        texts = [text] if second is None else [text, second]
        parts = [self.encode(part, add_special_tokens=False) for part in texts]
        if max_tokens is not None:
            room = max(max_tokens - frame.num_special_tokens, 0)
            sizes = _cut([len(part) for part in parts], room)
            keeps_end = (truncation_side or self.truncation_side) == "left"
            parts = [
                part[len(part) - size :] if keeps_end else part[:size]
                for part, size in zip(parts, sizes, strict=True)
            ]
        ids, starts = frame.fill(parts)
        return ids, starts if second is not None else None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, the same that `detokenizer()` streams. Ids outside the vocabulary
        add nothing."""
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return stream.push(token_ids) + stream.finish()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self._token_bytes, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds inside a text; not always whole characters."""
        return self._token_bytes.get(token_id)

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary writes it; "" for an id outside."""
        return str(self._backend.id_to_token(token_id) or "")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are not text: skipped in an output unless somebody wants to see them."""
        return self._token_bytes.special_ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """`ChatTemplate.render` of the model's template.

        Raises:
            InvalidRequest: param "messages": malformed, refused, or the model has no template.
        """
        if self.chat_template is None:
            raise InvalidRequest("this model has no chat template", "messages")
        return self.chat_template.render(messages, **options)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Ids of the rendered chat; the template writes its own special tokens."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def _frame(self, is_pair: bool, add_special_tokens: bool) -> InputFrame:
        key = is_pair, add_special_tokens
        if key not in self._frames:
            self._frames[key] = InputFrame.of(
                self._backend, is_pair=is_pair, add_special_tokens=add_special_tokens
            )
        return self._frames[key]

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _eos_token_ids(self, files: TokenizerFiles) -> tuple[int, ...]:
        """Every id that ends a text: generation_config's, or else config's, and the tokenizer's."""
        configured = files.generation_config.get("eos_token_id")
        if configured is None:
            configured = files.model_config.get("eos_token_id")
        ids = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({i for i in (*ids, self.eos_token_id) if i is not None}))


def _cut(sizes: Sequence[int], room: int) -> list[int]:
    """What is left of parts of these sizes, the longer of two being cut first: as transformers'
    `longest_first`."""
    if len(sizes) == 1 or sum(sizes) <= room:
        return [min(size, room) for size in sizes]
    short = min(sizes)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return [short, long] if sizes[0] <= sizes[1] else [long, short]


def _add_missing_tokens(
    backend: Backend, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """tokenizer_config.json may know added tokens that tokenizer.json lacks, or that are special
    only by their name."""
    declared = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda kv: int(kv[0]))
    for _, token in declared:
        if backend.token_to_id(token["content"]) is None:
            flags = {k: token.get(k, False) for k in ("single_word", "lstrip", "rstrip", "special")}
            flags["normalized"] = token.get("normalized", not flags["special"])
            backend.add_tokens([AddedToken(token["content"], **flags)])
    marked = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    unmarked = [text for text in special.values() if text not in marked]
    if unmarked:
        backend.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in unmarked]
        )
