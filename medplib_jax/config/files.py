"""Configuration files on the command line: `--config=PATH.py:ARGUMENT`, or the bare name of one that comes with the
package."""

import hashlib
import importlib
import sys
import types
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

import medplib_jax

PACKAGE = Path(medplib_jax.__file__).parent
OWN_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # of an installed package, of a checkout


def define_config(help_string: str, default: str | None = None) -> flags.FlagHolder:
    """The flags `--config` and `--config.FIELD`; see `load_config`."""
    holder = config_flags.DEFINE_config_file("config", default, help_string=help_string)
    flags.FLAGS["config"].parser = _Parser()
    return holder


class _Parser(flags.ArgumentParser):
    def parse(self, argument: str) -> ConfigDict:
        return load_config(argument)

    def flag_type(self) -> str:
        return "config"


def load_config(spec: str) -> ConfigDict:
    """What `get_config(ARGUMENT)` of a file returns. `spec` is PATH.py or PATH.py:ARGUMENT, taken as it is, or a bare
    NAME in place of the path. The file may import its neighbours relatively.

    ValueError when there is no such file, or when it refuses the argument.
    """
    name, colon, argument = spec.partition(":")
    path = find_config(name)
    package = "config_folder_" + hashlib.sha256(str(path.parent).encode()).hexdigest()[:12]
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(path.parent)]
    module = importlib.import_module(f"{package}.{path.stem}")
    return module.get_config(*([argument] if colon else []))


def find_config(name: str) -> Path:
    """The absolute path of a configuration file. ValueError when there is none."""
    if name.endswith(".py") or "/" in name:
        path = Path(name).absolute()
        if not path.is_file():
            raise ValueError(f"{name}: no such file")
        return path
    known = {path.stem: path for folder in reversed(OWN_FOLDERS) for path in folder.glob("[!_]*.py")}
    if name not in known:
        raise ValueError(f"{name}: expected the path of a file, or one of {', '.join(sorted(known))}")
    return known[name]
