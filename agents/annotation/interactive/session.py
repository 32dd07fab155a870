"""What one person does: the open image, the clicks of the current object, the agent's turn."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle
from torch import Tensor

from agents.annotation.interactive.drawing import (
    at_shown_size,
    heat_map,
    jpeg,
    measures,
    outline,
    shown_size,
)
from agents.annotation.interactive.job import Job
from agents.annotation.interactive.locking import locked
from agents.annotation.interactive.player import ClickPlayer, PinnedImages, Proposal
from agents.annotation.interactive.project import Edit, Project, SavedObject
from agents.annotation.interactive.prompting import (
    MAX_CLICKS,
    Box,
    Click,
    Correction,
    Step,
    box_of,
    clicks_of,
    decode,
    inner_click,
)
from sam_gym.backbones import BackboneService
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.backbones.zoom import Window, mask_prompt
from sam_gym.mask_generation.generator import MaskGenerator
from sam_gym.utils.text import counted, printable
from sam_gym.utils.transfer import to_host

#: Bound on the length of a name.
MAX_NAME = 100
#: Number of changes of saved objects that can be undone.
_HISTORY = 100
#: IoU above which a suggestion is a saved object.
_SAME = 0.8
#: What everything mode does, for people.
SEARCHING = "Looking for everything"
#: What people are told before clicks would be lost.
UNFINISHED = "Save (Enter) or reset (R) the object first."


@dataclass(frozen=True)
class Models:
    """What all people share.

    Attributes:
        backbone: the SAM.
        images: features of the open images.
        player: the agent, or None.
        generator: of everything mode.
        max_pixels: bound on the pixels of an image, or of a frame of a video.
        tracker: returns the tracker of videos, which is loaded with the first of them.
    """

    backbone: BackboneService
    images: PinnedImages
    player: ClickPlayer | None
    generator: MaskGenerator
    max_pixels: int
    tracker: Callable[[], VideoTracker]


@dataclass(frozen=True)
class Suggestion:
    """A mask of everything mode.

    Attributes:
        record: its RLE, score and category, as the generator gives them.
        mask: bool (h, w), at the size in which the image is shown.
        path: its outline.
    """

    record: dict[str, Any]
    mask: np.ndarray
    path: str


@dataclass(frozen=True)
class _Change:
    """A change of saved objects that can be undone.

    Attributes:
        label: what was done, for people.
        edit: of the project.
        steps: clicks that became the object.
        correction: of the object that they changed, or None: they made it.
        name: of that object.
        accepted: suggestions that became objects.
    """

    label: str
    edit: Edit
    steps: Sequence[Step] = ()
    correction: Correction | None = None
    name: str = ""
    accepted: Sequence[Suggestion] = ()


@dataclass(frozen=True)
class OpenImage:
    """The image that a person looks at.

    Attributes:
        file: path in the project.
        pixels: uint8 (H, W, 3).
        shown: JPEG of what is shown.
        key: secret name of the JPEG, which no other person can guess.
        handle: in the store of features.
        features: of the image.
    """

    file: str
    pixels: np.ndarray
    shown: bytes
    handle: int
    features: ImageFeatures
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[0], self.pixels.shape[1]


class Session:
    """The work of one person in one browser tab. Methods may be called from any thread.

    Args:
        models: what all people share.
        project: images and results.

    Attributes:
        project: images and results.
        index: of the open image in `project.files`.
        name: name of the current object.
        image: the open image, or None.
        steps: clicks and boxes of the current object, and their masks.
        correction: the saved object that is the current one, or None: clicks make another.
        suggestions: masks of everything mode that wait for an answer.
        selected: index of the suggestion that keys accept or dismiss, or -1.
        search: the search of everything mode that runs or ended last in this image, or None.
        known: number of masks that it left out, since objects that cover them are saved.
    """

    def __init__(self, models: Models, project: Project) -> None:
        self.models, self.project = models, project
        self.lock = threading.RLock()
        self.index = project.first_open()
        self.name = ""
        self.image: OpenImage | None = None
        self.steps: list[Step] = []
        self.correction: Correction | None = None
        # Whether the next click begins an object, also inside the mask of another.
        self._begins = False
        self.suggestions: list[Suggestion] = []
        self.selected = -1
        self.search: Job | None = None
        self.known = 0
        self._history: deque[_Change] = deque(maxlen=_HISTORY)
        # By COCO file: what is offered, in an order that stays.
        self._offered: dict[Path, dict[str, None]] = {}
        self._paths: dict[Any, tuple[Any, str]] = {}
        self._saved: list[SavedObject] = []

    # Images ------------------------------------------------------------------------------------

    @locked
    def open(self, index: int) -> None:
        """Read and encode an image of the project.

        Raises:
            ValueError, OSError, MemoryError: it cannot be read or encoded; the open image stays.
        """
        file = self.project.files[index]
        try:
            pixels = self.project.read(file, self.models.max_pixels)
            if not all(self.models.backbone.input_size((pixels.shape[0], pixels.shape[1]))):
                raise ValueError(f"{file}: too thin for SAM.")
        except (ValueError, OSError):
            self.project.broken.add(file)
            raise
        self.project.broken.discard(file)
        handle, features = self.models.images.pin(pixels)
        self.close()
        self.index = index
        self.image = OpenImage(file, pixels, jpeg(pixels), handle, features)
        self._saved = self.project.objects(file, self.image.size)

    @locked
    def close(self) -> None:
        """Let the open image and the clicks on it go."""
        if self.image is not None:
            self.models.images.unpin(self.image.handle)
        self.reset()
        self.image, self._saved, self._paths, self._begins = None, [], {}, False
        self._history.clear()
        self.stop_search()
        self.dismiss_all()

    @locked
    def finish_image(self) -> None:
        """Write that the image is done."""
        image = self._opened()
        self.project.set_done(image.file, image.size)

    def _opened(self) -> OpenImage:
        if self.image is None:
            raise ValueError("No image is open.")
        return self.image

    # The current object ------------------------------------------------------------------------

    @property
    def predicted_iou(self) -> float | None:
        """SAM's estimate for the current mask, or None without one."""
        if self.steps:
            return self.steps[-1].predicted_iou
        return None if self.correction is None else self.correction.saved.score

    @property
    def clicks(self) -> list[Click]:
        """The clicks of the current object."""
        return clicks_of(self.correction, self.steps)

    @property
    def box(self) -> Box | None:
        """The last box of the current object, in pixels of the image."""
        return box_of(self.correction, self.steps)

    @property
    def _logits(self) -> Tensor | None:
        """Logits (hm, wm) of the current mask, or None without one."""
        if self.steps:
            return self.steps[-1].logits
        return None if self.correction is None else self.correction.logits

    @locked
    def press(self, x: float, y: float, positive: bool) -> str:
        """Take a person's click at (x, y), in pixels of the image.

        While no object is begun, a click inside a saved mask selects its object to be corrected,
        unless `save_object` has asked for another; a negative one corrects it at once.

        Returns:
            What people are told, or "".
        """
        told = ""
        if not (self.steps or self.correction or self._begins):
            hit = self._object_at(x, y)
            if hit is not None:
                told = self.correct(hit)
        if not (told and positive):
            self.click(x, y, positive)
        return told

    @locked
    def click(self, x: float, y: float, positive: bool, by_agent: bool = False) -> None:
        """Add a click at (x, y), in pixels of the image, and decode the mask; see `decode`."""
        if len(self.steps) >= MAX_CLICKS:
            raise ValueError(f"{MAX_CLICKS} clicks are enough: save the object, or reset it.")
        self.steps.append(self._after(self._inside(x, y, positive, by_agent)))

    def _inside(self, x: float, y: float, positive: bool, by_agent: bool) -> Click:
        height, width = self._opened().size
        at = float(np.clip(x, 0, width - 1)), float(np.clip(y, 0, height - 1))
        return Click(*at, positive, by_agent)

    @locked
    def draw_box(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Replace the box by one with two corners, in pixels of the image, and decode the mask."""
        height, width = self._opened().size
        (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, width - 1.0), min(y1, height - 1.0))
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            raise ValueError("This box has no area: drag from corner to corner.")
        self.steps.append(self._after(box))

    def _after(self, prompt: Click | Box) -> Step:
        """Decode the mask after one more click, or another box."""
        image, backbone = self._opened(), self.models.backbone
        if isinstance(prompt, Click):
            clicks, box, logits = [*self.clicks, prompt], self.box, self._logits
        else:  # the mask of another box would mislead
            clicks, box, logits = clicks_of(None, self.steps), prompt, None
        return Step(prompt, *decode(backbone, image.features, image.size, clicks, box, logits))

    @locked
    def undo(self) -> str:
        """Remove the last click or box; without one, undo the last change of saved objects.

        An object that is corrected is let go before. The clicks and the name of an object that was
        saved come back, as do suggestions that were accepted.

        Returns:
            What people are told, or "".

        Raises:
            ValueError: somebody else has changed the objects since.
            OSError: it could not be written.
        """
        if self.steps:
            self.steps.pop()
            return ""
        if self.correction is not None:
            name = self.correction.saved.name
            self.reset()
            return f"{name} stays as it is."
        if not self._history:
            return "Nothing to undo in this image."
        change = self._history[-1]
        try:
            self.project.take_back(change.edit)
        except ValueError:
            self._history.clear()
            raise
        self._history.pop()
        self.steps, self.correction = list(change.steps), change.correction
        self.name = change.name or self.name
        self._keep([*self.suggestions, *change.accepted])
        self._refresh()
        return f"Undone: {change.label}."

    @locked
    def reset(self) -> None:
        """Remove all clicks of the current object; a saved one stays as it is in the file."""
        if self.correction is not None:
            self.name = self.correction.name
        self.steps, self.correction = [], None

    @locked
    def mask(self) -> np.ndarray:
        """Return the current mask at the size of the image: bool (H, W)."""
        size = self._opened().size
        if self.steps:
            return self._decoded(size)
        return np.zeros(size, bool) if self.correction is None else self.correction.saved.mask()

    def _decoded(self, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
        """Return the mask after the last step at a size (H, W) of the image, or a part of it."""
        backbone = self.models.backbone
        full = backbone.masks_at(self.steps[-1].logits, size, window)
        return to_host(full > backbone.mask_threshold)[0]

    # Objects -----------------------------------------------------------------------------------

    @locked
    def set_name(self, name: str) -> None:
        """Name the current object, and those that follow."""
        self.name = " ".join(name.split())[:MAX_NAME]

    @locked
    def save_object(self) -> str:
        """Write the current object and begin another.

        A corrected one replaces its mask in the file; its id and its place stay, and its category,
        unless another name was given. Without an object, the next click begins another, also inside
        a saved mask.

        Returns:
            What people are told, or "".

        Raises:
            ValueError: there is no mask or no name, or somebody else has changed the object.
            OSError: it could not be written; the clicks stay.
        """
        if not self.steps and (self.correction is not None or (self._saved and not self._begins)):
            if self.correction is not None and self.name not in ("", self.correction.saved.name):
                self.rename_object(self.correction.saved.id)
            self.reset()
            self._begins = True
            return "The next click begins another object."
        if not self.steps:
            raise ValueError("Nothing to save: click an object first.")
        image, correction, mask = self._opened(), self.correction, self.mask()
        values = {"score": self.steps[-1].predicted_iou, "clicks": len(clicks_of(None, self.steps))}
        if correction is None:
            edit = self.project.add_all(image.file, [(self._named(), mask, values)])
            self._begins = True
        else:
            saved = correction.saved
            values["clicks"] += saved.clicks
            name = None if self.name in ("", saved.name) else self.name
            edit = self.project.replace(saved, mask, name, values)
        what = "save" if correction is None else "correct"
        change = _Change(f"{what} {self.name}", edit, self.steps, correction, self.name)
        self.reset()
        self._changed(change)
        return ""

    @locked
    def correct(self, number: int | str) -> str:
        """Make a saved object the current one, so that clicks correct its mask.

        SAM gets its mask and the clicks that have made it; without the latter, after a restart or
        from another tool, one inside it.

        Returns:
            What people are told.

        Raises:
            ValueError: another object has clicks that are not saved, or it is gone or has no mask.
        """
        if self.steps:
            raise ValueError(UNFINISHED)
        self.reset()
        self._refresh()
        saved = next((own for own in self._saved if own.id == number), None)
        if saved is None:
            raise ValueError("Somebody else has removed this object.")
        made = self._made(saved)
        if made is None:
            mask, box = saved.mask(), None
            clicks, logits = inner_click(mask), mask_prompt(self.models.backbone, mask)
        else:
            clicks = tuple(clicks_of(made.correction, made.steps))
            logits, box = made.steps[-1].logits, box_of(made.correction, made.steps)
        self.correction = Correction(saved, logits, clicks, box, self.name)
        self.name = saved.name
        return f"{saved.name} is selected: clicks correct it. Enter, then a click: another."

    def _made(self, saved: SavedObject) -> _Change | None:
        """Return the change of this tab that has made the mask of an object, if there is one."""
        for change in reversed(self._history):
            row = change.edit.after.get(saved.id)
            if change.steps and row and row.record["segmentation"] == saved.segmentation:
                return change
        return None

    @locked
    def correct_beside(self, step: int) -> str:
        """Let clicks correct another saved object, `step` further; see `correct`."""
        ids = [own.id for own in self._saved]
        if not ids:
            return ""
        number = None if self.correction is None else self.correction.saved.id
        at = ids.index(number) + step if number in ids else min(step, 0)
        return self.correct(ids[at % len(ids)])

    @locked
    def let_go(self) -> str:
        """Let a click inside a saved mask select its object again; one without clicks is let go.

        Returns:
            What people are told, or "".
        """
        if self.steps or not self._saved:
            return ""
        self.reset()
        self._begins = False
        return "A click inside a mask selects its object."

    def _object_at(self, x: float, y: float) -> int | str | None:
        """Return the saved object with the smallest mask at (x, y) of the image, or None."""
        height, width = self._opened().size
        click = self._inside(x, y, True, False)
        before = round(click.x) * height + round(click.y)  # columns come first
        counts = [before, 1, height * width - before - 1]
        pixel = rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        areas: dict[int | str, int] = {}
        for own in self._saved:
            with suppress(ValueError):  # of another tool, without a mask
                mask = own.run_lengths()
                if rle.area(rle.merge([mask, pixel], intersect=True)):
                    areas[own.id] = int(rle.area(mask))
        return min(areas, key=lambda number: areas[number], default=None)

    def _named(self) -> str:
        if not self.name:
            raise ValueError("Name the object first.")
        return self.name

    @locked
    def rename_object(self, number: int | str) -> None:
        """Give a saved object the current name."""
        edit = self.project.rename(number, self._named())
        self._changed(_Change(f"rename to {self.name}", edit))

    @locked
    def remove_object(self, number: int | str) -> None:
        """Remove a saved object."""
        edit = self.project.remove(number)
        if self.correction is not None and self.correction.saved.id == number:
            self.reset()
        names = [name for name, _ in edit.categories.values()] or ["an object"]
        self._changed(_Change(f"remove {names[0]}", edit))

    def _changed(self, change: _Change) -> None:
        self._history.append(change)
        self._refresh()

    @locked
    def names(self) -> list[str]:
        """Return the names to offer; new ones are added at the end, as long as the tab is open."""
        player = self.models.player
        known = [] if player is None or player.needs_cue else player.known
        offered = self._offered.setdefault(self.project.path, {})
        offered.update(dict.fromkeys([*self.project.names, *known]))
        return list(offered)

    def knows_no_name(self) -> bool:
        """Return whether the agent looks for names and knows none of those in use."""
        player = self.models.player
        if player is None or player.needs_cue:
            return False
        return not set(player.known) & {*self.project.names, self.name}

    def _refresh(self) -> None:
        image = self._opened()
        self._saved = self.project.objects(image.file, image.size)

    # Everything mode ---------------------------------------------------------------------------

    @locked
    def suggest(self) -> Job:
        """Begin to find the masks of everything, in the background.

        People may go on meanwhile; if they open another image, the search ends.

        Returns:
            The search; its steps are clicks.

        Raises:
            ValueError: a search is running.
        """
        image, options = self._opened(), self.models.generator.options
        if self.search is not None and self.search.is_running:
            raise ValueError(f"{SEARCHING}: wait for it, or stop it (Esc).")
        layers = range(options.crop_n_layers + 1)
        clicks = sum(4**layer * prod(options.layer_grid(layer)) for layer in layers)
        self.search = Job(SEARCHING, partial(self._suggest, image), clicks)
        return self.search

    def _suggest(self, image: OpenImage, advance: Callable[[int], None]) -> None:
        (masks,) = self.models.generator.stream([image.pixels], advance)
        found = []
        for number, record in enumerate(masks.records("coco_rle")):
            if record["area"]:
                mask = masks.mask(number)
                found.append(Suggestion(record, at_shown_size(mask), outline(mask)))
        with self.lock:
            advance(0)  # after the last click, too, people may have stopped it
            if self.image is image:
                new = self._not_saved(found)
                self.known = len(found) - len(new)
                self.suggestions, self.selected = new, 0 if new else -1

    def _not_saved(self, found: list[Suggestion]) -> list[Suggestion]:
        """Return the suggestions that no saved object covers."""
        saved = []
        for own in self._saved:
            with suppress(ValueError):  # of another tool, without a mask
                saved.append(own.run_lengths())
        if not found or not saved:
            return found
        masks = [own.record["segmentation"] for own in found]
        best = rle.iou(masks, saved, [0] * len(saved)).max(axis=1)
        return [own for own, iou in zip(found, best, strict=True) if iou <= _SAME]

    @locked
    def stop_search(self) -> bool:
        """Stop the search of everything mode; returns whether one was running."""
        search, self.search = self.search, None
        if search is not None:
            search.stop()
        return search is not None and search.is_running

    @locked
    def suggestion_at(self, x: float, y: float) -> int:
        """Return the smallest suggestion at (x, y), in pixels of the image; -1 without one."""
        height, width = self._opened().size
        rows, columns = shown_size((height, width))
        row, column = int((y + 0.5) * rows / height), int((x + 0.5) * columns / width)
        row, column = min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)
        hits = [i for i, own in enumerate(self.suggestions) if own.mask[row, column]]
        return min(hits, key=lambda i: self.suggestions[i].record["area"], default=-1)

    @locked
    def select(self, step: int) -> None:
        """Select another suggestion, `step` further."""
        if self.suggestions:
            self.selected = (self.selected + step) % len(self.suggestions)

    @locked
    def accept(self, number: int) -> None:
        """Save a suggestion as an object.

        Raises:
            ValueError: it is gone, or has no name.
            OSError: it could not be written; the suggestion stays.
        """
        if not 0 <= number < len(self.suggestions):
            raise ValueError("This suggestion is gone.")
        self._accept([self.suggestions[number]])

    @locked
    def accept_all(self) -> None:
        """Save all suggestions as objects."""
        if self.suggestions:
            self._accept(self.suggestions)

    def _accept(self, chosen: Sequence[Suggestion]) -> None:
        objects = [
            (
                own.record.get("category") or self._named(),
                own.record["segmentation"],
                {"score": own.record["predicted_iou"]},
            )
            for own in chosen
        ]
        edit = self.project.add_all(self._opened().file, objects)
        self._changed(
            _Change(f"accept {counted(len(chosen), 'suggestion')}", edit, accepted=chosen)
        )
        self._keep([own for own in self.suggestions if all(own is not c for c in chosen)])

    @locked
    def answer(self, x: float, y: float, positive: bool) -> str:
        """Accept or dismiss the suggestion at (x, y), in pixels of the image.

        Returns:
            What people are told if there is none, else "".
        """
        number = self.suggestion_at(x, y)
        if number < 0:
            return "No suggestion is here. Dismiss them (Esc) to click an object yourself."
        (self.accept if positive else self.dismiss)(number)
        return ""

    @locked
    def dismiss(self, number: int) -> None:
        """Drop a suggestion."""
        self._keep([own for i, own in enumerate(self.suggestions) if i != number])

    @locked
    def dismiss_all(self) -> None:
        """Drop all suggestions."""
        self._keep([])

    def _keep(self, suggestions: list[Suggestion]) -> None:
        self.suggestions = suggestions
        self.selected = min(max(self.selected, 0), len(suggestions) - 1)

    # The agent ---------------------------------------------------------------------------------

    @locked
    def proposal(self, *, search: bool = True) -> Proposal:
        """Return what the agent would do next.

        Args:
            search: let an agent with a search use it, to find the click.

        Raises:
            ValueError: there is no agent, or it does not know the name of the object.
        """
        player, image = self.models.player, self._opened()
        if player is None:
            raise ValueError("There is no agent: start the app with --policy.")
        positive = [click for click in self.clicks if click.positive]
        cue = None
        if player.needs_cue and positive:
            point = np.array([positive[0].x, positive[0].y])
            x, y = player.backbone.to_input_frame(point, image.size).tolist()
            cue = (x, y)
        name = "" if player.needs_cue else self._named()
        others = [own for own in self.project.names if own in player.known and own != name]
        return player.propose(
            *(image.pixels, image.handle, self._logits, len(self.steps), [name, *others], cue),
            self._preview if search else None,
        )

    def _preview(self, click: tuple[float, float, bool]) -> Tensor:
        """Return the mask logits (hm, wm) after a click of the agent, which is not kept."""
        return self._after(self._agents(click)).logits

    def _agents(self, click: tuple[float, float, bool]) -> Click:
        """Return a click (x, y, positive) of the agent, in pixels of the input frame."""
        x, y, positive = click
        size = self._opened().size
        height, width = self.models.backbone.input_size(size)
        return self._inside(x * size[1] / width, y * size[0] / height, positive, True)

    @locked
    def agent_step(self) -> bool:
        """Let the agent click once.

        Returns:
            Whether it wants to go on: False after `stop`, and when it has no steps left.
        """
        player, proposal = self.models.player, self.proposal()
        assert player is not None
        if proposal.other == "stop":
            return False
        if proposal.other == "undo":
            # Whether it would undo again does not depend on the mask alone: one is enough.
            del self.steps[-1:]
            return False
        assert proposal.click is not None
        click = self._agents(proposal.click)
        self.click(click.x, click.y, click.positive, by_agent=True)
        return len(self.steps) < player.max_steps

    @locked
    def presence(self) -> float | None:
        """Return the probability that the image shows the object that the agent has clicked.

        None: the agent has not clicked, cannot tell, or does not know the name.
        """
        player, image = self.models.player, self.image
        if player is None or image is None or not self.steps:
            return None
        if not any(click.by_agent for click in self.clicks):
            return None
        predicted = [step.predicted_iou for step in self.steps]
        return player.presence(image.pixels, self.steps[-1].logits, predicted, self.name)

    # Views -------------------------------------------------------------------------------------

    @locked
    def picture(self) -> dict[str, Any]:
        """Return the open image as the page draws it: src, file, and see `measures`."""
        if self.image is None:
            return {"src": ""}
        src, file = f"/shown/{self.image.key}", printable(self.image.file)
        return {"src": src, "file": file, **measures(self.image.size)}

    @locked
    def current(self) -> dict[str, Any]:
        """Return the current object as the page draws it; positions are fractions of the image."""
        if self.image is None:
            return {"path": "", "marks": [], "box": None}
        height, width = self.image.size

        def fraction(x: float, y: float) -> list[float]:
            return [(x + 0.5) / width, (y + 0.5) / height]

        marks = [
            {"at": fraction(c.x, c.y), "positive": c.positive, "agent": c.by_agent}
            for c in self.clicks
        ]
        box = self.box
        return {
            "path": self._path(),
            "marks": marks,
            "box": None if box is None else [*fraction(*box[:2]), *fraction(*box[2:])],
        }

    def _path(self) -> str:
        """Return the outline of the current mask."""
        if not self.steps:
            return "" if self.correction is None else self._path_of(self.correction.saved)
        size = self._opened().size
        rows, columns = shown_size(size)
        small = self._decoded((rows, columns))
        scale = size[1] / columns, size[0] / rows
        if (rows, columns) != size and small.any():
            # A small object of a large image: its own pixels.
            y, x = (np.flatnonzero(small.any(axis=axis))[[0, -1]] for axis in (1, 0))
            x0, y0 = max(0, int((x[0] - 1) * scale[0])), max(0, int((y[0] - 1) * scale[1]))
            x1, y1 = int((x[1] + 2) * scale[0]) + 1, int((y[1] + 2) * scale[1]) + 1
            window = Window(x0, y0, min(x1, size[1]), min(y1, size[0]))
            if shown_size(window.size) == window.size:
                return outline(self._decoded(size, window), window.start)
        return outline(small, scale=scale)

    @locked
    def objects(self) -> list[dict[str, Any]]:
        """Return the saved objects of the image as the page draws them.

        Each has id, name, score, path, and whether it is the current object, `is_current`.
        """
        current = None if self.correction is None else self.correction.saved.id
        return [
            {
                "id": own.id,
                "name": own.name,
                "score": own.score,
                "path": self._path_of(own),
                "is_current": own.id == current,
            }
            for own in self._saved
        ]

    def _path_of(self, saved: SavedObject) -> str:
        known, path = self._paths.get(saved.id, (None, ""))
        if known != saved.segmentation:
            try:
                path = outline(saved.mask())
            except ValueError:  # of another tool; it is kept in the file as it is
                path = ""
            self._paths[saved.id] = saved.segmentation, path
        return path

    @locked
    def heat(self) -> str:
        """Return the agent's click probabilities as an image's data URL; raises as `proposal`."""
        backbone, size = self.models.backbone, self._opened().size
        height, width = backbone.input_size(size)
        side = backbone.image_size
        return heat_map(self.proposal(search=False).chances, (height / side, width / side))
