"""A grounder and a segmenter, built from their names, checked against the prompts, and described for the card."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from shared.artifact import Input
from shared.config import digest
from shared.errors import ConfigError, IncompatibleError
from shared.heap import keep_freed_memory
from shared.registry import Registry
from stage1_localize.config import LocalizeConfig, PartConfig, describe_part, part_options
from stage1_localize.contracts import Grounder, Region, Segmenter
from stage1_localize.grounders import GROUNDERS
from stage1_localize.segmenters import SEGMENTERS


@dataclass(frozen=True)
class Parts:
    """What answers: the two parts, and their share of the specification."""

    grounder: Grounder
    segmenter: Segmenter
    described: dict[str, Any]

    @property
    def digest(self) -> str:
        """Equal digests answer equally."""
        return digest(self.described)

    @property
    def inputs(self) -> list[Input]:
        """Artifacts that answers come from, such as a grounder's head."""
        inputs = getattr(self.grounder, "inputs", None)  # optional: most parts bring their own weights
        return [] if inputs is None else list(inputs())


def build_parts(grounder: PartConfig, segmenter: PartConfig, regions: Sequence[Region]) -> Parts:
    """Build both parts and ask whether they can serve these prompts; nothing but weights is read.

    Raises:
        ConfigError: Unknown part or option, or boxes that no segmenter would turn into pixels.
        PromptError: A prompt that the grounder cannot serve.
    """
    grounder_class, segmenter_class = GROUNDERS.load(grounder.name), SEGMENTERS.load(segmenter.name)
    grounder_options = part_options("grounder", grounder, grounder_class)
    segmenter_options = part_options("segmenter", segmenter, segmenter_class)
    built: Grounder = grounder_class(grounder_options)
    built.check(regions)
    # Optional: a grounder that knows beforehand says whether it will leave boxes without pixels.
    needs_segmenter = getattr(built, "needs_segmenter", None)
    if segmenter.name == "none" and needs_segmenter is not None and needs_segmenter(regions):
        raise ConfigError(
            f"segmenter 'none': '{grounder.name}' finds some of these regions as boxes without pixels",
            hint="choose a segmenter, e.g. --set segmenter.name=lite_medsam",
        )
    pixels: Segmenter = segmenter_class(segmenter_options)
    described = {
        "grounder": dict(describe_part(grounder, grounder_options, built)),
        "segmenter": dict(describe_part(segmenter, segmenter_options, pixels)),
    }
    return Parts(built, pixels, described)


def resolve(config: LocalizeConfig) -> LocalizeConfig:
    """The configuration with every option of both parts spelled out and pinned, as ``resolved.yaml`` keeps it."""
    filled = {}
    for kind, part, table in (("grounder", config.grounder, GROUNDERS), ("segmenter", config.segmenter, SEGMENTERS)):
        options = part_options(kind, part, table.load(part.name))
        options = getattr(options, "pinned", lambda given=options: given)()
        filled[kind] = PartConfig(name=part.name, options=options.model_dump(mode="json"))
    return config.model_copy(update=filled)


def for_workers(part: PartConfig, table: Registry) -> PartConfig:
    """A part's configuration whose paths mean the same in every folder.

    Args:
        part: Resolved.
        table: `GROUNDERS` or `SEGMENTERS`.
    """
    options = part_options(table.what, part, table.load(part.name))
    anywhere = getattr(options, "anywhere", None)
    return part if anywhere is None else PartConfig(name=part.name, options=anywhere().model_dump(mode="json"))


def parts_of_this_process(
    grounder: PartConfig, segmenter: PartConfig, regions: Sequence[Region], expected: str
) -> Parts:
    """The parts of a worker: built at the first call, kept for the next, on one compute thread.

    Args:
        grounder: From the recipe.
        segmenter: From the recipe.
        regions: What is asked.
        expected: `Parts.digest` in the process that started the run.

    Raises:
        IncompatibleError: This machine has other weights or another version of a part.
    """
    parts = _kept(grounder.model_dump_json(), segmenter.model_dump_json(), tuple(regions))
    if parts.digest != expected:
        raise IncompatibleError(
            f"parts '{grounder.name}' and '{segmenter.name}' differ here from those of the run's start "
            f"({parts.digest[:12]}, expected {expected[:12]})",
            hint="install the same release and weights on every worker",
        )
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
        keep_freed_memory()
    return parts


@lru_cache(maxsize=1)
def _kept(grounder: str, segmenter: str, regions: tuple[Region, ...]) -> Parts:
    return build_parts(PartConfig.model_validate_json(grounder), PartConfig.model_validate_json(segmenter), regions)
