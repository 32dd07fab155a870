"""Models of the authors' package, PyPI's `sam2`, of any size and with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

#: Settings of SAM 2.1's video predictor, by the authors' names.
VIDEO_SETTINGS: dict[str, Any] = {
    "sigmoid_scale_for_mem_enc": 20.0,
    "sigmoid_bias_for_mem_enc": -10.0,
    "use_mask_input_as_output_without_sam": True,
    "multimask_output_in_sam": True,
    "add_tpos_enc_to_obj_ptrs": True,
    "use_signed_tpos_enc_to_obj_ptrs": True,
    "only_obj_ptrs_in_the_past_for_eval": True,
    "multimask_output_for_tracking": True,
    "multimask_min_pt_num": 0,
    "multimask_max_pt_num": 1,
}


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


def has_peer() -> bool:
    """Return whether the package sam2 is installed."""
    return find_spec("sam2") is not None


def build_peer(model: type[Any], shape: Shape, **settings: Any) -> Any:
    """Build a model of the package sam2 with the modules of SAM 2.1 and random weights.

    Args:
        model: its class.
        shape: its sizes.
        **settings: further arguments of the class.
    """
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import RoPEAttention

    width = shape.width
    # The window position is that of the published models.
    usual = {"embed_dim": 96, "num_heads": 1, "window_pos_embed_bkg_spatial_size": (7, 7)}
    trunk = Hiera(**usual | shape.trunk)
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
    return model(
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
        **settings,
    )


def build_predictor(shape: Shape, **settings: Any) -> Any:
    """Build sam2's `SAM2VideoPredictor` with random weights that all matter, on the CPU.

    Weights that are zero at first are drawn too, and masks have both signs, so that a comparison of
    masks means something.

    Args:
        shape: its sizes.
        **settings: besides `VIDEO_SETTINGS`.
    """
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    predictor = build_peer(SAM2VideoPredictor, shape, **VIDEO_SETTINGS | settings)
    for name, parameter in predictor.named_parameters():
        if "gamma" in name or "no_obj" in name or "tpos_enc" in name or "no_mem" in name:
            nn.init.normal_(parameter, 0.0, 0.5)
    with torch.no_grad():
        for mlp in predictor.sam_mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(50.0)
    attend = predictor.memory_attention.forward
    # Memories are stored as bfloat16, which layers in float32 refuse without autocast.
    predictor.memory_attention.forward = lambda **own: attend(
        **own | {"memory": own["memory"].to(own["curr"][0].dtype)}
    )
    return predictor.eval()


def random_predictor(shape: Shape, device: torch.device) -> Any:
    """Build sam2's predictor with random weights; objects are never absent."""
    predictor = build_predictor(shape)
    with torch.no_grad():
        predictor.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(10.0)
    return predictor.to(device).requires_grad_(False)
