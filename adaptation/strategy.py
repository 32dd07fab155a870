"""The interface of continual-learning methods: hooks around one training loop."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from adaptation.evaluation import Scores, score
from adaptation.features import FeatureBank, Pool
from adaptation.losses import MaskLoss, mask_loss
from adaptation.objects import BatchTargets
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import Model, embed
from sam_gym.backbones.adapters.tuning import TUNINGS, bytes_of, trainable, tuned_weights
from sam_gym.backbones.decode import MaskTokens, decode_tokens
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.prompts import Prompts
from sam_gym.data.streams import Domain
from sam_gym.utils.registry import Registry, unknown_name
from sam_gym.utils.settings import check_settings


class StrategyRegistry(Registry[type["Strategy"]]):
    """Method name -> strategy class. `get("ewc+er")` combines methods, see `Combined`."""

    #: Makes the class of "METHOD+METHOD"; set by `adaptation.combined`.
    combine: Callable[[str], type[Strategy]]

    def add(self, name: str, item: type[Strategy]) -> type[Strategy]:
        """Register a strategy.

        Raises:
            TypeError: the class defines a public name that is no hook, for example a misspelt one.
            ValueError: the name is taken or contains a "+".
        """
        if "+" in name:
            raise ValueError(f"Method {name!r}: '+' combines methods, so no name may contain it.")
        check_hooks(item)
        super().add(name, item)
        item.name = name
        return item

    def get(self, name: str) -> type[Strategy]:
        return self.combine(name) if "+" in name else super().get(name)


STRATEGIES = StrategyRegistry("method")


@dataclass(frozen=True)
class Batch:
    """P objects with their prompts.

    Attributes:
        raw: `raw_features` of the B images that occur.
        prompts: P prompt sets, with rows.
        ambiguous: bool (P,), prompts with several valid masks.
        targets: float32 (P, hm, wm), in [0, 1].
        valid: float32 (P, hm, wm), 1 where a pixel counts.
        categories: int64 (P,), the category of each object.
    """

    raw: ImageFeatures
    prompts: Prompts
    ambiguous: Tensor
    targets: Tensor
    valid: Tensor
    categories: Tensor


@dataclass(frozen=True)
class Step:
    """A training step, whose batch depends on these numbers only.

    Attributes:
        seed: of the run.
        stage: number of the stage.
        number: of the step in the stage, from 0.
        batch_size: objects or images over all processes.
        rank, world: number of this process, and of processes, among which a batch is divided.
    """

    seed: int
    stage: int
    number: int
    batch_size: int
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class NoOptions:
    """Options of a method without any."""


@dataclass(frozen=True)
class StrategyContext:
    """The inputs of a strategy.

    Attributes:
        bank: augmented images and features of the stream.
        tune: key of `TUNINGS`, "prompts" or "head".
        options: an instance of the strategy's `Options`; None: its defaults.
        seed: seed of all random choices.
    """

    bank: FeatureBank
    tune: str
    options: Any = None
    seed: int = 0

    @property
    def sam(self) -> Sam:
        """The frozen SAM."""
        return self.bank.backbone.pretrained.sam

    @property
    def num_tasks(self) -> int:
        """Number of domains in the stream."""
        return len(self.bank.stream)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block and restore it afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Strategy:
    """A continual-learning method.

    A subclass overrides the hooks and class attributes below. Other names that it defines start
    with an underscore: `STRATEGIES.register` refuses a public name that is no hook.

    Args:
        context: bank, tune target, options and seed.

    Raises:
        ValueError: the method does not support the tune target.
        TypeError: the options are those of another method.
    """

    #: The method's options: a frozen dataclass with a docstring below each field.
    Options: ClassVar[type[Any]] = NoOptions
    #: Tune targets that the method supports; "prompts" and "head" stand for no part of the SAM.
    tunes: ClassVar[tuple[str, ...]] = TUNINGS.names()
    #: Default tune target.
    default_tune: ClassVar[str] = "decoder"
    #: Whether the method trains on all domains at once.
    joint: ClassVar[bool] = False
    #: Whether the method trains.
    learns: ClassVar[bool] = True
    #: Names of its evaluations; None: the prompts of `TrainConfig`.
    evaluations: ClassVar[tuple[str, ...] | None] = None
    #: Objects or images per step, unless `TrainConfig.batch_size` is given.
    default_batch_size: ClassVar[int] = 16
    #: Name in `STRATEGIES`, set by the registration.
    name: ClassVar[str] = ""

    def __init__(self, context: StrategyContext) -> None:
        if context.tune not in self.tunes:
            raise unknown_name(f"tune target of {type(self).__name__}", context.tune, self.tunes)
        options = self.Options() if context.options is None else context.options
        if not isinstance(options, self.Options):
            raise TypeError(
                f"{type(self).__name__} takes {self.Options.__qualname__} as method_options, "
                f"got {type(options).__qualname__}."
            )
        check_settings(options)
        self.context, self.options = context, options
        #: Index of the current domain; -1 before the first.
        self.task = -1
        #: The SAM that is trained; it shares its frozen parts with `context.sam`.
        self.sam = self._pretrained()

    def _pretrained(self) -> Sam:
        """A SAM with pretrained weights whose tuned part requires gradients."""
        with seeded(self.context.seed):
            return self.context.bank.backbone.tuned_copy(self.context.tune)

    # Hooks -------------------------------------------------------------------------------------

    @property
    def raw(self) -> str:
        """Kind of the input features of training (see `Tuning.raw`)."""
        return TUNINGS.get(self.context.tune).raw

    @property
    def learning_rate(self) -> float:
        """Initial learning rate, unless `TrainConfig.learning_rate` is given."""
        return TUNINGS.get(self.context.tune).learning_rate

    @property
    def module(self) -> nn.Module:
        """The module that is trained in the current domain."""
        return self.sam

    @property
    def epochs(self) -> int:
        """Number of epochs of a domain; 0: the training is counted in steps."""
        return 0

    def epoch_steps(self, task: int, batch_size: int) -> int:
        """Return the number of steps of an epoch of a domain, if there are epochs."""
        raise NotImplementedError

    def digest(self, domain: Domain) -> str:
        """Return the digest of a domain's training data."""
        return self.context.bank.train(domain).digest

    def encode(self, domain: Domain) -> None:
        """Compute features of a domain's training data that are missing."""
        self.context.bank.encode(domain, "train", self.raw)

    def before_task(self, task: int) -> None:
        """Prepare to train on a domain. Call `super().before_task(task)`."""
        self.task = task

    def make_optimizer(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Make the optimizer of a domain. The trainer scales the lr of each group over time."""
        return torch.optim.Adam(parameters, lr)

    def replayed(self) -> list[Pool]:
        """Images of past domains; each step draws as many objects from them as from the domain."""
        return []

    def draw(self, step: Step) -> Any:
        """Draw the batch of a step, for `forward`.

        None: objects with their prompts, a `Batch`, see `adaptation.steps.draw_objects`.
        """
        return None

    def batch(self, objects: BatchTargets, seeds: np.ndarray) -> Batch | None:
        """Choose the prompts of P objects, each by its own seed, int64 (P,).

        None: box, points or noisy mask, see `adaptation.prompting.training_prompts`.
        """
        return None

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the loss of a batch, and the mean IoU of what is predicted."""
        masks = self.masks(batch, self.decode(batch))
        return masks.total + self.loss(batch, masks), masks.ious.mean()

    def decode(self, batch: Batch) -> MaskTokens:
        """Decode the prompts of a batch with the module that is trained."""
        return decode_tokens(self.sam, embed(self.sam, batch.raw), batch.prompts)

    def masks(self, batch: Batch, tokens: MaskTokens) -> MaskLoss:
        """Compute the loss of the decoded masks."""
        return mask_loss(tokens, batch.targets, batch.valid, batch.ambiguous)

    def loss(self, batch: Batch, masks: MaskLoss) -> Tensor | float:
        """Compute an additional loss, which is added to the mask loss."""
        return 0.0

    def after_backward(self, step: int) -> None:
        """Inspect or change the gradients of `trained()` before the optimizer step.

        Gradients are unscaled (mixed precision) and averaged over all processes (torchrun).
        """

    def after_step(self, step: int) -> None:
        """Run after each optimizer step."""

    def after_task(self, task: int) -> None:
        """Finish a domain. Later, its training data is available through `replayed` only."""

    def model(self) -> Model:
        """Build the model for inference."""
        return Model(self.sam, self.raw)

    def score(self, model: Model, domain: Domain, evaluation: str, split: str) -> Scores:
        """Evaluate a model on a held-out split of a domain, by one of the evaluations."""
        return score(model, self.context.bank, domain, evaluation, split)

    def adapter(self) -> Adapter:
        """Build the content of the adapter file."""
        return self._adapter(experts=[tuned_weights(self.sam)])

    def facts(self) -> dict[str, Any]:
        """Return what the training of the current domain depends on and no option tells, as JSON.

        It is saved in run.json.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Return the checkpoint state: tensors and plain values. Extend `super().state()`."""
        own = {name: weight.detach().clone() for name, weight in self.trained().items()}
        return {"task": self.task, "weights": own}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned. Call `super().set_state(state)`."""
        self.task = state["task"]
        with torch.no_grad():
            for name, weight in self.trained().items():
                weight.copy_(state["weights"][name])

    def kept_bytes(self) -> int:
        """Return the number of bytes kept for past domains: weights and replay buffers."""
        return bytes_of(tuned_weights(self.sam).values())

    # For hooks to call -------------------------------------------------------------------------

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are being trained, by name."""
        return trainable(self.module)

    def _adapter(self, **parts: Any) -> Adapter:
        bank = self.context.bank
        learned = bank.stream.names if self.joint else bank.stream.names[: self.task + 1]
        return Adapter(
            backbone=bank.backbone.name,
            identity=bank.backbone.weights_digest,
            method=self.name,
            tune=self.context.tune,
            domains=list(learned),
            **parts,
        )


#: Hooks of a strategy, in the order of `Strategy`.
HOOKS = tuple(
    name
    for name, value in vars(Strategy).items()
    if not name.startswith("_") and (callable(value) or isinstance(value, property))
    if name not in ("Options", "trained")
)
_ATTRIBUTES = (
    *("Options", "tunes", "default_tune", "joint", "learns", "name"),
    *("evaluations", "default_batch_size"),
)


def check_hooks(cls: type[Strategy]) -> None:
    """Raise `TypeError` for a public name of a strategy that is no hook."""
    for base in cls.__mro__[: cls.__mro__.index(Strategy)]:
        for name in vars(base):
            if not name.startswith("_") and name not in (*HOOKS, *_ATTRIBUTES):
                near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.4)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"{base.__name__}.{name} is no hook of a strategy.{hint} "
                    f"Hooks: {', '.join(HOOKS)}. Start other names with an underscore."
                )
