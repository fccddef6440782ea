"""Hooks of the mkdocs build: the changelog as a page, and links to files outside docs/.

A file of the repository that a page links to is copied into the site as text, so that mkdocs checks the link like any
other and the site is complete by itself.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)")


def on_config(config: Any) -> Any:
    """Add result pages that the navigation does not name after those that it names, sorted by file name."""
    [results] = [section["Results"] for section in config.nav if "Results" in section]
    named = {page for entry in results for page in entry.values()}
    folder = Path(config.docs_dir, "results")
    pages = sorted(f"results/{path.name}" for path in folder.glob("*.md"))
    results += [page for page in pages if page not in named]
    return config


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for page in [file for file in files if file.is_documentation_page()]:
        for _, link in LINK.findall(page.content_string):
            target = _beside(root, Path(config.docs_dir), page.src_uri, link)
            if target is not None and files.get_file_from_path(_copy(target)) is None:
                source = (root / target).read_text(encoding="utf-8")
                files.append(File.generated(config, _copy(target), content=source))
    files.append(File.generated(config, "changelog.md", content=(root / "CHANGELOG.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)

    def redirect(link: re.Match[str]) -> str:
        target = _beside(root, docs, page.file.src_uri, link[2])
        return link[0] if target is None else f"{link[1]}{up}{_copy(target)}"

    return LINK.sub(redirect, markdown)


def _beside(root: Path, docs: Path, page: str, link: str) -> str | None:
    """Return the link's target below the repository if it is a file outside docs/, else None."""
    target = (docs / page).parent.joinpath(link).resolve()
    outside = target.is_relative_to(root) and not target.is_relative_to(docs) and target.is_file()
    return target.relative_to(root).as_posix() if outside else None


def _copy(target: str) -> str:
    return f"source/{target}.txt"
