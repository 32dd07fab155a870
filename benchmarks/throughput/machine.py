"""Measure the speed of a model and the limits of the machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch.utils.flop_counter import FlopCounterMode

from sam_gym.backbones import Backbone, Prompts
from sam_gym.data import make_dataset
from sam_gym.metrics.masks import batch_iou
from sam_gym.simulation.clicks import interior_distance
from sam_gym.utils.transfer import synchronise


def _median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Return the median time of a call on a device, after one warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def encoder_speed(backbone: Backbone, plain: Sam, batch: int) -> dict[str, float]:
    """Return images per second of batched `encode` and of segment_anything's encoder."""
    scenes = make_dataset("scenes", "test", length=batch)
    images = [scenes[i].image for i in range(batch)]
    predictor = SamPredictor(plain)

    def one_by_one() -> None:
        for image in images:
            predictor.set_image(image)

    ours = batch / _median_seconds(lambda: backbone.encode(images), backbone.device)
    theirs = batch / _median_seconds(one_by_one, backbone.device)
    embedding = torch.cat([_embedding(predictor, image) for image in images])
    difference = (backbone.encode(images).embedding - embedding).abs().max()
    return {
        "images_per_second": ours,
        "plain_images_per_second": theirs,
        "speedup": ours / theirs,
        "largest_difference_in_deviations": float(difference / embedding.std()),
    }


def _embedding(predictor: SamPredictor, image: np.ndarray) -> torch.Tensor:
    predictor.set_image(image)
    return predictor.get_image_embedding()


def decoder_speed(backbone: Backbone, prompts: int) -> dict[str, float]:
    """Return decoding speed as a fraction of the roofline of the machine.

    The roofline is the larger of two times: the multiplications at the rate of a large matrix
    product, and reading the embeddings and writing the masks at the rate of a large copy. Latency
    is that of one click on one image.
    """
    device = backbone.device
    features = backbone.feature_spec.empty(prompts, device).map(torch.Tensor.normal_)
    batch = Prompts(
        points=torch.full((prompts, 3, 2), 50.0, device=device),
        labels=torch.ones((prompts, 3), dtype=torch.long, device=device),
        masks=torch.randn(prompts, *backbone.mask_shape, device=device),
    )
    first = torch.zeros(prompts, dtype=torch.bool, device=device)
    one = Prompts(batch.points[:1], batch.labels[:1], masks=batch.masks[:1])  # type: ignore[index]

    decode = _median_seconds(lambda: backbone.decode_best(features, batch, first), device)
    click = _median_seconds(lambda: backbone.decode_best(features[:1], one, first[:1]), device)
    # The FLOP counter does not see compiled code.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        backbone.decode_best(features, batch, first)
    flops = counter.get_total_flops()
    moved = prompts * (backbone.feature_spec.nbytes + 8 * int(np.prod(backbone.mask_shape)))

    flops_per_second = _matmul_rate(device, backbone.dtype)
    large = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    copied = torch.empty_like(large)
    bytes_per_second = 8 * large.numel() / _median_seconds(lambda: copied.copy_(large), device)
    limit = max(flops / flops_per_second, moved / bytes_per_second)
    return {
        "prompts": prompts,
        "ms_per_prompt": 1000 * decode / prompts,
        "click_latency_ms": 1000 * click,
        "gflop_per_prompt": flops / prompts / 1e9,
        "matmul_gflop_per_second": flops_per_second / 1e9,
        "copy_gb_per_second": bytes_per_second / 1e9,
        "fraction_of_roofline": limit / decode,
    }


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP per second of a product of large square matrices."""
    side, probe = 8192 if device.type == "cuda" else 2048, 256
    # On a CPU of few cores, sides of 1024 reach the rate of larger ones. On a GPU, the small
    # product that the time is extrapolated from is mostly its launch.
    limit = 0.1 if device.type == "cpu" else 1.0

    def seconds(size: int, repeats: int) -> float:
        left = torch.randn(size, size, device=device, dtype=dtype)
        return _median_seconds(lambda: left @ left, device, repeats)

    # On a CPU without units for it, a product in low precision may take a thousand times as long.
    while side > probe and seconds(probe, 1) * (side / probe) ** 3 > limit:
        side //= 2
    return 2 * side**3 / seconds(side, 7)


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory of the device, or of the process on a CPU; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def precision_effect(backbone: Backbone, count: int) -> dict[str, dict[str, float]]:
    """Return the mean IoU with the float32 masks after one click, by precision.

    `model`: encoder and decoder in that precision; `disk`: float32, with the embedding rounded to
    that precision as on disk. Not compiled.
    """
    scenes = make_dataset("scenes", "test", length=count)
    samples = [scenes[i] for i in range(count)]
    images = [sample.image for sample in samples]
    points = np.zeros((count, 1, 2), np.float32)
    for point, sample in zip(points, samples, strict=True):
        distance = interior_distance(sample.masks[0])
        y, x = divmod(int(distance.argmax()), distance.shape[1])
        point[0] = backbone.to_input_frame(np.array([x, y]), distance.shape)
    device = backbone.device
    prompts = Prompts(
        points=torch.from_numpy(points).to(device),
        labels=torch.ones((count, 1), dtype=torch.long, device=device),
    )
    first = torch.ones(count, dtype=torch.bool, device=device)

    def at(dtype: torch.dtype) -> Backbone:
        return Backbone(backbone.name, backbone.private_copy(), device, dtype)

    exact = at(torch.float32)
    features = exact.encode(images)
    truth = exact.decode_best(features, prompts, first)[0] > 0

    def iou(logits: torch.Tensor) -> float:
        masks = logits > 0
        both_empty = ~(masks | truth).any(dim=-1).any(dim=-1)
        return float(batch_iou(masks, truth).masked_fill(both_empty, 1.0).mean())

    effect = {}
    for dtype in (torch.bfloat16, torch.float16):
        lower = at(dtype)
        kept = features.floating_to(dtype).floating_to(torch.float32)
        effect[str(dtype).removeprefix("torch.")] = {
            "model": iou(lower.decode_best(lower.encode(images), prompts, first)[0]),
            "disk": iou(exact.decode_best(kept, prompts, first)[0]),
        }
    return effect
