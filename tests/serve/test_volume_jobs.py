"""Jobs in the background: kept from the first moment, taken up again, given up, refused by name."""

import threading

import nibabel
import numpy as np
import pytest

from medplib_jax.decode.scans import ScanModel, ScanOptions, SliceAnswer
from medplib_jax.serve import volume_jobs
from medplib_jax.serve.refusals import Refused
from medplib_jax.serve.store import Bounds, Store
from medplib_jax.serve.volume_jobs import OUT, SCAN, JobRunner
from tests.volumes.scans import some_values, write_nifti

SHAPE = (8, 9, 6)
OPTIONS = ScanOptions(("liver",))


class Oracle:
    """Says that a structure fills every second slice; waits before slice `stop` until `go` is set."""

    def __init__(self, stop: int = -1):
        self.asked, self._stop = [], stop
        self.reached, self.go = threading.Event(), threading.Event()

    def of_client(self, client: str) -> ScanModel:
        return ScanModel(["oracle"], self._answer)

    def _answer(self, shown, structure, question, numbers, seed):
        for number in numbers:
            if number == self._stop:
                self.reached.set()
                assert self.go.wait(120)
            self.asked.append(number)
            mask = np.full(SHAPE[1::-1], True) if number % 2 else None
            yield SliceAnswer(structure, number, "It is <SEG>.", mask, 0.5 if number % 2 else 0.0)


def make_runner(store: Store, oracle: Oracle, capacity: int = 4) -> JobRunner:
    return JobRunner(store, {"m": oracle.of_client}, capacity)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", Bounds())


@pytest.fixture
def image(store):
    with store.add("images", "a") as (name, folder, _):
        write_nifti(folder / SCAN / "0.nii.gz", some_values(SHAPE))
    return name


def finish(runner: JobRunner) -> None:
    """Waits until nothing is left to do."""
    deadline = threading.Event()
    for _ in range(2400):
        if not runner.in_use()["jobs"]:
            return
        deadline.wait(0.05)
    raise AssertionError("jobs did not end")


def test_a_job_leaves_masks_and_survives_the_server(store, image):
    runner = make_runner(store, Oracle())
    runner.start()
    job = runner.submit("a", image, "m", OPTIONS)
    finish(runner)
    runner.close(120)
    assert job.status == "done" and (job.done, job.total) == (6, 6) and "masks.nii.gz" in job.files
    again = make_runner(store, Oracle()).job(job.id, "a")
    assert again.shown() == job.shown()
    labels = np.asarray(nibabel.load(store.folder("jobs", job.id) / OUT / "masks.nii.gz").dataobj)
    np.testing.assert_array_equal(labels.any(axis=(0, 1)), [False, True] * 3)


def test_an_interrupted_job_goes_on_where_it_stood(store, image):
    first, second = Oracle(stop=4), Oracle()
    runner = make_runner(store, first)
    runner.start()
    job = runner.submit("a", image, "m", OPTIONS)
    assert first.reached.wait(120)
    closing = threading.Thread(target=runner.close, args=[120])
    closing.start()
    while not runner._closing.is_set():
        pass
    first.go.set()
    closing.join()
    later = make_runner(store, second)
    assert later.job(job.id, "a").status in ("queued", "running")
    later.start()
    finish(later)
    later.close(120)
    assert later.job(job.id, "a").status == "done"
    assert first.asked == [0, 1, 2, 3, 4] and second.asked == [5]


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(store, image):
    oracle = Oracle(stop=2)
    runner = make_runner(store, oracle)
    runner.start()
    running, waiting = (runner.submit("a", image, "m", OPTIONS) for _ in range(2))
    assert oracle.reached.wait(120)
    runner.cancel(waiting)
    assert waiting.status == "cancelled"
    runner.cancel(running)
    oracle.go.set()
    finish(runner)
    runner.close(120)
    assert running.status == "cancelled" and oracle.asked == [0, 1, 2]


def test_a_job_that_is_removed_while_it_waits_has_ended(store, image):
    job = (runner := make_runner(store, Oracle())).submit("a", image, "m", OPTIONS)
    runner.remove(job)
    assert job.status == "cancelled" and store.names("jobs") == []


def test_a_job_whose_state_cannot_be_written_ends_no_other(store, image, monkeypatch):
    runner, write = make_runner(store, Oracle()), volume_jobs.write_json
    lost, answered = (runner.submit("a", image, "m", OPTIONS) for _ in range(2))

    def write_but_lost(path, content):
        if path.parent.name == lost.id:
            raise OSError("no space left")
        write(path, content)

    monkeypatch.setattr(volume_jobs, "write_json", write_but_lost)
    runner.start()
    finish(runner)
    runner.close(120)
    assert (lost.status, answered.status) == ("error", "done")


def test_every_volume_of_an_upload_is_bounded(store, image, monkeypatch):
    monkeypatch.setattr(volume_jobs, "MAX_VOXELS", 8 * 9 * 6 - 1)
    runner = make_runner(store, Oracle())
    job = runner.submit("a", image, "m", OPTIONS)
    runner.start()
    finish(runner)
    runner.close(120)
    assert job.status == "error" and "too large" in job.message


def test_jobs_that_may_wait_are_bounded(store, image):
    runner = make_runner(store, Oracle(), capacity=2)
    for _ in range(2):
        runner.submit("a", image, "m", OPTIONS)
    with pytest.raises(Refused) as found:
        runner.submit("a", image, "m", OPTIONS)
    assert found.value.status == 429 and len(store.names("jobs")) == 2


def test_images_and_jobs_belong_to_their_client(store, image):
    runner = make_runner(store, Oracle())
    job = runner.submit("a", image, "m", OPTIONS)
    for ask in (lambda: runner.submit("b", image, "m", OPTIONS), lambda: runner.job(job.id, "b")):
        with pytest.raises(Refused) as found:
            ask()
        assert found.value.status == 404


@pytest.mark.parametrize(
    ("options", "message"),
    [(ScanOptions(("x",), slices=(3, 99)), "no such slices"), (ScanOptions(("x",), index=5), "no such volume")],
)
def test_what_is_wrong_is_told_without_a_path(store, image, options, message):
    runner = make_runner(store, Oracle())
    runner.start()
    job = runner.submit("a", image, "m", options)
    finish(runner)
    runner.close(120)
    assert job.status == "error" and message in job.message and "/" not in job.message
