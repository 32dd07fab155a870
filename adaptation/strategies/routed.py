"""Methods that keep an expert for each domain, and learn to tell domains apart."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptation.strategy import Strategy
from sam_gym.backbones.adapters.adapter import Adapter, Model, RoutedModel
from sam_gym.backbones.adapters.selectors import EmbeddingSelector, TokenSelector
from sam_gym.backbones.adapters.tuning import apply_tuned, bytes_of, tuned_weights


class Routed(Strategy):
    """A method whose experts are trained each on its own domain, from the SAM as it was."""

    #: How adapter files name the selector.
    _chooser: ClassVar[str]
    #: Precision of the experts that are kept.
    _kept_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, setting: Any) -> None:
        super().__init__(setting)
        self._experts: list[dict[str, Tensor]] = []
        self._selector: TokenSelector | EmbeddingSelector | None = None

    @abstractmethod
    def _new_selector(self, num_domains: int) -> TokenSelector | EmbeddingSelector:
        """An untrained selector."""

    @abstractmethod
    def _train_selector(self, selector: Any, num_domains: int) -> None:
        """Train it to tell the first domains apart by what is kept of each."""

    @abstractmethod
    def _buffer_bytes(self) -> int:
        """Bytes of what is kept of all domains so far to train the selector."""

    def before_task(self, task: int) -> None:
        super().before_task(task)
        self.sam = self._fresh()

    def after_task(self, task: int) -> None:
        own = tuned_weights(self.sam)
        self._experts.append({name: w.to(self._kept_dtype) for name, w in own.items()})
        self._selector = self._new_selector(task + 1).to(self.setting.bank.backbone.device)
        self._train_selector(self._selector, task + 1)
        self._selector.requires_grad_(False)

    def model(self) -> Model:
        assert self._selector is not None
        sams = [apply_tuned(self.setting.sam, self.setting.tune, w) for w in self._experts]
        return RoutedModel(self.setting.sam, sams, self._selector, self.raw).eval()

    def adapter(self) -> Adapter:
        assert self._selector is not None
        weights = {name: w.detach().cpu() for name, w in self._selector.state_dict().items()}
        return self._adapter(experts=self._experts, chooser=self._chooser, weights=weights)

    def state(self) -> dict[str, Any]:
        selector = None if self._selector is None else self._selector.state_dict()
        return super().state() | {"experts": self._experts, "selector": selector}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._experts = state["experts"]
        if state["selector"] is not None:
            selector = self._new_selector(len(self._experts))
            selector.load_state_dict(state["selector"])
            self._selector = selector.to(self.setting.bank.backbone.device).requires_grad_(False)

    def kept_bytes(self) -> int:
        assert self._selector is not None
        weights = [w for expert in self._experts for w in expert.values()]
        return bytes_of([*weights, *self._selector.state_dict().values()]) + self._buffer_bytes()
