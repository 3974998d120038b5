"""The linear maps of a model that are tracked: which ones, and how their output rows form blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from msif_core import experts
from msif_core.errors import InputError
from msif_core.module_calls import TOKENS, Layout, ModuleCalls, is_linear, module_calls

if TYPE_CHECKING:
    from msif_core.config import CurvatureSettings

SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"query", "key", "value"})
"""Maps that read the same input in most models, and then share A and Q_A."""

ATTENDED = SIBLINGS[0] | SIBLINGS[2]
"""Of separate maps, those that make queries, keys and values."""

WIDEST_BLOCK = 4096
"""`curvature.block_size` of a tracked head, where none is set."""


@dataclass(frozen=True)
class Blocks:
    """How the output rows of a map form `count` blocks: they lie as [dealt, count, rows of a block / dealt].

    GPT-2's [queries | keys | values] are 3 blocks, dealt once. GPT-NeoX has a query, a key and a value of every head in
    turn: 3 blocks, dealt out to as many heads as there are.
    """

    count: int
    dealt: int = 1


WHOLE = Blocks(1)


def _one_key_or_many(config: Any) -> Blocks:
    """All queries, then the one key and value that they share; or each head's query, key and value."""
    heads = config.num_attention_heads
    return Blocks(heads + 2) if config.multi_query else Blocks(3, heads)


def _falcon(config: Any) -> Blocks:
    if config.new_decoder_architecture:  # of every group of keys: its queries, one key, one value
        return Blocks(config.num_attention_heads // config.num_kv_heads + 2, config.num_kv_heads)
    return _one_key_or_many(config)


FUSED: dict[tuple[str, str], Callable[[Any], Blocks]] = {
    ("gpt_neox", "query_key_value"): lambda config: Blocks(3, config.num_attention_heads),
    ("bloom", "query_key_value"): lambda config: Blocks(3, config.num_attention_heads),
    ("gpt2", "c_attn"): lambda config: Blocks(3),
    ("mpt", "Wqkv"): lambda config: Blocks(3),
    ("codegen", "qkv_proj"): lambda config: Blocks(3, 4),  # cut for four accelerators, whatever the heads
    ("phi3", "qkv_proj"): lambda config: Blocks(config.num_attention_heads // config.num_key_value_heads + 2),
    ("gpt_bigcode", "c_attn"): _one_key_or_many,
    ("falcon", "query_key_value"): _falcon,
}
"""Blocks of maps that hold queries, keys and values in one matrix, by model type and name: each model's own code.

Where there are fewer keys than queries, the blocks have the size of the keys, and the queries have several.
"""

FUSED_NAMES = {name for _, name in FUSED} | {"W_pack"}
"""Names that such maps have; of a model that is not listed, the map is one block."""


class Expert(NamedTuple):
    """Where an expert's map is: the module that holds the experts, its parameter, and the expert's number."""

    module: str
    parameter: str
    number: int


@dataclass(frozen=True)
class TrackedMap:
    """A linear map y = W a whose output rows are seen as G blocks of equal size b, each with its own S.

    Attributes:
        d_in: inputs, the homogeneous coordinate of a bias included.
        groups: G.
        cuts: diagonal pieces that the S of each block is cut into (`curvature.block_size`); they share the block's mean
            eigenvalue, which relative damping refers to.
        heads: output rows lie as [heads, G, b / heads]; 1 where the blocks are contiguous.
        input_group: name shared by the maps that read the same input.
        layout: the axes of its input; None where it mixes sequences in an unknown order.
        expert: of a map that is an expert's; its module is that of all experts.
        routed: share of the tokens that reach it, as far as the configuration tells.
        also: further modules that hold the same weight (blocks that a model repeats).
    """

    name: str
    d_in: int
    d_out: int
    bias: bool
    groups: int
    heads: int
    input_group: str
    cuts: int = 1
    layout: Layout | None = TOKENS
    expert: Expert | None = None
    routed: float = 1.0
    also: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """[G, b, d_in], the shape of the map's gradient."""
        return (self.groups, self.d_out // self.groups, self.d_in)

    def blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """Output rows [..., d_out] as the blocks that they form: [..., G, b]."""
        return rows.unflatten(-1, (self.heads, self.groups, -1)).transpose(-3, -2).flatten(-2)

    @property
    def pieces(self) -> tuple[int, int]:
        """Number and width of the pieces of S, [P, p]; P p is d_out."""
        return (self.groups * self.cuts, self.d_out // (self.groups * self.cuts))

    @property
    def s_entries(self) -> int:
        """Entries of all pieces of S."""
        return self.d_out * self.pieces[1]

    @property
    def size(self) -> int:
        """Number of tracked parameters."""
        return self.d_in * self.d_out


def tracked_maps(model: Any, settings: CurvatureSettings) -> list[TrackedMap]:
    """The linear maps that `settings` ask for, in the model's order.

    A module that a text never reaches (the vision part of a model that sees, say) is none of them.

    Raises:
        InputError: none is left, a tracked head is tied to the embedding, or the model is an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__}: encoder-decoder models are not supported")
    head, embedding = output_embedding(model), input_embedding(model)
    calls = module_calls(model)
    found, candidates = [], list(_candidates(model, calls, settings))
    for maps in candidates:
        module = model.get_submodule(maps[0].name) if maps[0].expert is None else None
        if module is not None and module is head and not settings.track_unembedding:
            continue
        if module is not None and embedding is not None and module.weight is embedding.weight:
            raise InputError(
                f"{maps[0].name}: tied to the embedding, whose gradient is not tracked; set "
                "curvature.track_unembedding: false"
            )
        found += [m for m in maps if re.search(settings.include, m.name)]
    if not found:
        names = sorted(m.name for maps in candidates for m in maps)
        if not names:
            raise InputError(f"{type(model).__name__}: it has no linear map that a text reaches, so nothing is tracked")
        raise InputError(f"curvature.include {settings.include!r} matches none of the linear maps: {names}")
    return found


def output_embedding(model: Any) -> nn.Module | None:
    """The output head, None where the model names none."""
    try:
        head: nn.Module | None = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head


def input_embedding(model: Any) -> Any:
    """The module that embeds tokens, None where the model names none with one weight."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding if isinstance(getattr(embedding, "weight", None), nn.Parameter) else None


def text_config(model: Any) -> Any:
    """The part of a model's configuration that is about text; all of it in most models."""
    return model.config.get_text_config(decoder=True)


def _candidates(model: Any, calls: ModuleCalls | None, settings: CurvatureSettings) -> Iterator[list[TrackedMap]]:
    """The maps of every linear module and of every module of experts that a text reaches, in the model's order.

    Modules that hold one weight are one map.
    """
    head = output_embedding(model)
    linear = {n: m for n, m in model.named_modules() if (calls is None or n in calls) and is_linear(m)}
    places: dict[int, list[str]] = {}
    for name, module in linear.items():
        places.setdefault(id(module.weight), []).append(name)
    for name, module in model.named_modules():
        if name in linear:
            first, *also = places[id(module.weight)]
            if name == first:
                yield [_linear(model, name, module, settings, module is head, calls, tuple(also))]
        elif stacks := experts.stacks_of(module):
            yield [m for stack in stacks for m in _experts(model, name, stack, settings)]


def _linear(
    model: nn.Module,
    name: str,
    module: Any,
    settings: CurvatureSettings,
    is_head: bool,
    calls: ModuleCalls | None,
    also: tuple[str, ...],
) -> TrackedMap:
    weight = module.weight
    d_in, d_out = weight.shape if isinstance(module, Conv1D) else reversed(weight.shape)
    blocks = WHOLE if is_head else _blocks(model, name, int(d_out), settings.qkv_split)
    cuts = _cuts(int(d_out) // blocks.count, settings.block_size or (WIDEST_BLOCK if is_head else int(d_out)))
    has_bias = module.bias is not None
    layouts = {TOKENS} if calls is None else {calls[place].layout for place in (name, *also)}
    return TrackedMap(
        name,
        int(d_in) + has_bias,
        int(d_out),
        has_bias,
        blocks.count,
        blocks.dealt,
        _input_group(model, name, has_bias, calls),
        cuts,
        layouts.pop() if len(layouts) == 1 else None,
        also=also,
    )


def _input_group(model: nn.Module, name: str, has_bias: bool, calls: ModuleCalls | None) -> str:
    """The name of what the map reads: its own, or one that it shares with the maps beside it that read the same."""
    parent, _, leaf = name.rpartition(".")
    siblings = next((s for s in SIBLINGS if leaf in s), None)
    if siblings is None or calls is None:
        return name
    beside = {f"{parent}.{other}" for other in siblings if hasattr(model.get_submodule(parent), other)}
    if any(other not in calls or calls[other].inputs != calls[name].inputs for other in beside):
        return name
    # A sibling without a bias has another homogeneous input.
    return f"{parent}.{'+'.join(sorted(siblings))}" + ("+1" if has_bias else "")


def _experts(model: Any, name: str, stack: experts.Stack, settings: CurvatureSettings) -> list[TrackedMap]:
    """A map for each expert."""
    cuts = _cuts(stack.d_out, settings.block_size or stack.d_out)
    bias = stack.bias is not None
    return [
        TrackedMap(
            f"{name}.{stack.parameter}.{number}",
            stack.d_in + bias,
            stack.d_out,
            bias,
            1,
            1,
            f"{name}.{stack.reads}.{number}",
            cuts,
            None,
            Expert(name, stack.parameter, number),
            experts.routed_share(text_config(model), stack.count),
        )
        for number in range(stack.count)
    ]


def _blocks(model: Any, name: str, d_out: int, split: str) -> Blocks:
    """Blocks of a query-key-value map; any other map is one block."""
    leaf = name.rpartition(".")[2]
    if split == "none" or leaf not in FUSED_NAMES | ATTENDED:
        return WHOLE
    config = text_config(model)
    fused = FUSED.get((config.model_type, leaf))
    if fused is None and (leaf in FUSED_NAMES or split != "head"):
        return WHOLE
    if split == "head":
        width = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
        return Blocks(d_out // width) if d_out % width == 0 else WHOLE
    return fused(config) if fused is not None else WHOLE


def in_unknown_order(maps: list[TrackedMap], split: str) -> list[str]:
    """Names of fused query-key-value maps that are one block as the order of their rows is not known."""
    fused = (m.name for m in maps if m.groups == 1 and m.name.rpartition(".")[2] in FUSED_NAMES)
    return [] if split == "none" else list(fused)


def _cuts(rows: int, widest: int) -> int:
    """Fewest equal pieces of `rows` output rows that are no larger than `widest`; a prime number has a diagonal S."""
    return next(g for g in range(1, rows + 1) if rows % g == 0 and rows // g <= widest)
