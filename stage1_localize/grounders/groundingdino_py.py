"""`groundingdino_py`: the original release's GroundingDINO, from the package groundingdino-py 0.4.0.

For weights that exist only as the release's ``.pth`` files, and for comparing with published numbers; the same
function as `grounding_dino`, to 1e-4 in scores and in shares of a side on equal weights (but for boxes within a
thousandth of the border, where the two clamp differently). Three things of the package
are not used: its text wrapper, which fails with transformers 5 (`PhraseEncoder` stands there); its configuration
reader, which runs the file as Python (here it is read as data); its loader, which unpickles.
"""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from shared.config import digest, runtime
from shared.errors import ConfigError, CorruptError, IncompatibleError, InputMissingError
from stage1_localize.grounders.dino_images import read_preprocessing
from stage1_localize.grounders.dino_locate import TOKENS_MAX, DinoGrounder, DinoOptions
from stage1_localize.grounders.dino_words import TOKENIZER_FILES, PhraseEncoder, Prompt, load_tokenizer
from stage1_localize.models import find_model, load_tensors, weights_identity

DEFAULT, DEFAULT_TEXT = "ShilongLiu/GroundingDINO", "bert-base-uncased"
PACKAGED = {"SwinT_OGC": "groundingdino_swint_ogc.pth", "SwinB_cfg": "groundingdino_swinb_cogcoor.pth"}
"""Configurations of the package, and the released weights that each belongs to."""
_SWINS: dict[str, dict[str, Any]] = {
    "swin_T": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "swin_B": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    "swin_L": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]},
}
_SUFFIXES = (".pth", ".pt", ".safetensors")


class GroundingDinoPy(DinoGrounder):
    """Boxes for any words, from the original release's weights."""

    class Options(DinoOptions):
        """A weights file of the release, its configuration, and the text encoder's folder."""

        dtype: Literal["auto", "float32"] = Field("auto", description="Always float32: the package knows no other.")
        config: str = runtime("SwinT_OGC", "SwinT_OGC, SwinB_cfg, or a configuration file of the release.")
        text_model: str | None = runtime(
            None, "Folder or hub name with the text encoder's config.json and vocabulary; none: bert-base-uncased."
        )

        def pinned(self) -> Self:
            """With device and batch decided."""
            return super().pinned().model_copy(update={"dtype": "float32"})

        def anywhere(self) -> Self:
            """With paths that a worker finds whatever its folder."""
            options = super().anywhere()
            paths = {"config": options.config, "text_model": options.text_model}
            found = {name: str(Path(path).absolute()) for name, path in paths.items() if path and Path(path).exists()}
            return options.model_copy(update=found)

    version = 1

    def __init__(self, options: Options) -> None:
        """Read the configuration, build the package's model and fill it.

        Raises:
            InputMissingError: No such weights, configuration or text encoder.
            ConfigError: A configuration that is no list of literals, or asks for what is not offered.
            CorruptError: A file that cannot be read, or weights that do not fill the model.
            IncompatibleError: The package cannot be imported here.
        """
        self.options = options.pinned()
        config_file = _config_file(options.config)
        config = read_config(config_file)
        weights = _weights(options)
        asked = options.model_copy(update={"model": options.text_model, "revision": None})
        text_folder = find_model(asked, DEFAULT_TEXT, needs=("config.json",))
        bert = _text_encoder(text_folder)
        self._tokenizer = load_tokenizer(text_folder)
        model, unused = _filled(build_model(config, bert, self._tokenizer), weights)
        self._how = read_preprocessing(weights.parent, self.options.size_px)
        files = [text_folder / name for name in ("config.json", *TOKENIZER_FILES)]
        self._identity = {
            **weights_identity(model.state_dict(), files),
            "config_sha256": digest({name: repr(value) for name, value in config.items()}),
            "unused_tensors": unused,
            "preprocessing": str(self._how),
            "joint": self.options.joint,
            "numeric": f"groundingdino-py 0.4.0 on torch {self.options.device} float32, text attention sdpa",
        }
        self._network = PackageNetwork(model, config, self.options)
        self._tokens_max = min(TOKENS_MAX, int(model.bert.config.max_position_embeddings))


def read_config(path: Path) -> dict[str, Any]:
    """A configuration of the release, read as data: ``name = literal`` lines and nothing else.

    ``backbone`` may also be a dictionary with embed_dim, depths, num_heads and window_size of a Swin transformer.

    Raises:
        ConfigError: Anything that would have to be run.
    """
    try:
        lines = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"config {path.name}: cannot be read ({type(error).__name__})") from None
    found = {}
    for line in lines:
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue  # a docstring
        name = line.targets[0].id if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name) else None
        try:
            if name is None or not isinstance(line, ast.Assign) or len(line.targets) != 1:
                raise ValueError
            found[name] = ast.literal_eval(line.value)
        except ValueError:
            raise ConfigError(
                f"config {path.name}, line {line.lineno}: expected 'name = literal'; the file is read, never run",
                hint="write the values out",
            ) from None
    return found


def _config_file(config: str) -> Path:
    if config not in PACKAGED:
        if not Path(config).is_file():
            raise InputMissingError(f"config {config}: no such file, and none of {', '.join(PACKAGED)}")
        return Path(config)
    spec = importlib.util.find_spec("groundingdino")
    if spec is None or not spec.submodule_search_locations:
        raise IncompatibleError(
            "grounder 'groundingdino_py': the package is not installed", hint="pip install groundingdino-py==0.4.0"
        )
    return Path(spec.submodule_search_locations[0]) / "config" / f"GroundingDINO_{config}.py"


def _weights(options: GroundingDinoPy.Options) -> Path:
    path = find_model(options, DEFAULT)
    if path.is_file():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    named = [file for file in files if file.name == PACKAGED.get(options.config)]
    if len(named or files) != 1:
        raise InputMissingError(
            f"model {options.model or DEFAULT}: its folder holds {len(files)} weights files, expected one",
            hint=f"give the file itself, such as {PACKAGED['SwinT_OGC']}",
        )
    return (named or files)[0]


def _text_encoder(folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    try:
        return BertModel._from_config(BertConfig.from_pretrained(folder), attn_implementation="sdpa")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"text_model {folder}: config.json is no BERT's ({type(error).__name__})") from None


def build_model(config: dict[str, Any], bert: Any, tokenizer: Any) -> Any:
    """The package's model in evaluation mode, unfilled, with transformers' BERT as its text encoder.

    Raises:
        IncompatibleError: The package cannot be imported.
        ConfigError: A value missing or not offered.
    """
    package = _import_package()
    # Checkpointing saves memory in training; here it would only warn.
    arguments = SimpleNamespace(**{**config, "use_checkpoint": False, "use_transformer_ckpt": False})
    try:
        with _without_its_warnings():
            eyes = package.swin.SwinTransformer(**_swin(arguments.backbone, arguments.return_interm_indices))
        backbone = package.backbone.Joiner(eyes, package.backbone.build_position_encoding(arguments))
        backbone.num_channels = eyes.num_features[4 - len(arguments.return_interm_indices) :]
        with _without_its_warnings(), _own_text_encoder(package.model, tokenizer, bert):
            model = package.model.GroundingDINO(
                backbone,
                package.model.build_transformer(arguments),
                num_queries=arguments.num_queries,
                iter_update=True,
                query_dim=arguments.query_dim,
                num_feature_levels=arguments.num_feature_levels,
                nheads=arguments.nheads,
                dec_pred_bbox_embed_share=arguments.dec_pred_bbox_embed_share,
                two_stage_type=arguments.two_stage_type,
                two_stage_bbox_embed_share=arguments.two_stage_bbox_embed_share,
                two_stage_class_embed_share=arguments.two_stage_class_embed_share,
                num_patterns=arguments.num_patterns,
                sub_sentence_present=arguments.sub_sentence_present,
            )
    except (AttributeError, TypeError, AssertionError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ConfigError(
            f"config: builds no model ({type(error).__name__}: {error})",
            hint="compare it with SwinT_OGC of the package",
        ) from None
    return model.eval().requires_grad_(False)


def _import_package() -> SimpleNamespace:
    try:
        with _without_its_warnings():
            from groundingdino.models.GroundingDINO import groundingdino as model
            from groundingdino.models.GroundingDINO.backbone import backbone, swin_transformer
    except ImportError as error:
        graphics = "libGL" in str(error) or "libgthread" in str(error)
        raise IncompatibleError(
            f"grounder 'groundingdino_py': its package cannot be imported ({error})",
            hint="it imports OpenCV, which needs libGL: install libgl1 and libglib2.0-0, or opencv-python-headless in "
            "place of opencv-python"
            if graphics
            else "pip install groundingdino-py==0.4.0; or use grounder 'grounding_dino', which needs none of it",
        ) from None
    return SimpleNamespace(model=model, backbone=backbone, swin=swin_transformer)


def _swin(backbone: Any, indices: Sequence[int]) -> dict[str, Any]:
    if isinstance(backbone, str):
        if backbone[:6] not in _SWINS:
            raise ConfigError(f"config: backbone '{backbone}', expected one of {', '.join(_SWINS)} or a dictionary")
        trained_px = int(backbone.split("_")[2])
        backbone = {**_SWINS[backbone[:6]], "window_size": trained_px // 32, "pretrain_img_size": trained_px}
    return {**backbone, "out_indices": tuple(indices)}


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    """The package calls meshgrid, autocast and timm by their older names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _own_text_encoder(module: Any, tokenizer: Any, bert: Any) -> Iterator[None]:
    """The package asks the hub for its text encoder; while a model is built it is handed this one."""
    names = {
        "get_tokenlizer": SimpleNamespace(
            get_tokenlizer=lambda name: tokenizer, get_pretrained_language_model=lambda name: bert
        ),
        "BertModelWarper": lambda bert_model: bert_model,
    }
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _filled(model: Any, weights: Path) -> tuple[Any, int]:
    """The model with its weights, and how many tensors of the file it has no place for."""
    tensors = {name.removeprefix("module."): values for name, values in load_tensors(weights).items()}
    try:
        result = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CorruptError(
            f"weights {weights.name}: other shapes than the configuration's ({str(error).splitlines()[-1].strip()})",
            hint="choose the config that belongs to the weights: SwinT_OGC or SwinB_cfg",
        ) from None
    # Indices are computed, and nothing reads the text encoder's pooler.
    absent = [key for key in result.missing_keys if "relative_position_index" not in key and "bert.pooler" not in key]
    if absent:
        raise CorruptError(
            f"weights {weights.name}: lack {len(absent)} tensors, such as {absent[0]}",
            hint="choose the config that belongs to the weights: SwinT_OGC or SwinB_cfg",
        )
    return model, len(result.unexpected_keys)


class PackageNetwork:
    """The package's model behind the `Network` protocol.

    Args:
        model: From `build_model`, filled; its encoders are replaced in place.
        config: From `read_config`.
        options: Pinned.
    """

    def __init__(self, model: Any, config: dict[str, Any], options: DinoOptions) -> None:
        self.device: str = options.device
        self.num_queries = int(config["num_queries"])
        finest = [4 * 2**index for index in config["return_interm_indices"]]
        extra = range(1, config["num_feature_levels"] - len(finest) + 1)
        self.strides = (*finest, *(finest[-1] * 2**level for level in extra))
        self._model = model.to(self.device)
        model.bert = PhraseEncoder(model.bert)
        self._backbone = model.backbone
        self._seen = _SeenBefore(model.backbone[1])
        model.backbone = self._seen

    def see(self, pixels: Float[Tensor, "B 3 H W"]) -> Any:
        """Feature maps with their places, and a mask that says that none of it is padding."""
        from groundingdino.util.misc import NestedTensor

        nowhere = torch.zeros_like(pixels[:, 0], dtype=torch.bool)
        with _without_its_warnings():
            maps, places = self._backbone(NestedTensor(pixels, nowhere))
        return maps, places, nowhere

    def ask(self, seen: Any, prompt: Prompt) -> tuple[Float[Tensor, "B Q T"], Float[Tensor, "B Q 4"]]:
        """Logits and boxes; the model reads the mask of the images only, their features stand in for them."""
        from groundingdino.util.misc import NestedTensor

        maps, places, nowhere = seen
        self._seen.features = maps, places
        with _without_its_warnings():
            out = self._model(NestedTensor(nowhere, nowhere), captions=[prompt.caption] * len(nowhere))
        return out["pred_logits"][..., : len(prompt.input_ids)], out["pred_boxes"]


class _SeenBefore(nn.Module):
    """Stands where the model expects its image backbone, and answers with what that said before."""

    def __init__(self, position_embedding: Any) -> None:
        super().__init__()
        self.position_embedding = position_embedding
        self.features: Any = None

    def __getitem__(self, index: int) -> Any:
        assert index == 1  # the model takes its places of further levels from there
        return self.position_embedding

    def forward(self, samples: Any) -> tuple[list[Any], list[Any]]:
        del samples
        maps, places = self.features
        return list(maps), list(places)  # copies: the model appends to them
