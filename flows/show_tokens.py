"""Records token by token on the terminal: what has a loss is told by a sign and by colour, data is never markup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from flows.plain_console import escape
from msif_core.token_view import Seen, Token

SIGN = {True: "loss ▶ ", False: "       "}
"""What stands before lines of tokens that have a loss, and of those that have none."""

BETWEEN, REST, NOTHING = "│", "…", "▁"
"""Between two tokens, for one that is the rest of the character before it, and for one that reads as nothing.

SentencePiece's space before a text does. In a text all three are escaped, and so is what begins an escape.
"""


def print_tokens(found: Sequence[Seen], console: Console) -> None:
    """Each window as lines of tokens, parted by bars."""
    for seen in found:
        if not seen.tokens:
            console.print(Text(f"{seen.kind} {_escaped(seen.record)}: no token of it has a loss; it is left out"))
            continue
        of = f", window {seen.window} of {seen.windows}" if seen.windows > 1 else ""
        losses = f"{sum(token.target for token in seen.tokens)} with a loss"
        what = losses if seen.label is None else f"label {seen.label} has the loss"
        console.print(Text(f"{seen.kind} {_escaped(seen.record)}{of}: {len(seen.tokens)} tokens, {what}"))
        if seen.kind == "prompt":
            console.print(Text("       the model answers, and its answer has the loss"))
        for target, run in groupby(seen.tokens, key=lambda token: token.target):
            for line in _lines(list(run), console.width - len(SIGN[True])):
                console.print(Text.assemble((SIGN[target], "bold green"), line), soft_wrap=True)
        console.print()


def _lines(tokens: Sequence[Token], width: int) -> Iterator[Text]:
    """Tokens between bars, as many in a line as go in."""
    line = Text(BETWEEN, "dim")
    for token in tokens:
        shown = _shown(token)
        if len(line) > 1 and cell_len(line.plain) + cell_len(shown) + 1 > width:
            yield line
            line = Text(BETWEEN, "dim")
        style = "bold magenta" if token.special else "green" if token.target else ""
        line.append(shown, style)
        line.append(BETWEEN, "dim")
    yield line


def _shown(token: Token) -> str:
    return _escaped(token.text) or (REST if token.rest else NOTHING)


def _escaped(text: str) -> str:
    """Text with escapes for all that is not printable or has a meaning here; line feeds and odd spaces are tokens."""
    return "".join(escape(c) if not c.isprintable() or c in (BETWEEN, REST, NOTHING, "\\") else c for c in text)
