"""Training `micro`: an interrupted run resumes to the same weights, and they load."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sam_gym.backbones import BACKBONES, Prompts, load_backbone
from sam_gym.backbones.loading import read_weights
from sam_gym.backbones.micro.model import build_micro
from sam_gym.backbones.micro.train import (
    MicroTrainer,
    TrainMicroConfig,
    load_first_decoder,
    mask_losses,
    train,
    true_iou,
)


@pytest.fixture(autouse=True)
def restore_process() -> Iterator[None]:
    """Training seeds torch and takes OpenCV's threads away."""
    threads = cv2.getNumThreads()
    with torch.random.fork_rng():
        yield
    cv2.setNumThreads(threads)


def config(out: Path, **more: Any) -> TrainMicroConfig:
    return TrainMicroConfig(
        out=str(out),
        init="random",
        steps=2,
        images=2,
        targets=2,
        workers=0,
        evaluate=2,
        device="cpu",
        **more,
    )


class CutOff(Exception):
    """The process dies."""


def assert_same_state(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            assert_same_state(value, other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, values in enumerate(zip(one, other, strict=True)):
            assert_same_state(*values, f"{path}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def test_a_run_cut_off_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train(config(whole))

    step = MicroTrainer.train_step

    def dying_step(self: MicroTrainer, items: list) -> dict[str, float]:
        if self.step == 1:
            raise CutOff
        return step(self, items)

    monkeypatch.setattr(MicroTrainer, "train_step", dying_step)
    with pytest.raises(CutOff):
        train(config(parts, save_every=1))
    monkeypatch.setattr(MicroTrainer, "train_step", step)
    capsys.readouterr()
    resumed = train(config(parts, save_every=1))
    assert "Resuming from step 1" in capsys.readouterr().out

    one, other = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, parts))
    assert one["step"] == 2
    assert_same_state(one, other)
    exported = [load_file(out / "micro.safetensors") for out in (whole, parts)]
    assert_same_state(*exported)
    assert resumed == result == json.loads((parts / "evaluation.json").read_text())
    assert list(result) == [f"miou@{clicks}" for clicks in range(1, 6)]
    assert not list(tmp_path.rglob("*.partial"))

    with torch.random.fork_rng():
        torch.manual_seed(TrainMicroConfig.seed)
        untrained = build_micro().state_dict()
    assert any(not torch.equal(one["sam"][key], untrained[key]) for key in untrained)
    check_export(whole / "micro.safetensors", one["average"])


def check_export(path: Path, average: dict[str, torch.Tensor]) -> None:
    """The averaged weights, in half precision, load as a backbone that segments something."""
    backbone = load_backbone("micro", checkpoint=str(path), device="cpu")
    loaded = backbone.sam.state_dict()
    for key, value in loaded.items():
        expected = average[f"module.{key}"]
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6, msg=key)
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    logits, iou = backbone.decode(
        backbone.encode([image]), Prompts(torch.full((1, 1, 2), 99.0), torch.ones(1, 1).long())
    )
    assert (
        logits.shape == (1, 1, 96, 96)
        and torch.isfinite(logits).all()
        and torch.isfinite(iou).all()
    )


def test_mask_losses_by_hand() -> None:
    """Focal x 8 + Dice of two pixels, one of them on the target, at probability 1/2 and 3/4."""
    logits = torch.tensor([0.0, np.log(3.0)]).reshape(1, 1, 1, 2)
    target = torch.tensor([1.0, 0.0]).reshape(1, 1, 2)
    counted = torch.ones(1, 1, 2)
    focal = (0.25 * np.log(2) + 0.5625 * np.log(4)) / 2
    dice = 1 - (2 * 0.5 + 1) / (1.25 + 1 + 1)
    assert mask_losses(logits, target, counted).item() == pytest.approx(8 * focal + dice, rel=1e-6)
    # The second pixel does not count.
    focal = 0.25 * np.log(2) / 2
    dice = 1 - (2 * 0.5 + 1) / (0.5 + 1 + 1)
    loss = mask_losses(logits, target, torch.tensor([[[1.0, 0.0]]]))
    assert loss.item() == pytest.approx(8 * focal + dice, rel=1e-6)


def test_true_iou_by_hand() -> None:
    logits = torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    target = torch.tensor([[[1.0, 0.2], [0.7, 0.5]]])
    counted = torch.ones(1, 2, 2)
    assert true_iou(logits, target, counted).tolist() == [[pytest.approx(1 / 3), 0.5]]
    counted[0, 0, 1] = 0.0
    assert true_iou(logits, target, counted).tolist() == [[0.5, pytest.approx(2 / 3)]]


def test_the_decoder_starts_from_the_first_micro() -> None:
    """What has the same shape has the same weights; only layers that know the stride differ."""
    sam = build_micro()
    load_first_decoder(sam)
    known = load_backbone("micro-v0", device="cpu").sam.state_dict()
    differing = [
        name
        for name, value in sam.state_dict().items()
        if not name.startswith("image_encoder.") and not torch.equal(value, known[name])
    ]
    assert differing == [
        "prompt_encoder.mask_downscaling.3.weight",
        "mask_decoder.output_upscaling.0.weight",
    ]


def test_folders_of_photos_are_checked_before_work(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for photos, weights, message in (
        (("missing",), (), "missing: the root folder does not exist"),
        (("empty",), (), "empty: no folder of photos. It needs instances_train.json .* or images/"),
        (("empty", "other"), (1.0,), "photo_weights has length 1 for 2 folders of photos"),
    ):
        paths = tuple(str(tmp_path / name) for name in photos)
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            train(config(tmp_path / "out", photos=paths, photo_weights=weights))


def test_wrong_initial_weights_and_checkpoints_are_named(tmp_path: Path) -> None:
    cpu, first = torch.device("cpu"), BACKBONES.get("micro-v0").weights
    with pytest.raises(FileNotFoundError, match="random, imagenet or a file .* got 'imagnet'"):
        MicroTrainer(TrainMicroConfig(init="imagnet"), cpu)
    with pytest.raises(ValueError, match="is for: micro-v0"):
        MicroTrainer(TrainMicroConfig(init=str(first)), cpu)
    trainer = MicroTrainer(TrainMicroConfig(init="random", warmup=0), cpu)
    assert trainer.schedule() == 1.0
    former = {"step": 3, "sam": load_backbone("micro-v0", device="cpu").sam.state_dict()}
    torch.save(former, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt: a checkpoint of another model .* --out"):
        trainer.resume(tmp_path)


def test_training_starts_from_given_weights(tmp_path: Path, micro_checkpoint: str) -> None:
    trainer = MicroTrainer(TrainMicroConfig(init=micro_checkpoint), torch.device("cpu"))
    expected = read_weights(Path(micro_checkpoint))
    for model in (trainer.sam, trainer.average.module):
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key
