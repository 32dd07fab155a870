"""MobileSAM and RepViT-SAM against their published layouts, rebuilt here plainly."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones import Prompts, encoders, load_backbone
from sam_gym.backbones.encoders import RepVitEncoder, TinyVitEncoder, assemble

SIZE, WIDTH = 128, 32


def conv_bn(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> Any:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    pair = nn.Sequential()
    pair.add_module("c", conv)
    pair.add_module("bn", nn.BatchNorm2d(outputs))
    return pair


def neck(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, WIDTH, 1, bias=False),
        LayerNorm2d(WIDTH),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
        LayerNorm2d(WIDTH),
    )


# MobileSAM --------------------------------------------------------------------------------------


class Merging(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs)
        self.conv2 = conv_bn(outputs, outputs, 3, stride, outputs)
        self.conv3 = conv_bn(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class Inverted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(width, 4 * width)
        self.conv2 = conv_bn(4 * width, 4 * width, 3, 1, 4 * width)
        self.conv3 = conv_bn(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        offsets: dict[tuple[int, int], int] = {}
        places = list(itertools.product(range(window), repeat=2))
        index = [
            [offsets.setdefault((abs(a - c), abs(b - d)), len(offsets)) for c, d in places]
            for a, b in places
        ]
        self.attention_biases = nn.Parameter(torch.zeros(heads, len(offsets)))
        self.register_buffer("index", torch.tensor(index), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        qkv = self.qkv(self.norm(x)).view(count, length, self.heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        scores = q @ k.transpose(2, 3) / (width // self.heads) ** 0.5
        attention = (scores + self.attention_biases[:, self.index]).softmax(dim=3)
        return self.proj((attention @ v).transpose(1, 2).reshape(count, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class VitBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, heads, window)
        self.mlp = Mlp(width)
        self.local_conv = conv_bn(width, width, 3, 1, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, side, _ = x.shape
        w, missing = self.window, -side % self.window
        padded = F.pad(x, (0, missing, 0, missing))
        n = (side + missing) // w
        windows = padded.reshape(batch, width, n, w, n, w).permute(0, 2, 4, 3, 5, 1)
        attended = self.attn(windows.reshape(-1, w * w, width))
        back = attended.reshape(batch, n, n, w, w, width).permute(0, 5, 1, 3, 2, 4)
        x = x + back.reshape(batch, width, n * w, n * w)[:, :, :side, :side]
        x = self.local_conv(x)
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.seq = nn.Sequential(conv_bn(3, half, 3, 2), nn.GELU(), conv_bn(half, width, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class PublishedMobile(nn.Module):
    """The image encoder of MobileSAM, with the names of `mobile_sam.pt`."""

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_sizes: Sequence[int],
    ) -> None:
        super().__init__()
        self.img_size = SIZE
        self.patch_embed = PatchEmbed(embed_dims[0])
        self.layers = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            layer = nn.Module()
            layer.blocks = nn.ModuleList(
                Inverted(width)
                if stage == 0
                else VitBlock(width, num_heads[stage], window_sizes[stage])
                for _ in range(depth)
            )
            if stage + 1 < len(depths):
                stride = 1 if stage + 2 == len(depths) else 2
                layer.downsample = Merging(width, embed_dims[stage + 1], stride)
            self.layers.append(layer)
        self.norm_head, self.head = nn.LayerNorm(embed_dims[-1]), nn.Linear(embed_dims[-1], 10)
        self.neck = neck(embed_dims[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x)
            if hasattr(layer, "downsample"):
                x = layer.downsample(x)
        return self.neck(x)


# RepViT-SAM -------------------------------------------------------------------------------------


class Squeeze(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(8, int(width / 4 + 4) // 8 * 8)
        self.fc1, self.fc2 = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(mean))).sigmoid()


class Depthwise(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv_bn(width, width, 3, 1, width)
        self.conv1 = nn.Conv2d(width, width, 1, groups=width)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + self.conv1(x) + x)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.m = nn.Sequential(conv_bn(width, 2 * width), nn.GELU(), conv_bn(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class RepBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, squeeze: bool, stride: int) -> None:
        super().__init__()
        gate = Squeeze(inputs) if squeeze else nn.Identity()
        if inputs == outputs:
            self.token_mixer = nn.Sequential(Depthwise(inputs), gate)
        else:
            self.token_mixer = nn.Sequential(
                conv_bn(inputs, inputs, 3, stride, inputs), gate, conv_bn(inputs, outputs)
            )
        self.channel_mixer = Residual(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class PublishedRepVit(nn.Module):
    """The image encoder of RepViT-SAM, with the names of `repvit_sam.pt`."""

    def __init__(self, embed_dims: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.img_size = SIZE
        first = embed_dims[0]
        stem = nn.Sequential(
            conv_bn(3, first // 2, 3, 2), nn.GELU(), conv_bn(first // 2, first, 3, 2)
        )
        layers: list[nn.Module] = [stem]
        for stage, (width, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            if stage:
                stride = 1 if stage + 1 == len(depths) else 2
                layers.append(RepBlock(embed_dims[stage - 1], width, False, stride))
            layers += [RepBlock(width, width, k % 2 == 0, 1) for k in range(depth)]
            if stage + 1 < len(depths):
                layers.append(RepBlock(width, width, False, 1))
        self.features = nn.ModuleList(layers)
        self.neck = neck(embed_dims[-1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.features:
            x = layer(x)
        return self.neck(x)


# Both -------------------------------------------------------------------------------------------

MOBILE: dict[str, Any] = {
    "embed_dims": (16, 24, 32, 48),
    "depths": (2, 2, 3, 2),
    "num_heads": (2, 3, 4, 6),
    "window_sizes": (7, 7, 5, 7),
}
REPVIT: dict[str, Any] = {"embed_dims": (16, 24, 32, 48), "depths": (2, 2, 4, 2)}


def small(encoder: nn.Module) -> Sam:
    return assemble(encoder, width=WIDTH, mlp_dim=64, num_heads=4)


def randomised(sam: Sam) -> Sam:
    """All weights random, so that nothing hides behind a zero or a one."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in sam.state_dict().items():
            if value.is_floating_point():
                spread = 0.3 if value.ndim < 2 else 1.0 / value.flatten(1).shape[1] ** 0.5
                value.normal_(0.0, spread, generator=noise)
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
    return sam.eval()


@pytest.fixture(params=["mobile_sam", "repvit_sam"])
def family(request: pytest.FixtureRequest, add_backbone: Callable[..., None]) -> tuple[str, Sam]:
    """A backbone's name, built small, and the authors' model with random weights."""
    if request.param == "mobile_sam":
        build, published = partial(TinyVitEncoder, SIZE, **MOBILE), PublishedMobile(**MOBILE)
    else:
        build, published = partial(RepVitEncoder, SIZE, **REPVIT), PublishedRepVit(**REPVIT)
        conversion = partial(encoders.repvit_sam_state, depths=REPVIT["depths"])
        add_backbone("repvit_sam", convert=conversion)
    add_backbone(request.param, build=lambda: small(build(out_chans=WIDTH)))
    return request.param, randomised(small(published))


@pytest.mark.parametrize("shape", [(128, 128), (60, 100), (150, 90)])
def test_published_checkpoint_gives_the_authors_masks(
    family: tuple[str, Sam], tmp_path: Path, shape: tuple[int, int]
) -> None:
    name, authors = family
    torch.save(authors.state_dict(), tmp_path / "published.pt")
    backbone = load_backbone(name, str(tmp_path / "published.pt"), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    predictor = SamPredictor(authors)
    predictor.set_image(image)
    features = backbone.encode([image])
    expected = predictor.get_image_embedding()
    assert (features.embedding - expected).abs().max() <= 1e-4 * expected.std()

    points, labels = np.array([[30.0, 20.0], [60.0, 50.0]]), np.array([1, 0])
    box = np.array([10.0, 5.0, 70.0, 55.0])
    expected_masks, expected_iou, previous = predictor.predict(
        points, labels, box, multimask_output=True, return_logits=True
    )
    prompts = Prompts(
        points=torch.from_numpy(backbone.to_input_frame(points, shape))[None],
        labels=torch.from_numpy(labels)[None],
        boxes=torch.from_numpy(backbone.to_input_frame(box.reshape(2, 2), shape)).reshape(1, 4),
    )
    logits, iou = backbone.decode(features, prompts, multimask=True)
    scale = expected_masks.std()
    ours = backbone.masks_at(logits, shape)[0].numpy()
    np.testing.assert_allclose(ours, expected_masks, atol=1e-4 * scale)
    np.testing.assert_allclose(iou[0].numpy(), expected_iou, atol=1e-4)

    *_, expected_low = predictor.predict(
        points, labels, mask_input=previous[:1], multimask_output=False, return_logits=True
    )
    again = Prompts(
        points=prompts.points, labels=prompts.labels, masks=torch.from_numpy(previous[:1])
    )
    low, _ = backbone.decode(features, again)
    np.testing.assert_allclose(low[0].numpy(), expected_low, atol=1e-4 * expected_low.std())


def test_wrong_checkpoint_is_refused(
    family: tuple[str, Sam], tmp_path: Path, tiny_checkpoint: str
) -> None:
    with pytest.raises(ValueError, match=f"not a checkpoint of '{family[0]}'"):
        load_backbone(family[0], tiny_checkpoint, "cpu")
    state = family[1].state_dict()
    state.pop("image_encoder.neck.0.weight")
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"1 missing \(first: image_encoder.neck.0.weight\)"):
        load_backbone(family[0], str(tmp_path / "part.pt"), "cpu")


PUBLISHED_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "mobile_sam": {
        "patch_embed.seq.2.c.weight": (64, 32, 3, 3),
        "layers.0.blocks.1.conv2.c.weight": (256, 1, 3, 3),
        "layers.1.downsample.conv1.c.weight": (160, 128, 1, 1),
        "layers.2.blocks.5.attn.attention_biases": (5, 196),
        "layers.3.blocks.1.mlp.fc1.weight": (1280, 320),
        "neck.0.weight": (256, 320, 1, 1),
    },
    "repvit_sam": {
        "features.0.2.c.weight": (80, 40, 3, 3),
        "features.1.token_mixer.1.fc1.weight": (24, 80, 1, 1),
        "features.8.token_mixer.2.c.weight": (160, 80, 1, 1),
        "features.16.token_mixer.0.c.weight": (160, 1, 3, 3),
        "features.51.token_mixer.0.conv1.weight": (320, 1, 1, 1),
        "features.52.channel_mixer.m.2.c.weight": (640, 1280, 1, 1),
        "features.54.channel_mixer.m.0.c.weight": (1280, 640, 1, 1),
        "neck.0.weight": (256, 640, 1, 1),
    },
}


@pytest.mark.parametrize(
    ("name", "build", "convert"),
    [
        ("mobile_sam", encoders.build_mobile_sam, encoders.mobile_sam_state),
        ("repvit_sam", encoders.build_repvit_sam, encoders.repvit_sam_state),
    ],
)
def test_sizes_of_the_published_models(
    name: str, build: Callable[[], Sam], convert: Callable[[dict], dict]
) -> None:
    """Entries of the published files, by name and shape, land where they fit."""
    with torch.device("meta"):
        state = build().state_dict()
    shapes = PUBLISHED_SHAPES[name]
    with torch.device("meta"):
        entries = {f"image_encoder.{key}": torch.empty(shape) for key, shape in shapes.items()}
    converted = convert(entries)
    assert len(converted) == len(entries)
    assert {key: value.shape for key, value in converted.items()} == {
        key: state[key].shape for key in converted
    }
