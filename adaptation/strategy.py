"""What a continual-learning method is: a few hooks around one training loop."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from adaptation.features import BatchTargets, FeatureBank, Views
from adaptation.losses import MaskLoss, mask_loss
from sam_gym.backbones.adapters.adapter import Adapter, Model, embed
from sam_gym.backbones.adapters.tuning import TUNINGS, bytes_of, trainable, tuned_weights
from sam_gym.backbones.decode import MaskTokens, Prompts, decode_tokens
from sam_gym.utils.registry import Registry, unknown_name

#: Method name -> class.
STRATEGIES: Registry[type[Strategy]] = Registry("method")


@dataclass(frozen=True)
class Batch:
    """P objects of a step, with their prompts.

    Attributes:
        raw: what the tuned part starts from, (B, ...), of the views that occur.
        prompts: P prompt sets, with rows.
        ambiguous: bool (P,), prompts that allow several answers.
        targets: float32 (P, hm, wm), in [0, 1].
        valid: float32 (P, hm, wm), 1 where a pixel counts.
        categories: int64 (P,).
    """

    raw: Tensor
    prompts: Prompts
    ambiguous: Tensor
    targets: Tensor
    valid: Tensor
    categories: Tensor


@dataclass(frozen=True)
class Options:
    """Weights and sizes of the methods; defaults are those of CoSAM's release where it has one."""

    lwf_weight: float = 3.0
    """Weight of the distillation loss (lwf)."""
    ewc_weight: float = 1000.0
    """Weight of the penalty (ewc), chosen on val; the release's 10 holds nothing with a Fisher
    information of single objects."""
    fisher_samples: int = 64
    """Objects of a domain whose squared gradients make its Fisher information (ewc)."""
    buffer_images: int = 10
    """Images of each past domain that are kept (er, moda)."""
    key_weight: float = 1.0
    """Weight of the loss of a prompt pool (l2p, dualprompt, coda)."""
    selector_steps: int = 150
    """Optimizer steps of a selector after each domain (moda, samcl)."""
    buffer_embeddings: int = 32
    """Pooled embeddings of each domain that are kept (samcl)."""
    class_weight: float = 0.5
    """Weight of the class loss (saom_v1, saom_v2, panosam)."""
    inside: float = 1.0
    """Share of the prompts that are any point of the grid inside their object; 0: all by nearest
    neighbour, as in the paper (saom_v1, saom_v2, panosam)."""
    background: float = 0.4
    """Share of the prompts that lie on no object, where no mask is to be trusted; 0 if images have
    objects that are not annotated (saom_v1, saom_v2, panosam)."""


@dataclass(frozen=True)
class StrategyContext:
    """What a strategy works with.

    Attributes:
        bank: views and features of the stream.
        tune: key of `TUNINGS`.
        options: weights and sizes.
        seed: of everything that is drawn.
    """

    bank: FeatureBank
    tune: str
    options: Options = field(default_factory=Options)
    seed: int = 0

    @property
    def sam(self) -> Sam:
        """The frozen SAM."""
        return self.bank.backbone.sam

    @property
    def num_tasks(self) -> int:
        return len(self.bank.stream)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights from a seed; torch's generator is then where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Strategy:
    """A continual-learning method over one trainer.

    A subclass overrides hooks and nothing else that is public; any other public method or
    attribute that it defines is an error when the class is made, so a misspelt hook is never
    skipped in silence.

    Args:
        setting: what it works with.

    Raises:
        ValueError: the method does not go with the tune target.
    """

    #: What the method may tune; "prompts" stands for no part of the SAM.
    tunes: ClassVar[tuple[str, ...]] = TUNINGS.names()
    #: What it tunes unless told otherwise.
    default_tune: ClassVar[str] = "decoder"
    #: Whether it learns all domains at once.
    joint: ClassVar[bool] = False
    #: Whether it learns at all.
    learns: ClassVar[bool] = True

    hooks: ClassVar[tuple[str, ...]] = (
        "raw",
        "learning_rate",
        "module",
        "before_task",
        "replayed",
        "batch",
        "decode",
        "masks",
        "loss",
        "after_step",
        "after_task",
        "model",
        "adapter",
        "state",
        "set_state",
        "kept_bytes",
    )

    def __init__(self, setting: StrategyContext) -> None:
        if setting.tune not in self.tunes:
            raise unknown_name(f"tune target of {type(self).__name__}", setting.tune, self.tunes)
        self.setting = setting
        self.task = -1
        #: What is being trained.
        self.sam = self._fresh()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        known = {*Strategy.hooks, "tunes", "default_tune", "joint", "learns", "hooks"}
        for name in vars(cls):
            if not name.startswith("_") and name not in known:
                near = difflib.get_close_matches(name, Strategy.hooks, n=1, cutoff=0.4)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"{cls.__name__}.{name} is no hook of a strategy.{hint} "
                    f"Hooks: {', '.join(Strategy.hooks)}. Begin other names with an underscore."
                )

    def _fresh(self) -> Sam:
        """The SAM as it was, with what is tuned ready to be trained."""
        with seeded(self.setting.seed):
            return TUNINGS.get(self.setting.tune).prepare(self.setting.sam)

    @property
    def raw(self) -> str:
        """What of an image training starts from (see `Tuning.raw`)."""
        return TUNINGS.get(self.setting.tune).raw

    @property
    def learning_rate(self) -> float:
        """What Adam begins with unless told otherwise."""
        return TUNINGS.get(self.setting.tune).learning_rate

    @property
    def module(self) -> nn.Module:
        """What is trained now."""
        return self.sam

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained now, by name."""
        return trainable(self.module)

    # Hooks -------------------------------------------------------------------------------------

    def before_task(self, task: int) -> None:
        """A domain begins. Call the parent's."""
        self.task = task

    def replayed(self) -> list[tuple[int, Views, np.ndarray]]:
        """Views of which a step takes as many objects again as of the domain (replay).

        Number and views of each past domain, and the views that may be drawn (`ObjectIndices`).
        """
        return []

    def batch(self, objects: BatchTargets, seeds: np.ndarray) -> Batch | None:
        """P objects with prompts, each drawn with a seed of its own, int64 (P,).

        None: box, points or noisy mask, as `adaptation.prompting.training_prompts` draws them.
        """
        return None

    def decode(self, batch: Batch) -> MaskTokens:
        """The tokens of a batch, by what is trained."""
        return decode_tokens(self.sam, embed(self.sam, batch.raw, self.raw), batch.prompts)

    def masks(self, batch: Batch, tokens: MaskTokens) -> MaskLoss:
        """What the decoded masks cost."""
        return mask_loss(tokens, batch.targets, batch.valid, batch.ambiguous)

    def loss(self, batch: Batch, masks: MaskLoss) -> Tensor | float:
        """What is added to the loss of the masks."""
        return 0.0

    def after_step(self, step: int) -> None:
        """A step was taken."""

    def after_task(self, task: int) -> None:
        """A domain was learned; its training data may be used for the last time."""

    def model(self) -> Model:
        """What was learned so far, ready to be used."""
        return Model(self.sam, self.raw)

    def adapter(self) -> Adapter:
        """What was learned so far, as a file holds it."""
        return self._adapter(experts=[tuned_weights(self.sam)])

    def _adapter(self, **parts: Any) -> Adapter:
        bank = self.setting.bank
        names = [name for name, cls in STRATEGIES.items() if cls is type(self)]
        learned = bank.stream.names if self.joint else bank.stream.names[: self.task + 1]
        return Adapter(
            backbone=bank.backbone.name,
            identity=bank.backbone.weights_digest,
            method=names[0],
            tune=self.setting.tune,
            domains=list(learned),
            **parts,
        )

    def state(self) -> dict[str, Any]:
        """What to go on from, in tensors and plain values; call the parent's."""
        own = {name: weight.detach().clone() for name, weight in self.trained().items()}
        return {"task": self.task, "weights": own}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`; call the parent's."""
        self.task = state["task"]
        with torch.no_grad():
            for name, weight in self.trained().items():
                weight.copy_(state["weights"][name])

    def kept_bytes(self) -> int:
        """Bytes that are kept for all domains so far: weights, and whatever is replayed."""
        return bytes_of(tuned_weights(self.sam).values())


def images_kept(setting: StrategyContext, tasks: Sequence[int]) -> list[np.ndarray]:
    """Which views of each domain show the images that a buffer keeps: int64 each.

    The buffer of a domain is `buffer_images` of its training images, drawn with the seed.
    """
    kept = []
    for task in tasks:
        views = setting.bank.train(setting.bank.stream[task])
        images = np.unique(views.image)
        rng = np.random.default_rng([setting.seed, 11, task])
        chosen = rng.permutation(images)[: setting.options.buffer_images]
        kept.append(np.flatnonzero(np.isin(views.image, chosen)))
    return kept


def image_bytes(setting: StrategyContext, tasks: Sequence[int]) -> int:
    """Bytes of a buffer's images, as frames of the model."""
    size = setting.bank.backbone.image_size
    count = 0
    for task in tasks:
        views = setting.bank.train(setting.bank.stream[task])
        count += min(setting.options.buffer_images, len(np.unique(views.image)))
    return count * 3 * size * size
