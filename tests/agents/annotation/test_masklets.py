"""Masklets of whole runs: formats, prompts, bad files and interruptions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from agents.annotate import main
from agents.annotation import video as module
from sam_gym.backbones import load_backbone
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data import make_video_dataset
from sam_gym.data.synthetic.clips import Clips

SIZE, FRAMES = 64, 4


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder of two folders of frames, which natural order sorts, and a video file."""
    root = tmp_path / "videos"
    clips = Clips("test", frames=FRAMES, length=3, size=SIZE)
    for number, name in enumerate(("fox", "owl")):
        (root / name).mkdir(parents=True)
        for frame in range(FRAMES):
            Image.fromarray(clips[number].image(frame)).save(root / name / f"{frame + 8}.png")
    writer = cv2.VideoWriter(
        str(root / "yak.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12, (SIZE, SIZE)
    )
    for frame in range(FRAMES):
        writer.write(np.ascontiguousarray(clips[2].image(frame)[..., ::-1]))
    writer.release()
    return root


def disk(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return np.hypot(rows - y, columns - x) < radius


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A mask and a box in the first frame of `fox`, a click and a box later in the others."""
    code = rle.encode(np.asfortranarray(disk(30, 30, 12), np.uint8))
    mask = {"size": [SIZE, SIZE], "counts": code["counts"].decode()}
    size = {"height": SIZE, "width": SIZE}
    content = {
        "images": [
            {"id": 1, "file_name": "videos/fox/8.png", **size},
            {"id": 2, "video_id": "owl", "order_in_video": 2},
            {"id": 3, "video_id": "owl", "order_in_video": 3},
            {"id": 4, "file_name": "yak/00001.jpg"},
        ],
        "categories": [{"id": 3, "name": "animal"}, {"id": 7, "name": "thing"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "segmentation": mask, "bbox": [0, 0, 9, 9]},
            # pandas writes NaN for what is missing.
            {
                **{"id": 2, "image_id": 1, "category_id": 3, "bbox": [10, 12, 20, 24]},
                "segmentation": float("nan"),
            },
            {"id": 3, "image_id": 2, "category_id": 3, "track_id": 5, "point_coords": [[20, 21]]},
            {"id": 4, "image_id": 3, "category_id": 3, "track_id": 5, "bbox": [9, 9, 30, 20]},
            {"id": 5, "image_id": 4, "category_id": 3, "bbox": [5, 6, 40, 50]},
        ],
    }
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def run(tiny_video: str, videos: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(*more: str, out: str = "out", video: Path = videos) -> Any:
        base = ["--video", str(video), "--backbone", tiny_video, "--device", "cpu"]
        return main([*base, "--out", str(tmp_path / out), *more])

    return run


def masklets(out: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The annotations of each (video, track) of a file in the format coco-video, by frame."""
    content = json.loads((out / "annotations.json").read_text())
    images = {own["id"]: own for own in content["images"]}
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for own in content["annotations"]:
        own |= {"frame": images[own["image_id"]]["order_in_video"]}
        found.setdefault((images[own["image_id"]]["video_id"], own["track_id"]), []).append(own)
    return found


@pytest.mark.parametrize("video_format", ["coco-video", "youtube-vis", "davis"])
def test_masklets_are_those_of_the_tracker(
    run: Callable[..., Any],
    tiny_video: str,
    videos: Path,
    prompts: str,
    tmp_path: Path,
    video_format: str,
) -> None:
    run("--prompts", prompts, "--video-format", video_format)
    out = tmp_path / "out"
    options: dict[str, Any] = {"annotations": str(out / "annotations.json")}
    if video_format == "davis":
        options = {"objects": "all"}
    dataset = make_video_dataset(video_format, "all", root=str(out), **options)
    read = {Path(own.name).name: own for own in dataset}
    assert list(read) == ["fox", "owl", "yak"]
    assert [len(own.objects) for own in read.values()] == [2, 1, 1]
    if video_format != "davis":
        assert dataset.categories == ("animal", "thing")
        assert list(read["fox"].categories) == [1, 0]

    tracker = VideoTracker(load_backbone(tiny_video, device="cpu"))
    paths = [videos / "fox", videos / "owl", videos / "yak.avi"]
    session = tracker.open(paths)
    session.prompt(0, 0, 1, mask=disk(30, 30, 12))
    session.prompt(0, 0, 2, box=[10, 12, 30, 36])
    session.prompt(1, 2, 1, points=[[20, 21]], labels=[1])
    session.prompt(1, 3, 1, box=[9, 9, 39, 29])
    session.prompt(2, 1, 1, box=[5, 6, 45, 56])
    seen = set()
    for reverse in (False, True):
        for step in session.propagate(reverse=reverse):
            expected = step.masks(overlap=video_format != "davis")
            own = list(read.values())[step.video]
            np.testing.assert_array_equal(own.annotation(step.frame).masks, expected)
            # Frames are copied; those of a video file become JPEG.
            image = session.videos[step.video][step.frame].astype(int)
            off = np.abs(own.image(step.frame) - image).mean()
            assert off < 5 if step.video == 2 else off == 0
            seen.add((step.video, step.frame))
    assert len(seen) == 3 * FRAMES
    assert sorted(path.name for path in (out / "overlays").iterdir()) == [
        "fox.mp4",
        "owl.mp4",
        "yak.mp4",
    ]


def test_an_interrupted_run_resumes(
    run: Callable[..., Any], prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--prompts", prompts, "--overlays", "none")
    run(*options, out="whole")
    expected = (tmp_path / "whole" / "annotations.json").read_text()
    tracked: list[str] = []
    track = module._track

    def counted(config: Any, name: str, *more: Any) -> Any:
        if name == "owl" and "owl" not in tracked:
            tracked.append(name)
            raise KeyboardInterrupt
        tracked.append(name)
        return track(config, name, *more)

    monkeypatch.setattr(module, "_track", counted)
    with pytest.raises(KeyboardInterrupt):
        run(*options)
    assert not (tmp_path / "out" / "annotations.json").exists()
    with pytest.raises(ValueError, match=r"other settings \(video_format\)"):
        run(*options, "--video-format", "davis")
    run(*options)
    assert tracked == ["fox", "owl", "owl", "yak"]
    assert (tmp_path / "out" / "annotations.json").read_text() == expected
    with pytest.raises(FileExistsError, match="not empty, and holds no unfinished run"):
        run(*options)


def test_bad_files_are_reported_and_skipped(
    run: Callable[..., Any], prompts: str, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (videos / "yak.avi").write_bytes(b"no video")
    (videos / "owl" / "10.png").write_bytes(b"no image")
    shutil.copytree(videos / "fox", videos / "bat")
    (annotated,) = run("--prompts", prompts, "--overlays", "none")
    assert annotated.name == "fox"
    shown = capsys.readouterr().out
    for name, reason in {
        "bat": "prompts no object in it",
        "owl": "10.png",
        "yak.avi": "no video that OpenCV can read",
    }.items():
        line = next(line for line in shown.splitlines() if f"videos/{name}:" in line)
        assert line.startswith("skipped ") and reason in line
    assert "2 masklets in 1 video, 3 skipped" in shown
    # What was repaired is tracked by the next run, and nothing else.
    shutil.copy(videos / "owl" / "9.png", videos / "owl" / "10.png")
    assert [own.name for own in run("--prompts", prompts, "--overlays", "none")] == ["fox", "owl"]
    assert "Resuming: 1 of 4 videos are done" in capsys.readouterr().out


def test_everything_of_the_first_frame(
    run: Callable[..., Any], prompts: str, tmp_path: Path
) -> None:
    options = ("--everything", "--grid", "3", "3", "--pred-iou-thresh", "0")
    options += ("--stability-score-thresh", "0", "--max-objects", "2", "--overlays", "gif")
    annotated = run(*options, "--no-frames")
    assert [own.name for own in annotated] == ["fox", "owl", "yak"]
    found = masklets(tmp_path / "out")
    for own in annotated:
        tracks = range(1, own.objects + 1)
        assert own.objects in (1, 2) and own.frames == FRAMES
        assert all(found[own.name, track][0]["frame"] == 0 for track in tracks)
    assert len(found) == sum(own.objects for own in annotated)
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "object"}]
    assert not (tmp_path / "out" / "images").exists()
    assert len(list((tmp_path / "out" / "overlays").glob("*.gif"))) == 3
    few = ("--prompts", prompts, "--max-objects", "1", "--no-frames", "--overlays", "none")
    assert [own.objects for own in run(*few, out="few")] == [1, 1, 1]


def test_an_agent_finds_the_objects(run: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--policy", "explicit", "--categories", "star,ring", "--overlays", "none")
    annotated = run(*options, "--video-format", "youtube-vis")
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [own["name"] for own in content["categories"]] == ["star", "ring"]
    assert all(1 <= own.objects <= 2 for own in annotated)
    assert {own["category_id"] for own in content["annotations"]} <= {1, 2}


@pytest.mark.parametrize(
    "options, message",
    [
        ((), r"pass one of --prompts FILE, --everything, or --policy"),
        (("--everything", "--policy", "explicit"), "pass one of --prompts"),
        (("--policy", "explicit"), "--policy and --categories come together"),
        (("--prompts", "nowhere.json"), "nowhere.json: the annotation file does not exist"),
    ],
)
def test_options_that_cannot_work_are_refused(
    run: Callable[..., Any], options: tuple[str, ...], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bbox": None}, "annotation 2: annotation has no segmentation, bbox or point_coords"),
        ({"bbox": [1, 2, 0, 4]}, "annotation 2: bbox is empty"),
        ({"bbox": [1, 2, "x", 4]}, "bbox is not a list of finite numbers"),
        ({"image_id": 99}, "annotation 2: image_id is not among the images"),
        ({"category_id": 99}, "category_id is not among the categories"),
        ({"track_id": "x"}, "track_id is not a whole number"),
        ({"bbox": None, "point_coords": [[1, 2]], "point_labels": [[1]]}, "must be 0 or 1"),
        ({"image_id": 3, "track_id": 5}, "annotation 4: track_id has an earlier prompt in the"),
    ],
)
def test_wrong_prompts_are_refused(
    run: Callable[..., Any], prompts: str, change: dict[str, Any], message: str
) -> None:
    content = json.loads(Path(prompts).read_text())
    content["annotations"][1] |= change
    Path(prompts).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        run("--prompts", prompts)
    assert "on-error" not in str(error.value)  # which this command lacks


def test_prompts_of_two_folders_of_one_name_are_refused(
    run: Callable[..., Any], prompts: str
) -> None:
    content = json.loads(Path(prompts).read_text())
    content["images"].append({"id": 9, "file_name": "others/fox/8.png"})
    Path(prompts).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"two folders have one name \(videos/fox and others/fox"):
        run("--prompts", prompts)


def test_late_objects_are_tracked_to_both_ends(
    run: Callable[..., Any], prompts: str, tmp_path: Path
) -> None:
    """An object is the same, whatever else is prompted earlier."""
    content = json.loads(Path(prompts).read_text())
    whole = content["annotations"]
    late = {"id": 9, "image_id": 3, "category_id": 7, "bbox": [20, 9, 25, 40]}
    early = {"id": 8, "image_id": 5, "category_id": 3, "bbox": [10, 12, 20, 24]}
    content["images"].append({"id": 5, "video_id": "owl", "order_in_video": 0})
    found = []
    for annotations in ([late], [early, late]):
        content["annotations"] = whole[:2] + annotations
        Path(prompts).write_text(json.dumps(content))
        options = ("--prompts", prompts, "--overlays", "none", "--no-frames")
        out = f"out{len(annotations)}"
        run(*options, out=out)
        found.append(masklets(tmp_path / out)["owl", len(annotations)])
    alone, after = ({own["frame"]: own["segmentation"] for own in frames} for frames in found)
    assert alone and alone == after
    assert found[0][0]["score"] == pytest.approx(found[1][0]["score"], abs=1e-4)


def test_videos_in_odd_folders(
    run: Callable[..., Any], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden files, a relative path, two frames of one stem; a picture beside video files."""
    fox = videos / "fox"
    (fox / "._8.png").write_bytes(b"no image")
    shutil.copy(fox / "9.png", fox / "9.bmp")
    monkeypatch.chdir(fox)
    options = ("--everything", "--grid", "3", "3", "--pred-iou-thresh", "0")
    options += ("--stability-score-thresh", "0", "--max-objects", "1", "--overlays", "none")
    (annotated,) = run(*options, "--video-format", "davis", video=Path("."))
    assert annotated.name == "fox" and annotated.frames == FRAMES + 1
    assert len(list((tmp_path / "out" / "Annotations" / "fox").iterdir())) == FRAMES + 1
    shutil.copy(fox / "9.png", videos / "cover.png")
    with pytest.raises(ValueError, match="the folder holds images, as one video does, and video"):
        run(*options, out="mixed")


def test_prompts_of_other_videos_are_refused(
    run: Callable[..., Any], prompts: str, videos: Path, tmp_path: Path
) -> None:
    (videos / "fox").rename(tmp_path / "wolf")
    with pytest.raises(ValueError, match="prompts 'fox', and --video is 'wolf'"):
        run("--prompts", prompts, video=tmp_path / "wolf")
