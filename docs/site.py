"""A hook of MkDocs (mkdocs.yml): pages that stand beside the code, and reference pages generated from it.

README.md, backends/README.md and kernels/README.md are read where they are; their links are turned to the site's pages.
The two reference pages are written from the verbs' help and from the recipe's models, so that they cannot go stale.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from weftrain.cli import reference

ROOT = Path(__file__).parent.parent
BESIDE_THE_CODE = {
    "README.md": "index.md",
    "backends/README.md": "write-a-backend.md",
    "kernels/README.md": "kernels.md",
}
_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]+)?(\))")


def page_for(source: str, link: str) -> str:
    """The site's page for a link in the file `source` (paths from the repository's root): '../kernels/README.md' in
    'docs/add-an-op.md' -> 'kernels.md'. Raises ValueError for a file that is no page of the site.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if path in BESIDE_THE_CODE:
        return BESIDE_THE_CODE[path]
    folder, _, name = path.rpartition("/")
    if folder != "docs" or not (ROOT / path).exists():
        raise ValueError(f"{source}: the link to {link} leads to no page of the site")
    return name


def with_site_links(source: str, text: str) -> str:
    """A page's text with its links to files turned to pages of the site. Raises ValueError."""
    return _LINK.sub(lambda m: f"{m[1]}{page_for(source, m[2])}{m[3] or ''}{m[4]}", text)


def on_files(files: Files, config: Any) -> Files:
    generated = {page: with_site_links(source, (ROOT / source).read_text()) for source, page in BESIDE_THE_CODE.items()}
    generated["reference-verbs.md"] = reference.verbs_page()
    generated["reference-recipe.md"] = reference.recipe_page()
    generated["reference-backends.md"] = reference.backend_options_page()
    for page, text in generated.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri
    beside = source in BESIDE_THE_CODE.values() or source.startswith("reference-")
    return markdown if beside else with_site_links(f"docs/{source}", markdown)
