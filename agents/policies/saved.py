"""Load trained policies from files without running code that the files may hold."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, cast

import gymnasium as gym

from agents.policies import POLICIES, SamPolicy
from sam_gym.backbones.loading import resolve_device
from sam_gym.utils.weights import check_finite

#: Name of a bundled agent -> its file; docs/results.md has the commands that trained them.
SHIPPED = {
    name: Path(__file__).parents[1] / "weights" / name / "policy.zip"
    for name in ("explicit", "implicit")
}


def read_data(path: Path) -> dict[str, Any]:
    """Return the attributes of the model in a policy.zip; pickled ones stay pickled.

    Raises:
        ValueError: the file is not a model that stable-baselines3 saved.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(json.loads(archive.read("data")))
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable policy ({type(error).__name__}: {error}).")


#: Functions of numpy that occur in pickled spaces: of arrays, numbers and generators.
_OF_NUMPY = {
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.random._pickle": {"__bit_generator_ctor", "__generator_ctor"},
    "numpy.random._pcg64": {"PCG64"},
    "numpy.random.bit_generator": {"SeedSequence", "__pyx_unpickle_SeedSequence"},
}
#: Class in files of earlier versions, which had no `policy_name` -> its name in `POLICIES`.
FORMER_CLASSES = {
    ("agents.policies", "ImplicitPolicy"): "implicit",
    ("agents.explicit", "ExplicitPolicy"): "explicit",
    ("agents.everything", "EverythingPolicy"): "everything",
}


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles spaces and registered policies; anything else is an error and never runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in FORMER_CLASSES:
            return POLICIES.get(FORMER_CLASSES[module, name])
        for _, policy in POLICIES.items():
            if (module, name) == (policy.__module__, policy.__qualname__):
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
    """Return a value of a policy.zip, unpickled if JSON cannot hold it."""
    if isinstance(value, dict) and ":serialized:" in value:
        return _PlainUnpickler(io.BytesIO(base64.b64decode(value[":serialized:"]))).load()
    return value


def load_policy(path: Path, device: str) -> SamPolicy:
    """Load the policy of a zip onto a device.

    Only the entries that make the policy are read: nothing of its training (schedules,
    environments) has to be importable, and no code that the zip may hold runs.

    Args:
        path: of the policy.zip.
        device: of the policy, its SAM and its CLIP.

    Raises:
        ValueError: the file holds no policy that is registered in `POLICIES`.
        OSError: the weights of its SAM or CLIP could not be loaded.
    """
    data = read_data(path)
    try:
        return _rebuilt(path, data, device)
    except OSError:  # the zip can be read: a file that it names cannot
        raise
    except Exception as error:  # a zip can be damaged in many ways
        raise _unreadable(path, error) from error


def _rebuilt(path: Path, data: dict[str, Any], device: str) -> SamPolicy:
    from stable_baselines3.common.save_util import load_from_zip_file

    _, parameters, _ = load_from_zip_file(path, device="cpu", load_data=False)
    observations, actions, arguments = (
        _plain(data[name]) for name in ("observation_space", "action_space", "policy_kwargs")
    )
    name = data.get("policy_name")
    policy_class = _plain(data["policy_class"]) if name is None else POLICIES.get(name)
    if policy_class not in map(POLICIES.get, POLICIES.names()):
        raise ValueError(f"expected a registered policy, got {policy_class!r}")
    for model in ("backbone", "clip"):
        if model in arguments["features"]:
            arguments["features"][model]["device"] = device
    policy = policy_class(observations, actions, lambda _: 0.0, **arguments)
    weights, own = cast(Any, parameters["policy"]), policy.state_dict()
    reduce = "features_extractor.reduce.weight"
    if reduce in weights and reduce in own and weights[reduce].shape != own[reduce].shape:
        raise ValueError(
            f"the policy reads {weights[reduce].shape[1]} channels per image, the embedding has "
            f"{own[reduce].shape[1]}. Policies on HQ backbones and adapters with a "
            "router, where further features used to be channels, must be trained again"
        )
    check_finite(weights, "policy")
    policy.load_state_dict(weights)
    return policy.to(resolve_device(device))
