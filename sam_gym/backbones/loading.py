"""Which SAMs there are, and how their weights are loaded and shared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from segment_anything.build_sam import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from segment_anything.modeling import Sam

from sam_gym.backbones import hub as huggingface
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.encoders import (
    State,
    build_mobile_sam,
    build_repvit_sam,
    mobile_sam_state,
    repvit_sam_state,
)
from sam_gym.backbones.hq import build_hq_vit_b, build_hq_vit_h, build_hq_vit_l
from sam_gym.backbones.micro.model import build_hq_micro, build_micro
from sam_gym.backbones.service import DTYPES, Backbone
from sam_gym.utils.registry import unknown_name

_WEIGHTS = Path(__file__).parent / "micro" / "weights"
MICRO_WEIGHTS = _WEIGHTS / "micro.safetensors"
#: Backbone name -> the weights that come with the package.
BUNDLED = {"micro": MICRO_WEIGHTS, "hq_micro": _WEIGHTS / "hq_micro.safetensors"}

#: Backbone name -> what builds it with random weights.
BACKBONES: dict[str, Callable[[], Sam]] = {
    "micro": build_micro,
    "hq_micro": build_hq_micro,
    "vit_b": build_sam_vit_b,
    "vit_l": build_sam_vit_l,
    "vit_h": build_sam_vit_h,
    "mobile_sam": build_mobile_sam,
    "repvit_sam": build_repvit_sam,
    "hq_vit_b": build_hq_vit_b,
    "hq_vit_l": build_hq_vit_l,
    "hq_vit_h": build_hq_vit_h,
}


def _on_micro(head: State) -> State:
    """A file of `hq_micro` holds the HQ head; what it leaves out is as in `micro`."""
    return read_weights(MICRO_WEIGHTS) | head


#: Backbone name -> what turns a state dict as it is published into one of the model.
_CONVERSIONS: dict[str, Callable[[State], State]] = {
    "hq_micro": _on_micro,
    "mobile_sam": mobile_sam_state,
    "repvit_sam": repvit_sam_state,
}

_loaded: dict[tuple[str, str, str, str, bool, str, int], Backbone] = {}
_lock = threading.Lock()


def resolve_device(device: str = "auto") -> torch.device:
    """The torch device of a name; "auto" is CUDA, then MPS, then CPU."""
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
    """The torch dtype of a name; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a .safetensors file, or from a torch file without running any code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, corrupt or not a state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every format has its own errors for a damaged file
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {error}). "
            "The file may be truncated: compare its size with the published one."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a state dict of tensors, got {type(state).__name__}.")
    return state


def load_weights(sam: Sam, name: str, path: Path) -> None:
    """Load a checkpoint strictly; raises `ValueError` that says how it differs from `name`."""
    state = _CONVERSIONS.get(name, lambda state: state)(read_weights(path))
    expected = sam.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or extra or shapes:
        found = []
        for kind, items in (
            ("missing", missing),
            ("unexpected", extra),
            ("of wrong shape", shapes),
        ):
            if items:
                found.append(f"{len(items)} {kind} (first: {items[0]})")
        raise ValueError(
            f"{path}: not a checkpoint of {name!r}: weights {'; '.join(found)}. "
            f"Pass the backbone that this file is for: {', '.join(BACKBONES)}."
        )
    sam.load_state_dict(state)


def _published(name: str) -> Path:
    # Imported late: `python -m sam_gym.backbones.download` would else find itself imported.
    from sam_gym.backbones.download import published_checkpoint

    return published_checkpoint(name)


def load_backbone(
    name: str = "micro",
    checkpoint: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    adapter: str | None = None,
) -> Backbone:
    """The shared backbone of a name; the same arguments give the same object in a process.

    Args:
        name: a key of `BACKBONES`, or "hf:OWNER/NAME" (of type SAM or SAM-HQ; also a folder).
        checkpoint: path of the weights. `micro` and `hq_micro` bring theirs; the published ones are
            downloaded into `SAM_GYM_HOME` when they are first asked for.
        device: "auto" (CUDA, then MPS, then CPU), or a torch device.
        dtype: "auto" (bfloat16 on CUDA, else float32), "float32", "bfloat16" or "float16".
        compile: run it through `torch.compile` (see `Backbone`): faster, after a slow first call of
            each batch size.
        adapter: path of an adapter file (`python -m adaptation.train` writes them): the SAM as it
            was adapted.

    Raises:
        ValueError: unknown name, device or dtype, or a checkpoint or adapter that does not fit.
        FileNotFoundError: the checkpoint or the adapter does not exist.
        ConnectionError: none was given, and the published one could not be downloaded.
        ImportError: the name begins with "hf:" and transformers is not installed.
    """
    from_hub = name.startswith(huggingface.PREFIX)
    if not from_hub and name not in BACKBONES:
        raise unknown_name("backbone", name, BACKBONES)
    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    path: Path | None
    if from_hub:
        if checkpoint is not None:
            raise ValueError(f"{name!r} brings its own weights: leave checkpoint out.")
        path = None
    elif checkpoint is None:
        path = BUNDLED.get(name) or _published(name)
    else:
        path = Path(checkpoint).expanduser().resolve()
    adaptation = None if adapter is None else Path(adapter).expanduser().resolve()
    # An adapter may be trained anew and written to the same path.
    written = adaptation.stat().st_mtime_ns if adaptation and adaptation.is_file() else 0
    key = (name, str(path), str(target), str(precision), compile, str(adaptation), written)
    with _lock:
        if key not in _loaded:
            if path is None:
                sam = huggingface.load_from_hub(name.removeprefix(huggingface.PREFIX))
            else:
                sam = BACKBONES[name]()
                load_weights(sam, name, path)
            learned = None if adaptation is None else Adapter.load(adaptation)
            _loaded[key] = Backbone(name, sam, target, precision, compile, learned)
        return _loaded[key]
