"""How GroundingDINO is asked: phrases between delimiters, and which tokens of the prompt belong to which wording.

A prompt reads ``[CLS] phrase . phrase . [SEP]``; a token of the text encoder sees its own phrase only, and position
numbers start anew at each (Liu et al., "Grounding DINO", 2023, section 3.4). The releases match phrases to labels by
comparing decoded strings, which fails where one is part of another; here each wording keeps the places of its own
tokens, exactly, because every phrase is tokenised by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int64
from torch import Tensor, nn

from shared.errors import CorruptError, PromptError
from stage1_localize.contracts import Region

DELIMITERS = ("[CLS]", "[SEP]", ".", "?")
"""Tokens that end a phrase; their numbers come from the tokenizer, not from one vocabulary."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Span:
    """Where a wording stands in a prompt.

    Attributes:
        region: Index of its region.
        text: Index of the wording inside its region.
        start: First token.
        stop: One past the last; the delimiter is not part of it.
    """

    region: int
    text: int
    start: int
    stop: int


@dataclass(frozen=True)
class Prompt:
    """One text as the model reads it.

    Attributes:
        caption: Lower-case phrases, each followed by a dot.
        input_ids: Its tokens, delimiters included.
        spans: One a wording; wordings that read alike share their tokens.
    """

    caption: str
    input_ids: tuple[int, ...]
    spans: tuple[Span, ...]


def build_prompts(tokenizer: Any, regions: Sequence[Region], *, joint: bool, tokens_max: int) -> list[Prompt]:
    """Prompts for all wordings: one for each phrase, or one for all together.

    Args:
        tokenizer: A BERT tokenizer of transformers.
        regions: What is asked.
        joint: All phrases in one prompt, as published.
        tokens_max: Longest prompt that the model reads, in tokens.

    Raises:
        PromptError: A wording that is empty, holds a delimiter or nothing that the tokenizer knows, or a prompt that
            is too long.
    """
    asked: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
    for r, region in enumerate(regions):
        for t, text in enumerate(region.texts):
            phrase, ids = _phrase(tokenizer, region.name, text)
            asked.setdefault(phrase, (ids, []))[1].append((r, t))
    phrases = [(phrase, ids, places) for phrase, (ids, places) in asked.items()]
    groups = [phrases] if joint and phrases else [[each] for each in phrases]
    prompts = [_prompt(tokenizer, group) for group in groups]
    for prompt in prompts:
        if len(prompt.input_ids) > tokens_max:
            names = sorted({regions[span.region].name for span in prompt.spans})
            raise PromptError(
                f"region{'s' if len(names) > 1 else ''} {', '.join(repr(name) for name in names)}: a prompt of "
                f"{len(prompt.input_ids)} tokens, the text encoder reads at most {tokens_max}",
                hint="ask fewer or shorter wordings" + (", or joint=false: each alone" if joint else ""),
            )
    return prompts


def delimiter_ids(tokenizer: Any) -> list[int]:
    """Numbers of the `DELIMITERS` in a tokenizer's vocabulary."""
    return [int(number) for number in tokenizer.convert_tokens_to_ids(list(DELIMITERS))]


def _phrase(tokenizer: Any, region: str, text: str) -> tuple[str, list[int]]:
    phrase = " ".join(text.lower().split()).rstrip(" .")
    ids = [int(number) for number in tokenizer(phrase, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise PromptError(f"region '{region}': wording '{text}' holds no word")
    if set(ids) & set(delimiter_ids(tokenizer)):
        raise PromptError(
            f"region '{region}': '{text}' holds '.' or '?', which end a phrase for this grounder",
            hint="write it without, or as two wordings",
        )
    if tokenizer.unk_token_id in ids:
        raise PromptError(
            f"region '{region}': '{text}' holds signs that the text encoder does not know",
            hint="most of these text encoders read English only",
        )
    return phrase, ids


def _prompt(tokenizer: Any, phrases: Sequence[tuple[str, list[int], list[tuple[int, int]]]]) -> Prompt:
    first, last, dot, _ = delimiter_ids(tokenizer)
    input_ids, spans = [first], []
    for _, ids, places in phrases:
        start = len(input_ids)
        spans += [Span(region, text, start, start + len(ids)) for region, text in places]
        input_ids += [*ids, dot]
    return Prompt(" . ".join(phrase for phrase, _, _ in phrases) + " .", (*input_ids, last), tuple(spans))


class PhraseEncoder(nn.Module):
    """A BERT that encodes each prompt once a process, whatever asks for it.

    It stands where a GroundingDINO expects its text encoder, and takes the places of both releases: the mask with or
    without an axis for heads. All rows of a call must hold one prompt.

    Args:
        bert: A ``BertModel`` whose attention is SDPA: its eager attention would add a boolean mask instead of masking.
    """

    def __init__(self, bert: Any) -> None:
        super().__init__()
        if bert.config._attn_implementation != "sdpa":
            raise AssertionError(f"attention is {bert.config._attn_implementation}, expected sdpa")
        self.bert, self.config = bert, bert.config
        self._known: dict[tuple[int, ...], Tensor] = {}

    def forward(
        self,
        input_ids: Int64[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B T T"] | Bool[Tensor, "B 1 T T"],
        token_type_ids: Int64[Tensor, "B T"],
        position_ids: Int64[Tensor, "B T"],
        **_: Any,
    ) -> dict[str, Tensor]:
        """Hidden states [B, T, C] of the prompt, as ``last_hidden_state``."""
        key = tuple(input_ids[0].tolist())
        if key not in self._known:
            size = len(key)
            self._known[key] = self.bert(
                input_ids=input_ids[:1],
                attention_mask=attention_mask[:1].reshape(1, 1, size, size),
                token_type_ids=token_type_ids[:1],
                position_ids=position_ids[:1],
            ).last_hidden_state
        return _Output(last_hidden_state=self._known[key].expand(len(input_ids), -1, -1))


class _Output(dict):
    """Read by key in one release, by attribute in the other."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self["last_hidden_state"]


def load_tokenizer(folder: Any) -> Any:
    """The tokenizer of a model folder, from this disk.

    Raises:
        CorruptError: Its files cannot be read as one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"model {folder}: no tokenizer can be read from it ({type(error).__name__})",
            hint="download it again; a BERT tokenizer needs tokenizer.json, or vocab.txt with tokenizer_config.json",
        ) from None
    if tokenizer.unk_token_id in delimiter_ids(tokenizer):
        raise CorruptError(f"model {folder}: its vocabulary lacks one of {' '.join(DELIMITERS)}")
    return tokenizer
