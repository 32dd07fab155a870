"""The app in Chromium: clicks, zoom, the agent, videos, reloads, crashes, tabs, keys, phones."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from sam_gym.data import Sample, make_dataset, make_video_dataset

playwright = pytest.importorskip(
    "playwright.sync_api", reason="drives the browser: pip install playwright"
)
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("nicegui") is None, reason="the app needs NiceGUI: pip install 'sam-gym[app]'"
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
#: Seconds until something must have happened; a busy machine takes its time.
PATIENCE = 120
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
#: Folder to keep screenshots in, if any.
SHOTS = os.environ.get("SAM_GYM_SCREENSHOTS")


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    return [make_dataset("scenes", "test", length=3, size=256)[i] for i in range(3)]


@pytest.fixture
def photos(tmp_path: Path, scenes: list[Sample]) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for number, scene in enumerate(scenes):
        cv2.imwrite(str(root / f"{number}.png"), scene.image[..., ::-1])
    return root


class App:
    """The app in a process of its own."""

    def __init__(self, photos: Path, start_script: Callable[..., Any], *options: str) -> None:
        self.start_script = start_script
        self.script: Any = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self.out, self.url = photos.parent / "out", f"http://127.0.0.1:{port}/"
        self.command = ["agents.app", "--images", str(photos)]
        self.command += ["--out", str(self.out), "--port", port, "--device", "cpu"]
        self.command += options or ["--policy", "implicit"]

    def start(self) -> None:
        script = self.script = self.start_script(*self.command)
        until(lambda: "\n" in script.printed() or not script.process.is_alive())
        assert script.printed().startswith(f"Open {self.url}\n"), script.outputs

    def kill(self) -> None:
        if self.script is not None:
            self.script.process.kill()
            self.script.finish()

    def annotations(self) -> list[dict[str, Any]]:
        file = self.out / "annotations.json"  # written with the first object
        return json.loads(file.read_text())["annotations"] if file.exists() else []


@pytest.fixture
def app(photos: Path, start_script: Callable[..., Any]) -> Iterator[App]:
    app = App(photos, start_script)
    app.start()
    yield app
    app.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; tabs of different contexts share neither cookies nor storage."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Callable[..., Any]]:
    """Returns a page of a context of its own, as of another browser."""
    contexts = []

    def open_tab(url: str, width: int = 1280, height: int = 720, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        page = context.new_page()
        page.goto(url, wait_until="commit")
        loaded(page)
        return page

    yield open_tab
    for context in contexts:
        context.close()


def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds; returns its value."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
    return value


def loaded(page: Any) -> None:
    page.wait_for_function("document.querySelector('.sg-stage img')?.naturalWidth > 0")


def path_of(page: Any) -> str:
    return page.get_attribute("[data-testid=mask]", "d") or ""


def marks(page: Any) -> int:
    return page.locator(".sg-mark").count()


def place(page: Any, x: float, y: float, side: int = 256) -> tuple[float, float]:
    """Return where a pixel of the image is on the page."""
    box = page.locator(".sg-stage").bounding_box()
    return box["x"] + (x + 0.5) * box["width"] / side, box["y"] + (y + 0.5) * box["height"] / side


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png")


def depth(mask: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel to the outside of a mask."""
    padded = np.pad(mask, 1).astype(np.uint8)
    return cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]


def middle(mask: np.ndarray) -> tuple[int, int]:
    """Return the pixel (x, y) deepest inside a mask."""
    y, x = np.unravel_index(depth(mask).argmax(), mask.shape)
    return int(x), int(y)


def test_annotate_a_folder(
    app: App, open_tab: Callable[..., Any], scenes: list[Sample], tmp_path: Path
) -> None:
    page = open_tab(app.url)
    names = make_dataset("scenes", "test", length=1).categories
    scene = scenes[0]
    name = names[scene.categories[0]]
    x, y = middle(scene.masks[0])

    # The mask appears where the click was.
    page.mouse.click(*place(page, x, y))
    first = until(lambda: path_of(page))
    assert page.evaluate(
        "at => document.querySelector('[data-testid=mask]').isPointInFill(new DOMPoint(...at))",
        [x + 0.5, y + 0.5],
    )
    until(lambda: page.inner_text("[data-testid=score]").startswith("IoU 0."))
    shoot(page, "click")

    # Right click, undo, box, reset.
    page.mouse.click(*place(page, 250, 250), button="right")
    until(lambda: page.locator(".sg-negative").count() == 1)
    until(lambda: path_of(page) != first)
    page.keyboard.press("z")
    until(lambda: path_of(page) == first)
    assert marks(page) == 1
    page.keyboard.press("r")
    until(lambda: not path_of(page))
    page.mouse.move(*place(page, x - 40, y - 40))
    page.mouse.down()
    page.mouse.move(*place(page, x + 40, y + 40), steps=4)
    page.mouse.up()
    until(lambda: path_of(page) and page.locator(".sg-box").count() == 1)
    page.keyboard.press("r")
    until(lambda: not path_of(page))

    # The agent finishes; the object is on the disk when the page says so.
    page.get_by_label("Name of the object").fill(name)
    page.keyboard.press("Enter")
    page.keyboard.press("h")
    page.wait_for_selector(".sg-heat")
    shoot(page, "heat")
    page.keyboard.press("f")
    until(lambda: page.locator(".sg-agent").count() == 5)
    until(lambda: "done" in page.inner_text("[role=status]"))
    page.keyboard.press("h")
    page.keyboard.press("Enter")
    until(lambda: page.locator(".sg-object").count() == 1)
    shoot(page, "agent")
    (annotation,) = app.annotations()
    assert annotation["clicks"] == 5
    truth = scene.category_mask(names.index(name))
    found = COCO(str(app.out / "annotations.json")).annToMask(annotation) > 0
    assert (found & truth).sum() / (found | truth).sum() > 0.5

    # A reload keeps what was not saved; another tab sees none of it.
    page.mouse.click(*place(page, x, y))
    until(lambda: path_of(page))
    page.reload(wait_until="commit")
    loaded(page)
    until(lambda: path_of(page) and marks(page) == 1)
    assert page.locator(".sg-object").count() == 1
    other = open_tab(app.url)
    until(lambda: other.locator(".sg-object").count() == 1)
    assert marks(other) == 0 and not path_of(other)

    # A crash loses nothing that was saved. Keys alone do the rest.
    app.kill()
    app.start()
    page.reload(wait_until="commit")
    loaded(page)
    until(lambda: page.locator(".sg-object").count() == 1)
    page.keyboard.press("1")
    until(lambda: page.input_value("input[aria-label='Name of the object']") == name)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    page.wait_for_selector(".sg-cursor", state="attached")
    page.keyboard.press("Space")
    until(lambda: path_of(page))
    page.keyboard.press("Enter")
    until(lambda: len(app.annotations()) == 2)
    until(lambda: page.locator(".sg-object").count() == 2)
    page.keyboard.press("d")
    until(lambda: page.locator(".sg-object").count() == 0)
    until(lambda: "1 done" in page.inner_text(".sg-bar"))
    assert "1.png" in page.inner_text(".sg-bar")

    # The download is COCO.
    with page.expect_download() as download:
        page.get_by_label("Download the COCO JSON").click()
    file = tmp_path / "download.json"
    download.value.save_as(file)
    coco = COCO(str(file))
    assert len(coco.anns) == 2 and coco.loadImgs([1])[0]["file_name"] == "0.png"
    assert all(coco.annToMask(own).any() for own in coco.anns.values())
    assert coco.loadRes(list(coco.anns.values())).anns


def test_uploads_and_a_phone(
    app: App, open_tab: Callable[..., Any], scenes: list[Sample], tmp_path: Path
) -> None:
    page = open_tab(app.url, 390, 844, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.touchscreen.tap(*place(page, 128, 128))
    until(lambda: path_of(page))
    page.get_by_role("button", name="- negative").tap()
    page.touchscreen.tap(*place(page, 20, 20))
    until(lambda: page.locator(".sg-negative").count() == 1)
    shoot(page, "phone")
    page.get_by_role("button", name="Reset").tap()
    until(lambda: marks(page) == 0)

    own = tmp_path / "own.png"
    cv2.imwrite(str(own), cv2.resize(scenes[0].image[..., ::-1], (2048, 2048)))
    page.set_input_files("input[type=file]", str(own))
    until(lambda: "own.png" in page.inner_text(".sg-bar"))
    assert "/ 1" in page.inner_text(".sg-bar")
    (kept,) = (app.out / "uploads").glob("*/images/*")
    assert kept.read_bytes() == own.read_bytes()
    # The mask of an image that is shown smaller than it is lies where the click was.
    page.get_by_role("button", name="+ positive").tap()
    x, y = middle(scenes[0].masks[0])
    page.touchscreen.tap(*place(page, x, y))
    until(lambda: path_of(page))
    assert page.evaluate(
        """([x, y]) => {
            const mask = document.querySelector("[data-testid=mask]")
            const { width, height } = mask.ownerSVGElement.viewBox.baseVal
            return mask.isPointInFill(new DOMPoint(x * width, y * height))
        }""",
        [(x + 0.5) / 256, (y + 0.5) / 256],
    )
    page.get_by_role("button", name="Reset").tap()
    until(lambda: marks(page) == 0)
    own.write_text("no image")
    page.set_input_files("input[type=file]", str(own))
    page.wait_for_selector("text=own-2.png >> visible=true")
    page.locator(".sg-bar button", has_text="Uploads").tap()
    page.locator(".q-menu .q-item", has_text="Images").tap()
    until(lambda: "0.png" in page.inner_text(".sg-bar"))


def test_everything(app: App, open_tab: Callable[..., Any]) -> None:
    page = open_tab(app.url)
    page.get_by_label("Name of the object").fill("thing")
    page.keyboard.press("Enter")
    page.keyboard.press("e")
    until(lambda: page.locator(".sg-suggestion").count() > 0)
    count = page.locator(".sg-suggestion").count()
    shoot(page, "everything")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    until(lambda: len(app.annotations()) == 1)
    until(lambda: page.locator(".sg-suggestion").count() == count - 1)
    page.keyboard.press("l")
    until(lambda: len(app.annotations()) == count)
    until(lambda: page.locator(".sg-suggestion").count() == 0)


# Zoom ------------------------------------------------------------------------------------------


def zoom_of(page: Any) -> float:
    """Return how much larger than at first the image is shown."""
    frame, stage = (page.locator(own).bounding_box() for own in (".sg-frame", ".sg-stage"))
    return max(stage[side] / frame[side] for side in ("width", "height"))


def has_zoom(page: Any, zoom: float) -> bool:
    return zoom_of(page) == pytest.approx(zoom, rel=0.01)  # sides are rounded to pixels


def moved(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


def truly_at(page: Any, x: int, y: int) -> None:
    """Check that the last click is drawn at a pixel of the image, and lies in the mask."""
    mark = page.locator(".sg-mark circle").last
    drawn = [float(mark.get_attribute(own).rstrip("%")) * 2.56 - 0.5 for own in ("cx", "cy")]
    assert drawn == pytest.approx([x, y], abs=0.3)  # 0.3 pixels are several of the screen
    box, there = mark.bounding_box(), place(page, x, y)
    middle_of = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    assert middle_of == pytest.approx(there, abs=4)
    assert page.evaluate(
        "at => document.querySelector('[data-testid=mask]').isPointInFill(new DOMPoint(...at))",
        [x + 0.5, y + 0.5],
    )


def drag(page: Any, start: tuple[float, float], by: tuple[int, int], button: str = "left") -> None:
    page.mouse.move(*start)
    page.mouse.down(button=button)
    page.mouse.move(start[0] + by[0], start[1] + by[1], steps=4)
    page.mouse.up(button=button)


def test_zoom_and_pan(app: App, open_tab: Callable[..., Any], scenes: list[Sample]) -> None:
    page = open_tab(app.url)
    small = min(scenes[0].masks, key=np.sum)
    x, y = middle(small)
    assert has_zoom(page, 1)

    # The wheel zooms about the pointer; a click at the place is one at the pixel.
    at = place(page, x, y)
    page.mouse.move(*at)
    while zoom_of(page) < 4:
        before = zoom_of(page)
        page.mouse.wheel(0, -120)
        until(lambda before=before: zoom_of(page) > before)
    # Events of a wheel are at whole pixels of the screen; one of the image has ten.
    assert place(page, x, y) == pytest.approx(at, abs=3)
    page.mouse.click(*place(page, x, y))
    until(lambda: path_of(page))
    truly_at(page, x, y)
    shoot(page, "zoom")

    # The middle button and Space move the image, and neither clicks nor draws a box.
    before = place(page, x, y)
    drag(page, before, (-90, 40), "middle")
    until(lambda: moved(before, place(page, x, y)) == pytest.approx((-90, 40), abs=1))
    page.keyboard.down(" ")
    drag(page, place(page, x, y), (120, -70))
    page.keyboard.up(" ")
    until(lambda: moved(before, place(page, x, y)) == pytest.approx((30, -30), abs=1))
    assert marks(page) == 1 and page.locator(".sg-box").count() == 0
    page.keyboard.press("r")
    until(lambda: marks(page) == 0)
    zoomed = zoom_of(page)
    page.mouse.click(*place(page, x, y))
    until(lambda: path_of(page))
    truly_at(page, x, y)
    assert zoom_of(page) == zoomed
    # The small object is what is saved.
    page.keyboard.press("t")
    page.keyboard.type("thing")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    (own,) = until(app.annotations)
    found = COCO(str(app.out / "annotations.json")).annToMask(own) > 0
    assert (found & small).sum() / (found | small).sum() > 0.7

    # A box, at another zoom: its corners are those that were dragged.
    page.keyboard.press("-")
    until(lambda: has_zoom(page, zoomed / 1.5))
    corner = place(page, x - 30, y - 30)
    end = place(page, x + 30, y + 30)
    drag(page, corner, (round(end[0] - corner[0]), round(end[1] - corner[1])))
    until(lambda: page.locator(".sg-box").count() == 1 and path_of(page))
    box = page.locator(".sg-box").bounding_box()
    assert (box["x"], box["y"]) == pytest.approx(corner, abs=3)
    assert (box["x"] + box["width"], box["y"] + box["height"]) == pytest.approx(end, abs=3)
    page.keyboard.press("r")
    until(lambda: not path_of(page))

    # Keys and buttons; the crosshair stays in sight.
    page.keyboard.press("0")
    until(lambda: has_zoom(page, 1))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("+")
    page.get_by_label("Zoom in (+)").click()
    page.get_by_label("Zoom in (+)").click()
    until(lambda: has_zoom(page, 1.5**3))
    for _ in range(40):
        page.keyboard.press("Shift+ArrowRight")
    frame = page.locator(".sg-frame").bounding_box()
    line = page.locator(".sg-cursor line").first.bounding_box()
    assert frame["x"] < line["x"] < frame["x"] + frame["width"]
    page.keyboard.press("Space")
    until(lambda: marks(page) == 1)
    page.keyboard.press("r")
    until(lambda: marks(page) == 0)
    # Another image is shown whole.
    page.keyboard.press("PageDown")
    until(lambda: "1.png" in page.inner_text(".sg-bar"))
    loaded(page)
    until(lambda: has_zoom(page, 1))
    assert page.get_by_label("Whole image (0)").count() == 0


def test_pixels_of_a_large_image(
    photos: Path, start_script: Callable[..., Any], open_tab: Callable[..., Any]
) -> None:
    """The part that is looked at comes with its own pixels, in their places."""
    for own in photos.iterdir():
        own.unlink()
    image = np.zeros((3000, 3000, 3), np.uint8)
    image[1500:, :, 2] = 255
    image[:, 1500:, 1] = 255
    cv2.imwrite(str(photos / "large.png"), image)
    app = App(photos, start_script, "--backbone", "micro")
    app.start()
    try:
        page = open_tab(app.url)
        assert page.locator(".sg-detail").count() == 0
        stage = page.locator(".sg-stage").bounding_box()
        page.mouse.move(stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2)
        while zoom_of(page) < 6:
            before = zoom_of(page)
            page.mouse.wheel(0, -120)
            until(lambda before=before: zoom_of(page) > before)
        frame = page.locator(".sg-frame").bounding_box()
        scale = page.locator(".sg-stage").bounding_box()["width"] / 3000

        def arrived() -> bool:  # that of the last step
            part = page.locator(".sg-detail")
            return part.count() == 1 and part.bounding_box()["width"] < frame["width"] + 2 * scale

        until(arrived)
        source = page.get_attribute(".sg-detail", "src")
        x0, y0, x1, y1 = (int(value) for value in source.split("=")[1].split(","))
        assert 0 < x0 < 1500 < x1 < 3000 and 0 < y0 < 1500 < y1 < 3000
        part = page.locator(".sg-detail").bounding_box()
        stage = page.locator(".sg-stage").bounding_box()
        assert part["x"] == pytest.approx(stage["x"] + x0 * scale, abs=0.5)
        assert part["y"] == pytest.approx(stage["y"] + y0 * scale, abs=0.5)
        assert part["width"] == pytest.approx((x1 - x0) * scale, abs=0.5)
        assert page.evaluate("document.querySelector('.sg-detail').naturalWidth") == x1 - x0
        # The colours meet where they do in the image.
        shot = page.screenshot()
        shown = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR)
        meet = [round(v) for v in place(page, 1499.5, 1499.5, 3000)]
        found = [shown[meet[1] + dy, meet[0] + dx] > 127 for dy in (-8, 8) for dx in (-8, 8)]
        expected = [[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]
        np.testing.assert_array_equal(np.array(found), np.array(expected, bool))
        page.keyboard.press("0")
        until(lambda: page.locator(".sg-detail").count() == 0)
    finally:
        app.kill()


def test_fingers(app: App, open_tab: Callable[..., Any], scenes: list[Sample]) -> None:
    """Two fingers zoom and move the image and do not click; then a tap is at its pixel."""
    page = open_tab(app.url, 390, 844, has_touch=True, is_mobile=True)
    session = page.context.new_cdp_session(page)
    x, y = middle(min(scenes[0].masks, key=np.sum))
    at = place(page, x, y)

    def touch(kind: str, *fingers: float) -> None:
        points = [{"x": at[0] + by, "y": at[1], "id": i} for i, by in enumerate(fingers)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", -20)
    touch("touchStart", -20, 20)
    for wide in range(20, 81, 10):
        touch("touchMove", -wide, wide)
    until(lambda: zoom_of(page) > 3.9)
    assert has_zoom(page, 4)
    assert place(page, x, y) == pytest.approx(at, abs=1)
    for by in range(10, 31, 10):
        touch("touchMove", by - 80, by + 80)
    touch("touchEnd")
    until(lambda: moved(at, place(page, x, y)) == pytest.approx((30, 0), abs=1))
    page.touchscreen.tap(*place(page, x, y))
    until(lambda: path_of(page))
    assert marks(page) == 1 and page.locator(".sg-box").count() == 0
    truly_at(page, x, y)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shoot(page, "zoom-phone")
    page.get_by_label("Whole image (0)").tap()
    until(lambda: has_zoom(page, 1))


# Corrections -----------------------------------------------------------------------------------


def test_correct_a_saved_object(
    app: App, open_tab: Callable[..., Any], scenes: list[Sample]
) -> None:
    page = open_tab(app.url)
    places = [middle(mask) for mask in sorted(scenes[0].masks, key=np.sum)[-2:]]
    for number, (x, y) in enumerate(places):
        page.get_by_label("Name of the object").fill("ab"[number] + "thing")
        page.keyboard.press("Enter")
        page.mouse.click(*place(page, x, y))
        until(lambda: path_of(page))
        page.keyboard.press("Enter")
        until(lambda number=number: len(app.annotations()) == number + 1)
        until(lambda: not path_of(page))
    saved = app.annotations()

    # Select it in the list: its clicks are there again. Undo lets it go.
    page.locator(".sg-item .sg-label").first.click()
    until(lambda: path_of(page) and marks(page) == 1)
    assert page.locator(".sg-chosen").count() == 1
    name = page.get_by_label("Name of the object")
    until(lambda: name.input_value() == "athing")
    page.keyboard.press("z")
    until(lambda: not path_of(page) and page.locator(".sg-object").count() == 2)
    until(lambda: name.input_value() == "bthing")

    # After a crash a click in the mask selects it, and further clicks correct it.
    app.kill()
    app.start()
    page.reload(wait_until="commit")
    loaded(page)
    until(lambda: page.locator(".sg-object").count() == 2)
    outline = page.locator(".sg-object").first.get_attribute("d")
    x, y = places[0]
    page.mouse.click(*place(page, x, y))
    until(lambda: path_of(page) == outline)
    until(lambda: page.locator(".sg-object").count() == 1)
    assert app.annotations() == saved
    shoot(page, "selected")
    page.mouse.click(*place(page, x + 6, y + 6), button="right")
    corrected = until(lambda: path_of(page) != outline and path_of(page))
    assert page.locator(".sg-negative").count() == 1

    # A reload keeps the correction; saving it replaces the mask, and nothing else.
    page.reload(wait_until="commit")
    loaded(page)
    until(lambda: path_of(page) == corrected)
    assert page.locator(".sg-chosen").count() == 1 and app.annotations() == saved
    page.keyboard.press("Enter")
    until(lambda: app.annotations() != saved)
    until(lambda: page.locator(".sg-object").count() == 2)
    assert page.locator(".sg-object").first.get_attribute("d") == corrected
    after = app.annotations()
    assert [own["id"] for own in after] == [own["id"] for own in saved]
    assert after[1] == saved[1] and after[0]["category_id"] == saved[0]["category_id"]
    assert after[0]["segmentation"] != saved[0]["segmentation"] and after[0]["clicks"] == 2
    app.kill()
    app.start()
    page.reload(wait_until="commit")
    loaded(page)
    until(lambda: page.locator(".sg-object").count() == 2)
    assert page.locator(".sg-object").first.get_attribute("d") == corrected

    # Keys alone; the last change can be undone.
    page.keyboard.press("k")
    until(lambda: page.locator(".sg-chosen", has_text="bthing").count() == 1)
    page.keyboard.press("j")
    until(lambda: page.locator(".sg-chosen", has_text="athing").count() == 1)
    page.mouse.click(*place(page, x + 6, y + 6))
    until(lambda: path_of(page) != corrected)
    page.keyboard.press("Enter")
    until(lambda: app.annotations() != after)
    page.keyboard.press("z")
    until(lambda: app.annotations() == after)
    page.keyboard.press("r")
    until(lambda: not path_of(page))


# Videos ----------------------------------------------------------------------------------------

FRAMES = 8


@pytest.fixture
def clip(tmp_path: Path) -> Any:
    """A clip whose file, clip.avi, and a large photo are in the folder of the app."""
    clip = make_video_dataset("clips", split="test", length=1, frames=FRAMES, size=256)[0]
    (tmp_path / "photos").mkdir()
    path = tmp_path / "photos" / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12, (256, 256))
    for frame in range(FRAMES):
        writer.write(np.ascontiguousarray(clip.image(frame)[..., ::-1]))
    writer.release()
    large = cv2.resize(clip.image(0), (2000, 2000))
    cv2.imwrite(str(tmp_path / "photos" / "large.jpg"), large[..., ::-1])
    return clip


@pytest.fixture
def video_app(clip: Any, tmp_path: Path, start_script: Callable[..., Any]) -> Iterator[App]:
    app = App(tmp_path / "photos", start_script, "--backbone", "micro")
    app.start()
    yield app
    app.kill()


def frame_of(page: Any) -> str:
    return page.inner_text("[data-testid=frame]")


def choose(page: Any, queue: str) -> None:
    """Take another queue."""
    page.locator(".sg-bar button", has_text="Images").or_(
        page.locator(".sg-bar button", has_text="Videos")
    ).first.click()
    page.locator(".q-menu .q-item", has_text=queue).click()


def test_videos(video_app: App, open_tab: Callable[..., Any], clip: Any, tmp_path: Path) -> None:
    page = open_tab(video_app.url)
    truth = [clip.annotation(frame).masks for frame in range(FRAMES)]
    # The thickest object: SAM takes thin ones apart.
    depths = [[depth(mask).max() for mask in masks] for masks in truth]
    number = int(np.min(depths, axis=0).argmax())
    x, y = middle(truth[0][number])
    file = video_app.out / "videos" / "masklets" / "clip.json"

    # Outlines of a photo that is shown smaller than it is are where its clicks are.
    page.mouse.click(*place(page, 8 * x + 4, 8 * y + 4, 2000))
    until(lambda: path_of(page))
    inside = "at => document.querySelector('[data-testid=mask]').isPointInFill(new DOMPoint(...at))"
    assert page.evaluate(inside, [(x + 0.5) * 2000 / 256, (y + 0.5) * 2000 / 256])
    page.keyboard.press("r")
    until(lambda: not path_of(page))

    # Click an object in the first frame, track it, see it in the last.
    choose(page, "Videos")
    until(lambda: frame_of(page) == f"1 / {FRAMES}")
    # The name comes after the click, letter by letter.
    page.mouse.click(*place(page, x, y))
    first = until(lambda: path_of(page))
    page.keyboard.press("t")
    page.keyboard.type("thing")
    page.keyboard.press("Enter")
    until(lambda: "thing 1" in page.inner_text(".sg-item"))
    assert page.evaluate(inside, [x + 0.5, y + 0.5])
    until(lambda: file.exists() and len(json.loads(file.read_text())["annotations"]) == 1)
    page.keyboard.press("f")
    page.wait_for_selector("text=Tracking")
    page.keyboard.press("End")  # the page is usable meanwhile
    until(lambda: frame_of(page) == f"{FRAMES} / {FRAMES}")
    until(lambda: not page.inner_text("[data-testid=progress]"))
    last = until(lambda: path_of(page))
    assert last != first and marks(page) == 0
    shoot(page, "video")
    annotations = json.loads(file.read_text())["annotations"]
    assert len(annotations) > FRAMES // 2

    # A correction changes this frame at once, and the others by another pass.
    page.keyboard.press(",")
    until(lambda: frame_of(page) == f"{FRAMES - 1} / {FRAMES}")
    before = path_of(page)
    page.mouse.click(*place(page, 250, 250), button="right")
    there = middle(truth[-2][number])
    page.mouse.click(*place(page, *there))
    until(lambda: marks(page) == 2)
    corrected = until(lambda: path_of(page))
    assert corrected != before
    page.keyboard.press("f")
    until(lambda: page.inner_text("[data-testid=progress]"))
    until(lambda: not page.inner_text("[data-testid=progress]"))
    assert path_of(page) == corrected
    shoot(page, "correction")

    # A second object, beside the first; undo; a film.
    page.keyboard.press("Enter")
    until(lambda: not path_of(page) and page.locator(".sg-object").count() == 1)
    page.mouse.click(*place(page, 20, 230))
    until(lambda: page.locator(".sg-item").count() == 2)
    page.keyboard.press("z")
    until(lambda: page.locator(".sg-item").count() == 1)
    page.keyboard.press("Home")
    until(lambda: frame_of(page).startswith("1 /"))
    page.keyboard.press("p")
    until(lambda: frame_of(page) == f"{FRAMES} / {FRAMES}")
    page.keyboard.press(",")
    until(lambda: frame_of(page) == f"{FRAMES - 1} / {FRAMES}")

    page.keyboard.press("j")
    until(lambda: path_of(page) == corrected and marks(page) == 2)

    # A reload and a crash lose nothing.
    page.reload(wait_until="commit")
    loaded(page)
    until(lambda: frame_of(page) == f"{FRAMES - 1} / {FRAMES}")
    until(lambda: path_of(page) == corrected and marks(page) == 2)
    video_app.kill()
    video_app.start()
    other = open_tab(video_app.url)
    until(lambda: frame_of(other) == f"{FRAMES - 1} / {FRAMES}")
    assert marks(other) == 0
    other.keyboard.press("j")
    until(lambda: path_of(other) == corrected and marks(other) == 2)

    # The download is COCO; a finished video is a dataset.
    with other.expect_download() as download:
        other.get_by_label("Download the COCO JSON").click()
    target = tmp_path / "download.json"
    download.value.save_as(target)
    coco = COCO(str(target))
    assert all(coco.annToMask(own).any() for own in coco.anns.values())
    masks = {coco.imgs[own["image_id"]]["order_in_video"]: own for own in coco.anns.values()}
    found = coco.annToMask(masks[FRAMES - 2]) > 0
    assert found[there[1], there[0]]
    other.keyboard.press("d")
    path = video_app.out / "videos" / "annotations.json"
    until(path.exists)
    data = make_video_dataset(
        "coco-video", split="all", root=str(path.parent), annotations=str(path)
    )
    assert len(data[0]) == FRAMES and list(data.categories) == ["thing"]


def test_a_video_on_a_phone(
    video_app: App, open_tab: Callable[..., Any], clip: Any, tmp_path: Path
) -> None:
    page = open_tab(video_app.url, 390, 844, has_touch=True, is_mobile=True)
    own = tmp_path / "own.avi"
    own.write_bytes((tmp_path / "photos" / "clip.avi").read_bytes())
    page.set_input_files("input[type=file]", str(own))
    until(lambda: "own.avi" in page.inner_text(".sg-bar"))
    until(lambda: frame_of(page) == f"1 / {FRAMES}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.touchscreen.tap(*place(page, *middle(clip.annotation(0).masks[0])))
    until(lambda: path_of(page))
    page.get_by_role("button", name="Next frame (.)").tap()
    until(lambda: frame_of(page) == f"2 / {FRAMES}")
    until(lambda: not path_of(page))
    page.get_by_role("button", name="Forwards").tap()
    until(lambda: path_of(page))
    shoot(page, "video-phone")
    (kept,) = (video_app.out / "uploads").glob("*/videos/videos/*")
    assert kept.read_bytes() == own.read_bytes()


def test_zoom_in_a_video(video_app: App, open_tab: Callable[..., Any], clip: Any) -> None:
    page = open_tab(video_app.url)
    choose(page, "Videos")
    until(lambda: frame_of(page) == f"1 / {FRAMES}")
    x, y = middle(clip.annotation(0).masks[0])
    page.mouse.move(*place(page, x, y))
    while zoom_of(page) < 4:
        before = zoom_of(page)
        page.mouse.wheel(0, -120)
        until(lambda before=before: zoom_of(page) > before)
    page.mouse.click(*place(page, x, y))
    until(lambda: path_of(page))
    truly_at(page, x, y)
    # It stays while frames change.
    there = place(page, x, y)
    page.keyboard.press(".")
    until(lambda: frame_of(page) == f"2 / {FRAMES}")
    until(lambda: not path_of(page))
    assert place(page, x, y) == there
    page.keyboard.press(",")
    until(lambda: path_of(page))
    truly_at(page, x, y)
    shoot(page, "zoom-video")
