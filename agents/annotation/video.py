"""Annotate videos with masklets: `python -m agents.annotate --video PATH`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol, cast

import cv2
import numpy as np
import tyro
from pycocotools import mask as rle

from agents.annotation.clicks import AnnotateConfig
from agents.annotation.everything import EverythingAnnotator, Generator
from agents.annotation.files import OutputPaths
from agents.annotation.folder import Annotator
from agents.annotation.video_frames import (
    VIDEO_SUFFIXES,
    frame_names,
    write_frames,
    written_names,
)
from agents.annotation.video_prompts import ObjectPrompt, PromptChoice, read_prompts
from agents.annotation.video_results import VideoResults
from agents.evaluate import PolicyAgent
from agents.tasks import task_of_policy
from sam_gym.backbones import load_backbone
from sam_gym.backbones.loading import resolve_device
from sam_gym.backbones.spec import check_tracks, tracker_help
from sam_gym.backbones.video.frames import SUFFIXES, FrameSource, open_video
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data.base import split_names
from sam_gym.data.videos.reader import decode, stem
from sam_gym.data.videos.writer import (
    FRAME_FOLDERS,
    AnnotatedVideo,
    Masklet,
    VideoFormat,
    check_ids,
    write_masklets,
)
from sam_gym.mask_generation.generator import MaskGenerator
from sam_gym.utils import cli
from sam_gym.utils.digest import file_digest
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder
from sam_gym.utils.process_group import ProcessGroup
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.render import draw_masks, save_video
from sam_gym.utils.settings import Count, check_settings
from sam_gym.utils.text import counted, printable, safe_name


@documented
@dataclass(kw_only=True)
class AnnotateVideoConfig:
    """Annotate videos with masklets: a mask of each object in every frame in which it is seen.

    Objects are prompted in one or more frames by --prompts, or in the first frame by everything
    mode (--everything) or by a trained agent (--policy and --categories), and tracked from there to
    both ends of the video. Writes a folder with the frames and the masklets, which the dataset of
    the same name reads: --dataset coco-video, youtube-vis or davis. Videos that cannot be read are
    reported and skipped. Run the same command again to resume an interrupted run, or one that
    skipped videos; those that are done are not tracked again.

    Example: python -m agents.annotate --video clip.mp4 --everything --out runs/masklets
    """

    video: tuple[str, ...]
    """Video files, folders of frames, or folders of several of these."""
    out: str = "masklets"
    """Folder to write, new or left by an interrupted run of the same command."""
    video_format: VideoFormat = "coco-video"
    """Format of the masklets: COCO JSON of videos (annotations.json), YouTube-VIS JSON
    (annotations.json), or DAVIS 2017 (Annotations/VIDEO/*.png, where objects do not overlap)."""
    prompts: str | None = None
    """COCO JSON with the objects to track. An image record names its frame by video_id (name of the
    video) and order_in_video (number of the frame), or by file_name, VIDEO/FRAME.jpg. Annotations
    of one track_id are one object."""
    prompt: PromptChoice = "auto"
    """What of an annotation of --prompts is the prompt: its mask, its box, or its point_coords;
    auto: the first of them that it has."""
    everything: bool = False
    """Prompt the masks that everything mode finds in the first frame."""
    policy: str | None = None
    """Prompt the masks that a trained agent finds in the first frame: a path of a policy.zip,
    hf://USER/NAME[@REVISION], or a bundled agent."""
    categories: str = ""
    """Comma-separated categories for the agent to segment."""
    max_objects: Count | None = None
    """Maximum number of objects of a video, those of the highest scores of everything mode or the
    agent, or the first of --prompts (None: all)."""
    frames: bool = True
    """Copy the frames into the folder; those of video files become JPEG."""
    overlays: Literal["mp4", "gif", "none"] = "mp4"
    """Format of the drawn videos in the folder overlays."""
    backbone: Annotated[str, tyro.conf.arg(help=tracker_help("Tracker to use"))] = "micro_video"
    checkpoint: str | None = None
    """Weights of the tracker (None: its own)."""
    adapter: str | None = None
    """Adapter file that adaptation.train_video wrote."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda."""
    dtype: str = "auto"
    """Precision: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    generator: Annotated[Generator, tyro.conf.arg(name="")] = field(default_factory=Generator)
    """Options of everything mode."""

    def validate(self) -> None:
        """Raise `ValueError` if an option is wrong."""
        check_settings(self)
        check_tracks(self.backbone)
        if not self.video:
            raise ValueError("--video needs at least one path.")
        ways = {
            "--prompts": self.prompts is not None,
            "--everything": self.everything,
            "--policy": self.policy is not None,
        }
        given = [name for name, is_given in ways.items() if is_given]
        if len(given) != 1:
            raise ValueError(
                "Say which objects to track: pass one of --prompts FILE, --everything, or "
                f"--policy NAME --categories NAMES (got {' and '.join(given) or 'none of them'})."
            )
        if (self.policy is not None) != bool(self.categories.strip(" ,")):
            raise ValueError("--policy and --categories come together.")
        if self.everything:
            self.generator.validate()


class Prompter(Protocol):
    """Says which objects of a video are tracked."""

    #: Names of the categories.
    categories: Sequence[str]
    #: Digest of what prompts depend on.
    identity: str

    def prompts(self, video: str, frames: FrameSource) -> list[ObjectPrompt]:
        """Return the prompts of a video; raises `ValueError` if there is none."""


class FilePrompter:
    """Prompts from a COCO file; see `read_prompts`."""

    def __init__(self, path: str, choice: PromptChoice) -> None:
        self.path = path
        self.categories: Sequence[str]
        self.categories, self._prompts = read_prompts(path, choice)
        self.identity = file_digest(Path(path))

    def check(self, videos: Collection[str]) -> None:
        """Raise `ValueError` if no video is prompted; print which prompts are of none."""
        unknown = sorted(self._prompts.keys() - set(videos))
        if len(unknown) == len(self._prompts):
            raise ValueError(
                f"{self.path} prompts {unknown[0]!r}, and --video is {min(videos)!r}: the name of "
                "a video is that of its folder, or of its file without the suffix."
            )
        for name in unknown:
            print(printable(f"{self.path} also prompts {name!r}, which is not among the videos"))

    def prompts(self, video: str, frames: FrameSource) -> list[ObjectPrompt]:
        if video not in self._prompts:
            raise ValueError(f"{self.path} prompts no object in it.")
        return self._prompts[video]


class FirstFramePrompter:
    """Prompts the masks that an annotator of images finds in the first frame."""

    def __init__(self, annotator: Annotator) -> None:
        self._annotator = annotator
        self.categories, self.identity = annotator.categories, annotator.identity

    def prompts(self, video: str, frames: FrameSource) -> list[ObjectPrompt]:
        image = frames[0]
        items = self._annotator.stream((key, image) for key in self._annotator.keys(video))
        found = [annotation for item in items for annotation in item.annotations]
        if not found:
            raise ValueError("no object was found in its first frame.")
        found.sort(key=lambda annotation: -annotation["score"])
        return [
            ObjectPrompt(number, own["category"], 0, {"mask": own["segmentation"]})
            for number, own in enumerate(found)
        ]


def annotate_videos(config: AnnotateVideoConfig) -> list[TrackedVideo]:
    """Annotate videos and write all files; returns what was tracked.

    The processes of a job share the videos.

    Raises:
        ValueError, FileNotFoundError: an option, the weights, the prompts or a path is wrong.
        FileExistsError: the output folder holds files of others, or another process writes it.
    """
    config.validate()
    paths = find_videos(config.video)
    from_file = None if config.prompts is None else FilePrompter(config.prompts, config.prompt)
    if from_file is not None:
        from_file.check(paths)
    ranks = ProcessGroup.join(cuda=resolve_device(config.device).type == "cuda")
    outputs = _outputs(config, ranks)
    backbone = load_backbone(
        config.backbone, config.checkpoint, config.device, config.dtype, adapter=config.adapter
    )
    tracker = VideoTracker(backbone, keep="window")
    prompter: Prompter
    if from_file is not None:
        prompter = from_file
    elif config.everything:
        masks = MaskGenerator(backbone, config.generator)
        prompter = FirstFramePrompter(EverythingAnnotator(masks, ""))
    else:
        prompter = FirstFramePrompter(_agent(config))
    try:
        with outputs.locked() if ranks.is_first else nullcontext():
            return _annotate(config, paths, outputs, tracker, prompter, ranks)
    finally:
        ranks.leave()


def _agent(config: AnnotateVideoConfig) -> Annotator:
    """Load the agent of --policy."""
    assert config.policy is not None
    agent = PolicyAgent.load(config.policy, config.device)
    task = task_of_policy(agent.policy)
    task.require("annotate")
    features = agent.policy.features
    names = split_names(config.categories, features.get("vocabulary") or features["categories"])
    # One episode per category of a frame.
    options = AnnotateConfig(
        images="",
        policy=config.policy,
        categories=config.categories,
        num_envs=len(names),
        device=config.device,
    )
    return task.make_annotator(agent, [name for name in names if name], options)


def find_videos(paths: Sequence[str]) -> dict[str, str]:
    """Return name -> path of videos: files, folders of frames, and those in folders of videos.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path is no video, a folder holds none, or two videos have one name.
    """
    found: list[str] = []
    for path in map(os.path.expanduser, paths):
        if not os.path.exists(path):
            raise FileNotFoundError(f"--video {path}: there is no such file or folder.")
        if not os.path.isdir(path):
            _check_video(path)
            found.append(path)
            continue
        if _holds(path, SUFFIXES):
            if _holds(path, VIDEO_SUFFIXES):
                raise ValueError(
                    f"--video {path}: the folder holds images, as one video does, and video files. "
                    "Move the ones or the others into a folder of their own."
                )
            found.append(path)
            continue
        inside = [
            os.path.join(path, name)
            for name in sorted(os.listdir(path))
            if not name.startswith(".")
        ]
        own = [
            child
            for child in inside
            if (os.path.isdir(child) and _holds(child, SUFFIXES))
            or (os.path.isfile(child) and os.path.splitext(child)[1].lower() in VIDEO_SUFFIXES)
        ]
        if not own:
            raise ValueError(f"--video {path}: no video and no folder of frames in this folder.")
        found += own
    names: dict[str, str] = {}
    for path in found:
        name = os.path.basename(os.path.abspath(path))
        name = safe_name(name if os.path.isdir(path) else stem(name))
        if name in names:
            raise ValueError(f"{names[name]} and {path} have one name. Rename one of them.")
        names[name] = path
    return names


def _check_video(path: str) -> None:
    """Raise `ValueError` if a file cannot be opened as a video; images can, but are none."""
    is_image = cv2.haveImageReader(path) and os.path.splitext(path)[1].lower() in SUFFIXES
    try:
        if is_image:
            raise ValueError("an image")
        open_video(path)
    except (ValueError, OSError) as error:
        reason = str(error).removeprefix(f"{Path(path)}: ").rstrip(".")
        raise ValueError(
            f"--video {path}: {reason}. Name a video file, or a folder of frames."
        ) from None


def _holds(folder: str, suffixes: Collection[str]) -> bool:
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    return any(os.path.splitext(name)[1].lower() in suffixes for name in names)


def _outputs(config: AnnotateVideoConfig, ranks: ProcessGroup) -> OutputPaths:
    """Make the output folder; refuse one that holds what an interrupted run did not leave."""
    folder = make_folder(config.out)
    paths = OutputPaths(folder / "annotations.json", folder / "overlays", config.overlays != "none")
    if ranks.is_first and any(folder.iterdir()) and not paths.partial.exists():
        raise FileExistsError(
            f"--out {config.out} is not empty, and holds no unfinished run. Pass another folder."
        )
    return paths


class TrackedVideo(NamedTuple):
    """What a run tells of a video.

    Attributes:
        name: of its folder of frames.
        frames: number of frames.
        objects: number of objects.
    """

    name: str
    frames: int
    objects: int


def _annotate(
    config: AnnotateVideoConfig,
    paths: Mapping[str, str],
    outputs: OutputPaths,
    tracker: VideoTracker,
    prompter: Prompter,
    ranks: ProcessGroup,
) -> list[TrackedVideo]:
    if ranks.is_first:
        settings = asdict(config) | {"prompts_digest": prompter.identity}
        settings["weights"] = tracker.backbone.identity
        VideoResults.prepare(outputs.partial, settings)
    ranks.wait()
    results, start, frames = VideoResults(outputs.partial, list(paths)), time.monotonic(), 0
    if ranks.is_first and (done := results.done()):
        print(f"Resuming: {len(done)} of {len(paths)} videos are done.")
    with ProgressBar(disable=not ranks.is_first) as bar:

        def work(*, wait: bool = False) -> None:
            nonlocal frames
            for name in results.claim(wait=wait):
                try:
                    source = open_video(paths[name])
                    task = bar.add_task(printable(name), total=len(source))
                    prompts = prompter.prompts(name, source)
                    advance = partial(bar.advance, task)
                    video = _track(config, name, source, tracker, prompts, advance)
                except (ValueError, OSError) as error:
                    results.skip(name, str(error).removeprefix(f"{paths[name]}: "))
                    continue
                if config.frames:
                    folder = outputs.annotations.parent / FRAME_FOLDERS[config.video_format] / name
                    for _ in write_frames(folder, video.frames, source):
                        pass
                if outputs.has_overlays:
                    outputs.overlays.mkdir(exist_ok=True)
                    target = outputs.overlays / f"{name}.{config.overlays}"
                    save_video(target, _drawn(video, source), fps=12)
                results.add(video)
                frames += len(video.frames)

        work()
        ranks.wait()
        if ranks.is_first:  # those of the processes of another job that has died meanwhile
            work(wait=True)
    seconds, frames = time.monotonic() - start, sum(ranks.gather(frames))
    videos = [TrackedVideo(own.name, len(own.frames), len(own.objects)) for own in results]
    if ranks.is_first:
        skipped = results.skipped()
        for name, reason in skipped.items():
            print(printable(f"skipped {paths[name]}: {reason}"))
        if not videos:
            raise ValueError("No video was annotated: see the reasons above.")
        root, categories = outputs.annotations.parent, list(prompter.categories)
        description = f"masklets by {config.backbone}"
        written = write_masklets(root, results, categories, config.video_format, description)
        count = sum(video.objects for video in videos)
        counts = f"{counted(count, 'masklet')} in {counted(len(videos), 'video')}"
        print(printable(f"{counts}, {len(skipped)} skipped: {written}"))
        processes = f" by {ranks.world} processes" if ranks.world > 1 else ""
        rate = f"{frames / seconds:.1f} frames/s"
        print(f"{counted(frames, 'frame')} tracked in {seconds:.1f} s{processes}: {rate}")
    ranks.wait()
    if ranks.is_first and not skipped:  # else the next run tracks only those
        results.remove()
    return videos


def _track(
    config: AnnotateVideoConfig,
    name: str,
    source: FrameSource,
    tracker: VideoTracker,
    prompts: Sequence[ObjectPrompt],
    advance: Callable[[], None],
) -> AnnotatedVideo:
    """Track the objects of a video from their prompts to both of its ends."""
    names = frame_names(source)
    number_of = {stem(own): number for number, own in enumerate(names)}
    keys = list(dict.fromkeys(own.object for own in prompts))[: config.max_objects]
    if config.video_format == "davis":
        check_ids(len(keys), name)
    session = tracker.open([source])
    category: dict[int, str] = {}
    first: dict[int, int] = {}
    for own in prompts:
        if own.object in keys:
            frame = own.frame if isinstance(own.frame, int) else number_of.get(own.frame)
            if frame is None or frame >= len(source):
                raise ValueError(f"it has no frame {own.frame!r}, which is prompted.")
            number = keys.index(own.object) + 1
            category[number] = own.category
            first[number] = min(frame, first.get(number, frame))
            session.prompt(0, frame, number, **own.decoded(), clear=False)
    masks: dict[int, dict[int, str]] = {number: {} for number in category}
    ious: dict[int, list[float]] = {number: [] for number in category}
    seen: set[int] = set()
    for reverse in (False, True):
        for step in session.propagate(reverse=reverse, from_prompts=True):
            found = step.masks(overlap=config.video_format != "davis")
            for key, mask, iou in zip(step.objects, found, step.ious.tolist(), strict=True):
                number = cast(int, key)
                if (step.frame < first[number]) == reverse and mask.any():
                    code = rle.encode(np.asfortranarray(mask, np.uint8))
                    masks[number][step.frame] = code["counts"].decode("ascii")
                    ious[number].append(iou)
            if step.frame not in seen:
                seen.add(step.frame)
                advance()
    objects = {
        number: Masklet(own, float(np.mean(ious[number] or [0.0])), masks[number])
        for number, own in category.items()
    }
    return AnnotatedVideo(name, source.size, written_names(names, config.frames), objects)


# Views -------------------------------------------------------------------------------------------


def _drawn(video: AnnotatedVideo, source: FrameSource) -> Iterator[np.ndarray]:
    """Draw the masks of a video over its frames."""
    empty = np.zeros(video.size, bool)
    for frame in range(len(video.frames)):
        codes = (own.masks.get(frame) for own in video.objects.values())
        masks = [
            empty if code is None else decode([code.encode()], video.size)[0] for code in codes
        ]
        yield draw_masks(source[frame], masks, caption=f"{video.name} {frame}")


def main(args: Sequence[str]) -> list[TrackedVideo]:
    """Run the command line."""
    return annotate_videos(cli.parse(AnnotateVideoConfig, "python -m agents.annotate", args))
