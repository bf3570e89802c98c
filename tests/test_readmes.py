"""Commands of the READMEs name programs, flags and fields that are there; those of README.md run as written."""

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.demo import Demo, make_tokenizer
from launch.demo_bird import MODALITIES, BirdDemo
from launch.demo_bird import make_tokenizer as make_bird_tokenizer
from medplib_jax import checkpoint
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.datasets.phantom import generate as phantom
from medplib_jax.datasets.phantom import grit
from medplib_jax.models.layers import draw_params
from medplib_jax.train.state import TrainState
from medplib_jax.train.step import abstract_model
from tests.evaluate.evaluators import tiny
from tests.paths import ROOT
from tests.test_layout import imports_of

READMES = sorted(
    path.relative_to(ROOT)
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("*/README.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("medplib_jax/**/README.md"),
    )
)
# Commands of README.md that run in a folder that the demo has left, {how they begin: what makes them short}.
RUN = {
    "python -m medplib_jax.train --config=configs/stage3_grounding.py:tiny": "--config.train.steps=1",
    "python -m medplib_jax.predict": "--max-new-tokens 4",
    "python -m medplib_jax.evaluate --config=configs/eval_folder.py": "--config.limit=2 --config.max_new_tokens=2",
    "python -m medplib_jax.datasets.audit": "",
    "python -m convert.to_torch": "",
}
# And why others do not.
NOT_RUN = {
    "bash launch/demo.sh": "minutes; tests/launch covers the script, the slow tests the whole",
    "bash launch/test.sh": "runs this",
    "pip install": "changes the environment",
    "python -m medplib_jax.aot": "a minute, and needs libtpu; tests/aot compiles small programs",
    "python -m medplib_jax.evaluate --config=configs/eval_sweep.py": "needs checkpoints and public data",
    "python -m medplib_jax.datasets.write_qa": "needs one's own data; tests/datasets runs it",
    "python -m medplib_jax.datasets.import_dataset": "needs public data; tests/datasets runs it",
    "python -m medplib_jax.datasets.assemble": "needs public data; tests/datasets runs it",
    "python -m convert.from_torch": "needs released weights; tests/convert runs it",
    "python -m convert.check": "needs released weights; tests/convert runs it",
    "python -m medplib_jax.train": "7B, or data of one's own; tests/train/test_main.py runs small ones",
    "python -m medplib_jax.evaluate.rescore": "needs a sweep; tests/evaluate/test_rescore.py runs it",
    "python -m medplib_jax.evaluate.compare": "needs two sweeps; tests/evaluate/test_compare.py runs it",
    "python -m medplib_jax.evaluate.table": "needs a sweep; tests/evaluate/test_table.py runs it",
    "python -m medplib_jax.benchmarks": "minutes; tests/benchmarks runs small ones",
    "python -m medplib_jax.serve": "does not end; tests/serve runs it",
    "python -m medplib_jax.datasets.slices": "needs scans; tests/datasets/test_slices.py runs it",
    "python -m medplib_jax.datasets.sa_med2d": "needs SA-Med2D; tests/datasets/test_sa_med2d.py runs it",
    "python -m medplib_jax.datasets.icl": "needs one's own data; tests/datasets/test_icl.py runs it",
    "python -m medplib_jax.datasets.index": "needs one's own data; tests/datasets/test_index.py runs it",
    "python -m medplib_jax.evaluate --config=configs/eval_icl.py": "7B; tests/evaluate/test_icl.py has a small one",
    "python -m medplib_jax.datasets.retrieve": "needs an index; tests/datasets/test_index.py runs it",
    "python -m convert.quantize": "needs 7B to matter; tests/convert/test_quantize.py runs it",
    "python -m launch.local_multiprocess": "minutes; tests/launch/test_local_multiprocess.py runs it",
    "python -m launch.jobset": "needs a cluster; tests/launch/test_launchers.py reads what it prints",
    "bash launch/queued_resource.sh": "costs money; tests/launch/test_launchers.py replaces gcloud",
    "bash launch/build_image.sh": "needs Docker; tests/launch/test_launchers.py replaces it",
    "bash launch/what_fits.sh": "minutes; it calls medplib_jax.aot, see tests/aot",
    "python -m lmms_eval": "needs the suite; tests/serve/test_suites.py asks by its client",
    "evalscope": "needs the suite; tests/serve/test_suites.py asks by its client",
    "curl": "needs a server; tests/serve asks it the same",
    "python eval.py": "needs MedEvalKit; tests/launch/test_suites.py makes its calls",
    "sbatch": "needs SLURM; tests/launch/test_launchers.py runs the script",
}
PROGRAM = r"\s*(?:[A-Z_]+=\S* )*(python|bash|sbatch|pip|curl|evalscope) "
FOREIGN = ("sbatch", "pip", "curl", "evalscope", "eval.py", "lmms_eval", "pytest", "build")
# The Python of readmes: what runs it, or why it is not run.
SNIPPETS = {
    "README.md": "tests/test_readmes.py",
    "medplib_jax/evaluate/evaluators/README.md": "tests/evaluate/test_rescore.py, tests/evaluate/test_kinds.py",
    "docs/python.md": "tests/docs/test_python.py",
    "medplib_jax/evaluate/report/README.md": "needs pandas; tests/evaluate/test_table.py reads the same file",
    "medplib_jax/serve/README.md": "needs a server; tests/serve/test_chat.py asks one by the same client",
}


def commands(readme: Path) -> list[list[str]]:
    """The words of every command in a readme's blocks: those of ``` and those that are indented."""
    text = (ROOT / readme).read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    blocks = [block for language, block in fenced if language in ("", "bash")]
    blocks += re.findall(r"^    \S.*(?:\n    .*)*", text, re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.match(PROGRAM, line)]
    found = [words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :] for words in found]
    return [words[: words.index("|")] if "|" in words else words for words in found]


def mentioned(readme: Path) -> list[list[str]]:
    """The words of commands inside of sentences and tables."""
    spans = re.findall(r"`((?:python -m|bash launch/)[^`]+)`", (ROOT / readme).read_text())
    return [shlex.split(span) for span in spans]


def split(words: list[str]) -> list[list[str]]:
    """A launcher's words, and those of the command that it starts."""
    at = [i for i in range(1, len(words)) if words[i] == "python" and words[i - 1] in ("--", "launch/slurm.sh")]
    return [words] if not at else [words[: at[0]], words[at[0] :]]


def programs() -> list[list[str]]:
    return [program for readme in READMES for words in commands(readme) + mentioned(readme) for program in split(words)]


@functools.cache
def source(program: str) -> str:
    """What may define a program's flags: its file, and those that it imports."""
    if program.endswith(".sh"):
        return (ROOT / program).read_text() + (ROOT / "launch/common.sh").read_text()
    files = files_of(program) or files_of(program.removeprefix("medplib_jax."))  # as installed
    assert files, f"python -m {program}: there is no such program"
    imported = [path for name in imports_of(files[-1].relative_to(ROOT)) for path in files_of(name.rpartition(".")[0])]
    return "".join(path.read_text() for path in {*files, *imported})


def files_of(module: str) -> list[Path]:
    """A module's file; of a folder the one that runs it."""
    base = ROOT / module.replace(".", "/")
    return [path for path in (base.with_suffix(".py"), base / "__main__.py") if module and path.exists()]


@pytest.mark.parametrize("words", programs(), ids=" ".join)
def test_programs_and_their_flags_are_there(words):
    if not {*words[:3]}.isdisjoint(FOREIGN):
        return  # not ours
    program = words[2] if words[:2] == ["python", "-m"] else words[1]
    text = source(program)
    flags = {word[2:].partition("=")[0] for word in words if word.startswith("--") and word != "--"}
    for flag in flags - {flag for flag in flags if flag.startswith("config.")}:
        known = rf"\b{flag}\b" if program.endswith(".sh") else rf"\"--{flag}\"|DEFINE_\w+\(\s*\"{flag}\""
        assert re.search(known, text), f"{program} has no flag --{flag}"
    check_fields(words)


def check_fields(words: list[str]) -> None:
    """Every --config.FIELD of a command is one of the config that it names, where that needs no folder to be made."""
    for named in [word.removeprefix("--config=") for word in words if word.startswith("--config=configs/")]:
        file, _, argument = named.partition(":")
        if argument in ("", "tiny", "7b"):
            module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            config = module.get_config(argument) if argument else module.get_config()
            for field in re.findall(r"^--config\.([\w.]+)", "\n".join(words), re.M):
                functools.reduce(getattr, field.split("."), config)


@pytest.mark.parametrize("readme", [readme for readme in READMES if readme.parts[0] != "docs"], ids=str)
def test_links_lead_somewhere(readme):
    text = (ROOT / readme).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / readme).parent / path if path else ROOT / readme
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, target


def reason(words: list[str]) -> str:
    """How a command begins in RUN or NOT_RUN, by the longest of these; empty where it is in neither."""
    line = shlex.join(words).replace("'", "")
    return max((start for start in (*RUN, *NOT_RUN) if line.startswith(start)), key=len, default="")


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_command_runs_or_says_why_not(readme):
    unsaid = [shlex.join(words) for words in commands(readme) if not reason(words)]
    assert not unsaid
    assert readme != Path("README.md") or len(commands(readme)) > 15


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_piece_of_python_runs_or_says_why_not(readme):
    pieces = re.findall(r"^```python\n(.*?)^```", (ROOT / readme).read_text(), re.M | re.S)
    for piece in pieces:
        compile(piece, str(readme), "exec")
    assert bool(pieces) == (str(readme) in SNIPPETS)


def test_tests_that_run_what_readmes_name_are_there():
    named = re.findall(r"tests/[\w/]+(?:\.py)?", " ".join([*NOT_RUN.values(), *SNIPPETS.values()]))
    assert len(named) > 15 and not [name for name in named if not (ROOT / name).exists()]


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory) -> Path:
    """A folder as the demo leaves it, with little data and models of random weights."""
    folder = tmp_path_factory.mktemp("fresh")
    for name in ("configs", "convert", "launch", "medplib_jax"):
        (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder):
        demo = Demo(Path("runs/demo"), examples=40, test_examples=4, seed=0)
        phantom.generate(demo.data, demo.examples, demo.test_examples, demo.seed, processes=1)
        with contextlib.redirect_stdout(io.StringIO()):
            make_tokenizer(demo)
        for stage in ("II visual-language", "IV mixture"):
            save(demo.experiment(stage), demo.workdir(stage))
        bird = BirdDemo(Path("runs/demo/bird"), examples=40, seed=0)
        phantom.generate(bird.data, bird.examples, 4, bird.seed, processes=1, modalities=MODALITIES)
        grit.write_grit(bird.data, bird.seed)
        make_bird_tokenizer(bird)
        save(bird.experiments()[bird.model], bird.model)
    return folder


def save(experiment: ExperimentConfig, workdir: Path) -> None:
    params = draw_params(abstract_model(experiment.model), 0)
    state = TrainState(step=np.asarray(1), trainable=params, frozen={}, opt_state={})
    with checkpoint.make_manager(str(workdir), keep=1) as manager:
        checkpoint.save(manager, state, experiment, total_steps=1, loss=1.0)
        manager.wait_until_finished()


def test_the_ten_lines_of_python_run(tmp_path, monkeypatch, capsys):
    """With a smaller model than the demo's."""
    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    phantom.generate("runs/demo/phantom", 1, 2, seed=0, processes=1)
    small = tiny.make_experiment("runs/demo/tokenizer")
    save(
        dataclasses.replace(small, data=dataclasses.replace(small.data, bucket_lengths=(384,))),
        Path("runs/demo/stage_IV"),
    )
    exec(compile(program, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [words for words in commands(Path("README.md")) if reason(words) in RUN], ids=" ".join
)
def test_commands_run_as_written(after_the_demo, words):
    command = [sys.executable, *words[1:], *RUN[reason(words)].split()]
    done = subprocess.run(
        command, cwd=after_the_demo, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
