"""`segment_anything`: Segment Anything with the original package, from the single file of its release.

Kirillov et al., "Segment anything", ICCV 2023; package ``segment-anything`` 1.0. The file is read as data: the
package's own loader, which would run it, is never called. Every size but the number of decoder heads (8 in all
releases) stands in the tensors' shapes, so any model of this build loads, MedSAM's ``.pth`` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from shared.errors import ConfigError, CorruptError, IncompatibleError, InputMissingError
from stage1_localize.models import find_model, load_tensors, weights_identity
from stage1_localize.segmenters.sam_boxes import (
    MedSamOptions,
    Preprocessing,
    SamOptions,
    SamSegmenter,
    best_of,
    medsam_preprocessing,
)

VARIANTS = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}
"""Width and depth of the encoder -> name of the release."""
DECODER_HEADS = 8
MASK_CHANNELS = 16


class SegmentAnything(SamSegmenter):
    """Turns boxes into pixel probabilities with a ``.pth`` or ``.safetensors`` file."""

    class Options(MedSamOptions):
        """A file, or a folder with one such file in it."""

        variant: Literal["auto", "vit_b", "vit_l", "vit_h"] = Field(
            "auto", description="Encoder that the file must hold; auto: whichever its tensors make."
        )

    version = 1

    def __init__(self, options: Options) -> None:
        """Load the file.

        Raises:
            ConfigError: No file is named, or the file holds another variant, or ``cuda`` is asked and there is none.
            InputMissingError: No such file, or a folder without one.
            IncompatibleError: Tensors of another model.
            CorruptError: A file that cannot be read, or tensors that do not fit together.
        """
        pinned = options.pinned()
        path = _find_file(options)
        tensors = load_tensors(path)
        network = build_network(tensors, path.name)
        found = VARIANTS.get((network.image_encoder.pos_embed.shape[-1], len(network.image_encoder.blocks)), "other")
        if options.variant not in ("auto", found):
            raise ConfigError(
                f"variant: {options.variant}, but {path.name} holds {found}",
                hint="variant: auto takes what the file holds",
            )
        size_px = int(network.image_encoder.img_size)
        medsam = pinned.preprocessing == "medsam"
        how = medsam_preprocessing(size_px) if medsam else Preprocessing(size_px, "letterbox")
        super().__init__(LegacySam(network, pinned), how, pinned, weights_identity(tensors))


class LegacySam:
    """The package's modules behind the `SamNetwork` protocol; encoder in ``dtype``, the rest float32.

    Args:
        network: From `build_network`.
        options: Pinned.
    """

    def __init__(self, network: Any, options: SamOptions) -> None:
        self.device: str = options.device
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        self._network = network.to(self.device)
        self._network.image_encoder.to(self._dtype)

    def encode(self, pixels: Float[Tensor, "B 3 s s"]) -> tuple[Tensor, ...]:
        """The embedding."""
        return (self._network.image_encoder(pixels.to(self._dtype)).float(),)

    def decode(self, embedding: tuple[Tensor, ...], boxes: Float[Tensor, "n 4"], best: bool) -> Float[Tensor, "n h w"]:
        """Logits of the boxes of one image."""
        prompts = self._network.prompt_encoder
        sparse, dense = prompts(points=None, boxes=boxes, masks=None)
        logits, iou = self._network.mask_decoder(
            image_embeddings=embedding[0],
            image_pe=prompts.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=best,
        )
        return best_of(logits, iou)


def build_network(tensors: Mapping[str, Tensor], name: str) -> Any:
    """The package's encoder, prompt encoder and decoder in the sizes of the tensors, filled with them.

    Args:
        tensors: Name -> tensor as the release has them.
        name: Of the file, for messages.

    Raises:
        IncompatibleError: Names of another model.
        CorruptError: Shapes that make no model of this build.
    """
    if "image_encoder.patch_embed.proj.weight" not in tensors or "mask_decoder.mask_tokens.weight" not in tensors:
        raise IncompatibleError(
            f"model {name}: its tensors are not those of Segment Anything's release (its first is "
            f"'{next(iter(tensors))}', expected e.g. 'image_encoder.patch_embed.proj.weight')",
            hint="a folder of transformers is read by segmenter 'sam' or 'sam2'",
        )
    try:
        with torch.device("meta"):
            network = nn.ModuleDict(_modules(tensors))
        network.load_state_dict(
            {key: value.to(torch.float32) for key, value in tensors.items()}, strict=True, assign=True
        )
    except (RuntimeError, KeyError, IndexError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise CorruptError(
            f"model {name}: its tensors make no Segment Anything model ({type(error).__name__})",
            hint="download it again",
        ) from None
    network.eval().requires_grad_(False)
    return network


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

    patch = tensors["image_encoder.patch_embed.proj.weight"]
    grid = tensors["image_encoder.pos_embed"].shape[1]
    depth = _count(tensors, "image_encoder.blocks.")
    # A block that attends within windows has relative positions for one window, a global one for the whole grid.
    spans = [(tensors[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
    windows = [span for span in spans if span != grid]
    head_width = tensors["image_encoder.blocks.0.attn.rel_pos_h"].shape[1]
    width = tensors["mask_decoder.iou_token.weight"].shape[1]
    size_px = grid * patch.shape[-1]
    encoder = ImageEncoderViT(
        img_size=size_px,
        patch_size=patch.shape[-1],
        embed_dim=patch.shape[0],
        depth=depth,
        num_heads=patch.shape[0] // head_width,
        mlp_ratio=tensors["image_encoder.blocks.0.mlp.lin1.weight"].shape[0] / patch.shape[0],
        out_chans=width,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=windows[0] if windows else grid,
        global_attn_indexes=[i for i, span in enumerate(spans) if span == grid],
    )
    prompts = PromptEncoder(width, (grid, grid), (size_px, size_px), MASK_CHANNELS)
    layers = "mask_decoder.transformer.layers."
    decoder = MaskDecoder(
        transformer_dim=width,
        transformer=TwoWayTransformer(
            depth=_count(tensors, layers),
            embedding_dim=width,
            num_heads=DECODER_HEADS,
            mlp_dim=tensors[f"{layers}0.mlp.lin1.weight"].shape[0],
        ),
        num_multimask_outputs=tensors["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        iou_head_depth=_count(tensors, "mask_decoder.iou_prediction_head.layers."),
        iou_head_hidden_dim=tensors["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
    )
    return {"image_encoder": encoder, "prompt_encoder": prompts, "mask_decoder": decoder}


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)})


def _find_file(options: SegmentAnything.Options) -> Path:
    if options.model is None:
        raise ConfigError(
            "model: none; segmenter 'segment_anything' has no default, expected the file of a release",
            hint="--set segmenter.options.model=sam_vit_b_01ec64.pth, or segmenter.name=sam, which has a default",
        )
    path = find_model(options, options.model)
    if not path.is_dir():
        return path
    found = sorted(each for each in path.iterdir() if each.suffix in (".pth", ".pt", ".safetensors"))
    if (path / "config.json").is_file():
        raise IncompatibleError(
            f"model {options.model}: a folder of transformers (it holds config.json), expected the file of a release",
            hint="segmenter.name=sam reads it",
        )
    if len(found) != 1:
        raise InputMissingError(
            f"model {options.model}: its folder holds {len(found)} weight files, expected one", hint="name the file"
        )
    return found[0]
