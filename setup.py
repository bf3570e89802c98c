"""In a checkout `convert` and `configs` lie beside `medplib_jax`; installed they are inside it. Tags are versions."""

import re
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

BESIDE = {f"medplib_jax.{name}": name for name in ("convert", "configs")}
ROOT = Path(__file__).resolve().parent


def version() -> str:
    """1.2.3 at the tag v1.2.3, 1.2.3.post4+gHASH four commits later; of an unpacked sdist what its PKG-INFO says.

    0+unknown where neither is there, 0+gHASH before the first tag.
    """
    if (ROOT / "PKG-INFO").exists():
        return re.search(r"^Version: (.+)$", (ROOT / "PKG-INFO").read_text(encoding="utf-8"), re.M)[1]
    if not (ROOT / ".git").exists():  # a copy, perhaps within another repository
        return "0+unknown"
    command = ["git", "-C", str(ROOT), "describe", "--tags", "--long", "--always", "--match", "v[0-9]*"]
    try:
        described = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "0+unknown"
    found = re.fullmatch(r"v([\d.]+)-(\d+)-(g\w+)", described)
    if found is None:
        return f"0+g{described}"
    tag, commits, commit = found.groups()
    return tag if commits == "0" else f"{tag}.post{commits}+{commit}"


setup(version=version(), packages=[*find_packages(include=["medplib_jax*"]), *BESIDE], package_dir=BESIDE)
