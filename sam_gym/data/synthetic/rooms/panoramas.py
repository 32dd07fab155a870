"""`rooms-panoramas`: wide procedural rooms."""

from __future__ import annotations

from collections.abc import Sequence

from sam_gym.data.base import Sample, select_categories
from sam_gym.data.synthetic.base import Procedural
from sam_gym.data.synthetic.rooms.dataset import Rooms, furnished_room


class RoomsPanoramas(Procedural):
    """Wide `rooms` with proportionally more objects.

    The same index of a split and seed always gives the same panorama.

    Args:
        split: "train", "val" or "test"; disjoint by seed.
        categories: as in `Rooms`.
        length: number of different panoramas (None: 2^31 - 1, practically endless).
        height, width: size of a panorama, in pixels.
        seed: seed of all panoramas.

    Raises:
        ValueError: the split or a category is unknown, or a number is out of range.
    """

    name, noun = "rooms-panoramas", "panorama"
    categories: tuple[str, ...] = Rooms.categories

    def __init__(
        self,
        split: str = "train",
        *,
        categories: str | Sequence[str] | None = None,
        length: int | None = None,
        height: int = 256,
        width: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__(split, length, height, seed=seed)
        if not height <= width <= 8 * height:
            raise ValueError(f"width must be from {height} to {8 * height} pixels, got {width}.")
        self.categories = select_categories(categories, Rooms.categories)
        self.height, self.width = height, width

    def __getitem__(self, index: int) -> Sample:
        room = furnished_room(self.words(index), self.height, self.width, self.categories)
        return room.sample(self.source(index))
