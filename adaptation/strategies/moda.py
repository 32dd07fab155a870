"""The mixture of domain adapters of CoSAM."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from adaptation.strategies.routed import Routed
from adaptation.strategy import STRATEGIES, image_bytes, images_kept, seeded
from sam_gym.backbones.adapters.selectors import TokenSelector, block_inputs, keys_of
from sam_gym.backbones.adapters.tuning import encoder_blocks

_LEARNING_RATE, _BATCH = 3e-3, 32


@STRATEGIES.register("moda")
class MoDA(Routed):
    """Yang et al. 2024 (arXiv 2412.06418), section "Mixture of Domain Adapters".

    An adapter for each domain, and a selector made of a trained global feature token and assistant
    tokens that go through the frozen encoder. After each domain the selector is trained anew on a
    buffer of a few images of every domain so far, as they are: views that are scaled make the
    selector worse. The tokens are trained too; in the released code
    they stand under `no_grad`, so only the classifier behind them learns.
    """

    _chooser: ClassVar[str] = "tokens"

    def _new_selector(self, num_domains: int) -> TokenSelector:
        block: Any = encoder_blocks(self.setting.sam.image_encoder)[0]
        with seeded(self.setting.seed):
            return TokenSelector(block.norm1.weight.shape[0], num_domains)

    def _train_selector(self, selector: Any, num_domains: int) -> None:
        bank, encoder = self.setting.bank, self.setting.sam.image_encoder
        frames, labels = [], []
        for task, kept in enumerate(images_kept(self.setting, range(num_domains))):
            domain = bank.stream[task]
            first = np.intersect1d(kept, bank.train(domain).firsts)
            frames.append(bank.pixels(domain, "train", first))
            labels += [task] * len(first)
        pixels = torch.cat(frames)
        truth = torch.tensor(labels, device=pixels.device)
        # What the tokens see of an image does not depend on them: once for all steps.
        seen = [keys_of(encoder, block_inputs(encoder, chunk)) for chunk in pixels.split(_BATCH)]
        keys = [torch.cat(parts) for parts in zip(*seen, strict=True)]
        optimizer = torch.optim.Adam(selector.parameters(), _LEARNING_RATE)
        rng = np.random.default_rng([self.setting.seed, 17, num_domains])
        for _ in range(self.setting.options.selector_steps if num_domains > 1 else 0):
            chosen = torch.from_numpy(rng.permutation(len(truth))[:_BATCH]).to(truth.device)
            logits = selector(encoder, [part[chosen] for part in keys])
            optimizer.zero_grad()
            F.cross_entropy(logits, truth[chosen]).backward()
            optimizer.step()

    def _buffer_bytes(self) -> int:
        return image_bytes(self.setting, range(len(self._experts)))
