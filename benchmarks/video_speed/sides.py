"""The two sides that are compared: `VideoTracker`, and sam2's `SAM2VideoPredictor` (PyPI)."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling.mask_decoder import MLP
from torch import nn

from sam_gym.backbones import Backbone
from sam_gym.backbones.sam2 import Sam2Encoder, assemble_sam2, split_state
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data.synthetic.clips import Clips

ShapeName = Literal["small", "tiny", "base_plus"]
#: A prompt of an object in the first frame: points and labels, or a box, or a mask.
Prompt = Mapping[str, Any]
#: Logits of the objects of each video in one frame, float32 (K, H, W) each.
FrameLogits = list[torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a SAM 2.

    Attributes:
        image_size: side of the input frame.
        width: channels of the embedding.
        depth: layers of the memory attention.
        hidden: channels of its MLPs.
        trunk: arguments of Hiera, by the authors' names.
    """

    image_size: int
    width: int
    depth: int
    hidden: int
    trunk: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the embedding."""
        return self.image_size // 16, self.image_size // 16


#: Name -> sizes. "small" are those of `micro_video`, the others those of SAM 2.1.
SHAPES: dict[ShapeName, Shape] = {
    "small": Shape(
        256, 128, 2, 512, {"embed_dim": 24, "stages": (1, 2, 3, 1), "global_att_blocks": (4,)}
    ),
    "tiny": Shape(1024, 256, 4, 2048, {"stages": (1, 2, 7, 2), "global_att_blocks": (5, 7, 9)}),
    "base_plus": Shape(1024, 256, 4, 2048, {"embed_dim": 112, "num_heads": 2}),
}


def has_peer() -> bool:
    """Return whether the package sam2 is installed."""
    return find_spec("sam2") is not None


def random_predictor(shape: Shape, device: torch.device) -> Any:
    """Build sam2's `SAM2VideoPredictor` with the settings of SAM 2.1 and random weights.

    Weights that are zero at first are drawn too, objects are never absent, and masks have both
    signs, so that a comparison of masks means something.
    """
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import RoPEAttention
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    width = shape.width
    trunk = Hiera(**{"embed_dim": 96, "num_heads": 1} | own_trunk(shape))
    neck = FpnNeck(
        PositionEmbeddingSine(width),
        width,
        trunk.channel_list,
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    rotary = {"embedding_dim": width, "num_heads": 1, "feat_sizes": shape.grid}
    layer = MemoryAttentionLayer(
        activation="relu",
        cross_attention=RoPEAttention(rope_k_repeat=True, kv_in_dim=64, **rotary),
        d_model=width,
        dim_feedforward=shape.hidden,
        dropout=0.1,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=RoPEAttention(**rotary),
    )
    predictor: Any = SAM2VideoPredictor(
        image_encoder=ImageEncoder(trunk, neck, scalp=1),
        memory_attention=MemoryAttention(width, True, layer, shape.depth),
        memory_encoder=MemoryEncoder(
            64,
            MaskDownSampler(width, kernel_size=3, stride=2, padding=1),
            Fuser(CXBlock(width), 2),
            PositionEmbeddingSine(64),
            in_dim=width,
        ),
        image_size=shape.image_size,
        directly_add_no_mem_embed=True,
        no_obj_embed_spatial=True,
        use_high_res_features_in_sam=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        proj_tpos_enc_in_obj_ptrs=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        use_multimask_token_for_obj_ptr=True,
        use_mlp_for_obj_ptr_proj=True,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        use_mask_input_as_output_without_sam=True,
        multimask_output_in_sam=True,
        add_tpos_enc_to_obj_ptrs=True,
        use_signed_tpos_enc_to_obj_ptrs=True,
        only_obj_ptrs_in_the_past_for_eval=True,
        multimask_output_for_tracking=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
    )
    for name, parameter in predictor.named_parameters():
        if "gamma" in name or "no_obj" in name or "tpos_enc" in name or "no_mem" in name:
            nn.init.normal_(parameter, 0.0, 0.5)
    decoder = predictor.sam_mask_decoder
    with torch.no_grad():
        decoder.pred_obj_score_head.layers[-1].bias.fill_(10.0)
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(50.0)
    attend = predictor.memory_attention.forward
    # Memories are stored as bfloat16, which layers in float32 refuse without autocast.
    predictor.memory_attention.forward = lambda **own: attend(
        **own | {"memory": own["memory"].to(own["curr"][0].dtype)}
    )
    return predictor.to(device).eval().requires_grad_(False)


def own_trunk(shape: Shape) -> dict[str, Any]:
    """Return the arguments of Hiera; its window position is that of the published models."""
    return {"window_pos_embed_bkg_spatial_size": (7, 7)} | shape.trunk


def random_tracker(shape: Shape, device: torch.device, weights: Any = None) -> VideoTracker:
    """Build our tracker of a shape.

    Args:
        shape: its sizes.
        device: where it runs.
        weights: a predictor whose weights it gets; None: random ones.
    """
    sam = assemble_sam2(Sam2Encoder(shape.image_size, shape.width, **shape.trunk), shape.width)
    # The authors' has 256 channels at any width.
    sam.mask_decoder.iou_prediction_head = MLP(shape.width, 256, 4, 3, sigmoid_output=True)
    memory = VideoMemory(shape.grid, shape.width, hidden=shape.hidden, depth=shape.depth)
    if weights is not None:
        image, own = split_state(weights.state_dict())
        sam.load_state_dict(image)
        memory.load_state_dict(own)
    backbone = Backbone("random SAM 2.1", sam, device, torch.float32)
    return VideoTracker(backbone, memory, correct="sam2", keep="window")


# Videos ------------------------------------------------------------------------------------------


def write_videos(folder: Path, count: int, frames: int, size: int) -> list[str]:
    """Write videos of `clips` as folders of JPEG files, as sam2 reads them; returns the folders."""
    clips = Clips("test", frames=frames, length=count, size=size)
    folders = []
    for number in range(count):
        path = folder / str(number)
        path.mkdir()
        for frame in range(frames):
            image = Image.fromarray(clips[number].image(frame))
            image.save(path / f"{frame:05d}.jpg", quality=95)
        folders.append(os.fspath(path))
    return folders


def draw_prompts(rng: np.random.Generator, objects: int, size: int) -> list[Prompt]:
    """Draw prompts in the first frame: clicks, boxes and masks in turn."""
    prompts: list[Prompt] = []
    for number in range(objects):
        x, y = rng.uniform(0.2 * size, 0.8 * size, 2)
        if number % 3 == 0:
            prompts.append({"points": [[x, y]], "labels": [1]})
        elif number % 3 == 1:
            half = 0.15 * size
            prompts.append({"box": np.array([x - half, y - half, x + half, y + half])})
        else:
            rows, columns = np.mgrid[:size, :size]
            prompts.append({"mask": np.hypot(rows - y, columns - x) < 0.12 * size})
    return prompts


# Sides -------------------------------------------------------------------------------------------


def track_ours(
    tracker: VideoTracker, folders: Sequence[str], prompts: Sequence[Sequence[Prompt]]
) -> Iterator[FrameLogits]:
    """Track with `VideoTracker`: all videos in one session; one item per frame."""
    session = tracker.open(folders)
    for video, own in enumerate(prompts):
        for number, prompt in enumerate(own):
            session.prompt(video, 0, number, **prompt)
    frame: FrameLogits = []
    for step in session.propagate():
        frame.append(tracker.backbone.masks_at(step.logits, step.size))
        if len(frame) == len(folders):
            yield frame
            frame = []


def track_theirs(
    predictor: Any, folders: Sequence[str], prompts: Sequence[Sequence[Prompt]]
) -> Iterator[FrameLogits]:
    """Track with `SAM2VideoPredictor`: one state per video, in turn; one item per frame."""
    passes = []
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        for folder, own in zip(folders, prompts, strict=True):
            state = predictor.init_state(folder)
            for number, prompt in enumerate(own):
                if "mask" in prompt:
                    predictor.add_new_mask(state, 0, number, prompt["mask"])
                else:
                    predictor.add_new_points_or_box(state, 0, number, **prompt)
            passes.append(predictor.propagate_in_video(state))
    while True:
        with contextlib.redirect_stderr(io.StringIO()):
            frame = [next(own, None) for own in passes]
        if any(own is None for own in frame):
            return
        yield [own[2][:, 0] for own in frame if own is not None]
