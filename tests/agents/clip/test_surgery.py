"""CLIP Surgery against open_clip's own output and against the paper's formulas written out."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from agents.clip.models import CLIP_MICRO, Clip, WordTokenizer, load_clip
from agents.clip.surgery import (
    ClipSurgery,
    check_operable,
    feature_surgery,
    min_max,
    surgical_tokens,
)
from agents.policies.explicit import shared_surgery

TEXT = {"context_length": 12, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "head_width": 8}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small_clip(**vision: Any) -> Any:
    model = open_clip.CLIP(16, VISION | vision, TEXT).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "scale" not in name:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


def clip_of(model: Any) -> Clip:
    tokenizer = WordTokenizer(["a", "cat", "dog", "photo", "of"], TEXT["context_length"])
    half = torch.full((3, 1, 1), 0.5)
    device = torch.device("cpu")
    return Clip(
        "small", model, tokenizer, ("a {}", "a photo of a {}"), 32, half, half, 2, 32, device
    )


@pytest.mark.parametrize("name", ["ViT-B-32"])
def test_without_surgical_blocks_it_is_open_clip_at_full_size(name: str) -> None:
    visual = open_clip.create_model(name, load_weights=False).visual.eval()
    visual.output_tokens = True
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, tokens = visual(pixels)
        cls, patches = surgical_tokens(visual, pixels, blocks=0)
        assert torch.equal(cls, expected)
        assert torch.equal(patches, tokens @ visual.proj)
        # And with surgery the class token stays, while the patches go another way.
        cls, patches = surgical_tokens(visual, pixels, blocks=6)
        assert torch.equal(cls, expected)
        assert (patches - tokens @ visual.proj).abs().max() > 0.1 * patches.std()


def by_the_paper(visual: Any, pixels: torch.Tensor, blocks: int) -> torch.Tensor:
    """Patch tokens of the second path, with the attention matrix written out head by head."""
    x = visual.ln_pre(
        torch.cat(
            [
                visual.class_embedding.expand(len(pixels), 1, -1),
                visual.conv1(pixels).flatten(2).transpose(1, 2),
            ],
            dim=1,
        )
        + visual.positional_embedding
    )
    second = None
    layers = visual.transformer.resblocks
    for number, layer in enumerate(layers):
        if number >= len(layers) - blocks:
            second = x if second is None else second
            width, heads = x.shape[-1], layer.attn.num_heads
            weight, bias = layer.attn.in_proj_weight[-width:], layer.attn.in_proj_bias[-width:]
            values = (layer.ln_1(x) @ weight.T + bias).chunk(heads, dim=-1)
            outs = []
            for v in values:
                scores = torch.einsum("bqc,bkc->bqk", v, v) / (width // heads) ** 0.5
                outs.append(scores.softmax(dim=-1) @ v)
            second = second + layer.attn.out_proj(torch.cat(outs, dim=-1))
        x = layer(x)
    return (visual.ln_post(x if second is None else second) @ visual.proj)[:, 1:]


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_architecture_surgery_by_the_paper(blocks: int) -> None:
    visual = small_clip().visual
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, patches = surgical_tokens(visual, pixels, blocks)
        torch.testing.assert_close(patches, by_the_paper(visual, pixels, blocks))


def test_other_sizes_interpolate_the_positions() -> None:
    visual = small_clip().visual
    with torch.no_grad():
        assert surgical_tokens(visual, torch.randn(1, 3, 48, 64), 2)[1].shape == (1, 6 * 8, 16)
        # Positions that are the same everywhere are the same at any size.
        visual.positional_embedding[1:] = visual.positional_embedding[1]
        flat = torch.zeros(1, 3, 32, 32)
        small = surgical_tokens(visual, flat, 0)[1]
        large = surgical_tokens(visual, torch.zeros(1, 3, 64, 64), 0)[1]
        torch.testing.assert_close(small[0, 0], small[0, -1])
        torch.testing.assert_close(large[0, 0], large[0, -1])
    with pytest.raises(ValueError, match="multiples of 8"):
        surgical_tokens(visual, torch.zeros(1, 3, 30, 32), 1)


def test_layer_scale_and_sequence_first_towers() -> None:
    scaled = small_clip(ls_init_value=0.1).visual
    pixels = torch.randn(1, 3, 32, 32)
    scaled.output_tokens = True
    with torch.no_grad():
        _, tokens = scaled(pixels)
        assert torch.equal(surgical_tokens(scaled, pixels, 0)[1], tokens @ scaled.proj)


def test_feature_surgery_by_the_paper() -> None:
    cls, patches, texts = (
        F.normalize(torch.randn(shape), dim=-1) for shape in ((2, 8), (2, 5, 8), (3, 8))
    )
    got = feature_surgery(cls, patches, texts)
    for b in range(2):
        share = np.exp(2 * (cls[b] @ texts.T).numpy())
        weight = share / share.sum() / (1 / 3)
        for i in range(5):
            features = [weight[c] * (patches[b, i] * texts[c]).numpy() for c in range(3)]
            redundant = np.mean(features, axis=0)
            expected = [(feature - redundant).sum() for feature in features]
            np.testing.assert_allclose(got[b, i], expected, atol=1e-6)

    empty = F.normalize(torch.randn(8), dim=-1)
    one = feature_surgery(cls, patches, texts[:1], empty)
    torch.testing.assert_close(one[..., 0], patches @ texts[0] - patches @ empty)
    torch.testing.assert_close(feature_surgery(cls, patches, texts, empty)[..., :1], one)
    with pytest.raises(ValueError, match="empty prompt"):
        feature_surgery(cls, patches, texts[:1])


def test_min_max() -> None:
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    expected = torch.tensor([[[0.0, 1.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(min_max(maps), expected, rtol=0, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = small_clip()
    before = copy.deepcopy(model.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.encode_image(pixels)
        surgery = ClipSurgery(clip_of(model))
        surgery.similarity(torch.rand(2, 3, 50, 40) * 255, surgery.embed_texts(["cat", "dog"]))
        assert torch.equal(model.encode_image(pixels), expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_texts_are_ensembles_of_unit_length() -> None:
    model = small_clip()
    surgery = ClipSurgery(clip_of(model))
    texts = surgery.embed_texts(["cat", "dog"])
    with torch.no_grad():
        tokens = surgery.clip.tokenizer(["a dog", "a photo of a dog"])
        mean = F.normalize(model.encode_text(tokens), dim=-1).mean(dim=0)
    torch.testing.assert_close(texts[1], F.normalize(mean, dim=0))
    with pytest.raises(ValueError, match=r"no word for 'unicorn'.*cat, dog"):
        surgery.embed_texts(["cat", "unicorn"])
    maps, whole = surgery.similarity(torch.rand(2, 3, 32, 32) * 255, texts, surgery.redundant())
    assert maps.shape == (2, 2, 4, 4) and whole.shape == (2, 2)


def test_what_cannot_be_operated_on_is_refused() -> None:
    with pytest.raises(ValueError, match="ModifiedResNet"):
        check_operable(open_clip.create_model("RN50", load_weights=False).visual, 1)
    with pytest.raises(ValueError, match="class token"):
        check_operable(small_clip(pool_type="avg").visual, 1)
    with pytest.raises(ValueError, match="from 0 to 3, got 4"):
        check_operable(small_clip().visual, 4)
    visual = small_clip().visual
    assert type(visual) is VisionTransformer
    visual.transformer.resblocks[1] = nn.Identity()
    with pytest.raises(ValueError, match="Identity"):
        check_operable(visual, 1)


def test_unknown_clips() -> None:
    with pytest.raises(ValueError, match="Did you mean 'ViT-B-16'"):
        load_clip("ViT-B16")
    with pytest.raises(ValueError, match="openai"):
        load_clip("ViT-B-16")
    with pytest.raises(FileNotFoundError, match="open_clip_model"):
        load_clip("clip_micro", "/nowhere")


def test_word_tokenizer() -> None:
    tokenizer = WordTokenizer(["a", "cat"], context_length=5)
    ids = tokenizer(["A cat.", "", "a cat a unicorn cat"])
    start, end = tokenizer.start, tokenizer.end
    assert ids.tolist() == [[start, 2, 3, end, 0], [start, end, 0, 0, 0], [start, 2, 3, 2, end]]
    assert ids.argmax(dim=1).tolist() == [3, 1, 4] and int(ids.max()) == tokenizer.vocab_size - 1
    assert tokenizer.unknown("a unicorn") == ["unicorn"]


def test_weights_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to download file")

    monkeypatch.setattr(open_clip, "create_model", offline)
    message = r"ViT-B-16: the weights 'openai' could not be loaded.*download"
    with pytest.raises(OSError, match=message):
        load_clip("ViT-B-16", "openai", "cpu")


def test_weights_that_were_written_again_are_loaded_again(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(CLIP_MICRO, folder)
    arguments: Any = {"name": "clip_micro", "pretrained": str(folder), "device": "cpu"}
    first = shared_surgery(**arguments)
    assert shared_surgery(**arguments) is first
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    save_file(state | {"logit_scale": state["logit_scale"] + 1}, file)
    second = shared_surgery(**arguments)
    assert second.clip.identity != first.clip.identity
    save_file(state | {"logit_scale": state["logit_scale"] * torch.nan}, file)
    with pytest.raises(ValueError, match="weights are NaN or infinite .*logit_scale"):
        shared_surgery(**arguments)
