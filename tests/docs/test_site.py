"""The site builds without a warning, its drawing follows the imports, and its commands name what is there."""

import json
import os
import re
import subprocess
import sys

import pytest

from docs import architecture
from tests.paths import ROOT
from tests.test_layout import FLOORS


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; `--strict` makes every warning an error, links and anchors that lead nowhere among them."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_of_the_navigation_is_built_and_needs_no_network(site):
    pages = re.findall(r": (\w+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(pages) >= 17
    for page in pages:
        file = site / "index.html" if page == "index" else site / page / "index.html"
        text = file.read_text()
        assert not re.search(r'(src|href)="(https?:)?//(?!www\.w3)[^"]*\.(js|css|woff2?)"', text), page
        assert "<h1" in text


def test_links_between_pages_lead_somewhere(site):
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for target in re.findall(r'href="([^"#:]*)(?:#[^"]*)?"', page.read_text()):
            path = (page.parent / target).resolve()
            assert not target or path.exists() or (path / "index.html").exists(), (page, target)


def test_links_of_a_readme_are_links_between_pages(site):
    text = (site / "index.html").read_text()
    assert 'href="kaggle/"' in text and 'href="evaluate/#metrics-of-your-own"' in text
    assert re.search(r"LICENSE \(<code>LICENSE</code>\)", text)  # no page: its path


def test_every_published_figure_stands_on_the_page_of_reproduction(site):
    text = (site / "reproduction/index.html").read_text()
    known = json.loads((ROOT / "medplib_jax/evaluate/report/published.json").read_text())
    values = [value for figure in known["figures"] for value in figure["values"].values()]
    assert len(values) > 20 and all(f"{value:g}" in text for value in values)


def test_the_reference_has_the_public_names(site):
    text = (site / "api/index.html").read_text()
    for name in ("Predictor", "load_params", "write_sweep_report", "TaskKind", "SweepConfig", "rescore"):
        assert f'id="{name.lower()}' in text, name


def test_the_drawing_follows_the_imports():
    rooms = architecture.imports(ROOT)
    assert set(FLOORS) <= set(rooms) and "models" in rooms["train"]
    levels = architecture.floors(rooms)
    assert all(levels[other] < levels[room] for room, others in rooms.items() for other in others)
    drawing = architecture.draw_house(ROOT)
    assert all(f">{room}</text>" in drawing for room in rooms)
    with pytest.raises(ValueError, match="imports run in a circle: a -> b -> a"):
        architecture.floors({"a": {"b"}, "b": {"a"}})
    assert architecture.direct({"a": {"b", "c"}, "b": {"c"}, "c": set()})["a"] == {"b"}
