"""The generated pages of the site, by path."""

from __future__ import annotations

from collections.abc import Callable

import api_pages
import command_pages
import cost_pages
import environment_pages
import message_pages
from links import ROOT, SHOWN, relink

from sam_gym import ENVIRONMENTS
from sam_gym.backbones.spec import backbone_table
from sam_gym.data import dataset_table, video_dataset_table

MESSAGES = "guides/messages.md"
#: Name of a table -> function that renders it.
TABLES: dict[str, Callable[[], str]] = {
    "backbones": backbone_table,
    "datasets": dataset_table,
    "video datasets": video_dataset_table,
    "costs": cost_pages.costs_table,
}


def sections(nav: str = "") -> dict[str, list[str | dict[str, str]]]:
    """Return the entries of each section that the `nav` of mkdocs.yml, a text, names by "*"."""
    docs = ROOT / "docs"
    written = [path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))]
    tutorials = [uri for uri in written if uri.startswith("tutorials/")]
    commands = [{module: f"commands/{module}.md"} for module in command_pages.commands()]
    return {
        "tutorials": sorted(tutorials, key=lambda uri: not uri.endswith("/index.md")),
        "others": [uri for uri in written if f"{uri!r}" not in nav and uri not in tutorials],
        "environments": ["environments/index.md", *(f"environments/{i}.md" for i in ENVIRONMENTS)],
        "commands": ["commands/index.md", *commands],
        "api": ["api/index.md", *(f"api/{page}.md" for page in api_pages.PAGES)],
        "models": [page for page in SHOWN.values() if page.startswith("models/")],
    }


def generated(repository: str = "") -> dict[str, str]:
    """Return the Markdown of all generated pages; `repository` is its address, or ""."""
    pages = {
        "environments/index.md": environment_pages.environment_index(),
        "commands/index.md": command_pages.command_index(),
        "api/index.md": api_pages.api_index(),
        MESSAGES: message_pages.messages_page(),
    }
    for env_id in ENVIRONMENTS:
        pages[f"environments/{env_id}.md"] = environment_pages.environment_page(env_id)
    for module in command_pages.commands():
        pages[f"commands/{module}.md"] = command_pages.command_page(module)
    for page in api_pages.PAGES:
        pages[f"api/{page}.md"] = api_pages.api_page(page)
    for source, page in SHOWN.items():
        pages[page] = relink((ROOT / source).read_text(), source, page, repository)
    return pages


def filled(text: str, page: str, repository: str = "") -> str:
    """Return a page of docs/ with its tables (`<!-- table: NAME -->`) and links out of docs/."""
    text = relink(text, f"docs/{page}", page, repository)
    for name, render in TABLES.items():
        marker = f"<!-- table: {name} -->"
        if marker in text:
            text = text.replace(marker, relink(render(), "README.md", page, repository))
    return text
