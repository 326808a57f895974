"""The loop: schedule, decay, EMA, errors, and resuming to the bit after any interruption."""

import copy
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from shared import loop
from shared.checkpoint import latest_state
from shared.errors import CorruptError, InterruptedRun, UsageError
from shared.guards import ExplodedError, MemoryFullError, NonFiniteError
from shared.loop import fit
from shared.optimizer import Plan, build_optimizer, learning_rate
from shared.order import schedule
from shared.rng import seed_key
from shared.runlog import RunLog, read_metrics

NAMES = [f"s{i}" for i in range(11)]
PLAN = Plan(steps=9, lr=0.01, warmup_steps=2, ema=0.9, seed=3, checkpoint_steps=2, checkpoint_s=1e9)


class Tally:
    """A Stateful that depends on every step so far."""

    def __init__(self):
        self.total = torch.zeros(())
        self.steps: list[int] = []

    def state(self):
        return {"total": self.total}, {"steps": self.steps}

    def load(self, tensors, meta):
        self.total, self.steps = tensors["total"], list(meta["steps"])


def module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(96, 2)
        )
    return net.to(memory_format=torch.channels_last)


def data(begun: int):
    images = torch.randn(len(NAMES), 1, 6, 6, generator=torch.Generator().manual_seed(1))
    for _, rows in schedule(NAMES, 4, 0, begun):
        yield images[rows], [NAMES[row] for row in rows]


def run(folder: Path, plan: Plan = PLAN, on_step=None, extra=None, net=None, batches=data, on_batch=None, **options):
    torch.set_num_threads(1)  # bits depend on it, and other tests of this process set it
    net = net or module()
    extra = extra or Tally()

    def step(batch, index):
        return {"loss": net(batch).square().mean()}

    def after(done, scalars):
        extra.total = extra.total + scalars["loss"]
        extra.steps.append(done)
        if on_step:
            on_step(done)

    extra.ema = copy.deepcopy(net).state_dict()
    with RunLog(folder, stream=io.StringIO()) as log:
        fitted = fit(
            net,
            batches,
            on_batch or step,
            plan,
            state=folder / "run/state",
            log=log,
            ema=extra.ema,
            extra=extra,
            after_step=after,
            **options,
        )
    return net, fitted, extra


def bits(net, fitted, extra):
    tensors = {**net.state_dict(), **{f"ema/{k}": v for k, v in extra.ema.items()}, "total": extra.total}
    return {name: value.numpy().tobytes() for name, value in tensors.items()}, extra.steps


def send(number: int, at: int):
    return lambda done: os.kill(os.getpid(), number) if done == at else None


@pytest.mark.parametrize("at", [1, 5])
def test_lamb_and_a_decay_that_changes_continue_to_the_same_bits(tmp_path, at):
    plan = Plan(**{**PLAN.__dict__, "optimizer": "lamb", "weight_decay": 0.04, "weight_decay_end": 0.2})
    whole = bits(*run(tmp_path / "whole", plan))
    with pytest.raises(InterruptedRun):
        run(tmp_path / "cut", plan, on_step=send(signal.SIGTERM, at))
    assert bits(*run(tmp_path / "cut", plan)) == whole
    for field in ("optimizer", "weight_decay_end"):
        other = Plan(**{**plan.__dict__, field: getattr(PLAN, field)})
        assert bits(*run(tmp_path / field, other)) != whole


def test_lamb_is_the_paper_s_first_step(tmp_path):
    # Equation 6 of arXiv 1904.00962 from zero moments: m and v corrected are g and g^2, so r is the sign of g.
    net = nn.Linear(2, 2, bias=False)
    nn.init.constant_(net.weight, 2.0)

    def step(batch, index):
        return {"loss": (net.weight * torch.tensor([[1.0, -1.0], [3.0, 0.5]])).sum()}

    plan = Plan(steps=1, lr=0.1, weight_decay=0.25, clip_norm=None, optimizer="lamb")
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        fit(net, data, step, plan, state=tmp_path / "s", log=log)
    update = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) + 0.25 * 2.0
    expected = 2.0 - 0.1 * (4.0 / update.norm()) * update
    torch.testing.assert_close(net.weight.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("at", "number"), [*((at, signal.SIGTERM) for at in range(1, 10)), (1, signal.SIGINT), (6, signal.SIGINT)]
)
def test_a_signal_at_any_step_then_the_same_bits(tmp_path, at, number):
    whole = bits(*run(tmp_path / "whole"))
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRun, match=f"after step {at} of 9") as caught:
        run(tmp_path / "cut", on_step=send(number, at))
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is before
    net, fitted, extra = run(tmp_path / "cut")
    assert fitted.resumed_from == at
    assert bits(net, fitted, extra) == whole
    steps = [row["step"] for row in read_metrics(tmp_path / "cut")]
    assert steps == list(range(1, 10))
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from tests.shared.test_loop import run, send
run(Path(sys.argv[1]), on_step=send(signal.SIGKILL, 5))
"""


def test_kill_9_loses_the_steps_since_the_last_state_only(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "cut"), str(root)], check=False, cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    net, fitted, extra = run(tmp_path / "cut")
    assert fitted.resumed_from == 4
    assert bits(net, fitted, extra) == bits(*run(tmp_path / "whole"))
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


def test_the_metrics_are_durable_before_a_state_is(tmp_path, monkeypatch):
    done = []
    for where, name in ((RunLog, "sync"), (loop, "save_state")):
        plain = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, n=name, f=plain, **named: (done.append(n), f(*args, **named)))
    run(tmp_path)
    assert done
    assert done == ["sync", "save_state"] * (len(done) // 2)


def test_the_global_generator_neither_matters_nor_moves(tmp_path):
    torch.manual_seed(1)
    first = bits(*run(tmp_path / "a"))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = bits(*run(tmp_path / "b"))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert bits(*run(tmp_path / "c", Plan(**{**PLAN.__dict__, "seed": 4}))) != first  # dropout follows the seed


def test_a_finished_fit_is_not_repeated(tmp_path):
    whole = bits(*run(tmp_path))
    net, fitted, extra = run(tmp_path)
    assert (fitted.resumed_from, fitted.samples) == (9, 0)
    assert bits(net, fitted, extra) == whole


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_step_names_its_samples_and_keeps_the_state(tmp_path, poison):
    net = module()

    def batches(begun):
        for index, (images, ids) in enumerate(data(begun)):
            yield (images * (1 if index < 4 else 1e30), ids)

    def step(batch, index):
        output = net(batch).sum()
        if poison == "gradient":  # a finite loss whose gradient is 0/0
            output = output + (net[0].weight.sum() * 0).sqrt() if index == 4 else output
        elif index == 4:
            output = output * float("inf")
        return {"loss": output}

    message = "at step 5, expected a finite number; samples: s"
    with RunLog(tmp_path, stream=io.StringIO()) as log, pytest.raises(NonFiniteError, match=message) as caught:
        fit(net, batches, step, PLAN, state=tmp_path / "run/state", log=log)
    assert ("loss" if poison == "loss" else "gradient norm") in str(caught.value)
    assert caught.value.exit_code == 2
    assert latest_state(tmp_path / "run/state")[0] == 4


def test_a_step_in_parts_is_the_step(tmp_path):
    def net():
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2))

    whole, parted = net(), net()
    parted.load_state_dict(whole.state_dict())
    plan = Plan(steps=6, lr=0.01, clip_norm=0.1)
    held = []

    def parts(batch, index):
        for part in batch.split(1):
            assert parted[1].weight.grad is None or not held  # the part before has been differentiated
            output = parted(part).square().sum() / batch.numel()
            held.append(output)
            yield {"loss": output, "count": torch.tensor(float(len(part)))}
            held.clear()

    run(
        tmp_path / "a", plan, net=whole, on_batch=lambda batch, _: {"loss": whole(batch).square().sum() / batch.numel()}
    )
    run(tmp_path / "b", plan, net=parted, on_batch=parts)
    torch.testing.assert_close(parted.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-6)
    for one, other in zip(read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b"), strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-5)
        assert other["count"] in (3, 4)


@pytest.mark.parametrize("at", [None, 18])
def test_a_loss_that_jumps_ends_the_fit_also_after_a_pause(tmp_path, at):
    plan = Plan(steps=40, lr=1e-4, max_jump=5, checkpoint_steps=4, checkpoint_s=1e9)
    net = module()

    def step(batch, index):
        return {"loss": net(batch).square().mean() * 0 + (1.0 if index != 20 else 5.5)}

    if at is not None:
        with pytest.raises(InterruptedRun):
            run(tmp_path, plan, net=net, on_batch=step, on_step=send(signal.SIGTERM, at))
    message = "loss is 5.5 at step 21, 6 times the median of the 20 before .1., expected at most 5 times; samples: s"
    with pytest.raises(ExplodedError, match=message) as caught:
        run(tmp_path, plan, net=net, on_batch=step)
    assert caught.value.exit_code == 2
    assert latest_state(tmp_path / "run/state")[0] == 20
    quiet = Plan(steps=40, lr=1e-4, max_jump=None)
    assert run(tmp_path / "quiet", quiet, net=net, on_batch=step)[1].samples > 0


@pytest.mark.parametrize("size", [1 << 50, None])
def test_a_step_that_does_not_fit_into_memory_says_what_to_lower(tmp_path, size, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def step(batch, index):
        if index == 2 and size:
            torch.empty(size, dtype=torch.uint8)  # what the CPU allocator says, for real
        elif index == 2:  # as in the optimiser's first step, which makes the moments
            monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory)
        return {"loss": net(batch).square().mean()}

    net = module()
    with pytest.raises(MemoryFullError, match=r"out of memory in step 3 of 3 images: .*allocate") as caught:
        run(tmp_path, net=net, on_batch=step)
    assert (caught.value.kind, caught.value.exit_code) == ("out-of-memory", 2)
    assert "batch_size" in caught.value.hint
    assert latest_state(tmp_path / "run/state")[0] == 2


def test_a_trial_of_slow_steps_has_few_images_and_says_so(monkeypatch):
    sizes: list[int] = []

    def batches(size):
        for row in data(0):
            sizes.append(size)
            yield row

    def step(batch, index):
        time.sleep(0.002)
        return {"loss": net(batch).square().mean()}

    net = module()
    whole, tried = loop.rehearse_briefly(net, batches, step, PLAN, 3, 64)
    assert (sizes, tried, len(whole)) == ([4, 4, 64, 64, 64], 64, 3)
    monkeypatch.setattr(loop, "_PATIENCE_S", 0.01)
    sizes.clear()
    multiplied, tried = loop.rehearse_briefly(net, batches, step, PLAN, 3, 64)
    assert (sizes, tried) == ([4, 4], 4)
    assert multiplied[1] == multiplied[2] >= 0.002 * 64 / 4
    sizes.clear()
    assert loop.rehearse_briefly(net, batches, step, PLAN, 3, 4)[1] == 4
    assert sizes == [4, 4, 4]  # there is nothing smaller to try


def test_states_of_another_module_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(CorruptError, match="another module"):
        run(tmp_path, net=nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))


def test_decay_spares_biases_norms_and_tokens(tmp_path):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))
            self.bias = nn.Parameter(torch.ones(3))
            self.token = nn.Parameter(torch.ones(1, 3, 1, 1))

    net = Parts()
    plan = Plan(steps=1, lr=0.5, weight_decay=0.5)

    def step(batch, index):
        return {"loss": sum(value.sum() * 0 for value in net.parameters())}

    with RunLog(tmp_path, stream=io.StringIO()) as log:
        fit(net, lambda begun: data(begun), step, plan, state=tmp_path / "s", log=log)
    assert torch.equal(net.weight, torch.full((3, 2), 0.75))
    assert torch.equal(net.bias, torch.ones(3))
    assert torch.equal(net.token, torch.ones(1, 3, 1, 1))


def test_decay_spares_what_a_model_asks_to_spare():
    net = nn.Sequential(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, reg_tokens=2))
    groups = build_optimizer(net, Plan(steps=1, lr=1.0), None).param_groups
    decays = {id(parameter): group["decays"] for group in groups for parameter in group["params"]}
    found = {name: decays[id(parameter)] for name, parameter in net.named_parameters()}
    assert not found["0.pos_embed"]
    assert not found["0.reg_token"]
    assert found["0.blocks.0.attn.qkv.weight"]


def test_lr_scale_freezes_and_slows(tmp_path):
    start = {name: value.clone() for name, value in module().state_dict().items()}
    scales = {"0": 0.0, "1": 1.0, "5": 0.001}
    net, _, _ = run(tmp_path / "a", lr_scale=lambda name: scales[name.split(".")[0]])
    assert torch.equal(net[0].weight, start["0.weight"])
    assert not torch.equal(net[1].weight, start["1.weight"])
    assert 0 < (net[5].weight - start["5.weight"]).abs().max() < 0.001
    with pytest.raises(UsageError, match="nothing to train"):
        run(tmp_path / "b", lr_scale=lambda name: 0.0)


def test_ema_follows_its_definition(tmp_path):
    seen = [module().state_dict()["5.weight"].clone()]
    net = module()
    _, _, extra = run(tmp_path, net=net, on_step=lambda done: seen.append(net.state_dict()["5.weight"].clone()))
    average = seen[0]
    for index, value in enumerate(seen[1:]):
        decay = min(0.9, (1 + index) / (10 + index))
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(extra.ema["5.weight"], average)
    assert torch.equal(extra.ema["1.running_var"], net.state_dict()["1.running_var"])  # an average already


def test_clipping_limits_the_step_and_records_the_norm_before(tmp_path):
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    seen = []

    def step(batch, index):
        return {"loss": 100 * net.weight.sum()}

    def after(done, scalars):
        seen.append((scalars["grad_norm"], float(net.weight.grad)))

    with RunLog(tmp_path, stream=io.StringIO()) as log:
        fit(net, data, step, Plan(steps=1, lr=1e-3, clip_norm=2.0), state=tmp_path / "s", log=log, after_step=after)
    assert seen == [(pytest.approx(100), pytest.approx(2, rel=1e-4))]


def test_learning_rate_ends_at_its_end():
    plan = Plan(steps=1000, lr=1.0, warmup_steps=100, lr_end=0.1)
    rates = [learning_rate(plan, index) for index in range(1000)]
    assert max(rates) == 1.0
    assert rates[99] == rates[100] == 1.0
    assert rates[549] == pytest.approx(0.55, abs=1e-2)
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert seed_key("torch", 0) != seed_key("order", 0)
