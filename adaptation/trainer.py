"""Train a method on a stream: learn the domains in turn and evaluate all of them after each."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

import adaptation.strategies  # noqa: F401  (registers the methods)
from adaptation.checkpoint import load_checkpoint, run_key
from adaptation.evaluation import PROMPTS, narrow_fraction, score
from adaptation.features import FeatureBank
from adaptation.options import DEFAULT_STEPS, TrainConfig
from adaptation.results import MEASURES, RunResult, folder_name
from adaptation.steps import Learner, draw_objects
from adaptation.strategy import STRATEGIES, Step, Strategy, StrategyContext
from adaptation.streams import find_stream
from sam_gym.backbones import load_backbone
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.adapters.tuning import TUNINGS
from sam_gym.data.splits import shared_images
from sam_gym.data.streams import Domain, Stream
from sam_gym.utils.files import make_folder, wait_for_a_later_name, write_json
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.provenance import provenance
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.runs import refuse_finished, remove_files
from sam_gym.utils.training import save_state

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
#: Settings that the feature bank takes.
_BANK_SETTINGS = "augmentations objects_per_image max_images seed memory_gib disk".split()

#: Files that a run writes into its folder; the command line adds heat maps.
_WRITTEN = (
    *("run.json", "adapter.safetensors", "checkpoint.pt", "tensorboard/events.out.tfevents.*"),
    *(f"{evaluation}.png" for evaluation in (*PROMPTS, "class")),
    "epoch_*.safetensors",
)


class Trainer:
    """Trains methods on a stream, on private copies of a backbone.

    Under `torchrun`, each process takes its share of every batch, and gradients are averaged.

    Args:
        config: settings of the training.
        backbone: name, checkpoint, device and dtype of the SAM, as `load_backbone` takes them.
        out: folder for checkpoints, TensorBoard logs and adapters; None: write nothing.
        retention: a domain that is never trained on and evaluated at the end, or None.
        progress: show progress bars.

    Raises:
        ValueError: a setting is impossible.
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        backbone: dict[str, Any] | None = None,
        out: str | Path | None = None,
        retention: Domain | None = None,
        progress: bool = True,
    ) -> None:
        self.config = config or TrainConfig()
        self.config.validate()
        self.backbone = load_backbone(**(backbone or {}))
        self.out = None if out is None else Path(out).expanduser()
        self.retention, self.progress = retention, progress
        device = self.backbone.device
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_divides(self.config.batch_size or world, world)
        self.fabric = import_fabric()(
            accelerator="cpu" if device.type == "cpu" else device.type,
            devices=1 if world == 1 else "auto" if device.type == "cuda" else world,
            strategy="auto" if world == 1 else "ddp_find_unused_parameters_true",
            precision=self.config.precision,
        )
        self.fabric.launch()
        self._bank: FeatureBank | None = None

    def bank(self, stream: Stream) -> FeatureBank:
        """The bank of a stream. It is kept until another stream is asked for."""
        if self._bank is None or self._bank.stream != stream:
            settings = {name: getattr(self.config, name) for name in _BANK_SETTINGS}
            self._bank = FeatureBank(self.backbone, stream, **settings)
        return self._bank

    def fit(
        self,
        stream: str | Stream | gym.Env[Any, Any],
        strategy: str = "naive",
        tune: str | None = None,
        *,
        method_options: Any = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> RunResult:
        """Learn the domains of a stream one after the other, and evaluate all of them after each.

        Args:
            stream: the domains; or an environment, its id, or the name of a stream.
            strategy: name of the method; "ewc+er" combines methods.
            tune: tune target, a key of `TUNINGS`; None: the method's default.
            method_options: an instance of the method's `Options`; None: its defaults.
            resume: continue from the checkpoint in `out`, if there is one.
            overwrite: replace the run in `out`, if there is one.

        Raises:
            ValueError: a name is unknown, the checkpoint belongs to another run, or a run is to be
                both continued and replaced.
            FileExistsError: `out` holds such a run, and it is neither continued nor replaced.
            TypeError: the options are those of another method.
        """
        if resume and overwrite:
            raise ValueError("resume continues a run, overwrite replaces it: pass one of them.")
        stream = find_stream(stream)
        method = STRATEGIES.get(strategy)
        tune = method.default_tune if tune is None else tune
        check_tune(strategy, tune)
        context = StrategyContext(self.bank(stream), tune, method_options, self.config.seed)
        return _Fit(self, method(context)).run(resume, overwrite)


def import_fabric() -> type[Fabric]:
    """Import Fabric without the environment variable that it sets for the whole process.

    With PYTORCH_NVML_BASED_CUDA_CHECK, every step of Adam searches for the NVML library on machines
    without an NVIDIA driver, which takes up to milliseconds.
    """
    before = os.environ.get(_NVML_CHECK)
    from lightning_fabric import Fabric

    if before is None:
        os.environ.pop(_NVML_CHECK, None)
    return Fabric


def check_divides(batch_size: int, world: int) -> None:
    """Raise `ValueError` unless a batch divides among processes."""
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} does not divide among {world} processes.")


def check_tune(strategy: str, tune: str) -> None:
    """Raise `ValueError` unless a method supports a tune target."""
    method = STRATEGIES.get(strategy)
    if tune not in method.tunes:
        if tune in (*TUNINGS.names(), "prompts", "head"):
            raise ValueError(
                f"Method {strategy!r} does not go with tune={tune!r}: it tunes "
                f"{', '.join(method.tunes)}."
            )
        raise unknown_name("tune target", tune, method.tunes)


class _Fit:
    """One method on one stream."""

    def __init__(self, trainer: Trainer, strategy: Strategy) -> None:
        self.trainer, self.fabric, self.strategy = trainer, trainer.fabric, strategy
        self.bank = strategy.context.bank
        self.stream = self.bank.stream
        split = trainer.config.split or self.stream.held_out_split
        own = trainer.config
        steps = own.steps or (None if strategy.epochs else DEFAULT_STEPS)
        batch_size = own.batch_size or strategy.default_batch_size
        check_divides(batch_size, self.fabric.world_size)
        self.batch_size: int = batch_size
        self.config = replace(own, split=split, steps=steps, batch_size=batch_size)
        self.evaluations = strategy.evaluations or own.prompts
        self.split: str = split
        self.result = RunResult(
            strategy.name,
            strategy.context.tune,
            self.stream.names,
            seed=self.config.seed,
            split=split,
            method_options=asdict(strategy.options),
        )
        retention = trainer.retention
        if retention is not None and strategy.evaluations is not None:
            raise ValueError(
                f"Method {strategy.name!r} has no retention set: leave --retention (retention=) "
                "out."
            )
        for domain in self.stream:
            if retention is None:
                break
            if shared := shared_images(domain.split("train"), retention.split(split)):
                raise ValueError(
                    f"{shared} images of the retention set are training images of {domain.name!r}. "
                    "Pass another retention set (--retention)."
                )
        #: Finished stages, and steps of the current one.
        self.stage = self.step = 0
        self._optimizer_state: Any = None
        self._log: Any = None

    @property
    def stages(self) -> int:
        return 1 if self.strategy.joint or not self.strategy.learns else len(self.stream)

    @functools.cached_property
    def stage_steps(self) -> list[int]:
        """Steps of each stage."""
        strategy, steps = self.strategy, self.config.steps
        if not strategy.learns:
            return [0] * self.stages
        if steps is None:
            return [strategy.epochs * self._epoch_steps(stage) for stage in range(self.stages)]
        return [steps * (len(self.stream) if strategy.joint else 1)] * self.stages

    @property
    def steps(self) -> int:
        """Steps of the current stage."""
        return self.stage_steps[self.stage]

    def _epoch_steps(self, stage: int) -> int:
        return self.strategy.epoch_steps(stage, self.batch_size)

    @property
    def learning_rate(self) -> float:
        own = self.config.learning_rate
        return self.strategy.learning_rate if own is None else own

    def run(self, resume: bool, overwrite: bool) -> RunResult:
        path = self._checkpoint
        if path is not None:
            if not resume:
                self._start_over(path, overwrite)
            make_folder(path.parent)
            if resume and path.is_file():
                self._restore(path)
        self._open_log()
        self._evaluate_zero_shot()
        with self._progress() as advance:
            advance(self._global_step)
            while self.stage < self.stages:
                self._learn(advance)
                self._evaluate()
                self.stage, self.step, self._optimizer_state = self.stage + 1, 0, None
                self._save()
        self._finish()
        return self.result

    @contextmanager
    def _progress(self) -> Iterator[Callable[[int], None]]:
        """Show a progress bar over all steps; yields a function that advances it."""
        shown = self.trainer.progress and self.fabric.is_global_zero
        with ProgressBar(disable=not shown, transient=True) as progress:
            task = progress.add_task(self.result.method, total=sum(self.stage_steps))

            def advance(count: int) -> None:
                domain = self.stream.names[min(self.stage, len(self.stream) - 1)]
                text = f"{self.result.method}, {'all' if self.strategy.joint else domain}"
                progress.update(task, advance=count, description=text)

            yield advance

    # Learning ----------------------------------------------------------------------------------

    def _learn(self, advance: Callable[[int], None]) -> None:
        """Learn the domains of a stage, or the rest of them after a resume."""
        strategy = self.strategy
        if not strategy.learns:
            return
        if self.step == 0:
            strategy.before_task(self.stage)
            if facts := strategy.facts():
                self.result.facts[self.stream.names[self.stage]] = facts
            self.result.trainable = sum(w.numel() for w in strategy.trained().values())
        # Compute missing features here, outside of the timed part.
        for domain in self._domains():
            strategy.encode(domain)
        learner = Learner(strategy)
        optimizer = strategy.make_optimizer(list(strategy.trained().values()), self.learning_rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        wrapped, optimizer = self.fabric.setup(learner, optimizer)
        while self.step < self.steps:
            started = time.perf_counter()
            loss, iou = self._step(wrapped, optimizer, rates)
            self.result.seconds += time.perf_counter() - started
            self.step += 1
            advance(1)
            self._record("train/loss", loss)
            self._record("train/iou", iou)
            epoch = strategy.epochs > 0 and self.step % self._epoch_steps(self.stage) == 0
            if epoch:
                self._save_epoch()
            if (epoch or self.step % self.config.checkpoint_every == 0) and self.step < self.steps:
                self._optimizer_state = optimizer.state_dict()
                self._save()
        started = time.perf_counter()
        strategy.after_task(self.stage)
        self.result.seconds += time.perf_counter() - started

    def _domains(self) -> list[Domain]:
        """The domains of this stage."""
        return list(self.stream) if self.strategy.joint else [self.stream[self.stage]]

    def _step(self, learner: Any, optimizer: Any, rates: list[float]) -> tuple[float, float]:
        """Take an optimizer step. The batch depends on seed, stage and step only."""
        config, strategy, fabric = self.config, self.strategy, self.fabric
        places = (self.stage, self.step, self.batch_size, fabric.global_rank, fabric.world_size)
        step = Step(config.seed, *places)
        batch = strategy.draw(step)
        if batch is None:
            batch = draw_objects(strategy, step, config.objects_per_augmentation)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * falling(self.step / self.steps)
        loss, overlap = learner(lambda: batch)
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
        strategy.after_backward(self.step)
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

    # Evaluation --------------------------------------------------------------------------------

    def _evaluate_zero_shot(self) -> None:
        if not self.result.zero_shot and self.strategy.evaluations is None:
            pretrained = self.trainer.backbone.pretrained
            for prompt in self.config.prompts:
                self.result.zero_shot[prompt], _ = self._scores(pretrained, prompt)
            for domain in self.stream:
                objects = self.bank.held_out(domain, self.split)
                self.result.narrow[domain.name] = round(narrow_fraction(objects), 4)

    def _scores(self, model: Model, prompt: str) -> tuple[dict[str, list[float]], list[float]]:
        """Scores on every domain, in %, and fractions of correctly routed images."""
        row: dict[str, list[float]] = {measure: [] for measure in MEASURES}
        routed = []
        for domain in self.stream:
            scores = self.strategy.score(model, domain, prompt, self.split)
            for measure in MEASURES:
                row[measure].append(100 * float(getattr(scores, measure).mean()))
            if scores.routed is not None:
                routed.append(scores.routed)
        return row, routed

    def _evaluate(self) -> None:
        """Evaluate all domains after a stage."""
        result, model = self.result, self.strategy.model()
        for prompt in self.evaluations:
            row, routed = self._scores(model, prompt)
            for measure in MEASURES:
                rows = result.scores.setdefault(prompt, {}).setdefault(measure, [])
                rows.append(row[measure])
            result.routed = float(np.mean(routed)) if routed else None
            for name, value in zip(self.stream.names, row["iou"], strict=True):
                self._record(f"{self.split}/{prompt}/{name}", value)
        if self.stage == self.stages - 1 and self.trainer.retention is not None:
            for prompt in self.config.prompts:
                domain = self.trainer.retention
                scores = score(model, self.bank, domain, prompt, self.split)
                result.retention[prompt] = 100 * float(scores.iou.mean())

    # Files -------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path | None:
        out, result = self.trainer.out, self.result
        return None if out is None else out / folder_name(result.method, result.tune, result.seed)

    @property
    def _checkpoint(self) -> Path | None:
        return None if self._folder is None else self._folder / "checkpoint.pt"

    def _start_over(self, checkpoint: Path, overwrite: bool) -> None:
        """Remove the run in the folder, or refuse to; then all processes go on."""
        folder = checkpoint.parent
        if not overwrite:
            refuse_finished(folder, "run.json")
            if checkpoint.is_file():
                raise FileExistsError(
                    f"{folder} holds an unfinished run. Pass --resume (resume=True) to continue "
                    "it, --overwrite (overwrite=True) to start over, or another --out (out=)."
                )
        self.fabric.barrier()
        if self.fabric.is_global_zero:
            remove_files(folder, _WRITTEN)
        self.fabric.barrier()

    def _finish(self) -> None:
        learned = len(self.stream) if self.strategy.learns else 1
        self.result.kept_bytes = self.strategy.kept_bytes() / learned
        if self._log is not None:
            self._log.close()
        if self._folder is not None and self.fabric.is_global_zero:
            if self.strategy.learns:
                self.strategy.adapter().save(self._folder / "adapter.safetensors")
            about = provenance(self.config, self.trainer.backbone)
            write_json(self._folder / "run.json", asdict(self.result) | about)

    def _open_log(self) -> None:
        if self._folder is not None and self.fabric.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder / "tensorboard"
            wait_for_a_later_name(folder)
            self._log = SummaryWriter(str(folder), purge_step=self._global_step + 1)

    @property
    def _global_step(self) -> int:
        return sum(self.stage_steps[: self.stage]) + self.step

    def _record(self, name: str, value: float) -> None:
        if self._log is not None:
            self._log.add_scalar(name, value, self._global_step)

    def _save_epoch(self) -> None:
        """Write the adapter of an epoch."""
        if self._folder is not None and self.fabric.is_global_zero:
            number = self.stage * self.strategy.epochs + self.step // self._epoch_steps(self.stage)
            self.strategy.adapter().save(self._folder / f"epoch_{number}.safetensors")

    def _save(self) -> None:
        path = self._checkpoint
        if path is not None and self.fabric.is_global_zero:
            state = {
                "key": run_key(self.strategy, self.config),
                "stage": self.stage,
                "step": self.step,
                "strategy": self.strategy.state(),
                "optimizer": self._optimizer_state,
                "result": asdict(self.result),
            }
            save_state(state, path)

    def _restore(self, path: Path) -> None:
        key = run_key(self.strategy, self.config)
        state = load_checkpoint(path, key, self.strategy, self.trainer.backbone.device)
        self.stage, self.step = state["stage"], state["step"]
        self.result = RunResult(**state["result"])
        self.strategy.set_state(state["strategy"])
        self._optimizer_state = state["optimizer"]


def falling(progress: float) -> float:
    """Factor of the initial learning rate, along a cosine: 1 at the start, 0.1 at the end."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
