"""What TensorBoard and MLflow hold of a run; that recording changes nothing."""

import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from segment_anything.modeling import Sam
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.evaluate import PolicyAgent
from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import mlflow_run
from agents.ppo.tracking import MlflowRun, TensorBoard
from agents.train_ppo import main
from sam_gym.utils.process_group import ProcessGroup
from sam_gym.version import __version__

# What SQLAlchemy says to MLflow.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

Arguments = Callable[..., list[str]]
Points = dict[str, list[tuple[int, float]]]

SHORT = ("--total-timesteps", "128")
WATCHED = (*SHORT, "--views", "--video-every", "12")


@pytest.fixture(scope="module")
def plain(
    build_tiny: Callable[[], Sam],
    backbone_added: Callable[..., AbstractContextManager[None]],
    arguments: Arguments,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run without pictures and MLflow."""
    out = tmp_path_factory.mktemp("plain")
    with backbone_added("tiny", build=build_tiny):
        main(arguments(out, *SHORT, "--video-every", "0"))
    return out


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a local store is, under a name that has to be quoted in a URI."""
    pytest.importorskip("mlflow", reason="MLflow is missing: pip install 'sam-gym[mlflow]'")
    return tmp_path_factory.mktemp("runs") / "of é%20" / "mlflow"


@pytest.fixture
def begin(store: Path) -> Callable[..., MlflowRun]:
    """Begins a run, or goes on with the one of `run_id`."""

    def begin(**changes: Any) -> MlflowRun:
        return MlflowRun(store, "tests", **{"name": "a", "params": {}, "tags": {}} | changes)

    return begin


def in_tensorboard(out: Path) -> Points:
    """Every scalar, times included."""
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def in_mlflow(run: MlflowRun) -> Points:
    """Every metric, rounded to the 32 bits that TensorBoard keeps of a value."""
    return {
        key: [
            (point.step, float(np.float32(point.value)))
            for point in run.client.get_metric_history(run.run_id, key)
        ]
        for key in run.client.get_run(run.run_id).data.metrics
    }


def files_in_mlflow(run: MlflowRun, folder: str | None = None) -> set[str]:
    found = run.client.list_artifacts(run.run_id, folder)
    return {
        path
        for file in found
        for path in (files_in_mlflow(run, file.path) if file.is_dir else [file.path])
    }


def status(run: MlflowRun) -> str:
    return run.client.get_run(run.run_id).info.status


@pytest.mark.slow
def test_pictures_change_nothing(
    tiny_env: dict[str, Any],
    arguments: Arguments,
    assert_same: Callable[[Path, Path], None],
    plain: Path,
    tmp_path: Path,
) -> None:
    main(arguments(tmp_path, *WATCHED))
    assert_same(tmp_path, plain)
    assert not (plain / "videos").exists() and not (plain / "policy_plots").exists()
    # 4, 12, 16 and 24 episodes have ended when a rollout has.
    videos = sorted((tmp_path / "videos").iterdir())
    assert [path.name for path in videos] == ["step-00000064.gif"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = events.Images("eval/video")
    # Like the results of an evaluation, they appear with the rollout after.
    assert [event.step for event in shown] == [96]
    assert [event.encoded_image_string for event in shown] == [p.read_bytes() for p in videos]
    assert shown[0].encoded_image_string[:3] == b"GIF" and shown[0].width > shown[0].height / 2
    views = sorted((tmp_path / "policy_plots").iterdir())
    assert [path.name for path in views] == ["step-00000064.png", "step-00000128.png"]
    assert [event.encoded_image_string for event in events.Images("eval/policy_plots")] == [
        path.read_bytes() for path in views
    ]


@pytest.mark.slow
def test_mlflow_has_what_tensorboard_has_though_the_run_was_killed(
    store: Path,
    tiny_env: dict[str, Any],
    arguments: Arguments,
    start_training: Callable[..., Any],
    assert_same: Callable[[Path, Path], None],
    plain: Path,
) -> None:
    out = store.parent / "killed"
    given = arguments(out, *WATCHED, "--mlflow", "--mlflow-experiment", "clicks")
    done = start_training("--die-at", "108", *given).finish()
    assert done.returncode == -9, done
    run = MlflowRun(store, "other", name="other", params={}, tags={})
    experiment = run.client.get_experiment_by_name("clicks")
    [found] = run.client.search_runs([experiment.experiment_id])
    run.run_id = found.info.run_id
    # The last rollout before the end is in no checkpoint.
    assert max(step for points in in_mlflow(run).values() for step, _ in points) == 64
    assert max(step for points in in_tensorboard(out).values() for step, _ in points) == 96
    assert status(run) == "RUNNING"

    main([*given, "--resume", "--register-model", "clicker", "--pictures"])
    assert_same(out, plain)
    recorded = in_tensorboard(out)
    assert in_mlflow(run) == recorded
    assert [step for step, _ in recorded["time/fps"]] == [32, 64, 96, 128]
    assert {"train/loss", "rollout/iou", "eval/iou"} <= recorded.keys()
    assert len(run.client.search_runs([experiment.experiment_id])) == 1
    data = run.client.get_run(run.run_id).data
    assert status(run) == "FINISHED" and data.tags["mlflow.runName"] == "killed"
    tags = {"sam_gym.version": __version__, "policy": "implicit", "backbone": "tiny"}
    assert tags.items() <= data.tags.items()
    assert data.params["learning_rate"] == "0.001" and data.params["env_config.max_steps"] == "5"
    assert files_in_mlflow(run) == {
        *("results.json", "learning_curve.png", "iou_after_steps.png", "episodes.gif"),
        "policy/policy.zip",
        *(
            "videos/step-00000064.gif",
            "policy_plots/step-00000064.png",
            "policy_plots/step-00000128.png",
        ),
    }

    [version] = run.client.search_model_versions("name='clicker'")
    assert version.run_id == run.run_id
    from mlflow.artifacts import download_artifacts

    policy = download_artifacts(version.source, tracking_uri=run.client.tracking_uri)
    PolicyAgent.load(Path(policy) / "policy.zip")


def test_a_point_is_sent_once_whenever_the_run_was_killed(
    begin: Callable[..., MlflowRun],
) -> None:
    run = begin()

    def record(run: MlflowRun, step: int, value: float) -> None:
        run.write({"loss": value}, {"loss": ("",)}, step)

    record(run, 10, 1.0)
    state = run.get_state()
    record(run, 20, 2.0)
    assert in_mlflow(run) == {}

    after_the_checkpoint = begin(run_id=run.run_id)
    after_the_checkpoint.set_state(state)
    after_the_checkpoint.on_rollout_start()
    assert in_mlflow(run) == {"loss": [(10, 1.0)]}

    after_sending = begin(run_id=run.run_id)
    after_sending.set_state(state)
    after_sending.on_rollout_start()
    record(after_sending, 20, 3.0)
    assert in_mlflow(run) == {"loss": [(10, 1.0)]}
    after_sending.on_rollout_start()
    assert in_mlflow(run) == {"loss": [(10, 1.0)]}
    after_sending.on_checkpoint()
    after_sending.on_rollout_start()
    assert in_mlflow(run) == {"loss": [(10, 1.0), (20, 3.0)]}


def test_only_scalars_that_tensorboard_gets_are_points(begin: Callable[..., MlflowRun]) -> None:
    run = begin()
    values = {"a": math.nan, "b": "text", "c": 1.0, "d": np.float32(0.5), "e": np.zeros(2), "f": 3}
    excluded = dict.fromkeys(values, ("",)) | {"c": ("tensorboard",)}
    run.write(values, excluded, 7)
    run.on_checkpoint()
    run.on_rollout_start()
    points = in_mlflow(run)
    assert math.isnan(points.pop("a")[0][1])
    assert points == {"d": [(7, 0.5)], "f": [(7, 3.0)]}


def test_settings_of_any_number_and_length(begin: Callable[..., MlflowRun]) -> None:
    many = {f"setting.{number}": number for number in range(130)}
    run = begin(params=many | {"long": "x" * 7000, "y" * 300: 1, "a(b)": None})
    params = run.client.get_run(run.run_id).data.params
    assert len(params) == 133 and params["setting.129"] == "129" and params["a_b_"] == "None"
    assert params["long"] == "x" * 5997 + "..." and params["y" * 247 + "..."] == "1"


def test_mlflow_is_told_how_a_run_ended(begin: Callable[..., MlflowRun]) -> None:
    def terminated() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def failing(error: type[BaseException]) -> Callable[[], None]:
        def fail() -> None:
            raise error

        return fail

    before = signal.getsignal(signal.SIGTERM)
    run = begin()
    for end, raised, expected in (
        (failing(ValueError), ValueError, "FAILED"),
        (failing(KeyboardInterrupt), KeyboardInterrupt, "KILLED"),
        (terminated, KeyboardInterrupt, "KILLED"),
    ):
        with pytest.raises(raised), begin(run_id=run.run_id):
            assert status(run) == "RUNNING"
            end()
        assert status(run) == expected
    with begin(run_id=run.run_id):
        pass
    assert status(run) == "FINISHED" and signal.getsignal(signal.SIGTERM) is before


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    config = TrainPPOConfig(out=str(tmp_path / "out"), mlflow=True)
    with mlflow_run(config, None, ProcessGroup(1, 2)) as run:
        assert run is None
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_is_an_error_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--register-model and --mlflow-uri take effect with"):
        main([*out, "--register-model", "clicker"])
    with pytest.raises(ValueError, match=r"without '/' and ':', got 'a/b'"):
        main([*out, "--mlflow", "--register-model", "a/b"])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"^--mlflow needs .*pip install 'sam-gym\[mlflow\]'.$"):
        main([*out, "--mlflow"])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_does_not_answer_is_an_error(
    begin: Callable[..., MlflowRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionError, match="Run with id=nothing not found"):
        begin(run_id="nothing")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConnectionError, match=r"^MLflow \(http://127\.0\.0\.1:9\): [^\n]*$"):
        MlflowRun("http://127.0.0.1:9", "tests", name="a", params={}, tags={})


def test_what_goes_on_within_a_second_is_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files of one second, TensorBoard would read the tenth before the ninth."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer._global_uid, "_value", 9)
    for first, last in ((0, 4), (3, 7)):
        writer = TensorBoard(tmp_path, first)
        for step in range(first, last):
            writer.write({"x": float(step)}, {"x": ()}, step)
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("x")] == list(range(7))
