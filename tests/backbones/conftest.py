"""The authors' SAM 2.1, small."""

from collections.abc import Callable
from typing import Any

import pytest

#: Frame and embedding.
SIZE, WIDTH = 128, 256


@pytest.fixture(scope="session")
def build_authors_sam2() -> Callable[..., Any]:
    """Builds a model of the package sam2 with random weights: its class, the layers of its memory,
    their hidden units, and further arguments."""

    def build(model: type[Any], layers: int, hidden: int, **options: Any) -> Any:
        from sam2.modeling.backbones.hieradet import Hiera
        from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
        from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
        from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
        from sam2.modeling.position_encoding import PositionEmbeddingSine
        from sam2.modeling.sam.transformer import RoPEAttention

        trunk = Hiera(
            embed_dim=8,
            stages=(1, 2, 2, 1),
            window_spec=(8, 4, 6, 3),
            global_att_blocks=(4,),
            window_pos_embed_bkg_spatial_size=(7, 7),
        )
        neck = FpnNeck(
            PositionEmbeddingSine(WIDTH),
            WIDTH,
            trunk.channel_list,
            fpn_top_down_levels=[2, 3],
            fpn_interp_model="nearest",
        )
        rotary = {"embedding_dim": WIDTH, "num_heads": 1, "feat_sizes": (8, 8)}
        layer = MemoryAttentionLayer(
            activation="relu",
            cross_attention=RoPEAttention(rope_k_repeat=True, kv_in_dim=64, **rotary),
            d_model=WIDTH,
            dim_feedforward=hidden,
            dropout=0.1,
            pos_enc_at_attn=False,
            pos_enc_at_cross_attn_keys=True,
            pos_enc_at_cross_attn_queries=False,
            self_attention=RoPEAttention(**rotary),
        )
        return model(
            image_encoder=ImageEncoder(trunk, neck, scalp=1),
            memory_attention=MemoryAttention(WIDTH, True, layer, layers),
            memory_encoder=MemoryEncoder(
                64,
                MaskDownSampler(kernel_size=3, stride=2, padding=1),
                Fuser(CXBlock(WIDTH), layers),
                PositionEmbeddingSine(64),
            ),
            image_size=SIZE,
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
            **options,
        )

    return build
