"""In a checkout `convert` and `configs` lie beside `medplib_jax`; they are installed inside of it."""

from setuptools import find_packages, setup

BESIDE = {f"medplib_jax.{name}": name for name in ("convert", "configs")}

setup(packages=[*find_packages(include=["medplib_jax*"]), *BESIDE], package_dir=BESIDE)
