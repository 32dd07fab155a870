"""Frames have one shape per environment, whatever the shapes of its images."""

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import AddRenderObservation
from PIL import Image

from agents.ppo.vec_env import VectorEnvAdaptor
from sam_gym import ENVIRONMENTS
from sam_gym.data import Sample
from sam_gym.envs.click import ClickCore, SamSegConfig
from sam_gym.utils.render import letterbox

#: Height of a frame with its caption.
HEIGHT = 384 + 30


@pytest.fixture
def photos(two_photos: Path, tiny_env: dict[str, Any]) -> dict[str, Any]:
    """Arguments of environments over a wide and a tall image."""
    splits = {"train": ["tall", "wide"], "val": ["val"], "test": ["test"]}
    tall = np.array(Image.open(two_photos / "images" / "tall.png"))
    for name in ("val", "test"):
        shutil.copy(two_photos / "masks" / "tall.png", two_photos / "masks" / f"{name}.png")
        tall[0, 0] += 1  # a photograph of its own
        Image.fromarray(tall).save(two_photos / "images" / f"{name}.png")
    (two_photos / "splits.json").write_text(json.dumps(splits))
    return tiny_env | {"render_mode": "rgb_array", "dataset_kwargs": {}, "data": str(two_photos)}


@pytest.fixture(params=sorted({*ENVIRONMENTS} - {"SamVideo-v0"}))
def settings(request: pytest.FixtureRequest, photos: dict[str, Any]) -> dict[str, Any]:
    """The same, with the id of each environment."""
    source = {"dataset": "folder"}
    if request.param == "SamContinual-v0":
        del photos["dataset_kwargs"]
        source = {"stream": "folders"}
    return {"id": request.param} | photos | source


def test_frames_have_one_shape(settings: dict[str, Any]) -> None:
    env = gym.make(**settings)
    images, frames = set(), []
    for seed in range(6):
        env.reset(seed=seed)
        images.add(env.unwrapped.core.ground_truth(0).image.shape)
        frames.append(env.render())
    assert len(images) == 2
    assert {frame.shape for frame in frames} == {(HEIGHT, 192, 3)}  # the first image is tall

    envs = gym.make_vec(num_envs=4, vectorization_mode="vector_entry_point", **settings)
    envs.reset(seed=0)
    for frame, expected in zip(envs.render(), frames, strict=False):
        np.testing.assert_array_equal(frame, expected)


def test_pixels_of_frames_lead_to_pixels_of_images(photos: dict[str, Any]) -> None:
    env = gym.make("SamSeg-v0", dataset="folder", **photos)
    core = env.unwrapped.core  # type: ignore[attr-defined]
    for index in range(2):
        env.reset(options={"index": index})
        image = core.ground_truth(0).image
        frame = env.render()
        # The caption is below the picture, bars are around both.
        rows = np.flatnonzero(frame.any(axis=(1, 2)))[:-30]  # type: ignore[union-attr]
        shown = rows, np.flatnonzero(frame[rows].any(axis=(0, 2)))  # type: ignore[index]
        for fraction in (0.01, 0.4, 0.99):
            y, x = (int(own[0] + fraction * (own[-1] - own[0])) for own in shown)
            column, row = core.to_image(0, *core.from_frame(0, x, y))
            assert abs(row / image.shape[0] - fraction) < 0.03
            assert abs(column / image.shape[1] - fraction) < 0.03
        assert core.from_frame(0, x, rows[-1] + 2) is None  # the caption


def test_renderings_are_observations(settings: dict[str, Any]) -> None:
    mode = AutoresetMode.SAME_STEP
    envs = SyncVectorEnv(
        [lambda: AddRenderObservation(gym.make(**settings))] * 3, autoreset_mode=mode
    )
    for seed in range(3):
        observations, _ = envs.reset(seed=seed)
        assert envs.observation_space.contains(observations)


def test_tiled_frames_of_stable_baselines_have_one_shape(photos: dict[str, Any]) -> None:
    more = {"autoreset_mode": "SameStep", "dataset": "folder", "max_steps": 1}
    vector = {"num_envs": 3, "vectorization_mode": "vector_entry_point"}
    env = VectorEnvAdaptor(gym.make_vec("SamSeg-v0", **vector, **more, **photos))
    assert env.metadata["render_fps"] == 2
    env.reset()
    shapes = set()
    for _ in range(5):
        env.step(np.zeros(3, int))
        shapes.add(env.render("rgb_array").shape)
    assert shapes == {(2 * HEIGHT, 2 * 192, 3)}


class Pictures:
    """A dataset of black images of given shapes."""

    name, categories = "pictures", ("object",)

    def __init__(self, *shapes: tuple[int, int]) -> None:
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Sample:
        shape = self.shapes[index]
        everything = np.ones((1, *shape), bool)
        return Sample(np.zeros((*shape, 3), np.uint8), everything, np.zeros(1, np.int64), "black")

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        return len(self) - 1, None


@pytest.mark.parametrize(
    ("shapes", "width"),
    [
        ([(90, 120)], 512),
        ([(640, 427)], 256),
        ([(90, 120), (120, 90)], 512),
        ([(120, 90), (60, 600)], 288),
        ([(120, 90), (600, 60)], 288),
        ([(600, 60), (90, 120)], 128),
        ([(60, 600), (90, 120)], 1152),
    ],
)
def test_any_shape_fits(
    shapes: list[tuple[int, int]], width: int, tiny_env: dict[str, Any]
) -> None:
    config = SamSegConfig(**tiny_env | {"min_target": 0.0, "dataset_kwargs": {}})
    core = ClickCore(config, 1, Pictures(*shapes))
    core.reset([0], [np.random.default_rng(0)])
    core.step(np.array([0]), np.array([0]))
    frame = core.frame(0)
    assert frame.shape == (HEIGHT, width, 3)
    if len(shapes) == 1:  # nothing changes where all images have one shape
        np.testing.assert_array_equal(frame, core.render(0))


def test_letterbox_centres() -> None:
    picture = np.full((2, 4, 3), 9, np.uint8)
    frame = letterbox(picture, 4, 4)
    assert (frame[1:3] == 9).all() and not frame[[0, 3]].any()
    np.testing.assert_array_equal(letterbox(picture, 2, 4), picture)
    assert letterbox(picture, 1, 2).tolist() == [[[9] * 3] * 2]


def test_widths_are_even_for_video_encoders(tmp_path: Path, tiny_env: dict[str, Any]) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.new("L" if folder == "masks" else "RGB", (161, 120), 255).save(
            tmp_path / folder / "a.png"
        )
    settings = tiny_env | {"dataset": "folder", "data": str(tmp_path), "dataset_kwargs": {}}
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a"], "val": [], "test": []}))
    env = gym.make("SamSeg-v0", render_mode="rgb_array", **settings)
    env.reset(seed=0)
    assert env.render().shape == (HEIGHT, 516, 3)  # not 515
