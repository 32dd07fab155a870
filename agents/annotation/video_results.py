"""Results of videos, a file each, in a folder that an interrupted run leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agents.annotation.files import different
from agents.annotation.shards import claim
from sam_gym.data.videos.writer import AnnotatedVideo, Masklet
from sam_gym.utils.files import plain, write_json

_DONE, _SKIPPED, _SETTINGS = ".video.json", ".skipped.json", "settings.json"


class VideoResults(Iterable[AnnotatedVideo]):
    """The videos of a run that are done, in the order of their names; each is read when it is used.

    Args:
        folder: the folder, which `prepare` has made.
        names: names of all videos.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    @classmethod
    def prepare(cls, folder: Path, settings: Mapping[str, Any]) -> None:
        """Make the folder, or check that it is of an interrupted run with the same settings.

        Videos that were skipped are tried again.

        Raises:
            ValueError: it belongs to a run with other settings.
        """
        folder.mkdir(exist_ok=True)
        path, settings = folder / _SETTINGS, plain(settings)
        if any(folder.glob(f"*{_DONE}")):
            try:
                earlier = json.loads(path.read_bytes())
            except (OSError, ValueError):
                earlier = {}
            if earlier != settings:
                raise ValueError(
                    f"{folder}: left by a run with other settings "
                    f"({', '.join(different(earlier, settings))}). Finish that run with its own "
                    "settings, or remove the folder to start over."
                )
        write_json(path, settings)
        for left in folder.glob(f"*{_SKIPPED}"):
            left.unlink()

    def claim(self, *, wait: bool = False) -> Iterator[str]:
        """Yield the names of videos that are neither done nor skipped; see `shards.claim`."""

        def is_finished(name: str) -> bool:
            return any((self.folder / f"{name}{end}").exists() for end in (_DONE, _SKIPPED))

        return claim(self.names, is_finished, lambda name: self.folder / f"{name}.lock", wait=wait)

    def add(self, video: AnnotatedVideo) -> None:
        """Keep a video that is done."""
        write_json(self.folder / f"{video.name}{_DONE}", asdict(video))

    def skip(self, name: str, reason: str) -> None:
        """Note why a video is skipped."""
        write_json(self.folder / f"{name}{_SKIPPED}", {"reason": reason})

    def skipped(self) -> dict[str, str]:
        """Return the reasons of the videos that are skipped, by name."""
        paths = {name: self.folder / f"{name}{_SKIPPED}" for name in self.names}
        return {
            name: json.loads(path.read_bytes())["reason"]
            for name, path in paths.items()
            if path.exists()
        }

    def done(self) -> list[str]:
        """Return the names of the videos that are done."""
        return [name for name in self.names if (self.folder / f"{name}{_DONE}").exists()]

    def __iter__(self) -> Iterator[AnnotatedVideo]:
        for name in self.done():
            yield _restored(json.loads((self.folder / f"{name}{_DONE}").read_bytes()))

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)


def _restored(result: Mapping[str, Any]) -> AnnotatedVideo:
    """Return a video from JSON, whose keys are text."""
    objects = {
        int(number): Masklet(
            own["category"], own["score"], {int(k): code for k, code in own["masks"].items()}
        )
        for number, own in result["objects"].items()
    }
    height, width = result["size"]
    return AnnotatedVideo(result["name"], (height, width), result["frames"], objects)
