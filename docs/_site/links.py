"""Links of Markdown files of the repository, as pages of the site."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

ROOT = Path(__file__).parents[2]

#: File of the repository -> page of the site that shows it.
SHOWN = {
    "CHANGELOG.md": "changelog.md",
    "sam_gym/backbones/micro/weights/README.md": "models/micro.md",
    "sam_gym/backbones/micro/weights/micro-v0.md": "models/micro-v0.md",
    "sam_gym/backbones/video/weights/README.md": "models/micro_video.md",
    "agents/weights/clip_micro/README.md": "models/clip_micro.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\((?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def relink(
    text: str, source: str, page: str, repository: str = "", shown: Mapping[str, str] = SHOWN
) -> str:
    """Point the relative links of a Markdown text to pages of the site.

    A link to another file of the repository leads to `repository`; without one, its text is kept.

    Args:
        text: Markdown.
        source: file that it comes from, relative to the repository.
        page: page of the site that it becomes, such as "models/micro.md".
        repository: address of the repository, or "".
        shown: file of the repository -> page of the site; files of docs/ are pages anyway.
    """

    def link(match: re.Match[str]) -> str:
        label, path, anchor = match[1], match[2], match[3] or ""
        target = normpath(PurePosixPath(source).parent / path)
        inside = shown.get(target) or (target[5:] if target.startswith("docs/") else None)
        if inside is not None:
            return f"[{label}]({relpath(inside, PurePosixPath(page).parent)}{anchor})"
        if not (ROOT / target).exists():
            return match[0]  # the strict build reports it
        return f"[{label}]({repository.rstrip('/')}/blob/main/{target})" if repository else label

    fences = _FENCE.findall(text)
    parts = [_LINK.sub(link, part) for part in _FENCE.split(text)]
    return "".join(a + b for a, b in zip(parts, [*fences, ""], strict=True))
