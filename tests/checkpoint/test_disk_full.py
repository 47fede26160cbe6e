"""A save that cannot be written: nothing half-written stays, earlier ones do, and the message says why."""

import contextlib
import os
import re
import resource
import subprocess

import pytest
import torch

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.errors import TrainingError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a small tmpfs here: {error}")
    if made.returncode:
        pytest.skip(f"cannot mount a small tmpfs here (needs root): {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SMALL = {"w": torch.ones(1000)}
LARGE = {"w": torch.ones(400, 1000), "v": torch.ones(200, 1000)}  # 2.4 MB


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def save_and_wait(checkpointer: Checkpointer, step: int, tensors: dict[str, torch.Tensor]) -> None:
    checkpointer.save(step, tensors, {"step": step})
    checkpointer.wait()


def assert_still_fine(folder) -> None:
    assert names(folder) == ["step_00000001"]
    target = {"w": torch.zeros(1000)}
    checkpointer = Checkpointer(folder)
    assert checkpointer.load(checkpointer.latest_valid(), target) == {"step": 1}
    assert target["w"].sum() == 1000


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk(small_disk, async_save):
    folder = small_disk / "checkpoints"
    checkpointer = Checkpointer(folder, async_save=async_save)
    checkpointer.save(1, SMALL, {"step": 1})
    with pytest.raises(UserError) as error:
        save_and_wait(checkpointer, 2, LARGE)
    text = str(error.value)
    assert "\n" not in text
    assert f"checkpoint {folder / 'step_00000002'} was not saved: rank 0: No space left on device" in text
    assert "its tensors take 2,400,000 bytes" in text
    free = int(re.search(r"([\d,]+) bytes are free there", text)[1].replace(",", ""))
    assert 1_500_000 < free < 2 * 2**20  # the half-written folder is gone already
    assert checkpointer.last_saved == 1
    assert_still_fine(folder)
    checkpointer.save(1, SMALL, {"step": 1})  # and the checkpointer still works
    checkpointer.close()
    assert_still_fine(folder)


def test_a_disk_that_is_full_to_the_last_byte(small_disk):
    """Not even an empty file's metadata fits: every step of a save meets the full disk at some filling."""
    folder = small_disk / "checkpoints"
    Checkpointer(folder).save(1, SMALL, {"step": 1})
    failures = 0
    for left in range(0, 40_000, 4096):
        filler = small_disk / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), b"x" * 4096)
        os.truncate(filler, filler.stat().st_size - left)
        failure = None
        try:
            Checkpointer(folder).save(2, SMALL, {"step": 2})
        except UserError as error:
            failure = str(error)
        filler.unlink()
        if failure is None:
            break
        assert "No space left on device" in failure
        failures += 1
        assert_still_fine(folder)
    assert names(folder) == ["step_00000001", "step_00000002"]
    assert failures >= 3


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("limit", [0, 300, 100_000, 1_700_000])
def test_a_file_that_may_not_grow(tmp_path, async_save, limit):
    """The same without root: the kernel refuses to write beyond a size, at any point of the save."""
    checkpointer = Checkpointer(tmp_path, keep_last=1, async_save=async_save)
    checkpointer.save(1, SMALL, {"step": 1})
    checkpointer.wait()
    with largest_file(limit), pytest.raises(UserError, match="was not saved: rank 0: File too large"):
        save_and_wait(checkpointer, 2, LARGE)
    assert_still_fine(tmp_path)


def test_the_json_files_may_fail_too(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, SMALL, {"step": 1})
    with largest_file(50_000), pytest.raises(UserError, match=r"File too large \(extra.json\)"):
        checkpointer.save(2, {"w": torch.ones(3)}, {"long": "x" * 60_000})
    assert_still_fine(tmp_path)


def test_a_failed_async_save_is_raised_once_by_the_next_save(tmp_path):
    checkpointer = Checkpointer(tmp_path, async_save=True)
    checkpointer.save(1, SMALL, {"step": 1})
    checkpointer.wait()
    with largest_file(1000):
        checkpointer.save(2, LARGE, {})
        checkpointer._pending[0].exception()  # finished, and nobody was told
    with pytest.raises(UserError, match="step_00000002 was not saved"):
        checkpointer.save(3, SMALL, {})
    checkpointer.wait()
    assert_still_fine(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint folder .*file/checkpoints cannot be prepared: "):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_a_folder_that_disappears(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c")
    (tmp_path / "c").rmdir()
    (tmp_path / "c").write_text("a file in its place")
    with pytest.raises(UserError, match="step_00000001 was not saved: rank 0: Not a directory"):
        checkpointer.save(1, SMALL, {})


@pytest.mark.parametrize("async_save", [False, True])
def test_a_folder_that_goes_away_in_the_middle_is_what_is_said(async_save, tmp_path):
    """The guard is as a run folder's lock: content at first, and no more once the folder was renamed."""
    run, gone = tmp_path / "run", tmp_path / "gone"
    run.mkdir()

    def guard() -> None:
        if not run.exists():
            raise TrainingError("the run folder was removed")

    checkpointer = Checkpointer(run / "checkpoints", async_save=async_save, guard=guard)
    checkpointer.save(1, SMALL, {})
    checkpointer.wait()

    def rename(*args: object, **kwargs: object) -> None:
        run.rename(gone)
        raise FileNotFoundError(2, "No such file or directory", "a file of the folder")

    def save() -> None:
        checkpointer.save(2, SMALL, {})
        checkpointer.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.checkpoint.write.FileSystemWriter.write_data", rename)
        with pytest.raises(TrainingError, match="the run folder was removed"):
            save()
    assert not run.exists()
    assert [path.name for path in (gone / "checkpoints").glob("step_*")] == ["step_00000001"]
