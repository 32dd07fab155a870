"""MkDocs hooks: pages that are generated when the site is built.

MkDocs loads this file by its path, so it imports its neighbours as top-level modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import api_pages
import command_pages
import environment_pages
import message_pages
from links import ROOT, SHOWN, relink
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from sam_gym import ENVIRONMENTS
from sam_gym.utils.docs import TABLES

#: Section in `nav`, after "*" -> pages, index first.
SECTIONS = {
    "environments": ["environments/index.md", *(f"environments/{own}.md" for own in ENVIRONMENTS)],
    "commands": [
        "commands/index.md",
        *(f"commands/{own}.md" for own in command_pages.commands()),
    ],
    "api": ["api/index.md", *(f"api/{own}.md" for own in api_pages.PAGES)],
    "models": [page for page in SHOWN.values() if page.startswith("models/")],
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the sections of `nav` that have no pages in mkdocs.yml."""
    folder = Path(config.docs_dir)
    tutorials = [
        str(path.relative_to(folder)) for path in sorted((folder / "tutorials").glob("*.md"))
    ]
    config.nav = _expanded(config.nav, SECTIONS | {"tutorials": tutorials})
    return config


def _expanded(nav: Any, sections: dict[str, list[str]]) -> Any:
    if isinstance(nav, list):
        items = [_expanded(item, sections) for item in nav]
        return [item for item in items if item]
    if isinstance(nav, dict):
        items = {title: _expanded(own, sections) for title, own in nav.items()}
        return {title: own for title, own in items.items() if own}
    return sections[nav[1:]] if nav.startswith("*") else nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    repository = config.repo_url or ""
    pages = {
        "environments/index.md": environment_pages.environment_index(),
        "commands/index.md": command_pages.command_index(),
        "api/index.md": api_pages.api_index(),
        "guides/messages.md": message_pages.messages_page(),
    }
    for env_id in ENVIRONMENTS:
        pages[f"environments/{env_id}.md"] = environment_pages.environment_page(env_id)
    for module in command_pages.commands():
        pages[f"commands/{module}.md"] = command_pages.command_page(module)
    for page in api_pages.PAGES:
        pages[f"api/{page}.md"] = api_pages.api_page(page)
    for source, page in SHOWN.items():
        pages[page] = relink((ROOT / source).read_text(), source, page, repository)
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in generated tables (`<!-- table: backbones -->`) and mend links out of docs/."""
    uri = page.file.src_uri
    if page.file.generated_by is None:
        markdown = relink(markdown, f"docs/{uri}", uri, config.repo_url or "")
    for name, render in TABLES.items():
        marker = f"<!-- table: {name} -->"
        if marker in markdown:
            table = relink(render(), "README.md", uri, config.repo_url or "")
            markdown = markdown.replace(marker, table)
    return markdown
