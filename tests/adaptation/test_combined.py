"""Combined methods: both act, one adapter comes out, and impossible pairs are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptation import train
from adaptation.combined import CombinedOptions
from adaptation.features import FeatureBank
from adaptation.losses import mask_loss
from adaptation.objects import ObjectIndices
from adaptation.steps import make_batch
from adaptation.strategies.ewc import EWC
from adaptation.strategies.lwf import LwF
from adaptation.strategy import STRATEGIES, Strategy, StrategyContext
from sam_gym.backbones import load_backbone
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.data.streams import Stream


def in_second_domain(bank: FeatureBank, method: str, options: Any = None) -> Strategy:
    """A strategy at the start of the second domain, its weights moved away from the first."""
    strategy = STRATEGIES.get(method)(StrategyContext(bank, "decoder", options))
    strategy.before_task(0)
    strategy.after_task(0)
    strategy.before_task(1)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in strategy.trained().values():
            weight += 0.02 * torch.randn_like(weight)
    return strategy


def loss_of(strategy: Strategy, bank: FeatureBank) -> float:
    """The method's own loss on some objects of the second domain."""
    drawn = ObjectIndices.draw(np.random.default_rng(0), 4, [bank.pool(1)])
    batch = make_batch(bank, drawn, strategy.raw, np.arange(4))
    masks = mask_loss(strategy.decode(batch), batch.targets, batch.valid, batch.ambiguous)
    return float(torch.as_tensor(strategy.loss(batch, masks)).detach())


def test_losses_are_added_and_buffers_replayed(bank: FeatureBank) -> None:
    ewc, lwf = EWC.Options(weight=500.0, fisher_samples=3), LwF.Options(weight=2.0)
    alone = [in_second_domain(bank, "ewc", ewc), in_second_domain(bank, "lwf", lwf)]
    both = in_second_domain(bank, "ewc+lwf+er", CombinedOptions({"ewc": ewc, "lwf": lwf}))
    parts = [loss_of(strategy, bank) for strategy in alone]
    assert min(map(abs, parts)) > 1e-4
    assert loss_of(both, bank) == pytest.approx(sum(parts), rel=1e-5)

    replayed, expected = both.replayed(), in_second_domain(bank, "er").replayed()
    assert [pool.task for pool in replayed] == [0] == [pool.task for pool in expected]
    np.testing.assert_array_equal(replayed[0].allowed, expected[0].allowed)
    # The weights once, EWC's two numbers for each, and the images of the buffers.
    weights = in_second_domain(bank, "naive").kept_bytes()
    images = in_second_domain(bank, "er").kept_bytes() - weights
    assert both.kept_bytes() == 3 * weights + images and images > 0


def test_both_methods_act_in_training(
    make_trainer: Callable[..., Any], pair: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EWC with a great weight keeps the weights still; ER doubles the batch all the same."""
    from adaptation import steps

    sizes: list[int] = []
    make = steps.make_batch

    def noted(bank: FeatureBank, drawn: ObjectIndices, *args: Any) -> Any:
        sizes.append(len(drawn.objects))
        return make(bank, drawn, *args)

    monkeypatch.setattr(steps, "make_batch", noted)
    moved = []
    for weight in (0.0, 1e6):
        options = CombinedOptions({"ewc": EWC.Options(weight=weight, fisher_samples=3)})
        sizes.clear()
        result = make_trainer(steps=4, learning_rate=1e-4).fit(
            pair, "ewc+er", method_options=options
        )
        assert sizes == [4] * 4 + [8] * 4
        first, last = result.scores["box"]["iou"]
        moved.append(np.abs(np.subtract(first, last)).sum())
    assert result.method == "ewc+er" and result.tune == "decoder"
    assert moved[1] < moved[0]


def test_options_and_adapter_by_the_command_line(tiny_name: dict[str, Any], tmp_path: Path) -> None:
    result = train.main(
        [
            *("--backbone", "tiny", "--checkpoint", tiny_name["checkpoint"], "--device", "cpu"),
            *("--domains", "cells,night", "--steps", "2", "--batch-size", "2", "--views", "1"),
            *("--max-images", "2", "--method", "ewc+er", "--ewc-weight", "5"),
            *("--fisher-samples", "2", "--buffer-images", "1", "--out", str(tmp_path)),
        ]
    )
    folder = tmp_path / "ewc+er-decoder-0"
    key = torch.load(folder / "checkpoint.pt", weights_only=True)["key"]
    assert key["method_options"] == {
        "parts": {"ewc": {"weight": 5.0, "fisher_samples": 2}, "er": {"buffer_images": 1}}
    }
    assert json.loads((folder / "run.json").read_text())["method"] == result.method == "ewc+er"
    path = folder / "adapter.safetensors"
    assert Adapter.load(path).method == "ewc+er"
    load_backbone(**tiny_name, adapter=str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ewc+ewc", "name every method once"),
        ("ewc+samlc", "Unknown method 'samlc'. Did you mean 'samcl'"),
        ("moda+samcl", "cannot be combined"),
        ("l2p+ewc", "cannot be combined"),
        ("joint+er", "cannot be combined"),
        ("er+zero_shot", "cannot be combined"),
    ],
)
def test_impossible_pairs_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STRATEGIES.get(name)


def test_a_method_of_other_hooks_leads(bank: FeatureBank) -> None:
    """MoDA's experts, each trained on its domain and on the buffers of the past ones."""
    cls = STRATEGIES.get("er+moda")
    strategy = cls(StrategyContext(bank, cls.default_tune))
    strategy.before_task(0)
    first = strategy.sam
    strategy.after_task(0)
    strategy.before_task(1)
    assert strategy.sam is not first and strategy.module is strategy.sam
    assert [pool.task for pool in strategy.replayed()] == [0]


def test_options_of_another_method_are_refused(bank: FeatureBank) -> None:
    with pytest.raises(TypeError, match=r"EWC takes EWC.Options as method_options, got LwF.Opt"):
        STRATEGIES.get("ewc")(StrategyContext(bank, "decoder", LwF.Options()))
    both = STRATEGIES.get("ewc+er")
    with pytest.raises(TypeError, match=r"ewc\+er takes CombinedOptions\(parts\) .* got EWC.Opt"):
        both(StrategyContext(bank, "decoder", EWC.Options()))
    with pytest.raises(ValueError, match="Unknown combined method 'ewx'. Did you mean 'ewc'"):
        both(StrategyContext(bank, "decoder", CombinedOptions({"ewx": EWC.Options()})))
