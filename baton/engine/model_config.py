"""What a checkpoint's `config.json` says about the model, normalised across families. No torch.

Both spellings of RoPE settings are read: `rope_parameters` (transformers 5) and `rope_theta` +
`rope_scaling` (transformers 4). Anything that would change the model's output and is not
implemented is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import InvalidRequest

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one architecture apart from a plain Llama."""

    qkv_bias: bool = False
    qk_norm: bool = False
    num_kv_heads: int | None = None  # default of config.json; None = as many as heads
    head_dim: int | None = None  # default of config.json; None = hidden_size / num_heads
    window_key: str | None = None  # None = `sliding_window` has no meaning
    window_switch: str | None = None  # config key that must be true for the window to apply


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(num_kv_heads=8, window_key="sliding_window"),
    "Qwen2ForCausalLM": Family(
        qkv_bias=True,
        num_kv_heads=32,
        window_key="sliding_window",
        window_switch="use_sliding_window",
    ),
    "Qwen3ForCausalLM": Family(
        qk_norm=True,
        num_kv_heads=32,
        head_dim=128,
        window_key="sliding_window",
        window_switch="use_sliding_window",
    ),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding; `factor` and the rest apply to rope_type "llama3" and "linear"."""

    theta: float
    rope_type: str = "default"  # "default" | "linear" | "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention and a gated SiLU MLP."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_len: int  # tokens that the positions were trained for
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # per layer: tokens a query sees, itself included; 0 = all
    rope: RopeConfig
    dtype: str | None  # of the stored weights, where config.json says so
    eos_token_ids: tuple[int, ...]

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


def read_config(path: Path, overrides: str | None) -> dict[str, Any]:
    """A checkpoint's `config.json`, with the fields of `overrides` (a JSON object) over it.

    Raises:
        InvalidRequest: there is none.
    """
    config = read_json(path / "config.json")
    return config if overrides is None else {**config, **json.loads(overrides)}


def load_model_config(path: Path, overrides: str | None = None) -> ModelConfig:
    """Read `config.json` (and the EOS ids of `generation_config.json`) from a checkpoint directory.

    Args:
        overrides: see `read_config`.

    Raises:
        InvalidRequest: the file is missing or malformed, or asks for something unsupported.
    """
    config = read_config(path, overrides)
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    try:
        return parse_model_config(config, generation)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{path / 'config.json'} is not usable: {error!r}", "model") from error


def parse_model_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Normalise the content of config.json. See `load_model_config`."""
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    num_layers, num_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    hidden_size = int(config["hidden_size"])
    attention_bias = bool(config.get("attention_bias", False))
    _require(config.get("hidden_act", "silu") == "silu", "hidden_act", config.get("hidden_act"))
    _require("quantization_config" not in config, "quantization_config", "quantized weights")
    num_kv_heads = int(config.get("num_key_value_heads") or family.num_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads are no multiple of {num_kv_heads} KV heads")
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(config.get("head_dim") or family.head_dim or hidden_size // num_heads),
        vocab_size=int(config["vocab_size"]),
        max_len=int(config["max_position_embeddings"]),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        windows=_windows(config, family, num_layers),
        rope=_rope(config),
        dtype=stored_dtype(config),
        eos_token_ids=_eos_token_ids(generation or {}) or _eos_token_ids(config),
    )


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        InvalidRequest: there is no such file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidRequest(f"{path} does not exist", "model") from None
    except (ValueError, OSError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}", "model") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{path} does not hold a JSON object", "model")
    return content


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            return str(architecture)
    found = ", ".join(map(str, named)) or f"model_type {config.get('model_type')!r}"
    raise InvalidRequest(
        f"unsupported architecture {found}; supported: {', '.join(sorted(FAMILIES))}", "model"
    )


def _require(ok: bool, key: str, value: object) -> None:
    if not ok:
        raise InvalidRequest(f"unsupported {key} in config.json: {value}", "model")


def _windows(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int, ...]:
    window = (config.get(family.window_key) or 0) if family.window_key else 0
    switched_on = family.window_switch is None or bool(config.get(family.window_switch, False))
    if not window or not switched_on:
        return (0,) * num_layers
    kinds = config.get("layer_types")
    if kinds is None:  # Qwen: only layers from max_window_layers on have the window
        first = int(config.get("max_window_layers", 28)) if family.window_switch else 0
        kinds = ["sliding_attention" if i >= first else "" for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {num_layers} layers")
    return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope_type = str(scaling.get("rope_type", scaling.get("type", "default")))
    _require(rope_type in {"default", "linear", "llama3"}, "rope_type", rope_type)
    _require(float(config.get("partial_rotary_factor", 1.0)) == 1.0, "partial_rotary_factor", "")
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type == "linear":
        return RopeConfig(theta, rope_type, float(scaling["factor"]))
    return RopeConfig(
        theta,
        rope_type,
        float(scaling["factor"]),
        float(scaling["low_freq_factor"]),
        float(scaling["high_freq_factor"]),
        int(scaling["original_max_position_embeddings"]),
    )


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """Of the weights, where config.json says so and it is one of ours."""
    dtype = config.get("dtype", config.get("torch_dtype"))
    return dtype if dtype in DTYPES else None


def _eos_token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
