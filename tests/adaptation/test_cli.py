"""The command lines: what they write, and what wrong input is told."""

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from adaptation import evaluate, train
from adaptation.options import stream_help
from adaptation.strategy import STRATEGIES
from sam_gym.backbones import load_backbone
from sam_gym.backbones.adapters.tuning import TUNINGS, tune_help
from sam_gym.data import DATASETS
from sam_gym.data.streams import STREAMS
from sam_gym.utils import cli

METHODS = STRATEGIES.names()
MEASURES = ("last_iou", "avg_iou", "ff_iou", "forward_iou", "last_biou", "avg_biou", "ff_biou")


@pytest.fixture
def sam(tiny_name: dict[str, Any]) -> list[str]:
    return ["--backbone", "tiny", "--checkpoint", tiny_name["checkpoint"], "--device", "cpu"]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two domains of files: bright squares on dark ground, and the other way round."""
    roots = []
    for name, (ground, colour) in {"dark": (30, 220), "light": (220, 30)}.items():
        root = tmp_path / name
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True)
        stems = [f"{split}{k}" for split in ("train", "val", "test") for k in range(2)]
        for number, stem in enumerate(stems):
            mask = np.zeros((64, 80), np.uint8)
            mask[10 + number : 40, 20 : 50 + number] = 255
            image = np.where(mask[..., None] > 0, colour, ground).astype(np.uint8).repeat(3, 2)
            cv2.imwrite(str(root / "images" / f"{stem}.png"), image)
            cv2.imwrite(str(root / "masks" / f"{stem}.png"), mask)
        splits = {split: [f"{split}{k}" for k in range(2)] for split in ("train", "val", "test")}
        (root / "splits.json").write_text(json.dumps(splits))
        roots.append(str(root))
    return roots


def test_train_and_evaluate(
    sam: list[str],
    folders: list[str],
    tiny_name: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    few = ["--steps", "2", "--batch-size", "2", "--views", "2", "--selector-steps", "2"]
    run = train.main(
        [
            *(*sam, *few, "--method", "moda", "--data", *folders, "--order", "light,dark"),
            *("--prompts", "box", "click", "--split", "val", "--out", str(out)),
        ]
    )
    assert run.domains == ("light", "dark")
    folder = out / "moda-decoder-0"
    assert f"Everything is in {folder}" in capsys.readouterr().out
    written = {path.name for path in folder.iterdir()}
    assert written == {
        *("adapter.safetensors", "checkpoint.pt", "run.json", "tensorboard"),
        *("box.png", "click.png"),
    }
    saved = json.loads((folder / "run.json").read_text())
    assert saved["scores"] == run.scores and set(saved["zero_shot"]) == {"box", "click"}
    assert saved["settings"]["steps"] == 2 and {"commit", "versions", "backbone"} <= set(saved)
    assert saved["kept_bytes"] > 0 and 0 <= saved["routed"] <= 1 and saved["seconds"] > 0
    numbers = run.summary("click")
    assert set(MEASURES) <= set(numbers)
    assert all(np.isfinite(numbers[name]) for name in MEASURES)  # type: ignore[arg-type]

    path = str(folder / "adapter.safetensors")
    adapted = load_backbone(**tiny_name, adapter=path)
    assert adapted.adapter is not None and adapted.adapter.domains == ["light", "dark"]
    report = tmp_path / "numbers.json"
    results = evaluate.main(
        [
            *(*sam, "--adapter", path, "--data", *folders, "--prompts", "box", "click"),
            *("--split", "val", "--out", str(report)),
        ]
    )
    assert json.loads(report.read_text()) == results
    assert set(results) == {"dark", "light"}
    # The last stage of the training has measured the same.
    for prompt in ("box", "click"):
        for name, value in zip(run.domains, run.scores[prompt]["iou"][-1], strict=True):
            assert results[name][prompt]["adapted_iou"] == pytest.approx(value, abs=0.02)
            assert results[name][prompt]["objects"] == 2
        for name, value in zip(run.domains, run.zero_shot[prompt]["biou"], strict=True):
            assert results[name][prompt]["zero_shot_biou"] == pytest.approx(value, abs=0.02)


def test_names_in_the_help_are_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for module in (train, evaluate):
        with pytest.raises(SystemExit) as caught:
            module.main(["--help"])
        assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in (*METHODS, *TUNINGS.names()):
        assert name in shown or name == "zero_shot"
    assert stream_help() in shown and "(default: None): " not in shown
    listed = set(re.findall(r"[\w-]+", stream_help()))
    assert {*STREAMS.names(), *DATASETS.names()} <= listed | {"domain"}
    assert "coco, coco-panoptic, entities" in stream_help()
    assert not re.search(r"\(default: [^()]*\)\.? \(default:", shown)


def test_help_lists_methods_and_tune_targets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert train.method_help() in shown and tune_help("Tune target") in shown


def images_without_masks(root: Path) -> str:
    (root / "bare" / "images").mkdir(parents=True)
    return str(root / "bare")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "mda"], "Did you mean 'moda'"),
        (["--tune", "decodr"], "Did you mean 'decoder'"),
        (["--method", "l2p", "--tune", "hq"], "does not go with tune='hq'"),
        (["--domains", "cels"], "Did you mean 'cells'"),
        (["--stream", "foldrs"], "Did you mean 'folders'"),
        (["--order", "cells"], "order lacks"),
        (["--data", "nowhere"], "nowhere: the folder does not exist"),
        (["--data", "x", "--domains", "cells"], "--domains chooses procedural domains"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate must be a finite number"),
        (["--method", "ewc", "--ewc-weight", "-1"], "--ewc-weight must be at least 0"),
        (["--checkpoint", "nothing.pth"], "nothing.pth"),
        (["--backbone", "mikro"], "Did you mean 'micro'"),
        (["--retention", "nowhere"], "nowhere"),
        (["--stream", "scenes", "--data", "x"], "'scenes' reads no files.*leave out --data"),
    ],
)
def test_wrong_values_are_named(
    sam: list[str], arguments: list[str], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        train.main([*sam, *arguments, "--out", str(out)])
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_folders_that_are_no_domains_are_named(sam: list[str], tmp_path: Path) -> None:
    bare = images_without_masks(tmp_path)
    with pytest.raises(FileNotFoundError, match="bare: found images. A domain is a folder with"):
        train.main([*sam, "--data", bare, "--out", str(tmp_path / "out")])


def test_evaluate_refuses_what_does_not_fit(sam: list[str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a.safetensors: no such adapter file"):
        evaluate.main([*sam, "--adapter", str(tmp_path / "a.safetensors")])
    with pytest.raises(SystemExit):
        evaluate.main([*sam, "--adapter", "x", "--prompts", "boxx"])


def test_a_wrong_command_ends_with_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^error: Unknown method 'mda'\. .*zero_shot\.$"):
        cli.run(lambda: train.main(["--method", "mda"]))


def test_a_dataset_without_splits_is_refused_or_split_by_seed(
    sam: list[str], squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--steps", "1", "--batch-size", "2", "--augmentations", "1", "--out", str(tmp_path)]
    one = ["--dataset-kwargs", "annotations", str(squares / "all.json")]
    coco = [*sam, *few, "--stream", "coco", "--data", str(squares)]
    for command in ([*coco, *one], [*sam, *few, "--stream", "folder", "--data", str(squares)]):
        with pytest.raises(ValueError, match="12 of 12 images of split 'val' are training images"):
            train.main(command)
    result = train.main([*coco, *one, "split_seed", "1", "--method", "naive"])
    assert result.split == "test"
    with pytest.raises(ValueError, match="Unknown option of stream 'scenes-domains' 'annotations'"):
        train.main([*sam, *few, *one])


def test_coco_is_evaluated_on_val(
    sam: list[str], squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """COCO has no annotated test split."""
    data = json.loads((squares / "all.json").read_text())
    for split, images in {"train": data["images"][:8], "val": data["images"][8:]}.items():
        own = [a for a in data["annotations"] if a["image_id"] in {i["id"] for i in images}]
        path = squares / f"instances_{split}.json"
        path.write_text(json.dumps(data | {"images": images, "annotations": own}))
    coco = [*sam, "--stream", "coco", "--data", str(squares), "--objects-per-image", "2"]
    few = ["--steps", "1", "--batch-size", "2", "--augmentations", "1", "--method", "saom_v1"]
    result = train.main([*coco, *few, "--out", str(tmp_path)])
    assert result.split == "val" and "on val" in capsys.readouterr().out
    folder = tmp_path / "saom_v1-decoder-0"
    assert json.loads((folder / "run.json").read_text())["split"] == "val"
    numbers = evaluate.main([*coco, "--adapter", str(folder / "adapter.safetensors")])
    assert numbers["coco"]["box"]["objects"] == 4
    assert "The adapter was trained on" not in capsys.readouterr().out
    other = ["--stream", "scenes", "--max-images", "1"]
    evaluate.main([*sam, *other, "--adapter", str(folder / "adapter.safetensors")])
    assert "The adapter was trained on coco, not on scenes:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="retention"):
        train.main([*coco, *few, "--retention", str(retention_of_training_images(squares))])


def retention_of_training_images(squares: Path) -> Path:
    root = squares.parent / "retention"
    root.mkdir()
    (root / "images").symlink_to(squares / "images")
    (root / "instances_val.json").write_bytes((squares / "instances_train.json").read_bytes())
    return root


def test_a_run_is_replaced_on_request_only(sam: list[str], tmp_path: Path) -> None:
    few = ["--domains", "night", "--max-images", "1", "--steps", "1", "--batch-size", "2"]
    command = [*sam, *few, "--augmentations", "1", "--out", str(tmp_path)]
    train.main([*command, "--prompts", "box", "click"])
    folder = tmp_path / "naive-decoder-0"
    before = (folder / "run.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a finished run \(run.json\).*--overwrite"):
        train.main([*command, "--learning-rate", "0.1"])
    (folder / "run.json").rename(folder / "moved.json")
    with pytest.raises(FileExistsError, match="unfinished run. Pass --resume .*--overwrite"):
        train.main(command)
    assert (folder / "moved.json").read_bytes() == before
    with pytest.raises(ValueError, match="pass one of them"):
        train.main([*command, "--overwrite", "--resume"])
    train.main([*command, "--learning-rate", "0.1", "--overwrite"])
    assert (folder / "run.json").read_bytes() != before
    assert not (folder / "click.png").exists() and (folder / "box.png").exists()
    assert len(list((folder / "tensorboard").iterdir())) == 1
    with pytest.raises(ValueError, match=r"run.json is a file: name a folder"):
        train.main([*command[:-1], str(folder / "run.json")])


def test_evaluate_refuses_a_folder_before_it_works(tmp_path: Path) -> None:
    for out in (str(tmp_path), f"{tmp_path}/new/"):
        with pytest.raises(
            ValueError, match=r"--out .*: this is a folder\. Pass the path of a file"
        ):
            evaluate.main(["--adapter", "nowhere.safetensors", "--out", out])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        evaluate.main(["--adapter", "nowhere.safetensors", "--out", f"{tmp_path}/file/a.json"])
    with pytest.raises(ValueError, match="--prompts is empty"):
        evaluate.main(["--adapter", "nowhere.safetensors", "--prompts"])
    command = ["--adapter", "nowhere.safetensors", "--out", f"{tmp_path}/file"]
    with pytest.raises(FileExistsError, match="file exists. Pass --overwrite"):
        evaluate.main(command)
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        evaluate.main([*command, "--overwrite"])
