"""The registry of SAMs: one `BackboneSpec` each; `register_backbone` adds another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segment_anything.build_sam import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l

from sam_gym.backbones.edgetam import (
    build_edgetam,
    build_edgetam_memory,
    edgetam_memory_state,
    edgetam_state,
)
from sam_gym.backbones.encoders import (
    State,
    build_mobile_sam,
    build_repvit_sam,
    mobile_sam_state,
    repvit_sam_state,
)
from sam_gym.backbones.hq import build_hq_vit_b, build_hq_vit_h, build_hq_vit_l
from sam_gym.backbones.micro.model import build_micro
from sam_gym.backbones.micro.v0 import build_micro_v0
from sam_gym.backbones.protocols import BackboneService
from sam_gym.backbones.sam2 import (
    Sam2,
    build_sam2_base_plus,
    build_sam2_large,
    build_sam2_small,
    build_sam2_tiny,
    memory_state,
    sam2_state,
)
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.backbones.video.micro_video import build_micro_memory, build_micro_video
from sam_gym.utils.registry import Registry

#: Names with this prefix are loaded from the Hugging Face hub: "hf:facebook/sam-vit-base".
HUB_PREFIX = "hf:"
#: Predicted IoU and stability score from which everything mode keeps a mask of SAM, and of SAM 2.
SAM_THRESHOLDS, SAM2_THRESHOLDS = (0.88, 0.95), (0.8, 0.95)


@dataclass(frozen=True)
class PublishedWeights:
    """A checkpoint as its authors publish it.

    Attributes:
        url: official address.
        sha256: SHA-256 of the file, hexadecimal. None: unknown; since a download could not be
            checked, `load_backbone` then needs `checkpoint=`.
        megabytes: size of the file, rounded.
    """

    url: str
    sha256: str | None
    megabytes: int

    @property
    def filename(self) -> str:
        """Name of the file under `SAM_GYM_HOME/checkpoints`."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """What loading, everything mode, help texts and documentation need to know about a SAM.

    Attributes:
        name: key in `BACKBONES`.
        build: returns the model with random weights.
        description: one line for documentation and `python -m sam_gym.backbones.download`.
        source: paper or repository, and licence of the weights.
        weights: file in the package, published checkpoint, or None: `load_backbone` then needs
            `checkpoint=`.
        convert: maps a state dict as published to one of the model, or None if they are the same.
        thresholds: predicted IoU and stability score from which everything mode keeps a mask.
        input_size: side of the square input frame in pixels.
        features: names of the tensors that describe an image.
        service: makes the `BackboneService` of a model whose decoder is not SAM's, from the
            arguments of `Backbone`; None: `Backbone`.
        memory: builds the video memory with random weights, and takes its weights out of a state
            dict as published; None: it has none.
        base: name of the backbone whose weights it starts from, or "". Its own file then holds what
            differs, and `BASE_DIGEST`.
        digest: `weights_digest` of weights that had another name once, by which adapters and agents
            that were saved under that name find them.
    """

    name: str
    build: Callable[[], Any]
    description: str
    source: str = ""
    weights: Path | PublishedWeights | None = None
    convert: Callable[[State], State] | None = None
    thresholds: tuple[float, float] = SAM_THRESHOLDS
    input_size: int = 1024
    features: tuple[str, ...] = ("embedding",)
    service: Callable[..., Any] | None = None
    memory: tuple[Callable[[], Any], Callable[[State], State]] | None = None
    base: str = ""
    digest: str = ""

    @property
    def megabytes(self) -> float:
        """Size of the weights in MB; 0 without weights."""
        if isinstance(self.weights, Path):
            return round(self.weights.stat().st_size / 1e6, 1)
        return 0 if self.weights is None else self.weights.megabytes


#: Name, in a file that extends other weights, of their digest: uint8 (16,).
BASE_DIGEST = "base_digest"
#: Digest of the weights that were called "micro" before they became "micro-v0".
FIRST_MICRO = "7e7f311566767991dab4968d5b6c1b80"


def _adopt(found: Any, name: str) -> BackboneSpec:
    if not isinstance(found, BackboneSpec):
        raise ValueError(f"The backbone {name!r} is no BackboneSpec, got {found!r}.")
    return replace(found, name=name)


#: Backbone name -> its specification; "module:SPEC" is a name, too.
BACKBONES: Registry[BackboneSpec] = Registry("backbone", _adopt)


def register_backbone(spec: BackboneSpec) -> BackboneSpec:
    """Add a SAM, so that `load_backbone`, environments and commands know its name.

    Worker processes know it if they import the module that calls this; `backbone="module:SPEC"`
    works in all processes without registration.

    Raises:
        ValueError: the name is taken.
    """
    return BACKBONES.add(spec.name, spec)


def find_spec(name: str) -> BackboneSpec | None:
    """Return the specification of a backbone, or None if it has none, as on the hub."""
    known = name in BACKBONES and not name.startswith(HUB_PREFIX)
    return BACKBONES.get(name) if known else None


def suited_thresholds(backbone: BackboneService) -> tuple[float, float]:
    """Return the predicted IoU and stability from which everything mode keeps a backbone's masks.

    Without a specification (a model of the hub, or one of your own), those of its kind of model.
    """
    spec = find_spec(backbone.name)
    if spec is not None:
        return spec.thresholds
    return SAM2_THRESHOLDS if isinstance(getattr(backbone, "sam", None), Sam2) else SAM_THRESHOLDS


def renamed_backbone(digest: str) -> str | None:
    """Return the name that the weights of a digest have now, or None if they were never renamed."""
    return next((spec.name for spec in BACKBONES.values() if spec.digest == digest != ""), None)


def backbones_by_size() -> list[BackboneSpec]:
    """Return all specifications, sorted by the size of the weights."""
    return sorted((spec for spec in BACKBONES.values()), key=lambda spec: spec.megabytes)


def _trackers() -> list[str]:
    """Names of the backbones with a video memory."""
    return [spec.name for spec in backbones_by_size() if spec.memory is not None]


def check_tracks(name: str) -> None:
    """Raise `ValueError` if a backbone is known to have no video memory.

    Commands call it before weights are downloaded. Of a model of the hub, it is not known before.
    """
    spec = find_spec(name)
    if spec is not None and spec.memory is None:
        raise ValueError(
            f"{name!r} has no video memory, which tracking needs. Take {', '.join(_trackers())}."
        )


def backbone_help(purpose: str) -> str:
    """Return the help text of an option that takes a backbone: its purpose and the valid names."""
    return _help(purpose, [spec.name for spec in backbones_by_size()])


def tracker_help(purpose: str) -> str:
    """Return the help text of an option that takes a backbone with a video memory."""
    return _help(purpose, _trackers())


def _help(purpose: str, names: Sequence[str]) -> str:
    return f"{purpose}: {', '.join(names)}, {HUB_PREFIX}OWNER/NAME or module:SPEC."


def backbone_table() -> str:
    """Return the table of backbones as Markdown, for README and documentation."""
    rows = ["| `backbone=` | model | weights | source |", "|---|---|---|---|"]
    for spec in backbones_by_size():
        if isinstance(spec.weights, PublishedWeights):
            weights = f"{spec.weights.megabytes:,} MB, [download]({spec.weights.url})"
            if spec.weights.sha256 is None:
                weights += ", `checkpoint=`"
        else:
            weights = "`checkpoint=`" if spec.weights is None else f"{spec.megabytes} MB, bundled"
        rows.append(f"| `{spec.name}` | {spec.description} | {weights} | {spec.source} |")
    return "\n".join(rows)


# The SAMs of the package ------------------------------------------------------------------------

_SEGMENT_ANYTHING = "https://dl.fbaipublicfiles.com/segment_anything"
_HQ = "https://huggingface.co/lkeab/hq-sam/resolve/main"
_SAM2 = "https://dl.fbaipublicfiles.com/segment_anything_2/092824"
_SAM_SOURCE = "[SAM](https://github.com/facebookresearch/segment-anything), Apache-2.0"
_SAM2_SOURCE = "[SAM 2](https://github.com/facebookresearch/sam2), Apache-2.0"
_HQ_SOURCE = "[HQ-SAM](https://github.com/SysCV/sam-hq), Apache-2.0"

register_backbone(
    BackboneSpec(
        name="micro",
        build=build_micro,
        description="Small SAM of this project, for tests, demos and CPUs",
        source="[card](sam_gym/backbones/micro/weights/README.md), Apache-2.0",
        weights=Path(__file__).parent / "micro" / "weights" / "micro.safetensors",
        thresholds=(0.5, 0.7),  # by eye, on photographs; the best PQ on `scenes` is at (0.7, 0.85)
        input_size=384,
    )
)
register_backbone(
    BackboneSpec(
        name="micro-v0",
        build=build_micro_v0,
        description="The first micro, for adapters and agents that were made with it",
        source="[card](sam_gym/backbones/micro/weights/micro-v0.md), Apache-2.0",
        weights=Path(__file__).parent / "micro" / "weights" / "micro-v0.safetensors",
        thresholds=(0.6, 0.8),
        input_size=256,
        digest=FIRST_MICRO,
    )
)
register_backbone(
    BackboneSpec(
        name="micro_video",
        build=build_micro_video,
        description="`micro` with the memory of a SAM 2 in small, which tracks objects in videos",
        source="[card](sam_gym/backbones/video/weights/README.md), Apache-2.0",
        weights=Path(__file__).parent / "video" / "weights" / "micro_video.safetensors",
        convert=sam2_state,
        thresholds=(0.6, 0.8),
        input_size=384,
        memory=(build_micro_memory, memory_state),
        base="micro",
    )
)
for _size, _build, _file, _sha256, _megabytes in (
    (
        "b",
        build_sam_vit_b,
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        375,
    ),
    (
        "l",
        build_sam_vit_l,
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        1250,
    ),
    (
        "h",
        build_sam_vit_h,
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        2565,
    ),
):
    register_backbone(
        BackboneSpec(
            name=f"vit_{_size}",
            build=_build,
            description=f"SAM, ViT-{_size.upper()}",
            source=_SAM_SOURCE,
            weights=PublishedWeights(f"{_SEGMENT_ANYTHING}/{_file}", _sha256, _megabytes),
        )
    )
register_backbone(
    BackboneSpec(
        name="mobile_sam",
        build=build_mobile_sam,
        description="MobileSAM, TinyViT-5M",
        source="[MobileSAM](https://github.com/ChaoningZhang/MobileSAM), Apache-2.0",
        weights=PublishedWeights(
            "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            41,
        ),
        convert=mobile_sam_state,
    )
)
register_backbone(
    BackboneSpec(
        name="repvit_sam",
        build=build_repvit_sam,
        description="RepViT-SAM, RepViT-M2.3",
        source="[RepViT](https://github.com/THU-MIG/RepViT), Apache-2.0",
        weights=PublishedWeights(
            "https://github.com/THU-MIG/RepViT/releases/download/v1.0/repvit_sam.pt",
            "1fd2867cf669e6d89b1c91d0eb883d83ef4bcc590143dd2ca35e2705b21a4f2f",
            110,
        ),
        convert=repvit_sam_state,
    )
)
for _size, _build, _sha256, _megabytes in (
    ("b", build_hq_vit_b, "14a9d662cd6f5a9c2dba6d40ab0058d88d287e4a18fd6fdc6ad5fb1a3fdeaa57", 379),
    ("l", build_hq_vit_l, "e1a6c385d62bf005ded91a54d5ec55c985cfc4103ef89c08d90f39f04934c343", 1255),
    ("h", build_hq_vit_h, "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35", 2571),
):
    register_backbone(
        BackboneSpec(
            name=f"hq_vit_{_size}",
            build=_build,
            description=f"HQ-SAM, ViT-{_size.upper()}",
            source=_HQ_SOURCE,
            weights=PublishedWeights(f"{_HQ}/sam_hq_vit_{_size}.pth", _sha256, _megabytes),
            features=("embedding", "hq"),
        )
    )
for _size, _build, _sha256, _megabytes in (
    (
        "tiny",
        build_sam2_tiny,
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        156,
    ),
    (
        "small",
        build_sam2_small,
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
        184,
    ),
    (
        "base_plus",
        build_sam2_base_plus,
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
        324,
    ),
    (
        "large",
        build_sam2_large,
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
        898,
    ),
):
    register_backbone(
        BackboneSpec(
            name=f"sam2.1_hiera_{_size}",
            build=_build,
            description=f"SAM 2.1, Hiera-{_size.replace('_plus', '+').capitalize()}",
            source=_SAM2_SOURCE,
            weights=PublishedWeights(f"{_SAM2}/sam2.1_hiera_{_size}.pt", _sha256, _megabytes),
            convert=sam2_state,
            thresholds=SAM2_THRESHOLDS,
            features=("embedding", "high_res_s1", "high_res_s0"),
            memory=(VideoMemory, memory_state),
        )
    )
register_backbone(
    BackboneSpec(
        name="edgetam",
        build=build_edgetam,
        description="EdgeTAM, RepViT-M1",
        source="[EdgeTAM](https://github.com/facebookresearch/EdgeTAM), Apache-2.0",
        weights=PublishedWeights(
            "https://github.com/facebookresearch/EdgeTAM/raw/main/checkpoints/edgetam.pt", None, 56
        ),
        convert=edgetam_state,
        thresholds=SAM2_THRESHOLDS,
        features=("embedding", "high_res_s1", "high_res_s0"),
        memory=(build_edgetam_memory, edgetam_memory_state),
    )
)
