"""What all datasets with label maps have in common, on the same scene in each layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

import sam_gym  # noqa: F401 (registers the environments)
from adaptation.features import FeatureBank
from adaptation.options import StreamOptions
from sam_gym.backbones import Backbone
from sam_gym.data import Dataset, make_dataset
from sam_gym.data.base import class_names
from sam_gym.data.semantic import SemanticDataset

VOID, SKY, ROAD, LEFT, RIGHT, GROUP = range(6)
CARS = (LEFT, RIGHT, GROUP)
Write = Callable[[str], Path]
Scene = Callable[[int], np.ndarray]
NAMES = ["ade20k", "ade20k-full", "camvid", "cityscapes", "coco-panoptic", "labelmaps", "voc"]
#: Name of the class of cars; datasets that tell cars apart; those that know a group of cars.
CAR = {"camvid": "Vehicle", "ade20k-full": "car, auto"}
WITH_OBJECTS = {"ade20k-full", "cityscapes", "coco-panoptic", "voc"}
WITH_GROUPS = {"cityscapes", "coco-panoptic"}


def car_of(dataset: Dataset) -> int:
    names = [name.lower() for name in dataset.categories]
    return names.index(CAR.get(dataset.name, "car").lower())


def masks_of(sample: Any, category: int) -> list[bytes]:
    """The masks of a category, in an order of their own."""
    return sorted(mask.tobytes() for mask in sample.masks[sample.categories == category])


@pytest.mark.parametrize("name", NAMES)
def test_label_maps_and_objects(name: str, write_labels: Write, label_scene: Scene) -> None:
    dataset = make_dataset(name, "val", root=str(write_labels(name)))
    scene, sample, car = label_scene(1), dataset[0], car_of(dataset)
    assert isinstance(dataset, SemanticDataset) and len(dataset) == len(dataset.files) == 1
    assert dataset.classes == class_names(dataset)
    assert sample.semantic is not None and sample.semantic.dtype == np.uint8
    np.testing.assert_array_equal(sample.semantic == car, np.isin(scene, CARS))
    np.testing.assert_array_equal(sample.semantic == 255, scene == VOID)
    others = [np.unique(sample.semantic[scene == own]) for own in (SKY, ROAD)]
    if name == "voc":
        assert [own.tolist() for own in others] == [[20], [20]] and dataset.classes[
            20
        ] == "background"
        assert (sample.categories == car).all()
    else:
        sky, road = (int(own.item()) for own in others)
        assert dataset.categories[sky].lower() == "sky"
        assert dataset.categories[road].lower().startswith("road")
        # Of the sky, which cars do not split, there is one object.
        assert masks_of(sample, sky) == [(scene == SKY).tobytes()]

    if name in WITH_GROUPS:
        expected = [scene == LEFT, scene == RIGHT]
    elif name in WITH_OBJECTS:
        expected = [scene == own for own in CARS]
    else:  # connected regions: the two cars that touch are one
        expected = [np.isin(scene, (LEFT, RIGHT)), scene == GROUP]
    assert masks_of(sample, car) == sorted(mask.tobytes() for mask in expected)
    assert sample.ignore is not None
    ignored = (VOID, GROUP) if name in WITH_GROUPS else (VOID,)
    np.testing.assert_array_equal(sample.ignore, np.isin(scene, ignored))


@pytest.mark.parametrize("name", NAMES)
def test_targets(name: str, write_labels: Write, label_scene: Scene) -> None:
    root, scene = str(write_labels(name)), label_scene(1)
    regions = [np.isin(scene, (LEFT, RIGHT)), scene == GROUP]
    for target, expected in (("components", regions), ("class", [np.isin(scene, CARS)])):
        dataset = make_dataset(name, "val", root=root, target=target)
        sample = dataset[0]
        assert masks_of(sample, car_of(dataset)) == sorted(mask.tobytes() for mask in expected)
        np.testing.assert_array_equal(sample.ignore, scene == VOID)
    with pytest.raises(ValueError, match="Unknown target 'instance'"):
        make_dataset(name, "val", root=root, target="instance")
    dataset = make_dataset(name, "val", root=root, min_area=int((scene == GROUP).sum()) + 1)
    sample = dataset[0]
    small = ~sample.masks.any(axis=0) & (scene == GROUP)
    np.testing.assert_array_equal(small, scene == GROUP)
    assert sample.ignore is not None and sample.ignore[scene == GROUP].all()


@pytest.mark.parametrize("name", NAMES)
def test_plays_and_trains(
    name: str, write_labels: Write, tiny_env: dict[str, Any], tiny: Backbone
) -> None:
    root = str(write_labels(name))
    del tiny_env["dataset_kwargs"]
    options = tiny_env | {"dataset": name, "data": root}
    category = CAR.get(name, "car")
    env = gym.make("SamSeg-v0", **options, target_categories=category)
    for seed in range(2):
        _, info = env.reset(seed=seed)
        assert info["target_name"] == category
        assert info["source"].startswith(f"{name}/")
        env.step(env.action_space.sample())
    env.close()
    everything = gym.make("SamEverything-v0", **options)
    everything.reset(seed=0)
    everything.step(everything.action_space.sample())
    everything.close()

    stream = StreamOptions(stream=name, data=(root,)).open()
    bank = FeatureBank(tiny, stream, augmentations=2)
    assert len(bank.pool(0).images.objects) == 2
    assert len(bank.held_out(stream[0], "val").masks) >= 2


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ade20k-full", "coco-panoptic"}))
def test_predictions_have_the_values_of_the_files(
    name: str, write_labels: Write, tmp_path: Path
) -> None:
    root = write_labels(name)
    dataset = make_dataset(name, "val", root=str(root))
    assert isinstance(dataset, SemanticDataset)
    labels = dataset[0].semantic
    assert labels is not None
    saved = np.array(Image.open(dataset.save_prediction(tmp_path, 0, labels)))
    file = dataset._images[0][2][0]
    np.testing.assert_array_equal(saved, np.array(Image.open(file)))
    with pytest.raises(ValueError, match="A label is 200"):
        dataset.save_prediction(tmp_path, 0, np.full_like(labels, 200))


def test_colour_codes_are_not_written(write_labels: Write, tmp_path: Path) -> None:
    dataset = make_dataset("coco-panoptic", "val", root=str(write_labels("coco-panoptic")))
    assert isinstance(dataset, SemanticDataset)
    with pytest.raises(ValueError, match="colour codes are not written"):
        dataset.save_prediction(tmp_path, 0, np.zeros((48, 64), np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_broken_files_are_named_or_skipped(name: str, write_labels: Write) -> None:
    root = write_labels(name)
    dataset = make_dataset(name, "val", root=str(root))
    assert isinstance(dataset, SemanticDataset)
    label = Path(dataset._images[0][2][0])
    content = label.read_bytes()
    label.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"truncated or not an image|TRUNCATED|Truncated|OpenCV"):
        make_dataset(name, "val", root=str(root))
    label.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        make_dataset(name, "val", root=str(root))
    assert label.name in str(caught.value) or "labelIds" in str(caught.value)
    if name != "cityscapes":  # without any labelIds, the folder is refused
        with pytest.raises(ValueError, match="skipped 1 records: 1 x mask file is missing"):
            make_dataset(name, "val", root=str(root), on_error="skip")
    label.write_bytes(content)
    image = cv2.imread(dataset.files[0])
    cv2.imwrite(dataset.files[0], image[:40])
    with pytest.raises(ValueError, match="image and annotation differ in size"):
        make_dataset(name, "val", root=str(root))


def test_a_label_without_a_class_is_named(write_labels: Write) -> None:
    root = write_labels("camvid")
    path = root / "valannot/1.png"
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    labels[0, :3] = 12, 40, 255
    cv2.imwrite(str(path), labels)
    with pytest.raises(ValueError, match=r"a label has no class .*found 12, 40, 255; .*0 to 11"):
        make_dataset("camvid", "val", root=str(root))
    assert len(make_dataset("camvid", "train", root=str(root))) == 1


def test_links_do_not_leave_the_root(write_labels: Write, tmp_path: Path) -> None:
    root = write_labels("camvid")
    outside = tmp_path / "outside.png"
    (root / "valannot/1.png").rename(outside)
    (root / "valannot/1.png").symlink_to(outside)
    with pytest.raises(ValueError, match="file name leaves its folder"):
        make_dataset("camvid", "val", root=str(root))


def test_images_without_an_object_are_left_out(write_labels: Write) -> None:
    root = write_labels("camvid")
    for name in ("val/2.png", "valannot/2.png"):
        source = Image.open(root / name.replace("2", "1"))
        source.save(root / name)
    Image.fromarray(np.full((48, 64), 11, np.uint8)).save(root / "valannot/2.png")
    assert len(make_dataset("camvid", "val", root=str(root))) == 1
    Image.fromarray(np.full((48, 64), 11, np.uint8)).save(root / "valannot/1.png")
    with pytest.raises(ValueError, match=r"no image has an object of the classes Sky.*2 images"):
        make_dataset("camvid", "val", root=str(root))


def test_splits_that_are_not_there(write_labels: Write) -> None:
    for name in ("cityscapes", "ade20k", "ade20k-full", "voc", "coco-panoptic"):
        with pytest.raises(FileNotFoundError, match="[Cc]hoose (val|another split)"):
            make_dataset(name, "test", root=str(write_labels(name)))


def test_label_maps_of_instances() -> None:
    sample = make_dataset("rooms", "val", length=1)[0]
    labels = sample.label_map(12)
    assert sample.semantic is None and labels.dtype == np.uint8
    for mask, category in zip(sample.masks, sample.categories, strict=True):
        assert (labels[mask] == category).all()
    assert (labels[~sample.masks.any(axis=0)] == 12).all()


def test_panoptic_json_is_checked(write_labels: Write) -> None:
    root = write_labels("coco-panoptic")
    path = root / "panoptic_val.json"
    data = json.loads(path.read_text())
    data["annotations"][0]["segments_info"].pop(0)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"a segment is not in the JSON .*id 70000"):
        make_dataset("coco-panoptic", "val", root=str(root))
    del data["annotations"][0]["segments_info"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no list 'segments_info'. Read instances"):
        make_dataset("coco-panoptic", "val", root=str(root))
