"""`epochs`: train on embeddings that are computed once, or encode in every epoch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from adaptation.features import FeatureBank
from adaptation.objects import ObjectIndices
from adaptation.steps import Learner, make_batch
from adaptation.strategies.baselines import Naive
from adaptation.strategy import StrategyContext
from adaptation.trainer import falling
from benchmarks import report
from benchmarks.options import TimedOptions
from sam_gym.backbones import Backbone
from sam_gym.backbones.adapters.tuning import TUNINGS, tune_help, tuned_weights
from sam_gym.backbones.features import ImageFeatures
from sam_gym.data.streams import Domain, Stream, make_stream
from sam_gym.utils.fields import documented
from sam_gym.utils.provenance import provenance
from sam_gym.utils.settings import Count, check_settings

#: Column -> format of its cells.
_COLUMNS = {
    "tune": "{tune}",
    "steps": "{steps}",
    "once, s": "{encode_once_seconds:.2f}",
    "from the bank, s": "{bank_seconds:.2f}",
    "encoding, s": "{encoding_seconds:.2f}",
    "ratio": "{ratio:.1f}x",
    "weights": "{largest_weight_difference:.1e}",
}


@documented
@dataclass(frozen=True, kw_only=True)
class EpochsBenchmarkConfig(TimedOptions):
    """Time an epoch of training on features from the bank, and one that encodes every step.

    Both see the same augmented images, objects and prompts, and must end with the same weights.
    """

    tune: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help=f"{tune_help('Tune targets with a frozen encoder', True)}."),
    ] = ("decoder", "hq")
    images: Count = 16
    """Number of training images."""
    augmentations: Annotated[Count, tyro.conf.arg(aliases=("--views",))] = 4
    """Augmentations per training image: the image itself, then flipped and scaled copies."""
    objects_per_image: Count = 1
    """Objects per augmented image; the released code has one mask per image."""
    batch_size: Count = 4
    """Objects per step."""
    max_steps: Count | None = None
    """Maximum number of steps (None: a whole epoch)."""
    domain: str = "xray"
    """Procedural domain of the images."""
    out: str = "runs/epochs"
    """Folder for results.json, a table and report.html."""


class EncodingBank(FeatureBank):
    """A bank without stored features: every step encodes its images again."""

    def raw(
        self, domain: Domain, split: str, kind: str, index: Sequence[int] | np.ndarray
    ) -> ImageFeatures:
        return self.backbone.raw_source(kind).encode_pixels(self.pixels(domain, split, index))


def run(config: EpochsBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option or the checkpoint is wrong.
    """
    check_settings(config)
    if not config.tune:
        raise ValueError("--tune is empty: name at least one tune target.")
    for name in config.tune:
        if TUNINGS.get(name).raw == "pixels":
            raise ValueError(
                f"--tune {name} trains the encoder, so embeddings cannot be kept: take decoder, hq "
                "or lora_decoder."
            )
    stream = make_stream(
        "scenes-domains", domains=config.domain, train_images=config.images, seed=config.seed
    )
    out = report.output_folder(config.out, config.overwrite)
    backbone = config.load()
    rows = [_compare(config, backbone, stream, tune) for tune in config.tune]
    summary = {"benchmark": "epochs", "rows": rows} | provenance(config, backbone)
    files = report.write_results(out, summary, "epochs.csv", rows)
    columns, cells = report.formatted(rows, _COLUMNS)
    page = report.Page(
        "Training on embeddings that are computed once",
        f"{backbone.name}: an epoch over "
        f"{report.counted(config.images * config.augmentations, 'augmented image')}, "
        "with features from the bank and with an encoder that runs in every step. Same images, "
        "objects and prompts.",
    )
    page.cards({f"speed-up of an epoch, {row['tune']}": f"{row['ratio']:.1f}x" for row in rows})
    page.table(columns, cells)
    page.text("weights: the largest difference of a tuned weight after the epoch.")
    page.finish(files, asdict(config), f"epochs, {backbone.name}", columns, cells)
    return summary


def _compare(
    config: EpochsBenchmarkConfig, backbone: Backbone, stream: Stream, tune: str
) -> dict[str, Any]:
    sizes: tuple[Any, ...] = (config.augmentations, config.objects_per_image, None, config.seed)
    bank, anew = FeatureBank(backbone, stream, *sizes), EncodingBank(backbone, stream, *sizes)
    kind = TUNINGS.get(tune).raw
    for own in (bank, anew):
        own.train(stream[0])
    started = time.perf_counter()
    bank.encode(stream[0], "train", kind)
    once = time.perf_counter() - started
    # Alternate steps, so that other load on the machine affects both alike.
    sides = [_Side(config, own, tune) for own in (bank, anew)]
    steps = sides[0].steps
    for step in range(steps):
        for side in sides:
            side.take(step)
    first, second = (tuned_weights(side.strategy.sam) for side in sides)
    apart = max(float((first[name] - second[name]).abs().max()) for name in first)
    return {
        "tune": tune,
        "steps": steps,
        "encode_once_seconds": once,
        "bank_seconds": sides[0].seconds,
        "encoding_seconds": sides[1].seconds,
        "ratio": sides[1].seconds / sides[0].seconds,
        "largest_weight_difference": apart,
        "bank_loss": sides[0].loss,
        "encoding_loss": sides[1].loss,
    }


class _Side:
    """One of the two ways to train, step by step."""

    def __init__(self, config: EpochsBenchmarkConfig, bank: FeatureBank, tune: str) -> None:
        self.config, self.bank = config, bank
        self.strategy = Naive(StrategyContext(bank, tune, seed=config.seed))
        self.learner = Learner(self.strategy)
        self.optimizer = torch.optim.Adam(list(self.strategy.trained().values()), 1e-3)
        whole = -(-len(bank.train(bank.stream[0]).rows) // config.batch_size)
        self.steps = whole if config.max_steps is None else min(whole, config.max_steps)
        self.seconds, self.loss = 0.0, 0.0

    def take(self, step: int) -> None:
        started = time.perf_counter()
        rng = np.random.default_rng([self.config.seed, step])
        draw = ObjectIndices.draw(rng, self.config.batch_size, [self.bank.pool(0)])
        seeds = rng.integers(2**63, size=self.config.batch_size)
        batch = make_batch(self.bank, draw, self.strategy.raw, seeds)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * falling(step / self.steps)
        loss, _ = self.learner(lambda: batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = float(loss.detach())
        self.seconds += time.perf_counter() - started
