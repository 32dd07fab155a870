"""Presence: the fit, the file, and the calibration of the bundled agents."""

import json
from pathlib import Path
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest
from scipy.special import expit

from agents.annotation.clicks import ClickAnnotator
from agents.annotation.interactive.player import ClickPlayer
from agents.annotation.interactive.project import Project
from agents.annotation.interactive.session import Models, Session
from agents.annotation.presence import Calibration, Logistic, Presence
from agents.evaluate import PolicyAgent
from agents.policies.saved import SHIPPED
from agents.presence import auroc
from agents.sharing.repository import PRESENCE
from sam_gym.backbones import load_backbone
from sam_gym.data import make_dataset
from sam_gym.data.synthetic.scenes import Scenes


def test_the_fit_recovers_a_logistic_model() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal([1.0, -2.0], [0.5, 3.0], (40_000, 2))
    y = rng.random(len(x)) < expit(x @ [2.0, -0.5] - 1.0)
    # A fit of a sample that is thinned out, and weighted for it, is that of the whole.
    keep = y | (rng.random(len(x)) < 0.5)
    model = Logistic.fit(x[keep], y[keep], np.where(y, 1.0, 2.0)[keep])
    np.testing.assert_allclose([*model.weights, model.bias], [2.0, -0.5, -1.0], rtol=0.1)
    assert model(x).mean() == pytest.approx(y.mean(), abs=0.005)


def test_auroc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, present = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.4
    one, other = scores[present][:, None], scores[~present][None]
    assert auroc(scores, present) == pytest.approx(((one > other) + 0.5 * (one == other)).mean())


@pytest.mark.parametrize("name", list(SHIPPED))
def test_bundled_agents_are_calibrated(name: str, tmp_path: Path) -> None:
    calibration = Calibration.read(SHIPPED[name])
    assert calibration is not None and 0 < calibration.stop < calibration.threshold < 0.5
    assert calibration.held_out["auroc"] > 0.9
    (tmp_path / PRESENCE).write_text(SHIPPED[name].with_name(PRESENCE).read_text())
    (tmp_path / "policy.zip").write_bytes(b"another")
    with pytest.raises(ValueError, match="calibrated for another policy"):
        Calibration.read(tmp_path / "policy.zip")
    (tmp_path / PRESENCE).write_text(json.dumps({"before": {}}))
    with pytest.raises(ValueError, match="no calibration of presence"):
        Calibration.read(tmp_path / "policy.zip")


def test_similarity_before_the_first_click_tells_present_from_absent() -> None:
    calibration = Calibration.read(SHIPPED["explicit"])
    assert calibration is not None
    words = list(Scenes.categories)
    presence = Presence(calibration, load_backbone("micro", device="cpu"), words)
    scenes = make_dataset("scenes", "test", length=10)
    stopped, present = [], []
    for index in range(10):
        sample = scenes[index]
        stopped += [presence.is_absent(sample.image, word) for word in range(len(words))]
        present += np.isin(range(len(words)), sample.categories).tolist()
    refused = np.array(stopped)
    assert refused[np.array(present)].mean() < 0.2 and refused[~np.array(present)].mean() > 0.5


def test_an_absent_category_has_no_mask_and_is_not_played(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = PolicyAgent.load("explicit", "cpu")
    calibration = Calibration.read(SHIPPED["explicit"])
    assert calibration is not None
    sample = make_dataset("scenes", "test", length=1)[0]
    words = list(Scenes.categories)
    present = set(sample.categories.tolist())
    played: list[int] = []
    play = ClickAnnotator.play
    monkeypatch.setattr(
        ClickAnnotator, "play", lambda self, batch: played.append(len(batch)) or play(self, batch)
    )
    found = {}
    for least in (None, 0.0):
        presence = Presence(calibration, agent.policy.features_extractor.backbone, words, least)
        annotator = ClickAnnotator(agent, words, 10, presence=presence)
        items = [(("a.png", word), sample.image) for word in range(len(words))]
        found[least] = {item.key[1]: item.annotations for item in annotator.stream(iter(items))}
    # With a minimum of 0, every category is played and keeps its mask, with its presence.
    assert played[1] == 10 > played[0] >= len(present) - 1
    scores = {word: own[0]["presence"] for word, own in found[0.0].items() if own}
    assert len(scores) >= 9 and all(0 <= score <= 1 for score in scores.values())
    kept = {word for word, own in found[None].items() if own}
    assert kept and kept <= present
    for word in kept:
        (annotation,) = found[None][word]
        alone = found[0.0][word][0]
        assert annotation["clicks"] == alone["clicks"]
        assert annotation["score"] == pytest.approx(alone["score"], abs=1e-4)
        assert annotation["presence"] == pytest.approx(alone["presence"], abs=1e-3)
        assert annotation["presence"] >= calibration.threshold


def test_the_app_tells_the_presence_that_annotate_writes(tmp_path: Path) -> None:
    agent = PolicyAgent.load("explicit", "cpu")
    calibration = Calibration.read(SHIPPED["explicit"])
    assert calibration is not None
    player = ClickPlayer(agent, calibration)
    models = Models(player.backbone, player.images, player, MagicMock(), 10**8, MagicMock())
    sample = make_dataset("scenes", "test", length=1)[0]
    cv2.imwrite(str(tmp_path / "a.png"), sample.image[..., ::-1])
    words = player.known  # a word's map depends on the others
    project = Project(tmp_path, tmp_path / "out.json", ["a.png"], words)
    session = Session(models, project)
    session.open(0)
    word = int(sample.categories[0])
    session.set_name(words[word])
    session.click(5, 5, True)
    assert session.presence() is None  # a person's click
    session.reset()
    while session.agent_step():
        pass
    presence = Presence(calibration, player.backbone, words, 0.0)
    annotator = ClickAnnotator(agent, words, 1, presence=presence)
    (item,) = annotator.stream(iter([(("a.png", word), sample.image)]))
    assert session.presence() == pytest.approx(item.annotations[0]["presence"], abs=1e-3)
    session.set_name("zebra crossing")
    assert session.presence() is None
    session.close()
