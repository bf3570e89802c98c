"""The script follows the page of a fresh clone in a fresh home, and ends with an error when no mask was drawn."""

import os
import subprocess

import pytest

from tests.launch.test_launchers import fake
from tests.paths import ROOT

PAGE = "# Start\n\n```\nbash launch/demo.sh\nsource .venv/bin/activate\npredict --out answer\n```\n\n```\nexit 7\n```\n"
BARE = 'test -d "$HOME" && test -z "$(ls -A "$HOME")" && test -z "${SECRET:-}"'
DEMO = f"{BARE} && mkdir -p .venv/bin && touch .venv/bin/activate"
PREDICT = "mkdir answer && touch answer/overlay.png answer/mask_0.png"


@pytest.fixture
def follow(tmp_path):
    """`follow(predict)` of a repository with this page, whose programs are replaced; the finished process."""
    source = tmp_path / "source"
    for name in ("docs", "launch"):
        (source / name).mkdir(parents=True)
    (source / "docs/start.md").write_text(PAGE)
    (source / "launch/demo.sh").write_text(DEMO)
    (source / "launch/follow_start.sh").write_text((ROOT / "launch/follow_start.sh").read_text())
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for words in (["init"], ["add", "."], ["commit", "-m", "one"]):
        subprocess.run([*git, *words], cwd=source, check=True, capture_output=True)
    (source / "docs/start.md").write_text("not committed")

    def run(predict: str) -> subprocess.CompletedProcess:
        fake(tmp_path / "bin", "predict", predict)
        environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SECRET": "x"}
        command = ["bash", "launch/follow_start.sh", str(tmp_path / "place")]
        return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)

    return run


def test_the_page_is_followed_to_a_mask(follow):
    done = follow(PREDICT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["answer/mask_0.png", "answer/overlay.png"]


@pytest.mark.parametrize("predict", ["mkdir answer && touch answer/overlay.png", "exit 3"])
def test_no_mask_is_an_error(follow, predict):
    assert follow(predict).returncode != 0
