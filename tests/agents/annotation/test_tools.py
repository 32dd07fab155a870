"""Annotations come back from other tools, through their own converters.

docs/guides/annotation_tools.md has the steps.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_gym.data import make_dataset
from sam_gym.data.coco_writer import CocoWriter, Segmentation, mask_annotation


def _masks() -> dict[str, np.ndarray]:
    """Two masks of 60 x 80 pixels: one with a hole, one in two parts."""
    y, x = np.mgrid[:60, :80]
    distance = np.hypot(y - 30, x - 40)
    parts = np.zeros((60, 80), bool)
    parts[3:12, 5:20] = parts[50:58, 60:70] = True
    return {"ring": (distance < 25) & (distance > 10), "star": parts}


def annotated(folder: Path, segmentation: Segmentation) -> dict[str, Any]:
    """Write two images, and return their annotations as `annotate` writes them."""
    (folder / "images").mkdir()
    writer = CocoWriter({"star": 1, "ring": 2}, segmentation=segmentation)
    for number in range(2):
        cv2.imwrite(str(folder / "images" / f"{number}.png"), np.full((60, 80, 3), 99, np.uint8))
        found = [{**mask_annotation(m, score=0.9), "category": k} for k, m in _masks().items()]
        writer.add(number + 1, f"{number}.png", (60, 80), found)
    return writer.content


@pytest.mark.parametrize("segmentation", ["polygons", "rle"])
def test_cvat(tmp_path: Path, segmentation: Segmentation) -> None:
    datumaro = pytest.importorskip("datumaro")
    content = annotated(tmp_path, segmentation)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_all.json").write_text(json.dumps(content))
    sent = datumaro.Dataset.import_from(str(tmp_path), "coco_instances")
    sent.export(str(tmp_path / "cvat"), "cvat", save_media=True)
    returned = datumaro.Dataset.import_from(str(tmp_path / "cvat"), "cvat")
    back = tmp_path / "back"
    returned.export(str(back), "coco_instances", save_media=True)
    dataset = make_dataset(
        "coco",
        "all",
        root=str(back),
        images=str(back / "images" / "all"),
        annotations=str(back / "annotations" / "instances_all.json"),
        # Masks come back as RLE, which Datumaro marks as crowds.
        include_crowd=segmentation == "rle",
    )
    _check(dataset, {"ring": [_masks()["ring"]], "star": [_masks()["star"]]})


def test_label_studio(tmp_path: Path) -> None:
    imports = pytest.importorskip("label_studio_sdk.converter.imports.coco")
    from label_studio_sdk.converter import Converter

    content = annotated(tmp_path, "polygons")
    for own in content["annotations"]:
        del own["bbox"]
    source, tasks = tmp_path / "annotations.json", tmp_path / "tasks.json"
    source.write_text(json.dumps(content))
    imports.convert_coco_to_ls(str(source), str(tasks), image_root_url="images")
    given = json.loads(tasks.read_text())
    for number, task in enumerate(given, start=1):  # the server numbers them
        task["id"] = task["annotations"][0]["id"] = number
    tasks.write_text(json.dumps(given))
    config = (tmp_path / "tasks.label_config.xml").read_text()
    converter = Converter(config, str(tmp_path), download_resources=False)
    converter.convert_to_coco(str(tasks), str(tmp_path / "back"), is_dir=False)
    result = tmp_path / "back" / "result.json"
    returned = json.loads(result.read_text())
    for image in returned["images"]:  # Label Studio puts a hash before the name
        image["file_name"] = image["file_name"].rpartition("__")[2]
    result.write_text(json.dumps(returned))
    dataset = make_dataset(
        "coco",
        "all",
        root=str(tmp_path),
        images=str(tmp_path / "images"),
        annotations=str(result),
    )
    # A region of Label Studio is one polygon.
    star, rows = _masks()["star"], np.arange(60)[:, None]
    _check(dataset, {"ring": [_masks()["ring"]], "star": [star & (rows < 30), star & (rows > 30)]})


@pytest.mark.parametrize("segmentation", ["polygons", "rle"])
def test_fiftyone(tmp_path: Path, segmentation: Segmentation) -> None:
    coco = pytest.importorskip("fiftyone.utils.coco")
    source, back = tmp_path / "annotations.json", tmp_path / "back.json"
    source.write_text(json.dumps(annotated(tmp_path, segmentation)))
    importer = coco.COCODetectionDatasetImporter(
        data_path=str(tmp_path / "images"), labels_path=str(source), label_types="segmentations"
    )
    exporter = coco.COCODetectionDatasetExporter(labels_path=str(back), export_media=False)
    with importer, exporter:
        for path, metadata, found in importer:
            for own in found.detections:
                own["iscrowd"] = 1  # else it writes outlines, which fills holes
            exporter.export_sample(path, found, metadata=metadata)
    dataset = make_dataset(
        "coco",
        "all",
        root=str(tmp_path),
        images=str(tmp_path / "images"),
        annotations=str(back),
        include_crowd=True,
    )
    _check(dataset, {name: [mask] for name, mask in _masks().items()})


def _check(dataset: Any, expected: dict[str, list[np.ndarray]]) -> None:
    assert len(dataset) == 2
    for index in range(2):
        sample = dataset[index]
        found: dict[str, list[np.ndarray]] = {name: [] for name in dataset.categories}
        for mask, category in zip(sample.masks, sample.categories, strict=True):
            found[dataset.categories[category]].append(mask)
        assert found.keys() == expected.keys()
        for name, masks in expected.items():
            order = sorted(found[name], key=lambda mask: int(mask.argmax()))
            np.testing.assert_array_equal(np.stack(order), np.stack(masks))
