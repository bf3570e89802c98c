"""Folders on the Hugging Face hub, named like paths: hf://OWNER/NAME@REVISION."""

import argparse
import os
import pathlib
import re

SCHEME = "hf://"
_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)@([\w./-]+?)/?")
# Other frameworks' copies of the same weights.
_IGNORED = ("*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot")


def local(path: str | os.PathLike) -> str:
    """The path itself, or of `hf://OWNER/NAME@REVISION` the folder of that repository below the hub's cache, which is
    filled once.

    REVISION is a commit, a tag or a branch; without it nothing says what was loaded, and it is refused. ValueError for
    another form; FileNotFoundError for a repository or revision that cannot be had, also for want of a network.
    """
    name = os.fspath(path)
    if not name.startswith(SCHEME):
        return name
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: expected hf://OWNER/NAME@REVISION, where REVISION is a commit, tag or branch")
    import huggingface_hub  # slow to import, and rarely needed

    try:
        return huggingface_hub.snapshot_download(match[1], revision=match[2], ignore_patterns=list(_IGNORED))
    except Exception as error:  # what httpx and the hub raise
        raise FileNotFoundError(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:500]}") from error


def argument(text: str) -> pathlib.Path:
    """`local` as the type of a command line's argument."""
    try:
        return pathlib.Path(local(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
