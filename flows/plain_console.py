"""A console to which every text is data: no markup, no emoji codes, no bytes that steer a terminal."""

import re
from typing import Any

from rich.console import Console
from rich.text import Text

STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but for the tab and the line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # directions of writing, which reorder what is read
    "\u2028\u2029\ufeff\ud800-\udfff]"  # line separators, the byte-order mark, what no encoding can write
)


def escape(character: str) -> str:
    """As Python writes it in a string."""
    return character.encode("unicode_escape").decode()


def visible(text: str) -> str:
    """The text with an escape for each character that would steer the terminal instead of being shown."""
    return STEERING.sub(lambda found: escape(found[0]), text)


class PlainConsole(Console):
    """Prints strings, those in tables too, as they are, with `visible` escapes.

    What is to be styled comes as a rich object; text in one is made `visible` by whoever makes it.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich's, without reading anything into the text."""
        return super().render_str(visible(text), **options | {"emoji": False, "markup": False})
