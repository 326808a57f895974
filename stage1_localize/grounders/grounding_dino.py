"""`grounding_dino`: open-vocabulary boxes by text, with transformers' own GroundingDINO.

Liu et al., "Grounding DINO: Marrying DINO with grounded pre-training for open-set object detection", 2023
(arXiv 2303.05499). Of a call's work only what words change is repeated for each wording: the text encoder runs once
a prompt and process, the image backbone once an image and batch. Trained on photographs; boxes without pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared.errors import ConfigError, CorruptError, InputMissingError
from stage1_localize.grounders.dino_images import FILE, read_preprocessing
from stage1_localize.grounders.dino_locate import TOKENS_MAX, DinoGrounder, DinoOptions
from stage1_localize.grounders.dino_words import (
    TOKENIZER_FILES,
    PhraseEncoder,
    Prompt,
    delimiter_ids,
    load_tokenizer,
)
from stage1_localize.models import find_model, weights_identity
from stage1_localize.pretrained import CONFIG, WHOLE, read_json, read_tensors, without_progress_bar

DEFAULT = "IDEA-Research/grounding-dino-tiny"


class GroundingDino(DinoGrounder):
    """Boxes for any words, from a model folder of transformers."""

    class Options(DinoOptions):
        """A folder with config.json, weights and tokenizer, or a name on the hub."""

    version = 1

    def __init__(self, options: Options) -> None:
        """Load configuration, tokenizer and weights.

        Raises:
            InputMissingError: No such model on this disk nor on the hub, or a folder that lacks a file.
            CorruptError: A file that cannot be read, or weights that do not fill the model.
            ConfigError: A model of another kind.
        """
        self.options = options.pinned()
        folder = find_model(options, DEFAULT, needs=(CONFIG,))
        if not folder.is_dir():
            raise InputMissingError(
                f"model {options.model}: a file; expected a folder with {CONFIG} and {WHOLE[0]}",
                hint="a single .pth file of the original release is read by grounder 'groundingdino_py'",
            )
        self._how = read_preprocessing(folder, self.options.size_px)
        model, unused = _load(folder, options.model or DEFAULT)
        self._tokenizer = load_tokenizer(folder)
        files = [folder / name for name in (CONFIG, FILE, *TOKENIZER_FILES)]
        self._identity = {
            **weights_identity(model.state_dict(), files),
            "unused_tensors": unused,
            "preprocessing": str(self._how),
            "joint": self.options.joint,
            "numeric": f"torch {self.options.device} float32"
            + (", products in bfloat16 by autocast" if self.options.dtype == "bfloat16" else "")
            + "; attention of the text encoder sdpa",
        }
        self._network = NativeNetwork(model, delimiter_ids(self._tokenizer), self.options)
        self._tokens_max = min(TOKENS_MAX, model.config.max_text_len, model.config.text_config.max_position_embeddings)


def _load(folder: Path, name: str) -> tuple[Any, int]:
    """The model in float32, in evaluation mode, and how many tensors of its file it has no place for."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    said = read_json(folder / CONFIG, name)
    if said.get("model_type") != "grounding-dino":
        raise ConfigError(f"model {name}: its model_type is '{said.get('model_type')}', expected 'grounding-dino'")
    tensors, weights = read_tensors(folder, name)
    try:
        config: Any = GroundingDinoConfig.from_dict(said)
        config.text_config._attn_implementation = "sdpa"
        build: Any = GroundingDinoForObjectDetection.from_pretrained
        with without_progress_bar():
            model, info = build(None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"model {name}: {weights} does not fit config.json ({type(error).__name__})", hint="download it again"
        ) from None
    absent = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
    if absent:
        raise CorruptError(
            f"model {name}: {weights} lacks {len(absent)} tensors that config.json asks for, such as {absent[0]}",
            hint="download it again",
        )
    return model.eval().requires_grad_(False), len(info["unexpected_keys"])


class NativeNetwork:
    """transformers' model behind the `Network` protocol.

    Args:
        model: ``GroundingDinoForObjectDetection`` in evaluation mode; its encoders are replaced in place.
        delimiters: Numbers of the tokens that end a phrase, for this model's vocabulary.
        options: Pinned.
    """

    def __init__(self, model: Any, delimiters: Sequence[int], options: DinoOptions) -> None:
        config = model.config
        self.device: str = options.device
        self._half = options.dtype == "bfloat16"
        self.num_queries = int(config.num_queries)
        finest = [4 * 2 ** (index - 1) for index in config.backbone_config.out_indices]
        extra = range(1, config.num_feature_levels - len(finest) + 1)
        self.strides = (*finest, *(finest[-1] * 2**level for level in extra))
        self._model = model.to(self.device)
        inner = model.model
        # transformers counts on the numbers of one vocabulary.
        inner.special_tokens = torch.tensor(delimiters, device=self.device)
        inner.text_backbone = PhraseEncoder(inner.text_backbone)
        self._backbone = inner.backbone
        self._seen = _SeenBefore(inner.backbone)
        inner.backbone = self._seen

    def see(self, pixels: Float[Tensor, "B 3 H W"]) -> Any:
        """Feature maps with their places, and a mask that says that all of it is image."""
        everywhere = torch.ones_like(pixels[:, 0], dtype=torch.long)
        with self._precision():
            return self._backbone(pixels, everywhere), everywhere

    def ask(self, seen: Any, prompt: Prompt) -> tuple[Float[Tensor, "B Q T"], Float[Tensor, "B Q 4"]]:
        """Logits and boxes; the model reads shapes of the pixels only, their features stand in for them."""
        self._seen.features, everywhere = seen
        ids = torch.tensor([prompt.input_ids], device=self.device).expand(len(everywhere), -1)
        with self._precision():
            out = self._model(everywhere[:, None].expand(-1, 3, -1, -1), ids, pixel_mask=everywhere)
        return out.logits[..., : ids.shape[1]], out.pred_boxes

    def _precision(self) -> torch.autocast:
        """Products in bfloat16 where asked; places stay float32: in bfloat16 the samples of the deformable attention
        would lie up to half a cell beside where they belong."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self._half)


class _SeenBefore(nn.Module):
    """Stands where the model expects its image backbone, and answers with what that said before."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.position_embedding = backbone.position_embedding
        self.features: Any = None

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[list[Any], list[Any]]:
        del pixel_values, pixel_mask
        maps, places = self.features
        return list(maps), list(places)  # copies: the model appends to them
