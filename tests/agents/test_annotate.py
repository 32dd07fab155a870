"""Annotating a folder: COCO that pycocotools scores, broken files, interrupted runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from stable_baselines3 import PPO

from agents.annotate import AnnotateConfig, annotate, main
from agents.annotation import clicks as module
from agents.annotation import everything as annotate_everything
from agents.annotation import semantic
from agents.annotation.clicks import ClickAnnotator
from agents.evaluate import PolicyAgent
from agents.export import ExportablePolicy
from agents.policies.everything import EverythingPolicy
from agents.policies.implicit import ImplicitPolicy
from agents.policies.saved import SHIPPED
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from agents.presence import PresenceConfig, calibrate
from sam_gym.backbones import Backbone
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.class_head import ClassHead
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.adapters.semantic_head import SEMANTIC_HEADS
from sam_gym.data import make_dataset
from sam_gym.data.options import DatasetOptions
from sam_gym.envs.click import ClickCore, SamSegConfig
from sam_gym.envs.everything import EverythingConfig
from sam_gym.mask_generation.generator import GeneratorOptions, MaskGenerator

SCENES = 3


@pytest.fixture
def policy(tiny_env: dict, tmp_path: Path) -> str:
    """An untrained policy that may stop."""
    settings = SamSegConfig(**(tiny_env | {"stop": True, "max_steps": 3}))
    vector, core = make_vector_env("SamSeg-v0", 2, settings)
    backbone = {"name": "tiny", "checkpoint": tiny_env["checkpoint"], "device": "cpu"}
    names = list(core.dataset.categories)
    features = {"backbone": backbone, "vocabulary": names, "categories": names, "max_steps": 3}
    kwargs = {"features": features, "grid": 16, "others": ["stop"]}
    model = PPO(ImplicitPolicy, VectorEnvAdaptor(vector), policy_kwargs=kwargs, seed=0)
    model.save(tmp_path / "policy.zip")
    vector.close()
    return str(tmp_path / "policy.zip")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three scenes of different sizes, one in a folder within, a broken file and a text."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    scenes = make_dataset("scenes", "test", length=SCENES, size=128)
    for number, name in enumerate(("a.png", "b.jpg", "more/c.png")):
        image = scenes[number].image[: 128 - 30 * number]
        cv2.imwrite(str(root / name), image[..., ::-1])
    (root / "broken.jpg").write_bytes((root / "b.jpg").read_bytes()[:700])
    cv2.imwrite(str(root / "thin.png"), np.full((1, 3000), 99, np.uint8))
    (root / "notes.txt").write_text("no image")
    return root


def config(policy: str, photos: Path, **more: Any) -> AnnotateConfig:
    out = str(photos.parent / "out" / "annotations.json")
    settings: dict[str, Any] = {
        "categories": "star, ring",
        "out": out,
        "num_envs": 4,
        "device": "cpu",
    }
    settings |= {"min_score": -99.0} | more
    return AnnotateConfig(policy=policy, images=str(photos), **settings)


def test_the_file_is_coco_and_can_be_scored(
    policy: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = annotate(config(policy, photos))
    out = photos.parent / "out"
    printed = capsys.readouterr().out
    assert "skipped broken.jpg" in printed and "2 files skipped" in printed
    assert "skipped thin.png: 3000 x 1 pixels are too thin" in printed
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.jpg", "more/c.png"]
    assert {c["name"] for c in content["categories"]} == {"star", "ring"}
    assert 0 < len(content["annotations"]) <= 6 and not list(out.glob("*.partial*"))
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for annotation in content["annotations"]:
        mask = rle.decode(annotation["segmentation"])
        assert list(mask.shape) == sizes[annotation["image_id"]]
        assert annotation["area"] == mask.sum() and 0 <= annotation["clicks"] <= 3
    pictures = sorted(path.name for path in (out / "annotations_overlays").iterdir())
    assert len(pictures) == len(content["annotations"]) and "a.png__star.jpg" in pictures

    # Scored against itself, every mask is found: the file is as COCOeval wants it, on both sides.
    truth = COCO(str(out / "annotations.json"))
    found = truth.loadRes(content["annotations"])
    evaluation = COCOeval(truth, found, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_bundled_agents_are_said_to_know_drawn_scenes(
    policy: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = "The bundled agents learned from drawn scenes"
    annotate(config(policy, photos, overwrite=True))
    assert hint not in capsys.readouterr().out
    monkeypatch.setitem(SHIPPED, "tiny_agent", Path(policy))
    annotate(config("tiny_agent", photos, overwrite=True))
    assert hint in capsys.readouterr().out


def test_a_search_decodes_for_episodes_that_go_on(
    policy: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = PolicyAgent.load(policy, "cpu")
    annotator = ClickAnnotator(agent, ["star", "ring"], 4, min_score=-99.0)
    playing: list[list[int]] = []

    def act(core: ClickCore, observations: dict[str, Any]) -> np.ndarray:
        # Where `best_clicks` would decode. The second episode stops at its second step.
        playing.append(core.playing().tolist())
        stop = core.action_space.n - 1
        return np.array([0, stop if len(playing) == 2 else 1, 2, 3])

    monkeypatch.setattr(agent, "act", act)
    image = cv2.imread(str(photos / "b.jpg"))[..., ::-1]
    items = [(("b.jpg", category), image) for category in (0, 1)]
    found = [item.annotations[0]["clicks"] for item in annotator.stream(iter(items))]
    assert playing == [[0, 1], [0, 1], [0]] and found == [3, 1]


def test_masks_are_those_of_the_agent_alone(policy: str, photos: Path) -> None:
    content = annotate(config(policy, photos, overlays="none"))
    assert not (photos.parent / "out" / "annotations_overlays").exists()
    agent = PolicyAgent.load(policy, "cpu")
    alone = ClickAnnotator(agent, ["star", "ring"], 1, min_score=-99.0)
    image = cv2.imread(str(photos / "b.jpg"))[..., ::-1]
    (item,) = alone.stream(iter([(("b.jpg", 1), image)]))
    (expected,) = item.annotations
    assert item.draw is not None
    picture = item.draw()
    ids = {image["file_name"]: image["id"] for image in content["images"]}
    ring = next(c["id"] for c in content["categories"] if c["name"] == "ring")
    found = [
        annotation
        for annotation in content["annotations"]
        if (annotation["image_id"], annotation["category_id"]) == (ids["b.jpg"], ring)
    ]
    assert len(found) == 1 and picture.dtype == np.uint8
    assert found[0]["segmentation"] == expected["segmentation"]
    assert found[0]["clicks"] == expected["clicks"]


def test_an_interrupted_run_resumes(
    policy: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = dict(annotate(config(policy, photos, num_envs=2)))
    set_targets, calls = module.ClickCore.set_targets, []

    def dying(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        set_targets(self, *args)

    monkeypatch.setattr(module.ClickCore, "set_targets", dying)
    again = config(policy, photos, num_envs=2)
    with pytest.raises(KeyboardInterrupt):
        annotate(again)
    partial = photos.parent / "out" / "annotations.partial" / "000000.jsonl"
    assert len(partial.read_text().splitlines()) == 2
    partial.write_text(partial.read_text() + '{"file": "b.j')
    with pytest.raises(ValueError, match="other settings"):
        annotate(config(policy, photos, num_envs=2, categories="star"))
    capsys.readouterr()
    assert annotate(again) == whole and "Resuming: 2 of" in capsys.readouterr().out


def test_the_identity_of_an_agent_covers_its_weights(policy: str) -> None:
    agent = PolicyAgent.load(policy, "cpu")
    before = ClickAnnotator(agent, ["star"], 1).identity
    assert ClickAnnotator(PolicyAgent.load(policy, "cpu"), ["ring"], 1).identity == before
    with torch.no_grad():
        next(agent.policy.parameters()).add_(1.0)
    assert ClickAnnotator(agent, ["star"], 1).identity != before


def test_ids_of_a_coco_file(policy: str, photos: Path) -> None:
    known = {
        "images": [{"id": 77, "file_name": "a.png"}],
        "categories": [{"id": 5, "name": "ring"}, {"id": 9, "name": "star"}],
    }
    path = photos.parent / "truth.json"
    path.write_text(json.dumps(known))
    content = annotate(config(policy, photos, coco=str(path)))
    assert [image["id"] for image in content["images"]] == [77]
    assert {annotation["category_id"] for annotation in content["annotations"]} <= {5, 9}
    with pytest.raises(ValueError, match="Did you mean 'ring'"):
        annotate(config(policy, photos, coco=str(path), categories="rings"))
    path.write_text(json.dumps(known | {"images": [{"id": 77, "file_name": "val/a.png"}]}))
    with pytest.raises(ValueError, match="none of the 5 images.*relative"):
        annotate(config(policy, photos, coco=str(path)))


def test_actions_mean_what_they_meant_in_training(tiny_env: dict, tmp_path: Path) -> None:
    settings = SamSegConfig(**(tiny_env | {"undo": True}))
    vector, core = make_vector_env("SamSeg-v0", 2, settings)
    names = list(core.dataset.categories)
    backbone = {"name": "tiny", "checkpoint": tiny_env["checkpoint"], "device": "cuda:7"}
    features = {"backbone": backbone, "vocabulary": names, "categories": names, "max_steps": 3}
    here = features | {"backbone": backbone | {"device": "cpu"}}
    for others in (["undo"], []):
        kwargs = {"features": here, "grid": 16, "others": others}
        model = PPO(ImplicitPolicy, VectorEnvAdaptor(vector), policy_kwargs=kwargs, device="cpu")
        model.policy_kwargs["features"] = features  # as if it had been trained on a GPU
        model.save(tmp_path / "policy.zip")
        agent = PolicyAgent.load(tmp_path / "policy.zip", "cpu")
        if others:
            made = ClickAnnotator(agent, ["star"], 1).core
            assert (made.undo_action, made.stop_action) == (512, -1)
            assert made.device.type == "cpu"
        else:
            with pytest.raises(ValueError, match="1 actions beyond clicks"):
                ClickAnnotator(agent, ["star"], 1)
    vector.close()


def test_wrong_inputs(policy: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        annotate(config(policy, tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in this folder"):
        annotate(config(policy, tmp_path / "empty"))
    with pytest.raises(ValueError, match="Did you mean 'star'"):
        annotate(config(policy, photos, categories="starr"))
    with pytest.raises(ValueError, match="named twice"):
        annotate(config(policy, photos, categories="star,star"))
    assert not list(tmp_path.rglob("*.partial*"))
    with pytest.raises(ValueError, match="--categories is empty"):
        annotate(config(policy, photos, categories=" , "))
    with pytest.raises(FileNotFoundError, match="no such policy"):
        annotate(config(str(tmp_path / "none.zip"), photos))


def test_agents_of_other_tasks_are_refused(tiny_env: dict, photos: Path, tmp_path: Path) -> None:
    vector, _ = make_vector_env("SamEverything-v0", 2, EverythingConfig(obs="handle", **tiny_env))
    backbone = {"name": "tiny", "checkpoint": tiny_env["checkpoint"], "device": "cpu"}
    kwargs = {"features": {"backbone": backbone, "budget": 4}, "grid": 32, "stop": True}
    model = PPO(EverythingPolicy, VectorEnvAdaptor(vector), policy_kwargs=kwargs, device="cpu")
    model.save(tmp_path / "policy.zip")
    vector.close()
    with pytest.raises(
        ValueError, match=r"annotate does not work with SamEverything-v0. It does with"
    ):
        annotate(config(str(tmp_path / "policy.zip"), photos))
    with pytest.raises(ValueError, match=r"agents.export does not work with SamEverything-v0"):
        ExportablePolicy(PolicyAgent.load(tmp_path / "policy.zip", "cpu").policy)


# Everything mode -------------------------------------------------------------------------------


@pytest.fixture
def everything(photos: Path) -> list[str]:
    """The command line of everything mode on the photos; broken and thin files are among them."""
    out = photos.parent / "out" / "all.json"
    options = ["--grid", "5", "4", "--pred-iou-thresh", "0.3", "--stability-score-thresh", "0.3"]
    return ["--everything", "--images", str(photos), "--out", str(out), "--device", "cpu", *options]


def test_everything_in_the_images(
    shipped: Backbone, photos: Path, everything: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    content = main(everything)
    printed = capsys.readouterr().out
    assert "skipped broken.jpg" in printed and "2 files skipped" in printed
    assert "skipped thin.png: 3000 x 1 pixels are too thin" in printed
    out = photos.parent / "out"
    assert json.loads((out / "all.json").read_text()) == content
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.jpg", "more/c.png"]
    assert content["categories"] == [{"id": 1, "name": "object"}]
    options = GeneratorOptions((5, 4), pred_iou_thresh=0.3, stability_score_thresh=0.3)
    image = cv2.imread(str(photos / "b.jpg"))[..., ::-1]
    (masks,) = MaskGenerator(shipped, options).generate_masks([np.ascontiguousarray(image)])
    number = next(i["id"] for i in content["images"] if i["file_name"] == "b.jpg")
    found = [a for a in content["annotations"] if a["image_id"] == number]
    assert len(found) == len(masks) > 1
    for annotation, mask, score in zip(found, masks.binary(), masks.predicted_iou, strict=True):
        np.testing.assert_array_equal(rle.decode(annotation["segmentation"]), mask)
        assert annotation["area"] == mask.sum() and annotation["score"] == pytest.approx(score)
        y, x = mask.nonzero()
        box = [x.min(), y.min(), 1 + np.ptp(x), 1 + np.ptp(y)]
        assert annotation["bbox"] == box and annotation["category_id"] == 1
    pictures = sorted(path.name for path in (out / "all_overlays").iterdir())
    assert pictures == ["a.png.jpg", "b.jpg.jpg", "more__c.png.jpg"]
    truth = COCO(str(out / "all.json"))
    assert len(truth.loadRes(content["annotations"]).anns) == len(content["annotations"])


def test_everything_with_classes_and_the_ids_of_a_coco_file(
    shipped: Backbone,
    photos: Path,
    everything: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = ClassHead(shipped.embedding_shape[0], ["star", "ring"])
    classified = shipped.with_model(Model(shipped.sam, head=head))
    monkeypatch.setattr(annotate_everything, "load_backbone", lambda *_, **__: classified)
    path = photos.parent / "truth.json"
    known = {
        "images": [{"id": 77, "file_name": "a.png"}],
        "categories": [{"id": 5, "name": "ring"}, {"id": 9, "name": "star"}],
    }
    path.write_text(json.dumps(known))
    content = main([*everything, "--coco", str(path), "--overlays", "none"])
    assert [image["id"] for image in content["images"]] == [77]
    assert not (photos.parent / "out" / "all_overlays").exists()
    assert {c["name"]: c["id"] for c in content["categories"]} == {"star": 9, "ring": 5}
    assert len(content["annotations"]) > 1
    for annotation in content["annotations"]:
        assert annotation["category_id"] in (5, 9) and annotation["category_score"] >= 0.5
    # A class that the file does not have gets an id that the file does not use.
    path.write_text(json.dumps(known | {"categories": known["categories"][:1]}))
    content = main([*everything, "--coco", str(path), "--overlays", "none"])
    assert {c["name"]: c["id"] for c in content["categories"]} == {"star": 6, "ring": 5}
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"truth.json: no COCO JSON with images and categories"):
        main([*everything, "--coco", str(path), "--overlays", "none"])


def test_everything_resumes_after_an_interruption(
    photos: Path,
    everything: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = dict(main(everything))
    stream = MaskGenerator.stream

    def dying(self: Any, images: Any, *args: Any) -> Any:
        for count, masks in enumerate(stream(self, images, *args)):
            if count == 2:
                raise KeyboardInterrupt
            yield masks

    with monkeypatch.context() as patch:
        patch.setattr(MaskGenerator, "stream", dying)
        with pytest.raises(KeyboardInterrupt):
            main(everything)
    partial = photos.parent / "out" / "all.partial" / "000000.jsonl"
    assert len(partial.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="other settings"):
        main([*everything, "--box-nms-thresh", "0.5"])
    capsys.readouterr()
    # What shares a decoder call moves the last bit of a score: two images of three are no batch.
    assert main(everything) == whole and not partial.exists()
    assert "Resuming" not in capsys.readouterr().out


def test_everything_with_wrong_inputs(everything: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--pred-iou-thresh must be from 0 to 1, got 7.0"):
        main([*everything, "--pred-iou-thresh", "7"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        main([*everything, "--images", str(tmp_path / "nowhere")])


def test_everything_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--everything", "--help"])
    shown = capsys.readouterr().out
    assert "agents.annotate --everything" in shown and "--output" not in shown
    for name in ("--grid", "--pred-iou-thresh", "--min-mask-region-area", "--adapter"):
        assert name in shown
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--everything --help" in capsys.readouterr().out


# Semantic heads --------------------------------------------------------------------------------


def test_label_maps_and_panoptic_of_a_semantic_head(
    tiny: Backbone,
    tiny_env: dict,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classes = ["sky", "road", "car"]
    torch.manual_seed(0)
    head = SEMANTIC_HEADS.get("seed")("embedding", tiny.feature_spec, classes).eval()
    image = np.ascontiguousarray(cv2.imread(str(photos / "b.jpg"))[..., ::-1])
    with torch.no_grad():  # every class has pixels
        head.net[-1].bias -= head(tiny.encode([image])).mean(dim=(0, 2, 3))
    adapter = Adapter(
        *("tiny", tiny.weights_digest, "semantic", "head", ["street"]),
        semantic_type="seed",
        semantic_features="embedding",
        semantic_classes=classes,
        semantic=head.state_dict(),
    ).save(tmp_path / "adapter.safetensors")
    out = photos / "found" / "all.json"
    arguments = ["--semantic", "--adapter", str(adapter), "--images", str(photos)]
    arguments += ["--backbone", "tiny", "--checkpoint", tiny_env["checkpoint"], "--device", "cpu"]
    arguments += ["--out", str(out)]
    # Interrupted while it writes the last file, a run resumes.
    with monkeypatch.context() as patched:
        patched.setattr(semantic, "_write_panoptic", MagicMock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    capsys.readouterr()
    content = main(arguments)
    printed = capsys.readouterr().out
    assert "Resuming: 5 of 5 are done" in printed and "skipped broken.jpg" in printed
    assert [own["file_name"] for own in content["images"]] == ["a.png", "b.jpg", "more/c.png"]
    expected = tiny.with_model(Model(tiny.sam, segmenter=head)).segment([image])[0]
    assert len(np.unique(expected)) > 1
    labels = out.parent / "all_labels"
    found = cv2.imread(str(labels / "b.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(found, expected)
    assert json.loads((labels / "classes.json").read_text()) == {"classes": classes}
    number = next(own["id"] for own in content["images"] if own["file_name"] == "b.jpg")
    own = [a for a in content["annotations"] if a["image_id"] == number]
    assert sum(annotation["area"] for annotation in own) == expected.size
    assert all(1 / 3 <= annotation["score"] <= 1 for annotation in own)
    assert len(list((out.parent / "all_overlays").iterdir())) == 3

    # Both forms are read as datasets.
    (photos / "images").mkdir()
    for file in ("a.png", "b.jpg", "more/c.png"):
        path = photos / "images" / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((photos / file).read_bytes())
    panoptic = make_dataset(
        "coco-panoptic",
        "all",
        root=str(photos),
        annotations="found/all_panoptic.json",
        segments="found/all_panoptic",
        images="images",
    )
    sample = next(panoptic[k] for k in range(3) if panoptic[k].source.endswith("b.jpg"))
    names = panoptic.categories
    assert sample.semantic is not None
    for number, name in enumerate(classes):
        mask = sample.semantic == names.index(name) if name in names else np.zeros_like(found)
        np.testing.assert_array_equal(mask, expected == number)

    # A second run does not take its own files for images.
    again = main([*arguments, "--images", str(photos)])
    assert len(again["images"]) == 6
    (photos / "a.jpg").write_bytes((photos / "b.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"Several images would have the label map a.png"):
        main(arguments)
    arguments[arguments.index("--adapter") + 1] = str(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        main([*arguments, "--images", str(photos / "images")])


# Presence --------------------------------------------------------------------------------------


def test_presence_of_an_own_agent(
    policy: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = annotate(config(policy, photos))["annotations"]
    assert "python -m agents.presence --policy" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no presence.json. Run python -m agents.presence"):
        annotate(config(policy, photos, min_presence=0.5))
    few = PresenceConfig(policy=policy, images=4, held_out=4, num_envs=8, others=None, device="cpu")
    # Wrong options fail before the agent plays.
    (photos.parent / "empty").mkdir(exist_ok=True)
    star = DatasetOptions(dataset_kwargs={"categories": "star"})
    for wrong, message in (
        ({"photos": str(photos.parent / "none")}, "--photos .*none: no such folder"),
        ({"photos": str(photos.parent / "empty")}, "no image in this folder"),
        ({"others": "roms"}, "Unknown dataset 'roms'"),
        ({"data": star}, "show every category, or none"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            calibrate(replace(few, **wrong))
    measured = calibrate(few)
    written = json.loads(Path(policy).with_name("presence.json").read_text())
    assert written["held_out"] == measured and measured["pairs"] > 16
    assert 0 <= measured["auroc"] <= 1 and written["clip"]["name"] == "clip_micro"
    every = annotate(config(policy, photos, min_presence=0.0))["annotations"]
    for annotation, expected in zip(every, whole, strict=True):
        assert 0 <= annotation.pop("presence") <= 1 and annotation == expected
    assert annotate(config(policy, photos, min_presence=1.0))["annotations"] == []


def test_instances_share_the_mask_of_their_category(policy: str, photos: Path) -> None:
    own = {"categories": "star", "overlays": "none"}
    whole = annotate(config(policy, photos, **own))["annotations"]
    found = annotate(config(policy, photos, **own, instances=True))["annotations"]
    assert len(found) >= len(whole) > 0
    for annotation in whole:
        same = ("image_id", "category_id")
        parts = [one for one in found if all(one[key] == annotation[key] for key in same)]
        masks = np.stack([rle.decode(one["segmentation"]) for one in parts])
        assert masks.sum(axis=0).max() == 1
        assert not (masks.any(axis=0) & (rle.decode(annotation["segmentation"]) == 0)).any()
        assert {one["clicks"] for one in parts} == {annotation["clicks"]}


def test_everything_in_tiles(photos: Path, everything: list[str], shipped: Backbone) -> None:
    content = main([*everything, "--tiles", "80", "--overlays", "none"])
    assert len(content["annotations"]) > 3
    with pytest.raises(ValueError, match="--tiles replaces crops"):
        main([*everything, "--tiles", "80", "--crop-n-layers", "1"])
