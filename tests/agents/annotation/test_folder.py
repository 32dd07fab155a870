"""Annotating a folder with an annotator that draws squares: files, names, ids, interruptions."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from agents.annotation import shards as module
from agents.annotation.folder import AnnotatedItem, FolderConfig, FolderRun, Key, annotate_folder
from sam_gym.data.coco_writer import mask_annotation
from sam_gym.data.io import read_json
from sam_gym.utils.render import draw_masks


class Squares:
    """Annotates the inner part of each image as each category, with a hole."""

    new_categories, description = False, "squares"
    settings: dict[str, Any] = {}
    batch_size = 1

    def __init__(self, *categories: str, identity: str = "1", stop_after: int = 10**9) -> None:
        self.categories, self.identity, self.left = categories or ("star",), identity, stop_after
        self.backbone: Any = SimpleNamespace(input_size=lambda size: size)
        self.seen: list[Key] = []

    def keys(self, file: str) -> list[Key]:
        return [(file, category) for category in range(len(self.categories))]

    def label(self, key: Key) -> str:
        return f"{key[0]}__{self.categories[key[1]]}"

    def stream(self, items: Iterator[tuple[Key, np.ndarray]]) -> Iterator[AnnotatedItem]:
        for key, image in items:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.seen.append(key)
            mask = np.zeros(image.shape[:2], bool)
            mask[1:7, 1:7], mask[3:5, 3:5] = True, False
            annotation = mask_annotation(mask, score=0.5, category=self.categories[key[1]])
            draw = partial(draw_masks, image, [mask], caption=key[0], height=16)
            yield AnnotatedItem(key, image.shape[:2], [annotation], draw)


def photo(path: Path | str, height: int = 8, width: int = 9, **options: Any) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name in ("a.png", "more/b.png"):
        photo(root / name)
    return root


def run(photos: Path, annotator: Squares | None = None, **options: Any) -> dict[str, Any]:
    options = {"out": str(photos.parent / "out" / "o.json"), "device": "cpu"} | options
    config = FolderConfig(images=str(photos), **options)
    return dict(annotate_folder(FolderRun.prepare(config), annotator or Squares()))


def names(content: dict[str, Any]) -> list[str]:
    return [image["file_name"] for image in content["images"]]


def overlays(photos: Path) -> list[str]:
    return sorted(path.name for path in (photos.parent / "out" / "o_overlays").iterdir())


# Files ---------------------------------------------------------------------------------------


def test_every_file_is_annotated_or_named(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(photos / "b.GIF")
    photo(photos / "d.jfif", format="JPEG")
    photo(photos / "e.jp2")
    photo(photos / "f.ppm")
    photo(photos / "no_suffix", format="PNG")
    photo(photos / "strange.dat", format="PNG")
    photo(photos / "raw.dng", format="TIFF")
    (photos / "scan.dcm").write_bytes(b"\0" * 128 + b"DICM")
    (photos / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 99)
    (photos / "cut.gif").write_bytes((photos / "b.GIF").read_bytes()[:20])
    (photos / "notes.txt").write_text("no image")
    (photos / "labels").write_text("no image")
    content = run(photos)
    printed = capsys.readouterr().out
    read = ["a.png", "b.GIF", "d.jfif", "e.jp2", "f.ppm", "more/b.png", "no_suffix", "strange.dat"]
    assert names(content) == read
    for name in ("raw.dng", "scan.dcm", "IMG_1.HEIC", "cut.gif"):
        assert f"skipped {name}: " in printed
    assert "ignored 2 files of other kinds (.txt 1, no suffix 1)" in printed
    assert "4 files skipped" in printed


def test_further_frames_are_named(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Image.new("RGB", (9, 8), colour) for colour in ("red", "green", "blue")]
    for name in ("film.gif", "pages.tif"):
        frames[0].save(photos / name, save_all=True, append_images=frames[1:])
    assert {"film.gif", "pages.tif"} <= set(names(run(photos)))
    printed = capsys.readouterr().out
    for name in ("film.gif", "pages.tif"):
        assert f"only the first of 3 frames of {name} is read" in printed
    assert "frames of a.png" not in printed


def test_links_that_leave_the_folder_are_skipped(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(photos.parent / "elsewhere" / "secret.png")
    (photos / "out.png").symlink_to(photos.parent / "elsewhere" / "secret.png")
    (photos / "folder").symlink_to(photos.parent / "elsewhere")
    (photos / "loop").symlink_to(photos)
    (photos / "broken.png").symlink_to(photos / "missing.png")
    (photos / "inside.png").symlink_to(photos / "a.png")
    content = run(photos)
    printed = capsys.readouterr().out
    assert names(content) == ["a.png", "inside.png", "more/b.png"]
    assert "skipped out.png: the link leaves the folder" in printed
    assert "skipped broken.png: a broken link" in printed
    assert "skipped folder: links to folders" in printed and "skipped loop: " in printed
    assert "4 files skipped" in printed
    linked = photos.parent / "linked"
    linked.symlink_to(photos)
    assert names(run(linked)) == names(content)


def test_a_folder_without_images_is_explained(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.heic").write_bytes(b"")
    (tmp_path / "photos" / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"no image.*a.heic: .*Convert it.*\(.txt 1\)"):
        run(tmp_path / "photos")


def test_own_files_are_not_annotated(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(photos, out=str(photos / "o.json"))
    assert (photos / "o_overlays").is_dir()
    assert run(photos, out=str(photos / "o.json")) == first
    assert run(photos, out=str(photos / "o.json"), overlays=str(photos)) == first
    assert run(photos, out=str(photos / "o.json"), overlays=str(photos)) == first
    assert "ignored" not in capsys.readouterr().out


# Names ---------------------------------------------------------------------------------------


def test_names_are_safe_and_unique(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = [
        "x\x1b[31m\n.png",
        'a<>:"|?*\\.png',
        "\u00e9.png",
        "e\u0301.png",
        "A.PNG",
        "more__b.png",
    ]
    strange += [
        "more/" + "y" * 240 + ".png",
        "日本.png",
        "a.png__star.png",
        os.fsdecode(b"caf\xe9.png"),
    ]
    for name in strange:
        photo(photos / "t.png")
        (photos / "t.png").rename(photos / name)
    (photos / "broken\x1b[2J\udcff.png").write_bytes(b"")
    content = run(photos, Squares("star", "w/o hat"))
    printed = capsys.readouterr().out
    assert set(names(content)) == {"a.png", "more/b.png", *strange}
    assert "skipped broken\\x1b[2J\\udcff.png" in printed and "\x1b" not in printed
    found = overlays(photos)
    assert len(found) == 2 * (2 + len(strange)) and "no overlay" not in printed
    assert len({name.casefold() for name in found}) == len(found)
    assert all(name.isprintable() and len(name.encode()) < 255 for name in found)
    assert {"日本.png__star.jpg", "日本.png__w__o hat.jpg"} <= set(found)
    assert read_json(str(photos.parent / "out" / "o.json"), "file") == content
    assert all(os.path.isfile(photos / name) for name in names(content))


def test_an_overlay_that_cannot_be_written_ends_no_run(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos.parent / "out" / "o_overlays" / "a.png__star.jpg").mkdir(parents=True)
    assert names(run(photos)) == ["a.png", "more/b.png"]
    assert "no overlay a.png__star.jpg: " in capsys.readouterr().out
    assert "more__b.png__star.jpg" in overlays(photos)


@pytest.mark.parametrize("size", [(10, 3000), (3000, 10), (1, 1), (2, 70_000), (3000, 1)])
def test_images_of_any_shape_have_overlays(photos: Path, size: tuple[int, int]) -> None:
    photo(photos / "odd.png", *size)
    run(photos)
    drawn = cv2.imread(str(photos.parent / "out" / "o_overlays" / "odd.png__star.jpg"))
    assert drawn is not None and max(drawn.shape) <= 2**14


def test_a_rerun_removes_overlays_of_the_earlier_run(photos: Path) -> None:
    run(photos, Squares("star", "ring"))
    folder = photos.parent / "out" / "o_overlays"
    (folder / "mine.jpg").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        run(photos, Squares("cube", stop_after=1))
    shutil.rmtree(photos.parent / "out" / "o.partial")
    (photos / "a.png").unlink()
    run(photos, Squares("star"))
    assert overlays(photos) == ["mine.jpg", "more__b.png__star.jpg"]
    run(photos, Squares("star"), overlays="none")
    assert overlays(photos) == ["mine.jpg"]


# Options -------------------------------------------------------------------------------------


def test_outputs_are_checked_before_work_starts(photos: Path, tmp_path: Path) -> None:
    for out in (str(tmp_path), f"{tmp_path}/new/", "."):
        with pytest.raises(ValueError, match="is a folder. Name a file"):
            run(photos, out=out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out .*file is a file: name a folder"):
        run(photos, out=str(tmp_path / "file" / "o.json"))
    with pytest.raises(ValueError, match="--overlays .*file is a file: name a folder"):
        run(photos, overlays=str(tmp_path / "file"))
    (tmp_path / "truth.json").write_text("{}")
    with pytest.raises(ValueError, match="would overwrite --coco"):
        run(photos, out=str(tmp_path / "truth.json"), coco=str(tmp_path / "truth.json"))


# Ids -----------------------------------------------------------------------------------------


def truth(photos: Path, images: Any, categories: Any, **more: Any) -> str:
    path = photos.parent / "truth.json"
    path.write_text(json.dumps({"images": images, "categories": categories} | more))
    return str(path)


@pytest.mark.parametrize("image_id, category_id", [("i-1", "cat-7"), (7.0, 3.0), ("1", "1")])
def test_ids_of_any_kind(photos: Path, image_id: Any, category_id: Any) -> None:
    path = truth(
        photos,
        [{"id": image_id, "file_name": "more\\b.png", "height": 8, "width": 9}],
        [{"id": category_id, "name": "star"}],
    )
    annotator = Squares("star", "new")
    annotator.new_categories = True
    content = run(photos, annotator, coco=path)
    assert names(content) == ["more/b.png"] and content["images"][0]["id"] == image_id
    star, new = (category["id"] for category in content["categories"])
    assert star == category_id and new != star and type(new) is (str if star == str(star) else int)


def test_coco_files_that_do_not_fit(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    star, image = {"id": 1, "name": "star"}, {"id": 1, "file_name": "a.png"}
    for images, categories, reason in (
        ([image | {"id": None}], [star], "file_name must be text and id a whole number or text"),
        ([image | {"id": [1]}], [star], "id a whole number or text"),
        ([image, image], [star], "id 1 of 'a.png' is taken"),
        ([image, image | {"id": 2}], [star], "'a.png' has two ids"),
        ([image], [star | {"name": [3]}], "name must be text"),
        ([image], None, "no COCO JSON"),
        ([3], [star], "no COCO JSON"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(photos, coco=truth(photos, images, categories))
    others = [{"id": 5, "file_name": "gone.png"}, {"id": 6, "file_name": "more/b.png"}]
    others[1] |= {"height": 80, "width": 9}
    roof = {"id": 0, "name": "star"}
    path = truth(photos, [image, *others], [roof, star], annotations=[{"category_id": 1}])
    content = run(photos, coco=path)
    printed = capsys.readouterr().out
    assert content["categories"] == [{"id": 1, "name": "star"}] and names(content) == ["a.png"]
    assert "1 image of" in printed and "skipped more/b.png: 9 x 8 pixels" in printed


def test_categories_named_by_numbers(photos: Path) -> None:
    path = truth(photos, [{"id": 1, "file_name": "a.png"}], [{"id": 5, "name": 3}])
    content = run(photos, Squares("3"), coco=path)
    assert content["categories"] == [{"id": 5, "name": "3"}]


def test_empty_results_are_not_recommended(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`COCO.loadRes` fails on them."""
    run(photos)
    assert "Results for COCOeval" in capsys.readouterr().out
    stream = Squares.stream
    monkeypatch.setattr(
        Squares,
        "stream",
        lambda *args: (replace(item, annotations=[]) for item in stream(*args)),
    )
    run(photos)
    printed = capsys.readouterr().out
    assert "0 masks in 2 images" in printed and "COCOeval" not in printed


def test_results_keep_the_areas_of_the_masks(photos: Path) -> None:
    content = run(photos, segmentation="polygons")
    out = photos.parent / "out"
    assert content["annotations"][0]["area"] == 32
    assert content["annotations"][0]["bbox"] == [1, 1, 6, 6]
    reference = COCO(str(out / "o.json"))
    found = reference.loadRes(str(out / "o_results.json"))
    for number, own in found.anns.items():
        assert own["area"] == reference.anns[number]["area"] == 32
        np.testing.assert_array_equal(
            reference.annToMask(own), reference.annToMask(found.anns[number])
        )
        assert isinstance(reference.anns[number]["segmentation"], list)
        assert rle.decode(own["segmentation"]).sum() == 32
    evaluation = COCOeval(reference, found, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == evaluation.stats[3] == pytest.approx(1.0)


# Interruptions -------------------------------------------------------------------------------


def interrupted(photos: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(photos, Squares("star", "ring", stop_after=after))


def test_results_of_another_model_are_dropped(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(photos, 2)
    annotator = Squares("star", "ring", identity="2")
    run(photos, annotator)
    printed = capsys.readouterr().out
    assert len(annotator.seen) == 4
    assert "Dropped 2 results" in printed and "Resuming" not in printed


def test_results_of_changed_images_are_dropped(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(photos, 3)
    photo(photos / "a.png", 20, 30)
    annotator = Squares("star", "ring")
    content = run(photos, annotator)
    assert annotator.seen == [("a.png", 0), ("a.png", 1), ("more/b.png", 1)]
    assert "Dropped 2 results" in (printed := capsys.readouterr().out)
    assert "Resuming: 1 of 4 are done" in printed
    assert content["annotations"][0]["segmentation"]["size"] == [20, 30]


def test_overlays_are_drawn_before_progress_is_noted(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.PartialResults, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run(photos)
    assert overlays(photos) == ["a.png__star.jpg"]
    # Nothing is done yet, so that other settings are accepted.
    run(photos, Squares("ring"), segmentation="polygons")
    assert overlays(photos) == ["a.png__ring.jpg", "more__b.png__ring.jpg"]


def test_the_differing_settings_are_named(photos: Path) -> None:
    interrupted(photos, 1)
    with pytest.raises(ValueError, match=r"other settings \(segmentation\)"):
        run(photos, segmentation="polygons")
    (photos.parent / "out" / "o.partial" / "plan.json").write_bytes(b"\xff\0 garbage\n")
    with pytest.raises(ValueError, match="not what an unfinished run leaves"):
        run(photos)


def test_two_runs_do_not_write_the_same_file(photos: Path) -> None:
    class Another(Squares):
        def stream(self, items: Iterator[tuple[Key, np.ndarray]]) -> Iterator[AnnotatedItem]:
            with pytest.raises(FileExistsError, match="Another process is writing .*o.json"):
                run(photos)
            return super().stream(items)

    assert run(photos, Another()) == run(photos)


def test_a_file_of_somebody_else_is_replaced_on_request_only(photos: Path) -> None:
    out = photos.parent / "out" / "o.json"
    out.parent.mkdir()
    out.write_text("ground truth")
    with pytest.raises(FileExistsError, match=r"annotate did not write it. Pass --overwrite"):
        run(photos)
    assert out.read_text() == "ground truth"
    assert run(photos, overwrite=True) == run(photos)


# Orientation ---------------------------------------------------------------------------------


def test_masks_fit_what_viewers_show_unless_the_coco_file_says_otherwise(photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    photo(photos / "a.png", 8, 12, exif=exif)
    content = run(photos)
    assert [content["images"][0][key] for key in ("height", "width")] == [12, 8]
    assert content["annotations"][0]["segmentation"]["size"] == [12, 8]
    image = {"id": 1, "file_name": "a.png", "height": 8, "width": 12}
    content = run(photos, coco=truth(photos, [image], [{"id": 1, "name": "star"}]))
    assert content["annotations"][0]["segmentation"]["size"] == [8, 12]
