"""What each of two processes does in `test_ranks`: its share of a batch, and the sums kept by the first."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from shared import ranks
from shared.backbones import build
from shared.loop import fit
from shared.optimizer import Plan
from stage2_pretrain.methods.norm import normalise_rows
from stage2_pretrain.methods.spark import SparK, SparKOptions
from tests.stage2_pretrain.methods.test_spark import randomise

NETS = {
    "resnet": ("resnet10t", {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 12], "stem_width": 8}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12], "ls_init_value": 0.5}),
}
CASES = ("uneven", "nothing hidden here", "nothing visible here")


def method(net: str) -> SparK:
    """In float64 and in training."""
    name, args = NETS[net]
    backbone = build(name, in_chans=1, model_args=args, seed=2)
    made = SparK(SparKOptions(decoder_width=32), backbone, size_px=64, seed=2).double().train()
    randomise(made)
    return made


def losses(state: Path) -> torch.Tensor:
    """Loss of each of 50 steps of `fit`, batches of five; the norms make it chaotic, so in float64."""
    made, seen = method("resnet"), []
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(10, 1, 64, 64, generator=generator, dtype=torch.float64)
    shown = torch.rand(50, 10, *made.grid, generator=generator) < 0.5
    shown[:, :, 0, 0], shown[:, :, 1, 1] = True, False

    def batches(begun: int) -> Iterator[tuple[list[int], list[str]]]:
        for index in range(begun, 50):
            whole = list(range(5)) if index % 2 else list(range(5, 10))
            yield list(ranks.share(whole)), [str(row) for row in whole]

    fit(
        made,
        batches,
        lambda rows, index: made.loss(images[rows], shown[index, rows]),
        Plan(steps=50, lr=1e-3, warmup_steps=5),
        state=state,
        log=ranks.Unheard(state),
        after_step=lambda done, scalars: seen.append(scalars["loss"]),
    )
    return torch.tensor(seen, dtype=torch.float64)


def step(net: str, case: str) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers of one float64 step over a batch of five, summed over the processes."""
    made = method(net)
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
        # Contiguous: of a transposed view torch's own BatchNorm (2.15, CPU) gives a wrong gradient.
        output = made(rows.T.contiguous()[None, :, :, None])[0, :, :, 0].T
        own = slice(0, 9)
    else:
        own = slice(0, split) if ranks.rank() == 0 else slice(split, 9)
        output = normalise_rows(made, rows[own])
    (output * weights[own]).sin().sum().backward()
    ranks.add_gradients([rows, *made.parameters()])
    whole = torch.cat(ranks.gather(output.detach()))
    found = {"output": whole, "rows": rows.grad} | {key: value.grad for key, value in made.named_parameters()}
    return found | {f"buffer {key}": value.clone() for key, value in made.named_buffers()}


def everything(state: Path) -> dict[str, torch.Tensor]:
    """All of it, by name; a folder that does not exist is used."""
    found = {"losses": losses(state)}
    found |= {
        f"{net}, {case}: {key}": value for net in NETS for case in CASES for key, value in step(net, case).items()
    }
    return found | {f"norm {split}: {key}": value for split in (4, 0, 8) for key, value in norm(split).items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ranks.joined("cpu"):
        seen = everything(Path(sys.argv[2]))
        if ranks.rank() == 0:
            torch.save(seen, Path(sys.argv[1]))
