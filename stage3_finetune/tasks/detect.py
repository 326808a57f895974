"""Things in an image, with boxes and perhaps masks: torchvision's Faster and Mask R-CNN on any encoder's pyramid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from shared.backbones import Backbone
from shared.config import Strict
from shared.errors import ConfigError
from shared.rng import seed_key
from stage3_finetune.annotations import HUNDREDTHS, pack
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.contracts import Batch, Example
from stage3_finetune.detections import MILLIONTHS, Answer, DetectPredictions
from stage3_finetune.export import (
    Preprocessing,
    describe,
    described,
    read_model,
    take_weights,
    told_as_corrupt,
    write_model,
)
from stage3_finetune.instances import InstanceTargets, Things
from stage3_finetune.pyramid import ENCODER, Pyramid

_ASPECTS = (0.5, 1.0, 2.0)
_LARGEST_ANCHOR = 0.5
"""Side of the coarsest level's anchors as a share of the image's; each finer level's are half as large."""
_PRIOR = 0.02
"""Probability of a thing that an untrained model gives a proposal (Lin 2017, focal loss): below ``score_milli``, so
that predictions of the first epochs are few and cheap."""
_BOX_CELLS, _MASK_CELLS = 7, 14


class DetectOptions(Strict):
    """Settings of the task; the defaults suit small sets and small images, in brackets what COCO is trained with."""

    masks: bool | Literal["auto"] = Field(
        "auto", description="Learn masks too (Mask R-CNN); auto: where every thing's outline is more than its box."
    )
    width: int = Field(128, ge=8, le=1024, description="Channels of the pyramid [256].")
    head_width: int = Field(256, ge=8, le=4096, description="Width of the box head's two layers [1024].")
    mask_width: int = Field(64, ge=8, le=1024, description="Channels of the mask head [256].")
    mask_layers: int = Field(2, ge=1, le=8, description="Convolutions of the mask head [4].")
    candidates: int = Field(200, ge=1, le=10_000, description="Anchors a level that may become proposals [1000].")
    proposals: int = Field(100, ge=1, le=10_000, description="Proposals an image [1000].")
    sampled: int = Field(64, ge=4, le=2048, description="Proposals an image that the heads are trained on [512].")
    answers: int = Field(50, ge=1, le=100, description="Answers an image at most [100].")
    score_milli: int = Field(50, ge=0, le=999, description="Least score of an answer, in thousandths [50].")
    nms_milli: int = Field(
        500, ge=1, le=1000, description="Of answers of a class that overlap more, the best stays; IoU in thousandths."
    )


class Detect:
    """Faster R-CNN (Ren 2015) or Mask R-CNN (He 2017) on an encoder's pyramid.

    Anchors are squares and 2:1 rectangles; the coarsest level's have sides of half the image.

    Args:
        options: Settings; ``masks`` is decided.
        backbone: The encoder.
        classes: Class names in order; the model's label 0 is the background.
        preprocessing: Of the input.
        seed: Seed of the new weights.

    Attributes:
        model: torchvision's detector; the encoder is ``backbone.encoder`` in it.
        head: Names of the new tensors in the model's state dict.

    Raises:
        ConfigError: The encoder's strides are no powers of two, or do not divide the image.
    """

    Options = DetectOptions
    Targets = InstanceTargets
    Predictions = DetectPredictions
    kind: ClassVar[Literal["instances"]] = "instances"
    version = 1

    def __init__(
        self,
        options: DetectOptions,
        backbone: Backbone,
        *,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        seed: int,
    ) -> None:
        if options.masks == "auto":
            raise ConfigError("options.masks: 'auto' is decided by labels; say true or false")
        backbone.grid(preprocessing.size_px)
        self.options, self.classes, self.preprocessing = options, tuple(classes), preprocessing
        self._backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_key("finetune/head", seed) % 2**63)
            self.model = _build(options, backbone, len(classes), preprocessing)
        self.head = tuple(name for name in self.model.state_dict() if not name.startswith(f"backbone.{ENCODER}"))

    @staticmethod
    def settle(
        options: DetectOptions, config: FinetuneConfig, targets: InstanceTargets
    ) -> tuple[DetectOptions, FinetuneConfig]:
        """Whether masks are learnt follows from the labels."""
        return targets.options, config

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of torchvision's losses (``loss``), and each."""
        device = next(self.model.parameters()).device
        targets = [{name: value.to(device) for name, value in target.items()} for target in batch.target]
        with _mode(self.model, training=True):
            losses = self.model(list(batch.image.to(device)), targets)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def predict(self, batch: Batch) -> list[Answer]:
        """What is found in each image, in its own frame; the encoder's mode is the caller's."""
        device = next(self.model.parameters()).device
        with _mode(self.model, training=False):
            found = self.model(list(batch.image.to(device)))
        rows = zip(found, batch.truth, batch.sizes_px, strict=True)
        return [Answer(self._things(one, size_px), _truth(truth, size_px)) for one, truth, size_px in rows]

    def collect(self, examples: Sequence[Example], answers: Sequence[Answer]) -> DetectPredictions:
        """Answers of these rows."""
        return DetectPredictions(tuple(examples), self.classes, tuple(answers), bool(self.options.masks))

    def export(self, folder: Path) -> None:
        """A folder that `restore` reads: ``config.json`` names the architecture, classes and settings."""
        config = {
            **describe(self._backbone, self.preprocessing),
            "task": "detect",
            "label_names": list(self.classes),
            "options": self.options.model_dump(),
        }
        write_model(self.model, folder, config)

    @classmethod
    def restore(cls, folder: Path) -> Detect:
        """What `export` wrote, ready to predict.

        Raises:
            CorruptError: A file is missing or unreadable, or a tensor is missing, unknown or of another shape.
        """
        config, state = read_model(folder)
        with told_as_corrupt(folder):
            backbone, preprocessing = described(config)
            options, classes = DetectOptions.model_validate(config["options"]), list(config["label_names"])
            made = cls(options, backbone, classes=classes, preprocessing=preprocessing, seed=0)
        take_weights(made.model, state, folder)
        return made

    def _things(self, found: dict[str, Tensor], size_px: tuple[int, int]) -> Things:
        """Answers in whole hundredths and millionths of the image's frame; what has no area there is left out."""
        side, (height, width) = self.preprocessing.size_px, size_px
        scale = torch.tensor([width, height, width, height], dtype=torch.float64) / side
        boxes_px = found["boxes"].cpu().double() * scale
        corners = torch.floor(boxes_px * HUNDREDTHS + 0.5).to(torch.int64).numpy()
        corners = corners.clip(0, np.array([width, height, width, height]) * HUNDREDTHS)
        scores = torch.floor(found["scores"].cpu().double() * MILLIONTHS + 0.5).to(torch.int64).numpy()
        kept = np.flatnonzero((corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1]))
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        masks = None
        if "masks" in found:
            shapes = found["masks"].cpu()
            masks = tuple(_paste(shapes[index], boxes_px[index].float(), size_px) for index in kept)
        labels = found["labels"].cpu().numpy()[kept] - 1
        return Things(size_px, corners[kept], labels, masks, scores[kept])


class _AsItIs(GeneralizedRCNNTransform):
    """Normalises; images are squares of the right size already, and answers stay in their frame."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        return result


def _build(options: DetectOptions, backbone: Backbone, classes: int, preprocessing: Preprocessing) -> GeneralizedRCNN:
    pyramid = Pyramid(backbone, options.width)
    side, levels = preprocessing.size_px, len(pyramid.strides) + 1
    sides = tuple((max(1, round(side * _LARGEST_ANCHOR / 2**place)),) for place in reversed(range(levels)))
    more: dict[str, Any] = {}
    if options.masks:
        more = {
            "mask_roi_pool": _pool(pyramid, _MASK_CELLS),
            "mask_head": MaskRCNNHeads(options.width, [options.mask_width] * options.mask_layers, 1),
            "mask_predictor": MaskRCNNPredictor(options.mask_width, options.mask_width, classes + 1),
        }
    predictor = FastRCNNPredictor(options.head_width, classes + 1)
    with torch.no_grad():
        predictor.cls_score.bias[0] = math.log(classes * (1 / _PRIOR - 1))
    model: GeneralizedRCNN = (MaskRCNN if options.masks else FasterRCNN)(
        pyramid,
        rpn_anchor_generator=AnchorGenerator(sides, (_ASPECTS,) * levels),
        rpn_pre_nms_top_n_train=options.candidates,
        rpn_pre_nms_top_n_test=options.candidates,
        rpn_post_nms_top_n_train=options.proposals,
        rpn_post_nms_top_n_test=options.proposals,
        box_roi_pool=_pool(pyramid, _BOX_CELLS),
        box_head=TwoMLPHead(options.width * _BOX_CELLS**2, options.head_width),
        box_predictor=predictor,
        box_batch_size_per_image=options.sampled,
        box_score_thresh=options.score_milli / 1000,
        box_nms_thresh=options.nms_milli / 1000,
        box_detections_per_img=options.answers,
        **more,
    )
    model.transform = _AsItIs(side, side, list(preprocessing.mean), list(preprocessing.std), size_divisible=1)
    return model


def _pool(pyramid: Pyramid, cells: int) -> MultiScaleRoIAlign:
    """Pools a proposal from the level of its size; told the scales, so that no image's size decides them."""
    pool = MultiScaleRoIAlign([str(place) for place in range(len(pyramid.strides))], cells, 2)
    pool.scales = [1 / stride for stride in pyramid.strides]
    first, last = (stride.bit_length() - 1 for stride in (pyramid.strides[0], pyramid.strides[-1]))
    pool.map_levels = initLevelMapper(first, last, canonical_scale=224, canonical_level=4)
    return pool


@contextmanager
def _mode(model: Any, *, training: bool) -> Iterator[None]:
    """Let the detector give losses, or answers, whatever the mode of the encoder under it is."""
    parts = (model, model.transform, model.rpn, model.roi_heads)
    before = [part.training for part in parts]
    for part in parts:
        part.training = training
    try:
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.training = was


def _paste(shape: Float32[Tensor, "1 m m"], box_px: Float32[Tensor, "4"], size_px: tuple[int, int]) -> str:
    """A mask in its box, in the image's frame, at a probability above one half."""
    pasted = paste_masks_in_image(shape[None], box_px[None], size_px)[0, 0]
    return pack((pasted > 0.5).numpy())


def _truth(truth: Things | None, size_px: tuple[int, int]) -> Things:
    if truth is not None:
        return truth
    return Things(size_px, np.zeros((0, 4), np.int64), np.zeros(0, np.int64), None)
