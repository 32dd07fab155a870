"""Annotate images and videos in a browser, with a click agent at one's side.

python -m agents.app --images PHOTOS --policy explicit
python -m agents.app --video clip.mp4
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast
from urllib.parse import quote

import tyro

from agents.annotation.everything import Generator
from agents.annotation.files import OutputPaths
from agents.annotation.interactive.guard import LOOPBACK
from agents.annotation.interactive.library import MASKLETS, VideoLibrary
from agents.annotation.interactive.player import ClickPlayer, PinnedImages
from agents.annotation.interactive.project import ANNOTATIONS, Project
from agents.annotation.interactive.session import Models
from agents.annotation.interactive.workspaces import UPLOADS, VIDEOS, Workspaces
from agents.annotation.presence import Calibration
from agents.annotation.sources import ImageSearch
from agents.annotation.video import find_videos
from agents.evaluate import PolicyAgent
from agents.sharing.pull import local_policy
from sam_gym.backbones import Backbone, BackboneService, load_backbone
from sam_gym.backbones.spec import backbone_help, check_tracks, tracker_help
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.mask_generation.generator import MaskGenerator
from sam_gym.utils import cli
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count, check_settings, whole
from sam_gym.utils.text import printable

#: The agent, unless another or a backbone is named.
DEFAULT_POLICY = "explicit"
#: The tracker of videos, unless another is named.
DEFAULT_TRACKER = "micro_video"
#: Maximum number of files that are not read of which the start prints the reason.
_MOST_LINES = 10


@documented
@dataclass(kw_only=True)
class AppConfig:
    """Annotate images and videos in a browser: click, let an agent click or a tracker go on.

    Every object is written at once, as COCO JSON, and the next start continues: those of images to
    `out`/annotations.json, those of videos to `out`/videos/masklets. Videos that are done become
    the dataset `out`/videos, coco-video. What a tab uploads, and its results, is in `out`/uploads.

    Examples: python -m agents.app --images PHOTOS --policy explicit
              python -m agents.app --video clip.mp4
    """

    images: str | None = None
    """Folder of images and video files, searched recursively (None: only --video and uploads).
    Nothing else is read."""
    video: tuple[str, ...] = ()
    """Video files, folders of frames, or folders of several of these."""
    out: str = "annotations"
    """Folder of the results. Nothing else is written."""
    categories: str = ""
    """Comma-separated names to offer."""
    policy: str | None = None
    """Agent: path of a policy.zip, hf://USER/NAME, or a bundled agent (None: explicit, or no agent
    where --backbone is given)."""
    backbone: Annotated[str | None, tyro.conf.arg(help=backbone_help("SAM without an agent"))] = (
        None
    )
    checkpoint: str | None = None
    """Weights of --backbone, .safetensors or .pth (None: its own)."""
    adapter: str | None = None
    """Adapter file for --backbone that adaptation.train wrote."""
    tracker: Annotated[
        str | None,
        tyro.conf.arg(
            help=tracker_help(
                "Tracker of videos (None: the SAM of images if it has a memory, else micro_video)"
            )
        ),
    ] = None
    tracker_checkpoint: str | None = None
    """Weights of --tracker (None: its own)."""
    tracker_adapter: str | None = None
    """Adapter file for --tracker that adaptation.train_video wrote."""
    frames: bool = True
    """Copy the frames of videos that are done into the dataset."""
    dtype: str = "auto"
    """Precision of --backbone and --tracker: auto (bfloat16 on CUDA, else float32), float32,
    bfloat16 or float16."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than the loopback one need a token, which is printed."""
    port: Annotated[int, whole(1, 65535)] = 8080
    """Port to listen on."""
    token: str | None = None
    """Token that browsers must bring (None: none on the loopback address, else a random one)."""
    max_upload_mib: Count = 64
    """Maximum size of an uploaded file."""
    max_uploads: Count = 100
    """Maximum number of images, and of videos, that a browser tab uploads."""
    max_pixels: Count = 100_000_000
    """Maximum number of pixels of an image, or of a frame of a video."""
    generator: Annotated[Generator, tyro.conf.arg(name="")] = field(default_factory=Generator)
    """Where everything mode prompts, and which masks it keeps."""


def load_models(config: AppConfig) -> Models:
    """Load the SAM, and the agent if there is one.

    Raises:
        ValueError, OSError: an option or the weights are wrong.
    """
    player = None
    if config.backbone is None:
        for name in ("checkpoint", "adapter"):
            if getattr(config, name) is not None:
                raise ValueError(f"--{name} is for --backbone: name that too.")
        policy = config.policy or DEFAULT_POLICY
        agent = PolicyAgent.load(policy, config.device)
        player = ClickPlayer(agent, Calibration.read(local_policy(policy)))
        backbone, images = player.backbone, player.images
    elif config.policy is not None:
        raise ValueError(
            "An agent clicks on the SAM that it was trained on: pass --policy or --backbone, not "
            "both."
        )
    else:
        backbone = load_backbone(
            config.backbone, config.checkpoint, config.device, config.dtype, adapter=config.adapter
        )
        images = PinnedImages(backbone)
    generator = MaskGenerator(backbone, config.generator)
    tracker = _LazyTracker(config, backbone)
    return Models(backbone, images, player, generator, config.max_pixels, tracker)


class _LazyTracker:
    """Loads the tracker of videos when it is first asked for.

    Args:
        config: its options.
        backbone: the SAM of images.

    Raises:
        ValueError: an option of the tracker comes without it.
    """

    def __init__(self, config: AppConfig, backbone: BackboneService) -> None:
        for name in ("tracker_checkpoint", "tracker_adapter"):
            if config.tracker is None and getattr(config, name) is not None:
                raise ValueError(f"{cli.option(name)} is for --tracker: name that too.")
        if config.tracker is not None:
            check_tracks(config.tracker)
        self._config, self._backbone = config, backbone
        self._lock = threading.Lock()
        self._tracker: VideoTracker | None = None

    def __call__(self) -> VideoTracker:
        """Return the tracker.

        Raises:
            ValueError, OSError: it is no tracker, or its weights are wrong.
        """
        with self._lock:
            if self._tracker is None:
                self._tracker = self._load()
            return self._tracker

    def _load(self) -> VideoTracker:
        config, own = self._config, self._backbone
        if config.tracker is not None or getattr(own, "memory", None) is None:
            own = load_backbone(
                config.tracker or DEFAULT_TRACKER,
                config.tracker_checkpoint,
                config.device,
                config.dtype,
                adapter=config.tracker_adapter,
            )
        return VideoTracker(cast(Backbone, own), keep="window")


def prepare(config: AppConfig) -> tuple[Workspaces, OutputPaths]:
    """Check the options, list the images and load the models.

    Raises:
        ValueError, OSError: an option, the folder, the results of an earlier start, or the weights
            are wrong.
    """
    check_settings(config, cli.option)
    config.generator.validate()
    out, outputs = Path(config.out), _outputs(config)
    names = tuple(filter(None, (name.strip() for name in config.categories.split(","))))
    folder, library = None, VideoLibrary(out / VIDEOS, config.max_pixels, names)
    if config.video:
        library.add(find_videos(config.video))
        for path in map(os.path.expanduser, config.video):
            if os.path.isfile(path):
                _check_video(library, path)
    if config.images is not None:
        written = outputs.existing() | {str((out / own).resolve()) for own in (UPLOADS, VIDEOS)}
        # Frames of a video are no images to annotate one by one.
        written |= {os.path.realpath(path) for path in find_videos(config.video).values()}
        library.add_below(config.images, written)
        search = ImageSearch(config.images, written)
        files = [record.file for record in search]
        if not files and not library.files:
            raise search.none_found()
        for line in search.left_out(_MOST_LINES):
            print(printable(line), flush=True)
        folder = Project(Path(config.images), outputs.annotations, files, names)
    models = load_models(config)
    if library.files or config.tracker is not None:
        models.tracker()
    bounds = {"max_uploads": config.max_uploads, "max_upload": config.max_upload_mib * 2**20}
    tabs = Workspaces(models, folder, library, out, names, copy_frames=config.frames, **bounds)
    return tabs, outputs


def _check_video(library: VideoLibrary, path: str) -> None:
    """Raise `ValueError` if a named file cannot be opened here, such as one that is too large."""
    file = os.path.basename(os.path.abspath(path))
    try:
        library.read(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"--video {path}: {str(error).removeprefix(f'{file}: ')}") from None


def _outputs(config: AppConfig) -> OutputPaths:
    return OutputPaths.prepare(str(Path(config.out) / ANNOTATIONS), "none")


@contextmanager
def _removed_on_failure(folders: Sequence[Path], lock: Path) -> Iterator[None]:
    """Remove folders that were made for nothing, innermost first, and the lock in them."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if folders:
                lock.unlink(missing_ok=True)
            for folder in folders:
                folder.rmdir()
        raise


def serve(config: AppConfig) -> None:
    """Serve the app until it is interrupted.

    Raises:
        ValueError, OSError: as of `prepare`; the token is empty; the address cannot be used; or
            another process writes the same results.
        ImportError: the extra "app" is not installed.
    """
    try:
        from agents.annotation.interactive.server import run_server
    except ImportError as error:
        raise ImportError(f"{error}. The app needs NiceGUI: pip install 'sam-gym[app]'.") from None
    check_settings(config, cli.option)
    if config.token == "":
        raise ValueError("--token is empty: pass one, or leave the option out for a random one.")
    listener = _listen(config.host, config.port)
    is_local = config.host in LOOPBACK
    token = config.token
    if token is None and not is_local:
        token = secrets.token_urlsafe(24)
    # Locked before they are read: objects that another process still saves would be overwritten.
    out = Path(config.out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    paths = _outputs(config)
    with paths.locked():
        with _removed_on_failure(made, paths.lock):
            workspaces, outputs = prepare(config)
        name = f"[{config.host}]" if ":" in config.host else config.host
        query = "" if token is None else f"?token={quote(token, safe='')}"
        print(f"Open http://{name}:{config.port}/{query}", flush=True)
        results = [str(outputs.annotations)] if workspaces.folder is not None else []
        if workspaces.library is not None and workspaces.library.files:
            results.append(str(workspaces.library.out / MASKLETS))
        print(f"Results: {' and '.join(results) or config.out}. Ctrl-C ends the app.", flush=True)
        hosts = LOOPBACK if is_local else None
        run_server(workspaces, listener, token, hosts)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, before models are loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}). Choose another."
        ) from None


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    serve(cli.parse(AppConfig, "python -m agents.app", args))


if __name__ == "__main__":
    cli.run(main, "Everything that was saved is in --out.")
