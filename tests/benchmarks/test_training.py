"""The profile of a training run, and its comparison with another checkout."""

import json
import sys
import time
import types
from pathlib import Path

import pytest

from benchmarks.run import main
from benchmarks.training import benchmark, phases
from sam_gym.utils.provenance import HERE


@pytest.mark.slow
def test_two_checkouts_are_trained_in_turn(
    tmp_path: Path, forking_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", forking_python)
    small = ("--backbone", "micro-v0", "--num-envs", "4", "--total-timesteps", "64")
    small += ("--final-episodes", "1")
    few = ("--train-images", "8", "--eval-episodes", "1", "--threads", "1", "--out", str(tmp_path))
    run = main(["training", *small, *few, "--against", str(HERE)])
    assert json.loads((tmp_path / "results.json").read_text())["ratio"] == run["ratio"] > 0
    ours, other = run["sides"]["this"], run["sides"]["other"]
    # The same code with the same seed learns the same.
    assert ours["mean_iou"] == other["mean_iou"]
    assert ours["seconds"].keys() == other["seconds"].keys() == {*phases.STAGES, phases.REST}
    training = ours["seconds"]["training"]
    assert all(seconds > 0 for phase, seconds in training.items() if phase != "baselines")
    assert training["baselines"] == 0 < ours["seconds"]["evaluation"]["baselines"]
    parts = sum(seconds for own in ours["seconds"].values() for seconds in own.values())
    assert parts == pytest.approx(ours["total"])
    assert ours["peak_mib"] > 100 and ours["commit"] == other["commit"]
    for name in ("phases.csv", "phases.png", "report.html"):
        assert (tmp_path / name).stat().st_size


def test_another_folder_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no agents/train_ppo\.py"):
        main(["training", "--against", str(tmp_path), "--out", str(tmp_path / "out")])


def test_an_older_checkout_without_an_option_ends_it_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "older"
    (older / "agents").mkdir(parents=True)
    (older / "sam_gym").symlink_to(HERE / "sam_gym")
    for path in (HERE / "agents").iterdir():
        (older / "agents" / path.name).symlink_to(path)
    (older / "agents" / "train_ppo.py").unlink()
    command = (
        "import tyro\nif __name__ == '__main__':\n    tyro.cli(dict[str, int], args=['--env'])\n"
    )
    (older / "agents" / "train_ppo.py").write_text(command)
    with pytest.raises(ValueError, match=r"older: .*Unrecognized options: --env"):
        main(["training", "--against", str(older), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.count("Run 1 of 1") == 1


def test_a_run_without_a_gap_is_summed_up() -> None:
    run = {
        **{"checkout": "here", "commit": None, "seconds": {"training": {"encode": 2.0}}},
        **{"total": 3.0, "peak_mib": 1.0, "mean_iou": 0.5, "gap_closed": None},
    }
    summary = benchmark._summary([run, run | {"gap_closed": 0.5, "mean_iou": 0.7}])
    assert summary["gap_closed"] is None and summary["mean_iou"] == pytest.approx(0.6)
    assert summary["seconds"]["training"]["encode"] == 2.0


def test_a_wrong_option_ends_in_one_line(
    tmp_path: Path, forking_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", forking_python)
    with pytest.raises(ValueError, match=r"Unknown policy 'implict'\. Did you mean 'implicit'\?"):
        main(["training", "--policy", "implict", "--out", str(tmp_path)])


def test_time_belongs_to_the_innermost_function(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    watch = phases.Stopwatch()
    decode = watch.timed(lambda: spend(2.0), "decode")

    def play() -> None:
        spend(1.0)
        decode()
        spend(1.0)

    def fail() -> None:
        decode()
        raise ValueError

    spend(0.5)
    watch.timed(play, "evaluation")()
    with pytest.raises(ValueError):
        watch.timed(fail, "training")()
    spend(0.25)
    watch.stop()
    assert watch.seconds == {
        ("other", "other"): 0.75,
        ("evaluation", "other"): 2.0,
        ("evaluation", "decode"): 2.0,
        ("training", "other"): 0.0,
        ("training", "decode"): 2.0,
    }


def test_functions_are_patched_wherever_they_were_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, user = types.ModuleType("home_of_play"), types.ModuleType("user_of_play")
    home.play = user.play = lambda: time.sleep(0.01)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "home_of_play", home)
    monkeypatch.setitem(sys.modules, "user_of_play", user)
    places = ("home_of_old_play:play", "home_of_play:gone", "home_of_play:play")
    monkeypatch.setattr(phases, "STAGES", {"evaluation": places})
    monkeypatch.setattr(phases, "PHASES", {})
    watch = phases.Stopwatch()
    watch.install()
    user.play()
    assert watch.seconds[("evaluation", "other")] >= 0.009
    monkeypatch.setattr(phases, "PHASES", {"decode": ("home_of_play:gone",)})
    with pytest.raises(LookupError, match="'decode' exists: home_of_play:gone"):
        watch.install()
