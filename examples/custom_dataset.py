"""Use images and annotations of your own format in every environment and command.

python examples/custom_dataset.py
python examples/custom_dataset.py --workers 0 --episodes 8
"""

from __future__ import annotations

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from PIL import Image

import sam_gym  # noqa: F401 (registers the environments)
from agents.evaluate import evaluate, load_agent
from sam_gym import Sample, make_dataset
from sam_gym.envs.click import SamSegConfig

#: Name of the dataset below, as commands, environments and worker processes take it.
COINS = "custom_dataset:Coins"


class Coins:
    """Images with a table of discs: `root/coins.csv` has image, split, category, x, y, radius.

    Args:
        split: "train", "val" or "test".
        root: folder of the images and the table.

    Raises:
        ValueError: the split has no image.
    """

    name = "coins"
    categories = ("cent", "crown")

    def __init__(self, split: str = "train", *, root: str) -> None:
        self._discs: dict[str, list[tuple[int, float, float, float]]] = {}
        with (Path(root) / "coins.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row["split"] == split:
                    disc = (self.categories.index(row["category"]), float(row["x"]))
                    rest = (float(row["y"]), float(row["radius"]))
                    self._discs.setdefault(row["image"], []).append(disc + rest)
        if not self._discs:
            raise ValueError(f"{root}/coins.csv: no image of split {split!r}.")
        #: Image files, by which training images are kept out of held-out ones.
        self.files = [str(Path(root) / name) for name in self._discs]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: index {index} is outside 0..{len(self) - 1}")
        path = Path(self.files[index])
        image = np.asarray(Image.open(path).convert("RGB"))  # uint8 (H, W, 3)
        rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
        discs = self._discs[path.name]
        masks = [(columns - x) ** 2 + (rows - y) ** 2 <= r**2 for _, x, y, r in discs]
        return Sample(
            image=image,
            masks=np.stack(masks),  # bool (N, H, W)
            categories=np.array([disc[0] for disc in discs]),  # int64 (N,)
            source=path.name,
        )

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw the image of an episode; None: any category that is in it."""
        return int(rng.integers(len(self))), None


def write_coins(root: Path, count: int) -> None:
    """Write images of coins for each split, in place of photographs of yours."""
    root.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    y, x = np.mgrid[:128, :160]
    for number in range(3 * count):
        image = rng.integers(60, 90, (128, 160, 3), dtype=np.uint8)
        name, split = f"{number:04d}.png", ("train", "val", "test")[number % 3]
        for left, category in ((0, "cent"), (80, "crown")):
            radius = rng.integers(12, 18) if category == "cent" else rng.integers(22, 30)
            centre = left + rng.integers(radius, 80 - radius), rng.integers(radius, 128 - radius)
            inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2
            image[inside] = (190, 120, 60) if category == "cent" else (200, 200, 210)
            rows.append([name, split, category, *centre, radius])
        Image.fromarray(image).save(root / name)
    with (root / "coins.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "split", "category", "x", "y", "radius"], *rows])


def main(
    data: Path = Path("runs/coins"), images: int = 16, episodes: int = 16, workers: int = 2
) -> None:
    """Write a small dataset, and let baselines play it.

    Args:
        data: Folder of the dataset; written unless it exists.
        images: Images of each split.
        episodes: Episodes to play.
        workers: Worker processes that play random clicks.
    """
    if not data.exists():
        write_coins(data, images)
    dataset = make_dataset(COINS, "test", root=str(data))
    print(f"{len(dataset)} images, {len(dataset[0].masks)} objects in the first")

    # The oracle sees the ground truth: it shows what five clicks can reach on these images.
    config = SamSegConfig(dataset=COINS, data=str(data), split="test")
    for name in ("random", "confident", "oracle"):
        result = evaluate(load_agent(name), config, episodes=episodes, num_envs=8)
        print(f"{name:9} mean IoU {result.ious.mean():.2f}")

    if workers:

        def make() -> gym.Env:
            return gym.make("SamSeg-v0", dataset=COINS, data=str(data))

        envs = gym.vector.AsyncVectorEnv([make] * workers, context="spawn")
        envs.reset(seed=0)
        *_, infos = envs.step(envs.action_space.sample())
        print(f"in {workers} worker processes: targets {', '.join(infos['target_name'])}")
        envs.close()


if __name__ == "__main__":
    tyro.cli(main)
