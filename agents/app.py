"""Annotate images in a browser, with a click agent at one's side.

python -m agents.app --images PHOTOS --policy explicit
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import tyro

from agents.annotation.everything import Generator
from agents.annotation.files import OutputPaths
from agents.annotation.interactive.guard import LOOPBACK
from agents.annotation.interactive.player import ClickPlayer, PinnedImages
from agents.annotation.interactive.project import ANNOTATIONS, Project
from agents.annotation.interactive.session import Models
from agents.annotation.interactive.workspaces import UPLOADS, Workspaces
from agents.evaluate import PolicyAgent
from sam_gym.backbones import load_backbone
from sam_gym.backbones.spec import backbone_help
from sam_gym.mask_generation.generator import MaskGenerator
from sam_gym.utils import cli
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count, check_settings, whole

#: The agent, unless another or a backbone is named.
DEFAULT_POLICY = "explicit"


@documented
@dataclass(kw_only=True)
class AppConfig:
    """Annotate images in a browser: click, let an agent click, save COCO JSON.

    Every object is written at once to `out`/annotations.json, which the next start continues.
    Images that a tab uploads, and their annotations, are in `out`/uploads.

    Example: python -m agents.app --images PHOTOS --policy explicit
    """

    images: str | None = None
    """Folder of images, searched recursively (None: only uploads). Nothing else is read."""
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
    dtype: str = "auto"
    """Precision of --backbone: auto (bfloat16 on CUDA, else float32), float32, bfloat16 or
    float16."""
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
    """Maximum number of images that a browser tab uploads."""
    max_pixels: Count = 100_000_000
    """Maximum number of pixels of an image."""
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
        player = ClickPlayer(PolicyAgent.load(config.policy or DEFAULT_POLICY, config.device))
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
    return Models(backbone, images, player, generator, config.max_pixels)


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
    folder = None
    if config.images is not None:
        written = outputs.existing() | {str((out / UPLOADS).resolve())}
        folder = Project.of_folder(config.images, outputs, written, names)
    models = load_models(config)
    bounds = {"max_uploads": config.max_uploads, "max_upload": config.max_upload_mib * 2**20}
    return Workspaces(models, folder, out, names, **bounds), outputs


def _outputs(config: AppConfig) -> OutputPaths:
    out = Path(config.out)
    if out.is_file():
        raise ValueError(f"--out {out} is a file: name a folder.")
    return OutputPaths.prepare(str(out / ANNOTATIONS), "none")


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
    with _outputs(config).locked():
        workspaces, outputs = prepare(config)
        name = f"[{config.host}]" if ":" in config.host else config.host
        query = "" if token is None else f"?token={quote(token, safe='')}"
        print(f"Open http://{name}:{config.port}/{query}", flush=True)
        print(f"Results: {outputs.annotations}. Ctrl-C ends the app.", flush=True)
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
