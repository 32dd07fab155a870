"""Methods that train a prompt pool of the decoder and no weight of the SAM.

The pools are in `sam_gym.backbones.adapters.prompt_pools`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from segment_anything.modeling import Sam
from torch import Tensor, nn

from adaptation.losses import MaskLoss
from adaptation.strategy import STRATEGIES, Batch, Strategy, StrategyContext, seeded
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import ADAPTER_MODULES, Model
from sam_gym.backbones.adapters.prompt_pools import PromptedModel
from sam_gym.backbones.adapters.tuning import bytes_of
from sam_gym.backbones.decode import MaskTokens
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import NotNegative


class Prompted(Strategy):
    """Base class of methods whose prompt pool adds tokens to the decoder's."""

    @documented
    @dataclass(frozen=True)
    class Options:
        key_weight: NotNegative = 1.0
        """Weight of the loss of the prompt pool."""

    tunes: ClassVar[tuple[str, ...]] = ("prompts",)
    default_tune: ClassVar[str] = "prompts"
    #: Key of `ADAPTER_MODULES`.
    _pool: ClassVar[str]

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        make: Any = ADAPTER_MODULES.get(self._pool)
        with seeded(context.seed):
            pool = make(context.bank.backbone.embedding_shape[0], context.num_tasks)
        self._model = PromptedModel(self.sam, pool.to(context.bank.backbone.device))

    def _pretrained(self) -> Sam:
        return self.context.sam

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
        return self.options.key_weight * self._model.pool_loss

    def model(self) -> Model:
        return PromptedModel(self.sam, copy.deepcopy(self._model.pool).requires_grad_(False)).eval()

    def adapter(self) -> Adapter:
        weights = {k: v.detach().cpu() for k, v in self._model.pool.state_dict().items()}
        return self._adapter(router=self._pool, weights=weights)

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._model.pool.begin_task(self.task)

    def kept_bytes(self) -> int:
        return bytes_of(self._model.pool.state_dict().values())


@STRATEGIES.register("l2p")
class L2P(Prompted):
    """Learning to Prompt (Wang et al., CVPR 2022), with prompts as decoder tokens."""

    _pool: ClassVar[str] = "l2p"


@STRATEGIES.register("dualprompt")
class DualPrompt(Prompted):
    """DualPrompt (Wang et al., ECCV 2022), with prompts as decoder tokens."""

    _pool: ClassVar[str] = "dualprompt"


@STRATEGIES.register("coda")
class CodaPrompt(Prompted):
    """CODA-Prompt (Smith et al., CVPR 2023), with prompts as decoder tokens."""

    _pool: ClassVar[str] = "coda"
