"""`epochs`: train on embeddings that are computed once, or encode in every epoch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from adaptation.features import FeatureBank, LabelledImages
from adaptation.steps import Learner, draw_objects
from adaptation.strategies.baselines import Naive
from adaptation.strategies.semantic import Semantic
from adaptation.strategy import Step, Strategy, StrategyContext
from adaptation.trainer import falling
from benchmarks import report
from benchmarks.options import TimedOptions
from benchmarks.semantic.heads import HeadName
from sam_gym.backbones import Backbone
from sam_gym.backbones.adapters.tuning import TUNINGS, tune_help
from sam_gym.backbones.features import ImageFeatures
from sam_gym.data.streams import Domain, Stream, dataset_stream, make_stream
from sam_gym.utils.fields import documented
from sam_gym.utils.provenance import provenance
from sam_gym.utils.settings import Count, check_settings
from sam_gym.utils.text import counted

#: Adam's learning rate at the start.
_RATE = 1e-3
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

    Both see the same augmented images, objects and prompts, and end with the same weights but for
    rounding. Semantic heads learn from the label maps of `rooms`, each image once; all other
    weights from the objects of `--domain`.
    """

    tune: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help=f"{tune_help('Tune targets with a frozen encoder', True)}."),
    ] = ("decoder", "hq")
    heads: tuple[HeadName, ...] = ()
    """Semantic heads to train as well: seed, pyramid (`adaptation.train --method semantic`)."""
    images: Count = 16
    """Number of training images."""
    augmentations: Annotated[Count, tyro.conf.arg(aliases=("--views",))] = 4
    """Augmentations per training image: the image itself, then flipped and scaled copies."""
    objects_per_image: Count = 1
    """Objects per augmented image; the released code has one mask per image."""
    batch_size: Count = 4
    """Objects per step; images for semantic heads."""
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

    def labelled_features(
        self, images: LabelledImages, kind: str, index: Sequence[int] | np.ndarray
    ) -> ImageFeatures:
        return self.backbone.raw_source(kind).encode([images.images[int(k)] for k in index])


def run(config: EpochsBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option or the checkpoint is wrong.
    """
    check_settings(config)
    if not (config.tune or config.heads):
        raise ValueError("--tune is empty: name at least one tune target, or one of --heads.")
    for name in config.tune:
        if TUNINGS.get(name).raw == "pixels":
            raise ValueError(
                f"--tune {name} trains the encoder, so embeddings cannot be kept: take decoder, hq "
                "or lora_decoder."
            )
    objects = make_stream(
        "scenes-domains", domains=config.domain, train_images=config.images, seed=config.seed
    )
    rooms = dataset_stream("rooms", length=config.images, seed=config.seed)
    out = report.output_folder(config.out, config.overwrite)
    backbone = config.load()
    rows = [_compare(config, backbone, objects, tune) for tune in config.tune]
    rows += [_compare(config, backbone, rooms, "head", head) for head in config.heads]
    summary = {"benchmark": "epochs", "rows": rows} | provenance(config, backbone)
    files = report.write_results(out, summary, "epochs.csv", rows)
    columns, cells = report.formatted(rows, _COLUMNS)
    page = report.Page(
        "Training on embeddings that are computed once",
        f"{backbone.name}: an epoch over {counted(config.images, 'image')} in "
        f"{counted(config.augmentations, 'augmentation')} (of semantic heads: in one each), "
        "with features from the bank and with an encoder that runs in every step. Same images, "
        "objects and prompts.",
    )
    page.cards({f"speed-up of an epoch, {row['tune']}": f"{row['ratio']:.1f}x" for row in rows})
    page.table(columns, cells)
    page.text(
        "weights: the largest difference of a trained weight after the epoch. Features that are "
        "encoded in other batches round differently, and Adam makes steps of full size of "
        "gradients that are nothing but rounding, those of a bias before BatchNorm for one."
    )
    page.finish(files, asdict(config), f"epochs, {backbone.name}", columns, cells)
    return summary


def _compare(
    config: EpochsBenchmarkConfig,
    backbone: Backbone,
    stream: Stream,
    tune: str,
    head: HeadName | None = None,
) -> dict[str, Any]:
    sizes: tuple[Any, ...] = (config.augmentations, config.objects_per_image, None, config.seed)
    # Alternate steps, so that other load on the machine affects both alike.
    sides = [
        _Side(config, kind(backbone, stream, *sizes), tune, head)
        for kind in (FeatureBank, EncodingBank)
    ]
    started = time.perf_counter()
    sides[0].strategy.encode(stream[0])
    once = time.perf_counter() - started
    steps = sides[0].steps
    for step in range(steps):
        for side in sides:
            side.take(step)
    pairs = zip(*(side.strategy.trained().values() for side in sides), strict=True)
    apart = max(float((one - other).detach().abs().max()) for one, other in pairs)
    return {
        "tune": tune if head is None else f"{tune} {head}",
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

    def __init__(
        self,
        config: EpochsBenchmarkConfig,
        bank: FeatureBank,
        tune: str,
        head: HeadName | None,
    ) -> None:
        self.config, self.domain = config, bank.stream[0]
        if head is None:
            self.strategy: Strategy = Naive(StrategyContext(bank, tune, seed=config.seed))
            whole = -(-len(bank.train(self.domain).rows) // config.batch_size)
        else:
            options = Semantic.Options(head=head)
            self.strategy = Semantic(StrategyContext(bank, tune, options, config.seed))
            whole = self.strategy.epoch_steps(0, config.batch_size)
        self.strategy.digest(self.domain)  # augments the images, which is not timed
        self.strategy.before_task(0)
        self.learner = Learner(self.strategy)
        weights = list(self.strategy.trained().values())
        self.optimizer = self.strategy.make_optimizer(weights, _RATE)
        self.steps = whole if config.max_steps is None else min(whole, config.max_steps)
        self.seconds, self.loss = 0.0, 0.0

    def take(self, number: int) -> None:
        started = time.perf_counter()
        step = Step(self.config.seed, 0, number, self.config.batch_size)
        batch = self.strategy.draw(step) or draw_objects(self.strategy, step, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = _RATE * falling(number / self.steps)
        loss, _ = self.learner(lambda: batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = float(loss.detach())
        self.seconds += time.perf_counter() - started
