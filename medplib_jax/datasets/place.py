"""Files of a source below a new dataset's root: safe names, and links in place of copies where the disk allows."""

import os
import re
import shutil

_UNSAFE = re.compile(r"[^\w.+()'%=,-]+")


def safe_name(name: str) -> str:
    """One file name without folders, white space, or signs that have a meaning in annotation files."""
    return _UNSAFE.sub("-", re.sub(r"\s+", "_", name.strip().replace("/", "--"))).lstrip(".-") or "unnamed"


def place(source: str, root: str, reference: str) -> None:
    """Makes the file `source` the file `reference` below `root`: a hard link, or a copy on another disk. One already there is left."""
    target = os.path.join(root, reference)
    if os.path.exists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        partial = f"{target}.{os.getpid()}.tmp"
        shutil.copyfile(source, partial)
        os.replace(partial, target)


def write_bytes(content: bytes, root: str, reference: str) -> None:
    """Writes the whole file `reference` below `root` or none of it. One already there is left."""
    target = os.path.join(root, reference)
    if os.path.exists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.{os.getpid()}.tmp"
    with open(partial, "wb") as file:
        file.write(content)
    os.replace(partial, target)
