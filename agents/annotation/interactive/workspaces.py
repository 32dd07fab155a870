"""The sessions of all browser tabs, each with its own uploads."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from agents.annotation.interactive.project import ANNOTATIONS, Project
from agents.annotation.interactive.session import Models, Session
from sam_gym.data.io import IMAGE_SUFFIXES
from sam_gym.utils.digest import text_digest

#: Folder of uploaded images in the folder of results.
UPLOADS = "uploads"
#: Tabs whose images are held in memory.
MAX_TABS = 16


@dataclass
class Workspace:
    """What belongs to one tab.

    Attributes:
        session: the work in progress.
        folder: images of `--images`, which all tabs share, or None.
        uploads: images that this tab has uploaded.
    """

    session: Session
    folder: Project | None
    uploads: Project

    def show(self, project: Project, index: int | None = None) -> None:
        """Open an image of a project; None: the first that is not finished.

        Raises:
            ValueError, OSError, MemoryError: as of `Session.open`; the open image stays.
        """
        session = self.session
        with session.lock:
            before, session.project = session.project, project
            try:
                session.open(project.first_open() if index is None else index)
            except BaseException:
                session.project = before
                raise


class Workspaces:
    """The workspaces of all tabs. What a tab has saved outlives its workspace.

    Args:
        models: what all tabs share.
        folder: images of `--images`, or None.
        out: folder of results.
        names: categories to begin with.
        max_uploads: bound on the images that a tab uploads.
        max_upload: bound on the bytes of an uploaded file.
    """

    def __init__(
        self,
        models: Models,
        folder: Project | None,
        out: Path,
        names: tuple[str, ...],
        max_uploads: int,
        max_upload: int,
    ) -> None:
        self.models, self.folder, self.out = models, folder, out
        self.names, self.max_uploads, self.max_upload = names, max_uploads, max_upload
        self._tabs: OrderedDict[str, Workspace] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tab: str) -> Workspace:
        """Return the workspace of a tab; the tab's secret name is known to its browser alone."""
        with self._lock:
            if tab in self._tabs:
                self._tabs.move_to_end(tab)
                return self._tabs[tab]
            uploads = self._uploads(tab)
            session = Session(self.models, self.folder or uploads)
            made = self._tabs[tab] = Workspace(session, self.folder, uploads)
            old = [self._tabs.popitem(last=False)[1] for _ in range(len(self._tabs) - MAX_TABS)]
        for workspace in old:
            workspace.session.close()
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

    def _uploads(self, tab: str) -> Project:
        """Return the uploads of a tab, with those of its earlier visits."""
        own = self.out / UPLOADS / text_digest(tab)
        images = own / "images"
        found = sorted(images.iterdir()) if images.is_dir() else []
        files = [path.name for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
        return Project(images, own / ANNOTATIONS, files, self.names)

    def upload(self, workspace: Workspace, name: str, data: bytes) -> int:
        """Keep an uploaded image; returns its index among the uploads.

        Raises:
            ValueError, OSError: as of `Project.put`.
        """
        return workspace.uploads.put(name, data, self.max_uploads, self.models.max_pixels)

    def shown(self, key: str) -> bytes | None:
        """Return the JPEG with a secret name, or None if nobody has it open."""
        with self._lock:
            sessions = [workspace.session for workspace in self._tabs.values()]
        for image in [session.image for session in sessions]:
            if image is not None and secrets.compare_digest(image.key.encode(), key.encode()):
                return image.shown
        return None
