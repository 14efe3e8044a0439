"""What is read from config.json, in every spelling, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from baton.engine.model_config import FAMILIES, load_model_config, parse_model_config
from baton.errors import InvalidRequest
from tests.engine.tiny_models import WINDOW, save_tiny_model

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def test_both_spellings_of_rope_are_the_same() -> None:
    old = parse_model_config({**BASE, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = parse_model_config({**BASE, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}})
    assert old == new
    assert (old.rope.theta, old.rope.rope_type, old.rope.original_max_len) == (5e5, "llama3", 128)


def test_defaults_of_a_sparse_config() -> None:
    config = parse_model_config(BASE)
    assert (config.num_kv_heads, config.head_dim, config.windows) == (4, 16, (0, 0))
    assert (config.rms_norm_eps, config.rope.theta, config.tie_embeddings) == (1e-6, 1e4, False)
    assert config.dtype is None
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 9}, (9, 9)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (0, 0)),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 9}, (0, 0)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}, (0, 0)),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            (0, 9),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (9, 0),
        ),
    ],
)
def test_windows(changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    config = parse_model_config({**BASE, "num_key_value_heads": 2, **changes})
    assert config.windows == windows


def test_eos_of_the_generation_config_wins() -> None:
    config = {**BASE, "eos_token_id": 7}
    assert parse_model_config(config).eos_token_ids == (7,)
    assert parse_model_config(config, {"eos_token_id": [3, 4]}).eos_token_ids == (3, 4)
    assert parse_model_config(config, {"eos_token_id": None}).eos_token_ids == (7,)


def test_an_unsupported_architecture_hears_which_are_supported() -> None:
    with pytest.raises(InvalidRequest, match="GPT2LMHeadModel") as caught:
        parse_model_config({**BASE, "architectures": ["GPT2LMHeadModel"]})
    assert all(name in caught.value.message for name in FAMILIES)
    with pytest.raises(InvalidRequest, match="model_type 'bert'"):
        parse_model_config({"model_type": "bert"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_would_change_the_output_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        parse_model_config({**BASE, **changes})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({**BASE, "hidden_size": None}),
        json.dumps({key: value for key, value in BASE.items() if key != "vocab_size"}),
        json.dumps({**BASE, "num_key_value_heads": 3}),
    ],
)
def test_a_malformed_file_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidRequest, match=r"config\.json") as caught:
        load_model_config(tmp_path)
    assert caught.value.param == "model"


def test_what_transformers_writes_is_what_is_read(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "mistral-window", tied=True)
    config = load_model_config(tmp_path)
    assert config.architecture == "MistralForCausalLM"
    assert config.windows == (WINDOW,) * 3
    assert (config.head_dim, config.num_kv_heads, config.tie_embeddings) == (16, 2, True)
    assert (config.dtype, config.eos_token_ids) == ("float32", (2,))
