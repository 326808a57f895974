"""What each of two processes does in `test_ranks`: its share of a batch, and the sums kept by the first."""

import sys
from pathlib import Path

import torch

from shared import ranks
from shared.backbones import build
from stage2_pretrain.methods.norm import normalise_rows
from stage2_pretrain.methods.spark import SparK, SparKOptions
from tests.stage2_pretrain.methods.test_spark import randomise

NETS = {
    "resnet": ("resnet10t", {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 12], "stem_width": 8}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12], "ls_init_value": 0.5}),
}
CASES = ("uneven", "nothing hidden here", "nothing visible here")


def step(net: str, case: str) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers of one float64 step over a batch of five, summed over the processes."""
    name, args = NETS[net]
    backbone = build(name, in_chans=1, model_args=args, seed=2)
    made = SparK(SparKOptions(decoder_width=32), backbone, size_px=64, seed=2).double().train()
    randomise(made)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(5, 1, 64, 64, generator=generator, dtype=torch.float64)
    visible = torch.rand(5, *made.grid, generator=generator) < 0.5
    visible[:, 0, 0], visible[:, 1, 1] = True, False
    if case != "uneven":  # the first of two processes has the first two images
        visible[:2] = case == "nothing hidden here"
    rows = list(ranks.share(range(5)))
    loss = made.loss(image[rows], visible[rows])["loss"]
    loss.backward()
    ranks.add_gradients(made.parameters())
    found = {"loss": torch.tensor(ranks.totals({"loss": float(loss.detach())})["loss"], dtype=torch.float64)}
    found |= {f"gradient {key}": value.grad for key, value in made.named_parameters() if value.grad is not None}
    return found | {f"buffer {key}": value.clone() for key, value in made.named_buffers()}


def norm(split: int) -> dict[str, torch.Tensor]:
    """BatchNorm over 9 rows, the first ``split`` of them in the first process, far from zero, in float64."""
    generator = torch.Generator().manual_seed(4)
    rows = (torch.randn(9, 3, generator=generator, dtype=torch.float64) * 0.1 + 100).requires_grad_()
    weights = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    made = torch.nn.BatchNorm2d(3).double().train()
    randomise(made)
    if ranks.size() == 1:
        output = made(rows.T[None, :, :, None])[0, :, :, 0].T
        own = slice(0, 9)
    else:
        own = slice(0, split) if ranks.rank() == 0 else slice(split, 9)
        output = normalise_rows(made, rows[own])
    (output * weights[own]).sin().sum().backward()
    ranks.add_gradients([rows, *made.parameters()])
    whole = torch.cat(ranks.gather(output.detach()))
    found = {"output": whole, "rows": rows.grad} | {key: value.grad for key, value in made.named_parameters()}
    return found | {f"buffer {key}": value.clone() for key, value in made.named_buffers()}


def everything() -> dict[str, torch.Tensor]:
    """All of it, by name."""
    found = {f"{net}, {case}: {key}": value for net in NETS for case in CASES for key, value in step(net, case).items()}
    return found | {f"norm {split}: {key}": value for split in (4, 0, 8) for key, value in norm(split).items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ranks.joined("cpu"):
        seen = everything()
        if ranks.rank() == 0:
            torch.save(seen, Path(sys.argv[1]))
