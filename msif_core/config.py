"""Everything a user can set, as pydantic models.

The descriptions are the reference of the YAML file: docs/settings.md, which `msif settings` prints.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from msif_core.config_problems import problems
from msif_core.errors import InputError
from msif_core.workspace import check_name


class Settings(BaseModel):
    """Base of every settings model: immutable, and an unknown key is an error, not a silence."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HubDataset(Settings):
    """A dataset of the Hugging Face `datasets` library: a hub id or a local folder."""

    dataset: str = Field(description="Hub id, or a local folder: of files, or as `save_to_disk` writes it.")
    name: str | None = Field(None, description="Configuration of the dataset, if it has several.")
    split: str = Field("train", description="Split to read.")
    text: str = Field(
        "text", description="Column of the text. Where a row has `prompt` and `completion`, they go before `text`."
    )
    id: str | None = Field(None, description="Column that holds the id; row numbers are used without one.")


Documents = Annotated[
    str | HubDataset | list[str | HubDataset],
    Field(description="Glob of .jsonl (or .gz, .bz2, .zst of it) or .parquet files, a hub dataset, or a list of them."),
]


class Training(Settings):
    """How a stage was trained. Needed by `msif demo` and by retraining."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    epochs: float = Field(1.0, gt=0, description="Passes over the stage's data.")
    batch_size: int = Field(32, ge=1, description="Sequences in an optimizer step.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled, as AdamW's.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps with a rising learning rate.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="The optimizer; sgd is without momentum.")
    seed: int = Field(0, description="Seed of the first weights and of the order of the data.")


def _at_home(value: Any) -> Any:
    """Paths that start with ~ as a shell reads them; anything else as it is."""
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str | Path) else value


class Filter(Settings):
    """A stage's spectral filter f(Lambda) (see docs/method.md)."""

    kind: Literal["damped", "unrolled", "identity"] = Field(
        "damped",
        description="damped: converged, with proximity. unrolled: a finite number of steps. "
        "identity: no curvature, the gradient dot product.",
    )
    damping: float = Field(0.1, gt=0, description="lambda of the attributed stage, alpha of a later one.")
    tau: float | None = Field(None, gt=0, description="Training time, for `unrolled`: see `relative`.")
    relative: bool = Field(
        True,
        description="damping in units of the block's mean eigenvalue, tau of its inverse. For a tau that is a sum of "
        "learning rates, false.",
    )
    per_token_mean: bool = Field(
        False,
        description="The training minimised a mean over tokens: absolute values are rescaled by "
        "the mean number of target tokens of a sequence.",
    )

    @model_validator(mode="after")
    def _unrolled_needs_tau(self) -> Filter:
        if self.kind == "unrolled" and self.tau is None:
            raise ValueError("filter kind 'unrolled' needs tau: set tau (relative to 1/mean eigenvalue by default)")
        return self


class Stage(Settings):
    """One training phase: a checkpoint, the data it was trained on, its filter."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the stage.")
    model: str = Field(description="Folder of the checkpoint, or a hub id.")
    revision: str | None = Field(None, description="Revision of a hub model.")
    documents: Documents
    task: Literal["causal_lm", "classification"] = Field(
        "causal_lm", description="causal_lm: next-token loss. classification: a label for each text."
    )
    adapter: Literal["refuse", "merge"] = Field(
        "refuse",
        description="What to do with a checkpoint that is a PEFT adapter: refuse it, or merge it into its base model.",
    )
    training: Training | None = None
    filter: Filter = Filter()

    _home = field_validator("model", "documents", mode="before")(_at_home)


class CorpusSettings(Settings):
    """Documents to token sequences."""

    max_length: int | None = Field(
        None, ge=2, description="Window length of documents. By default the model's context, 2,048 tokens at most: "
        "memory grows with the window, and few documents are longer. Queries may fill the whole context."
    )  # fmt: skip
    start: Literal["auto", "always", "never"] = Field(
        "auto", description="Start token (BOS) of documents and queries. auto: as the model's tokenizer begins a text, "
        "and its template a chat. always: bos_token. never: none. Once, and in a document's first window alone."
    )  # fmt: skip
    shard_sequences: int = Field(
        2048, ge=1, description="Target number of sequences in a shard. There are 1, 2, 4, 8... shards, so that one "
        "holds 0.7 to 1.4 times as many at first, and half to twice as many while the corpus grows or shrinks.",
    )  # fmt: skip
    skip_bad_records: bool = Field(
        False,
        description="Count and skip malformed records instead of stopping; a file without a good one stops still.",
    )


class CurvatureSettings(Settings):
    """The EK-FAC fit."""

    max_sequences: int = Field(20_000, ge=1, description="Size of the random sample that the fit uses.")
    qkv_split: Literal["none", "projection", "head"] = Field(
        "projection", description="How fused query-key-value maps are split into blocks."
    )
    block_size: int | None = Field(
        None,
        ge=1,
        description="Output rows of wider maps are cut into equal blocks no larger than this, each with a curvature "
        "of its own: cheaper, and blind between blocks. Whole by default (the output head: 4096).",
    )
    track_unembedding: bool = Field(False, description="Track the output head too.")
    include: str = Field(".*", description="Regular expression: names of the modules to track.")
    seed: int = Field(0, description="Seed of the sampled labels and of the sample of sequences.")
    part_sequences: int = Field(
        2048, ge=1, description="Sequences of the sample whose sums share a file: what a kill loses at most."
    )
    memory_budget_gb: float = Field(
        8.0, gt=0, description="Memory for the statistics of a fit, or the query gradients of an answer, held at once."
    )

    @field_validator("include")
    @classmethod
    def _include_compiles(cls, include: str) -> str:
        try:
            re.compile(include)
        except re.error as error:
            raise ValueError(f"{include!r} is no regular expression ({error}); mend it, or leave it out") from None
        return include


class SketchSettings(Settings):
    """What is stored of a whitened gradient (docs/accuracy.md has the measurements)."""

    dimensions: int = Field(32_000, ge=16, description="Dimensions of the sketch.")
    whitening: Literal["none", "kronecker", "eigen", "balanced"] = Field(
        "balanced",
        description="A document's share of the filter f. eigen: f^(1/2). balanced: so that documents and queries have "
        "the same energy, by what the stages' factors say. kronecker: f^(1/2)'s rank-one fit. none: nothing.",
    )
    directions: float = Field(
        0.25, gt=0, le=1,
        description="The eigendirections that carry most of the scores, as the factors let expect, are kept: for this "
        "share of what rotating into all of them costs. Without whitening nothing is rotated, and all is kept.",
    )  # fmt: skip
    seed: int = Field(0, description="Seed of the signs and of the dimensions that are kept.")


class IndexSettings(Settings):
    """The FAISS index."""

    kind: Literal["auto", "flat", "rabitq", "ivf"] = Field(
        "auto",
        description="auto: flat to 1,000 sequences, RaBitQ above. ivf reads a quarter of the codes, finds less, and "
        "stores the centres of 128 cells in every shard: for shards of many more sequences than the default.",
    )
    bits: int = Field(1, ge=1, le=9, description="Bits per dimension of a RaBitQ code.")
    query_bits: int = Field(
        3, ge=0, le=8, description="Bits of the query in RaBitQ (docs/performance.md); 0 is exact and slow."
    )
    recall_queries: int = Field(60, ge=0, description="Held-out queries that measure recall at a build.")
    recall_sample: int = Field(20_000, ge=1, description="Sequences scored exactly to measure recall.")
    recall_rank: int | None = Field(
        None,
        ge=1,
        description="Rank that the held-out queries' filtered gradients are cut to when recall is measured: one pass "
        "over the sample whatever the memory. Whole, and exact, by default; the generation records what a cut loses.",
    )
    min_recall: float = Field(
        0.0,
        ge=0,
        le=1,
        description="A build whose gradient index finds less of the exact top ten in its best 2% (at least ten "
        "sequences) is kept but not published. Needs `queries`.",
    )
    drift_sample: int = Field(
        256, ge=0, description="Sequences on which a build measures how far the pinned factors have drifted."
    )


class RetrievalSettings(Settings):
    """Candidates and re-ranking."""

    top_k: int = Field(20, ge=1, description="Documents in the answer to a query.")
    candidates: Literal["gradient", "bm25", "both"] = Field(
        "both",
        description="Where the documents that are scored exactly come from: the gradient index, the words that they "
        "share with the query, or both. A build with `gradient` makes no BM25 index, which takes 25 bytes of memory a "
        "word of the corpus to build.",
    )
    rerank_fraction: float = Field(0.02, gt=0, le=1, description="Share of the sequences re-scored exactly.")
    rerank_min: int = Field(100, ge=1, description="At least so many sequences are re-scored.")
    rerank_max: int = Field(500, ge=1, description="At most so many sequences are re-scored per query and source.")
    random_sample: int = Field(200, ge=0, description="Random documents scored exactly, for percentiles.")

    def taken(self, sequences: int) -> int:
        """Candidates that each source brings for a query, of so many sequences."""
        return min(max(round(self.rerank_fraction * sequences), self.rerank_min), self.rerank_max)


class CompletionSettings(Settings):
    """The model's own answer to a query that is a prompt alone: greedy."""

    max_new_tokens: int = Field(64, ge=1, description="Longest answer, in tokens.")


class ComputeSettings(Settings):
    """Where and how the passes run."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto (the first GPU, if any), cpu, cuda, cuda:1 ..."
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="The model's dtype; sums are float32 or better whatever it is."
    )
    tf32: bool = Field(
        False,
        description="On a GPU that has it: matrix products of the passes in TF32, inputs rounded to 10 bits and sums "
        "in float32. A bfloat16 model's gradients lose nothing, the eigenbases they are seen in a little.",
    )
    batch_tokens: int = Field(4096, ge=1, description="Padded tokens in a batch.")
    workers: int = Field(
        1, ge=1, description="Tasks that run a model which the Prefect server allows at a time; in one process they "
        "come one after another."
    )  # fmt: skip
    ranks: int = Field(
        1,
        ge=1,
        description="Processes that share one model's weights in a build (FSDP under torchrun), for a causal "
        "language model larger than one accelerator.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "auto",
        description="How the models' attention is computed: an implementation of transformers. auto: what the "
        "checkpoint asks for, else transformers' choice.",
    )
    trust_remote_code: bool = Field(False, description="Run modelling code that comes with a checkpoint.")


class RunnerSettings(Settings):
    """On what the shards of a build run; every kind gives the same bits (docs/performance.md)."""

    kind: Literal["threads", "pool", "ray"] = Field(
        "threads",
        description="threads: in this process. pool: with the help of runs on a Prefect work pool. "
        "ray: on a Ray cluster (the extra `ray`).",
    )
    workers: int = Field(1, ge=1, description="pool: runs that help. ray: tasks at a time.")
    deployment: str = Field("help-build/pool", description="pool: the deployment whose runs help.")
    address: str | None = Field(None, description="ray: the cluster's address; one is started here without it.")
    accelerators: float = Field(0.0, ge=0, description="ray: GPUs that a task asks for.")


class Query(BaseModel):
    """What is asked, and the answer whose loss is explained; fields beside these are kept as metadata."""

    model_config = ConfigDict(extra="allow", frozen=True)

    prompt: str = Field(title="Prompt", description="What the model is asked.")
    completion: str | None = Field(
        None, title="Completion", description="The answer to explain; without one the model answers."
    )
    contrast: str | None = Field(
        None, title="Instead of", description="Another answer: why the completion and not this one?"
    )
    id: str = Field("", title="Name", description="Name of the query; numbered without one.")


class RetrainingSettings(Settings):
    """Ground truth for `msif evaluate --retrain`: every stage trained anew on subsets of the attributed data."""

    pool: int = Field(1200, ge=4, description="Documents that subsets are drawn from; gold documents are among them.")
    subsets: int = Field(60, ge=2, description="Random subsets of the pool.")
    fraction: float = Field(0.5, gt=0, lt=1, description="Share of the pool in a subset.")
    repeats: int = Field(20, ge=0, description="Subsets trained with a second seed too: the noise ceiling.")
    seed: int = Field(0, description="Seed of the pool and of the subsets.")
    left_out: int = Field(20, ge=1, description="Top documents that leave-some-out removes.")
    left_out_queries: int = Field(6, ge=0, description="Queries with leave-some-out: three trainings each, four more.")
    vocabulary: int = Field(1024, ge=259, description="Size of the tokenizer, trained on the pool.")
    hidden: int = Field(64, ge=8, description="Width of the retrained model.")
    layers: int = Field(2, ge=1, description="Its layers.")
    heads: int = Field(4, ge=1, description="Its attention heads.")


class Config(Settings):
    """One YAML file: a workspace, its stages, and how each step is done."""

    workspace: Path = Field(description="Folder of everything that is built.")
    stages: tuple[Stage, ...] = Field(min_length=1, description="In training order; stages[0] is pre-training.")
    attribute_to: str = Field(
        "", validate_default=True, description="The stage whose documents are ranked; the first by default."
    )
    queries: str | None = Field(None, description="Held-out queries (jsonl) that measure the index's recall.")
    corpus: CorpusSettings = CorpusSettings()
    curvature: CurvatureSettings = CurvatureSettings()
    sketch: SketchSettings = SketchSettings()
    index: IndexSettings = IndexSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    completion: CompletionSettings = CompletionSettings()
    retraining: RetrainingSettings = RetrainingSettings()
    compute: ComputeSettings = ComputeSettings()
    runner: RunnerSettings = RunnerSettings()

    _home = field_validator("workspace", "queries", mode="before")(_at_home)
    _readable = field_validator("workspace")(check_name)

    @field_validator("attribute_to", mode="before")
    @classmethod
    def _attribute_to_first(cls, name: Any, known: ValidationInfo) -> Any:
        stages = known.data.get("stages")  # none where they are not valid, which is said of them
        return name or (stages[0].name if stages else "")

    @model_validator(mode="after")
    def _stage_names(self) -> Config:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ: {names}")
        if self.attribute_to not in names:
            raise ValueError(f"attribute_to names no stage: {self.attribute_to!r}; stages are {names}")
        return self

    @property
    def attributed_index(self) -> int:
        """Position of the attributed stage in `stages`."""
        return [stage.name for stage in self.stages].index(self.attribute_to)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read a YAML file.

        Raises:
            InputError: the file is missing, is not YAML, or a value is not allowed; names the key.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such configuration file") from None
        except IsADirectoryError:
            raise InputError(f"{path}: a folder; name the configuration file in it") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(data, dict):
            raise InputError(f"{path}: expected a mapping with the keys workspace and stages")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = "\n".join(f"  {problem}" for problem in problems(error, cls))
            raise InputError(f"{path}: not a valid configuration\n{lines}") from None
