"""Random models of the SAM family, small enough for tests, saved as releases are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZE_PX = 64


def build_sam(folder: Path, *, hq: bool = False) -> dict[str, Any]:
    """A folder for segmenter ``sam``; the options that name it."""
    from transformers import SamConfig, SamHQConfig, SamHQModel, SamModel

    model_class, config_class = (SamHQModel, SamHQConfig) if hq else (SamModel, SamConfig)
    config = config_class(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIZE_PX,
            "patch_size": 8,
            "window_size": 3,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
            "mlp_dim": 64,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": SIZE_PX, "patch_size": 8},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_attention_heads": 8,
            "iou_head_hidden_dim": 16,
            **({"vit_dim": 32} if hq else {}),
        },
    )
    return {"model": _save(model_class, config, folder)}


def build_sam2(folder: Path) -> dict[str, Any]:
    """A folder for segmenter ``sam2``; the options that name it."""
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[SIZE_PX, SIZE_PX],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 2, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
    )
    config = Sam2Config(
        vision_config=Sam2VisionConfig(
            backbone_config=backbone.to_dict(),
            backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            fpn_hidden_size=32,
        ).to_dict(),
        prompt_encoder_config={"hidden_size": 32, "image_size": SIZE_PX, "patch_size": 16},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 16},
    )
    return {"model": _save(Sam2Model, config, folder)}


def build_segment_anything(folder: Path) -> dict[str, Any]:
    """The weights of `build_sam` under the names of the original release, in one file; the options that name it."""
    from transformers import SamModel

    build_sam(folder / "native")
    model = SamModel.from_pretrained(folder / "native")
    path = folder / "sam_tiny.pth"
    torch.save(original_names(model.state_dict()), path)
    return {"model": str(path)}


_RENAMED = (
    (r"^vision_encoder\.", "image_encoder."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"^image_encoder\.layers\.", "image_encoder.blocks."),
    (r"\.layer_norm([12])\.(weight|bias)$", r".norm\1.\2"),
    (r"neck\.conv1\.", "neck.0."),
    (r"neck\.norm1\.|neck\.layer_norm1\.", "neck.1."),
    (r"neck\.conv2\.", "neck.2."),
    (r"neck\.norm2\.|neck\.layer_norm2\.", "neck.3."),
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"mask_embed\.conv1\.", "mask_downscaling.0."),
    (r"mask_embed\.norm1\.", "mask_downscaling.1."),
    (r"mask_embed\.conv2\.", "mask_downscaling.3."),
    (r"mask_embed\.norm2\.", "mask_downscaling.4."),
    (r"mask_embed\.conv3\.", "mask_downscaling.6."),
    (r"transformer\.layers\.(\d+)\.layer_norm(\d)\.", r"transformer.layers.\1.norm\2."),
    (r"layer_norm_final_attn\.", "norm_final_attn."),
    (r"upscale_conv1\.", "output_upscaling.0."),
    (r"upscale_layer_norm\.", "output_upscaling.1."),
    (r"upscale_conv2\.", "output_upscaling.3."),
)
"""Names in transformers -> names in the release, applied in order."""


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' ``SamModel`` under the names of the original release."""
    renamed = {}
    for key, value in tensors.items():
        if key == "prompt_encoder.shared_embedding.positional_embedding":
            continue  # the same tensor as the image's
        for pattern, name in _RENAMED:
            key = re.sub(pattern, name, key)
        if "output_hypernetworks_mlps" in key or "iou_prediction_head" in key:
            key = _feed_forward(key)
        renamed[key] = value
    return renamed


def _feed_forward(key: str) -> str:
    """Three layers that transformers calls proj_in, layers.0 and proj_out."""
    key = re.sub(r"\.layers\.(\d+)\.", lambda found: f".layers.{int(found[1]) + 1}.", key)
    return key.replace(".proj_in.", ".layers.0.").replace(".proj_out.", ".layers.2.")


def _save(model_class: Any, config: Any, folder: Path) -> str:
    torch.manual_seed(0)
    model = model_class(config).eval()
    spread(model)
    model.save_pretrained(folder)
    return str(folder)


def spread(model: nn.Module) -> None:
    """Random values that reach the outputs: fresh models hold zeros and near zeros that hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen or "positional_embedding" in name:
            continue
        seen.add(parameter.data_ptr())
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if norm else noise * (1.5 / fan**0.5 if parameter.ndim > 1 else 0.3))
