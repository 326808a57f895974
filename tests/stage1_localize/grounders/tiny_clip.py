"""Folders with tiny CLIP models of random weights, one of each format that `biomedclip` loads."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "brain", "tumour", "white", "blood", "cell", "lung", "a"]
SIZE_PX, PATCH_PX, WIDTH, BLOCKS = 32, 8, 32, 3
MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.26, 0.27]


def options(folder: Path) -> dict[str, Any]:
    """Options of the grounder for such a folder, small enough for a test."""
    return {"model": str(folder), "layer": 1, "steps": 4, "draws": 3, "device": "cpu", "dtype": "float32"}


def build_clip(folder: Path) -> dict[str, Any]:
    """A `transformers` CLIP; returns the grounder's options."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(3)
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2}
    words = ["<|startoftext|>", "<|endoftext|>", *VOCABULARY]
    config = CLIPConfig(
        text_config={
            **tower, "num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": 16,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        },
        vision_config={**tower, "num_hidden_layers": BLOCKS, "image_size": SIZE_PX, "patch_size": PATCH_PX},
        projection_dim=16,
    )  # fmt: skip
    model = CLIPModel(config)
    _spread(model)
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{words[0]} $A {words[1]}", special_tokens=[(words[0], 0), (words[1], 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=words[0], eos_token=words[1], pad_token=words[1], unk_token="[UNK]"
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return options(folder)


def build_open_clip(folder: Path, *, native: bool = False) -> dict[str, Any]:
    """An open_clip folder made like BiomedCLIP's (timm's ViT and a BERT), or of open_clip's own towers.

    Returns the grounder's options.
    """
    import open_clip
    from transformers import BertConfig, BertTokenizerFast

    torch.manual_seed(5)
    folder.mkdir(parents=True, exist_ok=True)
    if native:
        vision: dict[str, Any] = {
            "image_size": SIZE_PX, "layers": BLOCKS, "width": WIDTH, "patch_size": PATCH_PX, "head_width": 16,
        }  # fmt: skip
        text: dict[str, Any] = {"context_length": 24, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 1}
    else:
        vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
        text = {
            "hf_model_name": "someone/a-bert", "hf_tokenizer_name": "someone/a-bert", "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 16,
        }  # fmt: skip
    about = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    about["preprocess_cfg"] = {"mean": MEAN, "std": STD}
    building = json.loads(json.dumps(about["model_cfg"]))
    if not native:
        bert = folder / "bert"
        BertConfig(
            vocab_size=len(VOCABULARY), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=1,
            intermediate_size=2 * WIDTH, max_position_embeddings=16,
        ).save_pretrained(bert)  # fmt: skip
        building["text_cfg"] |= {"hf_model_name": str(bert), "hf_model_pretrained": False}
        building["vision_cfg"]["timm_model_pretrained"] = False
        model = open_clip.model.CustomTextCLIP(**building)
        (bert / "config.json").unlink()  # as in BiomedCLIP's folder: nothing says what BERT it is
        bert.rmdir()
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
        BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    else:
        model = open_clip.model.CLIP(**building)
    _spread(model)
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return options(folder)


def _spread(model: torch.nn.Module) -> None:
    """Weights large enough that tokens and wordings differ, as they do in a trained model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "logit" not in name:
                parameter.mul_(3)
