"""Beam search against transformers' `num_beams`, on a tiny random model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baton import LLM
from baton.beam_search import Beam, BeamSearch, BeamSearchParams
from baton.errors import InvalidRequest
from baton.types import FinishReason, Logprobs
from tests.engine.tiny_models import random_prompts, reference_model, save_tiny_model

EOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat enough that beams compete; EOS is likely enough to end some."""
    folder = save_tiny_model(tmp_path_factory.mktemp("beam"), "llama")
    model = reference_model(folder)
    with torch.no_grad():
        model.lm_head.weight *= 0.25
        model.lm_head.weight[EOS] *= 3
    model.save_pretrained(folder)
    from tests.tiny_tokenizer import tiny_tokenizer

    tiny_tokenizer()._backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    options = {"dtype": "float32", "device": "cpu", "kv_cache_memory_bytes": "2MiB"}
    with LLM(str(folder), max_model_len=256, **options) as llm:  # type: ignore[arg-type]
        yield llm


def upto_eos(row: list[int], num_prompt: int) -> list[int]:
    """Without the padding."""
    ends = [place for place, token_id in enumerate(row) if place >= num_prompt and token_id == EOS]
    return row[: ends[0] + 1] if ends else row


@pytest.mark.parametrize(
    ("width", "max_tokens", "length_penalty"),
    [
        (1, 6, 1.0),
        (2, 12, 1.0),
        (4, 12, 1.0),
        (4, 12, 0.0),
        (4, 12, 2.0),
        (4, 12, -1.0),
        (5, 1, 1.0),
    ],
)
def test_sequences_and_scores_are_those_of_transformers(
    folder: Path, llm: LLM, width: int, max_tokens: int, length_penalty: float
) -> None:
    prompts = random_prompts(5, 40, seed=width)
    params = BeamSearchParams(width, max_tokens, length_penalty=length_penalty)
    outputs = llm.beam_search([{"prompt_token_ids": ids} for ids in prompts], params)
    reference = reference_model(folder)
    num_stopped = 0
    for ids, output in zip(prompts, outputs, strict=True):
        want = reference.generate(
            torch.tensor([ids]),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=max_tokens,
            length_penalty=length_penalty,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        rows = [upto_eos(row, len(ids)) for row in want.sequences.tolist()]
        assert [sequence.tokens for sequence in output.sequences] == rows
        if width > 1:
            scores = [
                one.cum_logprob / (len(one.tokens) - len(ids)) ** length_penalty
                for one in output.sequences
            ]
            assert scores == pytest.approx(want.sequences_scores.tolist(), rel=1e-5)
        num_stopped += sum(one.finish_reason == "stop" for one in output.sequences)
    if width == 4:
        assert num_stopped > 0, "the test is about ends, too"


def test_eos_can_be_ignored(llm: LLM) -> None:
    (output,) = llm.beam_search([{"prompt_token_ids": [5, 6]}], BeamSearchParams(4, 9, True))
    assert [len(one.tokens) for one in output.sequences] == [11] * 4
    assert {one.finish_reason for one in output.sequences} == {"length"}
    assert output.sequences[0].text == llm.get_tokenizer().decode(output.sequences[0].tokens)


def test_only_allowed_tokens(llm: LLM) -> None:
    allowed = [EOS, 40, 41, 42]
    (output,) = llm.beam_search([[5, 6]], BeamSearchParams(4, 9, allowed_token_ids=allowed))
    assert len(output.sequences) == 4
    assert {token_id for one in output.sequences for token_id in one.tokens[2:]} <= set(allowed)


def test_what_ends_outside_the_first_ranks_is_dropped() -> None:
    search = BeamSearch(BeamSearchParams(2, 5), (EOS,))
    assert search.num_logprobs == 3
    search.advance([Logprobs(-0.1, 1, ((8, -0.1), (9, -0.2), (EOS, -0.3)))])
    assert search.results == []
    assert [beam.token_ids for beam in search.beams] == [(8,), (9,)]
    tops = [((EOS, -0.1), (7, -5.0), (6, -6.0)), ((5, -0.2), (4, -7.0), (3, -8.0))]
    search.advance([Logprobs(0.0, 1, top) for top in tops])
    assert [(beam.token_ids, beam.finish_reason) for beam in search.results] == [
        ((8, EOS), FinishReason.STOP)
    ]
    assert [beam.token_ids for beam in search.beams] == [(9, 5), (8, 7)]
    assert not search.is_over


def test_scores_grow_with_length_as_told() -> None:
    beam = Beam((1, 2, 3, 4), cumulative_logprob=-4.0)
    assert [beam.score(penalty) for penalty in (0.0, 1.0, 2.0)] == [-4.0, -1.0, -0.25]


@pytest.mark.parametrize(
    ("values", "param"),
    [((0, 5), "beam_width"), ((17, 5), "beam_width"), ((2, 0), "max_tokens")],
)
def test_ranges(values: tuple[int, int], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        BeamSearchParams(*values)
    assert caught.value.param == param
