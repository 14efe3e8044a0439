"""The HTTP surface on a real fleet, prefill and decode apart: what the fake backend cannot show."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from harness import wait_until

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "seed": 5}
PROMPT = "def add(a, b):\n    "


@pytest.fixture(scope="module")
def fleet(plain_fleet) -> Iterator[Any]:
    series = ("baton_remote_prefills_total", "baton_kv_transfer_bytes_total")
    before = [plain_fleet.metric(name) for name in series]
    yield plain_fleet
    assert all(plain_fleet.metric(name) > value for name, value in zip(series, before, strict=True))
    plain_fleet.assert_no_leak()


@pytest.fixture(scope="module")
def api(fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.client.base_url}/v1", api_key="none") as client:
        yield client


def ids(fleet, path: str = "/v1/completions", **fields: Any) -> list[list[int]]:
    """Token ids per choice, of a whole answer; a stream must give the same."""
    body = {"return_token_ids": True, **GREEDY, **fields}
    answer = fleet.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    whole = [choice["token_ids"] for choice in answer.json()["choices"]]
    if path == "/v1/completions":
        streamed = fleet.complete(body)
        assert [streamed.token_ids[index] for index in range(len(whole))] == whole
    return whole


def test_links_are_measured_before_there_is_traffic(fleet) -> None:
    """Although both workers started at once, so that neither saw the other before it was ready."""

    def is_measured() -> bool:
        workers = fleet.cluster()["workers"]
        return all(any(r["bytes_per_s"] > 0 for r in w["link_rates"]) for w in workers)

    wait_until(is_measured, 60.0, "every worker has measured a class of links")
    for link in fleet.cluster()["links"]:
        assert link["bytes_per_s"] > 0


def test_fields_that_steer_sampling(fleet) -> None:
    (plain,) = ids(fleet, prompt=PROMPT)
    favourite = next(token_id for token_id in range(100, 200) if token_id not in plain)
    assert set(ids(fleet, prompt=PROMPT, logit_bias={str(favourite): 100})[0]) == {favourite}
    assert set(ids(fleet, prompt=PROMPT, allowed_token_ids=[150, 151])[0]) <= {150, 151}
    assert plain[0] not in ids(fleet, prompt=PROMPT, logit_bias={str(plain[0]): -100})[0]
    assert (
        ids(fleet, prompt=PROMPT, stop_token_ids=[plain[3]])[0]
        == plain[: plain.index(plain[3]) + 1]
    )
    cut = fleet.client.post(
        "/v1/completions",
        json={
            **GREEDY,
            "prompt": PROMPT,
            "logit_bias": {str(favourite): 100},
            "repetition_detection": {"max_pattern_size": 1, "min_count": 3},
        },
    ).json()
    assert cut["choices"][0]["finish_reason"] == "repetition"
    assert cut["usage"]["completion_tokens"] == 3
    sampled = ids(fleet, prompt=PROMPT, temperature=1, n=3)
    assert sampled == ids(fleet, prompt=PROMPT, temperature=1, n=3)
    assert len({tuple(choice) for choice in sampled}) > 1


def test_tokens_in_and_out(fleet) -> None:
    tokens = fleet.client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    back = fleet.client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert back.endswith(PROMPT)
    assert ids(fleet, prompt=tokens) == ids(fleet, prompt=PROMPT)
    (rendered,) = fleet.client.post(
        "/v1/completions/render", json={"prompt": PROMPT, **GREEDY}
    ).json()
    generated = fleet.client.post("/inference/v1/generate", json=rendered).json()
    assert [choice["token_ids"] for choice in generated["choices"]] == ids(fleet, prompt=PROMPT)
    assert ids(fleet, "/invocations", prompt=PROMPT) == ids(fleet, prompt=PROMPT)
    assert ids(fleet, prompt="x = 1\n" + PROMPT, truncate_prompt_tokens=len(tokens) - 1) == ids(
        fleet, prompt=tokens[1:]
    )


def test_logprobs_of_prompt_and_output_are_of_one_distribution(api, fleet) -> None:
    whole = api.completions.create(
        model=fleet.model_name(),
        prompt=PROMPT,
        echo=True,
        logprobs=2,
        extra_body={"return_token_ids": True},
        **GREEDY,
    )
    choice = whole.choices[0]
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs is not None
    scored = choice.logprobs.token_logprobs or []
    assert scored[0] is None
    again = api.completions.create(
        model=fleet.model_name(),
        prompt=choice.token_ids,
        echo=True,
        logprobs=2,
        max_tokens=0,
    )
    assert again.choices[0].logprobs is not None
    rescored = again.choices[0].logprobs.token_logprobs or []
    assert len(rescored) == len(scored)
    # Prompt tokens by prefill, output tokens by decode: the same model.
    for left, right in zip(scored[1:], rescored[1:], strict=True):
        assert left == pytest.approx(right, abs=1e-3)


def test_chat(api, fleet) -> None:
    messages: Any = [{"role": "user", "content": "Say hello."}]
    arguments: Any = {"model": fleet.model_name(), "messages": messages, "max_tokens": 12}
    arguments |= {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = api.chat.completions.create(**arguments, extra_body={"return_prompt_text": True})
    assert "Say hello." in whole.prompt_text
    stream = list(api.chat.completions.create(**arguments, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(**{**arguments, "top_logprobs": 21})
    assert refused.value.param == "top_logprobs"


def test_responses(api, fleet) -> None:
    arguments: Any = {"model": fleet.model_name(), "temperature": 0, "max_output_tokens": 12}
    first = api.responses.create(input="Say hello.", **arguments)
    chat = api.chat.completions.create(
        model=fleet.model_name(),
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=12,
        temperature=0,
    )
    assert first.output_text == chat.choices[0].message.content
    with api.responses.stream(input="Again.", previous_response_id=first.id, **arguments) as stream:
        second = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    by_hand = [
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Again."},
    ]
    assert api.responses.create(input=by_hand, **arguments).output_text == second
    long = {**arguments, "max_output_tokens": 900}
    running = api.responses.create(
        input="Go on.", background=True, extra_body={"ignore_eos": True}, **long
    )
    events = api.responses.retrieve(running.id, stream=True)
    assert any(event.type == "response.output_text.delta" for event in events)
    events.close()
    assert api.responses.cancel(running.id).status == "cancelled"
    fleet.assert_no_leak()
    assert api.responses.retrieve(running.id).status == "cancelled"
