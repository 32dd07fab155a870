"""Training `clip_micro`: captions with true labels, a run that goes on, a model that loads."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from agents.clip.micro_data import make_captions, vocabulary
from agents.clip.models import MICRO_TEMPLATES, WordTokenizer, load_clip
from agents.clip.pointing import pointing_game, redundant_feature
from agents.clip.surgery import ClipSurgery
from agents.clip.train import ClipTrainer, TrainClipConfig, train
from sam_gym.data.base import Sample
from sam_gym.data.synthetic.scenes import Scenes

NAMES = Scenes.categories


@pytest.fixture(autouse=True)
def restore_torch() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def config(out: Path) -> TrainClipConfig:
    return TrainClipConfig(
        out=str(out),
        scenes=6,
        steps=3,
        images=3,
        captions=20,
        image_size=64,
        width=32,
        layers=2,
        evaluate=2,
        save_every=1,
        workers=0,
        device="cpu",
    )


def test_captions_name_what_their_labels_say() -> None:
    tokenizer = WordTokenizer(vocabulary(), 16)
    texts, names_in = make_captions(np.random.default_rng(0), NAMES, 40)
    assert len(texts) == 40 and names_in.shape == (40, len(NAMES))
    for text, row in zip(texts, names_in, strict=True):
        assert not tokenizer.unknown(text), text
        assert {name for name in NAMES if name in text} == {
            name for name, named in zip(NAMES, row, strict=True) if named
        }
    counts = names_in.sum(axis=1)
    assert set(counts.tolist()) == {0, 1, 2} and "" in texts
    assert names_in.sum(axis=0).min() >= 3


def test_a_run_cut_off_goes_on_to_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(config(tmp_path / "whole"))
    step = ClipTrainer.train_step

    def dying(self: ClipTrainer, *args: object) -> dict[str, float]:
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ClipTrainer, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "parts"))
    monkeypatch.setattr(ClipTrainer, "train_step", step)
    capsys.readouterr()
    assert train(config(tmp_path / "parts")) == result
    assert "Resuming from step 2" in capsys.readouterr().out
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("whole", "parts")
    )
    assert not [key for key in whole if not torch.equal(whole[key], parts[key])]
    assert json.loads((tmp_path / "parts" / "evaluation.json").read_text()) == result
    clip = load_clip("clip_micro", str(tmp_path / "whole" / "clip_micro"), "cpu")
    for key, value in clip.model.state_dict().items():
        torch.testing.assert_close(value, whole[key], rtol=1e-3, atol=1e-4, msg=key)
    assert clip.surgical_blocks == result["best"]["blocks"] >= 1
    assert clip.surgical_size == result["best"]["size"] in (64, 80, 96, 112, 128)
    assert clip.templates == MICRO_TEMPLATES


def test_open_clip_reads_what_is_written(clip_folder: Path) -> None:
    """Without this package: open_clip's own loader, from the folder."""
    model = open_clip.create_model(f"local-dir:{clip_folder}", require_pretrained=True)
    words = json.loads((clip_folder / "tokenizer.json").read_text())
    tokenizer = WordTokenizer(words["words"], words["context_length"])
    with torch.no_grad():
        assert model.encode_text(tokenizer(["a star."])).shape == (1, 128)
        assert model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 128)


def test_pointing_game_by_hand(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that peak in one corner hit what lies there and nothing else."""
    surgery = ClipSurgery(load_clip("clip_micro", str(clip_folder), "cpu"))
    maps = torch.zeros(1, 3, 8, 8)
    maps[:, :, 0, 0] = 1.0
    monkeypatch.setattr(ClipSurgery, "similarity", lambda *args: (maps, maps[..., 0, 0]))
    masks = np.zeros((3, 64, 64), bool)
    masks[0, :8, :8], masks[1, 32:, 32:], masks[2, :, :16] = True, True, True
    sample = Sample(np.zeros((64, 64, 3), np.uint8), masks, np.array([0, 1, 2]), "by hand")
    played = pointing_game(surgery, [sample, sample], ("star", "ring", "mug"))
    assert played.hits.tolist() == [True, False, True] * 2
    np.testing.assert_allclose(played.chances[:3], [1 / 64, 1 / 4, 1 / 4])
    assert played.accuracy == pytest.approx(2 / 3) and played.chance == pytest.approx(33 / 192)
    assert played.by_category(("star", "ring", "mug")) == {"star": 1.0, "ring": 0.0, "mug": 1.0}
    with pytest.raises(ValueError, match="Did you mean 'empty'"):
        redundant_feature(surgery, "empt")  # type: ignore[arg-type]
