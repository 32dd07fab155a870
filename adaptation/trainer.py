"""One loop for all methods: domains come, are learned, and every domain is measured again."""

from __future__ import annotations

import functools
import math
import operator
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch

import adaptation.strategies  # noqa: F401  (registers the methods)
from adaptation.evaluation import check_prompt, narrow_share, score
from adaptation.features import FeatureBank, ObjectIndices
from adaptation.results import MEASURES, Run, folder_name
from adaptation.steps import Learner, make_batch
from adaptation.strategy import STRATEGIES, Options, Strategy, StrategyContext
from sam_gym import ENVIRONMENTS
from sam_gym.backbones import load_backbone
from sam_gym.backbones.adapters.adapter import Model
from sam_gym.backbones.adapters.tuning import TUNINGS
from sam_gym.data import DATASETS
from sam_gym.data.streams import STREAMS, Domain, Stream, dataset_stream, make_stream
from sam_gym.utils.files import wait_for_a_later_name, write_json
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.training import save_state

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training, the same for every method."""

    steps: int = 60
    """Optimizer steps on each domain."""
    batch_size: int = 16
    """Objects of a step, over all processes."""
    objects_per_view: int = 1
    """Objects that a step takes of each view that it draws. Where the encoder is tuned
    (sam_adapter, lora), 8 encode an eighth of the views in a step of the same size."""
    learning_rate: float | None = None
    """Adam's learning rate, which falls to a tenth over a domain, along a cosine (default: by what
    is tuned: decoder and sam_adapter 3e-4, hq and prompts 1e-3, hq_small 2e-3, LoRA 3e-3)."""
    views: int = 4
    """Views of each training image, the first as it is, the others flipped and scaled."""
    objects_per_image: int = 8
    """At most so many objects of a view or of a held-out image."""
    max_images: int | None = None
    """At most so many images of each split (default: all)."""
    prompts: tuple[str, ...] = ("box",)
    """What held-out objects are shown by: box, click, clicks5."""
    split: Literal["val", "test"] = "test"
    """Split that is measured on: tune on val."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of training; that of the frozen encoder is --dtype."""
    checkpoint_every: int = 200
    """Steps between checkpoints; there is one after each domain too."""
    seed: int = 0
    """Seed of weights, batches, prompts, views and buffers."""

    def validate(self) -> None:
        """Raise `ValueError` for a value that cannot work."""
        counts = ("steps", "batch_size", "objects_per_view", "views", "objects_per_image")
        for name in (*counts, "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images must be at least 1, got {self.max_images}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.split not in ("val", "test"):
            raise unknown_name("split to measure on", self.split, ("val", "test"))
        if not self.prompts:
            raise ValueError("prompts is empty: name at least one of box, click, clicks5.")
        for name in self.prompts:
            check_prompt(name)


def find_stream(where: str | Stream | gym.Env[Any, Any]) -> Stream:
    """The stream of an environment, of an environment id such as "SamContinual-v0", or by name.

    A dataset, or an environment over a dataset, is a stream of one domain.

    Raises:
        ValueError: the id or name is unknown, or the environment has no images of its own.
    """
    if isinstance(where, Stream):
        return where
    if isinstance(where, str):
        if where in STREAMS.names():
            return make_stream(where)
        if where in DATASETS:
            return dataset_stream(where)
        if where not in gym.registry:
            raise unknown_name("stream", where, [*STREAMS.names(), *DATASETS, *ENVIRONMENTS])
        where = gym.make(where)
        try:
            return find_stream(where)
        finally:
            where.close()
    stream = getattr(where.unwrapped, "stream", None)
    if isinstance(stream, Stream):
        return stream
    config: Any = getattr(getattr(where.unwrapped, "core", None), "config", None)
    if not hasattr(config, "dataset"):
        raise ValueError(f"{where} has neither a stream of domains nor a dataset.")
    return dataset_stream(config.dataset, config.data, **config.dataset_kwargs)


class Trainer:
    """Trains methods on a stream, on private copies of a backbone.

    Under `torchrun`, each process takes its share of every batch, and gradients are averaged.

    Args:
        config: settings of the training.
        options: weights and sizes of the methods.
        backbone: name, checkpoint, device and dtype of the SAM, as `load_backbone` takes them.
        out: folder for checkpoints, TensorBoard and adapters; None: nothing is written.
        retention: a domain that is never trained on and measured at the end, or None.
        progress: whether bars are shown.

    Raises:
        ValueError: a setting is impossible.
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        options: Options | None = None,
        backbone: dict[str, Any] | None = None,
        out: str | Path | None = None,
        retention: Domain | None = None,
        progress: bool = True,
    ) -> None:
        from lightning_fabric import Fabric

        self.config, self.options = config or TrainConfig(), options or Options()
        self.config.validate()
        self.backbone = load_backbone(**(backbone or {}))
        self.out = None if out is None else Path(out).expanduser()
        self.retention, self.progress = retention, progress
        device = self.backbone.device
        world = _world_size()
        if self.config.batch_size % world:
            raise ValueError(
                f"batch_size {self.config.batch_size} does not divide among {world} processes."
            )
        self.fabric = Fabric(
            accelerator="cpu" if device.type == "cpu" else device.type,
            devices=1 if world == 1 else "auto" if device.type == "cuda" else world,
            strategy="auto" if world == 1 else "ddp_find_unused_parameters_true",
            precision=self.config.precision,
        )
        self.fabric.launch()
        self._bank: FeatureBank | None = None

    def bank(self, stream: Stream) -> FeatureBank:
        """The bank of a stream; the same one as long as the stream stays the same."""
        if self._bank is None or self._bank.stream != stream:
            config = self.config
            self._bank = FeatureBank(
                self.backbone,
                stream,
                config.views,
                config.objects_per_image,
                config.max_images,
                config.seed,
            )
        return self._bank

    def fit(
        self,
        stream: str | Stream | gym.Env[Any, Any],
        strategy: str = "naive",
        tune: str | None = None,
        resume: bool = False,
    ) -> Run:
        """Learn the domains of a stream one after the other, and measure all of them after each.

        Args:
            stream: the domains; or an environment, its id, or the name of a stream.
            strategy: name of the method.
            tune: what is tuned, a key of `TUNINGS`; None: the method's default.
            resume: go on from the checkpoint in `out`, if there is one.

        Raises:
            ValueError: a name is unknown, or the checkpoint is of another run.
        """
        stream = find_stream(stream)
        method = STRATEGIES.get(strategy)
        tune = method.default_tune if tune is None else tune
        check_tune(strategy, tune)
        setting = StrategyContext(self.bank(stream), tune, self.options, self.config.seed)
        return _Fit(self, strategy, method(setting)).run(resume)


def check_tune(strategy: str, tune: str) -> None:
    """Raise `ValueError` unless a method can tune that part."""
    method = STRATEGIES.get(strategy)
    if tune not in method.tunes:
        if tune in TUNINGS.names() or tune == "prompts":
            raise ValueError(
                f"Method {strategy!r} does not go with tune={tune!r}: it tunes "
                f"{', '.join(method.tunes)}."
            )
        raise unknown_name("tune target", tune, method.tunes)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class _Fit:
    """One method on one stream."""

    def __init__(self, trainer: Trainer, name: str, strategy: Strategy) -> None:
        self.trainer, self.config, self.fabric = trainer, trainer.config, trainer.fabric
        self.strategy = strategy
        self.bank = strategy.setting.bank
        self.stream = self.bank.stream
        self.result = Run(name, strategy.setting.tune, self.stream.names, seed=self.config.seed)
        #: Where the run is: stages that are over, and steps of the present one.
        self.stage = self.step = 0
        self._optimizer_state: Any = None
        self._log: Any = None

    # What there is to do -----------------------------------------------------------------------

    @property
    def stages(self) -> int:
        return 1 if self.strategy.joint or not self.strategy.learns else len(self.stream)

    @property
    def steps(self) -> int:
        """Steps of a stage."""
        if not self.strategy.learns:
            return 0
        return self.config.steps * (len(self.stream) if self.strategy.joint else 1)

    @property
    def learning_rate(self) -> float:
        own = self.config.learning_rate
        return self.strategy.learning_rate if own is None else own

    def run(self, resume: bool) -> Run:
        path = self._checkpoint_path()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.is_file():
                self._restore(path)
        self._open_log()
        self._measure_zero_shot()
        with self._bar() as advance:
            advance(self.stage * self.steps + self.step)
            while self.stage < self.stages:
                self._learn(advance)
                self._measure()
                self.stage, self.step, self._optimizer_state = self.stage + 1, 0, None
                self._save()
        self._finish()
        return self.result

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int], None]]:
        """A progress bar over all steps; what it yields moves it on."""
        shown = self.trainer.progress and self.fabric.is_global_zero
        with ProgressBar(disable=not shown, transient=True) as progress:
            task = progress.add_task(self.result.method, total=self.stages * self.steps)

            def advance(count: int) -> None:
                domain = self.stream.names[min(self.stage, len(self.stream) - 1)]
                text = f"{self.result.method}, {'all' if self.strategy.joint else domain}"
                progress.update(task, advance=count, description=text)

            yield advance

    # Learning ----------------------------------------------------------------------------------

    def _learn(self, advance: Callable[[int], None]) -> None:
        strategy, config = self.strategy, self.config
        if not strategy.learns:
            return
        resumed = self.step > 0
        if not resumed:
            strategy.before_task(self.stage)
            self.result.trainable = sum(w.numel() for w in strategy.trained().values())
        # Features that are missing are made now, outside of what is timed.
        for domain in self._domains():
            if strategy.raw != "pixels":
                self.bank.raw(domain, "train", strategy.raw)
        learner = Learner(strategy)
        optimizer = torch.optim.Adam(list(strategy.trained().values()), self.learning_rate)
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        wrapped, optimizer = self.fabric.setup(learner, optimizer)
        while self.step < self.steps:
            started = time.perf_counter()
            loss, iou = self._step(wrapped, optimizer)
            self.result.seconds += time.perf_counter() - started
            self.step += 1
            advance(1)
            self._record("train/loss", loss)
            self._record("train/iou", iou)
            if self.step % config.checkpoint_every == 0 and self.step < self.steps:
                self._optimizer_state = optimizer.state_dict()
                self._save()
        started = time.perf_counter()
        strategy.after_task(self.stage)
        self.result.seconds += time.perf_counter() - started

    def _domains(self) -> list[Domain]:
        """The domains that are learned in this stage."""
        return list(self.stream) if self.strategy.joint else [self.stream[self.stage]]

    def _step(self, learner: Any, optimizer: Any) -> tuple[float, float]:
        """One optimizer step; the batch depends on seed, stage and step alone."""
        config, strategy, fabric = self.config, self.strategy, self.fabric
        rng = np.random.default_rng([config.seed, 3, self.stage, self.step])
        views = [self.bank.train(domain) for domain in self._domains()]
        first = 0 if strategy.joint else self.stage
        present = [(first + k, own, np.arange(len(own.frames))) for k, own in enumerate(views)]
        draws = [
            ObjectIndices.from_views(rng, config.batch_size, places, config.objects_per_view)
            for places in (present, strategy.replayed())
            if places
        ]
        rank, world = fabric.global_rank, fabric.world_size
        # A row of seeds for the objects of the domain, and one for those beside them.
        seeds = rng.integers(2**63, size=(2, world, config.batch_size // world))[:, rank]
        own = functools.reduce(operator.add, (draw.part(rank, world) for draw in draws))
        used = seeds[: len(draws)].ravel()
        batch = make_batch(self.bank, own, strategy.raw, used, strategy.batch)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * falling(self.step / self.steps)
        loss, overlap = learner(lambda: batch)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        strategy.after_step(self.step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.result.method}: the loss is {value} in step {self.step} of domain "
                f"{self.stream.names[self.stage]!r}. Lower --learning-rate or the weight of the "
                "method's own loss."
            )
        return value, float(overlap)

    # Measuring ---------------------------------------------------------------------------------

    def _measure_zero_shot(self) -> None:
        if not self.result.zero_shot:
            plain = Model(self.strategy.setting.sam, "embedding")
            for prompt in self.config.prompts:
                row, _ = self._scores(plain, prompt)
                self.result.zero_shot[prompt] = row
            for domain in self.stream:
                objects = self.bank.held_out(domain, self.config.split)
                self.result.narrow[domain.name] = round(narrow_share(objects), 4)

    def _scores(self, model: Model, prompt: str) -> tuple[dict[str, list[float]], list[float]]:
        """Scores on every domain, in points, and shares of well-routed images."""
        row: dict[str, list[float]] = {measure: [] for measure in MEASURES}
        routed = []
        for domain in self.stream:
            scores = score(model, self.bank, domain, prompt, self.config.split)
            for measure in MEASURES:
                row[measure].append(100 * float(getattr(scores, measure).mean()))
            if scores.routed is not None:
                routed.append(scores.routed)
        return row, routed

    def _measure(self) -> None:
        """Measure all domains after a stage."""
        result, model = self.result, self.strategy.model()
        for prompt in self.config.prompts:
            row, routed = self._scores(model, prompt)
            for measure in MEASURES:
                rows = result.scores.setdefault(prompt, {}).setdefault(measure, [])
                rows.append(row[measure])
            result.routed = float(np.mean(routed)) if routed else None
            for name, value in zip(self.stream.names, row["iou"], strict=True):
                self._record(f"{self.config.split}/{prompt}/{name}", value)
        if self.stage == self.stages - 1 and self.trainer.retention is not None:
            for prompt in self.config.prompts:
                domain = self.trainer.retention
                scores = score(model, self.bank, domain, prompt, self.config.split)
                result.retention[prompt] = 100 * float(scores.iou.mean())

    def _finish(self) -> None:
        learned = len(self.stream) if self.strategy.learns else 1
        self.result.kept_bytes = self.strategy.kept_bytes() / learned
        if self._log is not None:
            self._log.close()
        if self.trainer.out is None or not self.fabric.is_global_zero:
            return
        folder = self._folder()
        if self.strategy.learns:
            self.strategy.adapter().save(folder / "adapter.safetensors")
        write_json(folder / "run.json", asdict(self.result))

    # Files -------------------------------------------------------------------------------------

    def _folder(self) -> Path:
        assert self.trainer.out is not None
        return self.trainer.out / folder_name(
            self.result.method, self.result.tune, self.config.seed
        )

    def _checkpoint_path(self) -> Path | None:
        return None if self.trainer.out is None else self._folder() / "checkpoint.pt"

    def _open_log(self) -> None:
        if self.trainer.out is not None and self.fabric.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder() / "tensorboard"
            wait_for_a_later_name(folder)
            self._log = SummaryWriter(str(folder), purge_step=self._global_step + 1)

    @property
    def _global_step(self) -> int:
        return self.stage * self.steps + self.step

    def _record(self, name: str, value: float) -> None:
        if self._log is not None:
            self._log.add_scalar(name, value, self._global_step)

    def _key(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        config = {k: v for k, v in asdict(self.config).items() if k != "checkpoint_every"}
        return {
            "method": self.result.method,
            "tune": self.result.tune,
            "domains": {domain.name: self.bank.digest(domain) for domain in self.stream},
            "backbone": self.trainer.backbone.identity,
            "config": config | {"prompts": list(self.config.prompts)},
            "options": asdict(self.trainer.options),
        }

    def _save(self) -> None:
        path = self._checkpoint_path()
        if path is None or not self.fabric.is_global_zero:
            return
        state = {
            "key": self._key(),
            "stage": self.stage,
            "step": self.step,
            "strategy": self.strategy.state(),
            "optimizer": self._optimizer_state,
            "result": asdict(self.result),
        }
        save_state(state, path)

    def _restore(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.trainer.backbone.device, weights_only=True)
        except Exception as error:  # a damaged file has errors of every kind
            raise ValueError(
                f"{path}: not a readable checkpoint ({type(error).__name__}). Remove the file to "
                "begin this method anew."
            ) from error
        differs = [k for k, v in self._key().items() if state["key"].get(k) != v]
        if differs:
            raise ValueError(
                f"{path}: a checkpoint of a run with another {', '.join(differs)}. Resume with the "
                "same settings, or take another --out."
            )
        self.stage, self.step = state["stage"], state["step"]
        self.result = Run(**state["result"])
        self.strategy.set_state(state["strategy"])
        self._optimizer_state = state["optimizer"]


def falling(progress: float) -> float:
    """The learning rate's share of its first value: 1 at first, a tenth in the end."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
