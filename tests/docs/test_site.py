"""The documentation site: its pages say what is there, and its commands and snippets work."""

import importlib.util
import pkgutil
import re
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import sam_gym
from sam_gym import ENVIRONMENTS
from sam_gym.backbones import BACKBONES
from sam_gym.utils.registry import load_entry_point

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Pages in docs/ -> their text.
PAGES = {
    str(path.relative_to(DOCS)): path.read_text()
    for path in sorted(DOCS.rglob("*.md"))
    if "_site" not in path.parts
}
#: Pages whose Python runs from top to bottom within seconds, and prints what they say.
RUN = ("getting_started.md", "guides/own_data.md", "guides/extending.md")
_FENCE = re.compile(r"^```(\w*)\n(.*?)\n```$", re.DOTALL | re.MULTILINE)


def module(name: str) -> Any:
    return importlib.import_module(name)


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    text = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_every_environment_has_a_page(env_id: str) -> None:
    page = module("environment_pages").environment_page(env_id)
    for title in ("Action Space", "Observation Space", "Rewards", "Starting State", "Episode End"):
        assert re.search(rf"^## {title}\n\n\S", page, re.MULTILINE), title
    assert "* v0: initial version." in page.partition("## Version History\n")[2]
    arguments = page.partition("## Arguments\n")[2].partition("\n## ")[0]
    config = load_entry_point(ENVIRONMENTS[env_id][0]).config_class
    rows = dict(re.findall(r"^\| `(\w+)` \| .+ \| `(.+)` \| \S.+ \|$", arguments, re.MULTILINE))
    assert set(rows) == {"render_mode", *(each.name for each in fields(config))}
    assert rows["obs"] == "'full'" and rows["grid"] == str(config().grid)
    assert re.search(r"^\| `image` \| Box \| \(384, 384, 3\) \| uint8 \|", page, re.MULTILINE)
    assert re.search(r"^\| `handle` \| Box \| \(1,\) \| int32 \|", page, re.MULTILINE)
    picture = DOCS / "assets" / "environments" / f"{env_id}.gif"
    assert picture.stat().st_size < 700_000 and f"{env_id}.gif" in page


def test_rows_of_a_docstring_table_are_joined() -> None:
    page = module("environment_pages").environment_page("SamVideo-v0")
    assert "other masks, before any click: predicted IoU, and IoU with the mask that was" in page


def test_costs_of_a_sam() -> None:
    # 0.97 TFLOP, and an embedding of 256 x 64 x 64.
    row = module("cost_pages").cost_row(BACKBONES.get("vit_b"))
    assert row == "| `vit_b` | 93.7 M | 358 MiB | 972 GFLOP | 4 MiB | 256 |"


def test_paths_that_files_name_exist() -> None:
    """In pages, docstrings, comments and messages; NAME stands for any name."""
    folders = ("docs", "agents", "sam_gym", "adaptation", "benchmarks", "examples", "findings")
    suffixes = (".md", ".py", ".yml", ".yaml", ".sh", ".js", ".css")
    path = re.compile(
        rf"(?<![\w/.-])(?:{'|'.join(folders)})/[\w./-]+\.(?:md|py|yml|yaml|sh|json)\b"
    )
    files = [own for name in folders for own in (ROOT / name).rglob("*") if own.suffix in suffixes]
    named = {
        (found, own.relative_to(ROOT))
        for own in [*files, *ROOT.glob("*.md")]
        for found in path.findall(own.read_text())
        if "NAME" not in found
    }
    assert len(named) > 50
    missing = [f"{own}: {found}" for found, own in named if not (ROOT / found).exists()]
    assert not missing, missing


def test_every_public_name_is_in_the_reference() -> None:
    api = module("api_pages")
    listed = [name for _, names in api.PAGES.values() for name in names]
    assert set(sam_gym.__all__) - {"ENVIRONMENTS", "__version__"} <= set(listed)
    for name in listed:
        assert pkgutil.resolve_name(api.path_of(name)).__doc__, name


def test_commands_print_their_help() -> None:
    pages = module("command_pages")
    assert {"agents.train_ppo", "adaptation.train", "benchmarks.run"} <= set(pages.commands())
    assert set(pages.VARIANTS) <= set(pages.commands())
    text = pages.help_text("agents.hub", "push", width=70)
    assert text.startswith("usage: python -m agents.hub push") and "--card-only" in text
    assert max(map(len, text.splitlines())) <= 70 and "\x1b" not in text


def test_commands_and_options_of_the_pages_exist() -> None:
    pages = module("command_pages")
    known = pages.commands()
    sources = [
        path.read_text()
        for package in ("sam_gym", "agents", "adaptation", "benchmarks", "examples")
        for path in (ROOT / package).rglob("*.py")
    ]
    names = {name for text in sources for name in re.findall(r"\b(\w+): ", text)}
    literal = {name for text in sources for name in re.findall(r"--[a-z][\w-]*", text)}
    count = 0
    for page, text in PAGES.items():
        commands = re.findall(r"python -m ([\w.]+)([^`\n]*)", text.replace("\\\n", " "))
        for command, rest in commands:
            if command.partition(".")[0] not in pages.PACKAGES:
                continue
            assert command in known, f"{page}: {command}"
            words = [word.rstrip(".,:;)") for word in rest.split()]
            for word in (own.partition("=")[0] for own in words if own.startswith("--")):
                name = word.removeprefix("--").rpartition(".")[2].replace("-", "_")
                known_name = name.removeprefix("no_") in names or word in literal
                assert known_name, f"{page}: {command} {word}"
        count += len(commands)
    assert count > 50


def test_quoted_messages_are_those_of_the_code() -> None:
    messages = module("message_pages").messages()
    assert len(messages) > 500
    page = PAGES["guides/troubleshooting.md"]
    quoted = [text for _, text in _FENCE.findall(page)]
    quoted += re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 25
    for text in quoted:
        assert any(message.matches(text) for message in messages), text
    assert not any(message.matches("This message stands nowhere.") for message in messages)


# The pieces of scripts in tutorials are compared with the scripts, see tests/test_examples.py.
@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("tutorials/")])
def test_python_compiles(page: str) -> None:
    for language, code in _FENCE.findall(PAGES[page]):
        if language == "python":
            compile(code, page, "exec")


@pytest.mark.parametrize("page", RUN)
def test_python_prints_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_script: Callable[..., Any]
) -> None:
    blocks = _FENCE.findall(PAGES[page])
    code = [text for language, text in blocks if language == "python"]
    expected = [
        text
        for (before, _), (language, text) in pairwise(blocks)
        if before == "python" and language == "text" and not text.startswith("python ")
    ]
    (tmp_path / "snippet.py").write_text("\n".join(code))
    monkeypatch.chdir(tmp_path)
    result = start_script(str(tmp_path / "snippet.py")).finish(120)
    assert result.returncode == 0, result.stderr
    assert expected and result.stdout.strip() == "\n".join(expected)


def test_links_lead_to_pages_and_headings() -> None:
    pages, relink = module("pages"), module("links").relink
    entries = [entry for section in pages.sections().values() for entry in section]
    named = [uri for entry in entries if isinstance(entry, dict) for uri in entry.values()]
    generated = {pages.MESSAGES, "changelog.md", *named}
    generated |= {entry for entry in entries if isinstance(entry, str)}
    count = 0
    for page, text in PAGES.items():
        prose = re.sub(r"`[^`\n]*`", "code", _FENCE.sub("", relink(text, f"docs/{page}", page)))
        for path, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", prose):
            target = (DOCS / page).parent.joinpath(path).resolve() if path else DOCS / page
            uri = str(target.relative_to(DOCS))
            assert target.exists() or uri in generated, f"{page}: {path}"
            if anchor and uri in PAGES:
                headings = re.findall(r"^#+ (.+)$", PAGES[uri], re.MULTILINE)
                assert anchor in map(slug, headings), f"{page}: {path}#{anchor}"
            count += 1
    assert count > 60


def test_links_of_files_elsewhere_in_the_repository() -> None:
    links = module("links")
    text = "[a](README.md) [b](../../video/weights/README.md#x) [c](../model.py) [d](https://e.f)"
    source = "sam_gym/backbones/micro/weights/micro-v0.md"
    assert links.relink(text, source, "models/micro-v0.md") == (
        "[a](micro.md) [b](micro_video.md#x) c [d](https://e.f)"
    )
    on_web = links.relink("[c](../model.py)", source, "models/micro-v0.md", "https://g.h/i")
    assert on_web == "[c](https://g.h/i/blob/main/sam_gym/backbones/micro/model.py)"
    fenced = "```\n[c](../model.py)\n```"
    assert links.relink(fenced, source, "models/micro-v0.md") == fenced
    assert links.relink("[a](../docs/app.md)", "examples/x.md", "x.md") == "[a](app.md)"


def test_the_site_needs_no_other_host() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in config and "social" not in config
    assert not re.search(r"https?://", config)
