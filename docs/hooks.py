"""What MkDocs adds to the pages of this folder: the READMEs of the repository, the drawing of the architecture and the
reference of the public names from their docstrings.
"""

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

from architecture import draw_house  # noqa: E402

READMES = {  # page: the file that it is
    "index.md": "README.md",
    "data.md": "medplib_jax/datasets/README.md",
    "volumes.md": "medplib_jax/volumes/README.md",
    "pods.md": "launch/README.md",
    "weights.md": "convert/README.md",
    "evaluate.md": "medplib_jax/evaluate/evaluators/README.md",
    "reports.md": "medplib_jax/evaluate/report/README.md",
    "serve.md": "medplib_jax/serve/README.md",
    "performance.md": "medplib_jax/benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
}
PAGES = {file: page for page, file in READMES.items()}
# The modules whose public names people use from their own programs.
PUBLIC = (
    "medplib_jax/decode/predictor.py",
    "medplib_jax/decode/generator.py",
    "medplib_jax/checkpoint.py",
    "medplib_jax/data/sources.py",
    "medplib_jax/data/pipeline.py",
    "medplib_jax/evaluate/own.py",
    "medplib_jax/evaluate/kinds/base.py",
    "medplib_jax/evaluate/sweep.py",
    "medplib_jax/evaluate/rescore.py",
    "medplib_jax/evaluate/compare.py",
    "medplib_jax/evaluate/result.py",
    "medplib_jax/evaluate/report/sweep.py",
    "medplib_jax/evaluate/metrics/summary.py",
    "medplib_jax/evaluate/metrics/resampling.py",
    "medplib_jax/volumes/read.py",
    "medplib_jax/volumes/metrics.py",
    "medplib_jax/models/medplib.py",
    "medplib_jax/models/bird.py",
    "medplib_jax/train/loop.py",
    "medplib_jax/config/experiment.py",
    "medplib_jax/config/sweep.py",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, file in READMES.items():
        text = relink((ROOT / file).read_text(encoding="utf-8"), file)
        files.append(File.generated(config, page, content=text))
    picture = ROOT / "launch/report.png"
    files.append(File.generated(config, "report.png", content=picture.read_bytes()))
    files.append(File.generated(config, "house.svg", content=draw_house(ROOT)))
    files.append(File.generated(config, "api.md", content="\n".join(reference())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the published figures below the page on reproduction."""
    return markdown + "\n".join(published()) if page.file.src_uri == "reproduction.md" else markdown


def published() -> Iterator[str]:
    """The figures of published.json as a section with a table: each with its source and how it was measured."""
    known = json.loads((ROOT / "medplib_jax/evaluate/report/published.json").read_text(encoding="utf-8"))
    yield "\n## The published figures\n\nIn percent, as they stand in `medplib_jax/evaluate/report/published.json`.\n"
    yield "| test set | metric | source | figures |\n|---|---|---|---|"
    for figure in known["figures"]:
        task, source = known["tasks"][figure["task"]], known["sources"][figure["source"]]
        values = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in figure["values"].items())
        yield f"| {task['label']} | {task['metric']} | {source['label']} | {values} |"
    yield "\n| source | from | how |\n|---|---|---|"
    for source in known["sources"].values():
        yield f"| {source['label']} | {source['cite']} | {source['how']} |"
    yield ""


def relink(text: str, file: str) -> str:
    """A README as a page: links to other READMEs lead to their pages, those to other files are their paths."""
    text = text.replace("](launch/report.png)", "](report.png)")

    def link(match: re.Match) -> str:
        name, target, anchor = match.groups()
        if re.match(r"https?:|mailto:", target) or not target:
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(file), target))
        if target == "report.png":
            return match[0]
        page = PAGES.get(path) or (path.removeprefix("docs/") if re.fullmatch(r"docs/\w+\.md", path) else "")
        return f"[{name}]({page}{anchor or ''})" if page else f"{name} (`{path}`)"

    return re.sub(r"(?<!\\)\[([^\]\[]+)\]\(([^)#\s]*)(#[^)\s]*)?\)", link, text)


def reference() -> Iterator[str]:
    """The names of PUBLIC with signature and docstring, as Markdown."""
    yield "# API\n\nWhat programs of your own use. Shapes, dtypes, units and errors stand in the docstrings.\n"
    for file in PUBLIC:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        module = file.removesuffix(".py").replace("/", ".")
        yield f"## {module}\n\n{_text(tree)}\n"
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                yield from _entry(node, "###")


def _entry(node: ast.ClassDef | ast.FunctionDef, level: str) -> Iterator[str]:
    head = f"class {node.name}" if isinstance(node, ast.ClassDef) else f"def {node.name}({ast.unparse(node.args)})"
    if isinstance(node, ast.FunctionDef) and node.returns is not None:
        head += f" -> {ast.unparse(node.returns)}"
    yield f"{level} {node.name}\n\n```python\n{head}\n```\n\n{_text(node)}\n"
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") and ast.get_docstring(inner):
                yield from _entry(inner, level + "#")


def _text(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """A docstring as it was laid out, so that nothing in it is taken for Markdown."""
    text = ast.get_docstring(node) or ""
    return f"```text\n{text}\n```" if text else ""
