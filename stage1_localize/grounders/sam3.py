"""`sam3`: Segment Anything 3 asked by words, with transformers' own class; it gives boxes and pixels itself.

Carion et al., "SAM 3: segment anything with concepts", 2025 (arXiv 2511.16719): for a short noun phrase every
instance in the image, each with a score, a box and a mask; one more score says whether the concept is there at all,
and multiplies the others. ``segmenter: none`` goes with it.

A wording is asked alone, so a region cannot depend on the others; its text is encoded once a process, an image once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import Field
from torch import Tensor

from shared.errors import CorruptError, InputMissingError, PromptError
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.frames import Frame, to_map_frame
from stage1_localize.models import ModelOptions
from stage1_localize.pretrained import load_pretrained, read_normalisation
from stage1_localize.segmenters.sam_boxes import Preprocessing, prepare

DEFAULT = "facebook/sam3"
CLASSES = {"sam3": "Sam3Model", "sam3_video": "Sam3Model"}
"""The release holds the video model; its tracker is left out, and counted."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
HALF = (0.5, 0.5, 0.5)


class Sam3:
    """Finds and outlines every instance of a phrase."""

    class Options(ModelOptions):
        """A folder with config.json, weights and tokenizer, or a name on the hub; and which answers are kept."""

        score_min_milli: int = Field(
            500, ge=0, le=1000, description="Weakest instance that is kept: presence times its own score, thousandths."
        )
        boxes_max: int = Field(20, ge=1, le=200, description="Best instances that are kept of a wording and image.")

    version = 1

    def __init__(self, options: Options) -> None:
        """Load the model and its tokenizer.

        Raises:
            InputMissingError, IncompatibleError, CorruptError: As `load_pretrained`, or a folder without tokenizer.
            ConfigError: ``cuda`` is asked and there is none.
        """
        self._options = options.pinned()
        name = options.model or DEFAULT
        loaded = load_pretrained(options, DEFAULT, CLASSES, files=TOKENIZER_FILES)
        self._tokenizer = _load_tokenizer(loaded.folder, name)
        self._how = Preprocessing(
            int(loaded.model.config.image_size), "squash", *read_normalisation(loaded.folder, name, HALF, HALF)
        )
        self._identity = {
            **loaded.identity,
            "preprocessing": str(self._how),
            "numeric": f"torch {self._options.device}: image and text encoder {self._options.dtype}, the rest float32; "
            "one image and one wording a call; logits resampled, then sigmoid",
        }
        self._dtype: torch.dtype = getattr(torch, self._options.dtype)
        # In bfloat16 a box's corner would be known to 4 px only: what refines boxes stays float32.
        self._model = loaded.model.to(self._options.device)
        self._model.vision_encoder.to(self._dtype)
        self._model.text_encoder.to(self._dtype)
        self._tokens_max = int(loaded.model.config.text_config.max_position_embeddings)
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self, regions: Sequence[Region]) -> None:
        """Accept any words that fit into the text encoder.

        Raises:
            PromptError: A wording without a word, or one that is too long.
        """
        for region in regions:
            for text in region.texts:
                tokens = len(self._tokenizer(text)["input_ids"])
                if tokens <= len(self._tokenizer("")["input_ids"]):
                    raise PromptError(f"region '{region.name}': wording '{text}' holds no word")
                if tokens > self._tokens_max:
                    raise PromptError(
                        f"region '{region.name}': '{text}' makes {tokens} tokens, the text encoder reads "
                        f"{self._tokens_max}",
                        hint="a short noun phrase works best",
                    )

    def needs_segmenter(self, regions: Sequence[Region]) -> bool:
        """Every detection brings its pixels."""
        del regions
        return False

    def identity(self) -> dict[str, Any]:
        """Digests of weights, configuration and vocabulary; preprocessing; numeric settings."""
        return dict(self._identity)

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """Every instance of every wording, best first; nothing in a constant image.

        An image's features take a hundred megabytes, and no other part can use them: they are kept for as long as
        its wordings are asked, not for the batch.
        """
        return [self._locate(image, regions) for image in batch.images]

    def _locate(self, image: Float32[np.ndarray, "C H W"], regions: Sequence[Region]) -> Detections:
        asked = [(r, t, text) for r, region in enumerate(regions) for t, text in enumerate(region.texts)]
        if not asked or (image == image[:, :1, :1]).all():
            return Detections.none()
        with torch.inference_mode():
            seen = self._see(image)
            answers = {text: self._ask(seen, text, image) for _, _, text in asked}
        counts = [len(answers[text][0]) for _, _, text in asked]
        return Detections(
            box_xyxy_px=np.concatenate([answers[text][0] for _, _, text in asked]),
            score=np.concatenate([answers[text][1] for _, _, text in asked]),
            region=np.repeat(np.array([r for r, _, _ in asked], np.int64), counts),
            text=np.repeat(np.array([t for _, t, _ in asked], np.int64), counts),
            probability=[own for _, _, text in asked for own in answers[text][2]],
        )

    def _see(self, image: Float32[np.ndarray, "C H W"]) -> Any:
        """What the image encoder says, as the model wants it back."""
        pixels = prepare(image, self._how)[None].to(self._options.device, self._dtype)
        said = self._model.get_vision_features(pixels)
        return SimpleNamespace(
            fpn_hidden_states=tuple(each.float() for each in said.fpn_hidden_states),
            fpn_position_encoding=tuple(each.float() for each in said.fpn_position_encoding),
            hidden_states=None,
            attentions=None,
        )

    def _read(self, text: str) -> tuple[Float[Tensor, "1 T c"], Tensor]:
        """A wording's features and which of its tokens count, encoded once a process."""
        if text not in self._texts:
            tokens = self._tokenizer(text, padding="max_length", max_length=self._tokens_max, return_tensors="pt")
            ids, mask = (tokens[key].to(self._options.device) for key in ("input_ids", "attention_mask"))
            hidden = self._model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            self._texts[text] = self._model.text_projection(hidden), mask
        return self._texts[text]

    def _ask(
        self, seen: Any, text: str, image: Float32[np.ndarray, "C H W"]
    ) -> tuple[Float32[np.ndarray, "n 4"], Float32[np.ndarray, "n"], list[Float32[np.ndarray, "256 256"]]]:
        """Boxes, scores and maps of one wording."""
        features, mask = self._read(text)
        said = self._model(vision_embeds=seen, text_embeds=SimpleNamespace(pooler_output=features), attention_mask=mask)
        frame = self._how.frame(image)
        score = (said.pred_logits[0].sigmoid() * said.presence_logits[0].sigmoid()).float().cpu().numpy()
        boxes = in_image(said.pred_boxes[0].float().cpu().numpy(), frame)
        good = (score * 1000 >= self._options.score_min_milli) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        # Of equal scores the first query.
        kept = [int(query) for query in np.argsort(-score, kind="stable") if good[query]][: self._options.boxes_max]
        maps = [
            to_map_frame(said.pred_masks[0, query][None].float(), frame)[0].sigmoid().cpu().numpy() for query in kept
        ]
        return boxes[kept], score[kept], maps


def in_image(shares: Float32[np.ndarray, "n 4"], frame: Frame) -> Float32[np.ndarray, "n 4"]:
    """Boxes as shares of the sides, in px of the image and cut at its edges; some may be left without area."""
    sides = np.array([frame.width_image_px, frame.height_image_px] * 2, np.float32)
    return np.clip(shares.astype(np.float32) * sides, 0, sides)


def _load_tokenizer(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        # transformers would build one without words, and say nothing.
        raise InputMissingError(
            f"model {name}: its folder holds no tokenizer.json and no vocab.json",
            hint="give the folder that 'hf download NAME --local-dir FOLDER' fills",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # files of strangers: whatever transformers makes of them
        raise CorruptError(
            f"model {name}: no tokenizer can be read from its folder ({type(error).__name__})",
            hint="download it again; it needs tokenizer.json, or vocab.json and merges.txt",
        ) from None
