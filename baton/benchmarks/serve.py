"""`baton bench serve`: requests to a running server at a rate or a concurrency, measured here."""

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tqdm import tqdm

from baton.benchmarks.arrivals import offsets
from baton.benchmarks.datasets import Options, Sample, Texts, load
from baton.benchmarks.measure import Outcome, measure
from baton.benchmarks.metrics import summarize
from baton.benchmarks.texts import LocalTexts, ServerTexts
from baton.client.api import ApiClient, ApiError
from baton.client.pool import in_order
from baton.text import Tokenizer

ENDPOINTS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
_RETRY_S = 1.0
_MAX_INFLIGHT = 64  # of what prepares a run


@dataclass(frozen=True, slots=True)
class Settings:
    """vLLM's names and meanings."""

    url: str
    dataset: Options
    backend: str = "openai"
    endpoint: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    api_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    request_rate: float = float("inf")
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ignore_eos: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)  # and `--extra-body`
    num_warmups: int = 0
    ready_check_timeout_sec: float = 0.0
    self_timed: bool = True
    percentile_metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    metric_percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float] = field(default_factory=dict)
    label: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    keep_text: bool = False
    use_tqdm: bool = True


@dataclass(frozen=True, slots=True)
class Run:
    """What a benchmark found. `result` has vLLM's fields."""

    result: dict[str, Any]
    outcomes: list[Outcome]


async def run(settings: Settings) -> Run:
    """
    Raises:
        ApiError: the server cannot be reached, or refuses even a first request.
        DatasetError: no prompts can be made.
        ValueError: the tokenizer cannot be read.
    """
    async with ApiClient(settings.url, api_key=settings.api_key, headers=settings.headers) as api:
        await _ready(api, settings.ready_check_timeout_sec)
        model = settings.model or str((await api.models())[0]["id"])
        texts: Texts = ServerTexts(api, model)
        if settings.tokenizer is not None:
            texts = LocalTexts(Tokenizer.from_pretrained(settings.tokenizer))
        samples = await load(settings.dataset, texts)
        load_ = Load(api, settings, model, await _prompts(samples, settings, texts))
        await load_.warm_up()
        return await load_.run()


async def _ready(api: ApiClient, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            await api.models()
            return
        except ApiError as error:
            if time.monotonic() >= deadline or not error.is_passing:
                raise
        await asyncio.sleep(_RETRY_S)


async def _prompts(
    samples: Sequence[Sample], settings: Settings, texts: Texts
) -> list[tuple[Sample, dict[str, Any]]]:
    """Each with the field that carries its prompt: ids, or for a chat their text."""
    if ENDPOINTS[settings.backend] == ENDPOINTS["openai"]:
        return [(sample, {"prompt": sample.prompt}) for sample in samples]
    jobs = [lambda sample=sample: texts.decode(sample.prompt) for sample in samples]
    decoded = await in_order(jobs, _MAX_INFLIGHT, lambda _: None)
    return [
        (sample, {"messages": [{"role": "user", "content": text}]})
        for sample, text in zip(samples, decoded, strict=True)
    ]


class Load:
    """Sends the requests of one run."""

    def __init__(
        self,
        api: ApiClient,
        settings: Settings,
        model: str,
        prompts: list[tuple[Sample, dict[str, Any]]],
    ) -> None:
        self._api = api
        self._settings = settings
        self._model = model
        self._prompts = prompts
        self._path = settings.endpoint or ENDPOINTS[settings.backend]
        self._room: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
        if settings.max_concurrency is not None:
            self._room = asyncio.Semaphore(settings.max_concurrency)

    async def warm_up(self) -> None:
        """
        Raises:
            ApiError: one failed.
        """
        prompts = (self._prompts * self._settings.num_warmups)[: self._settings.num_warmups]
        for outcome in await asyncio.gather(*(self._measured(*prompt) for prompt in prompts)):
            if not outcome.ok:
                raise ApiError(f"warm-up: {outcome.error}", outcome.kind)

    async def run(self) -> Run:
        times = self._times()
        lags: list[float] = []
        tasks: list[asyncio.Task[Outcome]] = []
        with tqdm(total=len(self._prompts), disable=not self._settings.use_tqdm) as bar:
            cpu, start = time.process_time(), time.perf_counter()
            for prompt, due in zip(self._prompts, times, strict=True):
                if (wait_s := start + due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                lags.append(time.perf_counter() - start - due if due else 0.0)
                tasks.append(asyncio.create_task(self._one(*prompt, bar)))
            outcomes = list(await asyncio.gather(*tasks))
            duration = time.perf_counter() - start
        client = {
            "client_cpu_share": (time.process_time() - cpu) / duration,
            "max_send_lag_ms": 1e3 * max(lags),
        }
        return Run({**self._head(), **self._figures(outcomes, duration), **client}, outcomes)

    def _times(self) -> list[float]:
        settings, samples = self._settings, [sample for sample, _ in self._prompts]
        own = [sample.at_s for sample in samples if sample.at_s is not None]
        if settings.self_timed and len(own) == len(samples):
            return own
        rng = random.Random(settings.dataset.seed)
        return offsets(len(samples), settings.request_rate, settings.burstiness, rng)

    async def _one(self, sample: Sample, prompt: dict[str, Any], bar: "tqdm[Any]") -> Outcome:
        async with self._room:
            outcome = await self._measured(sample, prompt)
        bar.update()
        return outcome

    async def _measured(self, sample: Sample, prompt: dict[str, Any]) -> Outcome:
        is_chat = "messages" in prompt
        body = {
            "model": self._model,
            **prompt,
            "max_completion_tokens" if is_chat else "max_tokens": sample.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self._settings.ignore_eos else {}),
            **self._settings.sampling,
        }
        keep = self._settings.keep_text
        return await measure(self._api, self._path, body, len(sample.prompt), keep_text=keep)

    def _head(self) -> dict[str, Any]:
        settings = self._settings
        rate = settings.request_rate
        return {
            "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": settings.backend,
            "backend": settings.backend,
            "label": settings.label,
            "model_id": self._model,
            "tokenizer_id": settings.tokenizer or self._model,
            "num_prompts": len(self._prompts),
            **settings.metadata,
            "request_rate": "inf" if rate == float("inf") else rate,
            "burstiness": settings.burstiness,
            "max_concurrency": settings.max_concurrency,
        }

    def _figures(self, outcomes: Sequence[Outcome], duration: float) -> dict[str, Any]:
        return summarize(
            outcomes,
            duration,
            percentile_metrics=self._settings.percentile_metrics,
            percentiles=self._settings.metric_percentiles,
            goodput=self._settings.goodput,
        )
