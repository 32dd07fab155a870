"""Cityscapes against cityscapesScripts, on a miniature that its own tools draw from polygons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from sam_gym.data import make_dataset
from sam_gym.data.base import MissingSplit
from sam_gym.data.cityscapes import FIVE, LABELS, Cityscapes
from sam_gym.metrics.semantic import SemanticMetric

WIDTH, HEIGHT = 96, 48


def box(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


#: From back to front.
OBJECTS: list[tuple[str, list[list[int]]]] = [
    ("sky", box(0, 0, 95, 20)),
    ("road", box(0, 20, 95, 47)),
    ("building", box(0, 4, 30, 22)),
    ("vegetation", [[60, 2], [90, 4], [80, 22]]),
    ("polegroup", box(56, 5, 58, 22)),
    ("pole", box(40, 0, 42, 24)),  # splits the sky
    ("cargroup", box(70, 22, 92, 30)),
    ("car", box(4, 24, 20, 34)),
    ("license plate", box(10, 30, 14, 32)),  # of id -1: not drawn
    ("car", [[18, 26], [34, 26], [38, 36], [18, 36]]),
    ("caravan", box(74, 31, 90, 38)),
    ("persongroup", box(46, 24, 52, 32)),
    ("rider", box(60, 26, 63, 34)),
    ("bicycle", box(58, 32, 66, 38)),
    ("ego vehicle", box(0, 42, 95, 47)),
]


def write(root: Path) -> None:
    """Write a miniature with the tools of cityscapesScripts."""
    pytest.importorskip("cityscapesscripts.helpers.annotation")
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    rng = np.random.default_rng(0)
    for split, cities in {"train": ["ulm", "bonn"], "val": ["ulm"]}.items():
        for number, city in enumerate(cities):
            photos, labels = root / f"leftImg8bit/{split}/{city}", root / f"gtFine/{split}/{city}"
            stem = f"{city}_00000{number}_000019"
            for folder in (photos, labels):
                folder.mkdir(parents=True)
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / f"{stem}_leftImg8bit.png")
            objects = [
                {"label": label, "polygon": [[x + 2 * number, y] for x, y in polygon]}
                for label, polygon in OBJECTS
            ]
            objects.insert(5, {"label": "car", "polygon": box(0, 0, 90, 40), "deleted": 1})
            content = {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}
            polygons = labels / f"{stem}_gtFine_polygons.json"
            polygons.write_text(json.dumps(content))
            base = str(labels / f"{stem}_gtFine")
            json2labelImg(str(polygons), f"{base}_labelIds.png")
            json2labelImg(str(polygons), f"{base}_labelTrainIds.png", "trainIds")
            annotation = Annotation()
            annotation.fromJsonFile(str(polygons))
            # As json2instanceImg, which Pillow 13 lets no longer save images of mode I.
            ids = np.array(createInstanceImage(annotation, "ids")).astype(np.uint16)
            Image.fromarray(ids).save(f"{base}_instanceIds.png")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cityscapes")
    write(root)
    return root


def label_files(root: Path, split: str, kind: str) -> list[Path]:
    return sorted((root / "gtFine" / split).glob(f"*/*_{kind}.png"))


def test_the_classes_are_the_official_ones() -> None:
    helpers = pytest.importorskip("cityscapesscripts.helpers.labels")
    official = [label for label in helpers.labels if label.id >= 0]
    assert [own[:4] for own in LABELS] == [
        (label.name, label.id, label.category, label.hasInstances) for label in official
    ]
    assert [own.evaluated for own in LABELS] == [not label.ignoreInEval for label in official]
    order = sorted((x for x in official if x.trainId not in (-1, 255)), key=lambda x: x.trainId)
    assert [own.name for own in LABELS if own.evaluated] == [label.name for label in order]


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_are_the_train_ids(official: Path, split: str) -> None:
    dataset = Cityscapes(split, root=str(official))
    files = label_files(official, split, "labelTrainIds")
    assert len(dataset) == len(files)
    for number, path in enumerate(files):
        np.testing.assert_array_equal(dataset[number].semantic, np.array(Image.open(path)))
        assert dataset[number].source.startswith(f"cityscapes/{path.name[:4]}")
    assert dataset.category_groups is not None
    groups = dict(zip(dataset.categories, dataset.category_groups, strict=True))
    assert (groups["car"], groups["sidewalk"], len(groups)) == ("vehicle", "flat", 19)


def test_instances_are_the_official_ones(official: Path) -> None:
    dataset = Cityscapes("train", root=str(official))
    instances = pytest.importorskip("cityscapesscripts.evaluation.instances2dict")
    for number, path in enumerate(label_files(official, "train", "instanceIds")):
        sample, ids = dataset[number], np.array(Image.open(path))
        (found,) = instances.instances2dict([str(path)]).values()
        for name in ("person", "rider", "car", "bicycle"):
            own = sample.masks[sample.categories == dataset.categories.index(name)]
            single = [one["instID"] for one in found[name] if one["instID"] >= 1000]
            assert len(own) == len(single)
            for mask, instance in zip(own, single, strict=True):
                np.testing.assert_array_equal(mask, ids == instance)
        assert len(found["car"]) == 3  # two, and a group
        groups = np.isin(ids, [24, 26])
        assert groups.any() and not sample.masks[:, groups].any()
        assert sample.ignore is not None
        assert sample.ignore[groups].all()  # type: ignore[index]
        assert (np.isin(sample.semantic[groups], (11, 13))).all()  # type: ignore[index]
        # The sky lies on both sides of the pole.
        sky = (sample.categories == dataset.categories.index("sky")).sum()
        count = cv2.connectedComponents((ids == 23).astype(np.uint8), connectivity=8)[0] - 1
        assert sky == count > 1


def test_five_classes(official: Path) -> None:
    dataset = make_dataset("cityscapes", "val", root=str(official), classes="five")
    sample, ids = dataset[0], np.array(Image.open(label_files(official, "val", "labelIds")[0]))
    assert dataset.categories == FIVE
    expected = np.full(ids.shape, 255, np.uint8)
    for number, value in enumerate((7, 8, 11, 24, 26)):
        expected[ids == value] = number
    np.testing.assert_array_equal(sample.semantic, expected)
    # Other classes are known, so they are background to objects; what is void stays ignored.
    assert sample.ignore is not None
    assert not sample.ignore[ids == 23].any() and sample.ignore[ids == 1].all()
    assert sample.ignore[ids == 29].all()


def test_saved_predictions_score_the_same(official: Path, tmp_path: Path) -> None:
    name = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
    evaluation = pytest.importorskip(name)
    dataset = Cityscapes("train", root=str(official), target="class")
    metric = SemanticMetric(dataset.classes, dataset.category_groups)
    rng = np.random.default_rng(1)
    for index in range(len(dataset)):
        truth = dataset[index].semantic
        assert truth is not None
        noise = rng.integers(0, 21, truth.shape).astype(np.uint8)
        noise[noise >= 19] = 255
        prediction = np.where(rng.random(truth.shape) < 0.4, noise, truth).astype(np.uint8)
        metric.update(prediction, truth)
        dataset.save_prediction(tmp_path, index, prediction)
    args = evaluation.args
    args.quiet, args.JSONOutput, args.evalInstLevelScore = True, False, False
    args.predictionPath, args.predictionWalk = str(tmp_path), None
    truths = [str(path) for path in label_files(official, "train", "labelIds")]
    predictions = [evaluation.getPrediction(args, truth) for truth in truths]
    scores = evaluation.evaluateImgLists(predictions, truths, args)
    for number, label in enumerate(dataset.classes):
        np.testing.assert_allclose(
            metric.class_iou[number], scores["classScores"][label], rtol=0, atol=1e-12
        )
    for group, value in metric.category_iou.items():
        np.testing.assert_allclose(value, scores["categoryScores"][group], rtol=0, atol=1e-12)
    numbers = metric.summary()
    assert numbers["mean_iou"] == pytest.approx(scores["averageScoreClasses"], abs=1e-12)
    assert numbers["mean_category_iou"] == pytest.approx(
        scores["averageScoreCategories"], abs=1e-12
    )


def test_wrong_folders_are_refused(write_labels: Callable[[str], Path]) -> None:
    root = write_labels("cityscapes")

    def refusal(error: type[Exception], path: Path = root, **options: Any) -> str:
        with pytest.raises(error) as caught:
            make_dataset("cityscapes", **{"split": "val", "root": str(path)} | options)
        return str(caught.value)

    assert "labels of Cityscapes' test split are not public" in refusal(MissingSplit, split="test")
    assert "pass the folder that holds both" in refusal(FileNotFoundError, root / "gtFine")
    assert "Did you mean 'five'" in refusal(ValueError, classes="fiv")
    instances = label_files(root, "val", "instanceIds")[0]
    instances.rename(instances.with_suffix(".txt"))
    assert "json2instanceImg" in refusal(FileNotFoundError)
    assert len(Cityscapes("val", root=str(root), target="components")) == 1  # reads none
    label_files(root, "val", "labelIds")[0].unlink()
    assert "Fetch gtFine_trainvaltest.zip again" in refusal(FileNotFoundError)
