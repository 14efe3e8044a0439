"""`LLM` of a pooling model: embeddings and scores in this process.

with LLM("BAAI/bge-small-en-v1.5") as llm:
    (output,) = llm.embed("A relay race")
    print(output.outputs.embedding)
"""

import itertools
from collections.abc import Sequence
from typing import Any, NoReturn, Unpack

import torch
from tqdm import tqdm

from baton.build import runner_config
from baton.engine.pooling_core import AbortJob, AddJob, PoolingCore, PoolingRow
from baton.engine.pooling_loader import load_pooling_runner
from baton.errors import BatonError, Cause, InvalidRequest
from baton.llm import LLM, LLMOptions, Prompt, as_list, settings_of_llm, split_prompt
from baton.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from baton.pooling import PoolingInput, PoolingParams, PoolingTask, check_input
from baton.scoring import distinct_texts, pair_up, to_cosines, to_scores, to_vector
from baton.text import Tokenizer


class PoolingLLM(LLM):
    """What generates tokens raises InvalidRequest here."""

    def __init__(self, model: str | None = None, **options: Unpack[LLMOptions]) -> None:
        """
        Raises:
            ValueError: a bad option, or a tokenizer that cannot be used.
            InvalidRequest: the checkpoint cannot be served.
        """
        settings = settings_of_llm(model, options)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        source, revision = settings.tokenizer_source, settings.revision
        self._tokenizer = Tokenizer.from_pretrained(source, revision=revision)
        runner = load_pooling_runner(runner_config(settings, settings))
        self._info = runner.info
        self._core = PoolingCore(runner, settings.max_num_batched_tokens, settings.max_num_seqs)
        self._numbers = itertools.count()
        self._is_open = True

    # ── use ──────────────────────────────────────────────────────────────────────────────────────

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """See `LLM.embed`."""
        self._check(PoolingTask.EMBED)
        params = pooling_params or PoolingParams()
        self._info.pooling.check_dimensions(params.dimensions, self._info.name)
        inputs = [self._input(prompt, params) for prompt in as_list(prompts)]
        vectors = map(to_vector, self._run(inputs, params, use_tqdm))
        return [
            EmbeddingRequestOutput(self._next_id(), EmbeddingOutput(vector), list(one.token_ids))
            for one, vector in zip(inputs, vectors, strict=True)
        ]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """See `LLM.score`."""
        self._check(PoolingTask.SCORE, PoolingTask.EMBED)
        params = pooling_params or PoolingParams()
        first, second = ([d] if isinstance(d, str) else d for d in (data_1, data_2))
        pairs = pair_up(first, second, "data_2")
        if self._info.pooling.task is PoolingTask.SCORE:
            inputs = [self._pair(*pair, params) for pair in pairs]
            scores = to_scores(self._run(inputs, params, use_tqdm))
            ids = [list(one.token_ids) for one in inputs]
        else:
            texts = distinct_texts(pairs)
            inputs = [self._input(text, params) for text in texts]
            scores = to_cosines(pairs, self._run(inputs, params, use_tqdm))
            of = {text: one.token_ids for text, one in zip(texts, inputs, strict=True)}
            ids = [[*of[one], *of[other]] for one, other in pairs]
        return [
            ScoringRequestOutput(self._next_id(), ScoringOutput(score), token_ids)
            for score, token_ids in zip(scores, ids, strict=True)
        ]

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        raise self._unable("generate text")

    def beam_search(self, *_: Any, **__: Any) -> NoReturn:
        raise self._unable("generate text")

    def close(self) -> None:
        """Idempotent."""
        self._is_open = False

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def _check(self, *tasks: PoolingTask) -> None:
        if not self._is_open:
            raise RuntimeError("this LLM is closed")
        if self._info.pooling.task not in tasks:
            raise self._unable(tasks[0].value)

    def _unable(self, what: str) -> InvalidRequest:
        does = self._info.pooling.task.value
        return InvalidRequest(f"{self._info.name} does not {what}: it {does}s", "model")

    def _next_id(self) -> str:
        return str(next(self._numbers))

    def _max_tokens(self, params: PoolingParams) -> int | None:
        asked, longest = params.truncate_prompt_tokens, self._info.max_model_len
        if asked is not None and asked != -1 and not 1 <= asked <= longest:
            message = f"truncate_prompt_tokens must be -1 or in 1..{longest}"
            raise InvalidRequest(message, "truncate_prompt_tokens")
        return longest if asked == -1 else asked

    def _input(self, prompt: Prompt, params: PoolingParams) -> PoolingInput:
        max_tokens = self._max_tokens(params)
        text, ids = split_prompt(prompt)
        if ids is None:
            encoded, _ = self._tokenizer.encode_input(text or "", max_tokens=max_tokens)
            ids = tuple(encoded)
        elif max_tokens is not None:
            is_left = self._tokenizer.truncation_side == "left"
            ids = ids[-max_tokens:] if is_left else ids[:max_tokens]
        return self._checked(PoolingInput(ids))

    def _pair(self, first: str, second: str, params: PoolingParams) -> PoolingInput:
        ids, start = self._tokenizer.encode_input(
            first, second, max_tokens=self._max_tokens(params)
        )
        return self._checked(
            PoolingInput(tuple(ids), start if self._info.pooling.tells_pairs else None)
        )

    def _checked(self, one: PoolingInput) -> PoolingInput:
        check_input(one, self._info.max_model_len, self._info.vocab_size, "prompts")
        return one

    def _run(
        self, inputs: Sequence[PoolingInput], params: PoolingParams, use_tqdm: bool
    ) -> list[bytes]:
        """
        Raises:
            BatonError: an input failed; the others are given up.
        """
        rows = tuple(PoolingRow(i, params.use_activation, params.dimensions) for i in inputs)
        results: list[bytes] = [b""] * len(rows)
        job = next(self._numbers)
        self._core.apply(AddJob(job, rows))
        with tqdm(total=len(rows), desc="Pooling", unit="input", disable=not use_tqdm) as bar:
            while (output := self._core.step()) is not None:
                for result in output.results:
                    if isinstance(result.value, Cause):
                        self._core.apply(AbortJob(job))
                        raise BatonError(result.value, f"input {result.index} failed")
                    results[result.index] = result.value
                bar.update(len(output.results))
        return results
