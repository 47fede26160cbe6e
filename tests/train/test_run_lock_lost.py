"""A run folder that is lost while its run goes on: the run ends, and writes nothing into another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from lock_cases import ended, held, quick, take_away, wait_for

from moetrain.checkpoint import write as checkpoint_write
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.train.run_lock import FolderLostError
from moetrain.train.run_owner import RECORD, read_owner

__all__ = ["ended", "quick"]  # fixtures


def remove(folder: Path) -> None:
    tiny_files = tiny.files(folder)
    for name in tiny_files:
        (folder / name).unlink()
    folder.rmdir()


def replace_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.mkdir()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (take_away, r"the run folder .*run was taken by process 4711 on node7 since now \(job 99\)"),
        (remove, "the run folder .*run was removed or replaced while it was in use"),
        (replace_folder, "the run folder .*run was removed or replaced while it was in use"),
        (lambda folder: (folder / RECORD).unlink(), f"run/{RECORD} was removed while"),
    ],
    ids=["taken", "removed", "replaced", "record removed"],
)
def test_a_lost_folder_ends_the_run(loss, said, tmp_path, quick, ended):
    lock = held(tmp_path / "run")
    wait_for(lambda: read_owner(tmp_path / "run").beat > 1)
    loss(tmp_path / "run")
    with pytest.raises(FolderLostError, match=said):
        lock.check()
    wait_for(lambda: ended)
    assert ended[0].endswith("; this run has ended and writes nothing more")
    lock.release()
    if loss is take_away:  # the other's record is left alone
        assert read_owner(tmp_path / "run").pid == 4711


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("moment", ["before", "while it is written"])
def test_nothing_is_saved_in_anothers_folder(moment, async_save, tmp_path, ended, monkeypatch):
    lock = held(tmp_path)
    checkpointer = Checkpointer(tmp_path / "checkpoints", async_save=async_save, guard=lock.check)
    checkpointer.save(1, {"w": torch.zeros(3)}, {})
    checkpointer.wait()
    if moment == "before":
        take_away(tmp_path)
    else:  # after the last of its own files
        encode = checkpoint_write.encode_manifest
        monkeypatch.setattr(
            checkpoint_write, "encode_manifest", lambda manifest: (take_away(tmp_path), encode(manifest))[1]
        )
    theirs = tmp_path / "checkpoints" / ".tmp_step_00000002" / "theirs"
    if moment == "before":
        theirs.parent.mkdir()
        theirs.touch()

    def save() -> None:
        checkpointer.save(2, {"w": torch.ones(3)}, {})
        checkpointer.wait()

    with pytest.raises(FolderLostError, match="was taken by process 4711 on node7"):
        save()
    assert tiny.checkpoints(tmp_path) == [1]
    assert theirs.exists() is (moment == "before")
    lock.release()
