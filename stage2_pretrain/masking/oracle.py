"""The control with perfect regions: `region` over a store whose maps are labels."""

from __future__ import annotations

from shared.errors import ConfigError
from stage2_pretrain.masking.region import Region


class Oracle(Region):
    """What a localiser could gain at most. The plans are `region`'s; the store must be one of labels.

    Source: ours, a control for Mask What Matters (arXiv 2509.23054).
    """

    def check_grounder(self, name: str | None) -> None:
        """Refuse a store whose maps are a model's, by the name of its grounder.

        Raises:
            ConfigError: Names it.
        """
        if name != "oracle":
            raise ConfigError(
                f"policy oracle: regions of grounder '{name}', expected those of grounder 'oracle': labels",
                hint="mwm localize with --set grounder.name=oracle --set grounder.options.labels=LABELS.json",
            )
