"""The videos of a folder, their masklets, and the dataset of those that are done."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from agents.annotation.interactive.job import Job, stepwise
from agents.annotation.interactive.masklets import Masklets, info_of
from agents.annotation.interactive.queue import Queue
from agents.annotation.video_frames import (
    VIDEO_SUFFIXES,
    frame_names,
    write_frames,
    written_names,
)
from sam_gym.backbones.video.frames import FrameSource, open_video
from sam_gym.data.io import Reject, resolve
from sam_gym.data.videos.writer import FRAME_FOLDERS, AnnotatedVideo, write_masklets
from sam_gym.utils.files import write_atomic
from sam_gym.utils.text import counted, safe_name

#: Folder of the videos' COCO files in the folder of results.
MASKLETS = "masklets"
#: Maximum length of the name of an uploaded video in bytes, without its number and suffix.
_MAX_LABEL = 180
#: How files of videos begin, at an offset: MP4 and MOV (their first box), Matroska and WebM, AVI,
#: MPEG, Windows Media. Playlists, which decoders take for videos, too, would name other files.
_SIGNATURES = (
    (4, b"ftyp"),
    (4, b"moov"),
    (4, b"mdat"),
    (4, b"wide"),
    (4, b"free"),
    (4, b"skip"),
    (0, b"\x1aE\xdf\xa3"),
    (0, b"RIFF"),
    (0, b"\x00\x00\x01\xb3"),
    (0, b"\x00\x00\x01\xba"),
    (0, b"0&\xb2u\x8ef\xcf\x11"),
)


def is_video(start: bytes) -> bool:
    """Return whether a file that begins so is a video."""
    return any(start[at:].startswith(magic) for at, magic in _SIGNATURES)


@dataclass(frozen=True)
class _Place:
    """Where a video is.

    Attributes:
        path: of the file, or of the folder of frames.
        root: folder that it may not leave, or None.
    """

    path: str
    root: str | None


class VideoLibrary(Queue):
    """Videos and their masklets.

    Args:
        out: folder of the results: `masklets` has a COCO file for each video, which is written
            after every change; `annotations.json` and `images` are the dataset of all videos that
            are done, `coco-video`.
        max_pixels: bound on the pixels of a frame, checked before they are decoded.
        names: categories to begin with.

    Attributes:
        files: the videos, as people know them.
    """

    def __init__(self, out: Path, max_pixels: int, names: Sequence[str] = ()) -> None:
        super().__init__([])
        self.out, self.max_pixels, self.names = out, max_pixels, list(names)
        self._places: dict[str, _Place] = {}
        self._names: dict[str, str] = {}
        # Those that somebody has open.
        self._open: WeakValueDictionary[str, Masklets] = WeakValueDictionary()
        self._copying: list[Job] = []
        self._lock = threading.RLock()

    # Videos ------------------------------------------------------------------------------------

    def add_below(self, root: str, written: Collection[str] = ()) -> None:
        """Add the video files below a folder; links that lead out of it are left out.

        Args:
            root: the folder.
            written: real paths of files and folders to leave out.
        """
        found = []
        for folder, folders, files in os.walk(root):
            real = os.path.realpath(folder)

            def is_left_out(name: str, real: str = real) -> bool:
                return name.startswith(".") or os.path.join(real, name) in written

            folders[:] = [own for own in folders if not is_left_out(own)]
            found += [
                os.path.relpath(os.path.join(folder, own), root).replace(os.sep, "/")
                for own in files
                if os.path.splitext(own)[1].lower() in VIDEO_SUFFIXES and not is_left_out(own)
            ]
        for file in sorted(found):
            try:
                path = resolve(root, file)
            except Reject:
                continue
            self._add(file, _Place(path, root), os.path.splitext(file)[0])

    def add(self, videos: Mapping[str, str]) -> None:
        """Add videos by name, files or folders of frames; those that are known are left out."""
        known = {os.path.realpath(own.path) for own in self._places.values()}
        for name, path in videos.items():
            if os.path.realpath(path) not in known:
                self._add(os.path.basename(os.path.abspath(path)), _Place(path, None), name)

    def put(self, name: str, data: bytes, max_files: int) -> int:
        """Write an uploaded video; returns its index in `files`.

        Args:
            name: of the file; a number is added to names that are taken.
            data: content of the file.
            max_files: bound on the number of videos.

        Raises:
            ValueError: it is no video, its frames are too large, or there are too many videos.
            OSError: it could not be written.
        """
        label, suffix = os.path.splitext(name)
        # Room for a number: `safe_name` shortens the name of its results, too.
        label = safe_name(label).lstrip(".").encode()[:_MAX_LABEL].decode(errors="ignore")
        label = label or "video"
        if suffix.lower() not in VIDEO_SUFFIXES or not is_video(data[:16]):
            raise ValueError(f"{name}: no video that is read. Convert it to MP4.")
        with self._lock:
            if len(self.files) >= max_files:
                raise ValueError(
                    f"No more than {counted(max_files, 'video')} can be uploaded (--max-uploads)."
                )
            taken, file, number = {own.lower() for own in self.files}, f"{label}{suffix}", 1
            while file.lower() in taken:
                number += 1
                file = f"{label}-{number}{suffix}"
            folder = self.uploads
            folder.mkdir(parents=True, exist_ok=True)
            path = write_atomic(folder / file, data)
            try:
                open_video(path, self.max_pixels)
                self._add(file, _Place(str(path), str(folder)), os.path.splitext(file)[0])
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return len(self.files) - 1

    @property
    def uploads(self) -> Path:
        """Folder of uploaded videos."""
        return self.out / "videos"

    def _add(self, file: str, place: _Place, label: str) -> None:
        """Add a video; its name is the label, or the whole file where another has that.

        Videos that come and go do not change the names of those with results.
        """
        taken = {own.lower() for own in self._names.values()}
        wanted = [safe_name(own).lstrip(".") or "video" for own in (label, file)]
        free = [own for own in wanted if own.lower() not in taken]
        if not free or file in self._places:
            raise ValueError(f"{place.path}: another video has the name {file}. Rename one.")
        owners = {own: info_of(self._path_of(own)).get("file") for own in free}
        free.sort(key=lambda own: 0 if owners[own] == file else 1 if owners[own] is None else 2)
        self.files.append(file)
        self._places[file], self._names[file] = place, free[0]

    def read(self, file: str) -> FrameSource:
        """Open a video to read its frames.

        Raises:
            ValueError, OSError: it is not in the library, no video, its frames are too large, or a
                link leads out of the folder.
        """
        if file not in self._places:
            raise ValueError(f"{file}: not a video of this folder.")
        place = self._places[file]
        try:
            if place.root is not None:  # again: links may have changed
                resolve(place.root, os.path.relpath(place.path, place.root))
            if os.path.isfile(place.path):
                with open(place.path, "rb") as content:
                    if not is_video(content.read(16)):
                        raise ValueError(f"{file}: no video that is read. Convert it to MP4.")
            source = open_video(place.path, self.max_pixels)
            for own in getattr(source, "files", ()):
                resolve(place.path, own.name)
        except Reject as reject:
            raise ValueError(f"{file}: {reject.reason}.") from None
        return source

    # Masklets ----------------------------------------------------------------------------------

    def _path(self, file: str) -> Path:
        return self._path_of(self._names[file])

    def _path_of(self, name: str) -> Path:
        return self.out / MASKLETS / f"{name}.json"

    def results(self) -> list[Path]:
        return [self._path(file) for file in self.files]

    def is_done(self, file: str) -> bool:
        with self._lock:
            known = self._open.get(file)
        return bool(info_of(self._path(file)).get("done")) if known is None else known.is_done

    def masklets(self, file: str, source: FrameSource) -> Masklets:
        """Return the masklets of a video, the same for all who have it open.

        Raises:
            ValueError: its COCO file is of another video, or no such file.
        """
        with self._lock:
            own = self._open.get(file)
            if own is None:
                names = written_names(frame_names(source), copied=True)
                path = self._path(file)
                path.parent.mkdir(parents=True, exist_ok=True)
                own = Masklets(path, file, self._names[file], source.size, names, self.names)
                self._open[file] = own
            return own

    # The dataset -------------------------------------------------------------------------------

    def copy_frames(self, file: str) -> Job:
        """Begin to add a video that is done to the dataset: write its frames, then the COCO file.

        Raises:
            ValueError, OSError: as of `read`.
        """
        source = self.read(file)
        with self._lock:
            self._copying = [own for own in self._copying if own.is_running]
            work = self._copy(file, source)
            self._copying.append(Job(f"Writing frames of {file}", stepwise(work), len(source)))
            return self._copying[-1]

    @property
    def copying(self) -> Job | None:
        """The first job that writes frames, or None."""
        with self._lock:
            return next((own for own in self._copying if own.is_running), None)

    def _copy(self, file: str, source: FrameSource) -> Generator[int, None, None]:
        names = written_names(frame_names(source), copied=True)
        folder = self.out / FRAME_FOLDERS["coco-video"] / self._names[file]
        yield from write_frames(folder, names, source)
        self.write_dataset()

    def write_dataset(self) -> Path:
        """Write the COCO file of all videos that are done."""
        with self._lock:
            videos = _DoneVideos(self)
            names = dict.fromkeys(
                own.category for video in videos for own in video.objects.values()
            )
            description = "masklets of agents.app"
            return write_masklets(self.out, videos, list(names), "coco-video", description)


class _DoneVideos(Iterable[AnnotatedVideo]):
    """The videos of a library that are done and whose frames are written, one at a time."""

    def __init__(self, library: VideoLibrary) -> None:
        self._library = library

    def __iter__(self) -> Iterator[AnnotatedVideo]:
        for path in sorted(self._library.results()):
            if info_of(path).get("done"):
                video = Masklets.read(path).annotated()
                folder = self._library.out / FRAME_FOLDERS["coco-video"] / video.name
                if all((folder / name).exists() for name in video.frames):
                    yield video
