"""Tuned copies: what they give at first, what they share, and their weights as tensors."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from sam_gym.backbones import Backbone, Prompts, load_backbone
from sam_gym.backbones.adapters.model import Model, embed, raw_features
from sam_gym.backbones.adapters.tuning import TUNINGS, apply_tuned, trainable, tuned_weights
from sam_gym.backbones.decode import decode_tokens

TUNES = TUNINGS.names()
PROMPTS = Prompts(
    points=torch.tensor([[[9.0, 9], [30, 40]], [[20, 50], [0, 0]], [[5, 5], [6, 50]]]),
    labels=torch.tensor([[1, 0], [1, -2], [1, 1]]),
    boxes=torch.tensor([[2.0, 3, 40, 50], [10, 10, 60, 60], [0, 0, 20, 20]]),
    has_box=torch.tensor([True, False, True]),
)


@pytest.fixture(params=TUNES)
def tune(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("lora"):
        pytest.importorskip("peft")
    return request.param


def pixels_of(backbone: Backbone, count: int = 3) -> Tensor:
    rng = np.random.default_rng(0)
    size = backbone.image_size
    return backbone.prepare(list(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)))


@torch.no_grad()
def masks_of(sam: Sam, pixels: Tensor) -> Tensor:
    """Logits of all mask tokens, by the way that a service takes."""
    tokens = Model(sam).decode(Model(sam).encode(pixels), PROMPTS)
    return tokens.decode_masks()


@torch.no_grad()
def move(sam: Sam) -> None:
    """Change whatever is trainable, as training would."""
    generator = torch.Generator().manual_seed(1)
    for weight in trainable(sam).values():
        weight += 0.1 * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("name", ["tiny", "shipped"])
def test_at_first_the_masks_are_those_of_the_sam(
    name: str, tune: str, request: pytest.FixtureRequest
) -> None:
    backbone = request.getfixturevalue(name)
    pixels = pixels_of(backbone)
    expected = masks_of(backbone.sam, pixels)
    got = masks_of(TUNINGS.get(tune).prepare(backbone.sam), pixels)
    if tune.startswith("hq"):  # one more token is looked at, though nothing is drawn from it
        assert torch.corrcoef(torch.stack([expected.ravel(), got.ravel()]))[0, 1] > 0.95
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_what_is_frozen_is_shared(tiny: Backbone, tune: str) -> None:
    before = copy.deepcopy(tiny.sam.state_dict())
    own = TUNINGS.get(tune).prepare(tiny.sam)
    base = {weight.data_ptr() for weight in tiny.sam.parameters()}
    trained = trainable(own)
    assert trained
    for name, weight in own.named_parameters():
        assert (weight.data_ptr() in base) == (name not in trained), name
    move(own)
    assert not any(module.training for module in own.modules())
    applied = apply_tuned(tiny.sam, tune, tuned_weights(own))
    assert not trainable(applied)
    again = tiny.sam.state_dict()
    assert again.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(again[name], value), name
    assert not trainable(tiny.sam)


def test_only_what_is_tuned_is_trainable(tiny: Backbone, tune: str) -> None:
    names = set(trainable(TUNINGS.get(tune).prepare(tiny.sam)))
    decoder = {f"mask_decoder.{name}" for name, _ in tiny.sam.mask_decoder.named_parameters()}
    if tune == "decoder":
        assert names == decoder
    elif tune.startswith("hq"):
        assert names and not names & decoder and all(n.startswith("mask_decoder.") for n in names)
    elif tune == "sam_adapter":
        rest = {name.rpartition(".")[0] for name in names - decoder}
        assert decoder < names
        assert rest == {f"image_encoder.blocks.{k}.{p}" for k in (0, 1) for p in ("down", "up")}
    else:
        assert all(".lora_" in name for name in names)
        in_encoder = any(name.startswith("image_encoder.") for name in names)
        assert in_encoder == (tune == "lora")


def test_tuned_weights_are_all_that_was_learned(tiny: Backbone, tune: str) -> None:
    own = TUNINGS.get(tune).prepare(tiny.sam)
    pixels = pixels_of(tiny)
    first = masks_of(own, pixels)
    move(own)
    expected = masks_of(own, pixels)
    assert not torch.allclose(first, expected, atol=float(first.std()) / 100)
    weights = tuned_weights(own)
    got = masks_of(apply_tuned(tiny.sam, tune, weights), pixels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.std()))
    # They are copies.
    move(own)
    assert torch.equal(masks_of(apply_tuned(tiny.sam, tune, weights), pixels), got)


def test_training_starts_from_the_raw_features(tiny: Backbone, tune: str) -> None:
    """What is encoded once and for all, and then embedded, is what `encode` gives."""
    own = TUNINGS.get(tune).prepare(tiny.sam)
    move(own)
    pixels, kind = pixels_of(tiny), TUNINGS.get(tune).raw
    with torch.no_grad():
        got = embed(own, raw_features(tiny.sam, pixels, kind))
        torch.testing.assert_close(got.tensors, Model(own).encode(pixels).tensors)


def test_gradients_reach_what_is_tuned_and_nothing_else(tiny: Backbone, tune: str) -> None:
    own = TUNINGS.get(tune).prepare(tiny.sam)
    move(own)
    kind = TUNINGS.get(tune).raw
    features = embed(own, raw_features(tiny.sam, pixels_of(tiny), kind))
    tokens = decode_tokens(own, features, PROMPTS)
    (tokens.decode_masks().square().mean() + tokens.iou.square().mean()).backward()
    for name, weight in own.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
    assert all(weight.grad is None for weight in tiny.sam.parameters())


def test_a_lora_of_peft_is_the_product_of_the_file(tiny: Backbone) -> None:
    pytest.importorskip("peft")
    own = TUNINGS.get("lora_decoder").prepare(tiny.sam)
    move(own)
    weights = tuned_weights(own)
    name = "mask_decoder.transformer.layers.0.self_attn.q_proj"
    layer: Any = own.get_submodule(name)
    delta = weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
    torch.testing.assert_close(delta, layer.get_delta_weight("default"))
    x = torch.randn(5, delta.shape[1])
    plain = tiny.sam.get_submodule(name)(x)
    torch.testing.assert_close(layer(x), plain + x @ delta.T, atol=1e-5, rtol=1e-5)


def test_an_hq_sam_tunes_its_own_head(hq_micro: str) -> None:
    backbone = load_backbone(hq_micro, device="cpu")
    own = TUNINGS.get("hq").prepare(backbone.sam)
    pixels = pixels_of(backbone)
    torch.testing.assert_close(masks_of(own, pixels), masks_of(backbone.sam, pixels))
    move(own)
    got = masks_of(apply_tuned(backbone.sam, "hq", tuned_weights(own)), pixels)
    torch.testing.assert_close(got, masks_of(own, pixels))
    with pytest.raises(ValueError, match="this SAM has one: take tune='hq'"):
        TUNINGS.get("hq_small").prepare(backbone.sam)


def test_a_small_hq_head_is_less_than_half_of_one(shipped: Backbone) -> None:
    def size(tune: str) -> int:
        return sum(w.numel() for w in trainable(TUNINGS.get(tune).prepare(shipped.sam)).values())

    assert size("hq_small") < 0.45 * size("hq")


def test_encoders_without_what_is_needed_are_refused(tiny: Backbone) -> None:
    other = copy.copy(tiny.sam)
    other._modules = dict(tiny.sam._modules)
    other.image_encoder = torch.nn.Conv2d(3, 32, 1)
    with pytest.raises(ValueError, match="early features of the encoder; Conv2d has none"):
        TUNINGS.get("hq").prepare(other)
    with pytest.raises(ValueError, match="Conv2d has no transformer blocks"):
        TUNINGS.get("sam_adapter").prepare(other)
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="Conv2d has no transformer blocks"):
        TUNINGS.get("lora").prepare(other)
    assert trainable(TUNINGS.get("lora_decoder").prepare(other))


def test_a_missing_peft_is_named(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'sam-gym\[lora\]'"):
        TUNINGS.get("lora_decoder").prepare(tiny.sam)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_of_something_else_are_refused(tiny: Backbone, tune: str, change: str) -> None:
    weights = tuned_weights(TUNINGS.get(tune).prepare(tiny.sam))
    name = next(name for name in weights if name.endswith(("lora_B", "weight")))
    if change == "missing":
        weights.pop(name)
    elif change == "unexpected":
        weights[name.replace("mask_decoder", "other").replace("image_encoder", "other")] = (
            weights.pop(name)
        )
    else:
        weights[name] = weights[name][:-1]
    with pytest.raises(ValueError, match="^file: .*(does not fit|is no LoRA|the LoRA of)"):
        apply_tuned(tiny.sam, tune, weights, "file")
