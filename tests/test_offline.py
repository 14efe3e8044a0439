"""The offline loop over an engine without a model: order, stop strings, failures, nothing left."""

import pytest

from baton.engine.config import EngineConfig
from baton.engine.core import EngineCore
from baton.engine.null_runner import NullModel, NullRunner
from baton.errors import BatonError, Cause
from baton.offline import OfflineEngine
from baton.outputs import RequestOutput
from baton.text import Tokenizer
from baton.types import Request, SamplingParams

MODEL = NullModel(vocab_size=256)


class FailingRunner(NullRunner):
    """Raises at the step with this number."""

    fail_at = 10**9
    num_steps = 0

    def run(self, batch, on_layers=None):  # type: ignore[no-untyped-def]
        self.num_steps += 1
        if self.num_steps == self.fail_at:
            raise RuntimeError("a broken kernel")
        return super().run(batch, on_layers)


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Tokenizer:  # type: ignore[no-untyped-def]
    return Tokenizer.from_pretrained(str(tiny_model))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> OfflineEngine:
    config = EngineConfig(
        num_blocks=40,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_num_waiting=16,
        vocab_size=MODEL.vocab_size,
    )
    core = EngineCore(config, FailingRunner(40, 16, MODEL))
    return OfflineEngine(core, tokenizer)


def request(number: int, prompt: str = "abc", **options) -> tuple[Request, str]:  # type: ignore[no-untyped-def]
    params = SamplingParams(seed=number, **{"max_tokens": 20, **options})
    return Request(str(number), tuple(prompt.encode()), params), prompt


def run(engine: OfflineEngine, *requests: tuple[Request, str]) -> list[RequestOutput]:
    finished: list[RequestOutput] = []
    outputs = engine.run(requests, finished.append)
    assert sorted(o.request_id for o in finished) == sorted(o.request_id for o in outputs)
    assert_idle(engine)
    return outputs


def assert_idle(engine: OfflineEngine) -> None:
    engine.core.check_integrity()
    assert engine.core.pool.num_free == engine.core.config.num_blocks


def test_many_more_requests_than_the_queue_holds(engine: OfflineEngine) -> None:
    requests = [request(i, prompt="x" * (i % 70 + 1), n=i % 3 + 1) for i in range(60)]
    outputs = run(engine, *requests)
    assert [o.request_id for o in outputs] == [str(i) for i in range(60)]
    for (wanted, prompt), output in zip(requests, outputs, strict=True):
        assert output.prompt == prompt
        assert output.prompt_token_ids == list(wanted.prompt_token_ids)
        assert output.finished
        for choice in output.outputs:
            expected = MODEL.generate(wanted.prompt_token_ids, wanted.sampling, choice.index)
            assert choice.token_ids == list(expected)
            assert choice.finish_reason == "length"
            assert choice.stop_reason is None


def test_a_stop_string_ends_its_choice_and_no_other(
    engine: OfflineEngine, tokenizer: Tokenizer
) -> None:
    ((whole,),) = [run(engine, request(1, n=2, max_tokens=40))]
    text = tokenizer.decode(whole.outputs[0].token_ids)
    stop = text[10:13]
    ((cut,),) = [run(engine, request(1, n=2, max_tokens=40, stop=(stop,)))]
    first, second = cut.outputs
    assert first.finish_reason == "stop"
    assert first.stop_reason == stop
    assert first.text == text[: text.index(stop)]
    assert tokenizer.decode(first.token_ids).startswith(first.text + stop[:1])
    assert second.token_ids == whole.outputs[1].token_ids
    ((shown,),) = [
        run(engine, request(1, max_tokens=40, stop=(stop,), include_stop_str_in_output=True))
    ]
    assert shown.outputs[0].text == first.text + stop


def test_stop_ids_and_logprobs(engine: OfflineEngine) -> None:
    ((whole,),) = [run(engine, request(2))]
    stop_id = whole.outputs[0].token_ids[7]
    ((output,),) = [run(engine, request(2, stop_token_ids=(stop_id,), logprobs=3))]
    choice = output.outputs[0]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop_id
    assert choice.token_ids[-1] == stop_id
    assert choice.logprobs is not None
    assert len(choice.logprobs) == len(choice.token_ids)
    assert choice.cumulative_logprob == -len(choice.token_ids)
    for token_id, entries in zip(choice.token_ids, choice.logprobs, strict=True):
        assert next(iter(entries)) == token_id
        assert entries[token_id].logprob == -1.0
        assert entries[token_id].rank == 1


def test_cached_tokens_are_counted(engine: OfflineEngine) -> None:
    prompt = "p" * 50
    assert run(engine, request(3, prompt=prompt))[0].num_cached_tokens == 0
    assert run(engine, request(4, prompt=prompt))[0].num_cached_tokens == 48


def test_a_failing_step_fails_the_call_and_leaves_nothing(engine: OfflineEngine) -> None:
    runner = engine.core._runner
    assert isinstance(runner, FailingRunner)
    runner.fail_at = runner.num_steps + 4
    with pytest.raises(BatonError) as caught:
        run(engine, *(request(i) for i in range(9)))
    assert caught.value.cause is Cause.STEP_FAILED
    assert_idle(engine)
    assert run(engine, request(0))[0].outputs[0].finish_reason == "length"


def test_an_interrupted_call_leaves_nothing(engine: OfflineEngine) -> None:
    def interrupt(output: RequestOutput) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run([request(i) for i in range(9)], interrupt)
    assert_idle(engine)


def test_what_never_fits_is_known_beforehand(engine: OfflineEngine) -> None:
    with pytest.raises(BatonError):
        engine.check(request(0, prompt="x" * 256)[0])
