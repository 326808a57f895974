"""What methods that draw pixels have in common once they have features of every patch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stage2_pretrain.methods.pixels import MEASURES, Measure, count_hidden, error, fill_hidden, target


class PixelMethod(nn.Module, ABC):
    """A method that predicts pixels of patches: `features`, then `pixels`.

    Attributes:
        patch_px: Side of a patch.
        norm_target: Predictions are in units of the patch's own mean and deviation.
        measure: Error of a pixel.
    """

    patch_px: int
    norm_target: bool = True
    measure: Measure = "squared"

    @abstractmethod
    def features(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L D"]:
        """What `pixels` draws every patch from; pixels of hidden patches are not read.

        Raises:
            UsageError: A batch without a visible patch, for an encoder that sees nothing else.
        """

    @abstractmethod
    def pixels(self, features: Float[Tensor, "*n D"]) -> Float[Tensor, "*n P"]:
        """Pixels of patches, ordered as those of `stage2_pretrain.methods.pixels.patches`."""

    def loss(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> dict[str, Tensor]:
        """Mean error of the pixels of hidden patches.

        Of several processes, each gives its part: their sum is the mean over the hidden patches of all.

        Args:
            image: Pixels; those of hidden patches reach the target only.
            visible: True where the encoder sees the patch.

        Raises:
            UsageError: A batch without a hidden patch, or as `features`.
        """
        count = count_hidden(visible)
        predicted = self.pixels(self.features(image, visible)[~visible.flatten(1)])
        return {"loss": error(predicted, target(image, visible, normalised=self.norm_target), count, self.measure)}

    def errors(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L"]:
        """What the loss is the mean of over hidden patches, for every patch; of a visible one it is no measure."""
        predicted = self.pixels(self.features(image, visible))
        true = target(image, torch.zeros_like(visible), normalised=self.norm_target).view(predicted.shape)
        return MEASURES[self.measure](predicted.to(true.dtype), true, reduction="none").mean(-1)

    @torch.no_grad()
    def reconstruct(
        self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]
    ) -> Float[Tensor, "B C S S"]:
        """The image with its hidden patches drawn, at each patch's true mean and variance if those are its units."""
        training = self.training
        self.eval()
        try:
            predicted = self.pixels(self.features(image, visible))
        finally:
            self.train(training)
        return fill_hidden(image, visible, predicted, normalised=self.norm_target)
