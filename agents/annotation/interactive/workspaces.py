"""The sessions of all browser tabs, each with its own uploads."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from agents.annotation.interactive.drawing import jpeg_of
from agents.annotation.interactive.library import VideoLibrary
from agents.annotation.interactive.project import ANNOTATIONS, Project
from agents.annotation.interactive.queue import Queue
from agents.annotation.interactive.session import Models, Session
from agents.annotation.interactive.video_session import VideoSession
from agents.annotation.video_frames import VIDEO_SUFFIXES
from sam_gym.backbones.zoom import Window
from sam_gym.data.io import IMAGE_SUFFIXES
from sam_gym.utils.digest import text_digest

#: Folder of uploaded images in the folder of results.
UPLOADS = "uploads"
#: Folder of videos and their masklets in a folder of results.
VIDEOS = "videos"
#: Tabs whose images are held in memory.
MAX_TABS = 16


@dataclass
class Workspace:
    """What belongs to one tab.

    Attributes:
        session: the work in progress on images.
        videos: the work in progress on videos.
        folder: images of `--images`, which all tabs share, or None.
        library: videos of `--images` and `--video`, which all tabs share, or None.
        uploads: images that this tab has uploaded.
        uploaded_videos: videos that this tab has uploaded.
        queue: of these, the one that is worked through.
    """

    session: Session
    videos: VideoSession
    folder: Project | None
    library: VideoLibrary | None
    uploads: Project
    uploaded_videos: VideoLibrary
    queue: Queue

    def queues(self) -> dict[str, Queue]:
        """Return what a person can choose from, by name."""
        named = {
            "Images": self.folder,
            "Videos": self.library,
            "Uploads": self.uploads,
            "Uploaded videos": self.uploaded_videos,
        }
        return {
            name: queue
            for name, queue in named.items()
            if queue is not None and (queue.files or queue is self.queue)
        }

    @property
    def index(self) -> int:
        """Index in the queue of the file that is open."""
        is_video = isinstance(self.queue, VideoLibrary)
        return self.videos.index if is_video else self.session.index

    @property
    def file(self) -> str | None:
        """The file that is open, or None."""
        if isinstance(self.queue, VideoLibrary):
            return None if self.videos.video is None else self.videos.video.file
        return None if self.session.image is None else self.session.image.file

    def show(self, queue: Queue, index: int | None = None) -> list[str]:
        """Open a file of a queue; None: the first that is not finished and can be opened.

        Where there is none, the open file of the queue stays, else the first is opened.

        Returns:
            Why files that were tried before it could not be opened.

        Raises:
            ValueError, OSError, MemoryError: as of `open` of the sessions; the open file stays.
        """
        if index is not None:
            self._show(queue, index)
            return []
        reasons: list[str] = []
        while True:
            index = queue.first_open()
            try:
                self._show(queue, index)
                return reasons
            except (ValueError, OSError) as error:
                if queue.files[index] not in queue.broken:
                    raise
                reasons.append(str(error))
            stays = queue.is_finished and self.queue is queue and self.file is not None
            if stays or queue.broken.issuperset(queue.files):
                raise ValueError(" ".join(reasons))

    def _show(self, queue: Queue, index: int) -> None:
        if isinstance(queue, VideoLibrary):
            self._show_video(queue, index)
        else:
            assert isinstance(queue, Project)
            self._show_image(queue, index)
        self.queue = queue

    def _show_video(self, library: VideoLibrary, index: int) -> None:
        videos = self.videos
        with videos.lock:
            before, videos.library = videos.library, library
            try:
                videos.open(index)
            except BaseException:
                videos.library = before
                raise
        self.session.close()

    def _show_image(self, project: Project, index: int) -> None:
        self.videos.prepare_close()
        session = self.session
        with session.lock:
            before, session.project = session.project, project
            try:
                session.open(index)
            except BaseException:
                session.project = before
                raise
        self.videos.close()

    def close(self) -> None:
        """Let what is open go."""
        self.session.close()
        self.videos.close()


class Workspaces:
    """The workspaces of all tabs. What a tab has saved outlives its workspace.

    Args:
        models: what all tabs share.
        folder: images of `--images`, or None.
        library: videos of `--images` and `--video`, or None.
        out: folder of results.
        names: categories to begin with.
        max_uploads: bound on the images that a tab uploads.
        max_upload: bound on the bytes of an uploaded file.
        copy_frames: copy the frames of videos that are done into the dataset.
    """

    def __init__(
        self,
        models: Models,
        folder: Project | None,
        library: VideoLibrary | None,
        out: Path,
        names: tuple[str, ...],
        max_uploads: int,
        max_upload: int,
        copy_frames: bool = True,
    ) -> None:
        self.models, self.folder, self.library, self.out = models, folder, library, out
        self.names, self.max_uploads, self.max_upload = names, max_uploads, max_upload
        self.copy_frames = copy_frames
        self._tabs: OrderedDict[str, Workspace] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tab: str) -> Workspace:
        """Return the workspace of a tab; the tab's secret name is known to its browser alone."""
        with self._lock:
            if tab in self._tabs:
                self._tabs.move_to_end(tab)
                return self._tabs[tab]
            made = self._tabs[tab] = self._make(tab)
            old = [self._tabs.popitem(last=False)[1] for _ in range(len(self._tabs) - MAX_TABS)]
        for workspace in old:
            workspace.close()
        return made

    def use(self, workspace: Workspace) -> None:
        """Note that a tab is in use: others let their images go first.

        Raises:
            ValueError: it had to let its own go.
        """
        with self._lock:
            for tab, own in self._tabs.items():
                if own is workspace:
                    self._tabs.move_to_end(tab)
                    return
        raise ValueError("Other tabs needed the memory of this one: reload the page.")

    def _make(self, tab: str) -> Workspace:
        """Return a workspace with the uploads of the tab's earlier visits.

        It begins with the queue whose results were written last.
        """
        own = self.out / UPLOADS / text_digest(tab)
        images = own / "images"
        found = sorted(images.iterdir()) if images.is_dir() else []
        files = [path.name for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
        uploads = Project(images, own / ANNOTATIONS, files, self.names)
        uploaded = VideoLibrary(own / VIDEOS, self.models.max_pixels, self.names)
        if uploaded.uploads.is_dir():
            uploaded.add_below(str(uploaded.uploads))
        shared = [own for own in (self.folder, self.library) if own is not None and own.files]
        queue: Queue = max(shared, key=lambda own: own.last_saved(), default=uploads)
        session = Session(self.models, self.folder or uploads)
        videos = VideoSession(self.models, self.library or uploaded)
        return Workspace(session, videos, self.folder, self.library, uploads, uploaded, queue)

    def upload(self, workspace: Workspace, name: str, data: bytes) -> tuple[Queue, int]:
        """Keep an uploaded image or video; returns the queue of uploads and its index there.

        Raises:
            ValueError, OSError: as of `Project.put` and `VideoLibrary.put`.
        """
        if Path(name).suffix.lower() in VIDEO_SUFFIXES:
            library = workspace.uploaded_videos
            return library, library.put(name, data, self.max_uploads)
        project = workspace.uploads
        return project, project.put(name, data, self.max_uploads, self.models.max_pixels)

    def shown(self, key: str, window: Window | None = None) -> bytes | None:
        """Return the JPEG of the image with a secret name, or None if nobody has it open.

        Args:
            key: the secret name.
            window: only this part of the image, if it is one.
        """
        for image in [own.session.image for own in self._all()]:
            if image is not None and _same(image.key, key):
                return image.shown if window is None else jpeg_of(image.pixels, window)
        return None

    def frame(self, key: str, number: int, window: Window | None = None) -> bytes | None:
        """Return the JPEG of a frame of the video with a secret name, or None; see `shown`.

        Raises:
            ValueError, OSError: the frame cannot be decoded.
        """
        for video in [own.videos.video for own in self._all()]:
            if video is not None and _same(video.key, key):
                return video.viewer.jpeg(number, window) if 0 <= number < len(video) else None
        return None

    def _all(self) -> list[Workspace]:
        with self._lock:
            return list(self._tabs.values())


def _same(secret: str, key: str) -> bool:
    return secrets.compare_digest(secret.encode(), key.encode())
