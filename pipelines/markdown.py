"""Users' words in Markdown."""

from __future__ import annotations

import re


def as_text(text: str) -> str:
    """A user's words, so that Markdown takes none of them for its own."""
    return re.sub(r"([\\`*_<>|\[\]#~&])", r"\\\1", " ".join(text.split()))
