"""Every setting as Markdown: what `msif settings` prints and docs/settings.md holds."""

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from msif_core.config import Config, Settings
from msif_core.config_problems import models_in

HEAD = """# Settings

A configuration is one YAML file; only `workspace` and `stages` are required. An unknown key is an error. Relative paths
start at the folder that msif is called from. This page is what `msif settings` prints.
"""
KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def markdown() -> str:
    """A table for each model of settings, in the order of the file."""
    return "\n".join([HEAD, *(table(path, model) for path, model in sections("", Config))])


def sections(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and those inside it, with the keys that lead there."""
    yield path, model
    for name, field in model.model_fields.items():
        for inner in dict.fromkeys(models_in(field.annotation)):
            yield from sections(f"{path}.{name}".lstrip("."), inner)


def table(path: str, model: type[BaseModel]) -> str:
    """One model's keys: value, default and meaning."""
    title = f"`{path}`" if path else "The file"
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        inner = list(models_in(field.annotation))
        meaning = field.description or (inner[0].__doc__ or "" if inner else "")
        rows.append(f"| `{name}` | {value_of(f'{path}.{name}'.lstrip('.'), field)} | {default_of(field)} | {meaning} |")
    return f"## {title}\n\n{(model.__doc__ or '').strip()}\n\n" + "\n".join(rows) + "\n"


def value_of(path: str, field: FieldInfo) -> str:
    """What may stand there."""
    inner = any(models_in(field.annotation))
    limits = [f"{sign} {getattr(limit, name):g}" for limit in field.metadata
              for name, sign in BOUNDS.items() if hasattr(limit, name)]  # fmt: skip
    words = " or ".join(dict.fromkeys(kinds(field.annotation)))
    return " ".join([", ".join(filter(None, [words, f"see `{path}`" if inner else ""])), ", ".join(limits)]).strip()


def kinds(annotation: Any) -> list[str]:
    """A type in words, without models of settings."""
    if get_origin(annotation) is Literal:
        return [f"`{value}`" for value in get_args(annotation)]
    if get_origin(annotation) in (Union, UnionType):
        return [word for part in get_args(annotation) if part is not NoneType for word in kinds(part)]
    if get_origin(annotation) in (list, tuple):
        return ["a list"]
    if any(models_in(annotation)):
        return []
    return [KINDS.get(annotation, "path")]


def default_of(field: FieldInfo) -> str:
    """The default as YAML writes it."""
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value == "" or isinstance(value, Settings):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
