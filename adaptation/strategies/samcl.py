"""A tiny expert for each domain, and a router trained on stored embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adaptation.strategies.experts import Experts, RouterOptions
from adaptation.strategy import STRATEGIES, StrategyContext, seeded
from sam_gym.backbones.adapters.routers import EmbeddingRouter, pooled_embedding
from sam_gym.backbones.adapters.tuning import bytes_of
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count

_LEARNING_RATE = 3e-3


@STRATEGIES.register("samcl")
class SAMCL(Experts):
    """The idea of SAMCL (Wang et al. 2024, arXiv 2412.05012).

    A tiny module for each domain, and a router trained on pooled embeddings of training images;
    nothing else is kept of a past domain. The paper's module sits in the encoder and shares a
    matrix over the layers. Here it is a small HQ head or a LoRA of the decoder, in half precision,
    so that one pass of the frozen encoder serves router and experts.
    """

    @documented
    @dataclass(frozen=True)
    class Options(RouterOptions):
        buffer_embeddings: Count = 32
        """Pooled embeddings of each domain that are kept."""

    tunes: ClassVar[tuple[str, ...]] = ("hq_small", "hq", "lora", "lora_decoder")
    default_tune: ClassVar[str] = "hq_small"
    _router_name: ClassVar[str] = "embeddings"
    _kept_dtype: ClassVar[torch.dtype] = torch.float16

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        self._kept: list[Tensor] = []

    def _new_router(self, num_domains: int) -> EmbeddingRouter:
        with seeded(self.context.seed):
            return EmbeddingRouter(self.context.bank.backbone.embedding_shape[0], num_domains)

    def after_task(self, task: int) -> None:
        bank = self.context.bank
        domain = bank.stream[task]
        rng = np.random.default_rng([self.context.seed, 19, task])
        count = self.options.buffer_embeddings
        chosen = rng.permutation(bank.train(domain).firsts)[:count]
        self._kept.append(
            pooled_embedding(bank.raw(domain, "train", "embedding", chosen).embedding)
        )
        super().after_task(task)

    def _train_router(self, router: Any, num_domains: int) -> None:
        features = torch.cat(self._kept)
        labels = [task for task, kept in enumerate(self._kept) for _ in kept]
        truth = torch.tensor(labels, device=features.device)
        router.standardise(features)
        optimizer = torch.optim.Adam(router.parameters(), _LEARNING_RATE, weight_decay=1e-4)
        for _ in range(self.options.selector_steps if num_domains > 1 else 0):
            optimizer.zero_grad()
            F.cross_entropy(router(features), truth).backward()
            optimizer.step()

    def state(self) -> dict[str, Any]:
        return super().state() | {"kept": self._kept}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._kept = state["kept"]

    def _buffer_bytes(self) -> int:
        return bytes_of(self._kept)
