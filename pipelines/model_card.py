"""The model card of an export: how to load it, what it was trained on, its limits, licences and sources.

It names regions, prompts, counts and digests; never a sample, a group or a path.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.exportable import Difference, Exportable
from pipelines.lineage import Lineage
from pipelines.markdown import as_text
from shared.artifact import NOT_FOR_DIAGNOSIS, Card

FILE = "README.md"
LITE_TERMS = "LICENSE.weights"
_PAPER = "Mask What Matters (arXiv 2509.23054)"
_ARCHITECTURES = "PyTorch Image Models (timm), Ross Wightman, doi 10.5281/zenodo.4414861"
_TAGS = ("timm", "medical-imaging", "self-supervised-learning", "masked-image-modeling", "mask-what-matters")
_BY = {
    "timm": "timm {timm}, from the folder",
    "huggingface": "transformers {transformers}, from the folder",
    "onnx": "onnxruntime {onnxruntime} on a CPU",
}


def model_card(source: Exportable, lineage: Lineage, to: str, name: str, differences: Sequence[Difference]) -> str:
    """Write the card as Markdown, its head as a model hub reads it.

    Args:
        source: What is exported.
        lineage: What it was made from.
        to: Name of the exporter.
        name: Of the folder, for the lines that load it.
        differences: What loading back has shown.
    """
    sections = {
        "Load it": _loading(source, to, name),
        "What it is": _facts(source),
        "What it was trained on": _training(source, lineage),
        "What the masks were drawn from": _regions(lineage),
        "Scores": _scores(source),
        "Use and limits": _limits(source),
        "Licences": _licences(lineage),
        "Sources": "\n".join(f"- {item}" for item in _sources(lineage)),
        "How this export was checked": _checked(to, differences),
    }
    title = f"{source.config['architecture']}, {'finetuned' if source.classes else 'pretrained'} by Mask What Matters"
    body = "\n\n".join(f"## {head}\n\n{text}" for head, text in sections.items() if text)
    return f"---\n{_head(source, lineage)}---\n\n# {title}\n\n**{NOT_FOR_DIAGNOSIS}**\n\n{body}\n"


def uses_lite(lineage: Lineage) -> bool:
    """Whether the masks came from the packaged weights of `lite`, so that their terms go with the export."""
    store = lineage.store
    return (
        store is not None
        and store.identity.spec["grounder"]["name"] == "lite"
        and not any(item.kind == "head" for item in store.identity.inputs)
    )


def _head(source: Exportable, lineage: Lineage) -> str:
    terms = {"license": "unknown"}
    if uses_lite(lineage):
        terms = {"license": "other", "license_name": "research-use-weights", "license_link": LITE_TERMS}
    told: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification" if source.classes else "image-feature-extraction",
        "tags": [*_TAGS, "not-for-diagnosis"],
        **terms,
    }
    return yaml.safe_dump(told, sort_keys=False)


def _loading(source: Exportable, to: str, name: str) -> str:
    channels, rows, columns = source.input_size
    mode = "L" if channels == 1 else "RGB"
    given = ", ".join(map(str, (channels, rows, columns)))
    if to == "onnx":
        outputs = "probabilities, logits, embedding" if source.classes else "features, embedding"
        python = (
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({_quoted(f'{name}/model.onnx')})\n"
            f'{outputs} = session.run(None, {{"pixels": pixels}})  # float32 [B, {given}], in [0, 1]'
        )
        return (
            f"{_python(python)}\n\nPixels are {'grey levels' if channels == 1 else 'RGB'} in [0, 1]: mean and "
            f"deviation are part of the graph. Squash images of other shapes to {rows} x {columns}."
        )
    timm = (
        "import timm\n"
        f"model = timm.create_model({_quoted(f'local-dir:{name}')}, pretrained=True).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  "
        f'# of Image.open(...).convert("{mode}")'
    )
    kind = "AutoModelForImageClassification" if source.classes else "AutoModel"
    auto = (
        f"from transformers import AutoImageProcessor, {kind}\n"
        f"model = {kind}.from_pretrained({_quoted(name)}).eval()\n"
        f'processor = AutoImageProcessor.from_pretrained({_quoted(name)})  # of Image.open(...).convert("{mode}")'
    )
    return (
        f"{_python(timm)}\n\n{_python(auto)}\n\nFrom a hub: `hf-hub:OWNER/NAME` for timm, `OWNER/NAME` for "
        "transformers. Without `pretrained=True` timm gives random weights, and says nothing."
    )


def _facts(source: Exportable) -> str:
    pretrained = source.config["pretrained_cfg"]
    count = sum(value.numel() for value in source.model.state_dict().values())
    told: dict[str, object] = {
        "artifact": f"{source.card.identity.kind} `sha256:{source.card.artifact_id}`",
        "made by": f"{source.card.provenance.tool}, {source.card.provenance.created[:10]}",
        "architecture": source.config["architecture"],
        "its arguments": _listed(source.config["model_args"]),
        "values": f"{count:,} in {len(source.model.state_dict())} tensors",
        "input": f"{' x '.join(map(str, source.input_size))} (channels, rows, columns), squashed to that size",
        "mean, deviation": f"{pretrained['mean']}, {pretrained['std']} of pixels in [0, 1]",
    }
    if source.classes:
        told["classes"] = ", ".join(map(as_text, source.classes))
    return _table(told)


def _training(source: Exportable, lineage: Lineage) -> str:
    told: dict[str, object] = {}
    if source.classes:
        spec, outputs = source.card.identity.spec["config"], source.card.identity.outputs
        parts = ", ".join(f"{outputs[name]} {name}" for name in ("train", "val", "test") if name in outputs)
        told |= {"labelled images": parts, "finetuned for": f"{spec['epochs']} epochs"}
        told["started from"] = (
            f"encoder `sha256:{lineage.encoder_id}`" if lineage.encoder_id else "random weights, no encoder"
        )
    if lineage.encoder is not None:
        told |= _pretraining(lineage.encoder, lineage.store)
    elif lineage.encoder_id is not None:
        told["pretraining"] = "its card was not at hand when this was exported"
    return _table(told)


def _pretraining(card: Card, store: Card | None) -> dict[str, object]:
    spec, outputs = card.identity.spec, card.identity.outputs
    mask, method = spec["mask"], spec["method"]
    settings = {key: value for key, value in method.items() if key not in ("name", "version")}
    corpus = next((item for item in store.identity.inputs if item.kind == "corpus"), None) if store else None
    told: dict[str, object] = {
        "images": f"{outputs['samples']}, without labels",
        "corpus": f"`sha256:{corpus.artifact_id}`" if corpus else "not at hand when this was exported",
        "method": f"{method['name']}, version {method['version']}: {_listed(settings)}",
        "epochs": f"{outputs['epochs']}, {outputs['steps']} steps of {spec['batch_size']} images",
        "image side": f"{spec['size_px']} px",
        "patches": " x ".join(map(str, mask["grid"])),
        "mask policy": f"{mask['policy']['name']}, version {mask['policy']['version']}, shares in thousandths: "
        f"{_listed(mask['policy']['options'])}",
    }
    if first := mask.get("schedule", {}).get("first"):
        told["schedule"] = f"{mask['schedule']['shape']} from {_listed(first)}"
    metrics = card.provenance.metrics
    shares = {"inside regions": "hidden_inside_share", "outside": "hidden_outside_share", "of all": "hidden_share"}
    hidden = [f"{label} {metrics[name]:.1%}" for label, name in shares.items() if metrics.get(name) is not None]
    if hidden:
        told["hidden in the last epoch"] = ", ".join(hidden)
    return told


def _regions(lineage: Lineage) -> str:
    if lineage.store_id is None:
        return ""
    if lineage.store is None:
        return (
            f"Region store `sha256:{lineage.store_id}`. It was not at hand when this was exported; it has the prompts."
        )
    spec = lineage.store.identity.spec
    found = (
        f"Region store `sha256:{lineage.store_id}`, made by grounder `{spec['grounder']['name']}` and segmenter "
        f"`{spec['segmenter']['name']}` from these prompts:"
    )
    prompts = "\n".join(
        f"- **{as_text(item['name'])}**: {', '.join(map(as_text, item['texts']))}" for item in spec["regions"]
    )
    return f"{found}\n\n{prompts}"


def _scores(source: Exportable) -> str:
    test = source.card.provenance.metrics.get("test", {}) if source.classes else {}
    told = {
        name.replace("_", " "): f"{test[name]['value']:.3f} ({test[name]['low']:.3f} to {test[name]['high']:.3f})"
        for name in ("accuracy", "balanced_accuracy", "auroc")
        if None not in (test.get(name) or {"value": None}).values()
    }
    if not told:
        return ""
    return (
        f"{_table(told)}\n\nOn {test['samples']} test images in {test['groups']} groups, with 95 % intervals over "
        "groups. Few groups make rough intervals."
    )


def _limits(source: Exportable) -> str:
    for_what = (
        "It names one of its classes for every image, also for one that shows none of them."
        if source.classes
        else "Features of images like those it was trained on: a start for finetuning, or for a probe."
    )
    return "\n".join(
        f"- {line}"
        for line in (
            f"For research. {for_what}",
            "Not for diagnosis, nor for any decision about a patient. No medical device; nobody has tested it as one.",
            "Not tested on other scanners, other bodies or other groups of people than its images came from.",
            "This folder holds weights and this text: no image, no name, no sample's id. Weights can keep traces of "
            "what they were trained on; whoever publishes them weighs that.",
        )
    )


def _licences(lineage: Lineage) -> str:
    lines = [
        "Weights: the terms of the images (and labels) they were trained on decide. mwm does not know these; whoever "
        "publishes this states them, and sets `license` above.",
        "Code of the architecture: timm, Apache-2.0. Code that trained it: mask-what-matters, Apache-2.0.",
    ]
    if uses_lite(lineage):
        lines.append(
            f"The masks came from mwm's packaged weights `lite`, which are for research use only: `{LITE_TERMS}` says "
            "what they were fitted on."
        )
    elif lineage.store is not None:
        named = lineage.store.identity.spec["grounder"]["name"], lineage.store.identity.spec["segmenter"]["name"]
        lines.append(
            f"The masks came from `{named[0]}` and `{named[1]}`: the terms of their weights, if they have any."
        )
    return "\n".join(f"- {line}" for line in lines)


def _sources(lineage: Lineage) -> Iterator[str]:
    if lineage.encoder is not None:
        yield _PAPER
        yield from _method_source(lineage.encoder.identity.spec["method"]["name"])
    yield _ARCHITECTURES


def _method_source(name: str) -> list[str]:
    """The papers that a method's module names as its source; read, not imported."""
    from pipelines.listing import source_file
    from stage2_pretrain.methods import METHODS

    path = source_file(METHODS[name].partition(":")[0]) if name in METHODS else None
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path is not None else None
    flat = " ".join((told or "").partition("Source: ")[2].split())
    return re.findall(r"[A-Z][^()]*\(arXiv \d{4}\.\d{4,5}\)", flat)


def _checked(to: str, differences: Sequence[Difference]) -> str:
    by = _BY[to].format(**_versions("timm", "transformers", "onnxruntime")) if to in _BY else to
    return f"Loaded back by {by}, and compared with the artifact on a seeded batch: {'; '.join(map(str, differences))}."


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _table(rows: Mapping[str, object]) -> str:
    body = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{body}" if rows else ""


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items() if value is not None) or "none"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def packaged_terms() -> Path:
    """The terms of the packaged weights of `lite`."""
    import stage1_localize

    return Path(stage1_localize.__file__).parent / "weights" / LITE_TERMS
