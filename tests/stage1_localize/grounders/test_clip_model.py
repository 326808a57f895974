"""A CLIP in two parts says what it says whole, from each format of folder; a bad folder is one line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import ConfigError, CorruptError, IncompatibleError, InputMissingError, MwmError
from stage1_localize.grounders.clip_model import ClipModel, load_clip
from tests.stage1_localize.grounders import tiny_clip

BUILDERS: dict[str, Callable[[Path], Any]] = {
    "transformers": tiny_clip.build_clip,
    "biomedclip": tiny_clip.build_open_clip,
    "open_clip": lambda folder: tiny_clip.build_open_clip(folder, native=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) / "model" for name in BUILDERS}
    for name, folder in made.items():
        BUILDERS[name](folder)
    return made


def load(folder: Path) -> ClipModel:
    return load_clip(folder, "cpu", "float32")


def whole(folder: Path, pixels: torch.Tensor, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text embeddings as the library itself computes them."""
    if (folder / "open_clip_config.json").is_file():
        import open_clip

        about = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        if "hf_model_name" in about["text_cfg"]:
            from transformers import BertConfig

            bert = folder.parent / "bert"  # written from what the model was made of, not from its tensors
            BertConfig(
                vocab_size=11, hidden_size=32, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64,
                max_position_embeddings=16,
            ).save_pretrained(bert)  # fmt: skip
            about["text_cfg"] |= {"hf_model_name": str(bert), "hf_model_pretrained": False}
            model = open_clip.model.CustomTextCLIP(**about)
            asked = torch.tensor([[2, 4, 5, 3] + [0] * 12])  # [CLS] brain tumour [SEP] and padding
        else:
            model = open_clip.model.CLIP(**about)
            asked = open_clip.tokenizer.SimpleTokenizer(context_length=24)([text])
        model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
        model.eval()
        return model.encode_image(pixels), model.encode_text(asked)
    from transformers import AutoTokenizer, CLIPModel

    clip = CLIPModel.from_pretrained(folder).eval()
    asked = AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt")
    return clip.get_image_features(pixels).pooler_output, clip.get_text_features(**asked).pooler_output


@pytest.mark.parametrize("name", BUILDERS)
def test_the_parts_make_the_whole(name: str, folders: dict[str, Path]) -> None:
    clip = load(folders[name])
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, clip.size_px, clip.size_px))).float()
    with torch.no_grad():
        image, text = whole(folders[name], pixels, "brain tumour")
        for layer in range(len(clip.blocks)):
            tokens = clip.below(pixels, layer)
            assert tokens.shape[1] == clip.grid**2 + 1
            torch.testing.assert_close(clip.above(tokens, layer), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(clip.embed_text("brain tumour"), text[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(clip.embed_text("lung"), text[0], rtol=1e-2)
    assert clip.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    assert clip.mean == tuple(tiny_clip.MEAN)
    assert clip.count_tokens("brain tumour") == 4


def test_the_whole_image_is_seen_normalised_and_padded_with_black(folders: dict[str, Path]) -> None:
    clip = load(folders["transformers"])
    image = np.full((1, 20, 40), 0.6, np.float32)
    pixels, rows, columns = clip.prepare(image)
    assert (rows, columns) == (16, 32)
    back = pixels * torch.tensor(tiny_clip.STD)[:, None, None] + torch.tensor(tiny_clip.MEAN)[:, None, None]
    torch.testing.assert_close(back[:, :16], torch.full((3, 16, 32), 0.6))
    torch.testing.assert_close(back[:, 16:], torch.zeros(3, 16, 32), atol=1e-6, rtol=0)


def test_weights_and_tokenizer_are_pinned(folders: dict[str, Path], tmp_path: Path) -> None:
    one, again = load(folders["biomedclip"]).identity, load(folders["biomedclip"]).identity
    assert one == again
    assert {"open_clip_config.json", "tokenizer.json", "vocab.txt"} <= one["files_sha256"].keys()
    changed = shutil.copytree(folders["biomedclip"], tmp_path / "model")
    tensors = load_file(changed / "open_clip_model.safetensors")
    tensors["visual.head.proj.weight"][0, 0] += 1
    save_file(tensors, changed / "open_clip_model.safetensors")
    assert load(changed).identity["tensors_sha256"] != one["tensors_sha256"]
    torch.save(
        load_file(folders["biomedclip"] / "open_clip_model.safetensors"), changed / "open_clip_pytorch_model.bin"
    )
    (changed / "open_clip_model.safetensors").unlink()
    assert load(changed).identity == one  # the same tensors in a torch file, as BiomedCLIP's release has it


def lacking(folder: Path, name: str) -> None:
    (folder / name).unlink()


def drop_a_tensor(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(next(key for key in tensors if key.endswith("proj.weight")))
    save_file(tensors, file, metadata={"format": "pt"})


def cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("name", "harm", "error", "says"),
    [
        ("transformers", lambda f: lacking(f, "config.json"), InputMissingError, "found neither"),
        (
            "transformers",
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            IncompatibleError,
            "'bert'",
        ),
        ("transformers", lambda f: (f / "config.json").write_text("{"), CorruptError, "not JSON"),
        (
            "transformers",
            lambda f: lacking(f, "preprocessor_config.json"),
            InputMissingError,
            "preprocessor_config.json",
        ),
        ("transformers", lambda f: lacking(f, "model.safetensors"), CorruptError, "cannot be loaded"),
        ("transformers", drop_a_tensor, CorruptError, "lack"),
        ("transformers", cut, CorruptError, "cannot be loaded"),
        ("biomedclip", lambda f: lacking(f, "open_clip_model.safetensors"), InputMissingError, "no weights"),
        ("biomedclip", drop_a_tensor, CorruptError, "cannot be loaded"),
        ("biomedclip", cut, CorruptError, "not a safetensors file"),
        ("biomedclip", lambda f: (f / "open_clip_config.json").write_text("{}"), InputMissingError, "no model_cfg"),
    ],
)
def test_a_bad_folder_is_one_line(
    name: str,
    harm: Callable[[Path], Any],
    error: type[MwmError],
    says: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "model")
    harm(folder)
    with pytest.raises(error, match=says) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_without_open_clip_its_folder_names_the_extra(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match="open_clip_torch is not installed") as caught:
        load(folders["biomedclip"])
    assert "open-clip" in str(caught.value.hint)
    load(folders["transformers"])


def test_a_tower_without_tokens_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    import open_clip

    folder = shutil.copytree(folders["open_clip"], tmp_path / "model")
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["model_cfg"]["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    model = open_clip.model.CLIP(**about["model_cfg"])
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    with pytest.raises(IncompatibleError, match="no ViT"):
        load(folder)
