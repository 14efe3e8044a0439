"""The commands that talk to a running fleet, or about this machine."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import rich_click as click

from baton.cli_options import option
from baton.client.urls import server_root
from baton.config import ConfigError, ServeConfig, load_config, settings_of

_DEFAULT_URL = "http://127.0.0.1:8000"
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Url(click.ParamType[str]):
    """Where a fleet is."""

    name = "URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return server_root(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def url_option(*names: str) -> Decorator:
    text = "The gateway, with or without /v1."
    return click.option(*names, default=_DEFAULT_URL, type=Url(), show_default=True, help=text)


def api_key_option() -> Decorator:
    return click.option(
        "--api-key", default=None, envvar="BATON_API_KEY", show_envvar=True, help="API key."
    )


def model_option(*names: str) -> Decorator:
    return click.option(*names, default=None, help="Model name; the first one served if absent.")


def _terminal_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `chat` and `complete` share."""
    for decorate in (
        click.option("-q", "--quick", default=None, metavar="TEXT", help="Answer this, and end."),
        api_key_option(),
        click.option("--temperature", default=None, type=float, help="The model's if absent."),
        click.option(
            "--max-tokens",
            default=512,
            show_default=True,
            type=click.IntRange(min=1),
            help="Longest answer.",
        ),
        model_option("--model", "--model-name", "model"),
        url_option("--url"),
    ):
        command = decorate(command)
    return command


@click.command()
@_terminal_options
@click.option("--system", "--system-prompt", "system", default=None, help="System message.")
def chat(url: str, **options: Any) -> None:
    """Talk to a running fleet in the terminal."""
    from baton.client.chat import run_chat

    sys.exit(run_chat(url, **options))


@click.command()
@_terminal_options
def complete(url: str, **options: Any) -> None:
    """Let a running fleet go on with texts."""
    from baton.client.complete import run_complete

    sys.exit(run_complete(url, **options))


_FLEET_GROUPS = ("Fleet", "Model", "Engine and KV cache")
_FLEET_SETTINGS = {
    setting.name: setting
    for setting in settings_of(ServeConfig)
    if setting.name != "model"
    and (
        setting.group in _FLEET_GROUPS
        or setting.name.endswith("_parser")
        or setting.name in ("enable_auto_tool_choice", "override_generation_config")
    )
}


def _fleet_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of a fleet that the command starts for itself."""
    for setting in reversed(_FLEET_SETTINGS.values()):
        command = option(setting)(command)
    return command


def _own_fleet(model: str, flags: dict[str, Any]) -> AbstractContextManager[str]:
    """
    Raises:
        click.UsageError
    """
    from baton.private_fleet import private_fleet

    try:
        return private_fleet(load_config(ServeConfig, flags | {"model": model}, os.environ))
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


click.rich_click.OPTION_GROUPS["baton run-batch"] = [
    {
        "name": "A fleet for this batch alone (--model without --url)",
        "options": [f"--{name.replace('_', '-')}" for name in _FLEET_SETTINGS],
    }
]


@click.command("run-batch")
@click.option(
    "-i", "--input-file", required=True, type=click.Path(path_type=Path), help="Requests."
)
@click.option(
    "-o", "--output-file", required=True, type=click.Path(path_type=Path), help="Answers."
)
@click.option("--url", default=None, type=Url(), help=f"A running fleet. [default: {_DEFAULT_URL}]")
@click.option(
    "--model",
    default=None,
    help="With --url: for requests that name no model. Without: a checkpoint or hub id, for which "
    "a fleet is started that ends with the batch.",
)
@api_key_option()
@click.option(
    "--max-inflight",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    help="Requests under way at once.",
)
@click.option(
    "--patience",
    "patience_s",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds for which a request is tried again while the server is busy or away.",
)
@click.option("--disable-tqdm", is_flag=True, help="No progress bar.")
@_fleet_options
def run_batch(url: str | None, model: str | None, disable_tqdm: bool, **options: Any) -> None:
    """Answer a file of requests: by a running fleet, or by one of its own.

    Requests and answers are OpenAI's batch format (JSON lines). The same command goes on where an
    earlier one ended; answers are written as they come.
    """
    from baton.client.batch import run_batch as run

    flags = {name: options.pop(name) for name in _FLEET_SETTINGS}
    flags = {name: value for name, value in flags.items() if value is not None}
    options["use_tqdm"] = not disable_tqdm
    if url is None and model is not None:
        sys.exit(run(_own_fleet(model, flags), **options))
    if flags:
        name = next(iter(flags)).replace("_", "-")
        raise click.UsageError(f"--{name} is for a fleet of its own: give --model without --url.")
    sys.exit(run(url or _DEFAULT_URL, model=model, **options))


@click.command("collect-env")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def collect_env(as_json: bool) -> None:
    """What a report of a problem should say about this machine; keys are hidden."""
    from baton import environment

    found = environment.collect()
    click.echo(environment.as_json(found) if as_json else environment.as_text(found))
