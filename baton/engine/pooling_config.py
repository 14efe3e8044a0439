"""What a checkpoint says about pooling: the backbone, and how a text's hidden states become one
result. No torch.

An embedding model names its pooling in the files of sentence-transformers (`modules.json`,
`1_Pooling/config.json`, `sentence_bert_config.json`); where there are none, its kind decides. A
cross-encoder is a sequence classifier with one label.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from baton.engine.checkpoint import resolve_checkpoint
from baton.engine.encoder_config import ENCODERS, EncoderConfig, parse_encoder_config
from baton.engine.model_config import (
    FAMILIES,
    ModelConfig,
    parse_model_config,
    read_config,
    read_json,
)
from baton.errors import InvalidRequest
from baton.pooling import PoolingInfo, PoolingTask

_CLASSIFIER = "ForSequenceClassification"
_GENERATOR = "ForCausalLM"
_METHOD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


class PoolingMethod(StrEnum):
    """Which hidden states of a sequence its result is made of."""

    CLS = "cls"  # the first
    LAST = "last"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    backbone: ModelConfig | EncoderConfig
    info: PoolingInfo
    method: PoolingMethod
    use_activation: bool  # unless a request says otherwise
    max_len: int  # tokens of one input


def is_pooling(model: str, revision: str | None, runner: str) -> bool:
    """Whether a model (a directory or hub id) is to be run for embeddings or scores.

    Args:
        runner: "auto", "generate" or "pooling".

    Raises:
        InvalidRequest: its files cannot be had.
    """
    if runner != "auto":
        return runner == "pooling"
    return is_pooling_model(resolve_checkpoint(model, revision, weights=False))


def is_pooling_model(path: Path) -> bool:
    """Whether a checkpoint's files say that it is made for embeddings or scores."""
    named = read_json(path / "config.json").get("architectures") or []
    return (path / "modules.json").exists() or any(map(_is_pooling, named))


def _is_pooling(architecture: str) -> bool:
    return architecture in ENCODERS or (
        not architecture.endswith(_GENERATOR) and _generator(architecture) in FAMILIES
    )


def _generator(architecture: str) -> str:
    """ "Qwen3Model", "Qwen3ForSequenceClassification" → "Qwen3ForCausalLM"."""
    return architecture.removesuffix(_CLASSIFIER).removesuffix("Model") + _GENERATOR


def load_pooling_config(
    path: Path, overrides: str | None = None, hf_overrides: str | None = None
) -> PoolingConfig:
    """
    Args:
        overrides: JSON with `pooling_type` and `use_activation`, over what the files say.
        hf_overrides: see `baton.engine.model_config.read_config`.

    Raises:
        InvalidRequest: a file is missing or malformed, or asks for something unsupported.
    """
    config = read_config(path, hf_overrides)
    try:
        found = _parse(config, _Modules.read(path))
        return found if overrides is None else _override(found, json.loads(overrides))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the files in {path} are not usable: {error!r}", "model") from error


def _override(found: PoolingConfig, overrides: Mapping[str, Any]) -> PoolingConfig:
    unknown = overrides.keys() - {"pooling_type", "use_activation"}
    if unknown:
        raise InvalidRequest(f"unknown in pooler_config: {', '.join(unknown)}", "pooler_config")
    try:
        method = PoolingMethod(str(overrides.get("pooling_type", found.method)).lower())
    except ValueError:
        raise InvalidRequest("pooling_type must be CLS, LAST or MEAN", "pooler_config") from None
    use_activation = bool(overrides.get("use_activation", found.use_activation))
    return replace(found, method=method, use_activation=use_activation)


def _parse(config: Mapping[str, Any], modules: "_Modules") -> PoolingConfig:
    named = [str(name) for name in config.get("architectures") or ()]
    architecture = next((n for n in named if _is_pooling(n) or n in FAMILIES), None)
    if architecture is None:
        raise InvalidRequest(
            f"unsupported architecture {', '.join(named) or config.get('model_type')!r} for "
            f"pooling; supported: {', '.join(sorted(_supported()))}",
            "model",
        )
    backbone: ModelConfig | EncoderConfig
    if architecture in ENCODERS:
        backbone, method = parse_encoder_config(config, architecture), PoolingMethod.CLS
    else:
        family = architecture if architecture in FAMILIES else _generator(architecture)
        backbone = parse_model_config({**config, "architectures": [family]})
        method = PoolingMethod.LAST
    longest = min(backbone.max_len, modules.max_len or backbone.max_len)
    if architecture.endswith(_CLASSIFIER):
        tells_pairs = isinstance(backbone, EncoderConfig) and backbone.num_token_types > 1
        info = PoolingInfo(
            PoolingTask.SCORE, num_values=_num_labels(config), tells_pairs=tells_pairs
        )
        return PoolingConfig(backbone, info, method, _is_sigmoid(config), longest)
    shorter = tuple(int(n) for n in config.get("matryoshka_dimensions") or ())
    info = PoolingInfo(
        PoolingTask.EMBED,
        num_values=backbone.hidden_size,
        is_matryoshka=bool(config.get("is_matryoshka", False)) or bool(shorter),
        dimensions=shorter,
    )
    return PoolingConfig(backbone, info, modules.method or method, modules.normalizes, longest)


def _supported() -> list[str]:
    decoders = [name.removesuffix(_GENERATOR) for name in FAMILIES]
    return [*ENCODERS, *(f"{n}{end}" for n in decoders for end in ("Model", _CLASSIFIER))]


def _num_labels(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    num_labels = len(labels) if labels is not None else int(config.get("num_labels", 2))
    if num_labels != 1:
        raise InvalidRequest(
            f"a classifier of {num_labels} labels: scores come from models with one", "model"
        )
    return num_labels


def _is_sigmoid(config: Mapping[str, Any]) -> bool:
    """What sentence-transformers applies to a score: a sigmoid, unless config.json names another
    function."""
    named = (config.get("sentence_transformers") or {}).get("activation_fn")
    named = named or config.get("sbert_ce_default_activation_function")
    name = "Sigmoid" if named is None else str(named).rpartition(".")[2]
    if name not in ("Sigmoid", "Identity"):
        raise InvalidRequest(f"unsupported activation of scores: {name}", "model")
    return name == "Sigmoid"


@dataclass(frozen=True, slots=True)
class _Modules:
    """What the files of sentence-transformers say; without them, embeddings get norm 1."""

    method: PoolingMethod | None = None
    normalizes: bool = True
    max_len: int | None = None

    @classmethod
    def read(cls, path: Path) -> "_Modules":
        if not (path / "modules.json").exists():
            return cls()
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
        if unknown:
            raise InvalidRequest(f"unsupported in modules.json: {', '.join(unknown)}", "model")
        folders = {kind: str(m["path"]) for kind, m in zip(kinds, modules, strict=True)}
        settings = path / "sentence_bert_config.json"
        longest = read_json(settings).get("max_seq_length") if settings.exists() else None
        method = None
        if "Pooling" in folders:
            # One level below, whatever the file says: it comes with the model.
            method = _method(read_json(path / Path(folders["Pooling"]).name / "config.json"))
        return cls(method, "Normalize" in kinds, None if longest is None else int(longest))


def _method(config: Mapping[str, Any]) -> PoolingMethod:
    """Of `1_Pooling/config.json`, in either spelling."""
    mode = config.get("pooling_mode")
    on = [mode] if mode is not None else [k for k, v in config.items() if v is True]
    found = [_METHOD_KEYS.get(name, name) for name in on if name != "include_prompt"]
    names = {"lasttoken": "last"}
    try:
        (method,) = (PoolingMethod(names.get(name, name)) for name in found)
    except ValueError:
        raise InvalidRequest(
            f"unsupported pooling: {', '.join(map(str, found))}", "model"
        ) from None
    return method
