"""SPICE and METEOR 1.5 without Java: a `java` that answers like the programs, and the part of pycocoevalcap that starts
SPICE, reduced to what crosses the process boundary.
"""

import contextlib
import json
import os
import sys

import pytest

PACKAGE = """
import json, subprocess, tempfile

class Spice:
    def compute_score(self, gts, res):
        ids = sorted(gts)
        with tempfile.TemporaryDirectory() as folder:
            asked, answered = f"{folder}/in.json", f"{folder}/out.json"
            with open(asked, "w") as file:
                json.dump([{"image_id": i, "test": res[i][0], "refs": gts[i]} for i in ids], file)
            command = ["java", "-jar", "-Xmx8G", "spice-1.0.jar", asked, "-out", answered, "-subset", "-silent"]
            subprocess.check_call(command)
            with open(answered) as file:
                found = {item["image_id"]: item["scores"] for item in json.load(file)}
        return sum(found[i]["All"]["f"] for i in ids) / len(ids), [found[i] for i in ids]
"""
JAVA = f"""#!{sys.executable}
import json, sys
sys.path.insert(0, {os.getcwd()!r})
from tests.evaluate.evaluators.fake_spice import meteor, score
if "meteor-1.5.jar" in sys.argv:
    for line in sys.stdin:
        print(*meteor(*line.split("|||")[1:]))
    sys.exit()
asked = json.load(open(sys.argv[4]))
with open(sys.argv[0] + ".calls", "a") as file:
    file.write(json.dumps(asked) + "\\n")
scores = [
    {{"image_id": item["image_id"], "scores": {{"All": {{"f": score(item["test"], *item["refs"])}}}}}}
    for item in asked
]
json.dump(scores, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


def score(answer: str, truth: str) -> float:
    """A stand-in for SPICE that tells pairs apart."""
    return round(len(truth) / (1 + len(answer) + len(truth)), 6)


def meteor(truth: str, answer: str) -> list[float]:
    """METEOR's counts of a pair, as if each word that both have were a match by form, in one chunk."""
    words, true = answer.split(), truth.split()
    shared = len(set(words) & set(true))
    return [len(words), len(true), 0, 0, shared, shared, *[0] * 14, min(1, shared), shared, shared]


@contextlib.contextmanager
def installed(folder):
    """Within, both are found first, in folders below this one; yields a function that returns what `java` was asked so
    far.
    """
    java, package = folder / "bin" / "java", folder / "packages" / "pycocoevalcap" / "spice"
    for path, text in (
        (java, JAVA),
        (package.parent / "__init__.py", ""),
        (package / "__init__.py", ""),
        (package / "spice.py", PACKAGE),
        (package.with_name("meteor") / "__init__.py", ""),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    java.chmod(0o755)
    calls = java.with_name("java.calls")
    with pytest.MonkeyPatch.context() as patch:
        forget()
        patch.syspath_prepend(package.parents[1])
        patch.setenv("PATH", str(java.parent), prepend=os.pathsep)
        yield lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    forget()
    java.unlink()


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]:
        del sys.modules[name]
