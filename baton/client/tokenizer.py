"""The tokenizer of a running fleet, asked over HTTP."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from baton.client.loop import LoopThread

Post = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
_MANY = 8192  # ids in one question


class RemoteTokenizer:
    """What `baton.text.Tokenizer` says of texts and ids; each call is a request.

    Every method raises what `LLM.generate` raises.
    """

    def __init__(self, post: Post, loop: LoopThread) -> None:
        self._post = post
        self._loop = loop
        self._strings: dict[int, str] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        body = {"prompt": text, "add_special_tokens": add_special_tokens}
        return list(self._loop.run(self._asked("/tokenize", body))["tokens"])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        body = {"tokens": list(token_ids), "skip_special_tokens": skip_special_tokens}
        return str(self._loop.run(self._asked("/detokenize", body))["prompt"])

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """`options` are fields of the chat API."""
        return self._loop.run(self.rendered(messages, **options))[0]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """`options` are fields of the chat API."""
        return self._loop.run(self.rendered(messages, **options))[1]

    def token_text(self, token_id: int) -> str:
        """What the token adds inside a text; "" for an id outside the vocabulary."""
        return self._loop.run(self.strings([token_id]))[token_id]

    async def rendered(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> tuple[str, list[int]]:
        """(text, ids) of a chat."""
        body = {"messages": list(messages), "return_prompt_text": True, **options}
        answer = await self._post("/tokenize", body)
        return answer["prompt_text"], answer["tokens"]

    async def strings(self, token_ids: Sequence[int]) -> Mapping[int, str]:
        """Texts of these ids, and of others that were asked for before."""
        missing = sorted({i for i in token_ids if i not in self._strings})
        for start in range(0, len(missing), _MANY):
            ids = missing[start : start + _MANY]
            body = {"tokens": ids, "return_token_strs": True}
            texts = (await self._post("/detokenize", body))["token_strs"]
            self._strings.update(zip(ids, texts, strict=True))
        return self._strings

    async def _asked(self, path: str, body: Mapping[str, Any]) -> Any:
        return await self._post(path, body)
