"""Offline inference: the whole engine in this process, prefill and decode in one place.

    from baton import LLM, SamplingParams

    with LLM("Qwen/Qwen3-0.6B") as llm:
        for output in llm.generate(["def ", "import "], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

Names and meanings are vLLM's. It is also the baseline that disaggregated serving must equal.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import torch
from tqdm import tqdm

from baton.beam_search import Beam, BeamSearch, BeamSearchParams
from baton.build import engine_config, runner_config
from baton.config import OfflineConfig
from baton.engine.core import EngineCore
from baton.engine.loader import load_runner
from baton.engine.pooling_config import is_pooling
from baton.errors import InvalidRequest
from baton.offline import OfflineEngine
from baton.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from baton.pooling import PoolingParams
from baton.text import Tokenizer, bad_words_token_ids
from baton.types import FinishReason, Request, SamplingParams

Prompt = (
    str | Sequence[int] | Mapping[str, Any]
)  # text, ids, {"prompt": …}, {"prompt_token_ids": …}
Conversation = Sequence[Mapping[str, Any]]


class LLMOptions(TypedDict, total=False):
    """What `LLM` takes besides the model; meanings, bounds and defaults are the command line's."""

    tokenizer: str
    revision: str
    runner: str
    hf_overrides: str | Mapping[str, Any]
    pooler_config: str | Mapping[str, Any]
    load_format: str
    dtype: str
    device: str
    seed: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_memory_bytes: int | str
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    batch_invariant: bool
    enforce_eager: bool
    threads: int
    # Of a running fleet; then only these and `seed` count.
    base_url: str
    api_key: str
    max_inflight: int


class LLM:
    """A model, its KV pool and its tokenizer. Not thread-safe.

    A pooling model (embeddings, scores) makes a `baton.pooling_llm.PoolingLLM` of it.

    `LLM(base_url="http://…")` is a client of a running fleet with the same methods and outputs
    (`baton.client.llm.RemoteLLM`): `model` is a served name then, and besides `api_key`, `seed` and
    `max_inflight` there are no options.
    """

    def __new__(cls, model: str | None = None, **options: Unpack[LLMOptions]) -> Self:
        if cls is LLM and options.get("base_url") is not None:
            from baton.client.llm import RemoteLLM

            return super().__new__(RemoteLLM)  # type: ignore[return-value]
        if cls is LLM and _is_pooling(model, options):
            from baton.pooling_llm import PoolingLLM

            return super().__new__(PoolingLLM)  # type: ignore[return-value]
        return super().__new__(cls)

    def __init__(self, model: str | None = None, **options: Unpack[LLMOptions]) -> None:
        """Load `model`, a directory or hub id; the bundled demo model if None.

        `seed` also draws the seeds of requests that come without one, so a program that makes the
        same calls gets the same tokens.

        Raises:
            ValueError: a bad option, or a tokenizer that cannot be used.
            InvalidRequest: the checkpoint cannot be served.
        """
        settings = settings_of_llm(model, options)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._tokenizer = Tokenizer.from_pretrained(
            settings.tokenizer_source, revision=settings.revision
        )
        self._runner = load_runner(runner_config(settings, settings), lambda: self._tokenizer)
        config = engine_config(settings, self._runner)
        self._engine = OfflineEngine(EngineCore(config, self._runner), self._tokenizer)
        self._seeds = random.Random(settings.seed)
        self._request_ids = itertools.count()
        self._is_open = True

    # ── use ──────────────────────────────────────────────────────────────────────────────────────

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; outputs in the order of the prompts.

        `sampling_params`: one for all, or one per prompt; None = `get_default_sampling_params()`.

        Raises:
            InvalidRequest: a prompt or its parameters cannot be served; nothing was computed.
            BatonError: the engine failed at a request; the others were given up.
        """
        if not self._is_open:
            raise RuntimeError("this LLM is closed")
        parsed = [self._parse(prompt) for prompt in as_list(prompts)]
        params = self._params(sampling_params, len(parsed))
        requests = [
            (self._request(ids, one), text) for (text, ids), one in zip(parsed, params, strict=True)
        ]
        with tqdm(
            total=len(requests), desc="Generating", unit="prompt", disable=not use_tqdm
        ) as bar:
            rate = Rate(bar)
            return self._engine.run(requests, rate.add)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best completions of each prompt.

        Every step asks for one more token of every beam, all prompts at once; what beams have in
        common is in the prefix cache.

        Raises:
            InvalidRequest, BatonError: as `generate`.
        """
        parsed = [ids for _, ids in map(self._parse, as_list(prompts))]
        eos = self._runner.info.eos_token_ids
        searches = [BeamSearch(self._cut(params, ids), eos) for ids in parsed]
        while True:
            open_ = [pair for pair in zip(parsed, searches, strict=True) if not pair[1].is_over]
            if not open_:
                break
            requests = [
                self._request((*ids, *beam.token_ids), search.next_params())
                for ids, search in open_
                for beam in search.beams
            ]
            found = iter(self._engine.next_logprobs(requests))
            for _, search in open_:
                search.advance([next(found) for _ in search.beams])
        return [
            self._beams(ids, search.results) for ids, search in zip(parsed, searches, strict=True)
        ]

    def _cut(self, params: BeamSearchParams, prompt: tuple[int, ...]) -> BeamSearchParams:
        room = max(self._runner.info.max_model_len - len(prompt), 1)
        return replace(params, max_tokens=min(params.max_tokens, room))

    def _beams(self, prompt: tuple[int, ...], beams: Sequence[Beam]) -> BeamSearchOutput:
        return BeamSearchOutput(
            [
                BeamSearchSequence(
                    [*prompt, *beam.token_ids],
                    self._tokenizer.decode((*prompt, *beam.token_ids)),
                    beam.cumulative_logprob,
                    "stop" if beam.finish_reason is FinishReason.STOP else "length",
                )
                for beam in beams
            ]
        )

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
        """Answer one conversation or many, rendered with the model's chat template.

        Raises:
            InvalidRequest, BatonError: as `generate`, and when the template refuses the messages.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = [messages] if one else messages
        prompts = [
            self._tokenizer.render_chat(
                conversation,  # type: ignore[arg-type]
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        encoded = [
            {
                "prompt": text,
                "prompt_token_ids": self._tokenizer.encode(text, add_special_tokens=False),
            }
            for text in prompts
        ]
        return self.generate(encoded, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of one text or of many, by an embedding model.

        Raises:
            InvalidRequest: a text cannot be served, or the model does something else.
        """
        raise _unable("embed")

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """How well texts go together, 1:1, 1:N or N:N: by a cross-encoder, or as the cosine of what
        an embedding model makes of them.

        Raises:
            InvalidRequest: a text cannot be served, or the model does something else.
        """
        raise _unable("score")

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's generation_config.json over the class's defaults."""
        return SamplingParams(**self._tokenizer.sampling_defaults)  # type: ignore[arg-type]

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def _parse(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        """(text, token ids); the text is None when only ids were given."""
        text, ids = split_prompt(prompt)
        return text, tuple(self._tokenizer.encode(text or "")) if ids is None else ids

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * num_prompts
        if len(given) != num_prompts:
            raise InvalidRequest(
                f"{len(given)} sampling_params for {num_prompts} prompts", "sampling_params"
            )
        return given

    def _request(self, prompt: tuple[int, ...], params: SamplingParams) -> Request:
        """Checked; the seed drawn if there is none, max_tokens cut to what the model's length
        leaves, as vLLM does."""
        room = max(self._runner.info.max_model_len - len(prompt), 1)
        max_tokens = min(room, params.max_tokens or room)
        params = replace(
            params,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
        )
        if "" in params.stop:
            raise InvalidRequest("stop must not have an empty string", "stop")
        if params.bad_words:
            ids = bad_words_token_ids(self._tokenizer, params.bad_words)
            params = replace(params, bad_words_token_ids=ids)
        if params.structured_outputs is not None:
            self._runner.grammars.matcher(params.structured_outputs)
        request = Request(str(next(self._request_ids)), prompt, params)
        self._engine.check(request)
        return request


def settings_of_llm(model: str | None, options: LLMOptions) -> OfflineConfig:
    """
    Raises:
        ValueError: an unknown option, or a bad value.
    """
    local = {name: value for name, value in options.items() if name != "base_url"}  # None
    return OfflineConfig.model_validate({"model": model, **local})


def _is_pooling(model: str | None, options: LLMOptions) -> bool:
    settings = settings_of_llm(model, options)
    return is_pooling(settings.model_source, settings.revision, settings.runner)


def _unable(what: str) -> InvalidRequest:
    return InvalidRequest(f"the model does not {what}: it generates text", "model")


class Rate:
    """Shows a progress bar's tokens per second."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar = bar
        self._num_input_tokens = self._num_output_tokens = 0

    def add(self, output: RequestOutput) -> None:
        self._num_input_tokens += len(output.prompt_token_ids)
        self._num_output_tokens += sum(len(choice.token_ids) for choice in output.outputs)
        seconds = max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(
            f"in {self._num_input_tokens / seconds:.0f} tok/s, "
            f"out {self._num_output_tokens / seconds:.0f} tok/s",
            refresh=False,
        )
        self._bar.update()


def as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def split_prompt(prompt: Prompt) -> tuple[str | None, tuple[int, ...] | None]:
    """(text, token ids): one of them or both, as given.

    Raises:
        InvalidRequest: no prompt.
    """
    match prompt:
        case str():
            return prompt, None
        case {"prompt": str() as text, "prompt_token_ids": ids}:
            return text, _token_ids(ids)
        case {"prompt_token_ids": ids}:
            return None, _token_ids(ids)
        case {"prompt": str() as text}:
            return text, None
    return None, _token_ids(prompt)


def _token_ids(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or any(type(i) is not int for i in ids):
        raise InvalidRequest(
            "a prompt is a text, a list of token ids, or a mapping with `prompt` or "
            "`prompt_token_ids`",
            "prompt",
        )
    return tuple(ids)
