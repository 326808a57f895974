"""Model weights that a user brings: a folder, a file, or a name on the hub; read as data, digested by tensors.

A part whose weights are not packaged takes `ModelOptions` as the base of its ``Options``. Where the weights lie is
no part of a result's identity; what they are is: `weights_identity`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from shared.config import Strict, runtime
from shared.errors import ConfigError, CorruptError, InputMissingError

_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.bin", "*.pt", "*.pth")


class ModelOptions(Strict):
    """Where a model's weights come from, and how it computes."""

    # Not part of the identity: the digests of what was found there are.
    model: str | None = runtime(None, "Weights: a folder, a file, or a name on the hub; none: the part's default.")
    revision: str | None = runtime(None, "Commit, branch or tag on the hub; none: the newest.")
    offline: bool = runtime(False, "Never ask the hub: use what lies on this disk (as HF_HUB_OFFLINE=1 does).")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where it computes; auto: cuda if there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of weights and activations; auto: bfloat16 on cuda, float32 on a CPU."
    )

    def pinned(self) -> Self:
        """With device and dtype decided, as ``resolved.yaml`` keeps them.

        Raises:
            ConfigError: ``cuda`` is asked and there is none.
        """
        import torch

        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise ConfigError("device: cuda, but this machine has none", hint="device: cpu, or leave it at auto")
        device = ("cuda" if there else "cpu") if self.device == "auto" else self.device
        dtype = ("bfloat16" if device == "cuda" else "float32") if self.dtype == "auto" else self.dtype
        return self.model_copy(update={"device": device, "dtype": dtype})

    def anywhere(self) -> Self:
        """With a path that a worker finds whatever its folder."""
        if self.model is None or not Path(self.model).exists():
            return self
        return self.model_copy(update={"model": str(Path(self.model).absolute())})


def find_model(options: ModelOptions, default: str, *, needs: Iterable[str] = ()) -> Path:
    """Folder or file with a model's weights on this disk, downloaded if need be.

    Args:
        options: Of the part.
        default: Hub name where the options name nothing.
        needs: File names that a folder must hold, such as ``config.json``.

    Raises:
        InputMissingError: Neither on this disk nor to be had from the hub, or a folder without what it needs.
    """
    name = options.model or default
    path = Path(name)
    if not path.exists():
        path = _from_hub(name, options)
    if path.is_dir():
        missing = [file for file in needs if not (path / file).is_file()]
        if missing:
            raise InputMissingError(
                f"model {name}: its folder holds no {', '.join(missing)}",
                hint="give the folder that 'hf download NAME --local-dir FOLDER' fills",
            )
    return path


def _from_hub(name: str, options: ModelOptions) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    hint = f"on a machine with access: hf download {name} --local-dir FOLDER; then give FOLDER as the model"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputMissingError(f"model {name}: no such file or folder")
    try:
        return Path(
            snapshot_download(
                name, revision=options.revision, allow_patterns=list(_HUB_FILES), local_files_only=options.offline
            )
        )
    except HFValidationError:
        raise InputMissingError(f"model {name}: no such file or folder, and no name of the hub") from None
    except RepositoryNotFoundError:
        raise InputMissingError(f"model {name}: the hub has no such model, or it asks for a login", hint=hint) from None
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        asked = options.offline or os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0")
        why = "offline was asked" if asked else f"the hub cannot be reached ({type(error).__name__})"
        raise InputMissingError(f"model {name}: not on this disk, and {why}", hint=hint) from None


def weights_identity(tensors: Mapping[str, Any], files: Iterable[Path] = ()) -> dict[str, Any]:
    """What pins a loaded model: one digest of its tensors, one of each configuration or tokenizer file.

    Args:
        tensors: Name -> torch tensor, as `state_dict` gives them, before any cast to another dtype.
        files: Configuration, preprocessing and vocabulary files that decide results; absent ones are left out.

    Returns:
        ``tensors_sha256`` and ``files_sha256`` (name -> sha256): equal tensors in another file format are equal.
    """
    return {
        "tensors_sha256": tensors_sha256(tensors),
        "files_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()},
    }


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """sha256 (hex) of named torch tensors, whatever device they lie on."""
    import torch

    from shared.merkle import tensor_digest

    plain = {}
    for name, tensor in tensors.items():
        there = tensor.detach().cpu()
        if there.is_floating_point() and not bool(torch.isfinite(there).all()):
            raise CorruptError(f"weights: tensor {name} holds NaN or infinite values", hint="download them again")
        plain[name] = (there.view(torch.uint16) if there.dtype == torch.bfloat16 else there).numpy()
    return tensor_digest(plain)


def load_tensors(path: Path) -> dict[str, Any]:
    """Tensors of a ``.safetensors`` file or of a torch file, which is read as data and never run.

    A torch file may hold them under ``model`` or ``state_dict``, as many releases do.

    Raises:
        CorruptError: Neither, or damaged, or a torch file that would have to be run.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CorruptError(
            f"weights {path.name}: not a safetensors file, and no torch file of tensors alone ({type(error).__name__})",
            hint="download it again; a file that needs weights_only=False is never opened",
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CorruptError(f"weights {path.name}: holds no dictionary of tensors")
    return found
