"""A method from outside, in one file: A-GEM projects gradients before the optimizer step."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaptation import train
from adaptation.objects import ObjectIndices
from adaptation.steps import make_batch
from adaptation.strategies.er import BufferOptions, buffered
from adaptation.strategy import STRATEGIES, Strategy
from adaptation.trainer import falling
from sam_gym.backbones import load_backbone
from sam_gym.data.streams import Stream


class AGem(Strategy):
    """Averaged GEM (Chaudhry et al., ICLR 2019).

    A gradient that conflicts with that of a buffer of past domains loses its component along it.
    """

    @dataclass(frozen=True)
    class Options(BufferOptions):
        memory_batch: int = 6
        """Objects of the buffer in the reference gradient."""
        margins: tuple[float, ...] = field(default_factory=tuple)

    def make_optimizer(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr)

    def after_backward(self, step: int) -> None:
        if self.task == 0:
            return
        weights = [weight for weight in self.trained().values() if weight.grad is not None]
        reference = self._reference(step, weights)
        gradient = torch.cat([weight.grad.flatten() for weight in weights])  # type: ignore[union-attr]
        overlap = gradient @ reference
        if overlap < 0:
            gradient = gradient - overlap / (reference @ reference) * reference
            for weight, part in zip(
                weights, gradient.split([w.numel() for w in weights]), strict=True
            ):
                weight.grad = part.view_as(weight)

    def _reference(self, step: int, weights: list[nn.Parameter]) -> Tensor:
        bank, seed = self.context.bank, self.context.seed
        pools = buffered(bank, seed, range(self.task), self.options.buffer_images)
        rng = np.random.default_rng([seed, 29, self.task, step])
        drawn = ObjectIndices.draw(rng, self.options.memory_batch, pools)
        batch = make_batch(bank, drawn, self.raw, rng.integers(2**63, size=len(drawn.objects)))
        loss = self.masks(batch, self.decode(batch)).total
        parts = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])


@pytest.fixture(autouse=True)
def agem() -> None:
    if "agem" not in STRATEGIES:
        STRATEGIES.add("agem", AGem)


def flat(strategy: Strategy, gradients: bool) -> Tensor:
    """All weights that have a gradient, or their gradients, as one vector."""
    weights = [weight for weight in strategy.trained().values() if weight.grad is not None]
    return torch.cat([(w.grad if gradients else w.data).flatten() for w in weights])  # type: ignore[union-attr]


class Notes:
    """Vectors of each step in the second domain, noted while A-GEM trains.

    Every other reference gradient is turned around, so that it conflicts.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        noted: dict[str, list[Tensor]] = defaultdict(list)
        project, refer = AGem.after_backward, AGem._reference

        def reference(strategy: AGem, step: int, weights: Any) -> Tensor:
            noted["reference"].append((-1) ** step * refer(strategy, step, weights))
            return noted["reference"][-1]

        def after_backward(strategy: AGem, step: int) -> None:
            if strategy.task:
                noted["gradient"].append(flat(strategy, True).clone())
                noted["old"].append(flat(strategy, False).clone())
            project(strategy, step)
            if strategy.task:
                noted["projected"].append(flat(strategy, True).clone())

        def after_step(strategy: AGem, step: int) -> None:
            if strategy.task:
                noted["new"].append(flat(strategy, False).clone())

        patch.setattr(AGem, "_reference", reference)
        patch.setattr(AGem, "after_backward", after_backward)
        patch.setattr(AGem, "after_step", after_step)
        self.noted = noted

    def steps(self) -> list[dict[str, Tensor]]:
        return [
            dict(zip(self.noted, vectors, strict=True))
            for vectors in zip(*self.noted.values(), strict=True)
        ]


def test_conflicting_gradients_are_projected(
    make_trainer: Callable[..., Any], pair: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes(monkeypatch)
    make_trainer(steps=6, learning_rate=0.02).fit(pair, "agem")
    steps = notes.steps()
    assert len(steps) == 6
    conflicts = 0
    for number, step in enumerate(steps):
        gradient, reference, projected = step["gradient"], step["reference"], step["projected"]
        overlap = gradient @ reference
        conflicts += bool(overlap < 0)
        if overlap < 0:
            assert abs(projected @ reference) < 1e-3 * abs(overlap)
            gradient = gradient - overlap / (reference @ reference) * reference
        torch.testing.assert_close(projected, gradient)
        # The method's own optimizer, SGD, takes these gradients.
        rate = 0.02 * falling(number / 6)
        torch.testing.assert_close(step["new"], step["old"] - rate * projected)
    assert 0 < conflicts < 6


def test_gradients_are_unscaled_in_mixed_precision(
    make_trainer: Callable[..., Any], pair: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for scale in (None, 1024.0):
        with monkeypatch.context() as patch:
            notes = Notes(patch)
            trainer = make_trainer(steps=2, precision="bf16-mixed")
            if scale is not None:
                scaler = torch.amp.GradScaler("cpu", init_scale=scale)
                trainer.fabric.strategy.precision.scaler = scaler
            trainer.fit(pair, "agem")
            taken.append(notes)
    for plain, scaled in zip(taken[0].steps(), taken[1].steps(), strict=True):
        assert 0.9 < float(scaled["gradient"].norm() / plain["gradient"].norm()) < 1.1


def test_the_command_line_knows_its_options(
    tiny_name: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--method", "agem", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--agem-memory-batch INT" in shown and "Objects of the buffer in the" in shown
    assert "--ewc-weight FLOAT" not in shown
    result = train.main(
        [
            *("--backbone", "tiny", "--checkpoint", tiny_name["checkpoint"], "--device", "cpu"),
            *("--domains", "cells,night", "--steps", "2", "--batch-size", "2", "--views", "1"),
            *("--max-images", "2", "--method", "agem", "--agem-memory-batch", "2"),
            *("--buffer-images", "1", "--out", str(tmp_path)),
        ]
    )
    assert (result.method, result.domains) == ("agem", ("cells", "night"))
    path = tmp_path / "agem-decoder-0" / "adapter.safetensors"
    adapted = load_backbone(**tiny_name, adapter=str(path))
    assert adapted.adapter is not None and adapted.adapter.method == "agem"
