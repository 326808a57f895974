"""What stage 2 can be told. Importing this loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from shared.config import Strict, runtime, validate
from shared.errors import ConfigError
from stage2_pretrain.masking import POLICIES
from stage2_pretrain.masking.coverage import CoverageOptions
from stage2_pretrain.masking.schedule import ScheduleOptions
from stage2_pretrain.window import WindowOptions

_DEFAULTS = {"method": "spark", "policy": "region"}


class PretrainConfig(Strict):
    """Stage 2: how images and their region maps become an encoder."""

    method: dict[str, Any] = Field(
        {"name": _DEFAULTS["method"]}, description="Pretraining method: its name, or 'name' and its own settings."
    )
    policy: dict[str, Any] = Field(
        {"name": _DEFAULTS["policy"]},
        description="Mask policy, where and how much to hide: its name, or 'name' and its own settings.",
    )
    schedule: ScheduleOptions = Field(ScheduleOptions(), description="How the policy's settings change over epochs.")
    coverage: CoverageOptions = Field(CoverageOptions(), description="How several regions become one coverage.")
    window: WindowOptions = Field(WindowOptions(), description="How images are cropped, flipped and turned.")
    subset: Path | None = Field(
        None,
        description="CSV whose column sample_id names the samples to train on: one region store serves several folds. "
        "null: every sample of the store.",
    )
    backbone: str = Field("resnet50", description="timm architecture of the encoder.")
    backbone_options: dict[str, Any] | Literal["auto"] = Field(
        "auto",
        description="timm arguments of the backbone. output_stride of a convolutional one, patch_size of a ViT, is the "
        "side of a patch in pixels: a smaller one gives a grid that tells smaller regions. auto: {output_stride: 16} "
        "or {}; img_size is size_px in any case.",
    )
    size_px: int = Field(
        224,
        ge=32,
        le=2048,
        description="Side of the square image that the encoder sees, in pixels: a multiple of its stride.",
    )
    channels: Literal[1, 3] = Field(1, description="1: colour is reduced to grey. 3: grey is repeated.")
    mean: float = Field(0.5, ge=0, le=1, description="Subtracted from pixels in [0, 1]; hidden pixels are then 0.")
    std: float = Field(0.25, gt=0, le=1, description="Then divided by.")
    epochs: int = Field(300, ge=1, lt=1 << 24, description="Passes over the samples.")
    batch_size: int = Field(64, ge=2, description="Images a step, at most; an epoch is cut into equal batches.")
    accumulate: int = Field(
        1,
        ge=1,
        description="Parts in which a step computes its batch, one after another: less memory for the same gradient, "
        "but for batch norms, whose statistics are those of a part.",
    )
    optimizer: Literal["adamw", "lamb"] = Field(
        "adamw", description="adamw, or lamb: for large batches, as in SparK's and MASS's papers."
    )
    lr: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    min_lr: float = Field(1e-6, ge=0, description="Learning rate at the end of the cosine.")
    warmup_epochs: int = Field(10, ge=0, description="Epochs of linear warm-up.")
    weight_decay: float = Field(0.05, ge=0, le=1, description="Weight decay; norms, biases and tokens have none.")
    weight_decay_end: float | None = Field(
        None, ge=0, le=1, description="What weight_decay becomes by a cosine over the run; SparK: 0.04 to 0.2."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay a step of a moving average of the weights, which is then what is published. Policies that "
        "follow a teacher average for it whether this is set (to 0.999 if not) or not, and publish the weights if not.",
    )
    clip_norm: float = Field(5.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    seed: int = Field(0, ge=0, lt=1 << 64, description="Seed of masks, windows, order and initial weights.")
    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="bf16: convolutions and products in bfloat16, weights and loss in float32 (autocast). Fast on "
        "GPUs, and on CPUs with AVX512-BF16 or AMX; slower on others.",
    )
    impl: str = Field(
        "auto",
        description="Backend of the mask sampler: auto, cpu, fused or reference; all give the same bits. auto: fused "
        "on a GPU with at most 4096 patches, else cpu.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to compute.")
    threads: int | Literal["auto"] = Field("auto", description="CPU threads; auto: the cores this process may use.")
    cache_mib: int = runtime(1024, "Memory for decoded images and maps, in MiB; the rest is read every epoch.", ge=0)
    image_cache: str = runtime(
        "off",
        "Folder for decoded images, read by later epochs and runs instead of decoding again; auto: one in the user's "
        "cache folder; off: none. It holds patients' images: it is made for its owner alone, and yours to delete.",
        min_length=1,
    )
    loader_workers: int = runtime(
        0,
        "Processes that load images and draw masks; 0: a thread, enough where the report tells of little waiting. "
        "Results do not depend on them.",
        ge=0,
        le=256,
    )
    max_loss_jump: float = runtime(
        20.0, "A loss above this many times the median of the last 64 steps ends the run; its states stay.", gt=1
    )
    save_every_s: float = runtime(60.0, "Seconds between resumable states.", gt=0)
    save_every_steps: int | None = runtime(None, "Also save a state every so many steps.", ge=1)
    pictures: int = runtime(4, "Reconstructions in the report.", ge=0, le=16)

    @field_validator("method", "policy", mode="before")
    @classmethod
    def _named(cls, value: Any, field: ValidationInfo) -> Any:
        """A bare name, or settings alone: they are the default's."""
        if isinstance(value, dict):
            return {**({} if "name" in value else {"name": _DEFAULTS[str(field.field_name)]}), **value}
        return {"name": value} if isinstance(value, str) else value

    @field_validator("policy")
    @classmethod
    def _whole_policy(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Every option, defaults included: what ran is what resolved.yaml says."""
        name, options = _named("policy", value)
        return {"name": name, **validate(POLICIES.load(name).Options, options).model_dump(mode="json")}

    @field_validator("method")
    @classmethod
    def _named_method(cls, value: dict[str, Any]) -> dict[str, Any]:
        _named("method", value)
        return value

    @field_validator("threads")
    @classmethod
    def _some_threads(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("expected 1 or more, or auto")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        if self.warmup_epochs >= self.epochs > 1:
            raise ValueError(
                f"warmup_epochs must be below epochs, and is {self.warmup_epochs} of {self.epochs}: set it lower too"
            )
        return self

    @property
    def policy_options(self) -> dict[str, Any]:
        """The policy's settings without its name."""
        return _named("policy", self.policy)[1]

    @property
    def method_options(self) -> dict[str, Any]:
        """The method's settings without its name."""
        return _named("method", self.method)[1]


def _named(what: str, value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name = value.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{what}.name: required, not given")
    return name, {key: item for key, item in value.items() if key != "name"}
