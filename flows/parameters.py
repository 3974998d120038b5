"""Parameters that the flows share, as the forms in the Prefect UI show them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from msif_core.config import Config, Query


def shown(title: str, description: str, **limits: Any) -> Any:
    """Title, description and limits of a parameter.

    Prefect puts the parameter's name over a field's own title; it leaves what the schema adds by itself.
    """
    return Field(json_schema_extra={"title": title, "description": description}, **limits)


def _load(value: Any) -> Any:
    """A path becomes the configuration that stands there; anything else is validated as one."""
    return Config.load(value) if isinstance(value, str | Path) else value


Configuration = Annotated[
    Config,
    BeforeValidator(_load),
    WithJsonSchema({"type": "string"}),
    shown(
        "Configuration",
        "Path of a configuration (YAML) on the machine that runs the job. Relative paths, here and in the file, "
        "start at the folder that the job runs in.",
    ),
]
"""A configuration, or the path of one: a form asks for the path and nothing of its content."""

Refit = Annotated[
    bool,
    shown("Fit anew", "Fit the curvature factors on the corpus as it is now, a full build. Otherwise they stay."),
]
Prompt = Annotated[str, shown("Prompt", "What the model is asked. Leave it empty to explain the queries below.")]
Completion = Annotated[
    str, shown("Completion", "The answer to explain. Left empty, the model answers and that answer is explained.")
]
Contrast = Annotated[
    str, shown("Instead of", "Another answer: explain why the model prefers the completion to this one.")
]
Queries = Annotated[list[Query], shown("More queries", "Prompts and completions that are answered in the same run.")]
QueriesFile = Annotated[
    str, shown("File of queries", "Or the path of a jsonl file of queries on the machine that runs the job.")
]
TopK = Annotated[int, shown("Documents", "Documents in each answer; 0: as many as the configuration says.", ge=0)]
CandidatesFrom = Annotated[
    Literal["as configured", "gradient", "bm25", "both"],
    shown("Candidates from", "Where the documents that are scored exactly come from: gradient index, words, or both."),
]
TailPatchRate = Annotated[
    float, shown("Learning rate", "Of the tail-patch's single step: small, so that random documents do little.", gt=0)
]
