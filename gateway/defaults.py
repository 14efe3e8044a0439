"""What holds for fields that a request leaves out: the model's generation_config.json, another
one, or none, and what the operator puts over it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.settings import GatewaySettings
from baton.text import Tokenizer

_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    values: Mapping[str, float] = field(default_factory=dict)  # name of a field → its default
    max_new_tokens: int | None = None  # no answer may be longer
    skip_special_tokens: bool = True
    eos_token_ids: tuple[int, ...] = ()  # besides those that workers know

    @classmethod
    def load(cls, settings: GatewaySettings, tokenizer: Tokenizer) -> "SamplingDefaults":
        """As `--generation-config` and `--override-generation-config` say.

        `max_new_tokens` and EOS ids of the model's own file are left alone: the first is advice for
        offline use, as in vLLM, the second is what workers stop at anyway.

        Raises:
            ValueError: a file that cannot be read, or a value that makes no sense.
        """
        override = json.loads(settings.override_generation_config)
        match settings.generation_config:
            case "auto":
                return _parse({**tokenizer.sampling_defaults, **override})
            case "vllm":
                return _parse(override)
            case folder:
                return _parse({**_read(Path(folder)), **override})


def _read(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--generation-config: {file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--generation-config: {file} is not a JSON object")
    return config


def _parse(config: Mapping[str, Any]) -> SamplingDefaults:
    """Keys that are no defaults of a request (dates, beams, …) are left out."""
    values = {name: config[name] for name in _NUMBERS if config.get(name) is not None}
    for name, value in values.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"generation config: {name} must be a number")
    longest = config.get("max_new_tokens")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ValueError("generation config: max_new_tokens must be a positive integer")
    skip = config.get("skip_special_tokens", True)
    if not isinstance(skip, bool):
        raise ValueError("generation config: skip_special_tokens must be true or false")
    eos = config.get("eos_token_id", [])
    ids = eos if isinstance(eos, list) else [eos]
    if any(type(token_id) is not int or token_id < 0 for token_id in ids):
        raise ValueError("generation config: eos_token_id must be token ids")
    return SamplingDefaults(values, longest, skip, tuple(ids))
