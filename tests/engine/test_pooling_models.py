"""Embeddings and scores of every family against transformers, in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from baton.engine.pooling_config import PoolingMethod, is_pooling_model, load_pooling_config
from baton.engine.pooling_core import PoolingRow
from baton.errors import InvalidRequest
from baton.pooling import PoolingInput, PoolingTask
from tests.engine.tiny_models import random_prompts
from tests.engine.tiny_pooling import (
    DECODERS,
    ENCODERS,
    load_runner,
    pool,
    save_modules,
    save_pooling_model,
    to_tensor,
)

CLOSE = {"rtol": 0.0, "atol": 1e-4}
PROMPTS = random_prompts(5, 17, 1, 17, 40, 9)  # two of one length


def reference_states(folder: Path, kind: Any = transformers.AutoModel) -> list[torch.Tensor]:
    """Per prompt, alone: [num_tokens, hidden_size]."""
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    model = getattr(model, "model", model)
    with torch.no_grad():
        return [model(torch.tensor([ids])).last_hidden_state[0] for ids in PROMPTS]


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_embeddings_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = save_pooling_model(tmp_path, family)
    runner = load_runner(folder)
    # Without files that say otherwise: an encoder's first token or a decoder's last, with norm 1.
    place = 0 if family in ENCODERS else -1
    for ours, states in zip(pool(runner, *PROMPTS), reference_states(folder), strict=True):
        torch.testing.assert_close(ours, F.normalize(states[place], dim=-1), **CLOSE)
    alone = pool(runner, PROMPTS[1])[0]
    torch.testing.assert_close(alone, pool(runner, *PROMPTS)[1], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("normalizes", [True, False])
def test_the_files_of_sentence_transformers_decide(
    pooling: str, normalizes: bool, tmp_path: Path
) -> None:
    folder = save_pooling_model(tmp_path, "bert", pooling=pooling, normalizes=normalizes)
    runner = load_runner(folder)
    assert runner.info.max_model_len == 100  # sentence_bert_config.json
    for ours, states in zip(pool(runner, *PROMPTS), reference_states(folder), strict=True):
        theirs = {"cls": states[0], "last": states[-1], "mean": states.mean(0)}[pooling]
        expected = F.normalize(theirs, dim=-1) if normalizes else theirs
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_a_generating_checkpoint_with_modules_embeds(tmp_path: Path) -> None:
    folder = save_pooling_model(
        tmp_path, "qwen3", transformers.AutoModelForCausalLM, pooling="last", normalizes=True
    )
    assert is_pooling_model(folder)
    states = reference_states(folder, transformers.AutoModelForCausalLM)
    for ours, theirs in zip(pool(load_runner(folder), *PROMPTS), states, strict=True):
        torch.testing.assert_close(ours, F.normalize(theirs[-1], dim=-1), **CLOSE)


def test_dimensions_and_activation(tmp_path: Path) -> None:
    runner = load_runner(save_pooling_model(tmp_path, "qwen2"))
    (whole,) = pool(runner, PROMPTS[0], use_activation=False)
    (short,) = pool(runner, PROMPTS[0], dimensions=8)
    torch.testing.assert_close(short, F.normalize(whole[:8], dim=-1))
    assert abs(float(whole.norm()) - 1) > 1e-3


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "qwen3"])
@pytest.mark.parametrize("use_activation", [None, False])
def test_scores_are_those_of_transformers(
    family: str, use_activation: bool | None, tmp_path: Path
) -> None:
    kind = transformers.AutoModelForSequenceClassification
    folder = save_pooling_model(tmp_path, family, kind, num_labels=1)
    runner = load_runner(folder)
    assert runner.info.pooling.task is PoolingTask.SCORE
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    first, second = random_prompts(7, 12, seed=3)
    ids = [*first, *second]
    has_types = family == "bert"
    types = {"token_type_ids": torch.tensor([[0] * 7 + [1] * 12])} if has_types else {}
    with torch.no_grad():
        logit = model(torch.tensor([ids]), **types).logits[0]
    pair = PoolingInput(tuple(ids), 7 if has_types else None)
    results = runner.run(
        [PoolingRow(PoolingInput(tuple(first))), PoolingRow(pair, use_activation=use_activation)]
    )
    expected = logit if use_activation is False else logit.sigmoid()
    torch.testing.assert_close(to_tensor(results[1]), expected, **CLOSE)


def test_former_names_of_norms_and_prefixes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_pooling_model(tmp_path, "bert")
    expected = pool(load_runner(folder), *PROMPTS)
    tensors = load_file(folder / "model.safetensors")
    former = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in tensors.items()
    }
    (folder / "model.safetensors").unlink()
    save_file(former, str(folder / "model.safetensors"))
    for one, other in zip(expected, pool(load_runner(folder), *PROMPTS), strict=True):
        assert torch.equal(one, other)


def test_what_is_not_finite_is_its_rows_alone(tmp_path: Path) -> None:
    runner = load_runner(save_pooling_model(tmp_path, "bert"))
    with torch.inference_mode():
        runner._model.words[7] = float("nan")  # type: ignore[union-attr]
    good, bad = (PoolingRow(PoolingInput(ids)) for ids in ((3, 4), (7, 8)))
    results = runner.run([bad, good])
    assert results[0] is None
    assert results[1] is not None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "2"}], "Dense"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "weightedmean"),
        ("1_Pooling/config.json", [], "JSON object"),
        ("config.json", {"architectures": ["DebertaV2Model"]}, "DebertaV2Model"),
        ("config.json", {"architectures": ["BertModel"]}, "hidden_size"),
    ],
)
def test_what_is_unsupported_is_refused_by_name(
    name: str, content: object, said: str, tmp_path: Path
) -> None:
    folder = save_pooling_model(tmp_path, "bert", pooling="cls")
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InvalidRequest, match=said) as caught:
        load_pooling_config(folder)
    assert caught.value.param == "model"


def test_overrides(tmp_path: Path) -> None:
    folder = save_pooling_model(tmp_path, "qwen3")
    assert is_pooling_model(folder)
    found = load_pooling_config(folder, '{"pooling_type": "MEAN", "use_activation": false}')
    assert (found.method, found.use_activation) == (PoolingMethod.MEAN, False)
    for text in ('{"pooling_type": "MAX"}', '{"nope": 1}'):
        with pytest.raises(InvalidRequest) as caught:
            load_pooling_config(folder, text)
        assert caught.value.param == "pooler_config"


def test_config_json_can_be_overridden(tmp_path: Path) -> None:
    folder = save_pooling_model(tmp_path, "qwen3")
    assert not load_runner(folder).info.pooling.is_matryoshka
    info = load_runner(folder, hf_overrides='{"matryoshka_dimensions": [16, 32]}').info.pooling
    assert (info.is_matryoshka, info.dimensions) == (True, (16, 32))
    with pytest.raises(InvalidRequest, match="rope_type"):
        load_runner(folder, hf_overrides='{"rope_parameters": {"rope_type": "spiral"}}')


def test_either_spelling_of_the_pooling(tmp_path: Path) -> None:
    folder = save_pooling_model(tmp_path, "bert")
    save_modules(folder, "mean", normalizes=True)
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "lasttoken"}')
    assert load_pooling_config(folder).method is PoolingMethod.LAST


def test_a_classifier_of_many_labels_is_refused(tmp_path: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    folder = save_pooling_model(tmp_path, "bert", kind, num_labels=3)
    with pytest.raises(InvalidRequest, match="3 labels"):
        load_runner(folder)
