"""The commands that talk to a running fleet, or about this machine."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from baton.client.urls import server_root

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
    default = "http://127.0.0.1:8000"
    return click.option(*names, default=default, type=Url(), show_default=True, help=text)


def api_key_option() -> Decorator:
    return click.option(
        "--api-key", default=None, envvar="BATON_API_KEY", show_envvar=True, help="API key."
    )


def model_option(*names: str) -> Decorator:
    return click.option(*names, default=None, help="Model name; the first one served if absent.")


def _terminal_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `chat` and `complete` share."""
    for option in (
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
        command = option(command)
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


@click.command("run-batch")
@click.option(
    "-i", "--input-file", required=True, type=click.Path(path_type=Path), help="Requests."
)
@click.option(
    "-o", "--output-file", required=True, type=click.Path(path_type=Path), help="Answers."
)
@url_option("--url")
@model_option("--model")
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
def run_batch(url: str, disable_tqdm: bool, **options: Any) -> None:
    """Send a file of requests to a running fleet, and write the answers to another.

    Both are OpenAI's batch format (JSON lines). The same command goes on where an earlier one
    ended; answers are written as they come.
    """
    from baton.client.batch import run_batch as run

    sys.exit(run(url, use_tqdm=not disable_tqdm, **options))


@click.command("collect-env")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def collect_env(as_json: bool) -> None:
    """What a report of a problem should say about this machine; keys are hidden."""
    from baton import environment

    found = environment.collect()
    click.echo(environment.as_json(found) if as_json else environment.as_text(found))
