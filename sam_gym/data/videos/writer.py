"""Write masklets in the formats that `CocoVideo`, `YoutubeVis` and `Davis` read."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from sam_gym.data.videos.davis import FRAMES, MASKS, VOID
from sam_gym.data.videos.reader import decode
from sam_gym.utils.files import write_atomic, write_tables

#: Formats of masklets: COCO JSON of videos, YouTube-VIS JSON, DAVIS 2017.
VideoFormat = Literal["coco-video", "youtube-vis", "davis"]
#: Format -> folder of the frames.
FRAME_FOLDERS: dict[VideoFormat, str] = {
    "coco-video": "images",
    "youtube-vis": FRAMES,
    "davis": FRAMES,
}
ANNOTATIONS = "annotations.json"


@dataclass(frozen=True)
class Masklet:
    """An object of a video with a mask in each frame in which it is seen.

    Attributes:
        category: name of its category.
        score: confidence.
        masks: frame -> counts of a compressed RLE, as text.
    """

    category: str
    score: float
    masks: Mapping[int, str]


@dataclass(frozen=True)
class AnnotatedVideo:
    """A video with its masklets.

    Attributes:
        name: of its folder of frames.
        size: (height, width).
        frames: names of the files of frames, in order.
        objects: id, from 1 on -> masklet.
    """

    name: str
    size: tuple[int, int]
    frames: Sequence[str]
    objects: Mapping[int, Masklet] = field(default_factory=dict)

    def code(self, counts: str) -> dict[str, Any]:
        """The RLE of a mask."""
        return {"size": list(self.size), "counts": counts}


def write_masklets(
    root: Path,
    videos: Iterable[AnnotatedVideo],
    categories: Sequence[str],
    video_format: VideoFormat,
    description: str = "",
) -> Path:
    """Write masklets into a folder whose frames lie in `FRAME_FOLDERS[video_format]`.

    Args:
        root: the folder.
        videos: names are unique. They are iterated more than once, and held one at a time.
        categories: names of all categories; their ids are 1, 2, 3, ... DAVIS has none.
        video_format: "coco-video" or "youtube-vis", a file annotations.json; "davis", one PNG file
            of ids per frame in Annotations, where a pixel of several objects gets the first id.
        description: `info` of a JSON file.

    Returns:
        Path of the file, or of the folder Annotations.

    Raises:
        ValueError: a video has too many objects for DAVIS.
    """
    if video_format == "davis":
        for video in videos:
            _write_ids(root / MASKS / video.name, video)
        return root / MASKS
    ids = {name: number for number, name in enumerate(categories, start=1)}
    table = [{"id": number, "name": name} for name, number in ids.items()]
    tables: dict[str, Iterator[dict[str, Any]]]
    if video_format == "coco-video":
        tables = {"images": image_records(videos), "annotations": _coco_annotations(videos, ids)}
    else:
        annotations = _youtube_vis_annotations(videos, ids)
        tables = {"videos": _youtube_vis_videos(videos), "annotations": annotations}
    content: dict[str, Any] = {"info": {"description": description}, **tables, "categories": table}
    return write_tables(root / ANNOTATIONS, content)


def image_records(videos: Iterable[AnnotatedVideo]) -> Iterator[dict[str, Any]]:
    """Yield the image records of "coco-video"."""
    numbers = itertools.count(1)
    for video in videos:
        height, width = video.size
        for order, name in enumerate(video.frames):
            image = {"id": next(numbers), "file_name": f"{video.name}/{name}"}
            image |= {"height": height, "width": width}
            yield image | {"video_id": video.name, "order_in_video": order}


def _coco_annotations(
    videos: Iterable[AnnotatedVideo], ids: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    numbers, first = itertools.count(1), 1
    for video in videos:
        for track, masklet in video.objects.items():
            for frame, counts in sorted(masklet.masks.items()):
                code = video.code(counts)
                yield {
                    "id": next(numbers),
                    "image_id": first + frame,
                    "category_id": ids[masklet.category],
                    "track_id": track,
                    "segmentation": code,
                    "area": int(rle.area(code)),
                    "bbox": rle.toBbox(code).tolist(),
                    "iscrowd": 0,
                    "score": masklet.score,
                }
        first += len(video.frames)


def _youtube_vis_videos(videos: Iterable[AnnotatedVideo]) -> Iterator[dict[str, Any]]:
    for number, video in enumerate(videos, start=1):
        names = [f"{video.name}/{name}" for name in video.frames]
        yield {"id": number, **_shape(video), "file_names": names}


def _youtube_vis_annotations(
    videos: Iterable[AnnotatedVideo], ids: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    numbers = itertools.count(1)
    for number, video in enumerate(videos, start=1):
        for masklet in video.objects.values():
            codes = [
                video.code(masklet.masks[frame]) if frame in masklet.masks else None
                for frame in range(len(video.frames))
            ]
            yield {
                "id": next(numbers),
                "video_id": number,
                "category_id": ids[masklet.category],
                # trackeval asks for the size and iscrowd of each annotation.
                **_shape(video),
                "iscrowd": 0,
                "segmentations": codes,
                "areas": [code and int(rle.area(code)) for code in codes],
                "bboxes": [code and rle.toBbox(code).tolist() for code in codes],
                "score": masklet.score,
            }


def _shape(video: AnnotatedVideo) -> dict[str, int]:
    height, width = video.size
    return {"height": height, "width": width, "length": len(video.frames)}


# DAVIS -------------------------------------------------------------------------------------------


def check_ids(count: int, video: str) -> None:
    """Raise `ValueError` if DAVIS's files of ids cannot hold the objects of a video."""
    if count >= VOID:
        raise ValueError(
            f"{video}: {count} objects, and files of DAVIS hold at most {VOID - 1}. Choose another "
            "--video-format, or pass --max-objects."
        )


def _write_ids(folder: Path, video: AnnotatedVideo) -> None:
    check_ids(max(video.objects, default=0), video.name)
    folder.mkdir(parents=True, exist_ok=True)
    palette = davis_palette().ravel().tolist()
    for frame, name in enumerate(video.frames):
        ids = np.zeros(video.size, np.uint8)
        for number, masklet in sorted(video.objects.items(), reverse=True):
            if frame in masklet.masks:
                ids[decode([masklet.masks[frame].encode()], video.size)[0]] = number
        picture = Image.fromarray(ids, mode="P")
        picture.putpalette(palette)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_atomic(folder / f"{Path(name).stem}.png", buffer.getvalue())


def davis_palette() -> np.ndarray:
    """Return the palette of Pascal VOC, whose first colours are DAVIS's: uint8 (256, 3), RGB.

    Bits 0, 3 and 6 of an index become the highest bits of red, bits 1, 4 and 7 those of green, bits
    2 and 5 those of blue.
    """
    index = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for channel in range(3):
        for step in range(3):
            bit = (index >> (3 * step + channel)) & 1
            colours[:, channel] |= (bit << (7 - step)).astype(np.uint8)
    return colours
