"""Compiled calls: the same numbers, and no compilation once every size has been seen."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from sam_gym.backbones import NO_POINT, Backbone, Prompts, service
from sam_gym.backbones.compiled import FixedShapes, padded_size


class Compilations:
    """A backend that compiles nothing and counts how often it was asked to."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def compilations() -> Compilations:
    torch._dynamo.reset()
    return Compilations()


@pytest.fixture
def compiled(tiny: Backbone, compilations: Compilations, monkeypatch: Any) -> Backbone:
    monkeypatch.setattr(service, "FixedShapes", partial(FixedShapes, backend=compilations))
    return Backbone("tiny", tiny.private_copy(), tiny.device, tiny.dtype, compile=True)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_padded_size(count: int, size: int) -> None:
    assert padded_size(count) == size


def test_twelve_sizes_compile_once_each(compilations: Compilations) -> None:
    double = FixedShapes(lambda x, y: (2 * x, x if y is None else x + y), compilations)
    for _ in range(2):
        for size in range(1, 2**11 + 1, 97):
            x = torch.arange(float(size))
            one, two = double(x, None)
            assert torch.equal(one, 2 * x) and torch.equal(two, x)
    # 98 rows and more: 128 to 2048, and a single row.
    assert compilations.count == 6
    assert torch.equal(double(x, x)[1], 2 * x) and compilations.count == 7


def prompts_of(kind: str, count: int, rng: np.random.Generator, tiny: Backbone) -> Prompts:
    def noise(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(20, 12, shape).astype(np.float32))

    def coins() -> torch.Tensor:
        return torch.from_numpy(rng.random(count) < 0.5)

    points, labels = noise(count, 3, 2), torch.from_numpy(rng.integers(-1, 2, (count, 3)))
    labels[labels == -1] = NO_POINT
    labels[:, 0] = 1
    clicks = {"points": points, "labels": labels}
    masks = noise(count, *tiny.mask_shape)
    return {
        "clicks": Prompts(**clicks),
        "clicks and some masks": Prompts(**clicks, masks=masks, has_mask=coins()),
        "clicks and masks": Prompts(**clicks, masks=masks),
        "boxes": Prompts(boxes=noise(count, 4)),
        "some boxes": Prompts(**clicks, boxes=noise(count, 4), has_box=coins()),
    }[kind]


@pytest.mark.slow
def test_same_masks_compiled(
    tiny: Backbone, compiled: Backbone, compilations: Compilations
) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(5)]
    features = compiled.encode(images)
    torch.testing.assert_close(features.tensors, tiny.encode(images).tensors, rtol=1e-5, atol=1e-5)
    # One for the images; up to 4 and up to 8 prompts without masks, and the same with masks.
    assert compilations.count == 1
    for kind, before, after in (
        *(("clicks", 1, 3), ("boxes", 3, 3), ("some boxes", 3, 3)),
        *(("clicks and some masks", 3, 5), ("clicks and masks", 5, 5)),
    ):
        assert compilations.count == before, kind
        for count in (5, 3, 8, 5, 7, 3):
            prompts = prompts_of(kind, count, rng, tiny)
            rows = torch.from_numpy(rng.integers(0, 5, count))
            prompts = Prompts(**{**vars(prompts), "rows": rows})
            first = torch.from_numpy(rng.random(count) < 0.5)
            expected, quality = tiny.decode_best(features, prompts, first)
            logits, iou = compiled.decode_best(features, prompts, first)
            assert logits.shape == (count, *tiny.mask_shape) and iou.shape == (count,)
            assert (logits - expected).abs().max() <= 1e-4 * expected.std()
            torch.testing.assert_close(iou, quality, rtol=1e-4, atol=1e-5)
        none = Prompts(**{k: None if v is None else v[:0] for k, v in vars(prompts).items()})
        logits, iou = compiled.decode_best(features, none, first[:0])
        assert logits.shape == (0, *tiny.mask_shape) and iou.shape == (0,)
        assert compilations.count == after, kind
