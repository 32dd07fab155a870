"""Streams: their order, their splits, and folders that become domains."""

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from sam_gym.backbones import Backbone
from sam_gym.data import Dataset
from sam_gym.data.streams import STREAMS, THIN_BELOW, low_res_ceiling, make_stream
from sam_gym.data.synthetic.domains.dataset import DOMAINS
from sam_gym.envs.continual import StreamDataset

HEIGHT, WIDTH = 80, 100
TINY = {"domains": "cells,night,sonar", "train_images": 3, "val_images": 2, "test_images": 2}


# The procedural stream ---------------------------------------------------------------------------


def test_default_stream_has_all_domains() -> None:
    stream = make_stream()
    assert stream.name == "scenes-domains" and "scenes-domains" in STREAMS.names()
    assert stream.names == DOMAINS.names() == tuple(domain.name for domain in stream)
    assert [len(stream[0].split(split)) for split in ("train", "val", "test")] == [64, 16, 32]
    assert len(stream) == len(DOMAINS.names()) and stream[-1].name == stream.names[-1]
    for domain in stream:
        assert all(isinstance(dataset, Dataset) for dataset in domain.datasets.values())
        assert domain.split("test").categories == ("object",)


def test_options_reach_the_datasets() -> None:
    stream = make_stream(size=64, seed=5, **TINY)  # type: ignore[arg-type]
    assert stream.names == ("cells", "night", "sonar")
    sample = stream[1].split("val")[1]
    assert sample.image.shape == (64, 64, 3) and sample.source == "night/val/1"
    other = make_stream(size=64, **TINY)[1].split("val")[1]  # type: ignore[arg-type]
    assert not np.array_equal(sample.image, other.image)
    assert make_stream(domains=["xray", "aerial"]).names == ("xray", "aerial")


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match=r"split of domain 'cells' 'tset'\. Did you mean 'test'"):
        make_stream(**TINY)[0].split("tset")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "scene-domains"}, r"Unknown stream 'scene-domains'\. Did you mean 'scenes-"),
        ({"domains": "cell"}, r"Unknown domain 'cell'\. Did you mean 'cells'"),
        ({"domains": []}, "domains is empty"),
        ({"domains": "cells,night,cells"}, "domains names cells more than once"),
        ({"train_image": 3}, r"Unknown option of stream 'scenes-domains' 'train_image'"),
        ({"val_images": 0}, "val_images must be at least 1, got 0"),
        ({"size": 32}, "size must be from 64"),
        ({"data": "here"}, "reads no files, got data='here'"),
    ],
)
def test_impossible_streams(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream(**arguments)


# Orders ------------------------------------------------------------------------------------------


def test_orders() -> None:
    stream = make_stream(**TINY)  # type: ignore[arg-type]
    assert stream.ordered(None) is stream
    for order in ("sonar, cells,night", ["sonar", "cells", "night"]):
        again = stream.ordered(order)
        assert again.names == ("sonar", "cells", "night")
        assert again[1] is stream[0]
    assert make_stream(order="night,sonar,cells", **TINY).names[0] == "night"  # type: ignore[arg-type]


def test_random_orders_are_seeded() -> None:
    stream = make_stream()
    orders = {seed: stream.ordered(f"random:{seed}").names for seed in range(5)}
    assert len(set(orders.values())) == 5
    for seed, names in orders.items():
        assert sorted(names) == sorted(stream.names)
        assert stream.ordered(f"random:{seed}").names == names


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("cells,night", r"order lacks sonar\."),
        ("cells,night,sonr", r"'sonr'\. Did you mean 'sonar'"),
        ("cells,night,sonar,cells", "order names cells more than once"),
        ("", "order lacks cells, night, sonar"),
        ("random:", "expected a whole number after 'random:'"),
        ("random:-1", "expected a whole number after 'random:'"),
    ],
)
def test_impossible_orders(order: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream(order=order, **TINY)  # type: ignore[arg-type]


# Folders -----------------------------------------------------------------------------------------


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def two_blocks() -> np.ndarray:
    """Labels of two objects that touch, and of a speck."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[10:40, 10:40], labels[10:40, 40:70], labels[60, 90] = 1, 2, 3
    return labels


def make_folder(
    root: Path, labels: np.ndarray, *, instances: bool = False, each: int = 2
) -> dict[str, list[str]]:
    """A domain with so many images of each split."""
    rng = np.random.default_rng(0)
    splits = {split: [f"{split}{i}" for i in range(each)] for split in ("train", "val", "test")}
    for stem in (stem for stems in splits.values() for stem in stems):
        pixels = rng.integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
        write(root / "images" / f"{stem}.png", pixels)
        write(root / "masks" / f"{stem}.png", (labels > 0) * np.uint8(255))
        if instances:
            write(root / "instances" / f"{stem}.png", labels)
    (root / "splits.json").write_text(json.dumps(splits))
    return splits


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    make_folder(tmp_path / "blocks", two_blocks())
    return tmp_path / "blocks"


def test_folders_become_domains(blocks: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "parts", two_blocks(), instances=True)
    data = [str(blocks), str(tmp_path / "parts")]
    for given in (data, ",".join(data)):
        stream = make_stream("folders", data=given)
        assert stream.names == ("blocks", "parts")
    assert stream.ordered("parts,blocks").names == ("parts", "blocks")
    for domain, areas in zip(stream, ([1800], [900, 900]), strict=True):
        for split in ("train", "val", "test"):
            dataset = domain.split(split)
            assert isinstance(dataset, Dataset)
            assert dataset.categories == ("object",) and len(dataset) == 2
            assert dataset[1].source == f"{domain.name}/{split}1"
            assert dataset[1].masks.sum(axis=(1, 2)).tolist() == areas
        assert dataset.draw(np.random.default_rng(0))[0] in (0, 1)
        with pytest.raises(IndexError):
            dataset[2]


def test_no_domain_holds_out_training_images_of_another(blocks: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for folder in ("images", "masks"):
        (other / folder).mkdir(parents=True)
        for path in (blocks / folder).iterdir():
            os.link(path, other / folder / path.name)
    splits = json.loads((blocks / "splits.json").read_text())
    splits["train"], splits["val"] = splits["val"], splits["train"]
    (other / "splits.json").write_text(json.dumps(splits))
    message = "2 of 2 images of split 'val' of domain '(other|blocks)' are training images of"
    with pytest.raises(ValueError, match=message):
        make_stream("folders", data=[str(blocks), str(other)])
    splits["train"], splits["val"] = splits["val"], splits["train"]
    (other / "splits.json").write_text(json.dumps(splits))
    stream = make_stream("folders", data=[str(blocks), str(other)])
    assert len(StreamDataset(stream, "val").files) == 4


def test_specks_are_ignored_by_share_of_the_area(blocks: Path) -> None:
    sample = make_stream("folders", data=[str(blocks)])[0].split("val")[0]
    assert sample.ignore is not None and sample.ignore.sum() == 1  # 4 pixels of 8000 are the least
    everything = make_stream("folders", data=[str(blocks)], min_area=0.0)[0].split("val")[0]
    assert everything.masks.sum(axis=(1, 2)).tolist() == [1800, 1]


def test_images_without_an_object_are_left_out_and_counted(blocks: Path) -> None:
    speck = np.zeros((HEIGHT, WIDTH), np.uint8)
    write(blocks / "masks" / "train0.png", speck)
    speck[5, 5] = 255
    write(blocks / "masks" / "test1.png", speck)
    with pytest.warns(UserWarning, match="blocks: left out 2 images") as caught:
        stream = make_stream("folders", data=[str(blocks)])
    assert len(caught) == 1 and caught[0].filename == __file__
    datasets = stream[0].datasets
    assert {split: len(dataset) for split, dataset in datasets.items()} == {
        "train": 1,
        "val": 2,
        "test": 1,
    }
    assert datasets["train"][0].source == "blocks/train1"
    assert datasets["test"][0].source == "blocks/test0"


def test_a_whole_folder_gives_no_warning(blocks: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_stream("folders", data=[str(blocks)])


def test_a_split_without_any_object(blocks: Path) -> None:
    for stem in ("train0", "train1"):
        write(blocks / "masks" / f"{stem}.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(ValueError, match="blocks: no image of split 'train' has an object"):
        make_stream("folders", data=[str(blocks)])


def test_max_images_takes_the_same_ones_again(tmp_path: Path) -> None:
    make_folder(tmp_path / "many", two_blocks(), each=6)

    def chosen(seed: int) -> tuple[str, ...]:
        data = [str(tmp_path / "many")]
        domain = make_stream("folders", data=data, max_images=3, seed=seed)[0]
        assert [len(dataset) for dataset in domain.datasets.values()] == [3, 3, 3]
        return tuple(domain.split("test")[i].source for i in range(3))

    assert chosen(0) == chosen(0)
    assert len({chosen(seed) for seed in range(6)}) > 1


def test_thin_is_measured(tmp_path: Path) -> None:
    lines = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.polylines(lines, [np.array([[2, 5], [60, 30], [95, 75]])], False, 1, 1)
    make_folder(tmp_path / "first", lines)
    make_folder(tmp_path / "second", two_blocks())
    stream = make_stream("folders", data=[str(tmp_path / "first"), str(tmp_path / "second")])
    assert [domain.thin for domain in stream] == [True, False]


def lose_splits(root: Path) -> None:
    (root / "splits.json").unlink()


def lose_val(root: Path) -> None:
    (root / "splits.json").write_text('{"train": ["train0"], "test": ["test0"]}')


def no_train(root: Path) -> None:
    (root / "splits.json").write_text('{"train": [], "val": ["val0"], "test": ["test0"]}')


def leak(root: Path) -> None:
    splits = {"train": ["train0"], "val": ["val0"], "test": ["test0", "train0"]}
    (root / "splits.json").write_text(json.dumps(splits))


def lose_masks(root: Path) -> None:
    (root / "masks").rename(root / "labels")


def cut_mask(root: Path) -> None:
    path = root / "masks" / "test1.png"
    path.write_bytes(path.read_bytes()[:60])


def ones_for_objects(root: Path) -> None:
    write(root / "masks" / "val0.png", (two_blocks() > 0).astype(np.uint8))


def no_folder(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))


def empty(root: Path) -> None:
    no_folder(root)
    root.mkdir()


def a_file(root: Path) -> None:
    no_folder(root)
    root.touch()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_splits, "blocks: splits.json is missing, so every split would be all images"),
        (lose_val, "splits.json: split 'val' is not a list of stems"),
        (no_train, "blocks: split 'train' has no usable image"),
        (leak, "splits.json: image 'train0' is in 'train' and in 'test'"),
        (lose_masks, "blocks: found images, labels, splits.json. A domain is a folder with"),
        (
            cut_mask,
            "image 'test1' .*mask file cannot be read: the file is truncated or not an image",
        ),
        (ones_for_objects, "val0.png: .* values other than 0 .*found 0, 1"),
        (no_folder, "blocks: the folder does not exist. Check the path"),
        (empty, "blocks: found nothing. A domain is a folder with .*COCO JSON pass --stream coco"),
        (a_file, "blocks: not a folder that can be read"),
    ],
)
def test_damaged_folders(blocks: Path, damage, message: str) -> None:
    damage(blocks)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_stream("folders", data=[str(blocks)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": None}, "needs folders, got data=None"),
        ({"data": " , "}, "needs folders, got data=' , '"),
        ({"min_area": 1.0}, "min_area must be at least 0 and below 1, got 1.0"),
        ({"max_images": 0}, "max_images must be at least 1"),
        ({"min_aera": 0.1}, r"'min_aera'\. Did you mean 'min_area'"),
    ],
)
def test_impossible_folder_streams(blocks: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream("folders", **{"data": [str(blocks)], **arguments})


def test_two_folders_of_one_name(blocks: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "other" / "blocks", two_blocks())
    data = [str(blocks), str(tmp_path / "other" / "blocks")]
    with pytest.raises(ValueError, match="Several folders are called 'blocks'"):
        make_stream("folders", data=data)
    with pytest.raises(ValueError, match="Several folders are called 'blocks'"):
        make_stream("folders", data=[str(blocks), str(blocks) + "/"])


# The ceiling of low-res masks --------------------------------------------------------------------


def objects(*masks: np.ndarray) -> Dataset:
    sample = SimpleNamespace(masks=np.stack(masks))
    return [sample]  # type: ignore[return-value]


def test_ceiling_is_one_for_what_the_low_res_mask_can_draw() -> None:
    half = np.zeros((256, 256), bool)
    half[:, :128] = True
    assert low_res_ceiling(objects(half)) == 1.0
    wide = np.zeros((100, 400), bool)
    wide[:, 200:] = True
    assert low_res_ceiling(objects(wide)) > 0.98


@pytest.mark.parametrize("size", [(256, 256), (100, 180), (300, 200)])
def test_ceiling_agrees_with_the_backbone(size: tuple[int, int], shipped: Backbone) -> None:
    """Averaging a mask down by hand, then `masks_at` of the backbone, gives the same IoU."""
    side, (cells, _) = shipped.image_size, shipped.mask_shape
    mask = np.zeros(size, np.uint8)
    cv2.ellipse(mask, (size[1] // 2, size[0] // 2), (40, 6), 30, 0, 360, 1, -1)
    height, width = shipped.input_size(size)
    frame = np.zeros((side, side), np.float32)
    frame[:height, :width] = cv2.resize(
        mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA
    )
    low = frame.reshape(cells, side // cells, cells, -1).mean(axis=(1, 3))
    ious = []
    for threshold in np.arange(0.1, 0.95, 0.1):
        drawn = shipped.masks_at(torch.from_numpy(low - np.float32(threshold)), size).numpy() > 0
        ious.append((drawn & (mask > 0)).sum() / (drawn | (mask > 0)).sum())
    ceiling = low_res_ceiling(objects(mask > 0), side, cells)
    assert ceiling == pytest.approx(max(ious), abs=0.01)


def test_ceiling_falls_with_the_width_of_a_line() -> None:
    ceilings = []
    for width in (1, 3, 9, 27):
        line = np.zeros((256, 256), np.uint8)
        cv2.line(line, (10, 23), (240, 201), 1, width)
        ceilings.append(low_res_ceiling(objects(line > 0)))
    assert ceilings == sorted(ceilings)
    assert ceilings[0] < 0.5 and ceilings[-1] > 0.9


def test_ceiling_reads_only_some_images() -> None:
    half = np.zeros((256, 256), bool)
    half[:, :128] = True
    dot = np.zeros((256, 256), bool)
    dot[20, 20] = True
    both = objects(half) + objects(dot)  # type: ignore[operator]
    assert low_res_ceiling(both, max_images=1) == 1.0 > low_res_ceiling(both)


def test_declared_thinness_is_what_would_be_measured() -> None:
    for domain in make_stream(val_images=4):
        ceiling = low_res_ceiling(domain.split("val"))
        assert domain.thin == (ceiling < THIN_BELOW), (domain.name, ceiling)


def test_names_of_domains_are_printable(tmp_path: Path) -> None:
    make_folder(tmp_path / "a\n\x1b[1m", two_blocks())
    assert make_stream("folders", str(tmp_path / "a\n\x1b[1m")).names == (r"a\n\x1b[1m",)
