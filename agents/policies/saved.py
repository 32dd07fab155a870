"""Load trained policies from files without running code that the files may hold."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces

from agents.policies import POLICIES, SamPolicy
from agents.policies.base import resolve_precision
from agents.policies.implicit import MAX_SEARCH, MAX_UPSCALE
from agents.policies.spaces import space_from_json, space_from_pickle
from sam_gym.backbones.loading import renamed_checkpoint, resolve_device
from sam_gym.backbones.spec import BACKBONES, FIRST_MICRO, HUB_PREFIX, renamed_backbone
from sam_gym.utils.pickles import Call, read_pickle, to_plain
from sam_gym.utils.text import reason_of
from sam_gym.utils.training import read_state
from sam_gym.utils.weights import check_finite

#: Name of a bundled agent -> its file; docs/results.md has the commands that trained them.
SHIPPED = {
    name: Path(__file__).parents[1] / "weights" / name / "policy.zip"
    for name in ("explicit", "implicit")
}


#: Largest sizes in bytes to which the entries of a policy.zip are unpacked: spaces of pixels are
#: large in `data` when they are pickled.
_LIMITS = {"data": 2**28, "policy.pth": 2**30}
#: Smallest and largest values of the arguments of policies that decide how large a model is, or
#: how much it decodes.
_RANGES = {
    **dict.fromkeys(("width", "grid", "num_heads"), (1, 4096)),
    "search": (0, MAX_SEARCH),
    "upscale_factor": (1, MAX_UPSCALE),
}
#: Largest number of actions that are no clicks.
_MAX_OTHERS = 64
#: Masks in observations, and their shapes over the first micro: in full, and beside a handle.
_MASKS, _FIRST_MICRO_MASKS = ("sam_pred_mask_prob", "coverage"), ((64, 64), (16, 16))
#: Class in files of earlier versions, which had no `policy_name` -> its name in `POLICIES`.
FORMER_CLASSES = {
    "agents.policies.ImplicitPolicy": "implicit",
    "agents.explicit.ExplicitPolicy": "explicit",
    "agents.everything.EverythingPolicy": "everything",
}


def read_data(path: Path) -> dict[str, Any]:
    """Return the attributes of the model in a policy.zip; pickled ones stay pickled.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a model that stable-baselines3 saved.
    """
    try:
        return dict(json.loads(_entry(path, "data")))
    except OSError:
        raise
    except Exception as error:  # a zip can be damaged in many ways
        raise _unreadable(path, error) from error


def _entry(path: Path, name: str) -> bytes:
    """Unpack an entry of a zip, unless it is too large."""
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo(name).file_size
        if size > _LIMITS[name]:
            raise ValueError(f"'{name}' unpacks to {size:,} bytes, more than {_LIMITS[name]:,}")
        return archive.read(name)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable policy ({reason_of(error)}).")


def _unpickled(value: Any) -> bytes | None:
    """Return the pickle in a value that JSON cannot hold, else None."""
    if isinstance(value, dict) and ":serialized:" in value:
        return base64.b64decode(value[":serialized:"])
    return None


def _class_of(data: Mapping[str, Any]) -> type[SamPolicy]:
    """Return the registered class of a saved policy."""
    if data.get("policy_name") is not None:
        return POLICIES.get_from_file(data["policy_name"])
    pickled = _unpickled(data["policy_class"])
    found = data["policy_class"] if pickled is None else read_pickle(pickled)
    name = found.name if isinstance(found, Call) else str(found)
    if name in FORMER_CLASSES:
        return POLICIES.get(FORMER_CLASSES[name])
    for policy in POLICIES.values():
        if name == f"{policy.__module__}.{policy.__qualname__}":
            return policy
    raise ValueError(f"{name} is no policy of {', '.join(POLICIES.names())}")


def _space_of(data: Mapping[str, Any], kind: str) -> Any:
    """Return the "observation" or the "action" space of a saved policy."""
    if "policy_spaces" in data:
        return space_from_json(data["policy_spaces"][kind])
    # Files of earlier versions, and of stable-baselines3 without `DistributedPPO`.
    return space_from_pickle(base64.b64decode(data[f"{kind}_space"][":serialized:"]))


def _arguments_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a saved policy."""
    pickled = _unpickled(data["policy_kwargs"])
    arguments = data["policy_kwargs"] if pickled is None else to_plain(read_pickle(pickled))
    for name, value in (arguments | arguments["features"]).items():
        if name not in _RANGES:
            continue
        low, high = _RANGES[name]
        if not (isinstance(value, int) and low <= value <= high):
            raise ValueError(f"{name} must be from {low} to {high}, got {value!r}")
    return arguments


def present_backbone(name: str, checkpoint: str | None, digest: str | None) -> str:
    """Return the present name of the SAM that a policy was trained on.

    Args:
        name: its name then.
        checkpoint: path of its weights, or None.
        digest: of its weights; None if the policy does not say, as in files of earlier versions.
    """
    if digest is not None:
        return renamed_backbone(digest) or name
    if name != "micro":
        return name
    if checkpoint is not None:
        return renamed_checkpoint(Path(checkpoint).expanduser()) or name
    return renamed_backbone(FIRST_MICRO) or name


def _name_backbone(
    backbone: dict[str, Any], trained_on: Mapping[str, str] | None, observations: Any
) -> None:
    """Give the SAM of a policy its present name, in place.

    Policies that stable-baselines3 saved without `DistributedPPO` do not say which weights it had,
    but masks of another size in their observations are not those of the first micro.
    """
    checkpoint = backbone.get("checkpoint")
    digest = None if trained_on is None else trained_on.get("backbone", "")
    if digest is None and checkpoint is None:
        masks = [observations[name].shape for name in _MASKS if name in observations.spaces]
        if any(shape not in _FIRST_MICRO_MASKS for shape in masks):
            return
    backbone["name"] = present_backbone(backbone.get("name", "micro"), checkpoint, digest)
    if not backbone["name"].startswith(HUB_PREFIX):
        BACKBONES.get_from_file(backbone["name"])


def _check_frozen(trained_on: Mapping[str, str], policy: SamPolicy) -> None:
    """Raise `ValueError` if a frozen model has other weights than when the policy was trained."""
    here = policy.frozen_weights()
    extractor: Any = policy.features_extractor
    if not hasattr(extractor.backbone, "weights_digest"):
        del here["backbone"]  # its digest depends on the precision, so on the device
    changed = [name for name in here if trained_on.get(name) != here[name]]
    if changed:
        raise ValueError(
            f"the policy was trained with other weights of the {' and the '.join(changed)}: "
            "restore the file that it was trained on, or train again"
        )


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
    resolve_device(device)  # a missing device is no fault of the file
    data = read_data(path)
    try:
        return _rebuilt(path, data, device)
    except OSError:  # the zip can be read: a file that it names cannot
        raise
    except Exception as error:  # a zip can be damaged in many ways
        raise _unreadable(path, error) from error


def _rebuilt(path: Path, data: dict[str, Any], device: str) -> SamPolicy:
    policy_class, arguments = _class_of(data), _arguments_of(data)
    observations, actions = (_space_of(data, kind) for kind in ("observation", "action"))
    grid = arguments.get("grid")
    discrete = isinstance(actions, spaces.Discrete)
    if grid is not None and discrete and not 0 <= actions.n - grid**2 <= grid**2 + _MAX_OTHERS:
        raise ValueError(f"{actions.n} actions on a grid of {grid}")
    weights = read_state(io.BytesIO(_entry(path, "policy.pth")))
    trained_on = data.get("policy_weights")
    for model in ("backbone", "clip"):
        if model in arguments["features"]:
            arguments["features"][model]["device"] = device
    _name_backbone(arguments["features"].get("backbone", {}), trained_on, observations)
    if resolve_device(device).type == "cpu" and arguments.get("precision") == "bf16-mixed":
        # Without matrix units, bfloat16 is several times slower than float32.
        arguments["precision"] = resolve_precision("auto", torch.device("cpu"))
    policy = policy_class(observations, actions, lambda _: 0.0, **arguments)
    if trained_on is not None:
        _check_frozen(trained_on, policy)
    own = policy.state_dict()
    reduce = "features_extractor.reduce.weight"
    if reduce in weights and reduce in own and weights[reduce].shape != own[reduce].shape:
        raise ValueError(
            f"the policy reads {weights[reduce].shape[1]} channels per image, the embedding has "
            f"{own[reduce].shape[1]}. Policies on HQ backbones and adapters with a "
            "router, where further features used to be channels, must be trained again"
        )
    policy.load_state_dict(weights)  # checks the shapes, which a small file can claim to be huge
    check_finite(policy.state_dict(), "policy")
    return policy.to(resolve_device(device))
