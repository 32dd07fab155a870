"""Load SAM, HQ-SAM, SAM 2 and EdgeTAM models of the Hugging Face hub as our modules.

Masks equal those of transformers, except for two differences of transformers (5.24) to the authors'
code, which we follow: HQ-SAM upscales the image embedding before the two-way transformer instead of
the one after it, and SAM 2 adds tokens to a prompt that is only a mask.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, Sam
from torch import nn

from sam_gym.backbones.edgetam import DEPTHS, EdgeTamEncoder
from sam_gym.backbones.encoders import State, assemble
from sam_gym.backbones.hq import HqMaskDecoder
from sam_gym.backbones.sam2 import PyramidEncoder, Sam2, Sam2Encoder, assemble_sam2
from sam_gym.backbones.spec import HUB_PREFIX

#: Type of a model -> transformers' class of its image part. Not every version has all of them.
_CLASSES = {
    "sam": "SamModel",
    "sam_hq": "SamHQModel",
    "sam2": "Sam2Model",
    "sam2_video": "Sam2Model",
    "edgetam": "EdgeTamModel",
    "edgetam_video": "EdgeTamModel",
}
#: (pattern, replacement) from transformers' names to segment_anything's, applied in this order.
_NAMES = [
    (
        r"^shared_image_embedding\.positional_embedding$",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^vision_encoder\.backbone\.timm_model\.stages_", "image_encoder.trunk.stages."),
    (r"^vision_encoder\.backbone\.timm_model\.", "image_encoder.trunk."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"(\.trunk\.patch_embed)\.projection\.", r"\1.proj."),
    (r"(\.trunk\.blocks\.\d+)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"(\.trunk\.blocks\.\d+\.mlp)\.proj_in\.", r"\1.fc1."),
    (r"(\.trunk\.blocks\.\d+\.mlp)\.proj_out\.", r"\1.fc2."),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image_encoder.blocks.\1.norm\2."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"(transformer\.layers\.\d+)\.layer_norm([1-4])\.", r"\1.norm\2."),
    (r"(transformer\.layers\.\d+\.mlp)\.proj_in\.", r"\1.lin1."),
    (r"(transformer\.layers\.\d+\.mlp)\.proj_out\.", r"\1.lin2."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"\.hq_token\.", ".hf_token."),
    (r"\.hq_mask_mlp\.", ".hf_mlp."),
    (r"\.compress_vit_conv1\.", ".compress_vit_feat.0."),
    (r"\.compress_vit_norm\.", ".compress_vit_feat.1."),
    (r"\.compress_vit_conv2\.", ".compress_vit_feat.3."),
    (r"\.encoder_conv1\.", ".embedding_encoder.0."),
    (r"\.encoder_norm\.", ".embedding_encoder.1."),
    (r"\.encoder_conv2\.", ".embedding_encoder.3."),
    (r"\.mask_conv1\.", ".embedding_maskfeature.0."),
    (r"\.mask_norm\.", ".embedding_maskfeature.1."),
    (r"\.mask_conv2\.", ".embedding_maskfeature.3."),
    # MLPs of three layers: proj_in, layers.0, proj_out; the middle one moves first.
    (r"(_mlps\.\d+|hf_mlp|_head)\.layers\.0\.", r"\1.layers.1."),
    (r"(_mlps\.\d+|hf_mlp|_head)\.proj_in\.", r"\1.layers.0."),
    (r"(_mlps\.\d+|hf_mlp|_head)\.proj_out\.", r"\1.layers.2."),
]


def converted(state: State) -> State:
    """Convert a state dict of a model of `load_from_hub` to our names."""
    result = {}
    for name, value in state.items():
        if name == "prompt_encoder.shared_embedding.positional_embedding":
            continue  # the same tensor as shared_image_embedding
        if name == "prompt_encoder.point_embed.weight":  # those of SAM 2 are one tensor
            for kind, row in enumerate(value.split(1)):
                result[f"prompt_encoder.point_embeddings.{kind}.weight"] = row
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def load_from_hub(name: str) -> Sam:
    """Load a model of type `sam`, `sam_hq`, `sam2` or `edgetam`.

    Those of the types `sam2_video` and `edgetam_video` are loaded without their memory.

    Args:
        name: OWNER/NAME on the hub, or a local folder that `save_pretrained` wrote.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: there is no such model, or the hub cannot be reached.
        ValueError: it is a model of another kind.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"Backbone '{HUB_PREFIX}{name}' needs transformers: pip install 'sam-gym[hf]'."
        ) from error
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser())
    try:
        config: Any = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in _CLASSES:
            raise ValueError(
                f"{HUB_PREFIX}{name} is a model of type {config.model_type!r}; expected "
                f"{', '.join(map(repr, _CLASSES))}."
            )
        model = getattr(transformers, _CLASSES[config.model_type]).from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"{HUB_PREFIX}{name}: could not be loaded from the hub or from that folder ({error})."
        ) from error
    sam = build(config)
    try:
        sam.load_state_dict(converted(model.state_dict()))
    except RuntimeError as error:
        raise ValueError(
            f"{HUB_PREFIX}{name}: its sizes are not those of a SAM that can be loaded ({error})."
        ) from error
    return sam


def build(config: Any) -> Sam:
    """Build the model of a configuration of a type of `load_from_hub` with random weights."""
    vision, head = config.vision_config, config.mask_decoder_config
    for kind, encoder_of in (("sam2", _hiera), ("edgetam", _repvit)):
        if config.model_type.startswith(kind):
            encoder = encoder_of(config.prompt_encoder_config.image_size, vision)
            return _build_sam2(encoder, head)
    if vision.patch_size != 16:
        raise ValueError(f"Expected patches of 16 pixels, got {vision.patch_size}.")
    is_hq = config.model_type == "sam_hq"
    vit = ImageEncoderViT(
        img_size=vision.image_size,
        embed_dim=vision.hidden_size,
        depth=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        mlp_ratio=vision.mlp_dim / vision.hidden_size,
        out_chans=vision.output_channels,
        qkv_bias=vision.qkv_bias,
        norm_layer=partial(nn.LayerNorm, eps=vision.layer_norm_eps),
        use_abs_pos=vision.use_abs_pos,
        use_rel_pos=vision.use_rel_pos,
        window_size=vision.window_size,
        global_attn_indexes=tuple(vision.global_attn_indexes),
    )
    decoder = partial(HqMaskDecoder, vit_dim=vision.hidden_size) if is_hq else MaskDecoder
    sam = assemble(vit, head.hidden_size, head.mlp_dim, head.num_attention_heads, decoder)
    # transformers' two-way blocks have another epsilon than segment_anything's.
    for layer in sam.mask_decoder.transformer.layers:  # type: ignore[union-attr]
        for norm in (layer.norm1, layer.norm2, layer.norm3, layer.norm4):  # type: ignore[union-attr]
            norm.eps = head.layer_norm_eps  # type: ignore[union-attr]
    return sam


def _hiera(size: int, vision: Any) -> Sam2Encoder:
    """Build the encoder of a SAM 2 for frames of `size` pixels."""
    trunk = vision.backbone_config
    return Sam2Encoder(
        size,
        vision.fpn_hidden_size,
        embed_dim=trunk.hidden_size,
        num_heads=trunk.num_attention_heads,
        stages=tuple(trunk.blocks_per_stage),
        global_pos_size=tuple(trunk.window_positional_embedding_background_size),
        window_spec=tuple(trunk.window_size_per_stage),
        global_att_blocks=tuple(trunk.global_attention_blocks),
    )


def _repvit(size: int, vision: Any) -> EdgeTamEncoder:
    """Build the encoder of an EdgeTAM for frames of `size` pixels."""
    trunk = vision.backbone_config
    if trunk.architecture.partition(".")[0] != "repvit_m1":
        raise ValueError(f"Expected the architecture 'repvit_m1', got {trunk.architecture!r}.")
    depths = (trunk.model_args or {}).get("depth", DEPTHS)
    return EdgeTamEncoder(size, vision.fpn_hidden_size, vision.backbone_channel_list[::-1], depths)


def _build_sam2(encoder: PyramidEncoder, head: Any) -> Sam2:
    """Build a SAM 2 from its encoder and the configuration of its decoder."""
    sam = assemble_sam2(encoder, head.hidden_size, head.mlp_dim, head.num_attention_heads)
    delta, least = head.dynamic_multimask_stability_delta, head.dynamic_multimask_stability_thresh
    sam.mask_decoder.stability = (delta, least) if head.dynamic_multimask_via_stability else None
    return sam
