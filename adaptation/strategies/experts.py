"""Methods that train an expert for each domain, and a router that picks one by the image."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptation.strategy import Strategy, StrategyContext
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.adapters.routers import RoutedModel, Router
from sam_gym.backbones.adapters.tuning import bytes_of, tuned_weights
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Natural


@documented
@dataclass(frozen=True)
class RouterOptions:
    """Options of methods that train a router."""

    selector_steps: Natural = 150
    """Optimizer steps of the router (selector) after each domain."""


class Experts(Strategy):
    """Base class: every expert starts from the pretrained SAM and learns one domain."""

    #: Key of `ADAPTER_MODULES`.
    _router_name: ClassVar[str]
    #: Precision in which experts are stored.
    _kept_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        self._experts: list[dict[str, Tensor]] = []
        self._router: Router | None = None

    @abstractmethod
    def _new_router(self, num_domains: int) -> Router:
        """Make an untrained router."""

    @abstractmethod
    def _train_router(self, router: Any, num_domains: int) -> None:
        """Train the router to classify the first `num_domains` domains."""

    @abstractmethod
    def _buffer_bytes(self) -> int:
        """Bytes kept of all domains so far to train the router."""

    def before_task(self, task: int) -> None:
        super().before_task(task)
        self.sam = self._pretrained()

    def after_task(self, task: int) -> None:
        own = tuned_weights(self.sam)
        self._experts.append({name: w.to(self._kept_dtype) for name, w in own.items()})
        self._router = self._new_router(task + 1).to(self.context.bank.backbone.device)
        self._train_router(self._router, task + 1)
        self._router.requires_grad_(False)

    def model(self) -> Model:
        assert self._router is not None
        backbone, tune = self.context.bank.backbone, self.context.tune
        sams = [backbone.apply_tuned(tune, weights) for weights in self._experts]
        return RoutedModel(self.context.sam, sams, self._router, self.raw).eval()

    def adapter(self) -> Adapter:
        assert self._router is not None
        weights = {name: w.detach().cpu() for name, w in self._router.state_dict().items()}
        return self._adapter(experts=self._experts, router=self._router_name, weights=weights)

    def state(self) -> dict[str, Any]:
        router = None if self._router is None else self._router.state_dict()
        return super().state() | {"experts": self._experts, "selector": router}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._experts = state["experts"]
        if state["selector"] is not None:
            router = self._new_router(len(self._experts))
            router.load_state_dict(state["selector"])
            self._router = router.to(self.context.bank.backbone.device).requires_grad_(False)

    def kept_bytes(self) -> int:
        assert self._router is not None
        weights = [w for expert in self._experts for w in expert.values()]
        return bytes_of([*weights, *self._router.state_dict().values()]) + self._buffer_bytes()
