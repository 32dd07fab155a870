"""Image encoders of MobileSAM and RepViT-SAM on timm, and the conversion of their checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

State = dict[str, Tensor]


def assemble(
    encoder: nn.Module,
    width: int = 256,
    mlp_dim: int = 2048,
    num_heads: int = 8,
    decoder: Callable[..., MaskDecoder] = MaskDecoder,
    stride: int = 16,
    upscaling: tuple[int, int] = (2, 2),
) -> Sam:
    """Combine an image encoder with segment_anything's prompt encoder and mask decoder.

    Args:
        encoder: float32 (B, 3, S, S) -> (B, width, S / stride, S / stride), with `img_size` S.
        width: channels of an embedding; also of the predicted-IoU head.
        mlp_dim: hidden units of the two-way transformer's MLPs.
        num_heads: its attention heads.
        decoder: class or factory of the mask decoder.
        stride: of the embedding.
        upscaling: factors by which the decoder upscales the embedding to a low-res mask.
    """
    size = int(encoder.img_size)  # type: ignore[arg-type]
    grid = size // stride
    transformer = TwoWayTransformer(
        depth=2, embedding_dim=width, mlp_dim=mlp_dim, num_heads=num_heads
    )
    sam = Sam(
        image_encoder=encoder,  # type: ignore[arg-type]
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(grid, grid),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=decoder(
            num_multimask_outputs=3,
            transformer=transformer,
            transformer_dim=width,
            iou_head_depth=3,
            iou_head_hidden_dim=width,
        ),
    )
    if upscaling != (2, 2):
        _set_upscaling(sam, *upscaling)
    return sam


def _set_upscaling(sam: Sam, first: int, second: int) -> None:
    """Change the factors of a SAM's low-res masks; the layers that it replaces are untrained."""

    def rescaled(layer: Any, stride: int) -> nn.Module:
        return type(layer)(layer.in_channels, layer.out_channels, stride, stride)

    up: Any = sam.mask_decoder.output_upscaling
    up[0], up[3] = rescaled(up[0], first), rescaled(up[3], second)
    down: Any = sam.prompt_encoder.mask_downscaling
    down[0], down[3] = rescaled(down[0], second), rescaled(down[3], first)
    height, width = sam.prompt_encoder.image_embedding_size
    scale = first * second
    sam.prompt_encoder.mask_input_size = (scale * height, scale * width)


def upscaling_of(decoder: MaskDecoder) -> tuple[int, int]:
    """Return the factors by which a mask decoder upscales the embedding: 2 and 2 in SAM."""
    first, _, _, second, _ = cast(Any, decoder.output_upscaling)
    return first.stride[0], second.stride[0]


def _neck(inputs: int, outputs: int) -> nn.Sequential:
    """SAM's neck, whose weights have the same names in every published checkpoint."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        LayerNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        LayerNorm2d(outputs),
    )


def _renamed(state: State, rename: Callable[[str], str | None]) -> State:
    """Rename entries of the image encoder, or drop those for which `rename` returns None."""
    prefix, result = "image_encoder.", {}
    for key, value in state.items():
        name: str | None = key
        if key.startswith(prefix) and not key.startswith(f"{prefix}neck."):
            name = rename(key.removeprefix(prefix))
            name = name and f"{prefix}body.{name}"
        if name is not None:
            result[name] = value
    return result


class _TimmEncoder(nn.Module):
    """A timm model with SAM's neck on its last feature map.

    Args:
        body: the model, with `stages` after a stem: (B, 3, S, S) -> (B, width, S / 16, S / 16).
        stem: name of what comes before the stages.
        img_size: S.
        widths: channels of the stages, at strides 4, 8, 16 and 16.
        out_chans: channels of the embedding.
    """

    def __init__(
        self, body: Any, stem: str, img_size: int, widths: Sequence[int], out_chans: int
    ) -> None:
        super().__init__()
        self.img_size, self.body, self.neck = img_size, body, _neck(widths[-1], out_chans)
        self._stem, self._widths = stem, tuple(widths)

    @property
    def stage_shapes(self) -> tuple[tuple[int, int], ...]:
        """Channels and side of the stages."""
        sides = (self.img_size // stride for stride in (4, 8, 16, 16))
        return tuple(zip(self._widths, sides, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.body.forward_features(x))

    def forward_with_stages(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pixels (B, 3, S, S) -> embedding (B, C, h, w), the output of each stage."""
        x, stages = getattr(self.body, self._stem)(x), []
        for stage in self.body.stages:
            x = stage(x)
            stages.append(x)
        return self.neck(x), stages


# MobileSAM --------------------------------------------------------------------------------------


class TinyVitEncoder(_TimmEncoder):
    """MobileSAM's image encoder (Zhang et al. 2023): TinyViT-5M, last stage without stride."""

    def __init__(
        self,
        img_size: int = 1024,
        embed_dims: Sequence[int] = (64, 128, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 5, 10),
        window_sizes: Sequence[int] = (7, 7, 14, 7),
        out_chans: int = 256,
    ) -> None:
        from timm.models.tiny_vit import TinyVit

        body: Any = TinyVit(
            num_classes=0,
            embed_dims=tuple(embed_dims),
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_sizes=tuple(window_sizes),
            drop_path_rate=0.0,
        )
        body.head = nn.Identity()
        body.stages[-1].downsample.conv2.conv.stride = (1, 1)
        super().__init__(body, "patch_embed", img_size, embed_dims, out_chans)


def build_mobile_sam() -> Sam:
    """Build MobileSAM with random weights."""
    return assemble(TinyVitEncoder())


def mobile_sam_state(state: State) -> State:
    """Convert the state dict of `mobile_sam.pt` to the names of `build_mobile_sam`."""

    def rename(name: str) -> str | None:
        if name.startswith(("norm_head.", "head.")) or name.endswith(".attention_bias_idxs"):
            return None  # the unused classifier, and indices that follow from sizes
        name = re.sub(r"^patch_embed\.seq\.0", "patch_embed.conv1", name)
        name = re.sub(r"^patch_embed\.seq\.2", "patch_embed.conv2", name)
        # timm downsamples at the start of a stage, the authors at the end of the previous one.
        name = re.sub(
            r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name
        )
        name = re.sub(r"^layers\.", "stages.", name)
        return re.sub(r"\.c\.weight$", ".conv.weight", name)

    return _renamed(state, rename)


# RepViT-SAM -------------------------------------------------------------------------------------


class RepVitEncoder(_TimmEncoder):
    """RepViT-SAM's image encoder (Wang et al. 2023): RepViT-M2.3, last stage without stride."""

    def __init__(
        self,
        img_size: int = 1024,
        embed_dims: Sequence[int] = (80, 160, 320, 640),
        depths: Sequence[int] = (6, 6, 34, 2),
        out_chans: int = 256,
    ) -> None:
        from timm.models.repvit import RepVit

        body: Any = RepVit(
            img_size=img_size,
            embed_dim=tuple(embed_dims),
            depth=tuple(depths),
            num_classes=0,
            distillation=False,
        )
        body.stages[-1].downsample.spatial_downsample.c.stride = (1, 1)
        super().__init__(body, "stem", img_size, embed_dims, out_chans)


def build_repvit_sam() -> Sam:
    """Build RepViT-SAM with random weights."""
    return assemble(RepVitEncoder())


def repvit_sam_state(state: State, depths: Sequence[int] = (6, 6, 34, 2)) -> State:
    """Convert the state dict of `repvit_sam.pt` to the names of `build_repvit_sam`."""
    # The authors number the blocks of all stages: entry n of the list is features.(1 + n).
    blocks: list[tuple[str, str]] = []
    for stage, depth in enumerate(depths):
        if stage:
            blocks.append((f"stages.{stage}.downsample.pre_block", "block"))
            blocks.append((f"stages.{stage}.downsample", "downsample"))
        blocks += [(f"stages.{stage}.blocks.{k}", "block") for k in range(depth)]
    inner = {
        "block": {
            "token_mixer.0": "token_mixer",
            "token_mixer.1": "se",
            "channel_mixer.m.0": "channel_mixer.conv1",
            "channel_mixer.m.2": "channel_mixer.conv2",
        },
        "downsample": {
            "token_mixer.0": "spatial_downsample",
            "token_mixer.2": "channel_downsample",
            "channel_mixer.m.0": "ffn.conv1",
            "channel_mixer.m.2": "ffn.conv2",
        },
    }
    stem = {"features.0.0": "stem.conv1", "features.0.2": "stem.conv2"}

    def rename(name: str) -> str | None:
        found = re.match(r"features\.(\d+)\.", name)
        number = int(found[1]) if found else -1
        if number == 0:
            names, start = stem, ""
        elif 0 < number <= len(blocks):
            start, kind = blocks[number - 1]
            names = {f"features.{number}.{old}": f".{new}" for old, new in inner[kind].items()}
        else:
            return name
        for old, new in names.items():
            if name.startswith(f"{old}."):
                return start + new + name.removeprefix(old)
        return name

    return _renamed(state, rename)
