"""Videos in the app without a browser: prompts, passes, undo, results, tabs, what is refused."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from agents.annotation.interactive import masklets as masklets_module
from agents.annotation.interactive import propagation
from agents.annotation.interactive.library import VideoLibrary, is_video
from agents.annotation.interactive.masklets import Masklets, ranges
from agents.annotation.interactive.propagation import start_of
from agents.annotation.interactive.video_session import VideoSession
from agents.annotation.interactive.workspaces import Workspaces
from agents.annotation.video import find_videos
from agents.app import AppConfig, load_models, prepare, serve
from sam_gym.backbones import load_backbone
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data import make_video_dataset
from sam_gym.data.videos.writer import write_masklets

FRAMES, SIZE = 8, 48


def write_clip(path: Path, frames: int = FRAMES, size: int = SIZE) -> None:
    """A video of smooth noise that moves."""
    rng = np.random.default_rng(len(path.stem))
    wide = cv2.resize(rng.integers(0, 255, (8, 16, 3), np.uint8), (2 * size, size))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12, (size, size))
    for frame in range(frames):
        writer.write(np.ascontiguousarray(wide[:, 2 * frame : 2 * frame + size]))
    writer.release()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A photo, two videos, one of them in a folder within, and a folder of frames elsewhere."""
    root = tmp_path / "root"
    (root / "more").mkdir(parents=True)
    cv2.imwrite(str(root / "photo.png"), np.full((40, 50, 3), 90, np.uint8))
    write_clip(root / "one.avi")
    write_clip(root / "more" / "two.avi")
    return root


@pytest.fixture
def config(root: Path, tiny_env: dict[str, Any], tiny_video: str) -> Callable[..., AppConfig]:
    """Returns a config of the app over tiny models."""

    def config(**more: Any) -> AppConfig:
        own = {"images": str(root), "out": str(root.parent / "out"), "device": "cpu"}
        own |= {"backbone": "tiny", "checkpoint": tiny_env["checkpoint"], "tracker": tiny_video}
        return AppConfig(**(own | more))

    return config


@pytest.fixture
def tabs(config: Callable[..., AppConfig]) -> Workspaces:
    return prepare(config())[0]


def opened(tabs: Workspaces, tab: str = "tab", index: int = 1) -> VideoSession:
    """The session of a tab with a video of the library open: one.avi."""
    workspace = tabs.get(tab)
    assert workspace.library is not None
    workspace.show(workspace.library, index)
    return workspace.videos


def ended(session: VideoSession) -> int:
    """Wait for a pass; return its number of frames."""
    assert session.job is not None
    session.job.wait()
    assert session.job.error == ""
    return session.job.done


def masklets(session: VideoSession) -> Masklets:
    assert session.video is not None
    return session.video.masklets


def file(session: VideoSession) -> dict[str, Any]:
    return json.loads(masklets(session).path.read_text())


def all_masks(session: VideoSession) -> dict[tuple[int, int], bytes]:
    size = masklets(session).size
    return {
        (own.id, frame): np.packbits(mask.decoded(size)).tobytes()
        for own in masklets(session).objects.values()
        for frame, mask in own.masks.items()
        if mask is not None
    }


# Prompts and passes ----------------------------------------------------------------------------


def test_masks_are_those_of_the_tracker(tabs: Workspaces, root: Path, tiny_video: str) -> None:
    """Clicks and a pass give what a session of the tracker gives."""
    session = opened(tabs)
    session.click(20, 24, True)
    session.click(40, 5, False)
    session.select(None)
    session.draw_box(30, 40, 10, 4)
    assert [own.name for own in masklets(session).objects.values()] == ["object"] * 2
    session.propagate(reverse=False)
    assert ended(session) == FRAMES

    tracker = VideoTracker(load_backbone(tiny_video, device="cpu"), keep="window")
    alone = tracker.open([root / "one.avi"])
    alone.prompt(0, 0, 1, [[20, 24]], [1])
    first = alone.prompt(0, 0, 1, [[40, 5]], [0], clear=False).masks()[0]
    box = alone.prompt(0, 0, 2, box=[10, 4, 30, 40]).masks()[1]
    # A pass begins with the masks that were seen, as they were saved.
    again = tracker.open([root / "one.avi"])
    again.prompt(0, 0, 1, mask=first)
    again.prompt(0, 0, 2, mask=box)
    expected = {
        (number, step.frame): np.packbits(mask).tobytes()
        for step in again.propagate()
        for number, mask in zip(step.objects, step.masks(), strict=True)
        if mask.any()
    }
    found = all_masks(session)
    assert found[1, 0] == np.packbits(first).tobytes() and found[2, 0] == np.packbits(box).tobytes()
    later = {key: mask for key, mask in expected.items() if key[1]}
    assert later and later == {key: mask for key, mask in found.items() if key[1]}


def test_a_correction_changes_what_follows_and_nothing_before(tabs: Workspaces) -> None:
    session = opened(tabs)
    session.click(20, 24, True)
    session.select(None)
    session.click(35, 10, True)
    session.show(7)
    session.propagate(reverse=False)
    assert ended(session) == FRAMES  # from the prompts on, wherever one looks
    before = all_masks(session)
    session.select(1)
    session.show(4)
    session.click(5, 40, True)
    session.click(44, 44, True)
    corrected = all_masks(session)
    assert {key for key in corrected if corrected[key] != before.get(key)} == {(1, 4)}
    session.propagate(reverse=False, only_selected=True)
    assert ended(session) == FRAMES - 4
    after = all_masks(session)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert changed <= {(1, frame) for frame in range(4, FRAMES)} and len(changed) > 1
    assert after[1, 4] == corrected[1, 4]
    # Backwards, to the prompt in frame 0, which stays.
    session.propagate(reverse=True, only_selected=True)
    assert ended(session) == 5
    assert all_masks(session)[1, 0] == before[1, 0]

    # A whole pass is one step of undo.
    session.undo()
    assert all_masks(session) == after
    session.undo()
    assert all_masks(session) == corrected
    session.undo()
    session.undo()
    assert all_masks(session) == before
    for _ in range(10):
        session.undo()
    assert not masklets(session).objects and file(session)["annotations"] == []


def test_objects_that_begin_late_are_tracked_from_there(tabs: Workspaces) -> None:
    session = opened(tabs)
    session.show(2)
    session.click(20, 24, True)
    session.select(None)
    session.show(5)
    session.click(35, 10, True)
    first, second = masklets(session).objects.values()
    assert start_of(first, 5, reverse=False) == 2 and start_of(first, 0, reverse=False) == 2
    assert start_of(second, 5, reverse=True) == 5 and start_of(first, 1, reverse=True) == 2
    assert start_of(second, 3, reverse=True) == 5 and start_of(first, 7, reverse=True) == 2
    session.propagate(reverse=False)
    assert ended(session) == FRAMES - 2
    assert sorted(first.masks) == list(range(2, FRAMES))
    assert sorted(second.masks) == list(range(5, FRAMES))
    session.propagate(reverse=True)
    ended(session)
    assert sorted(first.masks) == sorted(second.masks) == list(range(FRAMES))
    session.show(0)
    with pytest.raises(ValueError, match="Nothing to track: this is the first frame"):
        session.propagate(reverse=True)


def test_not_in_sight_clear_and_remove(tabs: Workspaces) -> None:
    session = opened(tabs)
    with pytest.raises(ValueError, match="Nothing to track: click"):
        session.propagate(reverse=False)
    with pytest.raises(ValueError, match="Select an object"):
        session.hide()
    session.set_name("  red   fish ")
    session.click(20, 24, True)
    session.show(3)
    session.hide()
    session.propagate(reverse=False)
    ended(session)
    own = masklets(session).objects[1]
    assert own.name == "red fish" and own.masks[3] is None and own.prompts[3].clicks == ()
    assert file(session)["tracks"][0]["absent"][0][0] <= 3
    session.clear()
    assert 3 not in own.masks and 3 not in own.prompts
    session.set_name("cat")
    session.rename(1)
    assert {own["name"] for own in file(session)["categories"]} == {"cat"}
    session.remove(1)
    assert not masklets(session).objects and session.selected is None
    session.undo()
    session.undo()
    assert masklets(session).objects[1].name == "red fish"
    session.select_beside(1)
    assert session.selected == 1
    with pytest.raises(ValueError, match="no area"):
        session.draw_box(100, 100, 200, 200)


def test_a_name_that_is_typed_after_the_click(tabs: Workspaces) -> None:
    """The selected object takes it while it has none of its own; undo takes it back."""
    session = opened(tabs)
    assert session.name_selected() == ""
    session.click(20, 24, True)
    for typed in ("c", "ca", "car"):
        session.set_name(typed)
    assert session.name_selected() == 'object 1 is "car" now.'
    assert [own["name"] for own in file(session)["categories"]] == ["car"]
    session.set_name("dog")
    assert "keeps its name: the pencil" in session.name_selected()
    assert masklets(session).objects[1].name == "car"
    session.undo()
    assert masklets(session).objects[1].name == "object" and len(all_masks(session)) == 1
    assert session.selected == 1 and session.name_selected() == 'object 1 is "dog" now.'


def test_a_name_that_is_typed_while_the_object_is_tracked(
    tabs: Workspaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass goes on, and the object is named at its end."""
    session = opened(tabs)
    session.click(20, 24, True)
    slow = slow_pass(session, tabs, monkeypatch)
    session.set_name("fish")
    assert "when tracking has ended" in session.name_selected() and session.is_busy
    slow.turns.release(20)
    assert ended(session) == FRAMES
    assert file(session)["tracks"][0]["name"] == "fish"
    session.undo()
    assert masklets(session).objects[1].name == "object" and len(all_masks(session)) > 1
    session.undo()
    assert len(all_masks(session)) == 1


def test_a_click_inside_a_mask_selects_its_object(
    config: Callable[..., AppConfig], tabs: Workspaces
) -> None:
    """Where nothing is selected, as after a restart, and nobody has asked for another object."""
    first = opened(tabs)
    first.set_name("car")
    assert first.draw_box(4, 4, 30, 40) == "car 1 begins here."
    first.propagate(reverse=False)
    ended(first)
    session = opened(prepare(config())[0], "other")
    size = masklets(session).size
    session.show(3)
    mask = masklets(session).objects[1].masks[3]
    assert mask is not None and session.selected is None
    (y, x), (far_y, far_x) = (
        np.argwhere(mask.decoded(size) == inside)[0].tolist() for inside in (True, False)
    )
    with pytest.raises(ValueError, match="negative click corrects an object: select one"):
        session.click(far_x, far_y, False)
    assert session.click(x, y, False).startswith("car 1 is selected and corrected")
    assert session.selected == 1 and not masklets(session).objects[1].prompts[3].clicks[0].positive
    assert session.click(far_x, far_y, True) == "" and len(masklets(session).objects) == 1
    session.undo()
    session.undo()
    session = opened(prepare(config())[0], "third")
    session.show(3)
    # Beside it, another begins, also where one has asked for it; undo asks again.
    # No id comes twice.
    assert session.click(far_x, far_y, True) == "object 2 begins here."
    session.undo()
    assert session.click(x, y, True).startswith("car 1 is selected")
    session.undo()
    session.select(None)
    assert session.click(x, y, True) == "object 3 begins here."
    session.undo()
    assert session.click(x, y, True) == "object 4 begins here."


def test_offered_names_keep_their_places(tabs: Workspaces) -> None:
    session = opened(tabs)
    for name in ("car", "dog"):
        session.set_name(name)
        session.select(None)
        session.click(20, 24, True)
        assert session.names()[-1] == name
    session.set_name("tree")
    session.rename(1)
    assert session.names() == ["car", "dog", "tree"]
    session.remove(2)
    session.set_name("")
    session.select(None)
    session.click(20, 24, True)
    assert session.names() == ["car", "dog", "tree"]
    session.open(0)
    assert session.names() == ["car", "dog", "tree"]


class Slow:
    """A tracker's `encode` that waits for its turns."""

    def __init__(self, tracker: VideoTracker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turns, self.started = threading.Semaphore(0), threading.Event()
        encode = tracker.encode

        def slow(images: Any) -> Any:
            if threading.current_thread().daemon:  # of a pass
                self.started.set()
                assert self.turns.acquire(timeout=60)
            return encode(images)

        monkeypatch.setattr(tracker, "encode", slow)
        monkeypatch.setattr(tracker, "batch_size", 1)


def slow_pass(session: VideoSession, tabs: Workspaces, monkeypatch: pytest.MonkeyPatch) -> Slow:
    """Begin a pass that encodes a frame for each turn that it is given."""
    slow = Slow(tabs.models.tracker(), monkeypatch)
    session.propagate(reverse=False)
    assert slow.started.wait(60)
    return slow


def test_a_pass_runs_beside_other_work_and_stops(
    tabs: Workspaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(tabs)
    session.click(20, 24, True)
    slow = slow_pass(session, tabs, monkeypatch)
    assert session.is_busy
    # Another object, other frames; not another pass, nor another video.
    session.show(5)
    session.select(None)
    session.click(35, 10, True)
    assert session.is_busy and session.scene()["frame"] == 5
    for work in (lambda: session.propagate(False), lambda: session.open(0), session.finish):
        with pytest.raises(ValueError, match=r"Tracking: wait for it, or stop it"):
            work()
    slow.turns.release(3)
    session.stop()
    assert ended(session) < FRAMES
    assert 1 <= len(file(session)["annotations"]) < FRAMES
    # An edit of an object that is tracked stops the pass.
    session.show(0)
    session.propagate(reverse=False)
    slow.turns.release(20)
    session.select(1)
    session.click(30, 30, True)
    assert not session.is_busy and len(masklets(session).objects[1].prompts[0].clicks) == 2


def test_an_object_that_is_tracked_can_be_renamed(
    tabs: Workspaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(tabs)
    session.click(20, 24, True)
    slow = slow_pass(session, tabs, monkeypatch)
    session.set_name("fish")
    renaming = threading.Thread(target=session.rename, args=[1], daemon=True)
    renaming.start()  # it waits for the pass, which has to get on
    time.sleep(0.1)
    slow.turns.release(20)
    renaming.join(60)
    assert not renaming.is_alive() and not session.is_busy
    assert masklets(session).objects[1].name == "fish"


def test_passes_say_why_there_is_nothing_to_track(tabs: Workspaces) -> None:
    session = opened(tabs)
    session.show(FRAMES - 1)
    session.click(20, 24, True)
    with pytest.raises(ValueError, match="this is the last frame"):
        session.propagate(reverse=False)
    session.show(0)
    with pytest.raises(ValueError, match="from here to the last frame: click an object here"):
        session.propagate(reverse=False)


# Results ---------------------------------------------------------------------------------------


def test_results_are_those_of_annotate_and_continue(
    config: Callable[..., AppConfig], tabs: Workspaces, tmp_path: Path
) -> None:
    session = opened(tabs)
    session.set_name("fish")
    session.click(20, 24, True)
    session.show(3)
    session.propagate(reverse=False)
    ended(session)
    session.click(22, 24, True)
    session.select(None)
    session.set_name("cat")
    session.draw_box(5, 5, 30, 30)
    found, objects = all_masks(session), session.objects()
    content = file(session)
    # The same records as the writer of `annotate --video`.
    own = masklets(session).annotated()
    write_masklets(tmp_path, [own], ["fish", "cat"], "coco-video")
    written = json.loads((tmp_path / "annotations.json").read_text())
    assert content["images"] == written["images"]
    assert content["categories"] == written["categories"]
    plain = [{k: v for k, v in r.items() if k != "predicted_iou"} for r in content["annotations"]]
    assert plain == written["annotations"]
    coco = COCO(str(masklets(session).path))
    assert all(coco.annToMask(record).any() for record in coco.anns.values())

    # After a crash: another process reads it, where it was left, and goes on.
    again = prepare(config())[0].get("other")
    assert (
        isinstance(again.queue, VideoLibrary) and again.queue.files[again.index] == "more/two.avi"
    )
    again.show(again.queue, 1)
    assert again.videos.frame == 3
    assert all_masks(again.videos) == found and again.videos.objects() == objects
    assert masklets(again.videos).objects[1].prompts == masklets(session).objects[1].prompts
    again.videos.select(1)
    again.videos.click(10, 40, False)
    assert len(masklets(again.videos).objects[1].prompts[3].clicks) == 2
    again.videos.propagate(reverse=False)
    ended(again.videos)


def test_finished_videos_become_a_dataset(tabs: Workspaces) -> None:
    session = opened(tabs)
    session.set_name("fish")
    session.click(20, 24, True)
    session.propagate(reverse=False)
    ended(session)
    library, job = session.library, session.finish()
    assert job is not None
    job.wait()
    assert job.error == "" and job.done == FRAMES and library.copying is None
    assert library.is_done("one.avi") and library.count_done() == 1 and library.first_open() == 0
    root, path = str(library.out), str(library.out / "annotations.json")
    data = make_video_dataset("coco-video", split="all", root=root, annotations=path)
    clip = data[0]
    assert clip.name == "one" and len(clip) == FRAMES and list(data.categories) == ["fish"]
    for (_, frame), mask in all_masks(session).items():
        assert np.packbits(clip.annotation(frame).masks[0]).tobytes() == mask
    assert np.abs(clip.image(0).astype(int) - library.read("one.avi")[0]).mean() < 5
    # An edit opens it again.
    session.show(2)
    session.click(40, 40, True)
    assert not library.is_done("one.avi")


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(masklets_module, "write_atomic", full)


def test_a_failed_write_changes_nothing(tabs: Workspaces, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(tabs)
    session.click(20, 24, True)
    before, found = file(session), all_masks(session)

    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        session.click(40, 5, False)
    with pytest.raises(OSError, match="No space"):
        session.undo()
    assert all_masks(session) == found and file(session) == before
    monkeypatch.undo()
    session.click(40, 5, False)
    assert len(masklets(session).objects[1].prompts[0].clicks) == 2
    session.undo()
    session.undo()
    assert not masklets(session).objects


@pytest.mark.parametrize("every", [0.0, 1000.0])
def test_a_pass_that_cannot_be_written(
    every: float, tabs: Workspaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a pass and at its end: the masks stay, undo takes them back, the next change writes
    them, and nobody leaves the video before."""
    monkeypatch.setattr(propagation, "_EVERY", every)
    monkeypatch.setattr(propagation, "_SHARE", every)
    session = opened(tabs)
    session.click(20, 24, True)
    before, folder = file(session), tabs.folder
    assert folder is not None

    def fail() -> int:
        with monkeypatch.context() as disk:
            fill_disk(disk)
            session.propagate(reverse=False)
            assert session.job is not None
            session.job.wait()
            assert "No space left on device. The masks are kept, and" in session.job.error
            for leave in (lambda: session.open(0), lambda: tabs.get("tab").show(folder, 0)):
                with pytest.raises(OSError, match=r"one.avi: masks .* not written yet.*No space"):
                    leave()
            assert tabs.get("tab").file == "one.avi" and tabs.get("tab").session.image is None
        assert file(session) == before
        return len(masklets(session).objects[1].masks)

    assert fail() == (FRAMES if every else 2)
    session.undo()
    assert list(masklets(session).objects[1].masks) == [0] and file(session) == before
    # The next change writes them, also one of another tab.
    count = fail()
    session.set_name("bird")
    assert session.name_selected() == 'object 1 is "bird" now.'
    assert len(file(session)["annotations"]) == len(all_masks(session)) > 1
    session.undo()
    session.undo()
    assert list(masklets(session).objects[1].masks) == [0] and file(session) == before
    assert fail() == count
    other = opened(tabs, "other")
    other.select(None)
    other.click(40, 40, True)
    assert len(file(session)["annotations"]) == len(all_masks(session)) > 1
    tracked = sum(own["track_id"] == 1 for own in file(session)["annotations"])
    assert tracked > 1
    # So does leaving, by oneself or because too many tabs are open.
    other.undo()
    session.undo()
    assert file(session) == before and fail() == count
    tabs.get("tab").close()
    assert [own["track_id"] for own in file(other)["annotations"]] == [1] * tracked


def test_results_of_another_video_are_refused(tabs: Workspaces, root: Path) -> None:
    session = opened(tabs)
    session.click(20, 24, True)
    path = masklets(session).path
    assert ranges([5, 1, 2, 7, 6]) == [[1, 2], [5, 7]]
    library = VideoLibrary(path.parent.parent, 10**8)
    write_clip(root / "one.avi", frames=5)
    library.add_below(str(root))
    with pytest.raises(ValueError, match=r"one.json: no masklets of one.avi, 5 frames.*--out"):
        library.masklets("one.avi", library.read("one.avi"))
    path.write_text(path.read_text().replace('"track_id": 1', '"track_id": 9'))
    with pytest.raises(ValueError, match=r"one.json: no masklets"):
        Masklets(path, "one.avi", "one", (SIZE, SIZE), [f"{k:05d}.jpg" for k in range(FRAMES)])


# Tabs and files --------------------------------------------------------------------------------


def test_tabs_share_results_but_nothing_else(tabs: Workspaces) -> None:
    one, two = opened(tabs, "one"), opened(tabs, "two")
    assert masklets(one) is masklets(two) and one.selected is two.selected is None
    one.click(20, 24, True)
    two.set_name("cat")
    two.show(4)
    two.click(30, 30, True)
    assert (one.selected, two.selected) == (1, 2) and one.frame == 0
    assert [own["name"] for own in two.objects()] == ["object", "cat"]
    # Each undoes its own; what others have changed since is kept.
    one.undo()
    assert [own["id"] for own in two.objects()] == [2]
    one.select(2)
    one.show(6)
    one.click(5, 5, True)
    with pytest.raises(ValueError, match="Somebody else"):
        two.undo()
    assert sorted(masklets(two).objects[2].prompts) == [4, 6]

    assert one.video is not None and two.video is not None and one.video.key != two.video.key
    assert tabs.frame(one.video.key, 3) == tabs.frame(two.video.key, 3) is not None
    assert tabs.frame(one.video.key, FRAMES) is None and tabs.frame("one.avi", 0) is None


def meanwhile(session: VideoSession, monkeypatch: pytest.MonkeyPatch, work: Any) -> None:
    """Let somebody else work while the next click of a session is computed."""
    assert session.video is not None
    prompter, click = session.video.prompter, session.video.prompter.click

    def slow(*args: Any) -> Any:
        monkeypatch.setattr(prompter, "click", click)
        found = click(*args)
        work()
        return found

    monkeypatch.setattr(prompter, "click", slow)


def test_edits_of_two_tabs_at_once(tabs: Workspaces, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = opened(tabs, "one"), opened(tabs, "two")
    # Both begin an object.
    one.set_name("fish")
    two.set_name("cat")
    meanwhile(one, monkeypatch, lambda: two.click(30, 30, True))
    one.click(20, 24, True)
    objects = masklets(one).objects
    assert {number: own.name for number, own in objects.items()} == {1: "cat", 2: "fish"}
    assert (one.selected, two.selected) == (2, 1)
    one.click(40, 5, False)
    assert len(objects[2].prompts[0].clicks) == 2
    # Both click on one, in different frames.
    two.select(2)
    two.show(4)
    meanwhile(one, monkeypatch, lambda: two.click(30, 30, True))
    one.show(1)
    one.click(22, 24, True)
    assert sorted(masklets(one).objects[2].prompts) == [0, 1, 4]
    # Or in the same frame: no click is lost.
    meanwhile(one, monkeypatch, lambda: two.click(30, 30, True))
    two.show(1)
    with pytest.raises(ValueError, match="Somebody else has changed this object meanwhile"):
        one.click(10, 24, True)
    assert [click.x for click in masklets(one).objects[2].prompts[1].clicks] == [22, 30]
    # One clicks on what the other takes back, or removes.
    two.show(5)
    two.click(30, 30, True)
    one.show(2)
    for work in (two.undo, lambda: two.remove(2)):
        meanwhile(one, monkeypatch, work)
        with pytest.raises(ValueError, match="Somebody else has changed this object meanwhile"):
            one.click(22, 24, True)
    assert list(masklets(one).objects) == [1]
    two.undo()
    assert sorted(masklets(one).objects[2].prompts) == [0, 1, 4]
    one.click(22, 24, True)
    assert sorted(masklets(one).objects[2].prompts) == [0, 1, 2, 4]
    again = Masklets(masklets(one).path, "one.avi", "one", (SIZE, SIZE), masklets(one).frames)
    assert all_masks(one).keys() == {
        (own.id, frame)
        for own in again.objects.values()
        for frame, mask in own.masks.items()
        if mask
    }


def test_a_pass_beside_edits_of_another_tab(
    tabs: Workspaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = opened(tabs, "one"), opened(tabs, "two")
    one.click(20, 24, True)
    one.select(None)
    one.show(4)
    one.click(35, 10, True)
    one.select(None)
    one.click(10, 10, True)
    slow = slow_pass(one, tabs, monkeypatch)
    two.remove(2)  # before the pass comes to it
    two.select(1)
    two.show(6)
    two.hide()
    slow.turns.release(30)
    assert ended(one) == FRAMES
    # What the other has said stays, as does the object that is gone.
    tracked = all_masks(one)
    assert any(number == 3 and frame > 4 for number, frame in tracked)
    one.undo()
    assert not any(number == 3 and frame > 4 for number, frame in all_masks(one))
    assert all_masks(one).items() >= {k: m for k, m in tracked.items() if k[0] == 1}.items()
    assert 6 in masklets(one).objects[1].prompts and 2 not in masklets(one).objects


def pass_on(slow: Slow, session: VideoSession, number: int, frames: int) -> None:
    """Let a pass go on until an object has masks in a number of frames."""
    until = time.monotonic() + 60
    while len(masklets(session).objects[number].masks) < frames:
        slow.turns.release()
        time.sleep(0.05)
        assert time.monotonic() < until


def test_ids_of_objects_that_are_gone_stay_theirs(
    tabs: Workspaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a pass, nor a name that waits for it, nor a selection is for the next object."""
    one, two = opened(tabs, "one"), opened(tabs, "two")
    one.click(20, 24, True)
    slow = slow_pass(one, tabs, monkeypatch)
    one.set_name("cat")
    assert "when tracking has ended" in one.name_selected()
    pass_on(slow, one, 1, frames=2)
    two.remove(1)
    two.select(None)
    two.click(40, 40, True)
    slow.turns.release(30)
    assert ended(one) == FRAMES
    (new,) = masklets(one).objects.values()
    assert (new.id, new.name, list(new.masks)) == (2, "object", [0])
    one.set_name("")
    one.show(7)
    assert one.click(3, 3, True) == "object 3 begins here." and list(new.prompts) == [0]
    with pytest.raises(ValueError, match="Somebody else has removed this object"):
        one.remove(1)
    # What is undone has its id again.
    two.undo()
    two.undo()
    assert list(masklets(one).objects) == [1, 3] and len(masklets(one).objects[1].masks) >= 2
    again = Masklets(masklets(one).path, "one.avi", "one", (SIZE, SIZE), masklets(one).frames)
    assert again.new_id() == 4


def test_a_pass_and_undo_of_another_tab(tabs: Workspaces, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = opened(tabs, "one"), opened(tabs, "two")
    one.click(20, 24, True)
    one.finish(copy_frames=False)
    assert one.library.is_done("one.avi")
    slow = slow_pass(one, tabs, monkeypatch)
    one.set_name("cat")
    assert "when tracking has ended" in one.name_selected()
    two.set_name("fish")
    two.rename(1)
    # An object that is put back at once is tracked on.
    two.remove(1)
    two.undo()
    pass_on(slow, one, 1, frames=3)
    assert not one.library.is_done("one.avi")
    # What the pass has found since is not taken back.
    with pytest.raises(ValueError, match="Somebody else has changed this object since"):
        two.undo()
    slow.turns.release(30)
    assert ended(one) == FRAMES
    own = masklets(one).objects[1]
    assert own.name == "fish" and sorted(own.masks) == list(range(FRAMES))
    # A pass of an object that nobody else has changed is undone, also if it was put back.
    one.show(3)
    one.clear()
    monkeypatch.undo()
    slow = slow_pass(one, tabs, monkeypatch)
    two.remove(1)
    two.undo()
    slow.turns.release(30)
    ended(one)
    assert len(masklets(one).objects[1].masks) == FRAMES
    one.undo()
    assert sorted(masklets(one).objects[1].masks) == [0, 1, 2, 4, 5, 6, 7]


def test_results_stay_with_their_video(config: Callable[..., AppConfig], root: Path) -> None:
    (root / "one.avi").rename(root / "one.mov")
    session = opened(prepare(config())[0])
    session.click(20, 24, True)
    assert masklets(session).path.name == "one.json"
    # A video of the same name but for its ending comes first now.
    write_clip(root / "one.avi", frames=5)
    later = prepare(config())[0]
    assert later.library is not None and later.library.files[1:] == ["one.avi", "one.mov"]
    assert sorted(masklets(opened(later, index=2)).objects) == [1]
    other = opened(later, "other", index=1)
    other.click(20, 24, True)
    assert masklets(other).path.name == "one.avi.json"
    (root / "one.mov").unlink()
    alone = prepare(config())[0]
    assert masklets(opened(alone, index=1)).path.name == "one.avi.json"


def test_uploads_are_seen_by_their_tab_alone_and_bounded(
    config: Callable[..., AppConfig], tmp_path: Path
) -> None:
    write_clip(tmp_path / "own.avi")
    data = (tmp_path / "own.avi").read_bytes()
    tabs = prepare(config(images=None, max_uploads=2, max_pixels=SIZE * SIZE))[0]
    one, two = tabs.get("one"), tabs.get("two")
    one.show(*tabs.upload(one, "../../own.AVI", data))
    assert one.uploaded_videos.files == ["__..__own.AVI"] == [one.file]
    assert not two.uploaded_videos.files and "Uploaded videos" not in two.queues()
    one.videos.click(20, 24, True)
    for name, content, message in (
        ("page.html", data, "not one of"),
        ("list.mp4", b"#EXTM3U\nfile:///etc/hosts\n", "no video that is read"),
        ("cut.avi", data[:40], "OpenCV|no video"),
    ):
        with pytest.raises(ValueError, match=message):
            tabs.upload(one, name, content)
    write_clip(tmp_path / "large.avi", size=SIZE + 16)
    with pytest.raises(ValueError, match="larger than 2,304 pixels"):
        tabs.upload(one, "large.avi", (tmp_path / "large.avi").read_bytes())
    tabs.upload(one, "__..__own.AVI", data)
    with pytest.raises(ValueError, match="No more than 2 videos"):
        tabs.upload(one, "c.avi", data)
    assert len(list(one.uploaded_videos.uploads.iterdir())) == 2
    # After a crash, the browser finds its own again.
    later = prepare(config(images=None))[0]
    assert later.get("one").uploaded_videos.files == sorted(one.uploaded_videos.files)
    assert later.get("two").uploaded_videos.files == []
    later.get("one").show(later.get("one").uploaded_videos, 1)
    assert len(later.get("one").videos.objects()) == 1


def test_long_names_of_uploads(config: Callable[..., AppConfig], tmp_path: Path) -> None:
    write_clip(tmp_path / "own.avi")
    data, name = (tmp_path / "own.avi").read_bytes(), "\N{HIRAGANA LETTER A}" * 90
    tabs = prepare(config(images=None))[0]
    workspace = tabs.get("tab")
    for _ in range(3):
        tabs.upload(workspace, f"{name}.avi", data)
    for index in range(3):
        workspace.show(workspace.uploaded_videos, index)
        workspace.videos.click(20, 24 + index, True)
    later = prepare(config(images=None))[0].get("tab")
    files = later.uploaded_videos.files
    assert sorted(files) == sorted(workspace.uploaded_videos.files) and len(files) == 3
    for file in files:
        later.show(later.uploaded_videos, files.index(file))
        (click,) = masklets(later.videos).objects[1].prompts[0].clicks
        assert click.y == 24 + workspace.uploaded_videos.files.index(file)


def test_videos_below_the_folder_and_of_the_command_line(
    config: Callable[..., AppConfig], root: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.avi"
    write_clip(secret)
    (root / "link.avi").symlink_to(secret)
    frames = root / "frames"
    frames.mkdir()
    for number in range(4):
        Image.fromarray(np.full((SIZE, SIZE, 3), 40 * number, np.uint8)).save(
            frames / f"{number}.png"
        )
    tabs = prepare(config(video=(str(frames),)))[0]
    assert tabs.library is not None and tabs.folder is not None
    assert tabs.library.files == ["frames", "more/two.avi", "one.avi"]
    assert tabs.folder.files == ["photo.png"]  # frames of a video are no images of the queue
    session = opened(tabs, index=0)
    session.click(20, 24, True)
    assert file(session)["images"][1]["file_name"] == "frames/1.png"
    assert list(tabs.get("tab").queues()) == ["Images", "Videos"]
    # Links that come later.
    (root / "one.avi").unlink()
    (root / "one.avi").symlink_to(secret)
    with pytest.raises(ValueError, match="leaves its folder"):
        opened(tabs, index=2)
    assert session.video is not None and session.video.file == "frames"
    (frames / "3.png").unlink()
    (frames / "3.png").symlink_to(secret)
    with pytest.raises(ValueError, match="leaves its folder"):
        opened(tabs, "other", index=0)
    with pytest.raises(ValueError, match="not a video of this folder"):
        tabs.library.read("../secret.avi")
    written = {path.relative_to(tabs.out).parts[0] for path in tabs.out.rglob("*")}
    assert written == {"videos"}
    # Images let go of the video, and the reverse.
    workspace = tabs.get("tab")
    workspace.show(tabs.folder)
    assert workspace.videos.video is None and workspace.session.image is not None
    workspace.show(tabs.library, 1)
    assert workspace.session.image is None
    shutil.rmtree(frames)
    os.remove(root / "photo.png")
    assert prepare(config())[0].get("tab").queues().keys() == {"Videos"}


def test_a_pass_of_a_long_video_holds_few_frames(
    config: Callable[..., AppConfig], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of the tracker and decoded frames do not grow with the video."""
    import agents.annotation.interactive.propagation as module

    write_clip(root / "long.avi", frames=20)
    session = opened(prepare(config())[0], index=0)
    assert session.video is not None and session.video.file == "long.avi"
    counts = []
    passed = module._tracked

    def counted(tracker: VideoTracker, *args: Any) -> Any:
        sessions = []
        monkeypatch.setattr(
            tracker,
            "open",
            lambda videos, own=tracker.open: sessions.append(own(videos)) or sessions[0],
        )
        for found in passed(tracker, *args):
            track = sessions[0]._tracks[0][1]
            counts.append((len(track.tracked), len(sessions[0]._cache)))
            yield found

    monkeypatch.setattr(module, "_tracked", counted)
    session.click(20, 24, True)
    session.propagate(reverse=False)
    assert ended(session) == 20
    assert max(tracked for tracked, _ in counts) <= 16 and max(held for _, held in counts) <= 8
    monkeypatch.setattr("agents.annotation.interactive.video_session._SHOWN_FRAMES", 5)
    for frame in range(20):
        session.video.viewer.jpeg(frame)
    assert len(session.video.viewer._shown) == 5


def test_files_that_are_no_videos() -> None:
    assert is_video(b"\0\0\0\x20ftypisom") and is_video(b"RIFF1234AVI ")
    assert not any(map(is_video, (b"#EXTM3U\n", b"ffconcat version 1.0", b"", b"\x89PNG\r\n")))


def test_named_files_that_are_no_videos_fail_at_once(
    config: Callable[..., AppConfig], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the app and in `annotate --video`; the app leaves no folder behind."""
    pytest.importorskip("nicegui", reason="the app needs NiceGUI: pip install 'sam-gym[app]'")
    (root / "empty.mp4").touch()
    (root / "list.m3u8").write_text("#EXTM3U\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, reason in (
        ("photo.png", "an image. Name a video"),
        ("empty.mp4", "no video that OpenCV can read"),
        ("list.m3u8", "no video"),
    ):
        path = str(root / name)
        with pytest.raises(ValueError, match=f"^--video .*{name}: {reason}"):
            find_videos([path])
        new = root.parent / "new"
        with pytest.raises(ValueError, match=f"^--video .*{name}: {reason}"):
            serve(config(images=None, video=(path,), out=str(new / "out"), port=port))
        assert not new.exists()
    monkeypatch.setattr("agents.annotation.video.open_video", lambda path: None)
    with pytest.raises(ValueError, match=r"^--video .*list.m3u8: no video that is read"):
        prepare(config(images=None, video=(str(root / "list.m3u8"),)))
    # Results that are there stay, whatever fails.
    out = root.parent / "out"
    with pytest.raises((ValueError, OSError), match="none"):
        serve(config(out=str(out), port=port, tracker="none"))
    assert out.is_dir()


def test_trackers(config: Callable[..., AppConfig], tiny_video: str) -> None:
    with pytest.raises(ValueError, match="--tracker-checkpoint is for --tracker"):
        load_models(config(tracker=None, tracker_checkpoint="a.safetensors"))
    # Before its weights are downloaded.
    with pytest.raises(ValueError, match=r"'vit_b' has no video memory, .* micro_video, "):
        load_models(config(tracker="vit_b"))
    with pytest.raises(FileNotFoundError, match="--video"):
        prepare(config(video=("none.mp4",)))
    # A SAM with a memory tracks itself.
    models = load_models(config(tracker=None, backbone=tiny_video, checkpoint=None))
    assert models.tracker().backbone is models.backbone
    assert models.tracker() is models.tracker()


def test_empty_masks_are_kept(tabs: Workspaces, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(tabs)
    assert session.video is not None
    empty = lambda *_, **__: None  # noqa: E731
    monkeypatch.setattr(session.video.prompter, "_prompt", empty)
    session.click(20, 24, True)
    assert session.objects()[0]["absent"] == [[0, 0]] and session.scene()["path"] == ""
    assert file(session)["annotations"] == [] and len(session.scene()["marks"]) == 1
