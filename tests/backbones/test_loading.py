"""Loading and sharing backbones, and what a bad checkpoint gets told."""

import argparse
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from sam_gym.backbones import (
    BACKBONES,
    Backbone,
    Prompts,
    PublishedWeights,
    load_backbone,
    loading,
)
from sam_gym.utils.digest import file_digest
from sam_gym.utils.shared import SharedObjects


@pytest.fixture(autouse=True)
def empty_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded yet."""
    monkeypatch.setattr(loading, "_loaded", SharedObjects())


@pytest.fixture
def small_vit_b(add_backbone: Callable[..., None], build_tiny: Callable[[], Sam]) -> None:
    """`vit_b` is a SAM of the same layout whose weights are a few KB."""
    add_backbone("vit_b", build=build_tiny)


def test_same_arguments_give_the_same_object(micro_checkpoint: str) -> None:
    one = load_backbone("micro", checkpoint=micro_checkpoint, device="cpu")
    assert load_backbone("micro", checkpoint=micro_checkpoint, device="cpu") is one
    folder, _, name = micro_checkpoint.rpartition("/")
    assert (
        load_backbone("micro", f"{folder}/../{Path(folder).name}/{name}", "cpu", "float32") is one
    )
    assert load_backbone("micro", micro_checkpoint, "cpu", "bfloat16") is not one


def test_threads_share_one_object(micro_checkpoint: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load_backbone, "micro", micro_checkpoint, "cpu") for _ in range(8)]
    assert len({id(load.result()) for load in loads}) == 1


def test_weights_are_those_of_the_file(micro_checkpoint: str) -> None:
    loaded = load_backbone("micro", checkpoint=micro_checkpoint, device="cpu").sam.state_dict()
    expected = load_file(micro_checkpoint)
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key


def test_half_precision_files_load_as_float32(micro_checkpoint: str, tmp_path: Path) -> None:
    state = {
        k: v.half() if v.is_floating_point() else v for k, v in load_file(micro_checkpoint).items()
    }
    save_file(state, tmp_path / "half.safetensors")
    sam = load_backbone("micro", str(tmp_path / "half.safetensors"), "cpu").sam
    assert {p.dtype for p in sam.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mirco"}, r"Unknown backbone 'mirco'\. Did you mean 'micro'\?"),
        ({"name": "vit-b"}, r"Did you mean 'vit_b'\? Valid names: .*micro, .*vit_h, vit_l\."),
        ({"device": "gpu:x"}, r"Unknown device 'gpu:x': expected auto, cpu"),
        ({"device": "meta"}, r"Unknown device 'meta': expected auto, cpu"),
        ({"device": "cuda:99"}, r"'cuda:99' is not available here \(devices: 1 cpu"),
        ({"dtype": "flaot32"}, r"Unknown dtype 'flaot32'\. Did you mean 'float32'\?"),
    ],
)
def test_unknown_names(micro_checkpoint: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(
            **{"name": "micro", "checkpoint": micro_checkpoint, "device": "cpu", **arguments}
        )


def test_published_weights_are_fetched_on_first_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_vit_b: None,
    add_backbone: Callable[..., None],
    tiny_checkpoint: str,
) -> None:
    published = PublishedWeights(
        Path(tiny_checkpoint).as_uri(), file_digest(Path(tiny_checkpoint)), 1
    )
    monkeypatch.setenv("SAM_GYM_HOME", str(tmp_path))
    add_backbone("vit_b", weights=published)
    backbone = load_backbone("vit_b", device="cpu")
    assert (tmp_path / "checkpoints" / "tiny.pth").is_file()
    assert load_backbone("vit_b", device="cpu") is backbone


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such checkpoint file"):
        load_backbone("micro", checkpoint=str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_file_is_named(micro_checkpoint: str, tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(load_file(micro_checkpoint), whole)
    else:
        whole.write_bytes(Path(micro_checkpoint).read_bytes())
    load_backbone("micro", str(whole), "cpu")
    broken = tmp_path / f"broken{suffix}"
    broken.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=rf"broken\{suffix}: not a readable checkpoint .*truncated"
    ):
        load_backbone("micro", str(broken), "cpu")


def test_failed_load_leaves_nothing_behind(micro_checkpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "later.safetensors"
    path.write_bytes(b"not yet")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_backbone("micro", str(path), "cpu")
    path.write_bytes(Path(micro_checkpoint).read_bytes())
    assert load_backbone("micro", str(path), "cpu").name == "micro"


def test_checkpoint_of_the_first_micro_names_it() -> None:
    first = BACKBONES.get("micro-v0").weights
    with pytest.raises(ValueError, match="not a checkpoint of 'micro': .* is for: micro-v0\\."):
        load_backbone("micro", checkpoint=str(first), device="cpu")


def test_checkpoint_of_another_architecture(micro_checkpoint: str, tiny_checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"tiny\.pth: not a checkpoint of 'micro': .* missing .*"):
        load_backbone("micro", checkpoint=tiny_checkpoint, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mask_decoder.iou_token.weight"), r"1 missing \(first: mask_decoder\.iou"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(first: extra\)"),
        (
            lambda s: s.update({"mask_decoder.iou_token.weight": torch.zeros(1, 64)}),
            r"1 of wrong shape \(first: .* is \(1, 64\), expected \(1, 128\)\)",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_keys_are_strict(
    micro_checkpoint: str, tmp_path: Path, change: Callable[[dict], Any], message: str
) -> None:
    state = load_file(micro_checkpoint)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=message):
        load_backbone("micro", str(tmp_path / "changed.safetensors"), "cpu")


class Evil:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, legacy: bool) -> None:
    proof, path = tmp_path / "proof", tmp_path / "evil.pth"
    torch.save(Evil(proof), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil\.pth: not a readable checkpoint"):
        load_backbone("micro", str(path), "cpu")
    assert not proof.exists()
    pickle.load(io.BytesIO(pickle.dumps(Evil(proof))))
    assert proof.exists()  # it would have run


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "optimizer": {"lr": 0.1}, "epoch": 3},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "step": 7},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"model": {f"module.sam.{k}": v for k, v in s.items()}},
        lambda s: {f"sam.{k}": v for k, v in s.items()},
        lambda s: {f"_forward_module.student.{k}": v for k, v in s.items()},
        lambda s: {f"_fsdp_wrapped_module.{k}": v for k, v in s.items()},
        lambda s: {"ema": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        lambda s: {"model": s, "settings": SimpleNamespace(lr=0.1)},
    ],
    ids="model lightning data-parallel nested sam deepspeed sharded ema namespace".split(),
)
def test_wrappers_of_checkpoints_are_removed(
    micro_checkpoint: str, tmp_path: Path, wrap: Callable[[dict], dict]
) -> None:
    state = load_file(micro_checkpoint)
    torch.save(wrap(state), tmp_path / "wrapped.pth")
    loaded = load_backbone("micro", str(tmp_path / "wrapped.pth"), "cpu").sam.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


class Attributes(dict):
    """A dictionary of another program, as Lightning's `AttributeDict`."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "args": argparse.Namespace(lr=0.1), "best": torch.tensor(0.5)},
        lambda s: s | {"args": argparse.Namespace(lr=0.1)},
        lambda s: {"model_state": {f"sam.{k}": v for k, v in s.items()}, "epoch": 3},
        lambda s: {
            "model": "vit_b",
            "model_state_dict": {f"_orig_mod.{k}": v for k, v in s.items()},
        },
    ],
    ids=["namespace", "namespace among weights", "micro-sam", "compiled"],
)
def test_checkpoints_of_other_programs(
    small_vit_b: None, build_tiny: Callable[[], Sam], tmp_path: Path, wrap: Any, legacy: bool
) -> None:
    state = build_tiny().state_dict()
    path = tmp_path / "other.pth"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_backbone("vit_b", str(path), "cpu").sam.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_objects_beside_the_weights_are_ignored(
    small_vit_b: None, build_tiny: Callable[[], Sam], tmp_path: Path
) -> None:
    settings = argparse.Namespace(out=Path("runs"), best=np.float64(0.5), kind=Attributes(a=1))
    content = {"state_dict": build_tiny().state_dict(), "hyper_parameters": settings}
    torch.save(content | {"scores": [np.float32(1.0), np.zeros(3)]}, tmp_path / "objects.ckpt")
    assert load_backbone("vit_b", str(tmp_path / "objects.ckpt"), "cpu").name == "vit_b"


def test_code_beside_the_weights_is_refused(build_tiny: Callable[[], Sam], tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "evil.pth"
    torch.save({"model": build_tiny().state_dict(), "args": Evil(proof)}, path)
    with pytest.raises(ValueError, match=r"evil\.pth: not a readable checkpoint: it holds getattr"):
        load_backbone("micro", str(path), "cpu")
    assert not proof.exists()


def test_a_pickled_module_is_refused(build_tiny: Callable[[], Sam], tmp_path: Path) -> None:
    torch.save(build_tiny(), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"not a state dict.*torch\.save\(model\.state_dict\(\)"):
        load_backbone("micro", str(tmp_path / "module.pth"), "cpu")


def test_an_unknown_prefix_is_named(
    small_vit_b: None, build_tiny: Callable[[], Sam], tmp_path: Path
) -> None:
    state = {f"student.{k}": v for k, v in build_tiny().state_dict().items()}
    state["teacher.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "student.pth")
    with pytest.raises(ValueError, match=r"Remove the prefix 'student\.' from its names"):
        load_backbone("vit_b", str(tmp_path / "student.pth"), "cpu")


class Seen(list):
    """A list of another program."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.to("meta"), r"is a meta tensor of .*Save the weights as dense tensors"),
        (lambda v: v.to_sparse(), r"is a cpu tensor of torch.float32, torch.sparse_coo"),
        (lambda v: v.to(torch.int8), r"1 of wrong type \(first: .* is torch.int8, expected"),
    ],
    ids=["meta", "sparse", "int8"],
)
def test_tensors_without_values_of_weights(
    micro_checkpoint: str, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    state, name = load_file(micro_checkpoint), "mask_decoder.iou_token.weight"
    torch.save(state | {name: change(state[name])}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=f"odd.pth: .*{message}"):
        load_backbone("micro", str(tmp_path / "odd.pth"), "cpu")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_why_a_file_is_no_checkpoint(micro_checkpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    for content, message in (
        ({"model": load_file(micro_checkpoint), "seen": Seen([1])}, r"it holds \S*Seen, and only"),
        ({0: torch.zeros(1)}, "not a state dict of tensors, got dict with the keys 0"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_backbone("micro", str(path), "cpu")
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="The file may be truncated"):
        load_backbone("micro", str(path), "cpu")
    torch.jit.trace(torch.nn.ReLU(), torch.ones(1)).save(str(path))
    with pytest.raises(ValueError, match="a TorchScript archive. Save the weights alone"):
        load_backbone("micro", str(path), "cpu")


def test_weights_of_8_bits(micro_checkpoint: str, tmp_path: Path) -> None:
    state, name = load_file(micro_checkpoint), "mask_decoder.iou_token.weight"
    torch.save(state | {name: state[name].to(torch.float8_e5m2)}, tmp_path / "float8.pth")
    loaded = load_backbone("micro", str(tmp_path / "float8.pth"), "cpu").sam.state_dict()
    assert torch.allclose(loaded[name], state[name], rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    small_vit_b: None, build_tiny: Callable[[], Sam], tmp_path: Path, value: float
) -> None:
    state = build_tiny().state_dict()
    state["mask_decoder.iou_token.weight"][0, 0] = value
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"nan\.pth: 1 of \d+ weights are NaN or infinite"):
        load_backbone("vit_b", str(tmp_path / "nan.pth"), "cpu")


def test_a_file_that_was_written_again_is_loaded_again(
    small_vit_b: None, build_tiny: Callable[[], Sam], tmp_path: Path
) -> None:
    state, path = build_tiny().state_dict(), tmp_path / "tuned.pth"
    name = "mask_decoder.iou_token.weight"
    torch.save(state, path)
    written = path.stat()
    first = load_backbone("vit_b", str(path), "cpu")
    path.touch()
    assert load_backbone("vit_b", str(path), "cpu") is first
    torch.save(state | {name: 2 * state[name]}, path)
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))  # as rsync and cp -p do
    second = load_backbone("vit_b", str(path), "cpu")
    assert torch.equal(second.sam.state_dict()[name], 2 * state[name])
    assert torch.equal(first.sam.state_dict()[name], state[name])
    path.unlink()
    with pytest.raises(FileNotFoundError, match="tuned.pth"):
        load_backbone("vit_b", str(path), "cpu")


def test_what_is_wrapped_loads_strictly(micro_checkpoint: str, tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in load_file(micro_checkpoint).items()}
    torch.save({"model": state | {"head.weight": torch.zeros(1)}}, tmp_path / "more.pth")
    with pytest.raises(
        ValueError, match=r"more\.pth: not a checkpoint of 'micro': weights \d+ miss"
    ):
        load_backbone("micro", str(tmp_path / "more.pth"), "cpu")
    save_file(
        {k.removeprefix("module."): v for k, v in state.items()} | {"head.weight": torch.zeros(1)},
        tmp_path / "more.safetensors",
    )
    with pytest.raises(ValueError, match=r"1 unexpected \(first: head.weight\)"):
        load_backbone("micro", str(tmp_path / "more.safetensors"), "cpu")


def test_the_content_of_a_file_decides_and_not_its_name(
    small_vit_b: None, build_tiny: Callable[[], Sam], tmp_path: Path
) -> None:
    state = build_tiny().state_dict()
    save_file(state, tmp_path / "weights.pth")
    torch.save(state, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        assert load_backbone("vit_b", str(tmp_path / name), "cpu").name == "vit_b"
    with pytest.raises(ValueError, match="a folder, not a checkpoint file.*'hf:PATH'"):
        load_backbone("vit_b", str(tmp_path), "cpu")


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": {"weight": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match=r"nested\.pth: not a state dict of tensors, got dict"):
        load_backbone("micro", str(tmp_path / "nested.pth"), "cpu")


def test_published_layout(
    small_vit_b: None, tiny_checkpoint: str, build_tiny: Callable[[], Sam]
) -> None:
    """A torch file with a flat state dict, as SAM's authors publish it."""
    backbone = load_backbone("vit_b", checkpoint=tiny_checkpoint, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (50, 64, 3), dtype=np.uint8)
    logits, _ = backbone.decode(
        backbone.encode([image]), Prompts(torch.tensor([[[20.0, 9.0]]]), torch.tensor([[1]]))
    )
    predictor = SamPredictor(build_tiny())
    predictor.set_image(image)
    _, _, expected = predictor.predict(
        np.array([[20.0, 9.0]]), np.array([1]), multimask_output=False, return_logits=True
    )
    np.testing.assert_allclose(logits[0].numpy(), expected, atol=1e-4 * expected.std())


def test_the_sams_of_the_paper_can_be_built() -> None:
    """Names and sizes of the published checkpoints, without allocating them."""
    for name, width, depth in (("vit_b", 768, 12), ("vit_l", 1024, 24), ("vit_h", 1280, 32)):
        with torch.device("meta"):
            sam = BACKBONES.get(name).build()
        state = sam.state_dict()
        assert state[f"image_encoder.blocks.{depth - 1}.attn.qkv.weight"].shape == (
            3 * width,
            width,
        )
        assert f"image_encoder.blocks.{depth}.attn.qkv.weight" not in state
        assert state["image_encoder.neck.0.weight"].shape == (256, width, 1, 1)


def test_automatic_precision_on_cpu_is_float32() -> None:
    assert loading.resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert loading.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_shipped_weights(shipped: Backbone) -> None:
    assert shipped.name == "micro" and not shipped.sam.training
    assert 0 < BACKBONES.get("micro").megabytes < 16
    assert all(torch.isfinite(value).all() for value in shipped.sam.state_dict().values())


def test_checkpoints_unpack_to_about_their_size(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(100_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as old,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert loading.read_weights(tmp_path / "plain.pth")["x"].shape == (100_000,)
    with pytest.raises(ValueError, match=r"packed\.pth: not a readable .* bytes that unpack to 40"):
        loading.read_weights(tmp_path / "packed.pth")


def test_a_fork_of_a_process_with_cuda_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    message = r"forked from one that had used cuda.*context='spawn'.*device='cpu'.*'vector_entry_p"
    with pytest.raises(ValueError, match=message):
        load_backbone("micro", device="cuda")
    assert load_backbone("micro", device="cpu").device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=message):
        load_backbone("micro")


def test_a_fork_without_a_gpu_chooses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)  # the parent looked for a GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_backbone("micro").device.type in ("cpu", "mps")
