"""transformers models from a folder that is read as data: the right family, every tensor in its place.

A folder holds ``config.json`` and its weights, whole or in shards. Only classes of transformers itself are built;
code that a folder may bring is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CorruptError, IncompatibleError, InputMissingError
from stage1_localize.models import ModelOptions, find_model, load_tensors, weights_identity

CONFIG = "config.json"
WHOLE = ("model.safetensors", "pytorch_model.bin")
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Pretrained:
    """A model as its folder describes it.

    Attributes:
        model: Of transformers; float32, on the CPU, in evaluation mode, frozen.
        folder: Where it came from.
        kind: ``model_type`` of its configuration.
        identity: Digests of tensors and files, and the count of tensors that the class has no place for.
    """

    model: Any
    folder: Path
    kind: str
    identity: dict[str, Any]


def load_pretrained(
    options: ModelOptions, default: str, classes: Mapping[str, str], *, files: Iterable[str] = ()
) -> Pretrained:
    """Build a model of transformers and fill it.

    Args:
        options: Where from.
        default: Hub name where the options name nothing.
        classes: ``model_type`` -> name of the class in transformers, for each family that will do.
        files: Further files of the folder that decide results.

    Raises:
        InputMissingError: No such model, or a folder without configuration or weights.
        IncompatibleError: A model of another family.
        CorruptError: Files that cannot be read, or tensors that do not fill the model.
    """
    import torch
    import transformers

    name = options.model or default
    folder = find_model(options, default, needs=(CONFIG,))
    if not folder.is_dir():
        raise InputMissingError(
            f"model {name}: a file; expected a folder with {CONFIG} and {WHOLE[0]}",
            hint="the single file of an original SAM release is read by segmenter 'segment_anything'",
        )
    said = read_json(folder / CONFIG, name)
    kind = str(said.get("model_type"))
    if kind not in classes:
        raise IncompatibleError(
            f"model {name}: its model_type is '{kind}', expected {' or '.join(repr(known) for known in classes)}",
            hint="a part of the same name may exist, see 'mwm list'; else give another folder",
        )
    tensors, _ = read_tensors(folder, name)
    model_class = getattr(transformers, classes[kind])
    try:
        config = model_class.config_class.from_dict(said)
        with without_progress_bar():
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # configurations and tensors of strangers: whatever transformers makes of them
        raise CorruptError(
            f"model {name}: its weights do not fit {CONFIG} ({type(error).__name__})", hint="download it again"
        ) from None
    absent = sorted([*map(str, info["missing_keys"]), *(str(key) for key in info["mismatched_keys"])])
    if absent:
        raise CorruptError(
            f"model {name}: its weights lack {len(absent)} tensors that {CONFIG} asks for, such as {absent[0]}",
            hint="download it again",
        )
    digests = weights_identity(model.state_dict(), [folder / file for file in (CONFIG, *PREPROCESSORS, *files)])
    digests["unused_tensors"] = len(info["unexpected_keys"])
    return Pretrained(model.eval().requires_grad_(False), folder, kind, digests)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptError: Anything else.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        said = None
    if not isinstance(said, dict):
        raise CorruptError(f"model {name}: {path.name} is no JSON object", hint="download it again")
    return said


def read_normalisation(
    folder: Path, name: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels, for values in [0, 1], as a folder's processor has them.

    Args:
        folder: Of the model.
        name: For messages.
        mean: Where the folder says nothing.
        std: Likewise.

    Raises:
        CorruptError: A file that cannot be read, or values that are not three positive numbers.
    """
    for file in PREPROCESSORS:
        if not (folder / file).is_file():
            continue
        said = read_json(folder / file, name)
        said = said.get("image_processor", said)
        if not isinstance(said, dict) or not ({"image_mean", "image_std", "do_normalize"} & set(said)):
            continue
        if said.get("do_normalize") is False:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        try:
            found = [
                tuple(map(float, said.get(key) or usual)) for key, usual in (("image_mean", mean), ("image_std", std))
            ]
        except (TypeError, ValueError):
            found = [(), ()]
        if len(found[0]) != 3 or len(found[1]) != 3 or min(found[1]) <= 0:
            raise CorruptError(
                f"model {name}: {file} has image_mean {said.get('image_mean')} and image_std {said.get('image_std')}, "
                "expected three numbers each, image_std above 0",
                hint="download it again",
            )
        return found[0], found[1]
    return mean, std


def read_tensors(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """All tensors of a folder, from one file or from the shards that an index lists, and that file's name.

    Args:
        folder: Of the model.
        name: For messages.

    Raises:
        InputMissingError: No weights, or shards that are not there.
        CorruptError: Weights that cannot be read.
    """
    for file in WHOLE:
        if (folder / file).is_file():
            return load_tensors(folder / file), file
        index = folder / f"{file}.index.json"
        if index.is_file():
            placed = read_json(index, name).get("weight_map")
            shards = sorted({Path(str(shard)).name for shard in placed.values()}) if isinstance(placed, dict) else []
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                raise InputMissingError(
                    f"model {name}: {index.name} lists {len(shards)} files, {len(missing)} of them absent",
                    hint="finish the download: hf download NAME --local-dir FOLDER",
                )
            tensors = {key: tensor for shard in shards for key, tensor in load_tensors(folder / shard).items()}
            return tensors, index.name
    raise InputMissingError(
        f"model {name}: its folder holds no {' and no '.join(WHOLE)}",
        hint="give the folder that 'hf download NAME --local-dir FOLDER' fills",
    )


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """transformers draws one for every model that it fills; a run has a progress line of its own."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it says of missing tensors becomes one error
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
