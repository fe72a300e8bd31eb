"""MkDocs hooks that bring the pages outside docs/ into the site: README as its home, CONTRIBUTING, CHANGELOG, examples.

Links between pages are written for the repository, where they are read most. In the site docs/ is the root, so `docs/`
is taken off the links of the pages above it, and `../` off those of the pages in it.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
ASSETS = ("LICENSE", "benchmarks/results/*", "examples/*.py")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the files that pages link to, at the paths that they have in the repository."""
    assets = [path for pattern in ASSETS for path in sorted(ROOT.glob(pattern)) if path.is_file()]
    for path in (*(ROOT / page for page in PAGES), *assets):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links from the repository's layout to the site's."""
    if page.file.src_uri == "examples/README.md":
        return markdown.replace("](../docs/", "](../")
    if page.file.src_uri in PAGES:
        return re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(r"\]\(\.\./", "](", markdown)
