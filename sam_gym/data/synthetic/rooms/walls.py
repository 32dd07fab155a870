"""Background of procedural rooms: walls, floor, windows and rugs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sam_gym.data.synthetic.rooms.drawing import PATTERNS, Canvas, Coat, mix_color, oval, rectangle


class Shell:
    """Walls and floor.

    Args:
        rng: random generator.
        height, width: size of the image, in pixels.
        light: direction of the light: -1 (left) or 1 (right).

    Attributes:
        floor: y of the line between wall and floor.
        horizon: y of the vanishing point of the floor, maybe above the image.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int, light: float) -> None:
        self.rng, self.height, self.width, self.light = rng, height, width, light
        self.unit = height / 256
        self.floor = rng.uniform(0.58, 0.72) * height
        self.horizon = rng.uniform(-0.35, 0.05) * height

    def draw(self, canvas: Canvas) -> np.ndarray:
        """Draw walls and floor; return uint8 (H, W), the pattern "floor" of `Canvas.develop`."""
        rng, height, width, unit = self.rng, self.height, self.width, self.unit

        def background(kind: str, patterns: Sequence[str], texture: int = 0) -> int:
            color = mix_color(rng, kind)
            grey = rng.uniform(0.1, 0.6)
            color = (1 - grey) * color + grey * color.mean()
            second = np.clip(color * rng.uniform(0.7, 1.2, 3), 20, 250)
            pattern = PATTERNS.index(patterns[int(rng.integers(len(patterns)))])
            strength = rng.uniform(0.01, 0.035) if texture == 0 else rng.uniform(0.03, 0.1)
            return canvas.piece(Coat(color, second, pattern, texture, strength), 0.0)

        wall = background(
            ("paint", "white", "paint")[rng.integers(3)],
            ("none", "none", "stripes", "dots", "bricks", "blotches", "bands"),
        )
        board = background("white", ("none",))
        below = background(("wood", "clay", "metal")[rng.integers(3)], ("floor",), texture=2)
        canvas.fill(wall, rectangle(0, width, 0, height))
        for center in np.arange(rng.uniform(0.1, 0.9), width / height, 1.4):
            if rng.random() < 0.55:
                self._window(canvas, center * height)
        high = rng.uniform(4, 8) * unit
        canvas.fill(below, rectangle(0, width, self.floor, height))
        canvas.fill(board, rectangle(0, width, self.floor - high, self.floor))
        if rng.random() < 0.6:
            self._side_wall(canvas, wall, board, high)
        for _ in range(round(width / height)):
            if rng.random() < 0.65:
                self._rug(canvas)
        return self._boards()

    def _side_wall(self, canvas: Canvas, wall: int, board: int, high: float) -> None:
        """Draw a wall at the left or the right, towards the viewer."""
        side, along = self.rng.choice([0, 1]), self.rng.uniform(0.05, 0.16) * self.height
        x, out = (along, -along) if side == 0 else (self.width - along, self.width + along)
        down = self.floor + self.rng.uniform(0.5, 0.9) * abs(out - x)
        bright = 0.82 if (self.light > 0) == (side == 1) else 1.08
        canvas.fill(wall, np.array([[x, -9], [out, -9], [out, down], [x, self.floor]]), bright)
        lines = [[x, self.floor - high], [out, down - 1.6 * high], [out, down], [x, self.floor]]
        canvas.fill(board, np.array(lines), bright)

    def _window(self, canvas: Canvas, x: float) -> None:
        """Draw a window, with or without curtains."""
        rng, unit = self.rng, self.unit
        half, top = rng.uniform(22, 34) * unit, 0.1 * self.floor
        low = rng.uniform(0.5, 0.68) * self.floor

        def surface(color: np.ndarray, second: np.ndarray, pattern: str = "none") -> int:
            return canvas.piece(Coat(color, second, PATTERNS.index(pattern)), 0.0)

        white, green = mix_color(rng, "white"), mix_color(rng, "green")
        frame = surface(white, white)
        border = 3 * unit
        outer = rectangle(x - half - border, x + half + border, top - border, low + border)
        canvas.fill(frame, outer)
        sky = np.array([170.0, 205.0, 240.0]) * rng.uniform(0.75, 1.05)
        view = surface(sky, np.array([235.0, 240.0, 245.0]), "blotches")
        canvas.fill(view, rectangle(x - half, x + half, top, low))
        trees = surface(green, 0.7 * green, "blotches")
        canvas.fill(trees, rectangle(x - half, x + half, low - rng.uniform(6, 26) * unit, low))
        middle = (top + low) / 2
        canvas.fill(frame, rectangle(x - unit, x + unit, top, low))
        canvas.fill(frame, rectangle(x - half, x + half, middle - unit, middle + unit))
        if rng.random() < 0.5:
            color = mix_color(rng, "cloth") * 0.6 + 90
            cloth = surface(color, 0.85 * color, "stripes")
            for side in (-half, half):
                curtain = rectangle(
                    x + 0.55 * side, x + 1.25 * side, top - 6 * unit, low + 10 * unit
                )
                canvas.fill(cloth, curtain)

    def _rug(self, canvas: Canvas) -> None:
        rng = self.rng
        y = self.floor + rng.uniform(0.3, 0.75) * (self.height - self.floor)
        x, half = rng.uniform(0.2, 0.8) * self.width, rng.uniform(0.25, 0.5) * self.height
        deep = rng.uniform(0.12, 0.2) * self.height
        angular = np.array([[-0.8, -1], [0.8, -1], [1, 1], [-1, 1]])
        form = angular if rng.random() < 0.5 else oval(1, 1)
        color, second = mix_color(rng, "cloth"), mix_color(rng, "cloth")
        kinds = ("none", "stripes", "checks", "plaid", "dots")
        for shrink, tint in ((1.0, second), (0.85, color)):
            pattern = PATTERNS.index(kinds[rng.integers(len(kinds))]) if shrink < 1 else 0
            piece = canvas.piece(Coat(tint, 0.6 * tint + 50, pattern, 3, 0.08), 0.0)
            canvas.fill(piece, form * (half, deep) * shrink + (x, y))

    def _boards(self) -> np.ndarray:
        """Draw floorboards or tiles in perspective: uint8 (H, W)."""
        rng = self.rng
        top = int(self.floor)
        ys = np.arange(top, self.height, dtype=np.float32)[:, None] - np.float32(self.horizon)
        xs = np.arange(self.width, dtype=np.float32)[None] - np.float32(0.5 * self.width)
        depth = np.float32(self.height) / ys
        u, v = xs * depth / np.float32(self.height), 1.4 * depth
        wide = rng.uniform(0.12, 0.25)
        column = np.floor(u / wide)
        if rng.random() < 0.5:  # tiles of alternating colours
            share = (column + np.floor(v / wide)) % 2 * 255
        else:
            offset = column * np.float32(0.618)
            board = np.floor(v / (4 * wide) + offset)
            tone = (column * np.float32(0.377) + board * np.float32(0.531)) % 1
            seam = (u / wide - column < 0.06) | ((v / (4 * wide) + offset) - board < 0.03)
            share = np.where(seam, 255, 150 * tone)
        pattern = np.zeros((self.height, self.width), np.uint8)
        pattern[top:] = share
        return pattern
