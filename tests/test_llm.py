from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton import LLM, SamplingParams, StructuredOutput
from baton.errors import Cause, InvalidRequest
from baton.types import RepetitionDetection

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def load(model: Path, **options: Any) -> LLM:
    return LLM(
        str(model),
        **{
            "dtype": "float32",
            "device": "cpu",
            "max_model_len": 128,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": "1MiB",
            **options,
        },
    )


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with load(tiny_model) as llm:
        yield llm


def test_every_form_of_prompt(llm: LLM) -> None:
    ids = list(b"hello")
    ids = llm.get_tokenizer().encode("hello")
    forms: list[Any] = [
        "hello",
        ids,
        {"prompt": "hello"},
        {"prompt_token_ids": ids},
        {"prompt": "hello", "prompt_token_ids": ids},
    ]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["hello", None, "hello", None, "hello"]
    assert all(o.prompt_token_ids == ids for o in outputs)
    assert len({o.request_id for o in outputs}) == len(forms)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    for single in ("hello", ids, {"prompt": "hello"}):
        (output,) = llm.generate(single, GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_special_tokens_are_shown_to_whom_wants_them(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = [next(iter(tokenizer.special_ids))] * 2
    params = SamplingParams(allowed_token_ids=ids[:1], max_tokens=2, ignore_eos=True)
    for skip, text in (True, ""), (False, tokenizer.decode(ids, skip_special_tokens=False)):
        wanted = replace(params, skip_special_tokens=skip)
        (output,) = llm.generate("a", wanted, use_tqdm=False)
        assert (output.outputs[0].token_ids, output.outputs[0].text) == (ids, text)
    assert text


def test_outputs_hold_what_was_asked_for(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, temperature=0.9, max_tokens=10, logprobs=2)
    (output,) = llm.generate("abc", params, use_tqdm=False)
    assert output.finished
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    for choice in output.outputs:
        assert choice.text == llm.get_tokenizer().decode(choice.token_ids)
        assert choice.logprobs is not None
        assert choice.cumulative_logprob == pytest.approx(
            sum(
                entry[token_id].logprob
                for entry, token_id in zip(choice.logprobs, choice.token_ids, strict=True)
            )
        )
        assert all(len(entry) in (2, 3) for entry in choice.logprobs)
    assert output.outputs[0].token_ids != output.outputs[1].token_ids


def test_params_per_prompt(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (3, 5)]
    outputs = llm.generate(["a", "b"], params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 5]
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert caught.value.param == "sampling_params"


def test_defaults_are_the_model_s(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.8, top_k=50)
    (output,) = llm.generate("a", use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= 16


def test_output_ends_at_the_model_s_length(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate("x" * 100, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 28
    assert output.outputs[0].finish_reason == "length"


def test_a_stop_string_ends_the_text(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True)
    (whole,) = llm.generate("stop", params, use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[20:22]
    stopping = SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True, stop=(stop,))
    (cut,) = llm.generate("stop", stopping, use_tqdm=False)
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert cut.outputs[0].stop_reason == stop
    assert len(cut.outputs[0].token_ids) < 60


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [
        ([], Cause.INVALID_REQUEST),
        ("", Cause.INVALID_REQUEST),
        ([1, 2, 5000], Cause.INVALID_REQUEST),
        ([1, -1], Cause.INVALID_REQUEST),
        ([1, True], Cause.INVALID_REQUEST),
        ({"text": "a"}, Cause.INVALID_REQUEST),
        (3.5, Cause.INVALID_REQUEST),
        ("x" * 200, Cause.CONTEXT_LENGTH_EXCEEDED),
    ],
)
def test_one_bad_prompt_starts_nothing(
    llm: LLM, prompt: Any, cause: Cause, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm._runner, "run", lambda batch: pytest.fail("something was computed"))
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(["fine", prompt, "fine too"], GREEDY, use_tqdm=False)
    assert caught.value.cause is cause
    assert caught.value.param == "prompt"


def test_an_empty_stop_string_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate("a", SamplingParams(stop=("",)), use_tqdm=False)
    assert caught.value.param == "stop"


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_chat(llm: LLM) -> None:
    hello = [{"role": "user", "content": "hello"}]
    (one,) = llm.chat(hello, GREEDY, use_tqdm=False)
    assert one.prompt == "<|user|>hello"
    two = llm.chat([hello, hello], GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in two] == [one.outputs[0].token_ids] * 2
    with pytest.raises(InvalidRequest) as caught:
        llm.chat([{"content": "no role"}], GREEDY, use_tqdm=False)
    assert caught.value.param == "messages"


def test_a_shared_prefix_is_computed_once(llm: LLM) -> None:
    prompt = "a prefix that is longer than one block of sixteen tokens"
    llm.generate(prompt, GREEDY, use_tqdm=False)
    (again,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert again.num_cached_tokens == 48


def test_the_same_program_gets_the_same_tokens(tiny_model: Path) -> None:
    sampled = SamplingParams(temperature=1.0, max_tokens=20)
    results = []
    for seed in (0, 0, 1):
        with load(tiny_model, seed=seed) as llm:
            outputs = llm.generate(["a", "a"], sampled, use_tqdm=False)
            results.append([o.outputs[0].token_ids for o in outputs])
    assert results[0] == results[1] != results[2]
    assert results[0][0] != results[0][1]


def test_bad_options_are_named(tiny_model: Path) -> None:
    for option, value in (("block_size", 17), ("dtype", "int4"), ("colour", "red")):
        with pytest.raises(ValueError, match=option):
            load(tiny_model, **{option: value})
    with pytest.raises(InvalidRequest) as caught:
        load(tiny_model, max_model_len=4096)
    assert caught.value.param == "max_model_len"


def test_a_closed_llm_says_so(tiny_model: Path) -> None:
    llm = load(tiny_model)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a", GREEDY)


def test_the_progress_bar_shows_a_rate(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "tok/s" in shown


# ── what may come ────────────────────────────────────────────────────────────────────────────────


def test_structured_output(llm: LLM) -> None:
    spec = StructuredOutput.of(choice=["yes", "nothing else"])
    params = SamplingParams(structured_outputs=spec, max_tokens=40, n=3, seed=1, logprobs=1)
    (output,) = llm.generate("abc", params, use_tqdm=False)
    assert {choice.text for choice in output.outputs} <= {"yes", "nothing else"}
    assert {choice.finish_reason for choice in output.outputs} == {"stop"}


def test_a_bad_grammar_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate("abc", SamplingParams(structured_outputs=StructuredOutput.of(regex="((")))
    assert caught.value.param == "structured_outputs"
    with pytest.raises(InvalidRequest, match="exactly one"):
        StructuredOutput.of(regex="a", json_object=True)


def test_bad_words_are_words(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    letters = tokenizer.encode("abcdefgh", add_special_tokens=False)
    params = replace(GREEDY, allowed_token_ids=letters)
    free = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    word = tokenizer.decode(free.token_ids[3:5])
    params = replace(params, bad_words=(word,))
    kept = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    assert kept.token_ids[:3] == free.token_ids[:3]
    assert word in free.text
    assert word not in kept.text


def test_repetition_has_its_own_reason(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=30,
        ignore_eos=True,
        allowed_token_ids=(50,),
        repetition_detection=RepetitionDetection(1, 1, 5),
    )
    (output,) = llm.generate("abc", params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "repetition"
    assert len(output.outputs[0].token_ids) == 5


def test_prompt_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2)
    plain, scored = llm.generate(["abcdef"] * 2, [GREEDY, params], use_tqdm=False)
    assert plain.prompt_logprobs is None
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None
    assert len(scored.prompt_logprobs) == len(scored.prompt_token_ids)
    for token_id, entry in zip(
        scored.prompt_token_ids[1:], scored.prompt_logprobs[1:], strict=True
    ):
        assert entry is not None
        assert next(iter(entry)) == token_id
        assert 2 <= len(entry) <= 3
        assert min(one.rank or 0 for one in entry.values()) == 1
    assert scored.outputs[0].token_ids == plain.outputs[0].token_ids[:2]
