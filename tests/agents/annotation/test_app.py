"""The app without a browser: results, clicks, the agent's turn, tabs, and who may talk to it."""

import asyncio
import io
import json
import os
import re
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from stable_baselines3 import PPO

from agents.annotation.clicks import ClickAnnotator
from agents.annotation.files import OutputPaths
from agents.annotation.interactive import project as project_module
from agents.annotation.interactive import session as session_module
from agents.annotation.interactive.drawing import at_shown_size, outline, shown_size
from agents.annotation.interactive.guard import LOOPBACK, Guard
from agents.annotation.interactive.project import Project
from agents.annotation.interactive.session import Session
from agents.annotation.interactive.workspaces import Workspaces
from agents.app import AppConfig, load_models, prepare, serve
from agents.evaluate import PolicyAgent
from agents.policies.implicit import ImplicitPolicy
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from sam_gym import Predictor
from sam_gym.backbones.zoom import Window
from sam_gym.data import make_dataset
from sam_gym.envs.click import SamSegConfig


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three scenes of different sizes, one in a folder within."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    scenes = make_dataset("scenes", "test", length=3, size=128)
    for number, name in enumerate(("a.png", "b.png", "more/c.png")):
        cv2.imwrite(str(root / name), scenes[number].image[: 128 - 30 * number, :, ::-1])
    return root


@pytest.fixture
def make_policy(tiny_env: dict[str, Any], tmp_path: Path) -> Any:
    """Returns the path of an untrained policy of `SamSeg-v0` with further arguments."""

    def make(seed: int = 0, search: int = 0, **more: Any) -> str:
        settings = SamSegConfig(**(tiny_env | {"max_steps": 3} | more))
        vector, core = make_vector_env("SamSeg-v0", 2, settings)
        backbone = {"name": "tiny", "checkpoint": tiny_env["checkpoint"], "device": "cpu"}
        names = list(core.dataset.categories)
        features = {"backbone": backbone, "vocabulary": names, "categories": names, "max_steps": 3}
        others = [name for name in ("stop", "undo") if getattr(settings, name)]
        kwargs = {"features": features, "grid": 16, "others": others, "search": search}
        model = PPO(ImplicitPolicy, VectorEnvAdaptor(vector), policy_kwargs=kwargs, seed=seed)
        model.save(tmp_path / "policy.zip")
        vector.close()
        return str(tmp_path / "policy.zip")

    return make


@pytest.fixture
def config(photos: Path, tiny_env: dict[str, Any]) -> Any:
    """Returns a config of the app over the tiny SAM, without an agent unless one is named."""

    def config(**more: Any) -> AppConfig:
        own = {"images": str(photos), "out": str(photos.parent / "out"), "device": "cpu"}
        if "policy" not in more:
            own |= {"backbone": "tiny", "checkpoint": tiny_env["checkpoint"]}
        return AppConfig(**(own | more))

    return config


@pytest.fixture
def session(config: Any) -> Session:
    """A session on the first photo."""
    session = prepare(config())[0].get("tab").session
    session.open(0)
    return session


def content(session: Session) -> dict[str, Any]:
    return json.loads(session.project.path.read_text())


# The object ------------------------------------------------------------------------------------


def test_masks_are_those_of_the_predictor(session: Session) -> None:
    """The same prompts, one by one: clicks with the mask before, and a box."""
    assert session.image is not None
    predictor = Predictor(session.models.backbone)
    predictor.set_images([session.image.pixels])
    session.click(30, 40, True)
    masks, scores, low = predictor.predict(points=[[[30, 40]]], labels=[[1]])
    best = int(scores[0].argmax())
    np.testing.assert_array_equal(session.mask(), masks[0][best])
    assert session.predicted_iou == pytest.approx(scores[0][best], abs=1e-5)
    session.click(90, 70, False)
    masks, scores, _ = predictor.predict(
        points=[[[30, 40], [90, 70]]], labels=[[1, 0]], masks=[low[0][best]], multimask=False
    )
    np.testing.assert_array_equal(session.mask(), masks[0][0])
    session.draw_box(100, 90, 20, 10)
    masks, _, _ = predictor.predict(
        points=[[[30, 40], [90, 70]]],
        labels=[[1, 0]],
        boxes=[[20, 10, 100, 90]],
        multimask=False,
    )
    np.testing.assert_array_equal(session.mask(), masks[0][0])
    session.undo()
    session.undo()
    assert [click.positive for click in session.clicks] == [True] and session.box is None
    session.reset()
    assert not session.mask().any() and session.predicted_iou is None


def test_prompts_outside_of_the_image(session: Session) -> None:
    session.click(-50, 1e6, True)
    assert (session.clicks[0].x, session.clicks[0].y) == (0, 127)
    with pytest.raises(ValueError, match="no area"):
        session.draw_box(300, 300, 400, 400)
    assert len(session.steps) == 1


def filled(path: str, height: int, width: int) -> np.ndarray:
    """Return the pixels whose centres a path of horizontal and vertical lines fills."""
    crossed = np.zeros((height, width + 1), bool)
    for part in path.split("M")[1:]:
        numbers = re.findall(r"([HV]?)([-+.e\d]+)", part)
        corners = [[float(number) for _, number in numbers[:2]]]
        for axis, number in numbers[2:]:
            at, other = corners[-1], float(number)
            corners.append([other, at[1]] if axis == "H" else [at[0], other])
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            assert x0 == x1 or y0 == y1
            top, bottom, column = (int(np.ceil(v - 0.5)) for v in (min(y0, y1), max(y0, y1), x0))
            crossed[top:bottom, column] ^= True
    return np.bitwise_xor.accumulate(crossed, axis=1)[:, :-1]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_outlines_run_along_the_edges_of_pixels(share: float) -> None:
    mask = np.random.default_rng(0).random((23, 31)) < share
    mask[2:20, 3:17] = True
    mask[8:12, 8:12] = [True, False, False, True]  # holes
    np.testing.assert_array_equal(filled(outline(mask), 23, 31), mask)
    # As a part of an image, twice as wide and three times as high as its pixels.
    there = filled(outline(mask, (7, 5), (2.0, 3.0)), 90, 90)
    np.testing.assert_array_equal(there[5 : 5 + 69, 7 : 7 + 62], np.kron(mask, np.ones((3, 2))))
    assert there.sum() == 6 * mask.sum()


def test_outlines_of_large_masks() -> None:
    large = np.zeros((2000, 3000), bool)
    large[100:1900, 200:2900] = True
    assert outline(large) == "M200,100V1900H2900V100Z"
    assert outline(np.zeros((5, 5), bool)) == ""
    assert shown_size((5000, 8000)) == (800, 1280) and shown_size((9, 7)) == (9, 7)
    assert at_shown_size(np.ones((2000, 10), bool)).shape == (1280, 6)


def test_masks_are_drawn_where_the_image_is(config: Any, photos: Path) -> None:
    """Paths are in pixels of the image, also of one that is shown smaller than it is."""
    image = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    cv2.imwrite(str(photos / "a.png"), image)
    tabs = prepare(config())[0]
    session = tabs.get("tab").session
    assert session.picture() == {"src": ""}
    session.open(0)
    session.draw_box(200, 150, 1800, 1350)
    picture, mask = session.picture(), session.mask()
    assert picture["file"] == "a.png" and session.image is not None
    assert picture["src"] == f"/shown/{session.image.key}"
    assert (picture["width"], picture["height"], picture["shown"]) == (2000, 1500, 1280)
    shown = cv2.imdecode(np.frombuffer(session.image.shown, np.uint8), cv2.IMREAD_COLOR)
    assert shown is not None and shown.shape == (960, 1280, 3)

    session.set_name("thing")
    paths = [session.current()["path"]]
    session.save_object()
    paths += [own["path"] for own in session.objects()]
    for path in paths:
        wrong = filled(path, 1500, 2000) ^ mask
        assert wrong.sum() < 0.05 * mask.sum()


def test_small_objects_of_large_images_are_drawn_to_the_pixel(config: Any, photos: Path) -> None:
    cv2.imwrite(str(photos / "a.png"), np.zeros((1500, 2000, 3), np.uint8))
    session = prepare(config())[0].get("tab").session
    session.open(0)
    session.click(100, 100, True)
    logits = torch.full(session.models.backbone.mask_shape, -5.0)
    logits[6:10, 9:12] = 5.0
    session.steps[0] = replace(session.steps[0], logits=logits)
    mask = session.mask()
    assert mask.any()
    path = session.current()["path"]
    np.testing.assert_array_equal(filled(path, 1500, 2000), mask)


def test_parts_of_large_images(config: Any, photos: Path) -> None:
    image = np.zeros((1500, 2000, 3), np.uint8)
    image[700:900, 1000:1300] = np.kron(  # squares of eight pixels
        np.random.default_rng(0).integers(0, 255, (25, 38, 3), dtype=np.uint8),
        np.ones((8, 8, 1), np.uint8),
    )[:, :300]
    cv2.imwrite(str(photos / "a.png"), image[..., ::-1])
    tabs = prepare(config())[0]
    session = tabs.get("tab").session
    session.open(0)
    assert session.image is not None
    key = session.image.key

    def part(*corners: int) -> np.ndarray:
        data = tabs.shown(key, Window(*corners))
        assert data is not None
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert found is not None
        return found[..., ::-1]

    close = part(1000, 700, 1296, 900)
    assert np.abs(close.astype(int) - image[700:900, 1000:1296]).mean() < 6
    assert part(0, 0, 2000, 1500).shape == (960, 1280, 3)
    for corners in ((0, 0, 2001, 5), (-1, 0, 5, 5), (5, 5, 5, 9)):
        assert tabs.shown(key, Window(*corners)) is None
    assert tabs.shown("other", Window(0, 0, 5, 5)) is None


# Results ---------------------------------------------------------------------------------------


def test_objects_are_written_at_once_and_read_again(config: Any, session: Session) -> None:
    session.click(30, 40, True)
    with pytest.raises(ValueError, match="Name the object"):
        session.save_object()
    session.set_name("  red   mug ")
    mask = session.mask()
    session.save_object()
    assert not session.steps and session.objects()[0]["name"] == "red mug"
    truth = COCO(str(session.project.path))
    (annotation,) = truth.loadAnns(truth.getAnnIds())
    np.testing.assert_array_equal(truth.annToMask(annotation), mask)
    assert annotation["area"] == mask.sum() and annotation["clicks"] == 1
    assert truth.loadImgs(annotation["image_id"])[0]["file_name"] == "a.png"
    assert truth.loadRes([annotation | {"score": 0.5}]).anns
    session.finish_image()

    again = prepare(config(categories="mug, cup"))[0].get("other").session
    assert again.index == 1  # where it was left
    assert again.project.names == ["red mug", "mug", "cup"]
    again.open(0)
    (saved,) = again.project.objects("a.png", (128, 128))
    np.testing.assert_array_equal(saved.mask(), mask)
    again.set_name("cup")
    again.rename_object(saved.id)
    categories = {c["id"]: c["name"] for c in content(again)["categories"]}
    assert categories[content(again)["annotations"][0]["category_id"]] == "cup"
    again.remove_object(saved.id)
    assert content(again)["annotations"] == [] and content(again)["images"][0]["done"]
    with pytest.raises(ValueError, match="removed"):
        again.rename_object(saved.id)


def test_a_failed_write_keeps_the_clicks(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.set_name("mug")
    session.click(30, 40, True)
    session.save_object()
    before = session.project.path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(project_module, "write_atomic", full)
    session.click(80, 40, True)
    with pytest.raises(OSError, match="No space"):
        session.save_object()
    assert len(session.steps) == 1 and len(session.objects()) == 1
    assert session.project.path.read_bytes() == before
    monkeypatch.undo()
    session.save_object()
    assert len(content(session)["annotations"]) == 2


def test_results_of_other_tools_are_kept(config: Any, photos: Path) -> None:
    """Polygons, text ids, further entries and images elsewhere outlive a session."""
    out = photos.parent / "out"
    out.mkdir()
    polygon = [[10, 10, 60, 10, 60, 50, 10, 50]]
    earlier = {
        "licenses": [{"id": 3}],
        "images": [
            {"id": "x1", "file_name": "b.png", "height": 98, "width": 128, "coco_url": "u"},
            {"id": 7, "file_name": "elsewhere.png", "height": 9, "width": 9},
        ],
        "categories": [{"id": 40, "name": "cat"}],
        "annotations": [
            {"id": 5, "image_id": "x1", "category_id": 40, "segmentation": polygon, "own": 1},
            {"id": 6, "image_id": "x1", "category_id": 40, "segmentation": {"counts": "?"}},
        ],
    }
    (out / "annotations.json").write_text(json.dumps(earlier))
    session = prepare(config())[0].get("tab").session
    session.open(1)
    (whole, broken) = session.project.objects("b.png", (98, 128))
    code = rle.merge(rle.frPyObjects(polygon, 98, 128))
    np.testing.assert_array_equal(whole.mask(), rle.decode(code))
    assert [bool(own["path"]) for own in session.objects()] == [True, False]
    session.set_name("dog")
    session.click(30, 40, True)
    session.save_object()
    now = content(session)
    assert now["licenses"] == earlier["licenses"] and now["images"] == earlier["images"]
    assert now["annotations"][:2] == earlier["annotations"]
    assert now["annotations"][2]["id"] == 7 and now["annotations"][2]["image_id"] == "x1"
    assert now["categories"] == [{"id": 40, "name": "cat"}, {"id": 41, "name": "dog"}]
    del broken

    (out / "annotations.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"annotations.json: no COCO JSON.*another --out"):
        prepare(config())


def test_odd_records_of_other_tools(tmp_path: Path, photos: Path) -> None:
    """Ids as text or as 1.0, empty masks, scores that are no numbers, sizes that are missing."""
    path = tmp_path / "annotations.json"
    own = {"image_id": "3", "category_id": 1.0}
    content = {
        "images": [{"id": "3", "file_name": "a.png"}],
        "categories": [{"id": 1.0, "name": "cat"}],
        "annotations": [
            own | {"id": 1.0, "segmentation": []},
            own | {"id": "2", "segmentation": [[1, 2, 3]], "score": "high"},
            own | {"id": 3.0, "segmentation": {"counts": [4, 5]}},
            own | {"id": 4.0, "segmentation": {"size": [128, 128], "counts": [-4, 5]}},
            own | {"id": 5.0, "segmentation": [["a", 1, 2, 3, 4, 5]]},
        ],
    }
    path.write_text(json.dumps(content))
    project = Project(photos, path, ["a.png", "b.png"])
    objects = project.objects("a.png", (128, 128))
    assert [own.name for own in objects] == ["cat"] * 5 and objects[1].score is None
    for saved in objects:
        with pytest.raises(ValueError, match="has no mask"):
            saved.mask()
    assert project.add("a.png", "dog", np.ones((128, 128), bool)) == 6
    project.set_done("b.png", (98, 128))
    now = json.loads(path.read_text())
    assert now["annotations"][:5] == content["annotations"] and len(now["annotations"]) == 6
    assert [own["id"] for own in now["images"]] == ["3", 4]
    assert [own["id"] for own in now["categories"]] == [1.0, 2]
    truth = COCO(str(path))
    assert truth.annToMask(truth.anns[6]).all()

    for table, records in (
        ("categories", [{"name": "cat"}]),
        ("images", [{"id": 3, "file_name": name} for name in "ab"]),
        ("annotations", [own | {"id": 1, "segmentation": [], "image_id": [3]}]),
        ("info", {"year": float("nan")}),
    ):
        path.write_text(json.dumps(content | {table: records}))
        with pytest.raises(ValueError, match="no COCO JSON"):
            Project(photos, path)


def test_an_image_that_was_replaced_is_refused(photos: Path) -> None:
    path = photos.parent / "annotations.json"
    project = Project(photos, path, ["a.png"])
    project.add("a.png", "mug", np.ones((128, 128), bool))
    cv2.imwrite(str(photos / "a.png"), np.zeros((50, 60, 3), np.uint8))
    with pytest.raises(ValueError, match="60 x 50 pixels, but .*json says 128 x 128"):
        project.read("a.png", 10**8)


def test_results_are_locked_before_they_are_read(config: Any, photos: Path) -> None:
    pytest.importorskip("nicegui", reason="the app needs NiceGUI: pip install 'sam-gym[app]'")
    path = photos.parent / "out" / "annotations.json"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with OutputPaths.prepare(str(path), "none").locked():
        path.write_text("half of it")
        with pytest.raises(FileExistsError, match="Another process"):
            serve(config(port=port))


def test_files_outside_of_the_folder_are_not_read(
    config: Any, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = photos.parent / "secret.png"
    secret.write_bytes((photos / "a.png").read_bytes())
    (photos / "link.png").symlink_to(secret)
    (photos / "scan.heic").write_bytes(b"")
    session = prepare(config())[0].get("tab").session
    assert re.findall("skipped (.*?):", capsys.readouterr().out) == ["link.png", "scan.heic"]
    monkeypatch.setattr("agents.app._MOST_LINES", 1)
    prepare(config())
    assert capsys.readouterr().out.endswith("skipped 1 more\n")
    assert session.project.files == ["a.png", "b.png", "more/c.png"]
    for file in ("../secret.png", str(secret), "link.png"):
        with pytest.raises(ValueError, match="not an image of this folder"):
            session.project.read(file, 10**8)
    # A link that came later.
    os.remove(photos / "b.png")
    (photos / "b.png").symlink_to(secret)
    with pytest.raises(ValueError, match="leaves its folder"):
        session.open(1)
    assert session.image is None


def test_images_that_cannot_be_opened_leave_the_open_one(config: Any, photos: Path) -> None:
    session = prepare(config(max_pixels=128 * 100))[0].get("tab").session
    session.open(1)
    with pytest.raises(ValueError, match="128 x 128 pixels are more than --max-pixels 12,800"):
        session.open(0)
    (photos / "a.png").write_bytes((photos / "a.png").read_bytes()[:300])
    with pytest.raises(ValueError, match="a.png"):
        session.open(0)
    assert session.image is not None and session.image.file == "b.png" and session.index == 1
    # The next image is behind it; when all others are done, it is not tried again.
    assert session.project.beside(1, -1) is None and session.project.beside(1, 1) == 2
    assert session.project.first_open() == 1
    for index in (1, 2):
        assert not session.project.is_finished
        session.open(index)
        session.finish_image()
    assert session.project.first_open() == 1
    assert session.project.is_finished and session.project.count_broken() == 1
    cv2.imwrite(str(photos / "a.png"), np.zeros((50, 60, 3), np.uint8))
    session.open(0)
    assert session.project.beside(1, -1) == 0 and session.project.count_broken() == 0
    assert not session.project.is_finished


def test_work_ends_where_files_cannot_be_read(config: Any, photos: Path) -> None:
    """Each is named once and passed over, also at the start and at the end."""
    for name in ("a.png", "more/c.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:300])
    tab = prepare(config())[0].get("tab")
    project = tab.folder
    assert project is not None
    (reason,) = tab.show(project)
    assert "a.png" in reason and tab.file == "b.png"
    tab.session.finish_image()
    assert not project.is_finished
    with pytest.raises(ValueError, match=r"c\.png"):
        tab.show(project)
    assert tab.file == "b.png" and project.is_finished
    assert (project.count_done(), project.count_broken()) == (1, 2)
    # After a restart, what is done is opened.
    again = prepare(config())[0].get("tab")
    assert len(again.show(again.queue)) == 2 and again.file == "b.png"
    (photos / "b.png").write_bytes(b"")
    alone = prepare(config())[0].get("tab")
    with pytest.raises(ValueError, match=r"(?s)a\.png.*c\.png.*b\.png"):
        alone.show(alone.queue)
    assert alone.file is None


# Everything mode -------------------------------------------------------------------------------


def test_suggestions(config: Any) -> None:
    from agents.annotation.everything import Generator

    generator = Generator(
        (3, 2), pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0
    )
    session = prepare(config(generator=generator))[0].get("tab").session
    session.open(0)
    assert session.image is not None
    search = session.suggest()
    search.wait()
    assert search.error == "" and search.done == search.total == 6
    assert len(session.suggestions) > 3 and session.known == 0
    masks = {k: rle.decode(s.record["segmentation"]) for k, s in enumerate(session.suggestions)}
    y, x = (int(v[0]) for v in np.nonzero(masks[2]))
    hit = session.suggestion_at(x, y)
    areas = {k: m.sum() for k, m in masks.items() if m[y, x]}
    assert areas[hit] == min(areas.values())
    with pytest.raises(ValueError, match="Name"):
        session.accept(hit)
    session.set_name("thing")
    count = len(session.suggestions)
    session.accept(hit)
    truth = COCO(str(session.project.path))
    np.testing.assert_array_equal(truth.annToMask(truth.loadAnns([1])[0]), masks[hit])
    session.select(-1)
    assert session.selected == count - 2
    session.dismiss(session.selected)
    assert session.selected == count - 3 == len(session.suggestions) - 1
    with pytest.raises(ValueError, match="is gone"):
        session.accept(count - 2)
    session.accept_all()
    assert len(content(session)["annotations"]) == count - 1 and not session.suggestions
    # What is saved is not suggested again.
    session.suggest().wait()
    assert not session.suggestions and session.selected == -1 and session.known == count
    for own in session.objects():
        session.remove_object(own["id"])
    session.suggest().wait()
    assert len(session.suggestions) == count and session.known == 0
    empty = np.argwhere(sum(masks.values()) == 0)
    if len(empty):
        assert "No suggestion" in session.answer(*empty[0][::-1], True)
    session.open(1)
    assert not session.suggestions and session.selected == -1


def test_a_search_that_is_stopped_at_its_end_shows_nothing(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next click would save a suggestion that nobody sees."""
    session = prepare(config())[0].get("tab").session
    session.open(0)
    session.accept_all()  # nothing: no change that could be undone
    assert session.undo() == "Nothing to undo in this image."

    def stopping(mask: np.ndarray) -> str:
        session.stop_search()
        return outline(mask)

    monkeypatch.setattr(session_module, "outline", stopping)
    search = session.suggest()
    search.wait()
    assert search.error == "" and search.done == search.total and not session.suggestions


def test_a_search_ends_with_its_image(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving the image stops it after the present decoder call, as does Esc."""
    from agents.annotation.everything import Generator

    generator = Generator((4, 1), pred_iou_thresh=0.0, points_per_batch=1, crop_n_layers=1)
    session = prepare(config(generator=generator))[0].get("tab").session
    session.open(0)
    backbone = session.models.backbone
    decode, turns = backbone.decode_tokens, threading.Semaphore(0)

    def slow(*args: Any) -> Any:
        assert turns.acquire(timeout=60)
        return decode(*args)

    monkeypatch.setattr(backbone, "decode_tokens", slow)
    search = session.suggest()
    assert search.total == 4 + 4 * 4
    with pytest.raises(ValueError, match=r"Looking for everything: wait for it, or stop it \(Esc"):
        session.suggest()
    session.open(1)
    turns.release(1)
    search.wait()
    assert (search.done, search.error) == (1, "") and not session.suggestions
    other = session.suggest()  # another one may begin at once
    assert session.stop_search() and not session.stop_search()
    turns.release(1)
    other.wait()
    assert other.done == 1 and not session.suggestions
    turns.release(100)
    whole = session.suggest()
    whole.wait()
    assert whole.done == whole.total


# Undo ------------------------------------------------------------------------------------------


def test_changes_of_saved_objects_can_be_undone(config: Any, session: Session) -> None:
    """In their order, each in the file at once; what has made an object comes back."""
    assert session.undo() == "Nothing to undo in this image."
    session.set_name("mug")
    session.click(30, 40, True)
    session.click(60, 40, False)
    mask = session.mask()
    session.save_object()
    saved = content(session)
    (number,) = (own["id"] for own in session.objects())
    session.set_name("cup")
    session.rename_object(number)
    renamed = content(session)
    assert [own["name"] for own in renamed["categories"]] == ["cup"]
    session.click(90, 90, True)
    session.save_object()
    two = content(session)
    session.remove_object(number)
    assert len(content(session)["annotations"]) == 1
    assert session.undo() == "Undone: remove cup." and content(session) == two
    assert session.undo() == "Undone: save cup." and content(session) == renamed
    assert len(session.steps) == 1
    assert session.undo() == "" and not session.steps
    assert session.undo() == "Undone: rename to cup." and content(session) == saved
    session.undo()
    assert content(session)["annotations"] == content(session)["categories"] == []
    assert len(session.clicks) == 2 and session.name == "mug"
    np.testing.assert_array_equal(session.mask(), mask)
    session.save_object()
    # Another tab has changed the object since: it is kept.
    two_tab = Session(session.models, session.project)
    two_tab.open(0)
    two_tab.set_name("jar")
    two_tab.rename_object(session.objects()[0]["id"])
    with pytest.raises(ValueError, match="Somebody else"):
        session.undo()
    assert len(content(session)["annotations"]) == 1
    assert two_tab.undo() == "Undone: rename to jar."


def two_objects(session: Session) -> dict[str, Any]:
    """Save a mug and a cup; returns the content of the file."""
    for name, at in (("mug", (30, 40)), ("cup", (90, 70))):
        session.set_name(name)
        session.click(*at, True)
        session.save_object()
    return content(session)


def test_saved_objects_can_be_corrected(session: Session) -> None:
    """After a restart: the mask is the prompt; the record keeps its id, category and place."""
    two_objects(session)
    path = session.project.path
    before = content(session)
    before["annotations"][0]["attributes"] = {"seen by": "somebody"}
    path.write_text(json.dumps(before))
    project = Project(session.project.root, path, session.project.files)
    again = Session(session.models, project)
    again.open(0)
    again.set_name("jar")
    mug, cup = (own["id"] for own in again.objects())
    drawn = again.objects()[0]["path"]
    again.correct(mug)
    assert again.name == "mug" and not again.steps
    assert [own["is_current"] for own in again.objects()] == [True, False]
    assert again.current()["path"] == drawn
    (mark,) = again.current()["marks"]  # it stands for the clicks that are not known
    mask = project.objects("a.png", (128, 128))[0].mask()
    assert mask[int(mark["at"][1] * 128), int(mark["at"][0] * 128)]
    np.testing.assert_array_equal(again.mask(), mask)
    # Without a click, nothing is written.
    again.save_object()
    assert content(again) == before and again.name == "jar" and again.correction is None

    again.correct(mug)
    again.click(60, 100, False)
    corrected, score = again.mask(), again.predicted_iou
    again.save_object()
    assert again.name == "jar" and not again.steps and again.correction is None
    after = content(again)
    assert [own["id"] for own in after["annotations"]] == [mug, cup]
    assert after["annotations"][1] == before["annotations"][1]
    assert after["categories"] == before["categories"]
    record = after["annotations"][0]
    np.testing.assert_array_equal(rle.decode(record["segmentation"]) > 0, corrected)
    assert record["area"] == corrected.sum() and record["clicks"] == 2
    assert record["score"] == pytest.approx(score)
    assert record["attributes"] == {"seen by": "somebody"}

    # Undo: the correction with its click, the saved mask, and the object as it was.
    assert again.undo() == "Undone: correct mug." and content(again) == before
    np.testing.assert_array_equal(again.mask(), corrected)
    assert again.name == "mug" and len(again.steps) == 1
    assert again.undo() == ""
    np.testing.assert_array_equal(again.mask(), mask)
    assert again.undo() == "mug stays as it is." and again.name == "jar"
    assert again.undo() == "Nothing to undo in this image."


def test_corrections_go_on_from_the_clicks_of_this_tab(session: Session) -> None:
    """They get SAM's own logits and all clicks, as if the object had never been saved."""
    session.set_name("mug")
    session.click(30, 40, True)
    session.click(90, 70, False)
    session.click(50, 90, True)
    expected = session.mask()
    session.undo()
    session.save_object()
    (number,) = (own["id"] for own in session.objects())
    session.rename_object(number)
    session.correct(number)
    assert len(session.clicks) == 2
    session.click(50, 90, True)
    np.testing.assert_array_equal(session.mask(), expected)
    session.save_object()
    assert content(session)["annotations"][0]["clicks"] == 3
    session.correct(number)
    assert len(session.clicks) == 3
    # A box replaces all that.
    session.draw_box(20, 10, 100, 90)
    by_correction = session.mask()
    assert not session.clicks
    session.reset()
    session.draw_box(20, 10, 100, 90)
    np.testing.assert_array_equal(session.mask(), by_correction)


def test_a_corrected_object_may_get_another_name(session: Session) -> None:
    two_objects(session)
    mug, cup = (own["id"] for own in session.objects())
    session.correct(mug)
    session.set_name("jar")
    session.save_object()
    assert [own["name"] for own in session.objects()] == ["jar", "cup"]
    session.correct(cup)
    session.click(50, 90, True)
    session.set_name("bowl")
    session.save_object()
    assert [own["name"] for own in session.objects()] == ["jar", "bowl"]
    assert [own["name"] for own in content(session)["categories"]] == ["jar", "bowl"]
    session.undo()
    session.reset()
    session.undo()
    assert [own["name"] for own in session.objects()] == ["mug", "cup"]


def test_clicks_in_saved_masks(session: Session) -> None:
    """In an image that is opened they select; after a save they begin another object."""
    two_objects(session)
    masks = {own.id: own.mask() for own in session.project.objects("a.png", (128, 128))}
    mug, cup = masks
    y, x = (int(v[0]) for v in np.nonzero(masks[mug] & ~masks[cup]))
    session.press(x, y, True)
    assert session.correction is None and len(session.steps) == 1
    with pytest.raises(ValueError, match="Save"):
        session.correct(mug)
    assert session.let_go() == "" and session.steps  # nothing is lost
    session.reset()
    assert session.let_go()
    assert "mug" in session.press(x, y, True)
    assert session.correction is not None and session.correction.saved.id == mug
    assert not session.steps
    session.correct(cup)  # another, since nothing was changed
    assert session.name == "cup"
    session.reset()
    assert "mug" in session.press(x, y, False)
    assert len(session.steps) == 1 and not session.clicks[-1].positive
    session.reset()
    # Where masks overlap, the smaller one; outside of all, another object.
    both = masks[mug] & masks[cup]
    if both.any():
        y, x = (int(v[0]) for v in np.nonzero(both))
        session.press(x, y, True)
        small = min(masks, key=lambda number: masks[number].sum())
        assert session.correction is not None and session.correction.saved.id == small
        session.reset()
    y, x = (int(v[0]) for v in np.nonzero(~(masks[mug] | masks[cup])))
    assert session.press(x, y, True) == "" and session.correction is None
    session.reset()
    # Enter asks for another object, also inside a mask.
    assert session.save_object() == "The next click begins another object."
    y, x = (int(v[0]) for v in np.nonzero(masks[mug]))
    assert session.press(x, y, True) == "" and session.correction is None
    session.reset()
    with pytest.raises(ValueError, match="Nothing to save"):
        session.save_object()
    session.correct_beside(1)
    assert session.name == "mug"
    session.correct_beside(-1)
    assert session.name == "cup"


def test_corrections_and_other_tabs(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = two_objects(session)
    mug, cup = (own["id"] for own in session.objects())
    other = Session(session.models, session.project)
    other.open(0)
    session.correct(mug)
    session.click(50, 90, True)
    # A write that fails keeps all.
    with monkeypatch.context() as context:

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no space left")

        context.setattr(project_module, "write_atomic", fail)
        with pytest.raises(OSError, match="no space"):
            session.save_object()
    assert content(session) == saved and session.correction and len(session.steps) == 1
    other.correct(mug)
    other.click(20, 90, True)
    other.save_object()
    theirs = content(session)
    with pytest.raises(ValueError, match="Somebody else has changed"):
        session.save_object()
    assert content(session) == theirs and len(session.steps) == 1
    session.reset()
    session.correct(mug)
    session.click(50, 90, True)
    other.remove_object(mug)
    with pytest.raises(ValueError, match="Somebody else has removed"):
        session.save_object()
    session.reset()
    with pytest.raises(ValueError, match="Somebody else has removed"):
        session.correct(mug)
    # One that is removed here is let go.
    session.correct(cup)
    session.remove_object(cup)
    assert session.correction is None and not session.objects()
    # The image may be left while an object is selected.
    session.undo()
    session.set_name("jar")
    session.correct(cup)
    session.open(1)
    assert session.name == "jar" and session.correction is None


def test_accepted_suggestions_can_be_taken_back(config: Any) -> None:
    from agents.annotation.everything import Generator

    generator = Generator((3, 2), pred_iou_thresh=0.0, stability_score_thresh=0.0)
    session = prepare(config(generator=generator))[0].get("tab").session
    session.open(0)
    session.suggest().wait()
    session.suggestions = [replace(own) for own in session.suggestions for _ in range(3)]
    count = len(session.suggestions)
    session.set_name("thing")
    session.accept(0)
    session.accept_all()
    assert len(content(session)["annotations"]) == count
    rest = "suggestion" if count == 2 else "suggestions"
    assert session.undo() == f"Undone: accept {count - 1} {rest}."
    assert len(content(session)["annotations"]) == 1 and len(session.suggestions) == count - 1
    assert session.undo() == "Undone: accept 1 suggestion."
    assert content(session)["annotations"] == [] and len(session.suggestions) == count


def test_categories_go_with_their_last_object(config: Any, session: Session) -> None:
    """But for those of the file that was opened, and those that were asked for."""
    for name in ("kept", "slip"):
        session.set_name(name)
        session.click(30, 40, True)
        session.save_object()
    number = session.objects()[1]["id"]
    assert session.names() == ["kept", "slip"]
    session.remove_object(number)
    assert [own["name"] for own in content(session)["categories"]] == ["kept"]
    later = prepare(config(categories="mug"))[0].get("other").session
    assert later.project.names == ["kept", "mug"]
    later.open(0)
    later.remove_object(later.objects()[0]["id"])
    assert [own["name"] for own in content(later)["categories"]] == ["kept", "mug"]


def test_offered_names_keep_their_places(config: Any, make_policy: Any) -> None:
    """Keys 1 to 9 mean the same as long as the tab is open."""
    session = prepare(config(policy=make_policy(), categories="kiwi"))[0].get("tab").session
    session.open(0)
    before = session.names()
    assert session.knows_no_name()
    assert before == ["kiwi", *session.models.player.known]
    for name in (before[4], "slip"):
        session.set_name(name)
        session.click(30, 40, True)
        session.save_object()
    assert session.names() == [*before, "slip"] and not session.knows_no_name()
    session.remove_object(session.objects()[1]["id"])
    session.set_name("jar")
    session.click(30, 40, True)
    session.save_object()
    assert session.names() == [*before, "slip", "jar"]


# The agent -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "search"), [(0, 0), (1, 0), (2, 0), (0, 3), (1, 3)])
def test_an_agent_left_alone_makes_the_mask_that_annotate_makes(
    config: Any, make_policy: Any, seed: int, search: int
) -> None:
    policy = make_policy(seed, search)
    session = prepare(config(policy=policy))[0].get("tab").session
    session.open(1)
    image = session.image
    assert image is not None
    session.set_name("star")
    while session.agent_step():
        pass
    assert len(session.steps) == 3 and all(click.by_agent for click in session.clicks)
    session.heat()
    assert len(session.steps) == 3  # clicks that were only decoded are not kept
    names = ["star", *(n for n in session.models.player.known if n != "star")]
    annotator = ClickAnnotator(PolicyAgent.load(policy, "cpu"), names, 1, min_score=-99.0)
    (item,) = annotator.stream(iter([(("b.png", 0), image.pixels)]))
    (annotation,) = item.annotations
    np.testing.assert_array_equal(session.mask(), rle.decode(annotation["segmentation"]))
    assert session.predicted_iou == pytest.approx(annotation["score"], abs=1e-5)


def test_people_take_over_and_give_back(config: Any, make_policy: Any) -> None:
    session = prepare(config(policy=make_policy()))[0].get("tab").session
    session.open(0)
    with pytest.raises(ValueError, match="Name"):
        session.agent_step()
    session.set_name("starr")
    with pytest.raises(
        ValueError, match=r"^This agent knows: .*star.*; use Suggest for other things\.$"
    ):
        session.heat()
    session.set_name("star")
    before = session.proposal().chances
    assert before.shape == (2, 16, 16) and before.sum() == pytest.approx(1, abs=1e-5)
    session.click(30, 40, True)
    assert np.abs(session.proposal().chances - before).max() > 0
    session.agent_step()
    assert [click.by_agent for click in session.clicks] == [False, True]
    session.undo()
    session.undo()
    np.testing.assert_allclose(session.proposal().chances, before, atol=1e-6)
    header = session.heat().split(",")
    assert header[0] == "data:image/png;base64"
    session.project.files.append("gone.png")
    with pytest.raises((ValueError, OSError), match="gone.png"):
        session.open(3)


def test_an_agent_that_stops(config: Any, make_policy: Any) -> None:
    session = prepare(config(policy=make_policy(stop=True)))[0].get("tab").session
    session.open(0)
    session.set_name("star")
    player = session.models.player
    assert player is not None
    import torch

    with torch.no_grad():
        player.policy.action_net.others.bias[0] = 100.0
    assert session.proposal().other == "stop" and session.agent_step() is False
    assert not session.steps


def test_agents_of_instances_look_at_the_first_click(config: Any, make_policy: Any) -> None:
    session = prepare(config(policy=make_policy(target="instance")))[0].get("tab").session
    session.open(0)
    with pytest.raises(ValueError, match="click it first"):
        session.agent_step()
    session.click(30, 40, True)
    here = session.proposal().chances
    session.reset()
    session.click(100, 90, True)
    assert np.abs(session.proposal().chances - here).max() > 0
    session.agent_step()
    assert len(session.steps) == 2


def test_without_an_agent(session: Session, config: Any, make_policy: Any) -> None:
    session.set_name("star")
    with pytest.raises(ValueError, match="--policy"):
        session.agent_step()
    with pytest.raises(ValueError, match="not both"):
        load_models(config(policy=make_policy(), backbone="tiny"))
    with pytest.raises(ValueError, match="--adapter is for --backbone"):
        load_models(AppConfig(adapter="a.safetensors"))


# Tabs ------------------------------------------------------------------------------------------


def png(width: int = 40, height: int = 30) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(data, "png")
    return data.getvalue()


def test_tabs_do_not_see_each_other(config: Any) -> None:
    tabs = prepare(config())[0]
    one, two = tabs.get("one"), tabs.get("two")
    assert tabs.get("one") is one
    one.session.open(0)
    one.session.set_name("mug")
    one.session.click(30, 40, True)
    two.session.open(0)
    assert not two.session.steps and two.session.name == ""
    one.session.save_object()
    two.session.set_name("cup")
    two.session.click(80, 80, True)
    two.session.save_object()
    assert len(content(one.session)["annotations"]) == 2  # nobody's work is lost

    one.show(*tabs.upload(one, "../../a.png", png()))
    assert one.uploads.files == ["__..__a.png"]
    assert two.uploads.files == [] and one.session.project is one.uploads
    one.session.click(10, 10, True)
    one.session.save_object()
    assert len(content(two.session)["annotations"]) == 2
    assert one.session.image is not None and two.session.image is not None
    assert tabs.shown(one.session.image.key) == one.session.image.shown
    assert tabs.shown("a.png") is None
    # After a crash, each browser finds its own again.
    later = prepare(config())[0]
    assert later.get("one").uploads.files == one.uploads.files
    assert later.get("two").uploads.files == []
    written = {p.relative_to(tabs.out).parts[0] for p in tabs.out.rglob("*") if p.is_file()}
    assert written == {"annotations.json", "uploads"}


def test_uploads_are_bounded(config: Any) -> None:
    tabs = prepare(config(max_uploads=2, max_pixels=4000, images=None))[0]
    tab = tabs.get("one")
    with pytest.raises(ValueError, match="more than --max-pixels"):
        tabs.upload(tab, "big.png", png(100, 100))
    with pytest.raises(ValueError, match=r"not one of .avif"):
        tabs.upload(tab, "page.html", b"<html>")
    with pytest.raises(ValueError, match="text.png"):
        tabs.upload(tab, "text.png", b"no image")
    assert tab.uploads.files == [] and not list(tab.uploads.root.iterdir())
    tabs.upload(tab, "a.png", png())
    tabs.upload(tab, "A.PNG", png(50))
    assert tab.uploads.files == ["a.png", "A-2.PNG"]
    tabs.max_uploads = 3
    tabs.upload(tab, 100 * "画" + ".png", png())  # longer than names of files may be
    assert tab.uploads.files[2] == 66 * "画" + ".png"
    with pytest.raises(ValueError, match="No more than 3 images"):
        tabs.upload(tab, "c.png", png())


def test_forgotten_tabs_let_their_images_go(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.annotation.interactive.workspaces.MAX_TABS", 2)
    tabs: Workspaces = prepare(config())[0]
    first = tabs.get("0")
    first.session.open(0)
    tabs.get("1")
    tabs.use(first)
    second = tabs.get("1")
    tabs.use(first)
    tabs.get("2")
    assert first.session.image is not None and tabs.get("0") is first
    with pytest.raises(ValueError, match="reload the page"):
        tabs.use(second)
    for name in ("3", "4"):
        tabs.get(name)
    assert first.session.image is None and tabs.get("0") is not first


# Who may talk to it ----------------------------------------------------------------------------


def ask(
    guard: Guard, body: bytes = b"", kind: str = "http", query: str = "", **headers: str
) -> Any:
    """Return the messages that a request gets; the headers' names have "_" for "-"."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": kind, "headers": raw, "query_string": query.encode(), "path": "//evil.org"}
    asyncio.run(guard(scope, receive, send))
    return sent


async def application(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "answer", "of": message["type"]})


def test_other_pages_cannot_reach_a_loopback_app() -> None:
    guard = Guard(application, None, LOOPBACK, 100)
    assert ask(guard, host="127.0.0.1:80")[0]["of"] == "http.request"
    assert ask(guard, host="[::1]:80", origin="http://[::1]:80")[0]["type"] == "answer"
    for headers in (
        {"host": "evil.org"},
        {},
        {"host": "localhost:80", "origin": "http://evil.org"},
        {"host": "localhost:80", "origin": "http://localhost:81"},
        {"host": "localhost:80", "origin": "null"},
        {"host": "localhost:80", "sec_fetch_site": "cross-site", "sec_fetch_dest": "iframe"},
        {"host": "localhost:80", "sec_fetch_site": "same-site", "sec_fetch_dest": "image"},
    ):
        assert ask(guard, **headers)[0]["status"] == 403
        assert ask(guard, kind="websocket", **headers)[0]["type"] == "websocket.close"
    link = {"host": "localhost:80", "sec_fetch_site": "cross-site", "sec_fetch_dest": "document"}
    own = {"host": "localhost:80", "sec_fetch_site": "same-origin", "sec_fetch_dest": "image"}
    assert ask(guard, **link)[0]["type"] == ask(guard, **own)[0]["type"] == "answer"


def test_the_token() -> None:
    guard = Guard(application, "secrét", None, 100)
    assert ask(guard, host="a")[0]["status"] == 401
    assert ask(guard, host="a", query="token=secret")[0]["status"] == 401
    assert ask(guard, host="a", cookie="sam_gym_token=x")[0]["status"] == 401
    assert ask(guard, kind="websocket", host="a")[0]["type"] == "websocket.close"
    # Cookies of other servers on the same host are sent, too.
    guard = Guard(application, "sé c;r=t+", None, 100)
    start, _ = ask(guard, host="a", query="token=s%C3%A9%20c%3Br%3Dt%2B")
    cookie = dict(start["headers"])[b"set-cookie"].decode().split(";")[0]
    assert cookie.isascii()
    for others in ("", '; prefs={"a": "b"}; x@', "; sam_gym_token=of another app"):
        headers = {"host": "a", "cookie": f'pre={{"c": 1}}; {cookie}{others}'}
        assert ask(guard, **headers)[0]["type"] == "answer"
    assert ask(Guard(application, "", None, 100), host="a")[0]["status"] == 401
    guard = Guard(application, "s3cret", None, 100)
    start, _ = ask(guard, host="a", query="token=s3cret")
    headers = dict(start["headers"])
    assert start["status"] == 303 and headers[b"location"] == b"/"
    cookie = headers[b"set-cookie"].decode()
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert ask(guard, host="a", cookie=cookie.split(";")[0])[0]["type"] == "answer"


def test_bodies_are_bounded() -> None:
    guard = Guard(application, None, None, 100)
    assert ask(guard, b"x" * 100, host="a", content_length="100")[0]["of"] == "http.request"
    assert ask(guard, b"x" * 101, host="a", content_length="101")[0]["status"] == 413
    assert ask(guard, host="a", content_length="-1")[0]["status"] == 413
    assert ask(guard, b"x" * 101, host="a")[0]["of"] == "http.disconnect"  # it did not say


def test_wrong_options(config: Any, photos: Path) -> None:
    for more, message in (
        ({"images": str(photos / "none")}, "no such folder"),
        ({"out": str(photos / "a.png")}, "is a file"),
        ({"policy": "explicitt"}, "no such policy"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            prepare(config(**more))
    pytest.importorskip("nicegui", reason="the app needs NiceGUI: pip install 'sam-gym[app]'")
    with pytest.raises(OSError, match="--host 203.0.113.7 --port 9: cannot listen"):
        serve(config(host="203.0.113.7", port=9))
    with pytest.raises(ValueError, match="--token is empty"):
        serve(config(host="203.0.113.7", port=9, token=""))


def test_keys_of_the_browser_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nicegui", reason="the app needs NiceGUI: pip install 'sam-gym[app]'")
    from agents.annotation.interactive import page, widgets

    monkeypatch.setattr(page.Page, "_build", lambda self: None)
    own = page.Page(MagicMock(), MagicMock(), MagicMock())
    script = Path(page.__file__).with_name("canvas.js").read_text()
    (keys,) = re.findall(r'const keys = "(.*)";', script)
    panels = [own.images.actions, own.videos.actions]
    assert {key for key in keys.split() if not key.isdecimal()} == {
        key for actions in [own.actions, *panels] for key in actions
    }
    assert not any(own.actions.keys() & actions.keys() for actions in panels)
    # What is sent is UTF-8, whatever the names of files are, and ids may be of any kind.
    notify = MagicMock()
    monkeypatch.setattr(page.ui, "notify", notify)
    page.Page.tell(MagicMock(), "\udcff.png: not an image")
    notify.call_args.args[0].encode()
    assert widgets.css_colour(1) != widgets.css_colour("id of text")


def test_the_page_tells_when_all_that_can_be_read_is_done(
    config: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nicegui", reason="the app needs NiceGUI: pip install 'sam-gym[app]'")
    from agents.annotation.interactive import page

    async def at_once(work: Any, *args: Any) -> Any:
        return work(*args)

    async def drawn(*_: Any) -> None:
        pass

    for name in ("_build", "_show_all", "show_queue"):
        monkeypatch.setattr(page.Page, name, drawn if name != "_build" else lambda _: None)
    monkeypatch.setattr(page, "in_thread", at_once)
    (photos / "more" / "c.png").write_bytes(b"")
    tabs = prepare(config())[0]
    own = page.Page(MagicMock(), tabs, tabs.get("tab"))
    own.status, told = MagicMock(), []
    monkeypatch.setattr(own, "tell", told.append)

    async def work() -> None:
        await own.begin()
        await own.done()
        assert own.workspace.file == "b.png" and not told
        await own.done()
        await own.go(1)

    asyncio.run(work())
    assert "c.png" in told[0] and told[1:] == [
        "All readable files are done (1 could not be read).",
        "This is the last file that can be opened.",
    ]


def test_the_page_tells_of_a_search_in_its_image_alone(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nicegui", reason="the app needs NiceGUI: pip install 'sam-gym[app]'")
    from agents.annotation.everything import Generator
    from agents.annotation.interactive.image_panel import ImagePanel

    generator = Generator((3, 2), pred_iou_thresh=0.0, stability_score_thresh=0.0)
    tabs = prepare(config(generator=generator))[0]
    page = MagicMock(workspaces=tabs, workspace=tabs.get("tab"))
    session = page.workspace.session
    session.open(0)

    async def do(work: Any, *args: Any) -> tuple[bool, Any]:
        page.status.text = ""
        return True, work(*args)

    page.do, page.status.set_text = do, lambda text: setattr(page.status, "text", text)
    panel = ImagePanel(page)
    panel.timer, panel.finder = MagicMock(), MagicMock()
    monkeypatch.setattr(panel, "_show_suggestions", lambda: None)

    async def work() -> None:
        await panel.suggest()
        session.search.wait()
        await panel._poll()
        count = len(session.suggestions)
        assert page.tell.call_args.args[0].startswith(f"{count} suggestion")
        # One that has not ended when the image is left.
        page.tell.reset_mock()
        with session.lock:  # it needs this to end
            await panel.suggest()
            assert page.status.text.startswith("Looking for everything")
            session.open(1)
        await panel._poll()
        page.tell.assert_not_called()
        assert page.status.text == "" and not panel.timer.active and not session.suggestions

    asyncio.run(work())


def test_a_project_of_many_objects_is_written_quickly(tmp_path: Path) -> None:
    """Only what is new is formatted again."""
    project = Project(tmp_path, tmp_path / "annotations.json", ["a.png"])
    mask = np.zeros((20, 20), bool)
    mask[3:9, 4:12] = True
    project.add_all("a.png", [("mug", mask, {})] * 500)
    texts = {id(row) for row in project._annotations.values()}
    project.add("a.png", "mug", mask)
    assert len(texts - {id(row) for row in project._annotations.values()}) == 0
    assert len(COCO(str(project.path)).anns) == 501
