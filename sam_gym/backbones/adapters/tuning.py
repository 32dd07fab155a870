"""Tune targets: copies of a SAM that share its frozen weights, and their tuned weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.encoders import upscaling_of
from sam_gym.backbones.hq import HqMaskDecoder, early_channels, in_head
from sam_gym.backbones.sam2 import Sam2MaskDecoder, ScoringMaskDecoder
from sam_gym.utils.registry import Registry

#: Rank of LoRA, and the factor of its product (alpha / rank).
LORA_RANK, LORA_SCALE = 4, 2.0
#: Hidden channels of an adapter in the encoder.
ADAPTER_WIDTH = 32
#: Channels to which a small HQ head reduces early features.
HQ_RANK = 64

#: Name of the tune target of adapters that hold any weights of a SAM under their names, as the
#: training of trackers writes them. It is not among `TUNINGS`.
VIDEO = "video"

_LORA = (".lora_A.default.weight", ".lora_B.default.weight")


@dataclass(frozen=True)
class Tuning:
    """A tune target.

    Attributes:
        prepare: a frozen SAM -> a SAM that shares its frozen weights; tuned weights require
            gradients. Before the first step it gives the same masks. (A new HQ head adds nothing,
            but SAM's tokens attend to its token, which starts at zero: nearly the same.)
        raw: the kind of `raw_features` from which the tuned part starts: "embedding" or "early",
            which the frozen encoder computes once per image, or "pixels".
        learning_rate: default initial learning rate of Adam, chosen on validation data.
    """

    prepare: Callable[[Sam], Sam]
    raw: str
    learning_rate: float


#: Name -> tune target.
TUNINGS: Registry[Tuning] = Registry("tune target")


def tune_help(purpose: str, frozen_encoder: bool = False) -> str:
    """Return the help text of an option that takes tune targets: its purpose and the valid names.

    Args:
        purpose: what the option is.
        frozen_encoder: list only targets that keep the encoder frozen.
    """
    names = [name for name, own in TUNINGS.items() if own.raw != "pixels" or not frozen_encoder]
    return f"{purpose}: {', '.join(names)}"


def _copy(sam: Sam, owned: Callable[[str], bool] = lambda name: False) -> Sam:
    """Copy the modules of a SAM, and the weights whose names are `owned`.

    All other weights and buffers are shared. Nothing is trainable.
    """
    tensors = [*sam.named_parameters(), *sam.named_buffers()]
    shared = {id(tensor): tensor for name, tensor in tensors if not owned(name)}
    return copy.deepcopy(sam, shared).eval().requires_grad_(False)


def _in_decoder(name: str) -> bool:
    return name.startswith("mask_decoder.")


def _decoder(sam: Sam) -> Sam:
    own = _copy(sam, _in_decoder)
    decoder = own.mask_decoder.requires_grad_(True)
    if isinstance(decoder, Sam2MaskDecoder):  # its finer features are computed once per image
        decoder.conv_s0.requires_grad_(False)
        decoder.conv_s1.requires_grad_(False)
    return own


def _hq(sam: Sam, rank: int | None = None) -> Sam:
    own = _copy(sam, in_head)
    decoder = own.mask_decoder
    if isinstance(decoder, ScoringMaskDecoder):
        raise ValueError(
            "tune='hq' and 'hq_small' do not go with a SAM for videos: take another tune target."
        )
    if not isinstance(decoder, HqMaskDecoder):
        own.mask_decoder = _with_hq_head(decoder, early_channels(own.image_encoder), rank)
    elif rank is not None:
        raise ValueError("tune='hq_small' makes a new head, but this SAM has one: take tune='hq'.")
    for name, weight in own.named_parameters():
        weight.requires_grad_(in_head(name))
    return own.eval()


def _with_hq_head(decoder: Any, vit_dim: int, rank: int | None) -> HqMaskDecoder:
    """Add an HQ head to a mask decoder; before training it adds nothing to a mask."""
    hq = HqMaskDecoder(
        vit_dim=vit_dim,
        vit_rank=rank,
        upscaling=upscaling_of(decoder),
        transformer_dim=decoder.transformer_dim,
        transformer=decoder.transformer,
        num_multimask_outputs=decoder.num_multimask_outputs,
        iou_head_depth=decoder.iou_prediction_head.num_layers,
        iou_head_hidden_dim=decoder.iou_prediction_head.layers[0].out_features,
    ).to(decoder.iou_token.weight.device)
    for name, part in decoder.named_children():
        setattr(hq, name, part)
    last: Any = hq.hf_mlp.layers[-1]
    nn.init.zeros_(hq.hf_token.weight)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return hq


class AdaptedBlock(nn.Module):
    """A transformer block followed by a bottleneck (Houlsby et al. 2019), initially the identity.

    Args:
        block: maps (B, h, w, D) to (B, h', w', C); it is not trained.
        channels: C.
    """

    def __init__(self, block: Any, channels: int) -> None:
        super().__init__()
        self.block = block
        self.window_size = block.window_size
        width = min(ADAPTER_WIDTH, channels)
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x + self.up(F.gelu(self.down(x)))


def encoder_blocks(encoder: Any) -> nn.ModuleList | nn.Sequential:
    """The transformer blocks of an image encoder.

    Raises:
        ValueError: it has no blocks as segment_anything's ViT and timm's Hiera have them.
    """
    blocks = getattr(encoder, "blocks", None)
    kinds = (nn.ModuleList, nn.Sequential)
    if not isinstance(blocks, kinds) or not all(hasattr(b, "attn") for b in blocks):
        raise ValueError(
            f"{type(encoder).__name__} has no transformer blocks to work on: take micro, a ViT SAM "
            "or a SAM 2, or another tune target or method."
        )
    return blocks


def plain_blocks(encoder: Any) -> nn.ModuleList | nn.Sequential:
    """The transformer blocks of an image encoder of one width, through which tokens can pass.

    Raises:
        ValueError: it has none, or widths differ, as in Hiera.
    """
    blocks: Any = encoder_blocks(encoder)
    if len({block.norm2.weight.shape for block in blocks}) > 1:
        raise ValueError(
            f"The transformer blocks of {type(encoder).__name__} differ in width, so that no token "
            "can pass through all of them: take micro or a ViT SAM, or another method."
        )
    return blocks


def _sam_adapter(sam: Sam) -> Sam:
    own = _copy(sam, _in_decoder)
    blocks: Any = encoder_blocks(own.image_encoder)
    for number, block in enumerate(blocks):
        after = block.norm2.weight
        blocks[number] = AdaptedBlock(block, len(after)).to(after.device)
    own.mask_decoder.requires_grad_(True)
    return own.eval()


def _lora(sam: Sam, names: str) -> Sam:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'sam-gym[lora]'.") from error
    if _ENCODER_LINEARS in names:
        encoder_blocks(sam.image_encoder)
    own = _copy(sam)
    config = LoraConfig(r=LORA_RANK, lora_alpha=round(LORA_SCALE * LORA_RANK), target_modules=names)
    inject_adapter_in_model(config, own)
    for name, weight in own.named_parameters():
        weight.requires_grad_(name.endswith(_LORA))
    return own.eval()


_DECODER_LINEARS = (
    r"mask_decoder\.(transformer\..*(q_proj|k_proj|v_proj|out_proj|lin1|lin2)"
    r"|(output_hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.\d)"
)
_ENCODER_LINEARS = r"image_encoder\.(trunk\.)?blocks\.\d+\.attn\.qkv"
_ALL_LINEARS = f"{_DECODER_LINEARS}|{_ENCODER_LINEARS}"

TUNINGS.add("decoder", Tuning(_decoder, "embedding", 3e-4))
TUNINGS.add("hq", Tuning(_hq, "early", 1e-3))
TUNINGS.add("hq_small", Tuning(partial(_hq, rank=HQ_RANK), "early", 2e-3))
TUNINGS.add("sam_adapter", Tuning(_sam_adapter, "pixels", 3e-4))
TUNINGS.add("lora", Tuning(partial(_lora, names=_ALL_LINEARS), "pixels", 3e-3))
TUNINGS.add("lora_decoder", Tuning(partial(_lora, names=_DECODER_LINEARS), "embedding", 3e-3))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that require gradients, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def tuned_weights(sam: Sam) -> dict[str, Tensor]:
    """The tuned weights of a SAM from `Tuning.prepare`: copies, on the CPU.

    A LoRA is two matrices, named after the weight that they add to: `NAME.lora_A`, (r, inputs),
    and `NAME.lora_B`, (outputs, r), scaled.
    """
    weights = {}
    for name, weight in trainable(sam).items():
        value = weight.detach().cpu().clone()
        if name.endswith(_LORA):
            value = value * LORA_SCALE if ".lora_B." in name else value
            name = name.removesuffix(".default.weight")
        weights[name] = value
    return weights


def apply_tuned(sam: Sam, tune: str, weights: Mapping[str, Tensor], source: str = "") -> Sam:
    """Build a frozen SAM with tuned weights, which shares all others with `sam`.

    Args:
        sam: the pretrained SAM.
        tune: a key of `TUNINGS`.
        weights: of `tuned_weights`.
        source: the file, for messages.

    Raises:
        ValueError: the weights do not fit this model and tune target.
    """
    if tune == VIDEO:
        own = _copy(sam, lambda name: name in weights)
        put_weights(own, weights, source)
        return own
    lora = {name for name in weights if name.endswith((".lora_A", ".lora_B"))}
    own = _merged(sam, weights, source) if lora else TUNINGS.get(tune).prepare(sam)
    if not lora:
        state = trainable(own)
        check_names(state, weights, source)
        with torch.no_grad():
            for name, weight in state.items():
                weight.copy_(weights[name])
    return own.requires_grad_(False)


def raw_kind(tune: str) -> str:
    """Return the kind of `raw_features` from which the tuned part of a tune target starts."""
    return "pixels" if tune == VIDEO else TUNINGS.get(tune).raw


def put_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Overwrite some weights of a module, by name; raises `ValueError` as `check_names` does."""
    state = module.state_dict()
    check_names({name: own for name, own in state.items() if name in weights}, weights, source)
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value)


def check_names(state: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise `ValueError` unless the weights have the names and shapes of a state."""
    wrong = sorted(state.keys() ^ weights.keys()) or sorted(
        name for name in state if state[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(
            f"{source or 'adapter'}: does not fit this backbone and tune target "
            f"({len(wrong)} weights differ in name or shape, first: {wrong[0]})."
        )


def _merged(sam: Sam, weights: Mapping[str, Tensor], source: str) -> Sam:
    """Copy a SAM and add LoRAs to the weights of its linear layers."""
    names = sorted({name.rpartition(".")[0] for name in weights})
    own = _copy(sam, lambda name: name.removesuffix(".weight") in names)
    layers = dict(own.named_modules())
    for name in names:
        pair = [weights.get(f"{name}.lora_{side}") for side in "BA"]
        layer = layers.get(name)
        if None in pair or not isinstance(layer, nn.Linear):
            raise ValueError(f"{source or 'adapter'}: {name!r} is no LoRA of a layer of this SAM.")
        outer, inner = pair
        assert outer is not None and inner is not None
        if (outer.shape[0], inner.shape[1]) != tuple(layer.weight.shape):
            raise ValueError(
                f"{source or 'adapter'}: the LoRA of {name!r} is for a layer of shape "
                f"{(outer.shape[0], inner.shape[1])}, here it is {tuple(layer.weight.shape)}."
            )
        with torch.no_grad():
            layer.weight += (outer.float() @ inner.float()).to(layer.weight)
    return own


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Number of bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
