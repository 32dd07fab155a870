"""Models with seeded random weights, so that no test depends on how well `micro` was trained."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn

from sam_gym.backbones import BACKBONES, Backbone, BackboneSpec, load_backbone
from sam_gym.backbones.edgetam import EdgeTamEncoder, edgetam_memory_state, edgetam_state
from sam_gym.backbones.encoders import assemble
from sam_gym.backbones.hq import HqMaskDecoder
from sam_gym.backbones.micro.model import FINE, STRIDE, UPSCALING, MicroEncoder, build_micro
from sam_gym.backbones.sam2 import Sam2, Sam2Encoder, assemble_sam2, memory_state, sam2_state
from sam_gym.backbones.spec import find_spec
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.backbones.video.perceiver import Perceiver
from sam_gym.data import Sample
from sam_gym.data.synthetic.clips import Clip, Clips
from sam_gym.envs.video import core as video_core
from sam_gym.mask_generation.masks import Masks, to_counts
from sam_gym.utils.window import warn_no_window

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and so do the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


pytest_plugins = ["forks"]


def spread(sam: Sam) -> Sam:
    """Fill what initialises to zero or one, and spread the logits so that mask prompts matter."""
    for module in sam.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    for name, parameter in sam.named_parameters():
        if "pos_embed" in name or "rel_pos" in name:
            nn.init.normal_(parameter, 0.0, 0.3)
    with torch.no_grad():
        for mlp in sam.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(50.0)
            mlp.layers[-1].bias.mul_(50.0)
        # Which mask is predicted to be best is to depend on the prompt.
        sam.mask_decoder.iou_prediction_head.layers[-1].weight.mul_(10.0)
        sam.mask_decoder.iou_prediction_head.layers[-1].bias.zero_()
    return sam


def tiny_sam() -> Sam:
    """A SAM of the published architecture: 64 x 64 input, 4 x 4 x 32 embedding, 16 x 16 masks."""
    size, width, grid = 64, 32, 4
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=size,
            embed_dim=32,
            depth=2,
            num_heads=2,
            out_chans=width,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(grid, grid),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=64, num_heads=4),
            transformer_dim=width,
            iou_head_depth=3,
            iou_head_hidden_dim=32,
        ),
    )


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spread(build()).eval()


@pytest.fixture(scope="session")
def build_tiny() -> Callable[[], Sam]:
    """Builds a small SAM of the published architecture; always with the same weights."""
    return lambda: seeded(tiny_sam)


def hq_micro_sam() -> Sam:
    """HQ-SAM on the encoder of `micro`."""
    decoder = partial(HqMaskDecoder, vit_dim=FINE, upscaling=UPSCALING)
    return assemble(
        MicroEncoder(), width=128, mlp_dim=512, stride=STRIDE, upscaling=UPSCALING, decoder=decoder
    )


@pytest.fixture(scope="session")
def backbone_added() -> Callable[..., AbstractContextManager[None]]:
    """Adds a backbone, or changes the specification of one, while the context lasts."""

    @contextmanager
    def added(name: str, **changes: Any) -> Iterator[None]:
        known = find_spec(name)
        if known is None:
            spec = BackboneSpec(name=name, description="A SAM of the tests", **changes)
        else:
            spec = replace(known, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(BACKBONES._items, name, spec)
            yield

    return added


@pytest.fixture
def add_backbone(
    backbone_added: Callable[..., AbstractContextManager[None]],
) -> Iterator[Callable[..., None]]:
    """The same until the end of the test."""
    with ExitStack() as stack:
        yield lambda name, **changes: stack.enter_context(backbone_added(name, **changes))


@pytest.fixture(scope="session")
def hq_micro_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "hq_micro.safetensors"
    save_file(seeded(hq_micro_sam).state_dict(), path)
    return path


@pytest.fixture
def hq_micro(add_backbone: Callable[..., None], hq_micro_weights: Path) -> str:
    """Name of an HQ-SAM with random weights, small enough to be tuned in tests."""
    weights = {"build": hq_micro_sam, "weights": hq_micro_weights}
    add_backbone("hq_micro", **weights, features=("embedding", "hq"))
    return "hq_micro"


@pytest.fixture(scope="session")
def build_sam2() -> Callable[..., Sam2]:
    """Builds a small SAM 2 of a frame size and width; always with the same weights."""

    def build(size: int = 64, width: int = 32, mlp_dim: int = 64, num_heads: int = 4) -> Sam2:
        trunk = {"stages": (1, 2, 2, 1), "window_spec": (8, 4, 6, 3), "global_att_blocks": (4,)}
        encoder = partial(Sam2Encoder, size, width, embed_dim=8, **trunk)
        return seeded(lambda: assemble_sam2(encoder(), width, mlp_dim, num_heads))

    return build


#: What the specifications of the small SAM 2 share.
TINY_SAM2: dict[str, Any] = {
    "convert": sam2_state,
    "thresholds": (0.1, 0.1),
    "features": ("embedding", "high_res_s1", "high_res_s0"),
}


@pytest.fixture(scope="session")
def tiny_sam2_weights(
    build_sam2: Callable[..., Sam2], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny_sam2.safetensors"
    save_file(build_sam2().state_dict(), path)
    return path


@pytest.fixture
def tiny_sam2(
    add_backbone: Callable[..., None], build_sam2: Callable[..., Sam2], tiny_sam2_weights: Path
) -> str:
    """Name of a small SAM 2 with random weights."""
    add_backbone("tiny_sam2", build=build_sam2, weights=tiny_sam2_weights, **TINY_SAM2)
    return "tiny_sam2"


def tiny_memory(**options: Any) -> VideoMemory:
    """A small video memory, for the tiny SAM 2."""
    memory = VideoMemory((4, 4), 32, 16, hidden=32, depth=2, **options)
    for name, parameter in memory.named_parameters():
        if "gamma" in name or "no_obj" in name or "tpos_enc" in name:
            nn.init.normal_(parameter, 0.0, 0.5)
    return memory


@pytest.fixture(scope="session")
def tiny_video_weights(
    build_sam2: Callable[..., Sam2], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        memory = tiny_memory()
    path = tmp_path_factory.mktemp("weights") / "tiny_video.safetensors"
    save_file(build_sam2().state_dict() | memory.state_dict(), path)
    return path


@pytest.fixture
def tiny_video(
    add_backbone: Callable[..., None], build_sam2: Callable[..., Sam2], tiny_video_weights: Path
) -> str:
    """Name of a small SAM 2 with a memory, both of random weights."""
    memory = (tiny_memory, memory_state)
    weights = {"build": build_sam2, "weights": tiny_video_weights}
    add_backbone("tiny_video", **weights, memory=memory, **TINY_SAM2)
    return "tiny_video"


def small_edgetam() -> Sam2:
    """A small EdgeTAM with random weights."""
    encoder = EdgeTamEncoder(64, 32, embed_dims=(8, 8, 16, 16), depths=(1, 1, 2, 1))
    return assemble_sam2(encoder, 32, 64, 4)


def small_edgetam_memory() -> VideoMemory:
    """A memory of seven tokens, for the small EdgeTAM."""
    perceiver = Perceiver(16, latents=3, side=2)
    own = {"perceiver": perceiver, "dates_pointers": False, "marks_absence": False}
    return tiny_memory(**own)


@pytest.fixture(scope="session")
def tiny_edgetam_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        memory = small_edgetam_memory()
    path = tmp_path_factory.mktemp("weights") / "tiny_edgetam.safetensors"
    save_file(seeded(small_edgetam).state_dict() | memory.state_dict(), path)
    return path


@pytest.fixture
def tiny_edgetam(add_backbone: Callable[..., None], tiny_edgetam_weights: Path) -> str:
    """Name of a small EdgeTAM with its memory, both of random weights."""
    own = {"convert": edgetam_state, "memory": (small_edgetam_memory, edgetam_memory_state)}
    given = TINY_SAM2 | own | {"build": small_edgetam, "weights": tiny_edgetam_weights}
    add_backbone("tiny_edgetam", **given)
    return "tiny_edgetam"


#: Clips of `tiny_video_env`.
OPENED: dict[Any, Clip] = {}


@pytest.fixture
def tiny_video_env(tiny_video: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a video environment over `tiny_video` and eight clips.

    Clips stay open: to compose one costs more than to play a tiny episode. Tests share the model,
    and what it has found under SAM 2's own rule, unless they ask for `own_references`.
    """
    compose = Clips.__getitem__

    def get(self: Clips, index: int) -> Clip:
        key = (self.source(index), *self.words(index), self._frames, self.size)
        if key not in OPENED:
            OPENED[key] = compose(self, index)
        return OPENED[key]

    monkeypatch.setattr(Clips, "__getitem__", get)
    own = {"backbone": tiny_video, "device": "cpu", "frames": 8, "store_gib": 0.1}
    return own | {"dataset_kwargs": {"length": 8, "size": 64}}


@pytest.fixture
def own_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes under SAM 2's own rule are played again: in batches of another size, as other tests
    may have played them, the last bits differ."""
    monkeypatch.setattr(video_core, "_REFERENCES", WeakKeyDictionary())


@pytest.fixture(scope="session")
def micro_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A `micro` checkpoint with random weights."""
    path = tmp_path_factory.mktemp("weights") / "micro.safetensors"
    save_file(seeded(build_micro).state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def micro(micro_checkpoint: str) -> Backbone:
    return load_backbone("micro", checkpoint=micro_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def tiny(build_tiny: Callable[[], Sam]) -> Backbone:
    return Backbone("tiny", build_tiny(), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def shipped() -> Backbone:
    """`micro` with the weights of the package."""
    return load_backbone("micro", device="cpu")


@pytest.fixture(params=["tiny", "shipped"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """Random weights in the published architecture, and trained ones in that of `micro`."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def micro_env(micro_checkpoint: str) -> dict[str, Any]:
    """Arguments of an environment over `micro` with random weights and eight scenes."""
    return {"checkpoint": micro_checkpoint, "device": "cpu", "dataset_kwargs": {"length": 8}}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, build_tiny: Callable[[], Sam]) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(build_tiny().state_dict(), path)
    return str(path)


@pytest.fixture
def tiny_env(
    tiny_checkpoint: str, build_tiny: Callable[[], Sam], add_backbone: Callable[..., None]
) -> dict[str, Any]:
    """Arguments of an environment over the tiny SAM, which plays hundreds of steps in a second."""
    add_backbone("tiny", build=build_tiny)
    return {
        "backbone": "tiny",
        "checkpoint": tiny_checkpoint,
        "device": "cpu",
        "dataset_kwargs": {"length": 8, "size": 128},
    }


@pytest.fixture
def no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """No window can be opened, and nobody has been told so yet."""
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    warn_no_window.cache_clear()


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Twelve images of a bright square: `images/`, `masks/`, and `all.json` in COCO format."""
    import cv2

    root = tmp_path / "squares"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    x, y, side = 20, 15, 30
    image, mask = np.full((64, 80, 3), 40, np.uint8), np.zeros((64, 80), np.uint8)
    image[y : y + side, x : x + side], mask[y : y + side, x : x + side] = 200, 255
    tables: dict[str, list[Any]] = {"images": [], "annotations": []}
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    for i in range(12):
        image[0, 0] = i
        cv2.imwrite(str(root / "images" / f"{i}.png"), image)
        cv2.imwrite(str(root / "masks" / f"{i}.png"), mask)
        tables["images"].append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 80})
        tables["annotations"].append(
            {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "segmentation": [polygon]}
            | {"bbox": [x, y, side, side], "area": side**2}
        )
    (root / "all.json").write_text(
        json.dumps(tables | {"categories": [{"id": 1, "name": "square"}]})
    )
    return root


@pytest.fixture
def two_photos(tmp_path: Path) -> Path:
    """Root of a `folder` dataset with a wide and a tall image, some pixels ignored."""
    import cv2

    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for stem, (height, width) in {"tall": (128, 64), "wide": (48, 128)}.items():
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 :, width // 3 : 3 * width // 4] = 255
        mask[: height // 5, : width // 5] = 128
        cv2.imwrite(str(root / "images" / f"{stem}.png"), cv2.resize(coarse, (width, height)))
        cv2.imwrite(str(root / "masks" / f"{stem}.png"), mask)
    return root


@pytest.fixture
def make_masks() -> Callable[..., Masks]:
    """Makes masks of boxes (x0, y0, x1, y1) in 32 x 32 pixels, each trusted less than the last."""

    def make(*boxes: tuple[int, int, int, int]) -> Masks:
        binary = np.zeros((len(boxes), 32, 32), bool)
        for mask, (x0, y0, x1, y1) in zip(binary, boxes, strict=True):
            mask[y0 : y1 + 1, x0 : x1 + 1] = True
        return Masks(
            size=(32, 32),
            counts=[to_counts(mask) for mask in binary],
            boxes=np.array(boxes, np.float32),
            predicted_iou=np.linspace(0.9, 0.5, len(boxes), dtype=np.float32),
            stability=np.ones(len(boxes), np.float32),
            points=np.zeros((len(boxes), 2), np.float32),
            crop_boxes=np.tile(np.array([0, 0, 32, 32], np.float32), (len(boxes), 1)),
            probabilities=np.zeros((len(boxes), 0), np.float32),
        )

    return make


@pytest.fixture
def write_entities() -> Callable[..., None]:
    """Write samples of each split as a folder for `sam_gym.data.entities.Entities`."""

    def entry(root: Path, stem: str, sample: Sample) -> dict[str, Any]:
        masks = [f"{stem}_{number:03d}.png" for number in range(len(sample.masks))]
        Image.fromarray(sample.image).save(root / "images" / f"{stem}.png")
        for name, mask in zip(masks, sample.masks, strict=True):
            Image.fromarray(mask * np.uint8(255)).save(root / "masks" / name)
        indices = sample.categories.tolist()
        return {"image_name": f"{stem}.png", "entity_masks": masks, "entity_indices": indices}

    def write(root: Path, categories: Sequence[str], **splits: Iterable[Sample]) -> None:
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True)
        data: dict[str, Any] = {"entity classes": list(categories)}
        for split, samples in splits.items():
            data[f"{split}_data"] = [
                entry(root, f"{split}_{number:06d}", sample)
                for number, sample in enumerate(samples)
            ]
        (root / "metadata.json").write_text(json.dumps(data))

    return write
