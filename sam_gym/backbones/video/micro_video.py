"""`micro_video`: a memory on the frozen `micro`, and a copy of its mask decoder that knows it.

SAM 2's memory in small: two layers of attention on a grid of 16 x 16 cells, and the memories of
four frames besides the prompted ones. The image encoder and
the prompt encoder are those of `micro`, whose file they are read from.
"""

from __future__ import annotations

from sam_gym.backbones.encoders import assemble
from sam_gym.backbones.micro.model import STRIDE, UPSCALING, MicroEncoder
from sam_gym.backbones.sam2 import ScoringMaskDecoder, VideoSam
from sam_gym.backbones.video.memory import VideoMemory

#: Beginnings of the names of the weights that are trained, besides those of the memory.
TRAINED_PREFIXES = ("mask_decoder.", "no_mem_embed")


def build_micro_video() -> VideoSam:
    """The image part of `micro_video`, with random weights."""
    sam = assemble(MicroEncoder(), 128, 512, 8, ScoringMaskDecoder, STRIDE, UPSCALING)
    return VideoSam(sam.image_encoder, sam.prompt_encoder, sam.mask_decoder)


def build_micro_memory() -> VideoMemory:
    """The memory of `micro_video`, with random weights. It reads low-res masks as they are."""
    return VideoMemory(
        (16, 16), 128, 64, hidden=512, depth=2, slots=5, strides=UPSCALING[::-1], base=4
    )
