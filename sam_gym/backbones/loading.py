"""Load backbones by name and share them within a process."""

from __future__ import annotations

import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import nn

from sam_gym.backbones import hub as huggingface
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.encoders import State
from sam_gym.backbones.service import DTYPES, Backbone
from sam_gym.backbones.spec import BACKBONES, BASE_DIGEST, HUB_PREFIX, BackboneSpec
from sam_gym.utils.digest import digest_of
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.shared import SharedObjects
from sam_gym.utils.text import reason_of
from sam_gym.utils.training import check_unpacked
from sam_gym.utils.weights import check_finite

#: Keys under which training frameworks save a state dict in a checkpoint.
_WRAPPERS = tuple("model state_dict model_state model_state_dict module sam net network".split())
#: What torch puts in front of a compiled or sharded part of a model.
_OF_TORCH = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: The parts of a SAM, whose names begin those of its weights.
_PARTS = re.compile(r"(image_encoder|prompt_encoder|mask_decoder)\.")
#: Modules and types of Python whose objects are data; trainings save no others.
_DATA_MODULES = frozenset({"argparse", "collections", "datetime", "decimal", "enum", "pathlib"})
_DATA_TYPES = frozenset(
    "types.SimpleNamespace builtins.dict builtins.frozenset builtins.list builtins.slice".split()
)
_SAVE_STATE_DICT = "Save the weights alone: torch.save(model.state_dict(), PATH)."

_loaded: SharedObjects[Backbone] = SharedObjects()


def resolve_device(device: str = "auto") -> torch.device:
    """Return a torch device by name; "auto" is CUDA, then MPS, then CPU.

    Raises:
        ValueError: the name is unknown, this machine has no such device, or this process was
            forked from one that had used it.
    """
    if device != "auto":
        try:
            found = torch.device(device)
        except (RuntimeError, TypeError):
            found = None
        counts = {
            "cpu": 1,
            "mps": int(torch.backends.mps.is_available()),
            "cuda": torch.cuda.device_count(),
        }
        if found is None or found.type not in counts:
            raise ValueError(f"Unknown device {device!r}: expected auto, cpu, mps, cuda or cuda:N.")
        _check_after_fork(found)
        if (found.index or 0) >= counts[found.type]:
            here = [f"{count} {kind}" for kind, count in counts.items() if count]
            raise ValueError(
                f"Device {device!r} is not available here (devices: {', '.join(here)}). Take the "
                "device auto or cpu."
            )
        return found
    if torch.cuda.device_count():  # without a GPU, even having looked for one counts as a use
        _check_after_fork(torch.device("cuda"))
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_after_fork(device: torch.device) -> None:
    """Raise `ValueError` if this process was forked from one that had used the accelerator."""
    is_in_bad_fork = getattr(getattr(torch, device.type, None), "_is_in_bad_fork", bool)
    if is_in_bad_fork():
        raise ValueError(
            f"This process was forked from one that had used {device.type}, so it cannot use it. "
            "Start workers with 'spawn' (AsyncVectorEnv: context='spawn'; SubprocVecEnv: "
            "start_method='spawn'), pass device='cpu', or play all sub-environments in one "
            "process: gymnasium.make_vec(..., vectorization_mode='vector_entry_point')."
        )


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return a torch dtype by name; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a .safetensors or torch file, without running code in the file.

    The usual wrappers are removed: entries such as `model` or `state_dict` of a checkpoint, and
    a prefix such as `module.sam.` if all names have it. Whatever else the checkpoint
    holds (an optimizer's state, an `argparse.Namespace`) is ignored.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, corrupt or not a state dict of dense tensors.
    """
    if path.is_dir():
        raise ValueError(
            f"{path}: a folder, not a checkpoint file. A folder of transformers is a backbone by "
            f"itself: '{HUB_PREFIX}PATH'."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file.")
    try:
        content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    except Exception as error:  # every format has its own errors for a damaged file
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: not a readable checkpoint: it holds {named[1]}, and only weights and "
                f"plain data are read from files. {_SAVE_STATE_DICT}"
            ) from error
        if "TorchScript" in str(error):
            raise ValueError(f"{path}: a TorchScript archive. {_SAVE_STATE_DICT}") from error
        raise ValueError(
            f"{path}: not a readable checkpoint ({reason_of(error)}). The file may be truncated: "
            "compare its size with the published one."
        ) from error
    state = next(_state_dicts(content), None)
    if state is None and isinstance(content, dict):
        # One of a SAM under another name.
        others = [own for value in content.values() for own in _state_dicts(value)]
        sams = [own for own in others if any(map(_PARTS.search, own))]
        state = sams[0] if len(sams) == 1 else None
    if state is None:
        raise ValueError(
            f"{path}: not a state dict of tensors, got {_described(content)}. {_SAVE_STATE_DICT}"
        )
    for name, value in state.items():
        if value.is_meta or value.is_quantized or value.layout is not torch.strided:
            kind = f"{value.device.type} tensor of {value.dtype}, {value.layout}"
            raise ValueError(f"{path}: {name} is a {kind}. Save the weights as dense tensors.")
    return _without_prefixes(state)


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file, or a head of the SAM-Cityscapes code (.pth, .pt).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is unreadable, or neither of them.
    """
    if path.suffix in (".pth", ".pt"):
        return Adapter.of_seed_head(read_weights(path), path)
    return Adapter.load(path)


class _Ignored:
    """Takes the place of numpy objects in a checkpoint; holds nothing."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _IgnoredDict:
    """Takes the place of other objects in a checkpoint, which may be kinds of dictionaries."""

    def __new__(cls, *args: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def _is_safetensors(path: Path) -> bool:
    """Return whether a file, of any name, has the header of safetensors: a length and JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: Path) -> Any:
    """Read a torch file with `weights_only`; objects of other programs become empty ones.

    Raises:
        UnpicklingError: the file names functions of Python's own library.
        ValueError: it would unpack to much more than its size.
    """
    check_unpacked(path, times=2)  # torch compresses at most the code of TorchScript
    try:
        return _load_plain(path)
    except pickle.UnpicklingError:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # the format before torch 1.6
            names = []
    replaced: list[Any] = []
    for name in names or ["argparse.Namespace"]:
        package = name.partition(".")[0]
        is_data = package in _DATA_MODULES or name in _DATA_TYPES
        if is_data or package not in sys.stdlib_module_names:
            replaced.append((_Ignored if package == "numpy" else _IgnoredDict, name))
    with torch.serialization.safe_globals(replaced):
        try:
            return _load_plain(path)
        except (AttributeError, TypeError, pickle.UnpicklingError) as error:
            if "GLOBAL" in str(error) or not names:
                raise
            # Its objects are neither of our two.
            raise pickle.UnpicklingError(f"GLOBAL {','.join(sorted(names))}") from error


def _load_plain(path: Path) -> Any:
    # Of a file, since torch takes the suffix of a path for the format.
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _state_dicts(content: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the state dicts in a checkpoint that also holds, for example, an optimizer's state."""
    if not isinstance(content, dict):
        return
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    # Settings may lie among the weights, and a tensor of a metric beside a wrapped state dict.
    if tensors and (len(tensors) == len(content) or any("." in key for key in tensors)):
        yield tensors
    for key in _WRAPPERS:
        yield from _state_dicts(content.get(key))


def _described(content: Any) -> str:
    if not isinstance(content, dict) or not content:
        return "nothing that is read from files" if content == {} else type(content).__name__
    keys = ", ".join(repr(key) for key in list(content)[:5])
    return f"{type(content).__name__} with the keys {keys}{', ...' * (len(content) > 5)}"


def _without_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {_OF_TORCH.sub("", key): value for key, value in state.items()}
    part = next(filter(None, map(_PARTS.search, state)), None)
    prefix = part.string[: part.start()] if part else ""
    if all(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def read_state_of(spec: BackboneSpec, path: Path) -> State:
    """Read a checkpoint of a backbone, together with the weights that it extends.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is unreadable, or extends other weights than there are.
    """
    state = read_weights(path)
    if not spec.base:
        return state
    base = read_base(spec)
    expected = state.pop(BASE_DIGEST, None)
    if expected is None or bytes(expected.tolist()).hex() != digest_of(base):
        raise ValueError(
            f"{path}: made for other weights of {spec.base!r} than those of this version. Train "
            f"{spec.name!r} again, or pass the file that came with these weights."
        )
    return base | state


def read_base(spec: BackboneSpec) -> State:
    """Read the weights that the file of a backbone extends."""
    return read_weights(_weights_of(BACKBONES.get(spec.base)))


def load_weights(sam: Sam, name: str, path: Path) -> None:
    """Load a checkpoint of the backbone `name` strictly.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is unreadable, or its weights differ from those of the model in name,
            shape or type, or are not finite.
    """
    spec = BACKBONES.get(name)
    state, convert = read_state_of(spec, path), spec.convert
    load_state(sam, state if convert is None else convert(state), name, path)


def renamed_checkpoint(path: Path) -> str | None:
    """Return the present name of the backbone, renamed since, whose weights a file holds, or None.

    A file that cannot be read has none.
    """
    try:
        return _renamed_backbone_of(read_weights(path))
    except (OSError, ValueError):
        return None


def _renamed_backbone_of(state: State) -> str | None:
    """Return the renamed backbone whose weights have the names and shapes of a state dict."""
    shapes = {key: value.shape for key, value in state.items()}
    for spec in BACKBONES.values():
        if spec.digest:
            with torch.device("meta"):
                expected = spec.build().state_dict()
            if shapes == {key: value.shape for key, value in expected.items()}:
                return spec.name
    return None


def load_state(module: nn.Module, state: State, name: str, path: Path) -> None:
    """Load a state dict strictly; `name` and `path` are for messages. Errors of `load_weights`."""
    expected = module.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    types = [
        f"{key} is {state[key].dtype}, expected {value.dtype}"
        for key, value in expected.items()
        if key in state and value.is_floating_point() > state[key].is_floating_point()
    ]
    differences = {
        "missing": missing,
        "unexpected": extra,
        "of wrong shape": shapes,
        "of wrong type": types,
    }
    if any(differences.values()):
        found = [
            f"{len(items)} {kind} (first: {items[0]})"
            for kind, items in differences.items()
            if items
        ]
        prefixed = [key for key in extra if missing and key.endswith(f".{missing[0]}")]
        renamed = _renamed_backbone_of(state)
        remedy = (
            f"Remove the prefix {prefixed[0].removesuffix(missing[0])!r} from its names."
            if prefixed
            else f"Pass the backbone that this file is for: {renamed or ', '.join(BACKBONES)}."
        )
        raise ValueError(
            f"{path}: not a checkpoint of {name!r}: weights {'; '.join(found)}. {remedy}"
        )
    state = {key: state[key].to(value.dtype) for key, value in expected.items()}
    check_finite(state, path)
    module.load_state_dict(state)


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


def _load_memory(spec: BackboneSpec, state: State, path: Path | None) -> Any:
    """Return the video memory of a SAM; None if the checkpoint has only the image part."""
    assert spec.memory is not None and path is not None
    build, convert = spec.memory
    own = convert(state)
    if not own:
        return None
    memory = build()
    load_state(memory, own, spec.name, path)
    return memory.eval().requires_grad_(False)


def load_backbone(
    name: str = "micro",
    checkpoint: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    adapter: str | None = None,
) -> Backbone:
    """Load a backbone; the same arguments return the same object within a process.

    A checkpoint or adapter that was written since is loaded again; objects that exist keep theirs.

    Args:
        name: a key of `BACKBONES`; "hf:OWNER/NAME" (a SAM, SAM-HQ, SAM 2 or EdgeTAM on the Hugging
            Face hub, or a local folder in its format); or "module:SPEC", a `BackboneSpec` of yours.
        checkpoint: path of the weights. By default, the bundled weights, or the published ones,
            which are downloaded to `SAM_GYM_HOME` on first use.
        device: "auto" (CUDA, then MPS, then CPU), or a torch device.
        dtype: "auto" (bfloat16 on CUDA, else float32), "float32", "bfloat16" or "float16".
        compile: run the backbone through `torch.compile`: faster, after a slow first call of each
            batch size.
        adapter: path of an adapter file, as `python -m adaptation.train` writes it, or of a head
            of the SAM-Cityscapes code (seg_head_epoch_N.pth).

    Raises:
        ValueError: unknown name, device or dtype; the checkpoint or adapter does not fit; the
            backbone has no weights and no checkpoint was passed; or the process was forked from
            one that had used the accelerator.
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

    def load() -> Backbone:
        if spec is None or path is None:
            sam = huggingface.load_from_hub(name.removeprefix(HUB_PREFIX))
            check_finite(sam.state_dict(), name)
        else:
            sam = spec.build()
            state = read_state_of(spec, path)
            load_state(sam, state if spec.convert is None else spec.convert(state), name, path)
        learned = None if adaptation is None else read_adapter(adaptation)
        make = Backbone if spec is None or spec.service is None else spec.service
        backbone = make(name, sam, target, precision, compile, learned)
        if spec is not None and spec.memory is not None:
            backbone.memory = _load_memory(spec, state, path)
        if learned is not None:
            learned.tune_memory(backbone.memory, str(adaptation))
        return backbone

    folder = Path(name.removeprefix(HUB_PREFIX)).expanduser()
    files = [file for file in (path or folder, adaptation) if file is not None]
    if spec is not None and spec.base:
        files.append(_weights_of(BACKBONES.get(spec.base)))
    return _loaded.get((name, path, target, precision, compile, adaptation), files, load)
