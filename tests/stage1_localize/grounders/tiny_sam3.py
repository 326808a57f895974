"""A random SAM 3 small enough for tests, saved as a release is, with a tokenizer of single letters."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from tests.stage1_localize.segmenters.tiny_sam import spread

SIZE_PX = 56


def build_sam3(folder: Path) -> dict[str, Any]:
    """A folder for grounder ``sam3``; options that name it and let its best instances pass."""
    from transformers import CLIPTokenizer, Sam3Config, Sam3Model

    letters = [*string.ascii_lowercase, *string.digits]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    narrow = {"hidden_size": 16, "num_attention_heads": 2}
    detr = {**narrow, "num_layers": 1, "intermediate_size": 32, "dropout": 0.0}
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": SIZE_PX,
                "pretrain_image_size": 28,
                "patch_size": 7,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        geometry_encoder_config={**detr},
        detr_encoder_config={**detr},
        detr_decoder_config={**detr, "num_queries": 6},
        mask_decoder_config=narrow,
    )
    torch.manual_seed(0)
    model = Sam3Model(config).eval()
    spread(model)
    model.save_pretrained(folder)
    return {"model": str(folder), "score_min_milli": 100}
