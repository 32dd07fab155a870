"""`throughput` end to end, its timers, and that it notices when the two sides differ."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import throughput
from benchmarks.run import main
from benchmarks.throughput import PHASES, REST, Config, Match, Played, phase_timers, play_vector


def arguments(checkpoint: str, out: Path) -> list[str]:
    options = {
        "checkpoint": checkpoint,
        "device": "cpu",
        "out": out,
        "num-envs": 3,
        "max-steps": 2,
        "steps": 2,
        "repeats": 2,
        "images": 2,
    }
    pairs = [(f"--{key}", str(value)) for key, value in options.items()]
    return ["throughput", *(word for pair in pairs for word in pair)]


@pytest.fixture
def match(micro_checkpoint: str) -> Match:
    config = Config(
        checkpoint=micro_checkpoint, device="cpu", num_envs=3, max_steps=2, steps=4, images=2
    )
    return Match(config, config.load(), fresh=False)


def test_writes_numbers_table_and_page(micro_checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    returned = main(arguments(micro_checkpoint, out))
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert (results["backbone"], results["num_envs"]) == ("micro", 3)
    assert results["overhead_share"] == results["cached"]["overhead_share"]
    for kind in ("cached", "fresh"):
        numbers = results[kind]
        assert 0 < numbers["overhead_share"] < 1
        assert numbers["phases_ms"].keys() == {*PHASES, REST}
        assert all(value >= 0 for value in numbers["phases_ms"].values())
        assert numbers["phases_ms"]["decode"] > 0
        assert numbers["agreement"]["agree"]
        steps = 3 * 2
        repeats = [r for r in rows_of(out) if r["images"] == kind]
        for side in ("vector", "scalar"):
            seconds = [float(r["seconds"]) for r in repeats if r["env"] == side]
            assert len(seconds) == 2
            expected = steps / np.median(seconds)
            assert numbers[f"{side}_steps_per_second"] == pytest.approx(expected, rel=1e-4)
    assert results["cached"]["phases_ms"]["encode"] == 0
    assert results["fresh"]["phases_ms"]["encode"] > 0

    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert (out / "phases.png").read_bytes().startswith(b"\x89PNG")


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "repeats.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_both_sides_play_the_same_episodes(match: Match) -> None:
    match.play()
    vector, scalar = match._played
    assert len(vector.rewards) == 4 and len(vector.final_ious) == 2
    np.testing.assert_allclose(vector.rewards, scalar.rewards, atol=1e-3)
    np.testing.assert_allclose(vector.final_ious, scalar.final_ious, atol=1e-3)
    # The rewards of an episode add up to its final IoU, on either side.
    np.testing.assert_allclose(np.add(*scalar.rewards[:2]), scalar.final_ious[0], atol=1e-6)
    assert np.abs(vector.rewards).max() > 0.01


def test_sides_share_no_embeddings(match: Match) -> None:
    stores = {id(env.unwrapped.core.store) for env in match.scalars}  # type: ignore[attr-defined]
    assert len(stores) == 1 and id(match.core.store) not in stores
    assert match.core.store.encoded == 2


def test_disagreement_is_an_error(
    micro_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(env: Any, actions: np.ndarray, played: Played) -> None:
        play_vector(env, actions, played)
        played.rewards[-1] = played.rewards[-1] + 0.5

    monkeypatch.setattr(throughput, "play_vector", wrong)
    with pytest.raises(RuntimeError, match="disagree on cached"):
        main(arguments(micro_checkpoint, tmp_path / "out"))
    # The numbers are there to look into it.
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not results["cached"]["agreement"]["agree"]


def test_timers_are_exclusive_and_leave_no_trace(
    match: Match, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = match.core

    clock = 0.0

    def acquire(images: object) -> list[int]:
        nonlocal clock
        clock += 3.0
        core.backbone.encode([])
        return []

    def encode(images: object) -> None:
        nonlocal clock
        clock += 5.0

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(core.store, "acquire", acquire)
    monkeypatch.setattr(core.backbone, "encode", encode)
    with phase_timers(core) as seconds:
        core.store.acquire([])
        core.backbone.encode([])
    assert seconds == {"encode": 10.0, "store": 3.0}
    assert core.store.acquire is acquire
    monkeypatch.undo()
    before = {key: vars(owner).copy() for key, owner in _owners(core).items()}
    with pytest.raises(RuntimeError), phase_timers(core):
        raise RuntimeError
    assert {key: vars(owner) for key, owner in _owners(core).items()} == before


def _owners(core: Any) -> dict[str, Any]:
    return {"core": core, "backbone": core.backbone, "store": core.store}
