"""The mixture of domain adapters of CoSAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from adaptation.strategies.er import BufferOptions, buffer_bytes, buffered
from adaptation.strategies.experts import Experts, RouterOptions
from adaptation.strategy import STRATEGIES, StrategyContext, seeded
from sam_gym.backbones.adapters.routers import TokenRouter, block_inputs, keys_of
from sam_gym.backbones.adapters.tuning import plain_blocks
from sam_gym.utils.fields import documented

_LEARNING_RATE, _BATCH = 3e-3, 32


@STRATEGIES.register("moda")
class MoDA(Experts):
    """Yang et al. 2024 (arXiv 2412.06418), section "Mixture of Domain Adapters".

    An adapter for each domain, and a router made of a trained global feature token and assistant
    tokens that pass through the frozen encoder. After each domain a new router is trained on a
    buffer of a few images of every domain so far, without augmentation: scaled images make the
    router worse. The tokens are trained too. In the released code they are under `no_grad`, so
    only the classifier on top of them learns.
    """

    @documented
    @dataclass(frozen=True)
    class Options(BufferOptions, RouterOptions):
        """A buffer of images, on which the router is trained."""

    _router_name: ClassVar[str] = "tokens"

    def __init__(self, context: StrategyContext) -> None:
        plain_blocks(context.sam.image_encoder)  # raises before the first domain is learned
        super().__init__(context)

    def _new_router(self, num_domains: int) -> TokenRouter:
        block: Any = plain_blocks(self.context.sam.image_encoder)[0]
        with seeded(self.context.seed):
            return TokenRouter(block.norm1.weight.shape[0], num_domains)

    def _train_router(self, router: Any, num_domains: int) -> None:
        bank, encoder = self.context.bank, self.context.sam.image_encoder
        frames, labels = [], []
        count = self.options.buffer_images
        for pool in buffered(bank, self.context.seed, range(num_domains), count):
            first = np.intersect1d(pool.allowed, pool.images.firsts)
            frames.append(bank.pixels(bank.stream[pool.task], "train", first))
            labels += [pool.task] * len(first)
        pixels = torch.cat(frames)
        truth = torch.tensor(labels, device=pixels.device)
        # Keys and values of an image do not depend on the tokens: compute them once.
        seen = [keys_of(encoder, block_inputs(encoder, chunk)) for chunk in pixels.split(_BATCH)]
        keys = [torch.cat(parts) for parts in zip(*seen, strict=True)]
        optimizer = torch.optim.Adam(router.parameters(), _LEARNING_RATE)
        rng = np.random.default_rng([self.context.seed, 17, num_domains])
        for _ in range(self.options.selector_steps if num_domains > 1 else 0):
            chosen = torch.from_numpy(rng.permutation(len(truth))[:_BATCH]).to(truth.device)
            logits = router(encoder, [part[chosen] for part in keys])
            optimizer.zero_grad()
            F.cross_entropy(logits, truth[chosen]).backward()
            optimizer.step()

    def _buffer_bytes(self) -> int:
        count = self.options.buffer_images
        return buffer_bytes(self.context.bank, range(len(self._experts)), count)
