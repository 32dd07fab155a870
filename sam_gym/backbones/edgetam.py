"""EdgeTAM: SAM 2 on a RepViT, with a memory of few tokens.

Zhou et al. 2025, "EdgeTAM: On-Device Track Anything Model". The trunk is timm's RepViT-M1; neck,
prompt encoder and mask decoder are those of SAM 2.1. The memory has the spatial perceiver, half as
many layers of attention, no time of object pointers, and no mark of absent objects.
`edgetam_state` translates the names of the published checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sam_gym.backbones.encoders import State
from sam_gym.backbones.sam2 import PyramidEncoder, Sam2, assemble_sam2, split_state
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.backbones.video.perceiver import Perceiver

#: Beginning of the names, in the published checkpoint, of the weights of the spatial perceiver.
PERCEIVER_PREFIX = "spatial_perceiver."
#: Channels and numbers of blocks of the stages of RepViT-M1.
WIDTHS, DEPTHS = (48, 96, 192, 384), (2, 2, 14, 2)


class EdgeTamEncoder(PyramidEncoder):
    """Image encoder of EdgeTAM, a RepViT: float32 (B, 3, S, S) -> (B, out_chans, S / 16, S / 16).

    Args:
        img_size: S, a multiple of 32.
        out_chans: channels of the embedding.
        embed_dims: channels of the stages.
        depths: their numbers of blocks.
    """

    def __init__(
        self,
        img_size: int = 1024,
        out_chans: int = 256,
        embed_dims: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
    ) -> None:
        from timm.models.repvit import RepVit

        trunk: Any = RepVit(
            img_size=img_size,
            embed_dim=tuple(embed_dims),
            depth=tuple(depths),
            num_classes=0,
            distillation=False,
            legacy=True,
        )
        super().__init__(trunk, img_size, out_chans)


def split_edgetam_state(state: State) -> tuple[State, State]:
    """Split the state dict of the published checkpoint.

    Args:
        state: `checkpoint["model"]` of EdgeTAM.

    Returns:
        The weights of `build_edgetam`, under its names, and those of the video memory, under the
        authors' names.
    """
    perceiver = {k: value for k, value in state.items() if k.startswith(PERCEIVER_PREFIX)}
    image, memory = split_state({k: value for k, value in state.items() if k not in perceiver})
    # timm's lists of features, which the authors use, have flat names.
    trunk = "image_encoder.trunk."
    image = {
        name.replace(f"{trunk}body.stages_", f"{trunk}stages.").replace(f"{trunk}body.", trunk): own
        for name, own in image.items()
    }
    return image, memory | perceiver


def edgetam_state(state: State) -> State:
    """Convert the state dict of the published checkpoint to one of `build_edgetam`."""
    return split_edgetam_state(state)[0]


def edgetam_memory_state(state: State) -> State:
    """Take the weights of the video memory out of the state dict of the published checkpoint."""
    return split_edgetam_state(state)[1]


def build_edgetam() -> Sam2:
    """Build the image part of EdgeTAM with random weights."""
    return assemble_sam2(EdgeTamEncoder())


def build_edgetam_memory() -> VideoMemory:
    """Build the video memory of EdgeTAM with random weights."""
    return VideoMemory(depth=2, perceiver=Perceiver(), dates_pointers=False, marks_absence=False)
