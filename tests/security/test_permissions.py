"""What a run makes is not writable for everybody, under any umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import tiny


def others_may_write(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.rglob("*")) if path.lstat().st_mode & stat.S_IWOTH]


@pytest.mark.real
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_run_folder_is_not_world_writable(tracker, corpus, tmp_path):
    run = tmp_path / "new" / "run"
    run.parent.mkdir()
    before = os.umask(0)
    try:
        with tiny.started(corpus, run, "train.steps=2", f"tracker={tracker}") as process:
            os.umask(before)
            assert process.wait() == 0, process.output()
    finally:
        os.umask(before)
    run.chmod(0o755)  # the test made it
    found = [path for path in others_may_write(run) if not path.is_symlink()]
    assert found == []


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_the_mask_only_grows(mask):
    from moetrain.writing import keep_others_out

    before = os.umask(mask)
    try:
        keep_others_out()
        assert os.umask(0) == mask | 0o002
    finally:
        os.umask(before)
