"""`throughput` end to end, its timers, and that it notices when the two sides differ."""

import csv
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.run import main
from benchmarks.throughput import against, playing, stepping
from benchmarks.throughput.benchmark import growth, linear_fit
from benchmarks.throughput.config import ThroughputBenchmarkConfig
from benchmarks.throughput.machine import decoder_speed
from benchmarks.throughput.playing import (
    PHASES,
    REST,
    Chunk,
    Match,
    Played,
    phase_timers,
    play_chunks,
    play_reference,
    play_vector,
)
from benchmarks.throughput.reference import plain_sam
from sam_gym.backbones import loading, service
from sam_gym.backbones.compiled import FixedShapes
from sam_gym.utils.provenance import HERE
from sam_gym.utils.shared import SharedObjects
from sam_gym.utils.text import counted


def arguments(tiny_env: dict[str, Any], out: Path, **more: int) -> list[str]:
    options: dict[str, Any] = {
        "backbone": "tiny",
        "checkpoint": tiny_env["checkpoint"],
        "device": "cpu",
        "out": out,
        "max_steps": 2,
        "steps": 2,
        "repeats": 1,
        "images": 2,
        "growth_images": 0,
        "encoder_batch": 1,
        "precision_images": 1,
    }
    pairs = [(f"--{key}", str(value)) for key, value in (options | more).items()]
    return ["throughput", *(word for pair in pairs for word in pair), "--num-envs", "3"]


@pytest.fixture
def match(micro_checkpoint: str) -> Iterator[Match]:
    config = ThroughputBenchmarkConfig(
        checkpoint=micro_checkpoint, device="cpu", max_steps=2, steps=4, images=2
    )
    backbone = config.load()
    match = Match(config, backbone, plain_sam(backbone), num_envs=3, fresh=False)
    yield match
    match.close()


@pytest.mark.slow
def test_writes_numbers_table_and_page(tiny_env: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"repeats": 2, "growth_images": 16, "encoder_batch": 4, "precision_images": 16}
    returned = main([*arguments(tiny_env, out, **more)[:-1], "1", "2", "3"])
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert results["backbone"] == "tiny" and list(results["by_num_envs"]) == ["1", "2", "3"]
    for num_envs, kind in itertools.product((1, 2, 3), ("cached", "fresh")):
        numbers = results["by_num_envs"][str(num_envs)][kind]
        assert 0 < numbers["overhead_share"] < 1
        assert numbers["phases_ms"].keys() == {*PHASES, REST}
        assert all(value >= 0 for value in numbers["phases_ms"].values())
        assert numbers["phases_ms"]["decode"] > 0
        assert (numbers["phases_ms"]["encode"] > 0) == (kind == "fresh")
        assert numbers["agreement"]["agree"]
        assert numbers["agreement"]["mean_mask_iou_with_reference"] > 0.99
        of_this = (str(num_envs), kind)
        repeats = [r for r in rows_of(out) if (r["num_envs"], r["images"]) == of_this]
        medians = {}
        for side in ("vector", "scalar", "reference"):
            seconds = [float(r["seconds"]) for r in repeats if r["side"] == side]
            assert len(seconds) == 2
            medians[side] = np.median(seconds)
            expected = 2 * num_envs / medians[side]
            assert numbers[f"{side}_steps_per_second"] == pytest.approx(expected, rel=1e-4)
        speedup = results[f"speedup_vs_loop{'_fresh' * (kind == 'fresh')}"][str(num_envs)]
        assert speedup == pytest.approx(numbers["speedup_vs_reference"], abs=1e-3)

    # 128 x (image, embedding, mask, two numbers) against 128 x (handle, small mask, two numbers).
    full = 64 * 64 * 3 + 4 * 32 * 4 * 4 + 4 * 16 * 16 + 16
    assert results["rollout_bytes"]["full"] == 128 * full
    assert results["rollout_bytes"]["handle"] == 128 * (4 + 4 * 4 + 16)
    # The same for ViT-B: an image of 1024 x 1024, 64 x 64 x 256 embeddings, masks of 256 x 256.
    full = 1024 * 1024 * 3 + 4 * 256 * 64 * 64 + 4 * 256 * 256 + 16
    vit_b = results["rollout_bytes_vit_b"]
    assert vit_b["full"] == 128 * full and vit_b["handle"] == 128 * (4 + 64 * 64 + 16)
    assert vit_b["ratio"] == full / (4 + 64 * 64 + 16) > 100

    # 3 environments: eight images for each, and two episodes before the first that counts.
    assert results["growth"]["num_envs"] == 3
    assert results["growth"]["images"] == [9, 12, 15, 18, 21, 24]
    assert results["growth"]["capacity"] == 6
    for kind in ("cached", "fresh"):
        step_ms = {n: m[kind]["vector_step_ms"] for n, m in results["by_num_envs"].items()}
        fit, points = results["linear_fit"][kind], {int(n): ms for n, ms in step_ms.items()}
        # Three points one apart: the slope is half of what lies between the outer two.
        assert fit["ms_per_env"] == pytest.approx((points[3] - points[1]) / 2)

    assert results["encoder"]["largest_difference_in_deviations"] < 1e-3
    assert 0 < results["decoder"]["fraction_of_roofline"] < 1.5

    for effect in results["mask_iou_with_float32"].values():
        assert 0.9 < effect["model"] <= 1 and 0.9 < effect["disk"] <= 1

    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "Over 24 fresh images, of which the embedding store holds 6" in page
    assert f"Medians of {counted(results['settings']['repeats'], 'repeat')} of" in page
    for plot in ("speed.png", "phases.png", "growth.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "repeats.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_sides_play_the_same_episodes(match: Match) -> None:
    match.play()
    vector, reference, scalar = (match.played[s] for s in ("vector", "reference", "scalar"))
    assert len(vector.rewards) == 4 and len(vector.final_ious) == 2
    np.testing.assert_allclose(vector.rewards, scalar.rewards, atol=1e-3)
    np.testing.assert_allclose(vector.final_ious, scalar.final_ious, atol=1e-3)
    # The rewards of an episode add up to its final IoU, on either side.
    np.testing.assert_allclose(np.add(*scalar.rewards[:2]), scalar.final_ious[0], atol=1e-6)
    assert np.abs(vector.rewards).max() > 0.01
    ours, theirs = np.array(vector.masks), np.array(reference.masks)
    assert ours.shape == theirs.shape == (4, 3, 96, 96)
    assert (ours != theirs).mean() < 1e-3 and ours.any()


def test_sides_share_no_embeddings(match: Match) -> None:
    stores = {id(core.store) for core in match.scalar_cores}
    assert len(stores) == 1 and id(match.core.store) not in stores
    assert match.core.store.encoded == 2


@pytest.mark.slow
def test_disagreement_is_an_error(
    tiny_env: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(env: Any, actions: np.ndarray, played: Played) -> float:
        seconds = play_vector(env, actions, played)
        played.rewards[-1] = played.rewards[-1] + 0.5
        return seconds

    monkeypatch.setattr(playing, "play_vector", wrong)
    with pytest.raises(RuntimeError, match="disagree on cached"):
        main(arguments(tiny_env, tmp_path / "out"))
    # The numbers are there to look into it.
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["growth"] is None and results["linear_fit"]["cached"] is None
    assert not results["by_num_envs"]["3"]["cached"]["agreement"]["agree"]


@pytest.mark.slow
def test_another_mask_of_the_reference_is_an_error(
    tiny_env: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(env: Any, actions: np.ndarray, played: Played) -> float:
        seconds = play_reference(env, actions, played)
        played.masks[-1] = ~played.masks[-1]
        return seconds

    monkeypatch.setattr(playing, "play_reference", wrong)
    with pytest.raises(RuntimeError, match="disagree on cached images with 3 env"):
        main(arguments(tiny_env, tmp_path / "out"))


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

    monkeypatch.setattr(playing.time, "perf_counter", lambda: clock)
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


def test_chunks_count_images_and_time_only_steps(
    tiny_env: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ThroughputBenchmarkConfig(
        backbone="tiny",
        checkpoint=tiny_env["checkpoint"],
        device="cpu",
        num_envs=(1, 2, 65),
        max_steps=2,
        growth_images=20,
    )
    cores, cached = [], []

    def play(env: Any, actions: np.ndarray, played: Played) -> float:
        cores.append(env.unwrapped.core)
        cached.append(len(cores[-1].samples))
        assert actions.shape == (2, 2)
        play_vector(env, actions, played)
        return 0.01 * len(cores)

    monkeypatch.setattr(playing, "play_vector", play)
    chunks = list(play_chunks(config))
    # A quarter of 20 images are held; the reset sees two, each chunk two more.
    assert [chunk.images for chunk in chunks] == list(range(4, 21, 2))
    assert [chunk.held for chunk in chunks] == [4, *[5] * 8]
    assert [chunk.step_ms for chunk in chunks] == pytest.approx([5.0 * n for n in range(1, 10)])
    assert 0 < cached[-1] < 20 <= cores[0].samples.misses


@pytest.mark.parametrize(
    ("num_envs", "expected"), [((1, 64, 256), 64), ((8,), 8), ((256, 128), 128)]
)
def test_growth_is_followed_with_at_most_64_environments(
    num_envs: tuple[int, ...], expected: int
) -> None:
    assert ThroughputBenchmarkConfig(num_envs=num_envs).growth_num_envs == expected


def test_growth_compares_the_last_quarter_with_the_first() -> None:
    times = [99.0, 2.0, 4.0, 50.0, 50.0, 50.0, 50.0, 5.0, 7.0]
    chunks = [Chunk(10 * n, min(10 * n, 30), ms) for n, ms in enumerate(times, start=1)]
    assert growth(chunks) == {
        "images": [20, 30, 40, 50, 60, 70, 80, 90],
        "step_ms": times[1:],
        "capacity": 30,
        "last_over_first": 2.0,
    }


def test_linear_fit() -> None:
    exact = linear_fit({1: 5.0, 2: 7.0, 11: 25.0})
    assert exact == pytest.approx({"ms_per_env": 2.0, "intercept_ms": 3.0, "r_squared": 1.0})
    # By hand: means 2 and 2, so 1 / 2 is the slope, and 0.5 of the 2 squared are explained.
    bent = linear_fit({1: 1.0, 2: 3.0, 3: 2.0})
    assert bent == pytest.approx({"ms_per_env": 0.5, "intercept_ms": 1.0, "r_squared": 0.25})
    assert linear_fit({1: 5.0, 2: 7.0}) is None


def test_warming_up_compiles_all_there_is(
    tiny_env: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(service, "FixedShapes", partial(FixedShapes, backend=backend))
    monkeypatch.setattr(loading, "_loaded", SharedObjects())
    model = {key: tiny_env[key] for key in ("backbone", "checkpoint", "device")}
    config = ThroughputBenchmarkConfig(**model, compile=True, max_steps=2, steps=2, images=2)
    backbone = config.load()
    match = Match(config, backbone, plain_sam(backbone), num_envs=3, fresh=True)
    match.play()
    warm = compilations
    # The encoder and the decoder, for one image and for four.
    assert warm == 4
    match.play()
    match.profile()
    assert compilations == warm and match.agreement()["agree"]
    match.close()
    assert decoder_speed(backbone, 3)["gflop_per_prompt"] > 0


# Random weights --------------------------------------------------------------------------------


def test_random_weights_need_no_checkpoint(tiny_env: dict[str, Any]) -> None:
    model = {"backbone": "tiny", "device": "cpu", "num_envs": (2,)}
    config = ThroughputBenchmarkConfig(**model, max_steps=2, steps=2, random_weights=True, seed=3)
    with config.as_checkpoint() as own:
        assert own.checkpoint is not None and Path(own.checkpoint).is_file()
        assert own.load().identity == config.load().identity
        match = Match(own, own.load(), plain_sam(own.load()), num_envs=2, fresh=False)
        match.play()
        assert match.agreement()["agree"]
        match.close()
    assert not Path(own.checkpoint).exists()
    with ThroughputBenchmarkConfig(**model).as_checkpoint() as own:
        assert own.checkpoint is None


# Another checkout ------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_checkouts_play_the_same_in_turn(tmp_path: Path) -> None:
    small = ("--backbone", "micro-v0", "--device", "cpu", "--num-envs", "2", "--images", "2")
    short = ("--steps", "2", "--max-steps", "2", "--repeats", "2", "--growth-images", "0")
    few = ("--encoder-batch", "1", "--precision-images", "1", "--out", str(tmp_path))
    other = ("--against", str(HERE), "--against-backbone", "micro-v0")
    results = main(["throughput", *small, *short, *few, *other])
    assert results == json.loads((tmp_path / "results.json").read_text())
    builds = results["builds"]
    assert builds["sides"]["this"] == builds["sides"]["other"]
    assert builds["sides"]["this"]["backbone"] == "micro-v0"
    assert list(builds["by_num_envs"]) == ["2"]
    for kind in ("cached", "fresh"):
        numbers = builds["by_num_envs"]["2"][kind]
        # The same code plays the same images.
        assert numbers["max_reward_difference"] == 0.0
        assert len(numbers["ratios"]) == 2 and min(numbers["ratios"]) > 0
        assert numbers["ratio"] == pytest.approx(np.median(numbers["ratios"]))
        assert numbers["this_steps_per_second"] > 0 and numbers["this_peak_mib"] > 100
    assert "This checkout and another one" in (tmp_path / "report.html").read_text()


def test_numbers_of_two_checkouts_leave_the_warm_up_out() -> None:
    def turn(seconds: float, reward: float, peak: float) -> dict[str, Any]:
        return {"seconds": seconds, "rewards": [[reward, 0.5]], "peak_mib": peak}

    played = {
        "this": [turn(9.0, 0.0, 50.0), turn(1.0, 0.25, 80.0), turn(2.0, 0.5, 100.0)],
        "other": [turn(1.0, 0.0, 50.0), turn(2.0, 0.5, 300.0), turn(8.0, 0.5, 400.0)],
    }
    assert against._numbers(played, env_steps=16) == {
        **{"this_steps_per_second": 12.0, "other_steps_per_second": 5.0},
        **{"this_peak_mib": 100.0, "other_peak_mib": 400.0, "memory_ratio": 0.25},
        **{"ratios": [2.0, 4.0], "ratio": 3.0, "max_reward_difference": 0.25},
        "mean_reward_difference": pytest.approx(0.25 / 6),
    }


def test_a_player_encodes_all_images_and_plays_given_actions(
    tiny_env: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "ALLOCATORS", ())  # not those of the process of all tests
    settings = tiny_env | {"split": "test", "obs": "handle", "max_steps": 2}
    player = stepping.Player(num_envs=3, seed=5, images=8, settings=settings)
    core: Any = player.env.unwrapped.core  # type: ignore[attr-defined]
    assert core.samples.misses == 8 and player.prefetchers == [core.prefetcher]
    assert player.about() == {"checkout": str(HERE), "actions": 512}
    actions = np.random.default_rng(0).integers(0, 512, (4, 3))
    played = player.play(actions.tolist())
    assert core.samples.misses == 8 and played["seconds"] > 0 and played["peak_mib"] > 50
    env = playing.make_vector(3, settings)
    env.reset(seed=5)
    np.testing.assert_array_equal(played["rewards"], [env.step(row)[1] for row in actions])
    for own in (player.env, env):
        own.close()


@pytest.mark.slow
def test_a_checkout_that_fails_says_why() -> None:
    job = {"num_envs": 1, "seed": 0, "images": 0, "settings": {"backbone": "mikro"}}
    with pytest.raises(RuntimeError, match=r"(?s)failed:.*Did you mean 'micro'\?"):
        against.Player(HERE, job)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--against", "{tmp}"), r"no agents/train_ppo\.py"),
        (("--against-backbone", "micro"), "takes effect with --against PATH only"),
    ],
)
def test_what_is_no_checkout_is_refused(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    given = [option.format(tmp=tmp_path) for option in options]
    with pytest.raises(ValueError, match=message):
        main(["throughput", *given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def _owners(core: Any) -> dict[str, Any]:
    return {"core": core, "backbone": core.backbone, "store": core.store}
