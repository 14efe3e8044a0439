"""`LLM(base_url=…)`: the same calls, answered by a running fleet."""

import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from baton.beam_search import BeamSearchParams
from baton.client.api import ApiClient, ApiError
from baton.client.loop import LoopThread
from baton.client.pool import in_order
from baton.client.pooling import embed_job, score_jobs
from baton.client.sampling import (
    AnswerReader,
    cumulative_logprob,
    default_params,
    sampling_fields,
)
from baton.client.tokenizer import RemoteTokenizer
from baton.errors import BatonError, Cause, InvalidRequest
from baton.llm import LLM, Conversation, Prompt, Rate, as_list, split_prompt
from baton.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from baton.pooling import PoolingParams
from baton.types import SamplingParams

T = TypeVar("T")
_COMPLETIONS = "/v1/completions"


class RemoteLLM(LLM):
    """A client of a fleet. What is sent is whole: seeds are drawn here, and the fleet's defaults
    count only where `generate` gets no parameters, so outputs are those of `LLM` in process."""

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        seed: int = 0,
        max_inflight: int = 256,
        **options: Any,
    ) -> None:
        """
        Args:
            model: name in the API; the first one served if None.
            base_url: of the gateway, with or without `/v1`.
            max_inflight: requests under way at once; busy servers are asked again.

        Raises:
            ValueError: no HTTP URL, or an option that the fleet decides.
            BatonError: nobody answers there, or serves no such model.
        """
        if options:
            raise ValueError(f"with base_url the fleet decides: {', '.join(sorted(options))}")
        assert base_url is not None, "LLM sees to it"
        self._client = ApiClient(base_url, api_key=api_key)
        self._max_inflight = max_inflight
        self._seeds = random.Random(seed)
        self._loop = LoopThread()
        self._is_open = True
        try:
            self._loop.run(self._client.__aenter__())
            self._model, self._max_model_len = self._loop.run(self._found(model))
        except BaseException:
            self.close()
            raise
        self._remote_tokenizer = RemoteTokenizer(self._post, self._loop)

    async def _found(self, name: str | None) -> tuple[str, int]:
        """(name, length) of the model."""
        models = await _told(self._client.models())
        found = [model for model in models if name in (None, model["id"])]
        if not found:
            names = ", ".join(str(model["id"]) for model in models)
            raise InvalidRequest(
                f"no model {name!r} is served; there are: {names}", "model", Cause.MODEL_NOT_FOUND
            )
        return str(found[0]["id"]), int(found[0]["max_model_len"])

    # ── use ──────────────────────────────────────────────────────────────────────────────────────

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """`LLM.generate`; what one refused request leaves of the others is given up."""
        parsed = [split_prompt(prompt) for prompt in as_list(prompts)]
        params = [self._resolved(one) for one in self._params(sampling_params, len(parsed))]
        jobs = [self._job(*prompt, one) for prompt, one in zip(parsed, params, strict=True)]
        with tqdm(total=len(jobs), desc="Generating", unit="prompt", disable=not use_tqdm) as bar:
            return self._all(jobs, Rate(bar).add)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """`LLM.beam_search`, run by the gateway."""
        parsed = [split_prompt(prompt) for prompt in as_list(prompts)]
        return self._all([self._beam_job(text, ids, params) for text, ids in parsed])

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """`LLM.chat`, rendered by the gateway."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        options = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            "tools": tools and list(tools),
            "chat_template_kwargs": chat_template_kwargs and dict(chat_template_kwargs),
        }
        given = {name: value for name, value in options.items() if value is not None}

        def job(conversation: Conversation) -> Callable[[], Awaitable[tuple[str, list[int]]]]:
            return lambda: self._remote_tokenizer.rendered(conversation, **given)

        rendered = self._all([job(conversation) for conversation in conversations])
        prompts = [{"prompt": text, "prompt_token_ids": ids} for text, ids in rendered]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """`LLM.embed`. The API does not say the ids of texts: their `prompt_token_ids` are []."""
        params = pooling_params or PoolingParams()
        inputs = [split_prompt(prompt) for prompt in as_list(prompts)]
        jobs = [embed_job(self._post, *one, params) for one in inputs]
        with tqdm(total=len(jobs), desc="Embedding", unit="text", disable=not use_tqdm) as bar:
            return self._all(jobs, lambda _: bar.update())

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """`LLM.score`. The API does not say the ids of texts: `prompt_token_ids` are []."""
        jobs = score_jobs(self._post, data_1, data_2, pooling_params or PoolingParams())
        with tqdm(desc="Scoring", unit="pair", disable=not use_tqdm) as bar:
            found = self._all(jobs, lambda some: bar.update(len(some)))
        return [output for some in found for output in some]

    def get_tokenizer(self) -> RemoteTokenizer:  # type: ignore[override]
        """Has `encode`, `decode`, `render_chat`, `encode_chat` and `token_text`."""
        return self._remote_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the fleet takes for fields that a request leaves out."""
        path = f"{_COMPLETIONS}/render"
        (rendered,) = self._run(self._post(path, {"prompt": [0]}))
        return default_params(rendered["sampling_params"])

    def close(self) -> None:
        """End what is under way. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._loop.run(self._client.__aexit__(None, None, None))
            self._loop.close()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def _resolved(self, params: SamplingParams) -> SamplingParams:
        """With a seed, drawn as in process."""
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        return replace(params, seed=seed)

    def _job(
        self, text: str | None, ids: tuple[int, ...] | None, params: SamplingParams
    ) -> Callable[[], Coroutine[Any, Any, RequestOutput]]:
        body = {
            **sampling_fields(params, self._max_model_len),
            "prompt": text if ids is None else list(ids),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

        async def job() -> RequestOutput:
            reader = AnswerReader(await self._post(_COMPLETIONS, body), params)
            texts = await self._remote_tokenizer.strings(list(reader.token_ids()))
            return reader.output(text, texts)

        return job

    def _beam_job(
        self, text: str | None, ids: tuple[int, ...] | None, params: BeamSearchParams
    ) -> Callable[[], Coroutine[Any, Any, BeamSearchOutput]]:
        body = {
            "prompt": text if ids is None else list(ids),
            "use_beam_search": True,
            "n": params.beam_width,
            "max_tokens": min(params.max_tokens, self._max_model_len),
            "length_penalty": params.length_penalty,
            "ignore_eos": params.ignore_eos,
            "allowed_token_ids": params.allowed_token_ids,
            "temperature": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
        }

        async def job() -> BeamSearchOutput:
            answer = await self._post(_COMPLETIONS, body)
            prompt = answer["choices"][0]["prompt_token_ids"]
            beams = [await self._beam(prompt, choice) for choice in answer["choices"]]
            return BeamSearchOutput(beams)

        return job

    async def _beam(self, prompt: list[int], choice: Mapping[str, Any]) -> BeamSearchSequence:
        tokens = [*prompt, *choice["token_ids"]]
        body = {"tokens": tokens, "skip_special_tokens": True}
        text = (await self._post("/detokenize", body))["prompt"]
        return BeamSearchSequence(tokens, text, cumulative_logprob(choice), choice["finish_reason"])

    def _all(
        self,
        jobs: Sequence[Callable[[], Awaitable[T]]],
        on_finished: Callable[[T], object] = lambda _: None,
    ) -> list[T]:
        return self._run(in_order(jobs, self._max_inflight, on_finished))

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if not self._is_open:
            coroutine.close()
            raise RuntimeError("this LLM is closed")
        return self._loop.run(coroutine)

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        named = {"model": self._model, **body}
        return await _told(self._client.post_patiently(path, named))


async def _told(call: Awaitable[T]) -> T:
    """Raises BatonError for ApiError."""
    try:
        return await call
    except ApiError as error:
        _raise_from(error)


def _raise_from(error: ApiError) -> NoReturn:
    status = error.status
    if status is None:
        raise BatonError(Cause.NO_WORKER, error.message) from error
    cause = Cause.__members__.get(error.kind.partition(" ")[2].upper())
    if status == 401:
        cause = Cause.UNAUTHENTICATED
    if 400 <= status < 500 and status not in (408, 429):
        raise InvalidRequest(error.message, error.param, cause or Cause.INVALID_REQUEST) from error
    raise BatonError(cause or Cause.INTERNAL, error.message) from error
