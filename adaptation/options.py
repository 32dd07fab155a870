"""Command-line options shared by training, evaluation and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from sam_gym.backbones.spec import backbone_help
from sam_gym.data import DATASETS
from sam_gym.data.coco import Coco
from sam_gym.data.streams import STREAMS, Domain, Stream, dataset_stream, make_stream


@dataclass
class StreamOptions:
    """The domains and their order."""

    stream: str | None = None
    """Stream of domains: scenes-domains (procedural), folders, or a dataset as one domain: rooms,
    rooms-panoramas, scenes, coco, folder, entities (default: folders if --data is given, else
    scenes-domains)."""
    data: tuple[str, ...] = ()
    """Folders of domains, each with images/, masks/ (or instances/) and splits.json; or the folder
    of a dataset that reads files."""
    domains: str | None = None
    """Comma-separated names of procedural domains (default: all)."""
    stream_seed: int = 0
    """Seed of the procedural images, or of the choice of images."""
    retention: str | None = None
    """Folder of a COCO dataset whose val split is evaluated at the end and never trained on."""

    def open(self, order: str | None = None) -> Stream:
        """Open the stream, in an order (see `Stream.ordered`)."""
        name = self.stream or ("folders" if self.data else "scenes-domains")
        if name in DATASETS and name not in STREAMS:
            if len(self.data) > 1:
                raise ValueError(f"--stream {name} is one dataset: give one folder as --data.")
            return dataset_stream(name, *self.data)
        options: dict[str, Any] = {"seed": self.stream_seed}
        if self.domains is not None:
            if name != "scenes-domains":
                raise ValueError("--domains chooses procedural domains: drop it, or drop --data.")
            options["domains"] = self.domains
        return make_stream(name, list(self.data) or None, order, **options)

    def open_retention(self) -> Domain | None:
        """Open the retention set as a domain without training images."""
        if self.retention is None:
            return None
        coco = Coco("val", root=self.retention)
        return Domain("retention", False, {"val": coco, "test": coco})


@dataclass
class ModelOptions:
    """The SAM and its device."""

    backbone: Annotated[str, tyro.conf.arg(help=backbone_help("SAM to adapt"))] = "micro"
    checkpoint: str | None = None
    """Weights of the backbone (micro: bundled)."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda, cuda:N."""
    dtype: str = "auto"
    """Precision of the frozen SAM: auto (bfloat16 on CUDA, else float32), float32, bfloat16,
    float16."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `load_backbone`."""
        names = ("checkpoint", "device", "dtype")
        return {"name": self.backbone} | {name: getattr(self, name) for name in names}
