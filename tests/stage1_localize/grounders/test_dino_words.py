"""Every wording keeps the places of its own tokens, whatever else is asked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.errors import CorruptError, PromptError
from stage1_localize.contracts import Region
from stage1_localize.grounders.dino_words import PhraseEncoder, build_prompts, load_tokenizer
from tests.stage1_localize.grounders.tiny_grounding_dino import VOCABULARY, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


# One wording is part of another: matching strings would mix them up.
ASKED = [Region("a", ("lung", "Left  Lung.")), Region("b", ("white blood cell", "lung"))]


@pytest.mark.parametrize("joint", [False, True])
def test_spans_name_the_tokens_of_each_wording_and_no_others(tokenizer: Any, joint: bool) -> None:
    prompts = build_prompts(tokenizer, ASKED, joint=joint, tokens_max=256)
    assert len(prompts) == (1 if joint else 3), "wordings that read alike are asked once"
    read = {}
    for prompt in prompts:
        assert list(prompt.input_ids) == tokenizer(prompt.caption)["input_ids"], "the caption reads as the tokens"
        for span in prompt.spans:
            read[span.region, span.text] = [VOCABULARY[i] for i in prompt.input_ids[span.start : span.stop]]
    assert read == {
        (0, 0): ["lung"],
        (0, 1): ["left", "lung"],
        (1, 0): ["white", "blood", "cell"],
        (1, 1): ["lung"],
    }


def test_the_joint_prompt_is_written_as_published(tokenizer: Any) -> None:
    (prompt,) = build_prompts(tokenizer, ASKED, joint=True, tokens_max=256)
    assert prompt.caption == "lung . left lung . white blood cell ."


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (" . ", "holds no word"),
        ("cell. nucleus", "holds '.' or '?'"),
        ("tumour?", "holds '.' or '?'"),
        ("肺", "does not know"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(tokenizer: Any, text: str, says: str) -> None:
    with pytest.raises(PromptError, match=f"region 'x'.*{says.replace('?', '.')}"):
        build_prompts(tokenizer, [Region("x", (text,))], joint=False, tokens_max=256)


def test_a_prompt_that_is_too_long_is_refused(tokenizer: Any) -> None:
    long = Region("x", (" ".join(["lung"] * 254),))
    with pytest.raises(PromptError, match="region 'x': a prompt of 257 tokens, the text encoder reads at most 256"):
        build_prompts(tokenizer, [long], joint=False, tokens_max=256)
    fits = Region("x", (" ".join(["lung"] * 253),))
    assert len(build_prompts(tokenizer, [fits], joint=False, tokens_max=256)[0].input_ids) == 256
    with pytest.raises(PromptError, match="regions 'x', 'y'"):
        build_prompts(tokenizer, [fits, Region("y", ("cell",))], joint=True, tokens_max=256)


def test_a_text_encoder_whose_attention_adds_boolean_masks_is_refused() -> None:
    with pytest.raises(AssertionError, match="expected sdpa"):
        PhraseEncoder(SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager")))


def test_phrases_of_one_prompt_do_not_see_each_other(tokenizer: Any) -> None:
    from transformers import BertConfig, BertModel
    from transformers.models.grounding_dino.modeling_grounding_dino import (
        generate_masks_with_special_tokens_and_transfer_map as published_masks,
    )

    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    encoder = PhraseEncoder(BertModel._from_config(config, attn_implementation="sdpa").eval())

    def hidden(texts: tuple[str, ...]) -> list[torch.Tensor]:
        (prompt,) = build_prompts(tokenizer, [Region("x", texts)], joint=True, tokens_max=256)
        ids = torch.tensor([prompt.input_ids])
        delimiters = torch.tensor([2, 3, 5, 6])
        mask, places = published_masks(ids, delimiters)
        with torch.inference_mode():
            out = encoder(ids, mask, torch.zeros_like(ids), places)["last_hidden_state"][0]
        return [out[span.start : span.stop] for span in prompt.spans]

    alone, beside = hidden(("left lung",))[0], hidden(("tumour", "left lung", "cell"))[1]
    assert torch.allclose(alone, beside, atol=1e-5)
    assert not torch.allclose(alone, hidden(("right lung",))[0], atol=1e-2)


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nlung\n")
    with pytest.raises(CorruptError, match="its vocabulary lacks one of"):
        load_tokenizer(tmp_path)
    with pytest.raises(CorruptError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path / "nowhere")
