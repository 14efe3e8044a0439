"""`LLM.embed` and `LLM.score` against transformers, with its own tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from baton import LLM, PoolingParams, SamplingParams
from baton.errors import InvalidRequest
from baton.pooling_llm import PoolingLLM
from tests.engine.tiny_pooling import save_pooling_model
from tests.text.test_inputs import backend

TEXTS = ["relay race", "a b c d e", "x. y!"]


def save(folder: Path, *args: Any, **kwargs: Any) -> Path:
    save_pooling_model(folder, *args, **kwargs)
    backend().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("e"), "bert", pooling="mean", normalizes=True)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = transformers.AutoModelForSequenceClassification
    return save(tmp_path_factory.mktemp("c"), "bert", kind, num_labels=1)


def tokenizer(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def embeddings(folder: Path, texts: list[str]) -> torch.Tensor:
    model, tokens = transformers.AutoModel.from_pretrained(folder).eval(), tokenizer(folder)
    with torch.no_grad():
        states = [
            model(torch.tensor([tokens(text)["input_ids"]])).last_hidden_state[0] for text in texts
        ]
    return F.normalize(torch.stack([state.mean(0) for state in states]), dim=-1)


def test_embed(embedder: Path) -> None:
    with LLM(str(embedder)) as llm:
        assert isinstance(llm, PoolingLLM)
        outputs = llm.embed(TEXTS, use_tqdm=False)
        ours = torch.tensor([output.outputs.embedding for output in outputs])
        torch.testing.assert_close(ours, embeddings(embedder, TEXTS), rtol=0.0, atol=1e-4)
        assert [o.prompt_token_ids for o in outputs] == [
            tokenizer(embedder)(text)["input_ids"] for text in TEXTS
        ]
        (one,) = llm.embed({"prompt_token_ids": outputs[1].prompt_token_ids}, use_tqdm=False)
        assert one.outputs.embedding == pytest.approx(outputs[1].outputs.embedding, abs=1e-6)
        params = PoolingParams(truncate_prompt_tokens=4, use_activation=False)
        (short,) = llm.embed("a b c d", pooling_params=params, use_tqdm=False)
        assert short.prompt_token_ids == tokenizer(embedder)("a b")["input_ids"]
        assert abs(torch.tensor(short.outputs.embedding).norm() - 1) > 1e-3
        assert short.outputs.hidden_size == 48


def test_score_by_a_cross_encoder(encoder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    with LLM(str(encoder)) as llm:
        outputs = llm.score("relay race", TEXTS, use_tqdm=False)
        for output, text in zip(outputs, TEXTS, strict=True):
            given = tokenizer(encoder)(
                "relay race", text, return_tensors="pt", return_token_type_ids=True
            )
            with torch.no_grad():
                expected = model(**given).logits[0].sigmoid().item()
            assert output.outputs.score == pytest.approx(expected, abs=1e-4)
            assert output.prompt_token_ids == given["input_ids"][0].tolist()
        with pytest.raises(InvalidRequest, match="does not embed"):
            llm.embed("x")


def test_score_by_an_embedding_model(embedder: Path) -> None:
    with LLM(str(embedder)) as llm:
        first, second = TEXTS, TEXTS[::-1]
        outputs = llm.score(first, second, use_tqdm=False)
    expected = (embeddings(embedder, first) * embeddings(embedder, second)).sum(1)
    ours = torch.tensor([output.outputs.score for output in outputs])
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-4)


def test_what_is_refused(embedder: Path, tiny_model: Path) -> None:
    with LLM(str(embedder)) as llm:
        for call, param in (
            (lambda: llm.generate("x"), "model"),
            (lambda: llm.embed("a " * 200), "prompts"),
            (lambda: llm.embed([[9999]]), "prompts"),
            (lambda: llm.embed("x", pooling_params=PoolingParams(dimensions=3)), "dimensions"),
            (lambda: llm.score(["a", "b"], ["c", "d", "e"]), "data_2"),
            (
                lambda: llm.embed("x", pooling_params=PoolingParams(truncate_prompt_tokens=0)),
                "truncate_prompt_tokens",
            ),
        ):
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert caught.value.param == param
        assert llm.embed("x", use_tqdm=False)  # nothing of them is left
    with pytest.raises(RuntimeError):
        llm.embed("x")
    with LLM(str(tiny_model), kv_cache_memory_bytes=1 << 22) as generator:
        for call in (lambda: generator.embed("x"), lambda: generator.score("x", "y")):
            with pytest.raises(InvalidRequest, match="generates text"):
                call()
        assert generator.generate("x", SamplingParams(max_tokens=1), use_tqdm=False)


def test_a_generating_model_pools_when_asked_to(tiny_model: Path) -> None:
    with LLM(str(tiny_model), runner="pooling") as llm:
        (output,) = llm.embed("x", use_tqdm=False)
    assert torch.tensor(output.outputs.embedding).norm().item() == pytest.approx(1.0, abs=1e-5)
