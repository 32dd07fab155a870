"""Datasets by name: `make_dataset("scenes", split="test")`, `make_video_dataset("clips")`."""

from __future__ import annotations

from functools import partial
from typing import Any

from sam_gym.data.base import (
    Dataset,
    DatasetSpec,
    FrameAnnotation,
    MissingSplit,
    Sample,
    Video,
    VideoDataset,
)
from sam_gym.utils.registry import Registry

__all__ = [
    "DATASETS",
    "VIDEO_DATASETS",
    "Dataset",
    "DatasetSpec",
    "FrameAnnotation",
    "MissingSplit",
    "Sample",
    "Video",
    "VideoDataset",
    "dataset_help",
    "dataset_table",
    "make_dataset",
    "make_video_dataset",
    "register_dataset",
    "register_video_dataset",
    "video_dataset_help",
    "video_dataset_table",
]

#: Dataset name -> its specification; "module:Class" is a name, too.
DATASETS: Registry[DatasetSpec[Dataset]] = Registry(
    "dataset", partial(DatasetSpec[Dataset].of, ("__len__", "__getitem__", "draw"))
)
#: Name of a dataset of videos -> its specification; "module:Class" is a name, too.
VIDEO_DATASETS: Registry[DatasetSpec[VideoDataset]] = Registry(
    "video dataset", partial(DatasetSpec[VideoDataset].of, ("__len__", "__getitem__"))
)


def register_dataset(spec: DatasetSpec[Dataset]) -> DatasetSpec[Dataset]:
    """Add a dataset, so that `make_dataset`, environments, streams and commands know its name.

    Worker processes know it if they import the module that calls this; `dataset="module:Class"`,
    the class or a `DatasetSpec`, works in all processes without registration.

    Raises:
        ValueError: the name is taken.
    """
    return DATASETS.add(spec.name, spec)


def register_video_dataset(spec: DatasetSpec[VideoDataset]) -> DatasetSpec[VideoDataset]:
    """Add a dataset of videos, so that `make_video_dataset` and commands know its name.

    Raises:
        ValueError: the name is taken.
    """
    return VIDEO_DATASETS.add(spec.name, spec)


def make_dataset(name: str, split: str = "train", **options: Any) -> Dataset:
    """Make a registered dataset.

    Args:
        name: one of `DATASETS`, or "module:Class".
        split: "train", "val" or "test".
        **options: options of the dataset, for example `root=` of one that reads files.

    Raises:
        ValueError: the name, the split or an option is unknown, or the data does not validate.
        FileNotFoundError: a file or folder is missing.
    """
    return DATASETS.get(name).make(split, **options)


def make_video_dataset(name: str, split: str = "train", **options: Any) -> VideoDataset:
    """Make a registered dataset of videos: one of `VIDEO_DATASETS`, otherwise as `make_dataset`."""
    return VIDEO_DATASETS.get(name).make(split, **options)


def dataset_help() -> str:
    """Return the help text of an option that takes a dataset: the valid names."""
    return f"Dataset name: {', '.join(DATASETS.names())}, or module:Class."


def video_dataset_help() -> str:
    """Return the help text of an option that takes a dataset of videos: the valid names."""
    return f"Name of a dataset of videos: {', '.join(VIDEO_DATASETS.names())}, or module:Class."


def dataset_table() -> str:
    """Return the table of datasets as Markdown, for the README."""
    return _table("images", DATASETS)


def video_dataset_table() -> str:
    """Return the table of datasets of videos as Markdown, for the README."""
    return _table("videos", VIDEO_DATASETS)


def _table(content: str, registry: Registry[DatasetSpec[Any]]) -> str:
    rows = [f"| `dataset=` | {content} | `data=` |", "|---|---|---|"]
    for name, spec in registry.items():
        rows.append(f"| `{name}` | {spec.description} | {'folder' if spec.reads_files else ''} |")
    return "\n".join(rows)


_IMAGES: tuple[DatasetSpec[Dataset], ...] = (
    DatasetSpec(
        name="scenes",
        entry_point="sam_gym.data.synthetic.scenes:Scenes",
        description="Objects of ten categories on textured ground, with clutter.",
        procedural=True,
    ),
    DatasetSpec(
        name="rooms",
        entry_point="sam_gym.data.synthetic.rooms.dataset:Rooms",
        description="Rooms with furniture; the parts of an object have different colours.",
        procedural=True,
    ),
    DatasetSpec(
        name="rooms-panoramas",
        entry_point="sam_gym.data.synthetic.rooms.dataset:RoomsPanoramas",
        description="Wide rooms with more objects.",
        procedural=True,
    ),
    DatasetSpec(
        name="domain",
        entry_point="sam_gym.data.synthetic.domains.dataset:ProceduralDomain",
        description="One of the domains of the stream `scenes-domains`, chosen by `kind`.",
        procedural=True,
    ),
    DatasetSpec(
        name="coco",
        entry_point="sam_gym.data.coco:Coco",
        description="COCO instance annotations: polygons and RLE. The test split is not annotated.",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="folder",
        entry_point="sam_gym.data.folder:Folder",
        description="A folder of images with one mask or instance map each.",
        reads_files=True,
    ),
    DatasetSpec(
        name="entities",
        entry_point="sam_gym.data.entities:Entities",
        description="Whole objects with one mask file each (SAOM, EntitySeg).",
        reads_files=True,
    ),
    DatasetSpec(
        name="cityscapes",
        entry_point="sam_gym.data.cityscapes:Cityscapes",
        description="Street scenes with label maps and instances; 19 or 5 classes.",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="camvid",
        entry_point="sam_gym.data.labelmaps:CamVid",
        description="Street scenes with label maps of 11 classes, in SegNet's form.",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="ade20k",
        entry_point="sam_gym.data.ade20k:Ade20k",
        description="Label maps of 150 classes (SceneParsing, ADEChallengeData2016).",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="ade20k-full",
        entry_point="sam_gym.data.ade20k:Ade20kFull",
        description="ADE20K with all its classes, of which 150 are read, and objects.",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="voc",
        entry_point="sam_gym.data.voc:Voc",
        description="Pascal VOC segmentation: classes and objects as palette images.",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="coco-panoptic",
        entry_point="sam_gym.data.panoptic:CocoPanoptic",
        description="COCO panoptic segmentation: PNG files of segments, and JSON.",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="labelmaps",
        entry_point="sam_gym.data.labelmaps:LabelMaps",
        description="A folder of images and label maps, and classes.json.",
        reads_files=True,
    ),
)
_VIDEOS: tuple[DatasetSpec[VideoDataset], ...] = (
    DatasetSpec(
        name="clips",
        entry_point="sam_gym.data.synthetic.clips:Clips",
        description="Moving objects of `scenes` that hide each other, leave and return.",
        procedural=True,
    ),
    DatasetSpec(
        name="coco-video",
        entry_point="sam_gym.data.videos.coco_video:CocoVideo",
        description="COCO JSON whose images have `video_id` and `order_in_video`.",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="davis",
        entry_point="sam_gym.data.videos.davis:Davis",
        description="DAVIS 2016 (one object) and 2017 (several).",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="mose",
        entry_point="sam_gym.data.videos.davis:Mose",
        description="MOSE. Of the val split, only first frames are annotated.",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="sav",
        entry_point="sam_gym.data.videos.sav:Sav",
        description="SA-V: videos with JSON (train), folders of frames and masks (val, test).",
        reads_files=True,
    ),
    DatasetSpec(
        name="youtube-vis",
        entry_point="sam_gym.data.videos.youtube_vis:YoutubeVis",
        description="YouTube-VIS and OVIS JSON. The val split is published without masks.",
        reads_files=True,
        held_out_split="val",
    ),
)
for _images in _IMAGES:
    register_dataset(_images)
for _videos in _VIDEOS:
    register_video_dataset(_videos)
