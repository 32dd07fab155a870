"""Methods that train prompts of the decoder and leave the SAM alone."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from segment_anything.modeling import Sam
from torch import Tensor, nn

from adaptation.losses import MaskLoss
from adaptation.strategy import Batch, Strategy, seeded
from sam_gym.backbones.adapters.adapter import Adapter, Model, PromptedModel
from sam_gym.backbones.adapters.prompt_pools import PROMPT_POOLS
from sam_gym.backbones.adapters.tuning import bytes_of
from sam_gym.backbones.decode import MaskTokens


class Prompted(Strategy):
    """A method with a pool of prompts, which enter as tokens of the decoder."""

    tunes: ClassVar[tuple[str, ...]] = ("prompts",)
    default_tune: ClassVar[str] = "prompts"
    #: Key of `PROMPT_POOLS`.
    _pool: ClassVar[str]

    def __init__(self, setting: Any) -> None:
        super().__init__(setting)
        make = PROMPT_POOLS.get(self._pool)
        with seeded(setting.seed):
            pool = make(self.sam.prompt_encoder.embed_dim, setting.num_tasks)
        self._model = PromptedModel(self.sam, pool.to(setting.bank.backbone.device))

    def _fresh(self) -> Sam:
        return self.setting.sam

    @property
    def raw(self) -> str:
        return "embedding"

    @property
    def learning_rate(self) -> float:
        return 1e-3

    @property
    def module(self) -> nn.Module:
        return self._model.pool

    def before_task(self, task: int) -> None:
        super().before_task(task)
        self._model.pool.begin_task(task)

    def decode(self, batch: Batch) -> MaskTokens:
        self._model.task = self.task
        return self._model.decode(batch.raw, batch.prompts)

    def loss(self, batch: Batch, masks: MaskLoss) -> Tensor | float:
        assert self._model.pool_loss is not None
        return self.setting.options.key_weight * self._model.pool_loss

    def model(self) -> Model:
        return PromptedModel(self.sam, copy.deepcopy(self._model.pool).requires_grad_(False)).eval()

    def adapter(self) -> Adapter:
        weights = {k: v.detach().cpu() for k, v in self._model.pool.state_dict().items()}
        return self._adapter(chooser=self._pool, weights=weights)

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._model.pool.begin_task(self.task)

    def kept_bytes(self) -> int:
        return bytes_of(self._model.pool.state_dict().values())
