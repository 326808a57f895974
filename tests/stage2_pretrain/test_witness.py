"""Witnesses: recorded from what was shown, drawn again from card and store, and every lie noticed."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from shared.errors import CorruptError, IncompatibleError, MwmError, UsageError
from shared.order import schedule
from stage2_pretrain import witness
from stage2_pretrain.data import RegionDataset
from stage2_pretrain.masking import POLICIES
from stage2_pretrain.masking.plan import guide_of
from stage2_pretrain.masking.schedule import ScheduleOptions
from stage2_pretrain.masking.spec import MaskSpec, mask_section, mask_spec
from stage2_pretrain.redraw import redraw_one
from stage2_pretrain.window import WindowOptions
from stage2_pretrain.witness import FILE, NAMES, WitnessRecorder, choose_witnesses, read_witnesses, redraw
from tests.stage2_pretrain.fake_store import FakeStore, write_images

SAMPLES = 11


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, SAMPLES + 1)
    return folder


@pytest.fixture(scope="module")
def store(images: Path) -> FakeStore:
    return FakeStore(images, regions=("lung", "heart"), map_px=24, quarantined="005.png")


def describe(policy: str = "region", **changes: Any) -> MaskSpec:
    settings: dict[str, Any] = {
        "policy": policy,
        "options": {},
        "seed": 3,
        "grid": (7, 7),
        "samples": SAMPLES,
        "batch": 4,
        "steps": 8,
        "views": 2,
        "window": WindowOptions(turns=True),
        **changes,
    }
    return mask_spec(**settings)


def recorder_of(spec: MaskSpec, store: FakeStore) -> WitnessRecorder:
    names = [sample.sample_id for sample in store.samples if sample.status == "ok"]
    guided = guide_of(spec.policy_at(0)) is not None
    sizes = {"patches": spec.patches, "epochs": spec.epochs, "views": spec.views}
    return WitnessRecorder(names, **sizes, seed=spec.seed, guided=guided)


def train(
    spec: MaskSpec,
    store: FakeStore,
    images: Path,
    *,
    begun: int = 0,
    stop: int | None = None,
    recorder: WitnessRecorder | None = None,
) -> WitnessRecorder:
    """What a training run does, but for the training."""
    dataset = RegionDataset(
        store, images, size_px=28, channels=1, window=spec.window, seed=spec.seed, maps_of=lambda _: spec.maps_of()
    )
    names = dataset.sample_ids
    sampler = spec.sampler(store.regions)
    recorder = recorder or recorder_of(spec, store)
    scores = np.random.default_rng(begun)
    steps = range(begun, spec.steps if stop is None else stop)
    for _, (epoch, indices) in zip(steps, schedule(names, spec.batch, spec.seed, begun), strict=False):
        batch = dataset.batch(indices, epoch)
        for view in range(spec.views):
            coverage = sampler.cover(batch["maps"].numpy(), batch["window"].numpy())
            policy, levels = sampler.policy_at(epoch), None
            if guide_of(policy):  # what no card tells: a score by some network
                levels = policy.levels(scores.random(coverage.shape, np.float32), coverage)
            drawn = sampler.draw_covered(coverage, batch["sample_key"].numpy().view(np.uint64), epoch, view, levels)
            hidden = torch.from_numpy(drawn.hidden).view(-1, *spec.grid)
            recorder.record([names[index] for index in indices], epoch, view, hidden, levels)
    return recorder


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_run_draws_again_from_card_and_store(policy: str, store: FakeStore, images: Path, tmp_path: Path) -> None:
    spec = describe(policy)
    outputs = train(spec, store, images).write(tmp_path)
    found = redraw(store, {"mask": mask_section(spec), "lr": "0.1"}, tmp_path)
    assert found.mismatches == ()
    # Two whole epochs of 11, then two of three batches: 8 samples.
    assert found.checked == found.draws == outputs["draws"] == outputs["witness_draws"] == (11 + 11 + 8) * 2
    assert found.epochs == 3
    assert outputs["witness_samples"] == SAMPLES


@pytest.mark.parametrize("policy", ["hard", "region-hard"])
def test_of_draws_by_a_network_the_witnesses_draw_again_and_the_rest_is_counted(
    policy: str, store: FakeStore, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness, "WITNESSES_MAX", 4)
    spec = describe(policy)
    recorder = train(spec, store, images)
    recorder.write(tmp_path)
    card = {"mask": mask_section(spec)}
    found = redraw(store, card, tmp_path)
    assert found.mismatches == ()
    assert (found.draws, found.checked + found.unrecomputable) == (found.checked, 60)
    assert 0 < found.checked <= 4 * 2 * 3

    place = 0, 1, 2
    name = recorder.witnesses[2]
    one = redraw_one(store, card, tmp_path, name, epoch=0, view=1)
    assert (one.bits == one.recorded).all()
    other = next(sample.sample_id for sample in store.samples if sample.sample_id not in recorder.witnesses)
    with pytest.raises(UsageError, match=f"policy {policy} follows a network, whose scores were recorded for 4 wit"):
        redraw_one(store, card, tmp_path, other, epoch=0, view=0)

    def other_levels(levels: np.ndarray) -> None:
        levels[place] = levels[place][::-1].copy()

    edit(tmp_path, "levels", other_levels)
    assert redraw(store, card, tmp_path).mismatches[0].startswith(f"epoch 0 view 1 witness {name}: ")
    recorder.write(tmp_path)

    def one_score(levels: np.ndarray) -> None:
        levels[0, 1, 2, 0] = 1 - levels[0, 1, 2, 0] if policy == "hard" else 0

    edit(tmp_path, "levels", one_score)
    told = f"epoch 0 view 1 witness {name}: scores that policy {policy} does not give"
    assert told in redraw(store, card, tmp_path).mismatches
    recorder.tensors.pop("levels")
    recorder.write(tmp_path)
    with pytest.raises(CorruptError, match=f"no levels of a network, and the card's policy is {policy}"):
        redraw(store, card, tmp_path)


@pytest.mark.parametrize("policy", ["hard", "region-hard"])
def test_sums_of_draws_by_a_network_are_compared_where_all_are_witnesses(
    policy: str, store: FakeStore, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_sum(sums: np.ndarray) -> None:
        sums[1] += 1

    spec = describe(policy)
    train(spec, store, images).write(tmp_path)
    edit(tmp_path, "sums", another_sum)
    assert redraw(store, {"mask": mask_section(spec)}, tmp_path).mismatches == (
        "epoch 1: the sum of its 22 draws differs",
    )
    monkeypatch.setattr(witness, "WITNESSES_MAX", 4)
    train(spec, store, images).write(tmp_path)
    edit(tmp_path, "sums", another_sum)
    assert redraw(store, {"mask": mask_section(spec)}, tmp_path).mismatches == ()  # what no audit can know


def test_a_schedule_draws_again_and_hides_as_many_as_its_epoch_says(
    store: FakeStore, images: Path, tmp_path: Path
) -> None:
    spec = describe(
        "region", options={"overall": 700}, schedule=ScheduleOptions(first={"overall": 300}, shape="linear")
    )
    recorder = train(spec, store, images)
    recorder.write(tmp_path)
    section = mask_section(spec)
    assert section["schedule"] == {"first": {"overall": 300}, "shape": "linear"}
    assert redraw(store, {"mask": section}, tmp_path).mismatches == ()
    bits = np.unpackbits(recorder.tensors["bits"], axis=-1, bitorder="little").sum(-1)
    drawn = recorder.tensors["drawn"].astype(bool)
    assert [set(bits[epoch][drawn[epoch]].tolist()) for epoch in range(3)] == [{15}, {25}, {34}]  # of 49
    del section["schedule"]  # as on a card from before there were schedules
    assert redraw(store, {"mask": section}, tmp_path).mismatches


def test_no_image_is_opened_to_draw_again(
    store: FakeStore, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = describe()
    train(spec, store, images).write(tmp_path)
    for name in ("shared.images.read_image", "stage2_pretrain.data.read_image"):
        monkeypatch.setattr(name, lambda source: pytest.fail("opened an image"))
    assert not redraw(store, {"mask": mask_section(spec)}, tmp_path).mismatches


def edit(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / FILE)
    change(tensors[name])
    save_file(tensors, folder / FILE)


def flip_bit(bits: np.ndarray) -> None:
    bits[1, 0, 4, 2] ^= 8


def test_a_flipped_witness_bit_is_found(store: FakeStore, images: Path, tmp_path: Path) -> None:
    spec = describe()
    recorder = train(spec, store, images)
    recorder.write(tmp_path)
    edit(tmp_path, "bits", flip_bit)
    found = redraw(store, {"mask": mask_section(spec)}, tmp_path)
    assert found.mismatches == (f"epoch 1 view 0 witness {recorder.witnesses[4]}: 1 of 49 patches differ",)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sums", "epoch 2: the sum of its 16 draws differs"),
        ("draws", "epoch 2: 17 draws recorded, the card's schedule has 16"),
    ],
)
def test_an_altered_sum_or_count_is_found(name: str, line: str, store: FakeStore, images: Path, tmp_path: Path) -> None:
    spec = describe()
    train(spec, store, images).write(tmp_path)

    def add_one(values: np.ndarray) -> None:
        values[2] += 1

    edit(tmp_path, name, add_one)
    assert redraw(store, {"mask": mask_section(spec)}, tmp_path).mismatches == (line,)


def test_another_mask_than_the_card_says_is_found(store: FakeStore, images: Path, tmp_path: Path) -> None:
    train(describe(options={"overall": 500}), store, images).write(tmp_path)
    found = redraw(store, {"mask": mask_section(describe())}, tmp_path)
    assert len(found.mismatches) == (11 + 11 + 8) * 2 + 3


def test_masks_beyond_the_witnesses_are_held_by_the_sums(
    store: FakeStore, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage2_pretrain.witness.WITNESSES_MAX", 3)
    spec = describe()
    recorder = train(spec, store, images)
    recorder.write(tmp_path)
    found = redraw(store, {"mask": mask_section(spec)}, tmp_path)
    assert not found.mismatches
    assert found.checked < found.draws
    outsider = next(sample.row for sample in store.samples if sample.sample_id not in (*recorder.witnesses, "005.png"))
    altered = FakeStore(images, regions=store.regions, map_px=24, quarantined="005.png")
    altered.all_maps[outsider] = 254 - altered.all_maps[outsider]
    lines = redraw(altered, {"mask": mask_section(spec)}, tmp_path).mismatches
    assert lines
    assert all("sum of its" in line for line in lines)


def test_a_run_that_skipped_draws_is_found(store: FakeStore, images: Path, tmp_path: Path) -> None:
    spec = describe()
    train(spec, store, images, stop=7).write(tmp_path)
    lines = redraw(store, {"mask": mask_section(spec)}, tmp_path).mismatches
    assert "epoch 2: 8 draws recorded, the card's schedule has 16" in lines
    assert sum("not recorded" in line for line in lines) == 8


def test_an_interrupted_run_records_the_same(store: FakeStore, images: Path, tmp_path: Path) -> None:
    spec = describe()
    whole = train(spec, store, images)
    tensors, meta = train(spec, store, images, stop=4).state()
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    resumed = recorder_of(spec, store)
    resumed.load({name: value.clone() for name, value in tensors.items()}, dict(meta))
    train(spec, store, images, begun=4, recorder=resumed)
    assert all(np.array_equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert whole.write(tmp_path / "a") == resumed.write(tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_a_state_of_another_run_is_refused() -> None:
    tensors, meta = WitnessRecorder(["a", "b"], patches=9, epochs=2, seed=0).state()
    for names, patches, epochs in ((["a", "c"], 9, 2), (["a", "b"], 10, 2), (["a", "b"], 9, 3)):
        with pytest.raises(CorruptError, match="saved state"):
            WitnessRecorder(names, patches=patches, epochs=epochs, seed=0).load(tensors, meta)


def test_bits_and_sums_are_encoded_as_documented() -> None:
    hidden = np.zeros((2, 3, 3), np.bool_)
    hidden[0, 0, 0] = hidden[0, 2, 2] = hidden[1, 0, 1] = True
    recorder = WitnessRecorder(["ä", "b"], patches=9, epochs=1, seed=0, views=3)
    recorder.record(["b", "ä"], 0, 2, hidden)
    place = recorder.witnesses.index("b")
    assert recorder.tensors["bits"][0, 2, place].tolist() == [1, 1]
    first = hashlib.sha256(b"b\x00\x02\x01\x01").digest()[:8]
    other = hashlib.sha256("ä".encode() + b"\x00\x02\x02\x00").digest()[:8]
    total = sum(int.from_bytes(part, "little") for part in (first, other)) % 2**64
    assert int(recorder.tensors["sums"][0]) == total


def test_witnesses_are_chosen_by_name() -> None:
    names = [f"{number}.png" for number in range(1000)]
    chosen = choose_witnesses(names, 5)
    assert len(chosen) == 256
    assert list(chosen) == sorted(chosen)
    assert choose_witnesses(names[::-1], 5) == chosen
    assert choose_witnesses(names, 6) != chosen
    # Removing samples never brings in one that was better than a kept one.
    assert set(chosen) & set(names[:900]) <= set(choose_witnesses(names[:900], 5))


@pytest.mark.parametrize("hidden", [np.zeros((1, 8), np.bool_), np.zeros((2, 9), np.bool_), np.zeros((1, 9), np.uint8)])
def test_what_is_no_mask_is_refused(hidden: np.ndarray) -> None:
    with pytest.raises(MwmError, match="expected bool"):
        WitnessRecorder(["a"], patches=9, epochs=1, seed=0).record(["a"], 0, 0, hidden)


def test_a_witness_is_drawn_once() -> None:
    recorder = WitnessRecorder(["a"], patches=9, epochs=1, seed=0)
    recorder.record(["a"], 0, 0, np.zeros((1, 9), np.bool_))
    with pytest.raises(MwmError, match="drawn twice"):
        recorder.record(["a"], 0, 0, np.zeros((1, 9), np.bool_))


@pytest.mark.parametrize("damage", ["truncated", "gone", "names", "tensor", "shape"])
def test_broken_witness_files_are_corrupt(damage: str, tmp_path: Path) -> None:
    WitnessRecorder(["a", "b"], patches=9, epochs=2, seed=0).write(tmp_path)
    read_witnesses(tmp_path)
    if damage == "truncated":
        (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-3])
    elif damage == "gone":
        (tmp_path / FILE).unlink()
    elif damage == "names":
        (tmp_path / NAMES).write_text("[]")
    else:
        tensors = load_file(tmp_path / FILE)
        if damage == "tensor":
            del tensors["sums"]
        else:
            tensors["bits"] = tensors["bits"][:, :, :1].copy()
        save_file(tensors, tmp_path / FILE)
    with pytest.raises(CorruptError, match=FILE):
        read_witnesses(tmp_path)


def test_witnesses_of_another_run_are_corrupt(store: FakeStore, images: Path, tmp_path: Path) -> None:
    spec = describe()
    train(spec, store, images).write(tmp_path)
    with pytest.raises(CorruptError, match="epochs"):
        redraw(store, {"mask": mask_section(describe(steps=9))}, _moved(describe(steps=20), store, images, tmp_path))
    with pytest.raises(IncompatibleError, match="11 samples with maps, the card has 12"):
        redraw(store, {"mask": mask_section(describe(samples=12))}, tmp_path)


def _moved(spec: MaskSpec, store: FakeStore, images: Path, folder: Path) -> Path:
    other = folder / "other"
    other.mkdir()
    train(spec, store, images).write(other)
    return other


def test_other_witnesses_than_the_seed_gives_are_corrupt(
    store: FakeStore, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage2_pretrain.witness.WITNESSES_MAX", 3)
    train(describe(), store, images).write(tmp_path)
    with pytest.raises(CorruptError, match="other witnesses"):
        redraw(store, {"mask": mask_section(describe(seed=4))}, tmp_path)
