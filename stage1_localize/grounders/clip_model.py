"""CLIP-like models cut in two at a vision layer: from a `transformers` folder, or from an `open_clip` one.

What a bottleneck needs is not the model's own forward but its two parts: pixels to tokens, and tokens to an
embedding. Three vision towers are known: CLIP of `transformers`, open_clip's own, and timm's ViT inside open_clip,
which BiomedCLIP has (its text tower is a BERT).
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import ConfigError, CorruptError, IncompatibleError, InputMissingError
from stage1_localize.models import load_tensors, weights_identity
from stage1_localize.pretrained import without_progress_bar

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
BERT_HEAD_CHANNELS = 64
"""Channels of an attention head in every released BERT; a state dict does not tell how many heads there are."""


@dataclass(frozen=True)
class ClipModel:
    """A model in parts, on its device, in evaluation mode, parameters frozen.

    Attributes:
        stem: Pixels [n, 3, size, size], normalised, to tokens [n, 1 + grid * grid, C]; the first is CLS.
        blocks: The vision transformer's layers, tokens to tokens.
        head: Tokens after the last layer to the embedding [n, D].
        embed_text: One wording to its embedding [D], not normalised.
        count_tokens: Of a wording, with what the tokenizer adds.
        context_tokens: Most tokens of a wording.
        size_px: Side of the square input.
        grid: Side of the token grid.
        mean: Of the training pixels, a channel, in [0, 1].
        std: Likewise.
        logit_scale: What cosines were multiplied by in training.
        identity: What pins weights, preprocessing and tokenizer.
    """

    stem: Callable[[Tensor], Tensor]
    blocks: Sequence[nn.Module]
    head: Callable[[Tensor], Tensor]
    embed_text: Callable[[str], Tensor]
    count_tokens: Callable[[str], int]
    context_tokens: int
    size_px: int
    grid: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    logit_scale: float
    identity: dict[str, Any]

    def below(self, pixels: Float[Tensor, "n 3 s s"], layer: int) -> Float[Tensor, "n T C"]:
        """Output of block ``layer`` (the first is 0)."""
        tokens = self.stem(pixels)
        for block in self.blocks[: layer + 1]:
            tokens = _tokens(block(tokens))
        return tokens

    def above(self, tokens: Float[Tensor, "n T C"], layer: int) -> Float[Tensor, "n D"]:
        """Image embeddings, not normalised, from the output of block ``layer``."""
        for block in self.blocks[layer + 1 :]:
            tokens = _tokens(block(tokens))
        return self.head(tokens)

    def prepare(self, image: Float32[np.ndarray, "C H W"]) -> tuple[Float[Tensor, "3 s s"], int, int]:
        """Scale the whole image into the square, longest side first, black to the right and below; normalise.

        Published code crops the middle out of an image that is not square, and so never sees its ends.

        Returns:
            Normalised pixels, and the rows and columns that the image fills, top left.
        """
        height, width = image.shape[1:]
        longest = max(height, width)
        rows, columns = (max(1, (2 * side * self.size_px + longest) // (2 * longest)) for side in (height, width))
        pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None]
        if (height, width) != (rows, columns):
            pixels = F.interpolate(pixels, (rows, columns), mode="bicubic", align_corners=False, antialias=True)
        padded = F.pad(pixels.clamp(0, 1), (0, self.size_px - columns, 0, self.size_px - rows))[0].expand(3, -1, -1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (padded - mean) / std, rows, columns


def load_clip(folder: Path, device: str, dtype: str) -> ClipModel:
    """Load a folder of either format.

    Args:
        folder: With ``config.json`` of ``model_type: clip``, or with ``open_clip_config.json``.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``.

    Raises:
        InputMissingError: Neither format, or no weights.
        IncompatibleError: A model of another kind, or one whose vision tower is no ViT.
        ConfigError: An open_clip folder, and open_clip is not installed.
        CorruptError: Weights that cannot be read, or do not fit the configuration.
    """
    if not folder.is_dir():
        raise InputMissingError(
            f"model {folder.name}: a file, expected a folder with config.json or {OPEN_CLIP_CONFIG}"
        )
    kind = _json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    if kind == "clip":
        return _load_transformers(folder, device, dtype)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _load_open_clip(folder, device, dtype)
    found = "neither" if kind is None else f"config.json of model_type '{kind}'"
    raise (InputMissingError if kind is None else IncompatibleError)(
        f"model {folder.name}: expected config.json of model_type 'clip', or {OPEN_CLIP_CONFIG}; found {found}",
        hint="models that bring their own code are never run; BiomedCLIP's own folder is of open_clip's format",
    )


def _load_transformers(folder: Path, device: str, dtype: str) -> ClipModel:
    from transformers import AutoTokenizer, CLIPModel

    try:
        with without_progress_bar():
            read: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype="float32"
            )
        model, about = read
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged folder provokes inside the library
        raise _unreadable(folder, error) from None
    wrong = sorted(about["missing_keys"]) + sorted(str(key) for key in about.get("mismatched_keys", ()))
    if wrong:
        raise CorruptError(f"model {folder.name}: its weights lack {wrong[0]} and {len(wrong) - 1} others")
    identity = _identity(model, folder, "transformers", ("config.json", "preprocessor_config.json"))
    scale = float(model.logit_scale.detach().exp())
    model = _placed(model, device, dtype)
    vision, about_vision = model.vision_model, model.config.vision_config
    preprocessing = _json(folder / "preprocessor_config.json")

    def embed_text(text: str) -> Tensor:
        asked = tokenizer([text], return_tensors="pt").to(device)
        return model.get_text_features(asked.input_ids, asked.attention_mask).pooler_output[0].float()

    return ClipModel(
        stem=lambda pixels: vision.pre_layrnorm(vision.embeddings(pixels)),
        blocks=[_WithoutMask(layer) for layer in vision.encoder.layers],
        head=lambda tokens: model.visual_projection(vision.post_layernorm(tokens[:, 0])),
        embed_text=embed_text,
        count_tokens=lambda text: len(tokenizer(text).input_ids),
        context_tokens=model.config.text_config.max_position_embeddings,
        size_px=about_vision.image_size,
        grid=about_vision.image_size // about_vision.patch_size,
        mean=_three(preprocessing, "image_mean", folder),
        std=_three(preprocessing, "image_std", folder),
        logit_scale=scale,
        identity=identity,
    )


class _WithoutMask(nn.Module):
    """A layer of `transformers` that attends everywhere."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, attention_mask=None)


def _load_open_clip(folder: Path, device: str, dtype: str) -> ClipModel:
    try:
        import open_clip
    except ModuleNotFoundError:
        raise ConfigError(
            f"model {folder.name}: a folder of open_clip's format, and open_clip_torch is not installed",
            hint="pip install 'mask-what-matters[open-clip]'",
        ) from None
    about = _json(folder / OPEN_CLIP_CONFIG)
    weights = next((folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if weights is None or "model_cfg" not in about:
        lacks = "model_cfg in its configuration" if weights else f"weights ({', '.join(OPEN_CLIP_WEIGHTS)})"
        raise InputMissingError(f"model {folder.name}: no {lacks}")
    try:
        model = _build_open_clip(open_clip, about, weights, folder)
        text_config = about["model_cfg"]["text_cfg"]
        context = int(text_config.get("context_length", 77))
        tokenize, count = _open_clip_tokenizer(open_clip, text_config, folder, context)
    except CorruptError:
        raise
    except Exception as error:  # whatever a damaged folder provokes inside the library
        raise _unreadable(folder, error) from None
    identity = _identity(model, folder, "open_clip", (OPEN_CLIP_CONFIG, "config.json"))
    scale = float(model.logit_scale.detach().exp())
    model = _placed(model, device, dtype)
    stem, blocks, head, grid = _open_clip_tower(model.visual, folder)
    preprocessing = about.get("preprocess_cfg", {})
    size = model.visual.image_size
    return ClipModel(
        stem=stem,
        blocks=blocks,
        head=head,
        embed_text=lambda text: model.encode_text(tokenize(text).to(device))[0].float(),
        count_tokens=count,
        context_tokens=context,
        size_px=size if isinstance(size, int) else int(size[0]),
        grid=grid,
        mean=_three(preprocessing, "mean", folder),
        std=_three(preprocessing, "std", folder),
        logit_scale=scale,
        identity=identity,
    )


def _build_open_clip(open_clip: Any, about: dict[str, Any], weights: Path, folder: Path) -> Any:
    """The model with its weights, and nothing asked of a hub.

    open_clip looks up the configuration of a text tower by its name on the hub. It is told a folder instead, with
    the ``config.json`` that lies beside the weights, or with what the weights' own shapes say of a BERT.
    """
    tensors = load_tensors(weights)
    about = json.loads(json.dumps(about))
    with tempfile.TemporaryDirectory() as scratch:
        text = about["model_cfg"]["text_cfg"]
        if text.get("hf_model_name"):
            if (folder / "config.json").is_file():
                shutil.copy(folder / "config.json", scratch)
            else:
                (Path(scratch) / "config.json").write_text(json.dumps(bert_config(tensors, folder)))
            text["hf_model_name"] = scratch
        (Path(scratch) / OPEN_CLIP_CONFIG).write_text(json.dumps(about))
        logging.disable(logging.WARNING)  # it warns that no weights were loaded; they are, next
        try:
            model = open_clip.create_model(f"local-dir:{scratch}", load_weights=False, pretrained_text=False)
        finally:
            logging.disable(logging.NOTSET)
    open_clip.load_checkpoint(model, str(weights), strict=True, weights_only=True)
    return model


def bert_config(tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Configuration of the BERT whose tensors these are; what shapes do not tell is BERT's default.

    Raises:
        CorruptError: No BERT.
    """
    prefix = "text.transformer."
    try:
        words, hidden = tensors[f"{prefix}embeddings.word_embeddings.weight"].shape
        positions = len(tensors[f"{prefix}embeddings.position_embeddings.weight"])
        types = len(tensors[f"{prefix}embeddings.token_type_embeddings.weight"])
        between = len(tensors[f"{prefix}encoder.layer.0.intermediate.dense.weight"])
    except KeyError as error:
        raise CorruptError(
            f"model {folder.name}: its text tower is no BERT (no {error.args[0]}), and there is no config.json for it",
            hint="put the text tower's config.json into the folder",
        ) from None
    layers = {
        name.removeprefix(f"{prefix}encoder.layer.").split(".")[0] for name in tensors if ".encoder.layer." in name
    }
    return {
        "model_type": "bert",
        "vocab_size": words,
        "hidden_size": hidden,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "intermediate_size": between,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, hidden // BERT_HEAD_CHANNELS),
    }


def _open_clip_tokenizer(
    open_clip: Any, text_config: dict[str, Any], folder: Path, context: int
) -> tuple[Callable[[str], Tensor], Callable[[str], int]]:
    if not text_config.get("hf_tokenizer_name"):
        own = open_clip.tokenizer.SimpleTokenizer(context_length=context)
        return (lambda text: own([text])), (lambda text: len(own.encode(text)) + 2)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return (
        lambda text: tokenizer([text], padding="max_length", max_length=context, return_tensors="pt").input_ids,
        lambda text: len(tokenizer(text).input_ids),
    )


def _open_clip_tower(
    visual: Any, folder: Path
) -> tuple[Callable[[Tensor], Tensor], Sequence[nn.Module], Callable[[Tensor], Tensor], int]:
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and hasattr(trunk, "blocks") and getattr(trunk, "num_prefix_tokens", 0) == 1:
        return (
            lambda pixels: trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pixels)))),
            list(trunk.blocks),
            lambda tokens: visual.head(trunk.forward_head(trunk.norm(tokens))),
            int(trunk.patch_embed.grid_size[0]),
        )
    if trunk is None and hasattr(visual, "class_embedding") and hasattr(visual, "transformer"):
        project = visual.proj

        def head(tokens: Tensor) -> Tensor:
            pooled, _ = visual._pool(tokens)
            return pooled if project is None else pooled @ project

        return visual._embeds, list(visual.transformer.resblocks), head, int(visual.grid_size[0])
    raise IncompatibleError(
        f"model {folder.name}: its vision tower is no ViT with one CLS token ({type(trunk or visual).__name__})"
    )


def _placed(model: nn.Module, device: str, dtype: str) -> Any:
    return model.eval().requires_grad_(False).to(device, getattr(torch, dtype))


def _identity(model: nn.Module, folder: Path, what: str, files: Sequence[str]) -> dict[str, Any]:
    paths = [folder / name for name in (*files, *TOKENIZER_FILES)]
    return {"format": what, **weights_identity(model.state_dict(), paths)}


def _tokens(answer: Any) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputMissingError(f"model {path.parent.name}: its folder holds no {path.name}") from None
    except ValueError:
        raise CorruptError(f"model {path.parent.name}: {path.name} is not JSON") from None
    if not isinstance(found, dict):
        raise CorruptError(f"model {path.parent.name}: {path.name} is not a JSON object")
    return found


def _three(preprocessing: dict[str, Any], key: str, folder: Path) -> tuple[float, float, float]:
    values = preprocessing.get(key)
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise CorruptError(f"model {folder.name}: no '{key}' of three numbers among its preprocessing")
    return float(values[0]), float(values[1]), float(values[2])


def _unreadable(folder: Path, error: Exception) -> CorruptError:
    first = (str(error).splitlines() or [""])[0][:160].replace(str(folder), folder.name)
    return CorruptError(f"model {folder.name}: cannot be loaded ({type(error).__name__}: {first})")
