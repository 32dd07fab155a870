"""Exported policies agree with the original in both formats, and describe their inputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from agents.evaluate import PolicyAgent
from agents.export import ExportablePolicy, ExportConfig, export
from agents.policies.base import POLICIES
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from sam_gym.envs.click import SamSegConfig

pytest.importorskip("onnxruntime", reason="the export extra is not installed")
pytest.importorskip("onnxscript", reason="the export extra is not installed")


@pytest.mark.parametrize(
    ("kind", "target_map"), [("explicit", "search"), ("implicit", "recalibrate")]
)
def test_both_forms_agree_for_any_number_of_images(
    kind: str, target_map: str, tiny_env: dict, clip_folder: Path, tmp_path: Path
) -> None:
    import onnxruntime

    import agents.policies.explicit  # noqa: F401

    settings = SamSegConfig(**(tiny_env | {"stop": True}))
    vector, core = make_vector_env("SamSeg-v0", 3, settings)
    env = VectorEnvAdaptor(vector)
    names = list(core.dataset.categories)
    backbone = {"name": "tiny", "checkpoint": tiny_env["checkpoint"], "device": "cpu"}
    features: dict[str, Any] = {"backbone": backbone, "categories": names, "max_steps": 5}
    if kind == "explicit":
        features["clip"] = {"name": "clip_micro", "pretrained": str(clip_folder), "device": "cpu"}
    else:
        features["vocabulary"] = names
    kwargs: dict[str, Any] = {"features": features, "grid": 16, "others": ["stop"]}
    if target_map == "search":
        kwargs |= {"search": 2}
    else:
        kwargs |= {"recalibrate": True, "precision": "bf16-mixed", "gradient_checkpointing": True}
    model = PPO(POLICIES.get(kind), env, policy_kwargs=kwargs, seed=0, device="cpu")
    model.save(tmp_path / "policy.zip")
    out = tmp_path / "out"
    config = ExportConfig(str(tmp_path / "policy.zip"), str(out), batch=3, repeats=2)
    results = export(config)
    for way in ("torch.export", "onnx"):
        assert results[way]["largest_difference"] <= 1e-4 and results[way]["median_ms"] > 0

    # On observations of an environment, the exported policy chooses the agent's actions.
    observations = policy_inputs(model.policy, env.reset(), core)
    session = onnxruntime.InferenceSession(str(out / "policy.onnx"))
    logits, value = session.run(None, {k: x.numpy() for k, x in observations.items()})
    agent = PolicyAgent(PolicyAgent.load(tmp_path / "policy.zip", "cpu").policy, search=False)
    actions = agent.act(core, core.observe(np.arange(3)))
    assert logits.shape == (3, 513) and value.shape == (3, 1)
    np.testing.assert_array_equal(logits.argmax(axis=1), actions)
    described = json.loads((out / "inputs.json").read_text())
    assert described["inputs"].keys() == observations.keys() and described["categories"] == names
    assert described["others"] == ["stop"]
    env.close()
    (out / "policy.pt2").unlink()
    with pytest.raises(FileExistsError, match=r"policy.onnx.*--overwrite"):
        export(config)


def policy_inputs(policy: Any, handles: dict[str, np.ndarray], core: Any) -> dict[str, Any]:
    """Return the inputs that `inputs.json` describes, from observations."""
    extractor = policy.features_extractor
    tensors, _ = policy.obs_to_tensor(handles)
    index = tensors["handle"][:, 0]
    inputs = {
        "sam_image_embeddings": core.store.gather(index, "embedding"),
        "sam_pred_mask_prob": core.logits[:, 0].sigmoid(),
        "target_category": tensors["target_category"].long(),
        "num_steps": tensors["num_steps"].long(),
    }
    if "word_maps" in ExportablePolicy(policy).inputs:
        inputs["word_maps"] = extractor.word_maps(tensors).float()
    return inputs


def test_wrong_inputs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such policy"):
        export(ExportConfig(str(tmp_path / "policy.zip"), str(tmp_path)))
    with pytest.raises(ValueError, match="at least 1"):
        export(ExportConfig("policy.zip", batch=0))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .*file is a file: name a folder"):
        export(ExportConfig("implicit", str(tmp_path / "file")))
    assert torch.is_grad_enabled()
