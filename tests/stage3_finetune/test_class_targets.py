"""Labels of several classes an image: read, refused, spread over the parts, trained on."""

from pathlib import Path

import pytest
import torch

from shared.errors import ConfigError
from stage3_finetune.class_targets import ClassTargets
from stage3_finetune.contracts import WHOLE, Example
from stage3_finetune.predictions import ClassPredictions
from stage3_finetune.tasks.classify import ClassifyOptions
from stage3_finetune.train import finetune
from tests.stage3_finetune.conftest import rows

KNOWN: dict[str, str | None] = {f"{index}.png": None for index in range(9)}


def read(folder: Path, cells: list[str]) -> tuple[ClassTargets, list[Example]]:
    path = folder / "labels.csv"
    path.write_text("sample_id,labels\n" + "".join(f"{index}.png,{cell}\n" for index, cell in enumerate(cells)))
    targets = ClassTargets(path)
    return targets, targets.read(KNOWN)[0]


def test_names_are_separated_by_semicolons_and_a_cell_may_be_empty(tmp_path: Path) -> None:
    targets, examples = read(tmp_path, ["b; a", "", "a", "c"])
    assert targets.multi_label
    assert [example.label for example in examples] == ["a;b", "", "a", "c"]
    classes = targets.classes(examples, None)
    assert classes == ("a", "b", "c")
    truth = [targets.load(example, classes, (4, 4)) for example in examples]
    assert truth == [(True, True, False), (False, False, False), (True, False, False), (False, False, True)]
    batch = targets.collate([targets.place(one, WHOLE, 4) for one in truth])
    assert batch.dtype == torch.float32
    assert batch.sum(dim=0).tolist() == [2, 1, 1]
    assert [targets.strata(example) for example in examples] == ["b", "", "a", "c"]  # the rarest


@pytest.mark.parametrize(
    ("cells", "asked", "says"),
    [
        (["a;;b", "a"], None, "empty names, or one twice: row 1: 'a;;b'"),
        (["a;b", "b;b"], None, "row 2: 'b;b'"),
        (["a", "a", ""], None, "one class only, 'a'"),
        (["", ""], None, "no row has a class"),
        (["a;b"], ("a", "c"), "labels that 'classes' does not name: 'b'"),
        (["a;b"], ("a", "b", "c"), "no row has the classes 'c'"),
    ],
)
def test_what_cannot_be_learnt_is_refused(tmp_path: Path, cells: list[str], asked: object, says: str) -> None:
    def read_whole() -> None:
        targets, examples = read(tmp_path, cells)
        targets.classes(examples, asked)

    with pytest.raises(ConfigError, match=says):
        read_whole()


def test_a_class_that_all_or_none_of_train_have_is_refused(tmp_path: Path) -> None:
    targets, _ = read(tmp_path, ["a;b"])
    train = [Example("0.png", label, "g", "train") for label in ("a", "a;b")]
    with pytest.raises(ConfigError, match="every training sample has: 'a'"):
        targets.check(train, ("a", "b"))
    with pytest.raises(ConfigError, match="without a training sample: 'c'"):
        targets.check([*train, Example("1.png", "c", "h", "test")], ("b", "c"))


@pytest.mark.parametrize("head", ["linear", "knn"])
def test_several_classes_an_image_from_table_to_table(head, images, table, quick, encoder, tmp_path) -> None:
    shown = {"dark": "low", "grey": "low;middle", "light": ""}
    lines = [{**row, "labels": shown[row["label"]]} for row in rows()]
    path = table(lines, columns=("sample_id", "labels", "group", "split"))
    config = quick(backbone="auto", options={"head": head}, lr=0.01, epochs=12, freeze=head == "knn")
    made = finetune(config, images=images, labels=path, encoder=str(encoder), out=tmp_path / "out")
    table_ = ClassPredictions.load(made.path / "predictions.csv")
    assert (table_.classes, table_.multi_label) == (("low", "middle"), True)
    assert (
        (made.path / "predictions.csv").read_text().startswith("sample_id,group,split,labels,predicted,p low,p middle")
    )
    assert not torch.allclose(torch.from_numpy(table_.probability).sum(dim=1), torch.ones(18))
    scores = made.card.provenance.metrics["test"]
    assert scores["auroc"]["value"] > 0.8
    assert len(scores["per_class"]) == 2
    assert ClassifyOptions(**made.card.identity.spec["config"]["options"]).multi_label is True
    assert "Class by class" in (made.path / "report.html").read_text()
