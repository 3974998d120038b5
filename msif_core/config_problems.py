"""What is wrong with a configuration, in words for whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def problems(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Each problem that pydantic found, after the keys that lead to it from `root`."""
    return [f"{'.'.join(map(str, e['loc'])) or '(top level)'}: {_message(e, root)}" for e in error.errors()]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def _message(error: Any, root: type[BaseModel]) -> str:
    """What pydantic says of an error; of an unknown key, which ones there are."""
    if error["type"] != "extra_forbidden":
        return str(error["msg"])
    return f"unknown key; known here: {', '.join(_model_at(error['loc'][:-1], root).model_fields)}"


def _model_at(location: Sequence[str | int], root: type[BaseModel]) -> type[BaseModel]:
    """The model that the keys of a configuration lead to; steps that are no field choose in a list or a union."""
    model = root
    for step in location:
        if step in model.model_fields:
            model = next(models_in(model.model_fields[str(step)].annotation))
    return model
