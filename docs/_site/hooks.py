"""MkDocs hooks: add the generated pages when the site is built.

MkDocs loads this file by its path, so it imports its neighbours as top-level modules.
"""

from __future__ import annotations

from typing import Any

import pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the sections of `nav` that have no pages in mkdocs.yml."""
    config.nav = _expanded(config.nav, pages.sections(str(config.nav)))
    return config


def _expanded(nav: Any, sections: dict[str, list[Any]]) -> Any:
    if isinstance(nav, list):
        items = [_expanded(own, sections) for own in nav]
        flat = [each for own in items for each in (own if isinstance(own, list) else [own])]
        return [item for item in flat if item]
    if isinstance(nav, dict):
        items = {title: _expanded(own, sections) for title, own in nav.items()}
        return {title: own for title, own in items.items() if own}
    return sections[nav[1:]] if nav.startswith("*") else nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for uri, text in pages.generated(config.repo_url or "").items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in tables and mend links of the pages in docs/."""
    del files
    if page.file.generated_by is not None:
        return markdown
    return pages.filled(markdown, page.file.src_uri, config.repo_url or "")
