"""Semantic heads: the training against a plain loop, stops, processes, scores and commands."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F

from adaptation import evaluate
from adaptation.batch_norm import synchronise
from adaptation.class_weights import Weighting, class_weights, count_pixels
from adaptation.evaluation import score_labels
from adaptation.features import FeatureBank
from adaptation.frame_transform import FrameTransform
from adaptation.strategies.semantic import Semantic
from adaptation.strategy import STRATEGIES, Step, StrategyContext
from adaptation.train import main
from adaptation.trainer import Trainer, falling
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.data import make_dataset
from sam_gym.data.streams import Domain, Stream, dataset_stream
from sam_gym.metrics.semantic import SemanticMetric

HERE = Path(__file__).parent
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def street(tmp_path: Path) -> str:
    """A `camvid` folder: bright sky above a road, void at the bottom, a car on each image."""
    root = tmp_path / "street"
    rng = np.random.default_rng(0)
    for split, count in {"train": 5, "val": 2, "test": 2}.items():
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for number in range(count):
            labels = np.zeros((48, 64), np.uint8)
            labels[20 + number :] = 3
            labels[-4:] = 11
            labels[24:40, 8 * number : 8 * number + 24] = 8
            grey = np.select([labels == 0, labels == 8], [220, 120], 20)[..., None]
            image = np.clip(grey + rng.integers(-15, 15, (48, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / split / f"{number}.png")
            Image.fromarray(labels).save(root / f"{split}annot" / f"{number}.png")
    return str(root)


@pytest.fixture
def streets(street: str) -> Stream:
    return dataset_stream("camvid", street)


def options(**given: Any) -> Any:
    return Semantic.Options(**given)


def test_labels_follow_the_pixels() -> None:
    """Of an image whose colours are its labels; apart from blended pixels at their borders."""
    labels = np.kron(np.random.default_rng(0).integers(0, 9, (6, 8)), np.ones((40, 40))).astype(
        np.uint8
    )
    image = np.repeat(20 * labels[..., None], 3, axis=2)
    for seed, plain in ((0, True), (1, False), (2, False), (3, False)):
        drawn = FrameTransform.draw(np.random.default_rng(seed), (240, 320), 64, plain)
        frame, own = drawn.frame(image)[..., 0], drawn.labels(labels)
        inside = own != 255
        assert inside.any() and (frame[~inside] == 124).mean() > 0.9
        assert (np.abs(frame[inside] - 20.0 * own[inside]) < 3).mean() > 0.6


def test_training_is_a_plain_loop(
    make_trainer: MakeTrainer, streets: Stream, loaded: Backbone, tmp_path: Path
) -> None:
    """Against torch's modules on images that are encoded for every batch."""
    trainer = make_trainer(tmp_path, steps=None, batch_size=2, augmentations=1)
    trainer.fit(streets, "semantic", method_options=options(epochs=2, class_weights="none"))
    got = load_file(tmp_path / "semantic-head-0" / "adapter.safetensors")

    bank = FeatureBank(loaded, streets, 1)
    strategy = Semantic(StrategyContext(bank, "head", options(epochs=2)))
    state = strategy.adapter().semantic
    head: Any = nn.Sequential(
        *(nn.Conv2d(32, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU()),
        nn.Conv2d(256, 11, 1),
    )
    head.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    dataset = make_dataset("camvid", "train", root=streets[0].split("train").root)  # type: ignore[attr-defined]
    seen: list[int] = []
    for number in range(6):  # two epochs of 5 images: 3 steps each
        order = np.random.default_rng([0, 4, 0, number // 3]).permutation(5)
        rows = [int(order[(2 * (number % 3) + k) % 5]) for k in range(2)]
        seen += rows
        samples = [dataset[k] for k in rows]
        labels = np.full((2, 64, 64), 255)
        for own, sample in zip(labels, samples, strict=True):
            own[:48] = sample.semantic
        frames = []
        for sample in samples:
            frame = np.full((64, 64, 3), (124, 116, 104), np.uint8)
            frame[:48] = sample.image
            frames.append(frame)
        logits = F.interpolate(head(loaded.encode(frames).embedding), (64, 64), mode="bilinear")
        loss = F.cross_entropy(logits, torch.from_numpy(labels), ignore_index=255)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * falling(number / 6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert set(seen[:5]) == set(seen[6:11]) == set(range(5))
    for name, value in head.state_dict().items():
        other = got[f"semantic.net.{name}"]
        if name in (
            "0.bias",
            "3.bias",
        ):  # without effect: gradients are rounding, which Adam blows up
            continue
        torch.testing.assert_close(other, value, rtol=1e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("given", [{"head": "seed"}, {"head": "pyramid"}])
def test_it_learns_and_its_adapter_is_what_was_measured(
    given: dict[str, Any],
    make_trainer: MakeTrainer,
    streets: Stream,
    tiny_name: dict[str, Any],
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tmp_path, steps=None, batch_size=2, split="val")
    run = trainer.fit(streets, "semantic", method_options=options(epochs=6, **given))
    iou = run.scores["class"]["iou"][0][0]
    assert iou > 25  # three classes; the others are there if they are predicted
    assert run.zero_shot == {} and run.trainable > 1000 and run.only_stage is None
    folder = tmp_path / "semantic-head-0"
    assert len(list(folder.glob("epoch_*.safetensors"))) == 6
    backbone = load_backbone(**tiny_name, adapter=str(folder / "adapter.safetensors"))
    dataset = make_dataset("camvid", "val", root=streets[0].split("val").root)  # type: ignore[attr-defined]
    metric = SemanticMetric(dataset.classes)  # type: ignore[attr-defined]
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.semantic is not None
        metric.update(backbone.segment([sample.image])[0], sample.semantic)
    assert metric.summary()["mean_iou"] == pytest.approx(iou / 100, abs=2e-3)
    first, last = (load_file(folder / f"epoch_{k}.safetensors") for k in (1, 6))
    final = load_file(folder / "adapter.safetensors")
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert any(not torch.equal(first[name], final[name]) for name in final)


def test_a_head_on_features_of_timm(
    make_trainer: MakeTrainer, streets: Stream, tiny_name: dict[str, Any], tmp_path: Path
) -> None:
    """Its adapter gives the label maps that were measured, with the frames of the SAM."""
    saved = tmp_path / "model"
    save_for_hf(timm.create_model("test_efficientnet"), str(saved), safe_serialization=True)
    trainer = make_trainer(tmp_path, steps=None, batch_size=2, split="val")
    own = options(head="pyramid", features=f"timm:local-dir:{saved}", epochs=2)
    run = trainer.fit(streets, "semantic", method_options=own)
    adapter = tmp_path / "semantic-head-0" / "adapter.safetensors"
    backbone = load_backbone(**tiny_name, adapter=str(adapter))
    assert backbone.adapter is not None
    assert backbone.adapter.semantic_features == f"tiles@{own.features}"
    (domain,) = streets
    scores = score_labels(backbone.model, FeatureBank(backbone, streets, 1), domain, "val")
    assert 100 * scores.iou.mean() == pytest.approx(run.scores["class"]["iou"][0][0], abs=0.1)
    with pytest.raises(ValueError, match="sam or timm:NAME"):
        trainer.fit(streets, "semantic", method_options=options(features="micro"), overwrite=True)


@pytest.mark.parametrize(("head", "weighting"), [("seed", "none"), ("pyramid", "median")])
def test_a_run_goes_on_as_if_it_had_never_stopped(
    head: str,
    weighting: Weighting,
    make_trainer: MakeTrainer,
    streets: Stream,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    few = {"steps": None, "batch_size": 2, "checkpoint_every": 1000}
    own = options(head=head, epochs=3, class_weights=weighting)
    make_trainer(whole, **few).fit(streets, "semantic", method_options=own)
    for stop in (5, 4):  # within the second epoch, and within the third
        taken = 0

        def count(self: Any, _: int, stop: int = stop) -> None:
            nonlocal taken
            if taken == stop:
                raise KeyboardInterrupt
            taken += 1

        with monkeypatch.context() as patch:
            patch.setattr(Semantic, "after_step", count)
            with pytest.raises(KeyboardInterrupt):
                make_trainer(parts, **few).fit(streets, "semantic", method_options=own, resume=True)
        checkpoint = torch.load(parts / "semantic-head-0" / "checkpoint.pt", weights_only=True)
        assert checkpoint["step"] == 3 * (1 + (stop == 4))
    make_trainer(parts, **few).fit(streets, "semantic", method_options=own, resume=True)
    for name in ("adapter", "epoch_1", "epoch_2", "epoch_3"):
        one, other = (
            load_file(x / "semantic-head-0" / f"{name}.safetensors") for x in (whole, parts)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    runs = [json.loads((x / "semantic-head-0" / "run.json").read_text()) for x in (whole, parts)]
    assert runs[0]["scores"] == runs[1]["scores"]
    assert runs[0]["method_options"]["class_weights"] == weighting
    assert runs[0]["facts"] == runs[1]["facts"]
    assert bool(runs[0]["facts"]) == (weighting != "none")
    with pytest.raises(ValueError, match="a run with another method_options"):
        make_trainer(parts, **few).fit(
            streets, "semantic", method_options=options(head=head, epochs=4), resume=True
        )


def test_class_weights_by_hand() -> None:
    """Two images: 6 pixels of class 0, 2 of class 1; 8 of class 0. Class 2 occurs nowhere."""
    images = [np.array([[0, 0, 0, 0, 0], [0, 1, 1, 255, 255]]), np.array([[0] * 8 + [255]])]
    counts = count_pixels([own.astype(np.uint8) for own in images], 3)
    assert counts.classes.tolist() == [14, 2, 0] and counts.images.tolist() == [16, 8, 0]
    np.testing.assert_array_equal(class_weights("none", counts), 1)
    enet = [1 / np.log(1.02 + 14 / 16), 1 / np.log(1.02 + 2 / 16), 1]
    np.testing.assert_allclose(class_weights("enet", counts), enet)
    median = (14 / 16 + 2 / 8) / 2
    np.testing.assert_allclose(class_weights("median", counts), [median / 0.875, median / 0.25, 1])
    with pytest.raises(ValueError, match="Unknown class weights 'log'"):
        class_weights("log", counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["enet", "median"])
def test_the_loss_is_weighted(loaded: Backbone, streets: Stream, rule: Weighting) -> None:
    """Against torch's weighted mean, with weights counted in all augmented label maps."""
    bank = FeatureBank(loaded, streets, 2)
    strategy = Semantic(StrategyContext(bank, "head", options(class_weights=rule)))
    assert strategy.facts() == {}
    strategy.before_task(0)
    labels = bank.labelled(streets[0], "train").labels
    weights = class_weights(rule, count_pixels((labels[k] for k in range(10)), 11))
    assert strategy.facts()["class_weights"]["Vehicle"] == pytest.approx(weights[8])
    assert weights[8] != pytest.approx(weights[3], rel=0.01)
    batch = strategy.draw(Step(0, 0, 0, 2))
    loss, _ = strategy.forward(batch)
    logits = F.interpolate(strategy.module(batch.raw), (64, 64), mode="bilinear")
    expected = F.cross_entropy(
        logits, batch.labels, torch.from_numpy(weights).float(), ignore_index=255
    )
    torch.testing.assert_close(loss, expected)
    nothing = dataclasses.replace(batch, labels=torch.full_like(batch.labels, 255))
    assert strategy.forward(nothing)[0] == 0


def test_runs_from_before_class_weights_resume(
    make_trainer: MakeTrainer, streets: Stream, tmp_path: Path
) -> None:
    few = {"steps": 2, "batch_size": 2, "checkpoint_every": 1}
    folder = tmp_path / "semantic-head-0"
    plain = options(class_weights="none")
    make_trainer(tmp_path, **few).fit(streets, "semantic", method_options=plain)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["key"]["method_options"].pop("class_weights") == "none"
    assert checkpoint["key"]["method_options"].pop("features") == "sam"
    del checkpoint["result"]["method_options"], checkpoint["result"]["facts"]
    torch.save(checkpoint, folder / "checkpoint.pt")
    (folder / "run.json").unlink()
    weighted = options(class_weights="enet")
    with pytest.raises(ValueError, match="a run with another method_options"):
        make_trainer(tmp_path, **few).fit(streets, "semantic", method_options=weighted, resume=True)
    run = make_trainer(tmp_path, **few).fit(streets, "semantic", method_options=plain, resume=True)
    assert "class" in run.scores


def test_processes_divide_a_batch(loaded: Backbone, streets: Stream) -> None:
    strategy = Semantic(StrategyContext(FeatureBank(loaded, streets, 2), "head"))
    step = Step(0, 0, 1, 4)
    whole = strategy.draw(step)
    halves = [strategy.draw(Step(0, 0, 1, 4, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([half.labels for half in halves]), whole.labels)
    embeddings = torch.cat([half.raw.embedding for half in halves])
    assert torch.equal(embeddings, whole.raw.embedding)


def test_synchronised_norms_are_torchs_alone() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.BatchNorm2d(3)))
    own = synchronise(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.BatchNorm2d(3))))
    own.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(own(x), plain(x), rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(
    tiny_name: dict[str, Any], street: str, start_script: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = [
        *("--backbone", "tiny", "--checkpoint", tiny_name["checkpoint"], "--device", "cpu"),
        *("--stream", "camvid", "--data", street, "--method", "semantic", "--head", "pyramid"),
        *("--epochs", "2", "--batch-size", "4", "--views", "2", "--class-weights", "enet"),
    ]
    alone, together = tmp_path / "alone", tmp_path / "together"
    script = str(HERE / "train_tiny.py")
    finished = start_script(script, *arguments, "--out", str(together)).finish()
    assert finished.returncode == 0, finished
    main([*arguments, "--out", str(alone)])
    one, other = (
        load_file(out / "semantic-head-0" / "adapter.safetensors") for out in (alone, together)
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_mixed_precision(make_trainer: MakeTrainer, streets: Stream) -> None:
    few = {"steps": None, "batch_size": 2, "split": "val"}
    scores = [
        make_trainer(**few, precision=precision)
        .fit(streets, "semantic", method_options=options(epochs=4))
        .scores["class"]["iou"][0][0]
        for precision in ("32-true", "bf16-mixed")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=8.0)


def test_domains_in_turn(make_trainer: MakeTrainer, streets: Stream) -> None:
    domain = streets[0]
    both = Stream("both", (domain, Domain("again", False, domain.datasets)))
    run = make_trainer(steps=None, batch_size=2).fit(
        both, "semantic", method_options=options(epochs=1)
    )
    assert np.array(run.scores["class"]["iou"]).shape == (2, 2)
    assert run.summary("class")["forward_iou"] is None


def test_datasets_without_label_maps_have_a_background(
    make_trainer: MakeTrainer, loaded: Backbone
) -> None:
    stream = dataset_stream("scenes", length=3, size=64)
    bank = FeatureBank(loaded, stream, 1)
    sample = stream[0].split("train")[0]
    labels = bank.labelled(stream[0], "train").labels[0]
    background = len(stream[0].split("train").categories)
    np.testing.assert_array_equal(labels == background, ~sample.masks.any(axis=0))
    strategy = Semantic(StrategyContext(bank, "head"))
    scores = score_labels(strategy.model(), bank, stream[0], "test")
    assert 0 <= scores.iou.mean() < 1 and len(scores.iou) == len(scores.biou) > 1
    run = make_trainer(steps=1).fit(stream, "semantic")
    assert np.isfinite(run.scores["class"]["biou"]).all()


def test_commands(
    street: str, tiny_name: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sam = ["--backbone", "tiny", "--checkpoint", tiny_name["checkpoint"], "--device", "cpu"]
    data = ["--stream", "camvid", "--data", street]
    few = ["--epochs", "2", "--views", "1", "--split", "val"]
    out = tmp_path / "out"
    run = main([*sam, *data, "--method", "semantic", *few, "--out", str(out)])
    assert "semantic (head), IoU by class on val" in capsys.readouterr().out
    folder = out / "semantic-head-0"
    assert (folder / "class.png").is_file()
    path = folder / "adapter.safetensors"
    results = evaluate.main(["--adapter", str(path), *sam, *data, "--split", "val"])
    numbers = results["camvid"]["class"]
    assert numbers["adapted_iou"] == pytest.approx(run.scores["class"]["iou"][0][0], abs=0.2)
    with pytest.raises(ValueError, match="scenes has the classes .*the semantic head knows Sky"):
        evaluate.main(["--adapter", str(path), *sam, "--stream", "scenes", "--max-images", "1"])


def test_what_does_not_go_together(make_trainer: MakeTrainer, streets: Stream) -> None:
    with pytest.raises(ValueError, match="these methods cannot be combined"):
        STRATEGIES.get("semantic+er")
    with pytest.raises(ValueError, match="'semantic' does not go with tune='decoder'"):
        make_trainer().fit(streets, "semantic", "decoder")
    with pytest.raises(ValueError, match="'semantic' has no retention set"):
        make_trainer(retention=streets[0]).fit(streets, "semantic")
    other = Domain("other", False, dataset_stream("scenes", length=2, size=64)[0].datasets)
    with pytest.raises(ValueError, match="one semantic head for all"):
        make_trainer().fit(Stream("both", (streets[0], other)), "semantic")
