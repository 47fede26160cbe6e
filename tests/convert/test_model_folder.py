"""The folder that convert, upcycle and export fill: whole, or not there, and neither are its parents."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moetrain.convert.model_folder import new_folder
from moetrain.errors import UserError


def fill(target: Path, name: str, error: BaseException) -> None:
    with new_folder(target) as folder:
        (folder / name).write_text("x")
        raise error


def test_it_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "a" / "b" / "new"
    with new_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in target.parent.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard"), UserError),
        (UserError("no"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_whatever_goes_wrong_leaves_nothing_but_what_others_made(error, seen, tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "a" / "b" / "new"
    with pytest.raises(seen):
        fill(target, "file", error)
    assert list((tmp_path / "there").iterdir()) == []
    with pytest.raises(seen):
        fill(target, "../../of somebody else", error)
    assert [path.name for path in (tmp_path / "there").rglob("*")] == ["a", "of somebody else"]


def test_a_target_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"exists already"), new_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
