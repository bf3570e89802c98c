"""The shell launchers: what they print in a dry run, and what they do with the programs they call replaced by small
scripts."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import jobset
from tests.paths import ROOT

TRAIN = ["python", "-m", "medplib_jax.train", "--config=configs/stage4_moe.py:7b", "--workdir=/mnt/bucket/a run"]
# The flags that the launchers may use, as `gcloud ... --help` (SDK 528) and `xpk workload create --help` (1.16) list
# them.
GCLOUD = {
    "queued-resources create": {
        "zone",
        "project",
        "accelerator-type",
        "runtime-version",
        "node-id",
        "node-count",
        "node-prefix",
        "spot",
        "scopes",
        "async",
    },
    "queued-resources describe": {"zone", "project", "format"},
    "queued-resources delete": {"zone", "project", "force", "quiet"},
    "tpu-vm ssh": {"zone", "project", "worker", "command"},
    "tpu-vm scp": {"zone", "project", "worker"},
}
XPK = {
    "workload",
    "cluster",
    "tpu-type",
    "num-slices",
    "docker-image",
    "zone",
    "project",
    "max-restarts",
    "restart-on-exit-codes",
    "termination-grace-period-seconds",
    "command",
}


def run(
    script: str, *arguments: str, path: Path | None = None, code: int = 0, **variables: str
) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    result = subprocess.run(
        ["bash", f"launch/{script}", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == code, result.stderr
    return result


def split(line: str) -> tuple[str, list[str], dict[str, str]]:
    """("queued-resources create", positional, flags) of a printed gcloud call."""
    words = shlex.split(line)
    assert words[:3] == ["gcloud", "compute", "tpus"]
    flags = dict(word[2:].partition("=")[::2] for word in words[5:] if word.startswith("--"))
    return " ".join(words[3:5]), [word for word in words[5:] if not word.startswith("--")], flags


def fake(folder: Path, name: str, body: str) -> Path:
    """A program of this name that notes its arguments in `calls` and then does `body`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{folder}/calls"\n{body}\n')
    (folder / name).chmod(0o755)
    return folder


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_dockerfiles_have_no_findings():
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("no hadolint here")
    files = [str(path) for path in sorted((ROOT / "launch").rglob("Dockerfile"))]
    assert len(files) == 2
    done = subprocess.run([hadolint, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_script_is_valid_bash():
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("slices", [1, 2])
def test_a_queued_resource_in_a_dry_run(slices):
    options = [
        "--name",
        "m",
        "--type",
        "v5litepod-64",
        "--zone",
        "us-west4-a",
        "--project",
        "p",
        "--bucket",
        "gs://b",
        "--spot",
    ]
    result = run("queued_resource.sh", "train", *options, "--slices", str(slices), "--dry-run", "--", *TRAIN)
    printed = [split(line) for line in result.stdout.splitlines()]
    for action, _, flags in printed:
        assert set(flags) <= GCLOUD[action] and flags["zone"] == "us-west4-a" and flags["project"] == "p"
    create = printed[0][2]
    assert (
        create["accelerator-type"] == "v5litepod-64"
        and create["runtime-version"] == "v2-alpha-tpuv5-lite"
        and "spot" in create
    )
    assert (create.get("node-id"), create.get("node-count"), create.get("node-prefix")) == (
        ("m", None, None) if slices == 1 else (None, "2", "m")
    )
    order = [action for action, *_ in printed]
    assert (
        order[0] == "queued-resources create"
        and order[1] == "queued-resources describe"
        and order[-1] == "queued-resources delete"
    )
    nodes = {"m"} if slices == 1 else {"m-0", "m-1"}
    training = [
        (positional[0], shlex.split(flags["command"]))
        for action, positional, flags in printed
        if "medplib_jax.train" in flags.get("command", "")
    ]
    assert {node for node, _ in training} == nodes and len(training) == slices
    assert all(words == ["bash", "medplib_jax/launch/on_worker.sh", *TRAIN] for _, words in training)


CLOUD = """
case "$*" in
  *" create "*) echo ACTIVE > {0}/state ;;
  *" describe "*)
    [ ! -e {0}/errors ] || {{ mv {0}/errors {0}/past; echo "ERROR: connection reset" >&2; exit 1; }}
    cat {0}/state 2> /dev/null || {{ echo "ERROR: NOT_FOUND: Resource 'm' was not found" >&2; exit 1; }} ;;
  *" delete "*) rm {0}/state ;;
  *medplib_jax.train*)
    echo x >> {0}/tries
    case "$(wc -l < {0}/tries)" in
      {1}
      *) exit 0 ;;
    esac ;;
esac
"""


def train(folder: Path, tries: str, code: int = 0) -> list[str]:
    """What queued_resource.sh train calls when the command ends as the lines of a `case` over the number of the try
    say."""
    fake(folder, "sleep", "")
    fake(folder, "gcloud", CLOUD.format(folder, tries))
    run(
        "queued_resource.sh",
        "train",
        "--name",
        "m",
        "--type",
        "v6e-64",
        "--zone",
        "z",
        "--",
        *TRAIN,
        path=folder,
        code=code,
    )
    names = {"create": "create", "delete": "delete", "medplib_jax.train": "train"}
    return [name for call in calls(folder) for part, name in names.items() if f" {part}" in call]


def test_a_run_that_asks_for_it_starts_again_on_the_same_machines(tmp_path):
    assert train(tmp_path / "bin", "1) exit 75 ;; 2) exit 137 ;;") == ["create", "train", "train", "train", "delete"]


def test_a_resource_that_was_taken_away_is_made_anew(tmp_path):
    tries = f"1) echo SUSPENDED > {tmp_path}/bin/state; exit 255 ;;"
    assert train(tmp_path / "bin", tries) == ["create", "train", "delete", "create", "train", "delete"]


def test_a_run_that_fails_for_good_is_not_started_again(tmp_path):
    assert train(tmp_path / "bin", "1) exit 1 ;;", code=1) == ["create", "train"]


def test_an_error_of_gcloud_is_not_a_resource_that_is_gone(tmp_path):
    """Before gcloud has worked it is told at once, and nothing is created."""
    folder = fake(tmp_path / "bin", "gcloud", 'echo "ERROR: property [project] is not set" >&2; exit 1')
    fake(folder, "sleep", "")
    options = ["--name", "m", "--type", "v6e-64", "--zone", "z"]
    for action in (["wait", *options], ["train", *options, "--", *TRAIN]):
        said = run("queued_resource.sh", *action, path=folder, code=2).stderr
        assert "property [project] is not set" in said and "the state of m is not known" in said
    assert not any(" create " in call for call in calls(folder))


def test_a_passing_error_of_gcloud_is_waited_for(tmp_path):
    assert train(tmp_path / "bin", f"1) touch {tmp_path}/bin/errors; exit 75 ;;") == [
        "create",
        "train",
        "train",
        "delete",
    ]


def test_a_name_that_gcloud_does_not_know_is_gone(tmp_path):
    folder = fake(tmp_path / "bin", "gcloud", CLOUD.format(tmp_path / "bin", ""))
    assert "m is gone" in run("queued_resource.sh", "wait", "--name", "m", "--zone", "z", path=folder, code=1).stderr


def test_machines_that_cannot_be_had_again_are_asked_for_so_often_only(tmp_path):
    """The second `create` and all after it leave nothing that becomes active."""
    folder = tmp_path / "bin"
    cloud = CLOUD.replace(
        "echo ACTIVE > {0}/state", "test -e {0}/tries && echo FAILED > {0}/state || echo ACTIVE > {0}/state"
    )
    fake(folder, "sleep", "")
    fake(folder, "gcloud", cloud.format(folder, f"1) echo SUSPENDED > {folder}/state; exit 255 ;;"))
    options = ["--name", "m", "--type", "v6e-64", "--zone", "z", "--max-restarts", "3"]
    said = run("queued_resource.sh", "train", *options, "--", *TRAIN, path=folder, code=2).stderr
    assert "no restart is left" in said and sum(" create " in call for call in calls(folder)) == 4


@pytest.fixture
def worker(tmp_path) -> Path:
    """A repository on a TPU VM: .venv is there, the bucket is a folder, and mounting it works."""
    (tmp_path / "launch").mkdir()
    for path in (ROOT / "launch").glob("*"):
        if path.suffix in (".sh", ".txt"):
            (tmp_path / "launch" / path.name).write_bytes(path.read_bytes())
    (tmp_path / ".venv").mkdir()
    fake(tmp_path / ".venv/bin", "python", "")
    (tmp_path / ".venv/bin/activate").touch()
    requirements = sorted((tmp_path / "launch").glob("requirements*.txt"))
    stamp = "".join(path.read_text() for path in requirements)
    (tmp_path / ".venv/installed-requirements-tpu.txt").write_text(stamp)
    path = tmp_path / "bin"
    fake(path, "sudo", '"$@"')
    fake(path, "mountpoint", f"test -e {path}/mounted")
    fake(path, "gcsfuse", f"touch {path}/mounted")
    fake(path, "python3.11", "")
    fake(path, "python3.12", "")
    (tmp_path / "bucket").mkdir()
    return tmp_path


def setup(worker: Path, code: int = 0) -> subprocess.CompletedProcess:
    variables = {"PATH": f"{worker}/bin:{os.environ['PATH']}", "BUCKET_MOUNT": str(worker / "bucket")}
    script = ["bash", str(worker / "launch/setup_worker.sh"), "gs://b"]
    done = subprocess.run(script, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_a_worker_trains_into_the_bucket_whatever_an_earlier_call_left(worker):
    """The first call mounts the bucket and then fails; the second finds it mounted."""
    (worker / "bin/mounted").touch()
    (worker / "runs").mkdir()  # made by a command that ran without the links
    setup(worker)
    setup(worker)
    for folder in ("runs", "data", "checkpoints"):
        assert (worker / folder).is_symlink() and (worker / folder).resolve() == worker / "bucket" / folder
    assert not (worker / "bucket/runs/runs").exists()


def test_what_lies_on_the_disk_of_a_worker_is_not_hidden(worker):
    (worker / "runs/7b").mkdir(parents=True)
    assert "runs holds files on this VM's disk" in setup(worker, code=1).stderr
    assert (worker / "runs/7b").is_dir()


def test_a_worker_whose_bucket_is_no_longer_mounted_does_not_train(worker):
    setup(worker)
    command = ["bash", str(worker / "launch/on_worker.sh"), "true"]
    environment = {**os.environ, "PATH": f"{worker}/bin:{os.environ['PATH']}"}
    assert subprocess.run(command, env=environment).returncode == 0
    (worker / "bin/mounted").unlink()
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "no longer mounted" in refused.stderr


@pytest.mark.parametrize("left", ["nothing", "bin/python alone", "a Python that has gone"])
def test_a_half_made_venv_is_made_again(worker, left):
    venv = worker / ".venv"
    (venv / "bin/python").unlink()
    if left == "bin/python alone":
        (venv / "bin/activate").unlink()
        fake(venv / "bin", "python", "exit 1")
    if left == "a Python that has gone":
        (venv / "bin/python").symlink_to("/no/such/python")
    made = 'mkdir -p bin; rm -f bin/python; ln -s "$0" bin/python; touch bin/activate'
    made = f'[ "$1" != -m ] || {{ cd {venv}; {made}; }}'
    fake(worker / "bin", "python3.11", made)
    setup(worker)
    assert "python3.11 -m venv --clear .venv" in calls(worker / "bin")
    (venv / "bin/python").resolve(strict=True)


SCRIPTS = sorted({path.name for path in (ROOT / "launch").glob("*.sh")} - {"common.sh", "venv.sh"})  # those are sourced


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed_and_nothing_else_happens(script, tmp_path):
    folder = tmp_path / "bin"
    for program in ("srun", "gcloud", "xpk", "docker", "python", "python3.11", "sudo", "setsid", "pip"):
        fake(folder, program, "exit 9")
    said = run(script, "--help", path=folder).stdout
    assert f"launch/{script}" in said and "#" not in said.split("\n")[0] and not (folder / "calls").exists()


def test_on_a_worker_what_an_earlier_call_left_running_is_ended(tmp_path):
    """A broken connection leaves the program running; the exit code of the next is its own."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/on_worker.sh").write_bytes((ROOT / "launch/on_worker.sh").read_bytes())
    path = fake(tmp_path / "bin", "sleep", "")
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    script = ["bash", str(tmp_path / "launch/on_worker.sh")]
    first = subprocess.Popen(
        [*script, "bash", "-c", "echo ready; exec tail -f /dev/null"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "ready\n"
    second = subprocess.run([*script, "bash", "-c", "pwd; exit 75"], env=environment, capture_output=True, text=True)
    assert second.returncode == 75 and second.stdout == f"{tmp_path}\n" and "left running" in second.stderr
    assert first.wait(60) in (137, -9)


def test_xpk_in_a_dry_run():
    options = ["--name", "m", "--cluster", "c", "--type", "v5litepod-64", "--image", "i", "--slices", "2"]
    words = shlex.split(run("xpk.sh", *options, "--dry-run", "--", *TRAIN).stdout)
    assert words[:3] == ["xpk", "workload", "create"]
    flags = dict(word[2:].partition("=")[::2] for word in words[3:])
    assert set(flags) <= XPK and flags["restart-on-exit-codes"] == "75" and flags["num-slices"] == "2"
    assert shlex.split(flags["command"]) == ["exec", *TRAIN]


def test_slurm_in_a_dry_run():
    words = shlex.split(run("slurm.sh", "--dry-run", *TRAIN).stdout)
    assert words[0] == "srun" and words[-len(TRAIN) :] == TRAIN


@pytest.mark.parametrize(("ends_with", "queued"), [(0, False), (1, False), (75, True), (137, True)])
def test_slurm_puts_a_job_that_asks_for_it_into_the_queue_again(tmp_path, ends_with, queued):
    folder = fake(tmp_path / "bin", "srun", f"exit {ends_with}")
    fake(folder, "scontrol", "")
    run("slurm.sh", *TRAIN, path=folder, code=ends_with, SLURM_JOB_ID="7")
    assert ("scontrol requeue 7" in calls(folder)) == queued


def test_slurm_gives_up_in_the_end(tmp_path):
    folder = fake(tmp_path / "bin", "srun", "exit 75")
    run("slurm.sh", *TRAIN, path=folder, code=75, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="100")
    assert len(calls(folder)) == 1


def test_the_image_in_a_dry_run():
    build, push = run("build_image.sh", "--image", "host/p/medplib_jax:1", "--dry-run").stdout.splitlines()
    words = shlex.split(build)
    assert words[:2] == ["docker", "build"] and words[-1] == "." and push == "docker push host/p/medplib_jax:1"
    (requirements,) = [word.removeprefix("REQUIREMENTS=") for word in words if word.startswith("REQUIREMENTS=")]
    assert (ROOT / requirements).exists() and (ROOT / words[words.index("-f") + 1]).exists()
    copied = [
        line.split()[1:-1] for line in (ROOT / "launch/Dockerfile").read_text().splitlines() if line.startswith("COPY")
    ]
    assert copied and all(list(ROOT.glob(pattern)) for patterns in copied for pattern in patterns if pattern != ".")


def manifest(topology: str, **changes) -> dict:
    values = {
        "name": "m",
        "topology": topology,
        "slices": 1,
        "image": "i",
        "bucket": "gs://bucket",
        "service_account": "trainer",
        "max_restarts": 5,
        "command": TRAIN,
    }
    return yaml.safe_load(jobset.render(**values | changes))


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "accelerator", "sizes"),
    [
        ("v5e:8x8", 16, 4, "tpu-v5-lite-podslice", "8x8"),
        ("v5p:4x4x4", 16, 4, "tpu-v5p-slice", "4x4x4"),
        ("v6e:8x8", 16, 4, "tpu-v6e-slice", "8x8"),
        ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice", "1x1"),
    ],
)
def test_the_jobset_asks_for_the_right_nodes(topology, hosts, chips, accelerator, sizes):
    spec = manifest(topology, slices=3)["spec"]
    (job,) = spec["replicatedJobs"]
    slice_ = job["template"]["spec"]
    pod = slice_["template"]["spec"]
    assert job["replicas"] == 3 and slice_["parallelism"] == slice_["completions"] == hosts
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": sizes,
    }
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_the_jobset_starts_again_on_75_and_kills_only():
    spec = manifest("v5e:4x4")["spec"]
    slice_ = spec["replicatedJobs"][0]["template"]["spec"]
    container = slice_["template"]["spec"]["containers"][0]
    assert container["command"] == TRAIN
    assert spec["failurePolicy"] == {
        "maxRestarts": 5,
        "rules": [{"name": "failed_for_good", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (rule,) = slice_["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and codes["operator"] == "NotIn" and codes["containerName"] == container["name"]
    assert {75, 137, 143} <= set(codes["values"]) and 1 not in codes["values"] and slice_["backoffLimit"] == 0
    assert slice_["template"]["spec"]["restartPolicy"] == "Never"  # a pod failure policy needs it


def test_jobset_on_the_command_line():
    arguments = ["--name", "m", "--image", "i", "--bucket", "bucket", "--", *TRAIN]
    command = [sys.executable, "-m", "launch.jobset", "--topology"]
    printed = subprocess.run(
        [*command, "v5e:8x8", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert yaml.safe_load(printed)["metadata"]["name"] == "m" and "$" not in printed
    refused = subprocess.run([*command, "v5e-64", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "expected KIND:SIZES such as v5e:8x8" in refused.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Stage_IV"}, "--name 'Stage_IV': expected lower-case letters, digits and -"),
        ({"name": "4th"}, "--name '4th'"),
        ({"name": "m" * 60}, "is 14 letters too long: pods are called"),
        ({"service_account": "a b"}, "--service-account 'a b'"),
        ({"bucket": "gs://B"}, "--bucket 'B'"),
        ({"image": "an image: here"}, "--image"),
        ({"slices": 0}, "--slices 0: expected 1 or more"),
        ({"topology": "v5e:x"}, "expected KIND:SIZES"),
        ({"topology": "v5e:0x8"}, "expected KIND:SIZES"),
    ],
)
def test_names_that_kubernetes_would_refuse_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        manifest(**{"topology": "v5e:8x8"} | changes)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("xpk.sh", ["--nmae", "m"], "unknown option --nmae; there are: --name"),
        ("xpk.sh", ["--name", "m", "--cluster", "c", "--image", "i"], "--type is required"),
        ("run_on_workers.sh", ["--name", "m", "--zone", "z"], "no COMMAND after --"),
        ("queued_resource.sh", ["start"], "ACTION is one of create"),
        (
            "queued_resource.sh",
            ["create", "--name", "m", "--zone", "z", "--type", "v9-8"],
            "no --runtime known for --type v9-8",
        ),
    ],
)
def test_mistakes_are_named(script, arguments, message):
    assert message in run(script, *arguments, code=2).stderr
