"""Prompts: a region's name and the wordings that mean it, normalised once, so that equal prompts compare equal."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from shared.errors import PromptError
from stage1_localize.contracts import Region

TEXT_LENGTH_MAX = 256
NAME_LENGTH_MAX = 64
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")


def parse_regions(asked: Mapping[str, str | Sequence[str]]) -> tuple[Region, ...]:
    """Turn ``{name: text or texts}`` into regions, in the order given.

    Args:
        asked: Region name -> its one wording, or several that are merged by ``max``.

    Returns:
        Regions with normalised names and texts.

    Raises:
        PromptError: No region, a name or text that is empty, too long or holds control characters, a wording
            without a word or given twice, or names that look alike.

    >>> parse_regions({"lungs": ["lung", "  pulmonary   field "]})
    (Region(name='lungs', texts=('lung', 'pulmonary field')),)
    """
    if not asked:
        raise PromptError("regions: empty", hint="e.g. regions: {tumour: brain tumour}")
    regions: list[Region] = []
    names: set[str] = set()
    for given, value in asked.items():
        name = normalise(given, f"region name {given!r}", NAME_LENGTH_MAX)
        if name.casefold() in names:
            raise PromptError(f"region {name!r}: given twice, or names that differ only in case")
        names.add(name.casefold())
        texts = [value] if isinstance(value, str) else list(value)
        if not texts:
            raise PromptError(f"region {name!r}: no wording", hint="give at least one text")
        wordings = tuple(normalise(text, f"region {name!r}, text {text!r}", TEXT_LENGTH_MAX) for text in texts)
        for text in wordings:
            refuse_wordless(text, f"region {name!r}")
        twice = next((text for text in wordings if wordings.count(text) > 1), None)
        if twice is not None:
            raise PromptError(f"region {name!r}: wording {twice!r} is given twice")
        regions.append(Region(name, wordings))
    return tuple(regions)


def refuse_wordless(text: str, what: str) -> None:
    """Raise PromptError for a text without any letter or digit: a model answers it, and the answer means nothing.

    >>> refuse_wordless("T1", "region 'contrast'")
    """
    if not any(character.isalnum() for character in text):
        raise PromptError(f"{what}: text {text!r} holds no letter or digit", hint="name what is to be found")


def normalise(text: str, what: str, length_max: int) -> str:
    """NFC, white space collapsed and stripped.

    Args:
        text: As written by the user.
        what: How messages call it.
        length_max: In characters, after normalisation.

    Raises:
        PromptError: Empty, too long, or with control or invisible characters.
    """
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    if not plain:
        raise PromptError(f"{what}: empty")
    if len(plain) > length_max:
        raise PromptError(f"{what[:80]}: {len(plain)} characters, at most {length_max}")
    if any(unicodedata.category(character) in _INVISIBLE for character in plain):
        raise PromptError(f"{what[:80]}: holds a control or invisible character")
    return plain
