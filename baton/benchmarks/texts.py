"""Where a benchmark's tokenizer is: in a folder, or at the server that is measured."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from baton.benchmarks.datasets import DatasetError
from baton.client.api import ApiClient, ApiError
from baton.text import Tokenizer


class LocalTexts:
    """A tokenizer in this process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def encode(self, text: str) -> list[int]:
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=False)

    async def decode(self, token_ids: Sequence[int]) -> str:
        return await asyncio.to_thread(self._tokenizer.decode, token_ids)


class ServerTexts:
    """The server's own, through /tokenize and /detokenize.

    Both raise DatasetError.
    """

    def __init__(self, client: ApiClient, model: str) -> None:
        self._client = client
        self._model = model

    async def encode(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return list((await self._post("/tokenize", body))["tokens"])

    async def decode(self, token_ids: Sequence[int]) -> str:
        body = {"model": self._model, "tokens": list(token_ids)}
        return str((await self._post("/detokenize", body))["prompt"])

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return dict(await self._client.post_patiently(path, body))
        except ApiError as error:
            without = "" if error.param == "model" else "; --tokenizer DIR does without"
            raise DatasetError(f"{path}: {error.message}{without}") from error
