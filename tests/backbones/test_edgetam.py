"""EdgeTAM as an image model and as a tracker, against transformers, and its checkpoint."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sam_gym.backbones import BACKBONES, Backbone, download, load_backbone
from sam_gym.backbones.edgetam import EdgeTamEncoder, edgetam_memory_state, edgetam_state
from sam_gym.backbones.encoders import State
from sam_gym.backbones.hub import converted
from sam_gym.backbones.sam2 import assemble_sam2
from sam_gym.backbones.video import memory as memories
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.backbones.video.perceiver import Perceiver
from sam_gym.backbones.video.session import TrackingSession
from sam_gym.backbones.video.tracker import VideoTracker

SIZE, WIDTH, GRID = 128, 128, (8, 8)
WIDTHS, DEPTHS = (8, 16, 24, 32), (1, 1, 2, 1)
#: Global latents, windows along a side.
LATENTS, SIDE = 6, 4
FRAMES, HEIGHT, LENGTH = 12, 96, 150
#: How far logits may be from transformers', in units of the standard deviation of theirs.
TOLERANCE = 1e-4


# transformers' models ---------------------------------------------------------------------------


def parts_of_config(transformers: Any) -> dict[str, Any]:
    trunk = transformers.TimmWrapperConfig(
        architecture="repvit_m1",
        model_args={
            "in_chans": 3,
            "features_only": True,
            "out_indices": [0, 1, 2, 3],
            "embed_dim": list(WIDTHS),
            "depth": list(DEPTHS),
        },
    )
    return {
        "vision_config": transformers.EdgeTamVisionConfig(
            backbone_config=trunk,
            backbone_channel_list=list(WIDTHS[::-1]),
            backbone_feature_sizes=[[SIZE // stride] * 2 for stride in (4, 8, 16)],
            fpn_hidden_size=WIDTH,
        ),
        "prompt_encoder_config": {"hidden_size": WIDTH, "image_size": SIZE, "patch_size": 16},
        "mask_decoder_config": {
            "hidden_size": WIDTH,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": WIDTH,
        },
    }


def randomized(model: Any) -> Any:
    """The model with random weights that all matter, also those of its norms."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=noise)
            elif value.is_floating_point() and "positional_embedding" not in name:
                spread = 0.3 if value.ndim < 2 else 1.0 / value.flatten(1).shape[1] ** 0.5
                value.normal_(0.0, spread, generator=noise)
                if ".bn.weight" in name or ("norm" in name and name.endswith("weight")):
                    value += 1.0
        shared = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A small model, and the folder where transformers saved it."""
    transformers = pytest.importorskip(
        "transformers", "5.0", reason="transformers is not installed"
    )
    config = transformers.EdgeTamConfig(**parts_of_config(transformers))
    model, folder = randomized(transformers.EdgeTamModel(config)), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, str(folder)


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", ["points", "box", "box and points", "mask and points"])
def test_masks_of_transformers(
    saved: tuple[Any, str],
    multimask: bool,
    prompt: str,
    assert_masks_of: Callable[[Any, Backbone, str, bool], None],
) -> None:
    model, folder = saved
    assert_masks_of(model, load_backbone(f"hf:{folder}", device="cpu"), prompt, multimask)


#: (pattern, replacement) from transformers' names of the memory to the authors', in this order.
MEMORY_NAMES = (
    (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
    (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
    (r"^no_object_pointer$", "no_obj_ptr"),
    (r"^object_pointer_proj\.layers\.0\.", "obj_ptr_proj.layers.1."),
    (r"^object_pointer_proj\.proj_in\.", "obj_ptr_proj.layers.0."),
    (r"^object_pointer_proj\.proj_out\.", "obj_ptr_proj.layers.2."),
    (r"^(memory_attention\.layers\.\d+)\.mlp\.up_proj\.", r"\1.linear1."),
    (r"^(memory_attention\.layers\.\d+)\.mlp\.down_proj\.", r"\1.linear2."),
    (r"^(memory_attention\..*)\.o_proj\.", r"\1.out_proj."),
    (r"^(memory_encoder\.mask_downsampler)\.final_conv\.", r"\1.encoder.12."),
    (r"^memory_encoder\.feature_projection\.", "memory_encoder.pix_feat_proj."),
    (r"^memory_encoder\.memory_fuser\.", "memory_encoder.fuser."),
    (r"^memory_encoder\.projection\.", "memory_encoder.out_proj."),
    (r"\.scale$", ".gamma"),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv([12])\.", r".pwconv\1."),
    (r"^spatial_perceiver\.latents_1d$", "spatial_perceiver.latents"),
    (r"\.layer_norm_input\.", ".attn.norm_x."),
    (r"\.layer_norm_latents\.", ".attn.norm_latents."),
    (r"\.layer_norm_self\.", ".self_attn.norm."),
    (r"\.cross_attention\.([qkv])_proj\.", r".attn.to_\1."),
    (r"\.self_attention\.([qkv])_proj\.", r".self_attn.to_\1."),
    (r"\.cross_attention\.o_proj\.", ".attn.to_out."),
    (r"\.self_attention\.o_proj\.", ".self_attn.to_out."),
    (r"(\.|_)mlp\.layer_norm\.", r"\1ff.0."),
    (r"(\.|_)mlp\.up_proj\.", r"\1ff.1."),
    (r"(\.|_)mlp\.down_proj\.", r"\1ff.3."),
    (r"\.layer_norm(\d?)\.", r".norm\1."),
)


def memory_of(state: State) -> State:
    """The memory of transformers' state dict, under the authors' names."""
    result = {}
    for name, value in state.items():
        part = re.match(r"memory_encoder\.mask_downsampler\.layers\.(\d)\.(conv|layer_norm)", name)
        if part:
            number = 3 * int(part[1]) + (part[2] == "layer_norm")
            name = name.replace(part[0], f"memory_encoder.mask_downsampler.encoder.{number}")
        for pattern, replacement in MEMORY_NAMES:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    for name in [name for name in result if name.endswith(".to_k.weight")]:
        key, value = result.pop(name), result.pop(name.replace("to_k", "to_v"))
        result[name.replace("to_k", "to_kv")] = torch.cat([key, value])
    return result


def video_frames() -> np.ndarray:
    """Blobs that move over a pattern: uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[:HEIGHT, :LENGTH]
    video = np.repeat(rng.integers(0, 256, (1, HEIGHT, LENGTH, 3)), FRAMES, axis=0)
    for number in range(3):
        colour, (x, y), (dx, dy) = (
            rng.integers(0, 256, 3),
            rng.uniform(30, 90, 2),
            rng.normal(0, 4, 2),
        )
        for t in range(FRAMES):
            video[t][np.hypot(rows - y - dy * t, columns - x - dx * t) < 15 + number] = colour
    return video.astype(np.uint8)


def own_memory() -> VideoMemory:
    return VideoMemory(
        GRID,
        WIDTH,
        hidden=32,
        depth=2,
        perceiver=Perceiver(64, LATENTS, SIDE),
        dates_pointers=False,
        marks_absence=False,
    )


class Pair:
    """The same weights, frames and prompts for transformers and for us."""

    def __init__(self, score: float) -> None:
        transformers = pytest.importorskip(
            "transformers", "5.0", reason="transformers is not installed"
        )
        config = transformers.EdgeTamVideoConfig(
            **parts_of_config(transformers),
            image_size=SIZE,
            memory_attention_hidden_size=WIDTH,
            memory_attention_num_layers=2,
            memory_attention_mlp_hidden_size=32,
            memory_attention_rope_feat_sizes=list(GRID),
            memory_attention_rope_k_sizes=[SIDE, SIDE],
            memory_encoder_hidden_size=WIDTH,
            mask_downsampler_embed_dim=WIDTH,
            memory_fuser_embed_dim=WIDTH,
            memory_fuser_intermediate_dim=4 * WIDTH,
            perceiver_resampler_num_latents=LATENTS,
            perceiver_resampler_num_latents_2d=SIDE**2,
            enable_occlusion_spatial_embedding=False,
            enable_temporal_pos_encoding_for_object_pointers=False,
        )
        self.theirs = randomized(transformers.EdgeTamVideoModel(config))
        last = self.theirs.mask_decoder.pred_obj_score_head.proj_out
        last.weight.data *= 20.0
        last.bias.data.fill_(score)
        state = self.theirs.state_dict()
        sam = assemble_sam2(EdgeTamEncoder(SIZE, WIDTH, WIDTHS, DEPTHS), WIDTH, 64, 4)
        names = sam.state_dict().keys()
        image = {name: value for name, value in converted(state).items() if name in names}
        sam.load_state_dict(image)
        rest = {
            name: value
            for name, value in state.items()
            if next(iter(converted({name: value})), name) not in names
            and "point_embed" not in name
            and "shared_embedding" not in name
        }
        own = own_memory()
        own.load_state_dict(memory_of(rest))
        backbone = Backbone("tiny_edgetam", sam, torch.device("cpu"), torch.float32)
        self.tracker = VideoTracker(backbone, own, correct="sam2", postprocess=True, batch_size=3)
        video = video_frames()
        self.session: TrackingSession = self.tracker.open([video])
        pixels = self.tracker.pixels(list(video))
        self.state = transformers.EdgeTamVideoInferenceSession(
            pixels, HEIGHT, LENGTH, dtype=torch.float32
        )

    def click(self, frame: int, points: Any, labels: list[int], box: Any = None) -> None:
        given = [[x, y] for x, y in (*(np.reshape(box, (2, 2)) if box else ()), *points)]
        scale = torch.tensor([SIZE / LENGTH, SIZE / HEIGHT])
        inputs = {
            "point_coords": torch.tensor(given, dtype=torch.float32)[None, None] * scale,
            "point_labels": torch.tensor([[([2, 3] if box else []) + labels]], dtype=torch.int32),
        }
        self.state.add_point_inputs(self.state.obj_id_to_idx(1), frame, inputs)
        self.prompted(frame, self.session.prompt(0, frame, 1, points or None, labels or None, box))

    def mask(self, frame: int, mask: np.ndarray) -> None:
        own = torch.from_numpy(mask)[None, None].float()
        full = nn.functional.interpolate(own, (SIZE, SIZE), mode="bilinear", antialias=True)
        number = self.state.obj_id_to_idx(1)
        self.state.add_mask_inputs(number, frame, (full >= 0.5).float())
        self.prompted(frame, self.session.prompt(0, frame, 1, mask=mask))

    def prompted(self, frame: int, shown: Any) -> None:
        self.state.obj_with_new_inputs.append(1)
        with torch.no_grad():
            self.compare(shown, self.theirs(self.state, frame_idx=frame))

    def compare(self, own: Any, theirs: Any) -> None:
        expected, score = theirs.pred_masks[:, 0], theirs.object_score_logits
        assert torch.equal(own.scores <= 0, score.flatten() <= 0)
        present = own.scores > 0
        scale = expected[present].std() if present.any() else 1.0
        assert (own.logits - expected).abs().max() < TOLERANCE * scale
        torch.testing.assert_close(own.scores, score.flatten(), atol=1e-4, rtol=1e-4)

    def propagate(self, start: int, reverse: bool = False) -> list[float]:
        """Compare all frames; returns the object's scores."""
        scores = []
        with torch.no_grad():
            theirs: Iterator[Any] = self.theirs.propagate_in_video_iterator(
                self.state, start_frame_idx=start, reverse=reverse
            )
            for own, expected in zip(
                self.session.propagate(start=start, reverse=reverse), theirs, strict=True
            ):
                assert own.frame == expected.frame_idx
                self.compare(own, expected)
                scores.append(float(own.scores))
        return scores


@pytest.fixture
def pair_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Pair]:
    """Makes a pair from the bias of the object score."""
    # transformers stores memories in float32. The authors, and we, store them in bfloat16.
    monkeypatch.setattr(memories, "STORED", torch.float32)
    return Pair


@pytest.mark.parametrize(
    ("kind", "score"),
    [("click", 8.0), ("clicks", 8.0), ("box", 8.0), ("box and click", 0.0), ("mask", -1.0)],
)
def test_videos_of_transformers(pair_of: Callable[[float], Pair], kind: str, score: float) -> None:
    """Prompts of each kind, both ways; objects are there in all frames, or in some."""
    pair = pair_of(score)
    if kind == "mask":
        rows, columns = np.mgrid[:HEIGHT, :LENGTH]
        pair.mask(2, np.hypot(rows - 60, columns - 80) < 14)
    else:
        box = [20.0, 30.0, 70.0, 90.0] if "box" in kind else None
        clicks = {"box": 0, "clicks": 2}.get(kind, 1)
        pair.click(2, [[40.0, 50.0], [90.0, 10.0]][:clicks], [1, 0][:clicks], box)
    scores = pair.propagate(2)
    assert len(scores) == FRAMES - 2 and max(scores) > 0 and (min(scores) > 0) == (score > 0)
    assert len(pair.propagate(5, reverse=True)) == 6


def test_later_prompts_of_transformers(pair_of: Callable[[float], Pair]) -> None:
    """A frame that was not tracked becomes a conditioning frame, also a later one."""
    pair = pair_of(8.0)
    pair.click(0, [[60.0, 60.0]], [1])
    pair.click(9, [[64.0, 20.0]], [1])
    pair.propagate(0)
    pair.propagate(11, reverse=True)


# The published checkpoint -----------------------------------------------------------------------

#: Number of weights in it, and SHA-256 of their sorted names and shapes, of the authors' code
#: (https://github.com/facebookresearch/EdgeTAM, sam2/configs/edgetam.yaml).
PUBLISHED = (982, "ceda0fdf169f31588a88c94fe56a150020f27eb57555b7913273864fa8446a45")


def published(image: State, memory: State) -> State:
    """Weights under the names of the published checkpoint."""
    result = dict(memory)
    for name, value in image.items():
        name = re.sub(r"^image_encoder\.trunk\.(stages\.)?", _flat, name)
        name = re.sub(r"^(prompt_encoder|mask_decoder)\.", r"sam_\1.", name)
        for number in (1, 2):
            name = name.replace(f".mlp.lin{number}.", f".mlp.layers.{number - 1}.")
        result[name] = value
    return result


def _flat(found: re.Match[str]) -> str:
    return f"image_encoder.trunk.body.{'stages_' if found[1] else ''}"


def test_names_of_the_published_checkpoint() -> None:
    spec = BACKBONES.get("edgetam")
    assert spec.memory is not None and spec.convert is not None
    build, convert = spec.memory
    with torch.device("meta"):
        image, memory = spec.build().state_dict(), build().state_dict()
    state = published(image, memory)
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in state.items())
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == PUBLISHED
    assert spec.convert(state).keys() == image.keys()
    assert convert(state).keys() == memory.keys()


def test_a_checkpoint_is_loaded_strictly(tmp_path: Path, add_backbone: Callable[..., None]) -> None:
    def build() -> Any:
        return assemble_sam2(EdgeTamEncoder(SIZE, WIDTH, WIDTHS, DEPTHS), WIDTH, 64, 4)

    add_backbone(
        "edgetam", build=build, convert=edgetam_state, memory=(own_memory, edgetam_memory_state)
    )
    image, memory, path = build().state_dict(), own_memory().state_dict(), tmp_path / "edgetam.pt"
    state = published(image, memory)

    def loaded(state: State) -> Backbone:
        torch.save({"model": state}, path)
        return load_backbone("edgetam", str(path), "cpu")

    backbone = loaded(state)
    assert backbone.memory is not None
    for own, expected in ((backbone.sam, image), (backbone.memory, memory)):
        for name, value in own.state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert backbone.feature_spec == backbone.encode([video_frames()[0]]).spec
    with pytest.raises(ValueError, match=r"1 missing \(first: spatial_perceiver.latents\)"):
        loaded({name: own for name, own in state.items() if name != "spatial_perceiver.latents"})
    with pytest.raises(ValueError, match=r"1 unexpected \(first: image_encoder.trunk.head\)"):
        loaded(state | {"image_encoder.trunk.body.head": torch.zeros(1)})


def test_weights_without_checksum_are_not_downloaded() -> None:
    with pytest.raises(ValueError, match=r"get https://github.com/.*edgetam.pt yourself and pass"):
        load_backbone("edgetam", device="cpu")
    with pytest.raises(ValueError, match="no checksum of its weights is known"):
        download.main(download.DownloadConfig(("edgetam",)))
    assert "edgetam" not in download.published_weights()


def test_windows_have_whole_cells() -> None:
    with pytest.raises(ValueError, match=r"grid of \(6, 8\) cells .* into \(4, 4\) windows"):
        VideoMemory((6, 8), WIDTH, perceiver=Perceiver(64, LATENTS, side=4))
