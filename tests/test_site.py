"""The documentation as a site: links between pages that stand in different folders, and mkdocs.yml's list of pages."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import yaml
from places import ROOT


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "link", "page"),
    [
        ("README.md", "docs/benchmark.md", "benchmark.md"),
        ("README.md", "backends/README.md", "write-a-backend.md"),
        ("docs/add-an-op.md", "../kernels/README.md", "kernels.md"),
        ("kernels/README.md", "../docs/add-an-op.md", "add-an-op.md"),
        ("docs/architecture.md", "architecture.svg", "architecture.svg"),
    ],
)
def test_links_lead_to_pages(site: ModuleType, source: str, link: str, page: str) -> None:
    assert site.page_for(source, link) == page
    assert site.with_site_links(source, f"see [this]({link}#there), and [that]({link})") == (
        f"see [this]({page}#there), and [that]({page})"
    )


@pytest.mark.parametrize("link", ["docs/nothing.md", "core/trainer.py", "../elsewhere.md"])
def test_a_link_that_leads_nowhere_is_an_error(site: ModuleType, link: str) -> None:
    with pytest.raises(ValueError, match="leads to no page"):
        site.page_for("README.md", link)


def test_every_page_is_in_the_navigation(site: ModuleType) -> None:
    """MkDocs warns of the others, which `make docs` makes an error; here it shows without building the site."""
    listed = {
        page
        for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
        for pages in entry.values()
        for page in (pages if isinstance(pages, list) else [pages])
    }
    beside = set(site.BESIDE_THE_CODE.values())
    generated = {page for page in listed if page.startswith("reference-")}
    assert listed - generated - beside == {page.name for page in (ROOT / "docs").glob("*.md")}
    assert len(generated) == 3
