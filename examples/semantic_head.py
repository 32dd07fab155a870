"""Train a head that classifies every pixel by the features of the frozen SAM.

python examples/semantic_head.py
python examples/semantic_head.py --dataset camvid --data PATH/camvid --steps 900 --max-images 367
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro

from adaptation import Trainer
from adaptation.options import TrainConfig
from adaptation.strategies.semantic import Semantic
from sam_gym import Predictor
from sam_gym.data.base import class_names
from sam_gym.data.streams import dataset_stream
from sam_gym.metrics.semantic import SemanticMetric
from sam_gym.utils.render import draw_masks, save_image


def main(
    dataset: str = "rooms",
    data: Path | None = None,
    head: str = "pyramid",
    steps: int = 100,
    max_images: int = 32,
    out: Path = Path("runs/example_semantic"),
) -> None:
    """Train a head on the training split, and measure it on a held-out one.

    Args:
        dataset: Name of a dataset; without label maps, objects and background are the classes.
        data: Its folder, if it reads files.
        head: Semantic head: seed or pyramid.
        steps: Optimizer steps.
        max_images: Maximum number of images per split.
        out: Folder of the adapter, and of a picture.
    """
    stream = dataset_stream(dataset, None if data is None else str(data))
    config = TrainConfig(steps=steps, max_images=max_images, augmentations=2)
    options = Semantic.Options(head=head, tiles=False)
    result = Trainer(config, out=out).fit(
        stream, strategy="semantic", method_options=options, overwrite=True
    )
    adapter = out / f"semantic-{result.tune}-0" / "adapter.safetensors"

    held_out = stream[0].split(stream.held_out_split)
    names = class_names(held_out)
    samples = [held_out[index] for index in range(min(16, max_images, len(held_out)))]
    predictor = Predictor("micro", adapter=str(adapter))
    predictor.set_images([sample.image for sample in samples])
    label_maps = predictor.segment()  # uint8 (H, W) each, indices of the classes
    metric = SemanticMetric(names, boundaries=False)
    for labels, sample in zip(label_maps, samples, strict=True):
        metric.update(labels, sample.label_map(len(names) - 1))
    for name, value in zip(names, metric.class_iou, strict=True):
        print(f"{name:16} IoU {value:.2f}")
    print(f"mean IoU {metric.summary()['mean_iou']:.3f} on {len(samples)} held-out images")

    masks = [label_maps[0] == number for number in np.unique(label_maps[0])]
    save_image(out / "labels.png", draw_masks(samples[0].image, masks))
    print(f"{out / 'labels.png'}: the classes of the first image.")


if __name__ == "__main__":
    tyro.cli(main)
