"""What stage 3 can be told. Importing this loads no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from shared.config import Strict, runtime


class AugmentConfig(Strict):
    """What training images may undergo; val and test images never do. All zero or off: nothing."""

    use: Literal["auto"] | bool = Field(
        "auto", description="Whether at all; auto: unless the encoder is frozen, whose features are then computed once."
    )

    crop_scale: tuple[int, int] = Field(
        (700, 1000),
        description="Smallest and largest share of the image's area to crop, in thousandths, both 1 to 1000; the "
        "image's aspect is kept. [1000, 1000]: never crop.",
    )
    flip: bool = Field(True, description="Mirror left and right in half of the draws; off where sides matter.")
    brightness_milli: int = Field(100, ge=0, le=1000, description="Largest shift of all pixels, in thousandths.")
    contrast_milli: int = Field(100, ge=0, le=900, description="Largest change of contrast, in thousandths.")

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        if not 1 <= self.crop_scale[0] <= self.crop_scale[1] <= 1000:
            raise ValueError("crop_scale must be two thousandths, 1 <= smallest <= largest <= 1000")
        return self

    @property
    def changes(self) -> bool:
        """Whether an image may come out changed."""
        shifted = self.flip or self.brightness_milli > 0 or self.contrast_milli > 0
        return self.use is not False and (shifted or self.crop_scale[0] < 1000)


class FinetuneConfig(Strict):
    """Stage 3: how an encoder becomes a model."""

    task: str = Field("classify", description="What the model learns; a name of the task table.")
    options: dict[str, Any] = Field(default_factory=dict, description="The task's own settings.")
    backbone: str = Field("auto", description="timm architecture; auto: the encoder's, from scratch resnet18.")
    backbone_options: dict[str, Any] = Field(
        default_factory=dict, description="timm arguments of a backbone from scratch, e.g. output_stride."
    )
    size_px: int = Field(224, ge=32, le=2048, description="Side of the square image that the model sees, in pixels.")
    channels: Literal["auto", 1, 3] = Field("auto", description="Input channels; auto: the encoder's, else 1.")
    freeze: bool = Field(False, description="Train the head only (a probe); needs an encoder.")
    layer_decay_milli: int = Field(
        1000,
        ge=1,
        le=1000,
        description="Factor of the learning rate from each layer of the encoder to the one below it, in thousandths; "
        "the head has the full rate. 1000: all alike. Without effect from scratch.",
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="Augmentation of training images.")
    classes: tuple[str, ...] | None = Field(
        None, description="Class names in order; other labels are an error. None: every label, sorted."
    )
    fraction_milli: int = Field(
        1000,
        ge=1,
        le=1000,
        description="Share of the training groups that keep their labels, in thousandths; a smaller share is part of "
        "a larger one of the same seed.",
    )
    val_milli: int = Field(
        150, ge=0, le=800, description="Share of val where the table has no split, in thousandths of its samples."
    )
    test_milli: int = Field(200, ge=1, le=800, description="Share of test where the table has no split, likewise.")
    epochs: int = Field(30, ge=1, le=100_000, description="Passes over the training part.")
    batch_size: int = Field(32, ge=4, description="Images a step, at most; an epoch is cut into equal batches.")
    lr: float = Field(3e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    min_lr: float = Field(1e-6, ge=0, description="Learning rate at the end of the cosine.")
    warmup_epochs: int = Field(2, ge=0, description="Epochs of linear warm-up.")
    weight_decay: float = Field(0.05, ge=0, le=1, description="AdamW weight decay; norms and biases have none.")
    clip_norm: float = Field(1.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the split, initialisation, order and augmentation.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to compute.")
    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="bf16: convolutions and products in bfloat16, weights and loss in float32 (autocast). Fast on "
        "GPUs, and on CPUs with AVX512-BF16 or AMX; slower on others.",
    )
    threads: int | Literal["auto"] = Field("auto", description="CPU threads; auto: the cores this process may use.")
    resamples: int = Field(2000, ge=100, le=100_000, description="Bootstrap resamples behind each interval.")
    loader_workers: int = runtime(
        0, "Processes that load training images; 0: a thread. Results do not depend on them.", ge=0, le=256
    )
    cache_mib: int = runtime(1024, "Memory for decoded images, in MiB; the rest is decoded every epoch.", ge=0)
    save_every_s: float = runtime(60.0, "Seconds between resumable states.", gt=0)
    save_every_steps: int | None = runtime(None, "Also save a state every so many steps.", ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        if isinstance(self.threads, int) and self.threads < 1:
            raise ValueError("threads must be 1 or more, or auto")
        if self.val_milli + self.test_milli >= 1000:
            raise ValueError("val_milli + test_milli must leave something to train on (below 1000)")
        if self.warmup_epochs >= self.epochs > 1:
            raise ValueError(
                f"warmup_epochs must be below epochs, and is {self.warmup_epochs} of {self.epochs}: set it lower too"
            )
        if self.classes is not None and (len(set(self.classes)) != len(self.classes) or not self.classes):
            raise ValueError("classes must be different names, at least one")
        return self
