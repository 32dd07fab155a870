"""Pictures of what a policy sees."""

from pathlib import Path

import numpy as np
import pytest

from agents.evaluate import PolicyAgent
from agents.policies.explicit import ExplicitPolicy
from agents.policies.implicit import ImplicitPolicy
from agents.policies.plots import draw_policy_plots
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from sam_gym.envs.click import SamSegConfig


@pytest.mark.parametrize(("kind", "columns"), [("implicit", 4), ("explicit", 6)])
def test_a_row_per_episode(
    tiny_env: dict, clip_folder: Path, kind: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[str] = []
    from agents.policies import plots

    draw = plots.draw_heat

    def noted(*args: object, **kwargs: object) -> np.ndarray:
        captions.append(str(kwargs["caption"]))
        return draw(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(plots, "draw_heat", noted)
    settings = SamSegConfig(**(tiny_env | {"stop": True}))
    vector, core = make_vector_env("SamSeg-v0", 1, settings)
    env = VectorEnvAdaptor(vector)
    names = list(core.dataset.categories)
    backbone = {"name": "tiny", "checkpoint": tiny_env["checkpoint"], "device": "cpu"}
    features = {"backbone": backbone, "categories": names, "max_steps": 5}
    if kind == "explicit":
        clip = {"name": "clip_micro", "pretrained": str(clip_folder), "device": "cpu"}
        features, policy_class = features | {"clip": clip}, ExplicitPolicy
    else:
        features, policy_class = features | {"vocabulary": names}, ImplicitPolicy
    policy = policy_class(
        env.observation_space, env.action_space, lambda _: 1e-3, features=features, grid=16
    )
    picture = draw_policy_plots(PolicyAgent(policy), settings, count=3, clicks=2)
    assert picture.dtype == np.uint8 and picture.shape == (3 * 254, columns * 224, 3)
    assert len(captions) == 3 * (columns - 1)
    # Chances of both kinds of click, and of stopping, make up one.
    clicks = [float(c.split(":")[1].split("%")[0]) for c in captions if c.startswith("click")]
    assert len(clicks) == 6 and all(98 <= sum(clicks[k : k + 2]) <= 101 for k in (0, 2, 4))
    assert any(c.startswith("map of") for c in captions) == (kind == "explicit")
    env.close()
