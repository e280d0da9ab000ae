"""Hooks of mkdocs: README and its neighbours join the site, and links from page to page keep working there."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "overview.md", "GLOSSARY.md": "glossary.md"} | {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages at the root of the repository, and their names on the site."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        text = _relinked((ROOT / name).read_text("utf-8"), PurePosixPath("."))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return markdown if page.file.src_uri in PAGES.values() else _relinked(markdown, PurePosixPath("docs"))


def _relinked(text: str, folder: PurePosixPath) -> str:
    """The text of a page in `folder` of the repository: its links lead to pages of the site or are plain text."""

    def relinked(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        path, hash_sign, place = target.partition("#")
        if "://" in target or not path:
            return link[0]
        path = normpath(folder / path)
        if path in PAGES:
            return f"[{words}]({PAGES[path]}{hash_sign}{place})"
        if path.startswith("docs/"):
            return f"{picture}[{words}]({path.removeprefix('docs/')}{hash_sign}{place})"
        return words  # a file of the repository that is no page

    return _LINK.sub(relinked, text)
