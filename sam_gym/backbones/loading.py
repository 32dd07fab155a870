"""Load backbones by name and share them within a process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam

from sam_gym.backbones import hub as huggingface
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.service import DTYPES, Backbone
from sam_gym.backbones.spec import BACKBONES, HUB_PREFIX, BackboneSpec
from sam_gym.utils.registry import unknown_name

#: Keys under which training frameworks save a state dict in a checkpoint.
_WRAPPERS = ("model", "state_dict")
#: Prefixes that they put before the name of every weight.
_PREFIXES = ("module.", "model.", "sam.")

_loaded: dict[tuple[str, str, str, str, bool, str, int], Backbone] = {}
_lock = threading.Lock()


def resolve_device(device: str = "auto") -> torch.device:
    """Return a torch device by name; "auto" is CUDA, then MPS, then CPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"Unknown device {device!r}: expected auto, cpu, mps, cuda or cuda:N."
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return a torch dtype by name; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a .safetensors or torch file, without running code in the file.

    The usual wrappers are removed: a checkpoint's `model` or `state_dict` entry, and the prefixes
    `module.`, `model.` and `sam.` if all names have them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, corrupt or not a state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return _without_prefixes(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every format has its own errors for a damaged file
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {error}). "
            "The file may be truncated: compare its size with the published one."
        ) from error
    state = _unwrapped(state)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a state dict of tensors, got {type(state).__name__}.")
    return _without_prefixes(state)


def _unwrapped(state: Any) -> Any:
    """Return the state dict of a checkpoint that also holds, for example, an optimizer's state."""
    while isinstance(state, dict):
        inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    return state


def _without_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    while state and (
        prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None)
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_weights(sam: Sam, name: str, path: Path) -> None:
    """Load a checkpoint of the backbone `name` strictly.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is unreadable, or its weights differ from those of the model.
    """
    state, convert = read_weights(path), BACKBONES.get(name).convert
    if convert is not None:
        state = convert(state)
    expected = sam.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    differences = {"missing": missing, "unexpected": extra, "of wrong shape": shapes}
    if any(differences.values()):
        found = [
            f"{len(items)} {kind} (first: {items[0]})"
            for kind, items in differences.items()
            if items
        ]
        raise ValueError(
            f"{path}: not a checkpoint of {name!r}: weights {'; '.join(found)}. "
            f"Pass the backbone that this file is for: {', '.join(BACKBONES)}."
        )
    sam.load_state_dict(state)


def _weights_of(spec: BackboneSpec) -> Path:
    """Return the path of a backbone's default weights, downloaded on first use."""
    if isinstance(spec.weights, Path):
        return spec.weights
    if spec.weights is None:
        raise ValueError(
            f"Backbone {spec.name!r} has no weights of its own: pass checkpoint='PATH'."
        )
    # `python -m sam_gym.backbones.download` must not find its module imported already.
    from sam_gym.backbones.download import published_checkpoint

    return published_checkpoint(spec.name)


def load_backbone(
    name: str = "micro",
    checkpoint: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    adapter: str | None = None,
) -> Backbone:
    """Load a backbone; the same arguments return the same object within a process.

    Args:
        name: a key of `BACKBONES`, or "hf:OWNER/NAME" (a SAM or SAM-HQ on the Hugging Face hub, or
            a local folder in its format).
        checkpoint: path of the weights. By default, the bundled weights, or the published ones,
            which are downloaded to `SAM_GYM_HOME` on first use.
        device: "auto" (CUDA, then MPS, then CPU), or a torch device.
        dtype: "auto" (bfloat16 on CUDA, else float32), "float32", "bfloat16" or "float16".
        compile: run the backbone through `torch.compile`: faster, after a slow first call of each
            batch size.
        adapter: path of an adapter file, as `python -m adaptation.train` writes it.

    Raises:
        ValueError: unknown name, device or dtype; the checkpoint or adapter does not fit; or the
            backbone has no weights and no checkpoint was passed.
        FileNotFoundError: the checkpoint or the adapter does not exist.
        ConnectionError: the published weights could not be downloaded.
        ImportError: the name begins with "hf:" and transformers is not installed.
    """
    spec = None if name.startswith(HUB_PREFIX) else BACKBONES.get(name)
    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    path: Path | None = None
    if checkpoint is not None:
        if spec is None:
            raise ValueError(f"{name!r} brings its own weights: leave checkpoint out.")
        path = Path(checkpoint).expanduser().resolve()
    elif spec is not None:
        path = _weights_of(spec)
    adaptation = None if adapter is None else Path(adapter).expanduser().resolve()
    # An adapter may be overwritten by a later training.
    written = adaptation.stat().st_mtime_ns if adaptation and adaptation.is_file() else 0
    key = (name, str(path), str(target), str(precision), compile, str(adaptation), written)
    with _lock:
        if key not in _loaded:
            if spec is None or path is None:
                sam = huggingface.load_from_hub(name.removeprefix(HUB_PREFIX))
            else:
                sam = spec.build()
                load_weights(sam, name, path)
            learned = None if adaptation is None else Adapter.load(adaptation)
            make = Backbone if spec is None or spec.service is None else spec.service
            _loaded[key] = make(name, sam, target, precision, compile, learned)
        return _loaded[key]
