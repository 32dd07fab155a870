"""Merge the LoRAs of all domains into one, without replay."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from adaptation.objects import ObjectIndices
from adaptation.steps import make_batch
from adaptation.strategy import STRATEGIES, Strategy, StrategyContext
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.adapters.tuning import bytes_of, tuned_weights

#: Factor of the off-diagonal entries of Gram matrices (RegMean's shrinkage).
_SHRINK = 0.9
_BATCHES, _OBJECTS = 8, 16


@STRATEGIES.register("regcl")
class RegCL(Strategy):
    """The idea of RegCL (arXiv 2507.12297): merge the modules of all domains, without replay.

    Every domain trains a LoRA of its own from the pretrained SAM. The merged update of a layer is
    the least-squares fit to the outputs of each domain's update on that domain's inputs (RegMean,
    Jin et al., ICLR 2023). It needs the Gram matrix of the inputs and its product with the update,
    both summed over domains, so memory does not grow.
    """

    tunes: ClassVar[tuple[str, ...]] = ("lora", "lora_decoder")
    default_tune: ClassVar[str] = "lora_decoder"

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        self._grams: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}

    def before_task(self, task: int) -> None:
        super().before_task(task)
        self.sam = self._pretrained()

    def after_task(self, task: int) -> None:
        grams = self._input_grams(task)
        for name, change in self._changes().items():
            gram = grams[name]
            shrunk = _SHRINK * gram + (1 - _SHRINK) * torch.diag(gram.diagonal())
            self._grams[name] = self._grams.get(name, 0) + shrunk
            self._products[name] = self._products.get(name, 0) + shrunk @ change.T

    def _changes(self) -> dict[str, Tensor]:
        """The update of each weight by the LoRA of the current domain: (outputs, inputs)."""
        weights = tuned_weights(self.sam)
        names = sorted({name.rpartition(".")[0] for name in weights})
        return {n: (weights[f"{n}.lora_B"] @ weights[f"{n}.lora_A"]).double() for n in names}

    @torch.no_grad()
    def _input_grams(self, task: int) -> dict[str, Tensor]:
        """Mean Gram matrix (inputs, inputs) of each LoRA layer's inputs on a domain."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def watch(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach().flatten(0, -2).float()
                sums[name] = sums.get(name, 0) + (x.T @ x).double().cpu()
                counts[name] = counts.get(name, 0) + len(x)

            return hook

        layers = {n: m for n, m in self.sam.named_modules() if hasattr(m, "lora_A")}
        hooks = [m.register_forward_pre_hook(watch(n)) for n, m in layers.items()]
        try:
            bank = self.context.bank
            rng = np.random.default_rng([self.context.seed, 23, task])
            for _ in range(_BATCHES):
                drawn = ObjectIndices.draw(rng, _OBJECTS, [bank.pool(task)])
                seeds = rng.integers(2**63, size=_OBJECTS)
                self.decode(make_batch(bank, drawn, self.raw, seeds))
        finally:
            for hook in hooks:
                hook.remove()
        return {name: total / counts[name] for name, total in sums.items()}

    def _merged(self) -> dict[str, Tensor]:
        """The merged update of each layer, as full matrices."""
        merged = {}
        for name, gram in self._grams.items():
            floor = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            merged[name] = torch.linalg.solve(gram + floor, self._products[name]).T.float()
        return merged

    def model(self) -> Model:
        return self.context.bank.backbone.adapted_model(self.adapter())

    def adapter(self) -> Adapter:
        weights = {}
        for name, change in self._merged().items():
            # A LoRA of full rank: the merged update times the identity.
            weights[f"{name}.lora_B"] = change
            weights[f"{name}.lora_A"] = torch.eye(change.shape[1])
        return self._adapter(experts=[weights])

    def state(self) -> dict[str, Any]:
        return super().state() | {"grams": dict(self._grams), "products": dict(self._products)}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._grams, self._products = dict(state["grams"]), dict(state["products"])

    def kept_bytes(self) -> int:
        kept = [*self._grams.values(), *self._products.values()]
        return bytes_of(kept)
