"""Trained policies as files: what a policy.zip holds, and a policy made from it again."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym

from agents.policies import POLICIES, SamPolicy
from sam_gym.backbones.loading import resolve_device

#: Agents in the package, by name; docs/results.md has the commands that trained them.
SHIPPED = {
    name: Path(__file__).parents[1] / "weights" / name / "policy.zip"
    for name in ("explicit", "implicit")
}


def read_data(path: Path) -> dict[str, Any]:
    """What a policy.zip says of its model, by name; what is pickled in it stays pickled.

    Raises:
        ValueError: it is no model that stable-baselines3 has saved.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(json.loads(archive.read("data")))
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: not a readable policy ({type(error).__name__}: {error})."
        ) from error


#: What numpy's arrays, numbers and generators are pickled with; spaces consist of them.
_OF_NUMPY = {
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.random._pickle": {"__bit_generator_ctor", "__generator_ctor"},
    "numpy.random._pcg64": {"PCG64"},
    "numpy.random.bit_generator": {"SeedSequence", "__pyx_unpickle_SeedSequence"},
}


#: Modules that held the policies before; files that were saved then name them.
_FORMER_MODULES = ("agents.policies", "agents.explicit", "agents.everything")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles spaces and names of registered policies; all else is an error, and never runs."""

    def find_class(self, module: str, name: str) -> Any:
        for policy in map(POLICIES.get, POLICIES.names()):
            known = (policy.__module__, *_FORMER_MODULES)
            if module in known and policy.__qualname__ == name:
                return policy
        space = getattr(gym.spaces, name, None)
        if isinstance(space, type) and issubclass(space, gym.Space) and space.__module__ == module:
            return space
        # numpy 1 says "core" where numpy 2 says "_core".
        if name in _OF_NUMPY.get(module.replace("numpy.core.", "numpy._core."), ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"{module}.{name} is neither a space nor a policy of {', '.join(POLICIES.names())}"
        )


def _plain(value: Any) -> Any:
    """A value of a policy.zip, which pickles what JSON cannot hold."""
    if isinstance(value, dict) and ":serialized:" in value:
        return _PlainUnpickler(io.BytesIO(base64.b64decode(value[":serialized:"]))).load()
    return value


def load_policy(path: Path, device: str) -> SamPolicy:
    """The policy of a zip, for another device of its SAM and CLIP.

    Only what makes the policy is read: nothing of its training (schedules, environments) has to be
    importable here, and no code that the zip may hold runs.

    Raises:
        ValueError: it holds no policy that is registered in `POLICIES`.
        OSError: the weights of its SAM or CLIP cannot be had.
    """
    data = read_data(path)
    try:
        return _rebuilt(path, data, device)
    except OSError:  # the zip is there: a file that it names is not
        raise
    except Exception as error:  # a zip can be damaged in many ways
        raise ValueError(
            f"{path}: not a readable policy ({type(error).__name__}: {error})."
        ) from error


def _rebuilt(path: Path, data: dict[str, Any], device: str) -> SamPolicy:
    from stable_baselines3.common.save_util import load_from_zip_file

    _, parameters, _ = load_from_zip_file(path, device="cpu", load_data=False)
    policy_class, observations, actions, arguments = (
        _plain(data[name])
        for name in ("policy_class", "observation_space", "action_space", "policy_kwargs")
    )
    if policy_class not in map(POLICIES.get, POLICIES.names()):
        raise ValueError(f"expected a registered policy, got {policy_class!r}")
    for model in ("backbone", "clip"):
        if model in arguments["features"]:
            arguments["features"][model]["device"] = device
    policy = policy_class(observations, actions, lambda _: 0.0, **arguments)
    policy.load_state_dict(parameters["policy"])
    return policy.to(resolve_device(device))
