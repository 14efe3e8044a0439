"""The options that say what a benchmark asks; names are vLLM's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

Command = Callable[..., Any]
_LEN = click.IntRange(min=1)
_DATASETS = ("random", "sharegpt", "prefix_repetition", "timed_trace")
_FIELDS: dict[str, tuple[Any, Any, str]] = {
    "num_prompts": (_LEN, 1000, "Requests."),
    "seed": (int, 0, "Of prompts and arrival times."),
    "random_input_len": (_LEN, 1024, "Tokens of a prompt, behind the prefix."),
    "random_output_len": (_LEN, 128, "Tokens of an answer."),
    "random_range_ratio": (
        click.FloatRange(0, 1, max_open=True),
        0.0,
        "Lengths are even between (1 - this) and (1 + this) times the given.",
    ),
    "random_prefix_len": (click.IntRange(min=0), 0, "Tokens that all prompts begin with."),
    "sharegpt_output_len": (_LEN, None, "Tokens of an answer; those it had if absent."),
    "prefix_repetition_prefix_len": (_LEN, 256, "Tokens of a shared prefix."),
    "prefix_repetition_suffix_len": (_LEN, 256, "Tokens behind it."),
    "prefix_repetition_num_prefixes": (_LEN, 10, "How many prefixes."),
    "prefix_repetition_output_len": (_LEN, 128, "Tokens of an answer."),
    "timed_trace_chunk_hash_size": (_LEN, 512, "Tokens of a prompt that a hash id stands for."),
    "timed_trace_sec_multiplier": (
        click.FloatRange(min=0),
        0.001,
        "Seconds in a unit of the trace's timestamps; more = slower.",
    ),
    "timed_trace_len_multiplier": (
        click.FloatRange(min=0, min_open=True),
        1.0,
        "Scales all lengths, for models shorter than the trace's.",
    ),
}


def dataset_options(command: Command) -> Command:
    for name, (kind, default, text) in reversed(_FIELDS.items()):
        flag = "--" + name.replace("_", "-")
        shown = default is not None
        command = click.option(
            flag, name, type=kind, default=default, show_default=shown, help=text
        )(command)
    command = click.option(
        "--disable-shuffle", is_flag=True, help="Prompts in the dataset's order."
    )(command)
    command = click.option(
        "--dataset-path", type=click.Path(path_type=Path), help="File of sharegpt or timed_trace."
    )(command)
    return click.option(
        "--dataset-name", type=click.Choice(_DATASETS), default="random", show_default=True
    )(command)


def take_dataset(given: dict[str, Any]) -> Any:
    from baton.benchmarks.datasets import Options

    return Options(**{name: given.pop(name) for name in Options.__slots__})


def option_names() -> list[str]:
    """For `click.rich_click.OPTION_GROUPS`."""
    flags = ["--" + name.replace("_", "-") for name in _FIELDS]
    return ["--dataset-name", "--dataset-path", "--disable-shuffle", *flags]
