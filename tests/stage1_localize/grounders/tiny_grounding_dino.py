"""Writes a tiny GroundingDINO with random weights, as both releases keep theirs, so that real loading code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

SIDE_PX = 96
QUERIES = 30
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["brain", "tumour", "left", "right", "lung", "white", "blood", "cell", "grey", "matter", "nodule"]
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    ".",
    "?",
    "-",
    *WORDS,
    *LETTERS,
    *(f"##{c}" for c in LETTERS),
]
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
TEXT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def native_model(seed: int = 0) -> Any:
    """GroundingDinoForObjectDetection of three million parameters, every one of them random enough to matter."""
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**SWIN, out_features=["stage2", "stage3", "stage4"]),
        text_config=BertConfig(**TEXT),
        d_model=256,  # the package's text positions are written for 256
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=QUERIES,
    )
    model = GroundingDinoForObjectDetection(config).eval()
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in model.named_parameters():
            noise = torch.randn(values.shape, generator=made)
            if values.dim() > 1:
                values.copy_(noise / values[0].numel() ** 0.5)
            else:
                values.copy_(0.3 * noise + float(name.endswith("weight") or name.endswith("param")))
    return model


def write_tokenizer(folder: Path) -> None:
    """vocab.txt and tokenizer_config.json of a BERT that knows a few words and all letters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    said = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def build_native(folder: Path, seed: int = 0) -> dict[str, Any]:
    """A folder as transformers saves it; returns the options of grounder ``grounding_dino`` that read it."""
    write_tokenizer(folder)
    native_model(seed).save_pretrained(folder)
    said = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return {"model": str(folder), "size_px": SIDE_PX}


LEGACY_CONFIG = f'''"""A configuration as the release writes them, as small as it gets."""
backbone = {SWIN!r}
position_embedding = "sine"
pe_temperatureH = 20
pe_temperatureW = 20
return_interm_indices = [1, 2, 3]
enc_layers = 2
dec_layers = 2
pre_norm = False
dim_feedforward = 64
hidden_dim = 256
dropout = 0.0
nheads = 4
num_queries = {QUERIES}
query_dim = 4
num_patterns = 0
num_feature_levels = 4
enc_n_points = 4
dec_n_points = 4
two_stage_type = "standard"
two_stage_bbox_embed_share = False
two_stage_class_embed_share = False
transformer_activation = "relu"
dec_pred_bbox_embed_share = True
embed_init_tgt = True
use_text_enhancer = True
use_fusion_layer = True
use_text_cross_attention = True
text_dropout = 0.0
fusion_dropout = 0.0
fusion_droppath = 0.1
sub_sentence_present = True
'''


def build_legacy(folder: Path, seed: int = 0) -> dict[str, Any]:
    """The same weights as the release would keep them; returns the options of grounder ``groundingdino_py``."""
    write_tokenizer(folder / "text")
    (folder / "text" / "config.json").write_text(json.dumps({"model_type": "bert", **TEXT}))
    (folder / "config.py").write_text(LEGACY_CONFIG)
    model = native_model(seed)
    torch.save({"model": as_released(model.state_dict())}, folder / "weights.pth")
    return {
        "model": str(folder / "weights.pth"),
        "config": str(folder / "config.py"),
        "text_model": str(folder / "text"),
        "size_px": SIDE_PX,
    }


RENAMED = {
    r"^model\.backbone\.conv_encoder\.model": "backbone.0",
    r"^backbone\.0\.swin\.embeddings\.patch_embeddings\.projection": "backbone.0.patch_embed.proj",
    r"^backbone\.0\.swin\.embeddings\.norm": "backbone.0.patch_embed.norm",
    r"^backbone\.0\.swin\.encoder\.": "backbone.0.",
    r"^backbone\.0\.hidden_states_norms\.stage2": "backbone.0.norm1",
    r"^backbone\.0\.hidden_states_norms\.stage3": "backbone.0.norm2",
    r"^backbone\.0\.hidden_states_norms\.stage4": "backbone.0.norm3",
    r"\.attention\.o_proj": ".attn.proj",
    r"\.attention\.relative_position_bias\.": ".attn.",
    r"\.layernorm_before": ".norm1",
    r"\.layernorm_after": ".norm2",
    r"^model\.input_proj_vision": "input_proj",
    r"^model\.text_backbone": "bert",
    r"^model\.text_projection": "feat_map",
    r"^model\.level_embed": "transformer.level_embed",
    r"^model\.query_position_embeddings": "transformer.tgt_embed",
    r"^model\.enc_output": "transformer.enc_output",
    r"^model\.encoder_output_bbox_embed": "transformer.enc_out_bbox_embed",
    r"^model\.encoder\.layers\.(\d+)\.text_enhancer_layer": r"transformer.encoder.text_layers.\1",
    r"^model\.encoder\.layers\.(\d+)\.fusion_layer": r"transformer.encoder.fusion_layers.\1",
    r"^model\.encoder\.layers\.(\d+)\.deformable_layer": r"transformer.encoder.layers.\1",
    r"(text_layers.*)\.layer_norm_before": r"\1.norm1",
    r"(text_layers.*)\.layer_norm_after": r"\1.norm2",
    r"(fusion_layers.*)\.vision_param": r"\1.gamma_v",
    r"(fusion_layers.*)\.text_param": r"\1.gamma_l",
    r"(fusion_layers.*)layer_norm_vision": r"\1layer_norm_v",
    r"(fusion_layers.*)layer_norm_text": r"\1layer_norm_l",
    r"(fusion_layers.*)vision_proj": r"\1v_proj",
    r"(fusion_layers.*)text_proj": r"\1l_proj",
    r"^model\.decoder": "transformer.decoder",
    r"(transformer\.decoder)\.layer_norm": r"\1.norm",
    r"reference_points_head": "ref_point_head",
    r"(decoder\.layers\.\d+)\.self_attn_layer_norm": r"\1.norm2",
    r"(decoder\.layers\.\d+)\.final_layer_norm": r"\1.norm3",
    r"(decoder\.layers\.\d+)\.encoder_attn_text_layer_norm": r"\1.catext_norm",
    r"(decoder\.layers\.\d+)\.encoder_attn_text": r"\1.ca_text",
    r"(decoder\.layers\.\d+)\.encoder_attn_layer_norm": r"\1.norm1",
    r"(decoder\.layers\.\d+)\.encoder_attn": r"\1.cross_attn",
    r"(encoder\.layers\.\d+)\.self_attn_layer_norm": r"\1.norm1",
    r"(encoder\.layers\.\d+)\.final_layer_norm": r"\1.norm2",
    r"(transformer\..*)\.fc1": r"\1.linear1",
    r"(transformer\..*)\.fc2": r"\1.linear2",
}
JOINED = (
    (("q_proj", "k_proj", "v_proj"), r"^(backbone.*\.attention)\.{}\.(weight|bias)$", r"\1.qkv.\2"),
    (("query", "key", "value"), r"^(transformer.*\.(?:self_attn|ca_text))\.{}\.(weight|bias)$", r"\1.in_proj_\2"),
)


def as_released(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names and shapes of a GroundingDINO in the release's: other names, and projections in one piece.

    Facts of the mapping: the two releases' own parameter names, side by side.
    """
    renamed = {}
    for name, values in tensors.items():
        for pattern, instead in RENAMED.items():
            name = re.sub(pattern, instead, name)
        renamed[name] = values
    for parts, pattern, whole in JOINED:
        for name in [name for name in renamed if re.match(pattern.format(parts[0]), name)]:
            pieces = [renamed.pop(name.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
            joined = re.sub(pattern.format(parts[0]), whole, name).replace(".attention.qkv", ".attn.qkv")
            renamed[joined] = torch.cat(pieces)
    width = renamed["bert.embeddings.LayerNorm.bias"].numel()
    renamed |= {"bert.pooler.dense.weight": torch.zeros(width, width), "bert.pooler.dense.bias": torch.zeros(width)}
    return {name: values.clone() for name, values in renamed.items() if ".swin.layernorm" not in name}
