"""The loop: seeds, stops and checkpoints, streams, settings, several processes."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adaptation import steps
from adaptation import trainer as trainer_module
from adaptation.combined import Combined
from adaptation.evaluation import narrow_fraction, score
from adaptation.features import FeatureBank
from adaptation.options import TrainConfig
from adaptation.results import RunResult
from adaptation.strategies.lwf import LwF
from adaptation.strategy import Strategy
from adaptation.streams import find_stream
from adaptation.train import main
from adaptation.trainer import Trainer, check_tune, falling
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.adapters.tuning import TUNINGS, tuned_weights
from sam_gym.data.streams import Domain, Stream, make_stream
from sam_gym.metrics import continual as continual_metrics
from sam_gym.metrics.masks import boundary_iou, iou

HERE = Path(__file__).parent
MakeTrainer = Callable[..., Trainer]


def folder_of(out: Path, run: RunResult) -> Path:
    return out / f"{run.method}-{run.tune}-{run.seed}"


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run has learned and measured, but for its seconds."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    numbers = json.loads((folder / "run.json").read_text())
    assert numbers.pop("seconds") >= 0 and saved["result"].pop("seconds") >= 0
    adapter = folder / "adapter.safetensors"
    return {
        "run": numbers,
        "checkpoint": saved,
        "adapter": load_file(adapter) if adapter.is_file() else {},
    }


def assert_equal(got: Any, expected: Any, path: str = "") -> None:
    """To the last bit."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), path
        for key in expected:
            assert_equal(got[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), path
        for k, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_equal(one, other, f"{path}/{k}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), path
    else:
        assert got == expected, path


# Seeds and stops -------------------------------------------------------------------------------


def test_a_seed_fixes_everything(make_trainer: MakeTrainer, pair: Stream, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_trainer(tmp_path / name).fit(pair, "er")
    make_trainer(tmp_path / "one", seed=1).fit(pair, "er")
    one, two = (outcome(tmp_path / name / "er-decoder-0") for name in ("one", "two"))
    assert_equal(one, two)
    other = outcome(tmp_path / "one" / "er-decoder-1")
    assert other["run"]["scores"] != one["run"]["scores"]


class Stopped(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Makes training fail in an optimizer step, counted over all domains."""
    # It takes up to a second, for event files that nobody reads here.
    monkeypatch.setattr(trainer_module, "wait_for_a_later_name", lambda folder: None)

    def stop_at(step: int | None) -> None:
        taken = 0

        def count(self: Strategy, _: int) -> None:
            nonlocal taken
            if taken == step:
                raise Stopped
            taken += 1

        for cls in (Strategy, Combined):
            monkeypatch.setattr(cls, "after_step", count)

    return stop_at


@pytest.mark.parametrize(
    ("method", "tune"),
    [
        *((name, "decoder") for name in ("naive", "moda", "lwf")),
        *(("coda", "prompts"), ("regcl", "lora_decoder"), ("ewc+er", "decoder")),
    ],
)
def test_a_run_goes_on_as_if_it_had_never_stopped(
    method: str,
    tune: str,
    make_trainer: MakeTrainer,
    pair: Stream,
    stop_at: Callable[[int | None], None],
    tmp_path: Path,
) -> None:
    if tune.startswith("lora"):
        pytest.importorskip("peft")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = make_trainer(whole, steps=4, batch_size=2, checkpoint_every=2)
    trainer.fit(pair, method)
    trainer.out = parts
    name = f"{method}-{tune}-0"
    # Within the first domain after a checkpoint, at its end, and within the second domain.
    for step in (3, 2, 3):
        stop_at(step)
        with pytest.raises(Stopped):
            trainer.fit(pair, method, resume=True)
        assert (parts / name / "checkpoint.pt").is_file()
        assert not (parts / name / "run.json").exists()
    stop_at(None)
    trainer.fit(pair, method, resume=True)
    assert_equal(outcome(parts / name), outcome(whole / name))
    assert not list(parts.rglob("*.partial"))
    # Finished already: nothing is trained, and the same is written again.
    stop_at(0)
    trainer.fit(pair, method, resume=True)
    assert_equal(outcome(parts / name), outcome(whole / name))


def test_a_checkpoint_of_other_settings_is_refused(
    make_trainer: MakeTrainer, pair: Stream, stream: Stream, tmp_path: Path
) -> None:
    make_trainer(tmp_path).fit(pair, "naive")
    path = tmp_path / "naive-decoder-0" / "checkpoint.pt"
    for settings, what in (
        ({"steps": 5}, r"config \(steps \d+ then, 5 now\)"),
        ({"learning_rate": 0.1}, r"config \(learning_rate \S+ then, 0.1 now\)"),
    ):
        with pytest.raises(ValueError, match=f"{path}: a checkpoint of a run with another {what}"):
            make_trainer(tmp_path, **settings).fit(pair, "naive", resume=True)
    with pytest.raises(ValueError, match="a run with another domains"):
        make_trainer(tmp_path).fit(stream, "naive", resume=True)
    make_trainer(tmp_path).fit(pair, "lwf")
    with pytest.raises(ValueError, match=r"another method_options \(weight \S+ then, 9.0 now\)"):
        make_trainer(tmp_path).fit(pair, "lwf", method_options=LwF.Options(9.0), resume=True)
    # How often checkpoints are written changes nothing.
    make_trainer(tmp_path, checkpoint_every=1).fit(pair, "naive", resume=True)

    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=f"{path}: not a readable checkpoint .*Remove the file"):
        make_trainer(tmp_path).fit(pair, "naive", resume=True)
    make_trainer(tmp_path).fit(pair, "naive", overwrite=True)


# What a run is ---------------------------------------------------------------------------------


def test_joint_training_has_one_stage(
    make_trainer: MakeTrainer, stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domains: list[int] = []
    drawn = steps.ObjectIndices.draw

    def noted(*args: Any) -> Any:
        draw = drawn(*args)
        domains.extend(draw.domains)
        return draw

    monkeypatch.setattr(steps.ObjectIndices, "draw", noted)
    run = make_trainer(tmp_path).fit(stream, "joint")
    assert np.array(run.scores["box"]["iou"]).shape == (1, 3)
    assert len(domains) == 3 * 3 * 4 and set(domains) == {0, 1, 2}
    numbers = run.summary("box")
    assert numbers["avg_iou"] is None and numbers["ff_iou"] is None
    assert numbers["last_iou"] == pytest.approx(np.mean(run.scores["box"]["iou"]))
    assert Adapter.load(folder_of(tmp_path, run) / "adapter.safetensors").domains == list(
        stream.names
    )


def test_each_stage_trains_on_its_own_domain(
    make_trainer: MakeTrainer, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, set[int]]] = []
    make = steps.make_batch

    def noted(bank: FeatureBank, draw: Any, *args: Any) -> Any:
        seen.append((len(draw.objects), set(draw.domains)))
        return make(bank, draw, *args)

    monkeypatch.setattr(steps, "make_batch", noted)
    make_trainer().fit(stream, "naive")
    assert seen == [(4, {stage}) for stage in range(3) for _ in range(3)]
    seen.clear()
    make_trainer(steps=2).fit(stream, "er")
    assert [count for count, _ in seen] == [4, 4, 8, 8, 8, 8]
    assert all(stage // 2 in domains for stage, (_, domains) in enumerate(seen))


@pytest.mark.parametrize("method", ["naive", "er"])
def test_a_step_may_take_several_objects_of_a_view(
    make_trainer: MakeTrainer, stream: Stream, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    views: list[int] = []
    make = steps.make_batch

    def noted(bank: FeatureBank, draw: Any, *args: Any) -> Any:
        pairs = zip(draw.domains, draw.objects, strict=True)
        views.append(len({(k, bank.train(stream[int(k)]).rows[number]) for k, number in pairs}))
        return make(bank, draw, *args)

    monkeypatch.setattr(steps, "make_batch", noted)
    make_trainer(steps=2, objects_per_augmentation=4).fit(stream, method)
    # Four objects of the domain, and as many of the buffer once there is one.
    assert views == ([1, 1, 2, 2, 2, 2] if method == "er" else [1] * 6)


def test_fabric_does_not_slow_down_the_optimizers_of_the_process(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "PYTORCH_NVML_BASED_CUDA_CHECK"
    for name in [name for name in sys.modules if name.split(".")[0] == "lightning_fabric"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv(variable, raising=False)
    make_trainer()
    assert "lightning_fabric" in sys.modules and variable not in os.environ
    monkeypatch.setenv(variable, "1")
    make_trainer()
    assert os.environ[variable] == "1"


def test_the_learning_rate_falls_over_a_domain() -> None:
    rates = [falling(step / 10) for step in range(11)]
    assert rates[0] == 1 and rates[-1] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55) and rates == sorted(rates, reverse=True)


def test_summary_is_of_the_matrices() -> None:
    matrix = [[50.0, 20, 30], [40, 60, 35], [45, 50, 70]]
    run = RunResult("er", "decoder", ("a", "b", "c"))
    run.scores = {"box": {"iou": matrix, "biou": (np.array(matrix) / 2).tolist()}}
    run.zero_shot = {"box": {"iou": [10.0, 15, 20], "biou": [5.0, 5, 5]}}
    run.retention, run.routed = {"box": 33.0}, 0.75
    numbers = run.summary("box")
    assert numbers["last_iou"] == 55.0 == continual_metrics.last(matrix)
    assert numbers["avg_iou"] == pytest.approx((50 + 50 + 55) / 3)
    assert numbers["ff_iou"] == pytest.approx((5 + 10) / 2)
    assert numbers["forward_iou"] == pytest.approx((5 + 15) / 2)
    assert numbers["last_biou"] == 27.5 and numbers["ff_biou"] == pytest.approx(7.5 / 2)
    assert numbers["retention_iou"] == 33.0 and numbers["selector_accuracy"] == 75.0


class NoTraining(dict[str, Any]):
    """Splits of a domain that may not be trained on."""

    def __getitem__(self, name: str) -> Any:
        assert name != "train"
        return super().__getitem__(name)


def test_the_retention_set_is_only_measured(
    make_trainer: MakeTrainer, pair: Stream, stream: Stream, loaded: Backbone
) -> None:
    last = stream[2]
    splits = NoTraining({name: last.split(name) for name in ("val", "test")})
    retention = Domain("retention", False, splits)
    run = make_trainer(retention=retention).fit(pair, "naive")
    assert run.domains == pair.names and np.array(run.scores["box"]["iou"]).shape == (2, 2)
    without = make_trainer().fit(pair, "naive")
    assert without.scores == run.scores and not without.retention
    bank = FeatureBank(loaded, pair, 1, 3)
    plain = make_trainer(retention=retention).fit(pair, "zero_shot").retention["box"]
    expected = score(Model(loaded.sam, "embedding"), bank, retention).iou.mean()
    assert plain == pytest.approx(100 * expected) and plain != run.retention["box"]


def test_scores_are_of_the_masks_at_image_size(bank: FeatureBank, loaded: Backbone) -> None:
    """Against SAM's own way: the box of each object, one by one."""
    from segment_anything import SamPredictor

    domain = bank.stream[0]
    scores = score(Model(loaded.sam, "embedding"), bank, domain, "box", "test", keep_masks=True)
    objects = bank.held_out(domain, "test")
    predictor = SamPredictor(loaded.sam)
    assert len(scores.iou) == len(objects.masks) == len(scores.masks) > 3
    for k, truth in enumerate(objects.masks):
        predictor.set_image(objects.images[objects.rows[k]])
        ys, xs = np.nonzero(truth)
        box = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
        mask = predictor.predict(box=box, multimask_output=False)[0][0]
        assert (mask != scores.masks[k]).mean() < 1e-3
        assert scores.iou[k] == pytest.approx(iou(mask, truth), abs=5e-3)
        assert scores.biou[k] == boundary_iou(scores.masks[k], truth)
    assert 0 <= narrow_fraction(objects) <= 1


def test_clicks_measure_too(make_trainer: MakeTrainer, pair: Stream) -> None:
    run = make_trainer(steps=1, prompts=("click", "clicks5", "box"), split="val").fit(pair, "moda")
    assert set(run.scores) == set(run.zero_shot) == {"box", "click", "clicks5"}
    assert run.scores["click"] != run.scores["clicks5"] != run.scores["box"]
    for prompt in run.scores:
        assert np.isfinite(run.scores[prompt]["iou"]).all()


@pytest.mark.parametrize("method", ["naive", "moda", "coda"])
def test_mixed_precision(make_trainer: MakeTrainer, pair: Stream, method: str) -> None:
    exact = make_trainer(steps=2).fit(pair, method)
    mixed = make_trainer(steps=2, precision="bf16-mixed").fit(pair, method)
    for one, other in zip(exact.scores["box"]["iou"], mixed.scores["box"]["iou"], strict=True):
        np.testing.assert_allclose(one, other, atol=3.0)


@pytest.mark.parametrize(
    ("method", "tune"),
    [("naive", "decoder"), ("naive", "hq"), ("l2p", None), ("samcl", "lora_decoder")],
)
def test_an_hq_sam_is_adapted_too(
    method: str, tune: str | None, tmp_path: Path, hq_micro: str
) -> None:
    if method == "samcl":
        pytest.importorskip("peft")
    sizes = {"train_images": 1, "val_images": 1, "test_images": 1}
    stream = make_stream("scenes-domains", domains="cells", **sizes)
    config = TrainConfig(steps=1, batch_size=2, augmentations=1)
    backbone = {"name": hq_micro, "device": "cpu"}
    run = Trainer(config, backbone, tmp_path, progress=False).fit(stream, method, tune)
    path = folder_of(tmp_path, run) / "adapter.safetensors"
    adapted = load_backbone(hq_micro, device="cpu", adapter=str(path))
    bank = FeatureBank(load_backbone(hq_micro, device="cpu"), stream, 1)
    again = score(adapted.model, bank, stream[0]).iou.mean()
    assert run.scores["box"]["iou"][0][0] == pytest.approx(100 * again, abs=0.05)


# Streams and settings --------------------------------------------------------------------------


def test_streams_are_found(stream: Stream, tiny_name: dict[str, Any]) -> None:
    assert find_stream(stream) is stream
    assert find_stream("scenes-domains").name == "scenes-domains"
    kwargs = {"domains": "cells,night", "train_images": 2, "size": 64}
    sam = {"backbone": "tiny", "checkpoint": tiny_name["checkpoint"], "device": "cpu"}
    env = gym.make("SamContinual-v0", stream_kwargs=kwargs, **sam)
    found = find_stream(env)
    assert found.names == ("cells", "night") and found is env.unwrapped.stream  # type: ignore[attr-defined]
    assert len(find_stream("SamContinual-v0")) == len(find_stream("scenes-domains"))
    one = find_stream(gym.make("SamSeg-v0", **sam, dataset_kwargs={"length": 2, "size": 64}))
    assert one.names == ("scenes",) and len(one[0].split("train")) == 2
    with pytest.raises(ValueError, match="has neither a stream of domains nor a dataset"):
        find_stream(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match="Unknown stream 'SamContinal-v0'. Did you mean 'SamC"):
        find_stream("SamContinal-v0")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"objects_per_augmentation": 0}, "objects_per_augmentation must be at least 1"),
        ({"max_images": 0}, "max_images must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"precision": "bf16"}, "Did you mean 'bf16-mixed'"),
        ({"split": "tets"}, "Did you mean 'test'"),
        ({"prompts": ()}, "name at least one of box, click, clicks5"),
        ({"prompts": ("boxx",)}, "Unknown prompts 'boxx'. Did you mean 'box'"),
    ],
)
def test_impossible_settings(make_trainer: MakeTrainer, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**wrong)


def test_names_are_checked(make_trainer: MakeTrainer, pair: Stream) -> None:
    for method, tune, message in (
        ("nave", None, "Unknown method 'nave'. Did you mean 'naive'"),
        ("naive", "decodr", "Unknown tune target 'decodr'. Did you mean 'decoder'.*hq_small, lora"),
        ("l2p", "decoder", "Method 'l2p' does not go with tune='decoder': it tunes prompts"),
        ("regcl", "hq", "'regcl' does not go with tune='hq': it tunes lora, lora_decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer().fit(pair, method, tune)
    check_tune("moda", "sam_adapter")


def test_a_loss_that_explodes_is_named(make_trainer: MakeTrainer, pair: Stream) -> None:
    with pytest.raises(FloatingPointError, match=r"naive: the loss is nan in step 1 of .*'cells'"):
        make_trainer(learning_rate=1e37).fit(pair, "naive")


def test_batches_that_do_not_divide_are_refused(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size 4 does not divide among 3 processes"):
        make_trainer()


def test_a_bank_serves_all_methods(make_trainer: MakeTrainer, pair: Stream, stream: Stream) -> None:
    trainer = make_trainer()
    bank = trainer.bank(pair)
    assert trainer.bank(pair) is bank and trainer.bank(stream) is not bank
    assert asdict(trainer.config)["augmentations"] == bank.augmentations == 2


# Processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(
    tiny_name: dict[str, Any],
    start_script: Callable[..., Any],
    tmp_path: Path,
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    arguments = [
        *("--backbone", "tiny", "--checkpoint", tiny_name["checkpoint"], "--device", "cpu"),
        *("--domains", "cells,night", "--steps", "3", "--batch-size", "4", "--views", "2"),
        *("--max-images", "2", "--method", "er"),
    ]
    script = str(HERE / "train_tiny.py")
    finished = start_script(script, *arguments, "--out", str(together)).finish()
    assert finished.returncode == 0, finished
    assert finished.stdout.count("Everything is in") == 1
    main([*arguments, "--out", str(alone)])
    got, expected = (outcome(out / "er-decoder-0") for out in (together, alone))
    before = tuned_weights(TUNINGS.get("decoder").prepare(load_backbone(**tiny_name).sam))
    for name, weight in expected["adapter"].items():
        # A key's bias makes no difference, so its gradient is rounding, which Adam blows up.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(got["adapter"][name], weight, rtol=0, atol=1e-4, msg=name)
    moved = [
        float((weight - before[name.removeprefix("expert0.")]).abs().max())
        for name, weight in expected["adapter"].items()
    ]
    assert np.median(moved) > 5e-4
    np.testing.assert_allclose(
        got["run"]["scores"]["box"]["iou"], expected["run"]["scores"]["box"]["iou"], atol=0.5
    )
