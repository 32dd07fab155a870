"""`semantic` end to end: its tables, its numbers by other means, and its points."""

import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter
from segment_anything import SamPredictor
from timm.models import save_for_hf

from agents import train_ppo
from benchmarks.run import main
from benchmarks.semantic import benchmark, heads
from benchmarks.semantic.agent import Trial, choose_threshold, corrected_labels
from benchmarks.semantic.heads import HeadResult, TrainedHead, gain
from benchmarks.semantic.points import POINTS, PointName
from benchmarks.semantic.zero_shot import ZeroShot, find_prompts
from sam_gym.backbones import Backbone
from sam_gym.data import make_dataset
from sam_gym.data.labelmaps import CAMVID
from sam_gym.mask_generation.generator import GeneratorOptions, MaskGenerator
from sam_gym.metrics.semantic import SemanticMetric, class_iou, confusion


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """A `camvid` folder: sky, road, and two cars, on three images of noise in each split."""
    root = tmp_path / "street"
    for folder in ("val", "valannot", "train", "trainannot"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = [("val", (48, 64)), ("val", (60, 80)), ("val", (64, 48))]
    for number, (split, (height, width)) in enumerate([*sizes, *(("train", (48, 64)),) * 3]):
        labels = np.zeros((height, width), np.uint8)
        labels[height // 2 :] = 3
        labels[-3:] = 11
        labels[height // 3 : 2 * height // 3, 4:24] = 8
        labels[height // 3 : height // 2, 30:38] = 8
        image = rng.integers(0, 60, (height, width, 3)) + 40 * labels[..., None] % 190
        Image.fromarray(image.astype(np.uint8)).save(root / f"{split}/{number}.png")
        Image.fromarray(labels).save(root / f"{split}annot/{number}.png")
    return root


def arguments(root: Path, checkpoint: str, out: Path, *more: str) -> list[str]:
    base = ["semantic", "--dataset", "camvid", "--data", str(root), "--checkpoint", checkpoint]
    base += ["--device", "cpu", "--out", str(out), "--pictures", "2"]
    return [*base, *([] if {"--heads", "--adapters"} & {*more} else ["--zero-shot"]), *more]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables_page_and_numbers(street: Path, micro_checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    returned = main(arguments(street, micro_checkpoint, out, "--save-labels"))
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    numbers = results["zero_shot"]
    assert (results["images"], numbers["prompts"], results["split"]) == (3, 9, "val")

    text = (out / "detailed_results.csv").read_text().splitlines()
    assert text[0] == "image,class,iou,point_x,point_y"
    rows = table(out / "detailed_results.csv")
    assert [row["image"] for row in rows] == [f"{k}.png" for k in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert [row["class"] for row in rows[:3]] == ["Sky", "Road", "Vehicle"]
    summary = table(out / "summary.csv")
    assert list(summary[0]) == ["class", "mean_iou"]
    for own in summary:
        mean = np.mean([float(row["iou"]) for row in rows if row["class"] == own["class"]])
        assert float(own["mean_iou"]) == pytest.approx(mean, abs=1e-5)
    means = [float(own["mean_iou"]) for own in summary]
    assert np.mean(means) == pytest.approx(numbers["mean_prompt_iou"], abs=1e-5)

    # Everything else again from the saved label maps.
    counts: Any = 0
    for number in range(3):
        saved = np.array(Image.open(out / f"labels/{number}.png"))
        truth = np.array(Image.open(street / f"valannot/{number}.png"))
        saved[saved == 11] = truth[truth == 11] = 255
        counts = counts + confusion(saved, truth, 11)
    written = table(out / "confusion.csv")
    assert [*written[0]] == ["class", *CAMVID, "void"]
    np.testing.assert_array_equal(
        [[int(value) for value in list(row.values())[1:]] for row in written], counts
    )
    union = counts.sum(axis=1) + counts[:, :-1].sum(axis=0) - np.diag(counts)
    present = np.flatnonzero(union)
    ious = np.diag(counts)[present] / union[present]
    assert numbers["mean_iou"] == pytest.approx(ious.mean())
    assert numbers["pixel_accuracy"] == pytest.approx(np.trace(counts) / counts.sum())

    vehicle = next(row for row in results["classes"] if row["class"] == "Vehicle")
    bounds = []
    for number in range(3):
        mask = np.array(Image.open(street / f"valannot/{number}.png")) == 8
        areas = cv2.connectedComponentsWithStats(mask.astype(np.uint8))[2][1:, cv2.CC_STAT_AREA]
        assert len(areas) == 2
        bounds.append(areas.max() / areas.sum())
    assert vehicle["bound"] == pytest.approx(np.mean(bounds))

    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 and "cannot exceed it" in page
    assert len(list((out / "pictures").iterdir())) == 2
    with pytest.raises(FileExistsError):
        main(arguments(street, micro_checkpoint, out))


def test_a_second_run_writes_the_same_bytes(
    street: Path, micro_checkpoint: str, tmp_path: Path
) -> None:
    names = ("detailed_results.csv", "summary.csv", "confusion.csv")
    contents = []
    for number, point in enumerate(["random", "random"]):
        out = tmp_path / str(number)
        main(arguments(street, micro_checkpoint, out, "--point", point, "--no-boundary"))
        contents.append([(out / name).read_bytes() for name in names])
    assert contents[0] == contents[1]


def test_masks_are_those_of_the_published_loop(street: Path, tiny: Backbone) -> None:
    dataset = make_dataset("camvid", "val", root=str(street))
    predictor = SamPredictor(tiny.private_copy())
    zero_shot = ZeroShot(dataset, tiny, point="seed", per="class", seed=0, batch_size=2)
    segmented = list(zero_shot.segment(range(3)))
    assert [own.name for own, _ in segmented] == ["0.png", "1.png", "2.png"]
    for (_, _, image, truth, prompts), outcome in segmented:
        best: np.ndarray = np.zeros(truth.shape)
        labels = np.full(truth.shape, 255)
        for prompt, value in zip(prompts, outcome.ious, strict=True):
            mask = truth == prompt.category
            distance = distance_transform_edt(mask)
            y, x = np.unravel_index(distance.argmax(), distance.shape)
            assert prompt.point == (x, y)
            predictor.set_image(image)
            logits, scores, _ = predictor.predict(
                np.array([[x, y]]), np.array([1]), multimask_output=True, return_logits=True
            )
            found = logits[scores.argmax()]
            union = ((found > 0) | mask).sum()
            assert value == pytest.approx(((found > 0) & mask).sum() / union, abs=2e-3)
            labels[found > best] = prompt.category
            best = np.maximum(best, found)
        assert (labels == outcome.labels).mean() > 0.999


def test_one_point_per_instance(street: Path, micro_checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = main(
        arguments(street, micro_checkpoint, out, "--per", "instance", "--point", "inner")
    )
    rows = table(out / "detailed_results.csv")
    dataset = make_dataset("camvid", "val", root=str(street))
    assert len(rows) == sum(len(dataset[index].masks) for index in range(3))
    assert results["zero_shot"]["mean_bound"] == 1.0
    assert "cannot exceed it" not in (out / "report.html").read_text()


def test_rooms_by_default(micro_checkpoint: str, tmp_path: Path) -> None:
    options = ["--max-images", "2", "--pictures", "1", "--checkpoint", micro_checkpoint]
    options += ["--epochs", "1", "--augmentations", "1", "--train-images", "2", "--device", "cpu"]
    results = main(["semantic", *options, "--out", str(tmp_path / "out")])
    assert (results["dataset"], results["images"]) == ("rooms", 2)
    assert 0 <= results["heads"]["seed"]["mean_iou"] < results["zero_shot"]["mean_iou"]
    background = results["classes"][-1]
    assert (background["class"], background["prompts"]) == ("background", 0)
    assert background["iou"] is not None
    with pytest.raises(ValueError, match="--save-labels: dataset 'rooms' has no label files"):
        main(["semantic", *options, "--out", str(tmp_path / "labels"), "--save-labels"])


def test_groups_of_classes(street: Path, micro_checkpoint: str, tmp_path: Path) -> None:
    root = tmp_path / "maps"
    root.mkdir()
    (street / "val").rename(root / "images")
    (street / "valannot").rename(root / "labels")
    classes = {"classes": ["sky", "road", "car"], "ids": [0, 3, 8], "void_id": 11}
    classes["groups"] = ["up", "down", "down"]
    (root / "classes.json").write_text(json.dumps(classes))
    out = tmp_path / "out"
    options = ["--dataset", "labelmaps", "--split", "all", "--no-boundary"]
    numbers = main(arguments(root, micro_checkpoint, out, *options))["zero_shot"]
    assert list(numbers["categories"]) == ["up", "down"]
    assert numbers["mean_category_iou"] == pytest.approx(np.mean([*numbers["categories"].values()]))
    assert "mean_boundary_iou" not in numbers


def test_speed_is_compared_on_the_same_masks(
    street: Path, micro_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--speed-images", "2", "--speed-repeats", "1", "--no-boundary"]
    results = main(arguments(street, micro_checkpoint, tmp_path / "out", *options))
    speed = results["speed"]
    assert (speed["images"], speed["points"]) == (2, 6)
    assert speed["ratio"] == speed["reference_seconds"] / speed["ours_seconds"] > 1
    assert speed["min_iou_of_masks"] > 0.99
    monkeypatch.setattr(benchmark, "SAME", 1.1)
    with pytest.raises(RuntimeError, match="The sides disagree"):
        main(arguments(street, micro_checkpoint, tmp_path / "other", *options))


def test_heads_are_compared_on_features_of_timm(
    street: Path, micro_checkpoint: str, tmp_path: Path
) -> None:
    saved = tmp_path / "lite"
    save_for_hf(timm.create_model("test_efficientnet"), str(saved), safe_serialization=True)
    options = ["--features", "sam", f"timm:local-dir:{saved}", "--heads", "seed", "--epochs", "1"]
    options += ["--augmentations", "1", "--no-boundary", "--pictures", "0"]
    results = main(arguments(street, micro_checkpoint, tmp_path / "out", *options))
    first, second = results["heads"]
    assert first == "seed" and second.startswith("seed_timm_") and second.endswith("lite")
    sizes = [numbers["parameters"] for numbers in results["heads"].values()]
    assert sizes[0] > sizes[1]  # the maps of timm's model have half the channels


def test_heads_are_a_second_phase(street: Path, micro_checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--heads", "seed", "pyramid", "--no-tiles", "--epochs", "2", "--augmentations", "1"]
    results = main(arguments(street, micro_checkpoint, out, *options, "--save-labels"))
    assert list(results["heads"]) == ["seed", "pyramid"]
    for name, numbers in results["heads"].items():
        assert numbers["parameters"] > 1e5 and numbers["training_seconds"] > 0
        counts: Any = 0
        for number in range(3):
            saved = np.array(Image.open(out / f"labels_{name}/{number}.png"))
            truth = np.array(Image.open(street / f"valannot/{number}.png"))
            truth[truth == 11] = 255
            counts = counts + confusion(saved, truth, 11)
        written = [list(row.values())[1:] for row in table(out / f"confusion_{name}.csv")]
        np.testing.assert_array_equal(np.array(written, int), counts)
        union = counts.sum(axis=1) + counts[:, :-1].sum(axis=0) - np.diag(counts)
        present = union > 0
        ious = np.diag(counts)[present] / union[present]
        assert numbers["mean_iou"] == pytest.approx(ious.mean())
        rows = {row["class"]: row for row in table(out / "phases.csv")}
        assert float(rows["mean"][f"{name}_iou"]) == pytest.approx(ious.mean(), abs=1e-5)
    page = (out / "report.html").read_text()
    assert "IoU, pyramid head" in page and "zero-shot, seed head, pyramid head" in page

    # A trained head is measured without training it again.
    path = out / "heads/pyramid/semantic-head-0/adapter.safetensors"
    again = main(arguments(street, micro_checkpoint, tmp_path / "b", "--adapters", str(path)))
    own = again["heads"]["semantic-head-0"]
    assert own["mean_iou"] == results["heads"]["pyramid"]["mean_iou"]
    assert own["training_seconds"] is None
    with pytest.raises(ValueError, match=r"its classes are not those of rooms \(its own: Sky"):
        main(["semantic", "--adapters", str(path), "--out", str(tmp_path / "c")])
    with pytest.raises(ValueError, match="--split train holds training images"):
        main(arguments(street, micro_checkpoint, tmp_path / "d", *options, "--split", "train"))


def test_votes_within_masks(
    street: Path,
    tiny_checkpoint: str,
    build_tiny: Callable[[], Any],
    add_backbone: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_backbone("tiny", build=build_tiny, thresholds=(0.0, 0.0))
    few = partial(MaskGenerator, options=GeneratorOptions(grid=(8, 8)))
    monkeypatch.setattr(heads, "MaskGenerator", few)
    out = tmp_path / "out"
    options = ["--heads", "seed", "--epochs", "1", "--augmentations", "1", "--vote"]
    options += ["--backbone", "tiny", "--save-labels"]
    results = main(arguments(street, tiny_checkpoint, out, *options))
    assert list(results["heads"]) == ["seed", "seed_masks"]
    one, voted = (results["heads"][name] for name in ("seed", "seed_masks"))
    for key, (value, low, high) in results["gains"]["seed_masks"].items():
        assert value == pytest.approx(voted[key] - one[key]) and low <= high
    assert "Gain of seed_masks over the head alone" in (out / "report.html").read_text()
    alone, masked = (
        np.array(Image.open(out / f"labels_{name}/0.png")) for name in ("seed", "seed_masks")
    )
    assert (alone != masked).any()


def test_an_agent_corrects_a_head(
    street: Path,
    tiny_env: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = (street, tiny_env["checkpoint"])
    model = ["--checkpoint", tiny_env["checkpoint"], "--backbone", "tiny"]
    heads = ["--heads", "seed", "--epochs", "1", "--augmentations", "1", "--no-boundary", *model]
    # A head that is wrong in places, which the agent changes.
    heads += ["--class-weights", "none", "--pictures", "0"]
    main(arguments(*tiny, tmp_path / "a", *heads))
    adapter = str(tmp_path / "a/heads/seed/semantic-head-0/adapter.safetensors")
    own = ["--dataset", "camvid", "--data", str(street), *model]
    own += ["--adapter", adapter, "--device", "cpu", "--total-timesteps", "16", "--n-steps", "4"]
    own += ["--num-envs", "4", "--max-steps", "2", "--final-episodes", "2", "--no-pictures"]
    own += ["--initial-mask", "semantic", "--out", str(tmp_path / "b")]
    train_ppo.main(own)
    # The default; a search makes correctors worse.
    assert json.loads((tmp_path / "b/results.json").read_text())["config"]["search"] == 0
    agent = ["--agent", str(tmp_path / "b/policy.zip")]
    out = tmp_path / "out"
    all_masks = ["--adapters", adapter, "--agent-images", "0"]
    results = main(arguments(*tiny, out, *model, *agent, *all_masks, "--save-labels"))
    head, corrected = results["heads"].values()
    assert list(results["heads"]) == ["semantic-head-0", "semantic-head-0_agent"]
    value, low, high = results["gains"]["semantic-head-0_agent"]["mean_iou"]
    assert value == pytest.approx(corrected["mean_iou"] - head["mean_iou"]) and low <= high
    before, after = (
        np.array(Image.open(out / f"labels_semantic-head-0{suffix}/0.png"))
        for suffix in ("", "_agent")
    )
    assert (before != after).any()
    rows = results["agent"]
    assert [row["class"] for row in rows] == list(CAMVID)
    assert all(row["accepted"] == row["proposed"] and "threshold" not in row for row in rows)
    assert sum(row["proposed"] for row in rows) > 0

    # Masks that do not raise mean IoU on the training images are not accepted.
    capsys.readouterr()
    careful = main(arguments(*tiny, tmp_path / "f", *model, *agent, "--adapters", adapter))
    assert "Masks of the agent" in capsys.readouterr().out
    for row, own in zip(careful["agent"], rows, strict=True):
        assert row["proposed"] == own["proposed"]
        assert 0 <= row["train_best"] <= row["train_proposed"] <= 3
        useful = row["train_gain"] is not None and row["train_gain"][1] > 0
        assert (row["threshold"] is not None) == useful
        assert row["accepted"] == 0 or useful
    assert "chosen on images of the training split" in (tmp_path / "f/report.html").read_text()
    with pytest.raises(ValueError, match="chosen on training images. Measure on val or test"):
        main(arguments(*tiny, tmp_path / "g", *model, *agent, *all_masks[:2], "--split", "train"))
    other = ["--agent", "implicit", "--adapters", adapter]
    with pytest.raises(ValueError, match="it begins with empty masks"):
        main(arguments(*tiny, tmp_path / "c", *model, *other))
    only = ["--agent-classes", "Tree", "--adapters", adapter]
    same = main(arguments(*tiny, tmp_path / "e", *model, *agent, *only, "--pictures", "0"))
    assert same["gains"]["semantic-head-0_agent"]["mean_iou"] == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="pass that adapter as --adapters"):
        main(arguments(*tiny, tmp_path / "d", *model, *agent))


def test_corrected_labels_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.normal(size=(4, 6, 7))
        chosen = rng.choice(4, rng.integers(0, 5), replace=False).tolist()
        masks = {number: rng.random((6, 7)) < rng.uniform(0.1, 0.9) for number in chosen}
        before = logits.argmax(axis=0)
        layers = [masks.get(number, before == number) for number in range(4)]
        sizes = [int(own.sum()) for own in layers]
        if len({*sizes}) < 4:
            continue
        found = corrected_labels(logits, masks)
        for y, x in np.ndindex(6, 7):
            over = [number for number in range(4) if layers[number][y, x]]
            left = [number for number in range(4) if number not in masks]
            if over:
                expected = min(over, key=lambda number: sizes[number])
            elif left:
                expected = max(left, key=lambda number: logits[number, y, x])
            else:
                expected = before[y, x]
            assert found[y, x] == expected


def test_thresholds_are_the_best_of_all() -> None:
    """Against all thresholds in turn, with scores that occur several times."""
    rng = np.random.default_rng(0)
    chosen = []
    for help_of_good in (0, 0, 60, 60, 60):
        counts = rng.integers(50, 99, (12, 3, 4))
        trials = []
        for image in rng.choice(12, 10, replace=False).tolist():
            score = round(float(rng.random()), 1)
            change = np.zeros((3, 4), np.int64)
            moved = int(rng.integers(-40, 9)) + (help_of_good if score > 0.5 else 0)
            change[0, 0], change[0, 1] = moved, -moved
            trials.append(Trial(image, score, change))
        found = choose_threshold(counts, trials, 0)
        assert found.proposed == 10
        scores = {}
        for threshold in (2.0, *(trial.score for trial in trials)):
            total = counts.sum(axis=0)
            for trial in trials:
                total = total + trial.change * (trial.score >= threshold)
            scores[threshold] = float(class_iou(total).mean())
        best = max(scores, key=scores.__getitem__)
        if found.gain is None:
            assert best == 2.0 and found.threshold is None and found.best == 0
        else:
            assert found.gain[0] == pytest.approx(scores[best] - scores[2.0])
            assert found.best == sum(trial.score >= best for trial in trials)
            assert found.threshold == (best if found.gain[1] > 0 else None)
        chosen.append(found.threshold)
    assert None in chosen[:2] and 0.6 in chosen[2:]
    assert choose_threshold(counts, [], 0).threshold is None


def test_gains_of_the_same_scores_are_zero() -> None:
    rng = np.random.default_rng(0)
    metric = SemanticMetric(["a", "b"])
    results = []
    for worse in (0, 40):
        result = HeadResult(TrainedHead("head", list, 1, None), metric, keep=True)
        for _ in range(12):
            right, wrong = rng.integers(50, 99, 2), worse + rng.integers(0, 9, 2)
            result.images.append(np.array([[right[0], wrong[0], 0], [wrong[1], right[1], 0]]))
        results.append(result)
    good, bad = results
    assert gain(good, good, 0) == {"mean_iou": [0.0, 0.0, 0.0]}
    value, low, high = gain(good, bad, 0)["mean_iou"]
    assert 0 < low < value < high
    counts = [sum(own.images) for own in results]
    assert value == pytest.approx(class_iou(counts[0]).mean() - class_iou(counts[1]).mean())


def blob(rng: np.random.Generator) -> np.ndarray:
    noise = gaussian_filter(rng.normal(size=(30, 41)), rng.uniform(0.5, 4.0))
    return noise > np.quantile(noise, rng.uniform(0.1, 0.9))


def exact(mask: np.ndarray, border: bool) -> tuple[int, int]:
    """The point by scipy; squared distances are whole numbers."""
    distance = distance_transform_edt(np.pad(mask, int(border)))
    squared = np.rint(distance**2)[1:-1, 1:-1] if border else np.rint(distance**2)
    y, x = np.unravel_index(squared.argmax(), squared.shape)
    return int(x), int(y)


def test_points_against_scipy() -> None:
    rng = np.random.default_rng(0)
    masks: Sequence[np.ndarray] = [blob(rng) for _ in range(40)] + [np.ones((30, 41), bool)]
    differ = 0
    for mask in masks:
        seed, inner = POINTS["seed"](mask, rng), POINTS["inner"](mask, rng)
        assert seed == exact(mask, border=False) and inner == exact(mask, border=True)
        differ += seed != inner
        for _ in range(3):
            x, y = POINTS["random"](mask, rng)
            assert mask[y, x]
    assert differ > 10


@pytest.mark.parametrize("point", ["seed", "inner", "random"])
def test_points_depend_on_the_image_and_the_seed_only(point: PointName, street: Path) -> None:
    dataset = make_dataset("camvid", "val", root=str(street))
    sample = dataset[1]
    found = [
        [prompt.point for prompt in find_prompts(sample, sample.label_map(11), 11, point, per, 3)]
        for per in ("class", "class", "instance")
    ]
    assert found[0] == found[1] and len(found[0]) == 3 and len(found[2]) == 4
