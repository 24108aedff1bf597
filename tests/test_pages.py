"""The pages: links lead somewhere, and the README's snippets run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "scripts/studies/README.md"])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page):
    """Of the headings, as they are addressed: lower case, hyphens for spaces, no other signs."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", without_code(page.read_text(encoding="utf-8"))):
        link = "".join(target)
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name} links to {link}, but there is no such heading"


def test_every_page_is_linked():
    linked = set(re.findall(r"\]\(docs/([^)#]+)", README))
    of_docs = {page.name for page in (ROOT / "docs").glob("*.md")}
    more = {
        target
        for name in linked & of_docs
        for target in re.findall(r"\]\(([\w-]+\.md)", (ROOT / "docs" / name).read_text(encoding="utf-8"))
    }
    assert of_docs <= linked | more


def test_the_front_door_is_short():
    assert len(README.split()) <= 1300


@pytest.mark.slow
def test_the_snippets_of_the_readme_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 3
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert 0 < names["layers"]["encoder.0"].density.mean() < 1
    assert names["outputs"].boxes.shape == (1, 20, 4)
    assert set(names["found"].names) <= set(names["detector"].labels)
