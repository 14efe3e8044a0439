"""Settings of `baton.config` as options of a command."""

from collections.abc import Callable
from typing import Any, get_args, get_origin

import rich_click as click

from baton.config import Setting, settings_of

HIDDEN = {"failpoint", "test_hooks"}


def _type_name(setting: Setting) -> str:
    annotation = setting.info.annotation
    kinds = [a for a in get_args(annotation) if a is not type(None)] or [annotation]
    if get_origin(annotation) is tuple:
        return "LIST"
    return {int: "INT", float: "FLOAT", str: "TEXT"}.get(kinds[0], "VALUE")


def _choices(setting: Setting) -> tuple[str, ...]:
    values = get_args(setting.info.annotation)
    return values if values and all(isinstance(value, str) for value in values) else ()


def option(setting: Setting) -> Callable[[Any], Any]:
    """A click option that reports only what was given: defaults and the environment are
    load_config's.
    """
    info = setting.info
    flag = "--" + setting.name.replace("_", "-")
    default = "" if info.default in (None, ()) else f" [default: {_shown_default(info.default)}]"
    text = f"{info.description}{default} [env: {setting.env}]"
    is_switch = bool in (info.annotation, *get_args(info.annotation))
    names = [f"{flag}/--no-{flag[2:]}"] if is_switch else [flag]
    kwargs: dict[str, Any] = {"help": text, "default": None, "hidden": setting.name in HIDDEN}
    choices = _choices(setting)
    if not is_switch:
        kwargs["type"] = click.Choice(choices) if choices else str
        kwargs["metavar"] = None if choices else _type_name(setting)
    return click.option(*names, setting.name, **kwargs)


def _shown_default(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def option_groups(config: type[Any]) -> list[Any]:
    """For `click.rich_click.OPTION_GROUPS`."""
    groups: dict[str, list[str]] = {}
    for setting in settings_of(config):
        if setting.name not in HIDDEN:
            flag = "--" + setting.name.replace("_", "-")
            groups.setdefault(setting.group, []).append(flag)
    return [{"name": name, "options": flags} for name, flags in groups.items()]
