"""What methods that draw pixels have in common once they can predict those of every patch."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from stage2_pretrain.methods.pixels import fill_hidden, normalise, patches


class PixelMethod(nn.Module):
    """A method that predicts pixels of patches.

    Attributes:
        patch_px: Side of a patch.
        norm_target: Predictions are in units of the patch's own mean and deviation.
        measure: Error of a pixel.
    """

    patch_px: int
    norm_target: bool = True
    measure: Literal["squared", "absolute"] = "squared"

    def predict(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L P"]:
        """Pixels of every patch, those of visible ones too."""
        raise NotImplementedError

    def errors(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L"]:
        """What the loss is the mean of over hidden patches, for every patch; of a visible one it is no measure."""
        cut = patches(image, self.patch_px)
        true = normalise(cut)[0] if self.norm_target else cut
        measure = F.mse_loss if self.measure == "squared" else F.l1_loss
        return measure(self.predict(image, visible).to(true.dtype), true, reduction="none").mean(-1)

    @torch.no_grad()
    def reconstruct(
        self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]
    ) -> Float[Tensor, "B C S S"]:
        """The image with its hidden patches drawn, at each patch's true mean and variance if those are its units."""
        training = self.training
        self.eval()
        try:
            predicted = self.predict(image, visible)
        finally:
            self.train(training)
        return fill_hidden(image, visible, predicted, normalised=self.norm_target)
