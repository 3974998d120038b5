"""attribute: queries in, ranked pre-training documents out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.parameters import (
    CandidatesFrom,
    Completion,
    Configuration,
    Contrast,
    Prompt,
    Queries,
    QueriesFile,
    TopK,
)
from msif_core.config import Config, Query
from msif_core.errors import InputError
from tasks import attribution, publish, turns


def run_name() -> str:
    """The workspace, and the question where there is one."""
    parameters = flow_run.parameters
    asked = parameters["prompt"] or f"{parameters['queries_file'] or len(parameters['queries'])} queries"
    return f"attribute {parameters['config'].workspace.name}: {' '.join(str(asked).split())[:60]}"


@flow(name="attribute", flow_run_name=run_name)
def attribute(
    config: Configuration,
    prompt: Prompt = "",
    completion: Completion = "",
    contrast: Contrast = "",
    queries: Queries = [],  # noqa: B006 (never changed; a form shows it)
    queries_file: QueriesFile = "",
    top_k: TopK = 0,
    candidates: CandidatesFrom = "as configured",
) -> Path:
    """Which documents taught the model to answer so? Type a prompt and its completion, or name a file of queries.

    The documents of the attributed stage are ranked by exact multi-stage influence. The answer is stored, becomes
    a page, and can be asked in SQL.
    """
    settings = with_retrieval(config, top_k, candidates)
    asked = gather([*typed(prompt, completion, contrast), *queries], queries_file)
    with turns.ahead(config):
        run = attribution.answer(settings, asked, settings.retrieval.top_k)
    attribution.write_page(run)
    publish.publish_catalog(config)
    return run


def typed(prompt: str, completion: str, contrast: str) -> list[Query]:
    """The form's own query, if there is one.

    Raises:
        InputError: an answer is given without its prompt.
    """
    if not prompt and (completion or contrast):
        raise InputError("a completion or another answer is given without a prompt; type the prompt, or clear them")
    return [Query(prompt=prompt, completion=completion or None, contrast=contrast or None)] if prompt else []


def with_retrieval(config: Config, top_k: int, candidates: str) -> Config:
    """The configuration with this run's choices in it."""
    chosen: dict[str, Any] = {}
    if top_k:
        chosen["top_k"] = top_k
    if candidates != "as configured":
        chosen["candidates"] = candidates
    return config.model_copy(update={"retrieval": config.retrieval.model_copy(update=chosen)})


def gather(queries: Sequence[Query], file: str) -> Path | list[dict[str, Any]]:
    """The run's queries: the file, or the typed ones as records.

    Raises:
        InputError: there is none, or both are given.
    """
    if file and queries:
        raise InputError(f"queries are typed and the file {file} is named: choose one of them")
    if file:
        return Path(file)
    if not queries:
        raise InputError("nothing to explain: type a prompt, add queries, or name a file of queries (jsonl)")
    found = [query.model_dump(exclude_none=True) for query in queries]
    return [{**record, "id": record["id"] or f"query-{number}"} for number, record in enumerate(found, 1)]
