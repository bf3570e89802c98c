"""The wheel is the whole program: everything imports, trains, converts and evaluates from it in an empty folder."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT

SOURCES = ("medplib_jax", "convert", "configs", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
IMPORT_ALL = """
import importlib, pkgutil, medplib_jax
names = [module.name for module in pkgutil.walk_packages(medplib_jax.__path__, "medplib_jax.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names), medplib_jax.__file__)
"""


def copy_sources(copy: Path) -> None:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, copy / name)


def make_wheel(source: Path, dist: Path) -> Path:
    """pip asks no index."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(dist)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    copy_sources(copy)
    return make_wheel(copy, tmp_path_factory.mktemp("dist"))


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def version_of(folder: Path) -> str:
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=folder, capture_output=True, text=True)
    return done.stdout.split()[-1]


def test_tags_give_the_version(tmp_path):
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    assert version_of(tmp_path) == "0+unknown"
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    assert re.fullmatch(r"0\+g[0-9a-f]{7,}", version_of(tmp_path))
    git(tmp_path, "tag", "v1.2.3")
    git(tmp_path, "tag", "other")
    assert version_of(tmp_path) == "1.2.3"
    git(tmp_path, "commit", "--allow-empty", "-m", "two")
    assert re.fullmatch(r"1\.2\.3\.post1\+g[0-9a-f]{7,}", version_of(tmp_path))


@pytest.mark.slow
def test_the_sdist_of_a_tag_makes_the_same_wheel(wheel, tmp_path):
    source, dist, unpacked = tmp_path / "source", tmp_path / "dist", tmp_path / "unpacked"
    source.mkdir()
    copy_sources(source)
    git(source, "init")
    git(source, "add", ".")
    git(source, "commit", "-m", "one")
    git(source, "tag", "v1.2.3")
    build = [sys.executable, "-c", f"import setuptools.build_meta as build; build.build_sdist({str(dist)!r})"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    shutil.unpack_archive(dist / "medplib_jax-1.2.3.tar.gz", unpacked, filter="data")
    made = make_wheel(unpacked / "medplib_jax-1.2.3", dist)
    assert made.name == "medplib_jax-1.2.3-py3-none-any.whl"
    names = [{name for name in zipfile.ZipFile(one).namelist() if ".dist-info/" not in name} for one in (made, wheel)]
    assert names[0] == names[1]


def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        f"medplib_jax/{path.relative_to(ROOT if folder != 'medplib_jax' else ROOT / folder)}"
        for folder in ("medplib_jax", "convert", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".html", ".json", ".css", ".js", ".typed") and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == expected
    assert {"medplib_jax/py.typed", "medplib_jax/convert/from_torch.py", "medplib_jax/configs/common.py"} <= expected


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`run(*arguments)` of a Python that has the wheel and the packages of this one, in an empty folder."""
    place = tmp_path_factory.mktemp("installed")
    env, empty = place / "env", place / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    site = next(env.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device

    def run(*arguments, cwd: Path = empty, statuses: tuple[int, ...] = (0,)) -> str:
        command = [str(env / "bin" / "python"), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
        assert done.returncode in statuses and "Traceback" not in done.stderr, f"{arguments}: {done.stderr[-3000:]}"
        return done.stdout

    run.site, run.empty = site, empty
    return run


@pytest.mark.slow
def test_every_module_imports(installed):
    count, place = installed("-c", IMPORT_ALL).split()[-2:]
    assert int(count) > 100 and Path(place).is_relative_to(installed.site)


@pytest.mark.slow
def test_trains_converts_and_evaluates_in_an_empty_folder(installed):
    installed("-m", "medplib_jax.datasets.phantom", "--out", "data/phantom", "--examples", 16, "--test-examples", 4)
    sources = sorted((installed.empty / "data/phantom/train").glob("*.json"))
    installed("-m", "medplib_jax.datasets.train_tokenizer", "--sources", *sources, "--out", "data/phantom/tokenizer")
    small = ("--config.train.steps=2", "--config.data.batch_size=2", "--config.data.workers=0")
    installed("-m", "medplib_jax.train", "--config=stage1_align:tiny", "--workdir=runs/one", *small)
    installed("-m", "medplib_jax.convert.to_torch", "--checkpoint", "runs/one", "--out", "torch")
    asked = ("--config.checkpoints=torch", "--config.limit=2", "--config.max_new_tokens=2")
    printed = installed(
        "-m", "medplib_jax.evaluate", "--config=eval_folder:data/phantom", "--workdir=runs/eval", *asked
    )
    assert "protocol exact: 2 records, 0 skipped" in printed


@pytest.mark.slow
def test_commands_say_their_help_from_inside_of_the_package(installed):
    package = installed.site / "medplib_jax"
    mains = [*package.rglob("__main__.py"), package / "predict.py"]
    assert len(mains) >= 5
    for file in mains:
        assert "--" in installed(file.name, "--help", cwd=file.parent, statuses=(0, 1))  # absl ends its help with 1
    for name in ("from_torch", "to_torch", "check", "benchmark"):
        assert "--" in installed("-m", f"medplib_jax.convert.{name}", "--help", cwd=package)
