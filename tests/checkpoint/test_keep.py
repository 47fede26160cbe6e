"""Which checkpoints stay, and which one ``resume`` means."""

import pytest
import torch

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, {"w": torch.full((3,), float(step))}, {"step": step})
    checkpointer.wait()


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("async_save", [False, True])
def test_the_newest_are_kept(tmp_path, async_save):
    checkpointer = Checkpointer(tmp_path, keep_last=2, async_save=async_save)
    save(checkpointer, 5, 10, 15, 20)
    assert names(tmp_path) == ["step_00000015", "step_00000020"]
    assert checkpointer.last_saved == 20


def test_a_damaged_one_does_not_count_among_the_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    save(checkpointer, 1, 2)
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    save(checkpointer, 3)
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    save(checkpointer, 4)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_a_file_in_the_place_of_a_checkpoint_is_replaced(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    (tmp_path / "step_00000002").write_text("in the way")
    save(checkpointer, 1, 2)
    assert names(tmp_path) == ["step_00000002"]
    assert checkpointer.latest_valid() == tmp_path / "step_00000002"


def test_saving_an_older_step_removes_neither_newer_nor_itself(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    save(checkpointer, 80, 90)
    save(checkpointer, 60)
    assert names(tmp_path) == ["step_00000060", "step_00000080", "step_00000090"]


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_12").mkdir()
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    save(checkpointer, 1, 2)
    assert names(tmp_path) == ["notes.txt", "step_00000002", "step_12"]


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpointer(tmp_path, keep_last=0)


def test_resume_auto_takes_the_newest_or_starts_fresh(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.resolve("auto") is None
    save(checkpointer, 1, 2)
    assert checkpointer.resolve("auto") == tmp_path / "step_00000002"


def test_resume_auto_does_not_start_fresh_over_damaged_ones(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 1)
    (tmp_path / "step_00000001" / "extra.json").unlink()
    with pytest.raises(UserError, match=r"all 1 checkpoint\(s\) in .* are damaged"):
        checkpointer.resolve("auto")


def test_resume_none_refuses_a_folder_with_checkpoints(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.resolve("none") is None
    save(checkpointer, 1)
    with pytest.raises(UserError, match=f"resume=none, but {tmp_path} already holds 1 checkpoint"):
        checkpointer.resolve("none")


def test_resume_path_takes_a_checkpoint_or_a_run_folder(tmp_path):
    save(Checkpointer(tmp_path / "run" / "checkpoints"), 3, 7)
    checkpointer = Checkpointer(tmp_path / "new" / "checkpoints")
    folder = tmp_path / "run" / "checkpoints"
    assert checkpointer.resolve(str(folder / "step_00000003")) == folder / "step_00000003"
    assert checkpointer.resolve(str(tmp_path / "run")) == folder / "step_00000007"
    with pytest.raises(UserError, match=r"there is no checkpoint at .*gone"):
        checkpointer.resolve(str(tmp_path / "gone"))
    (folder / "step_00000003" / "metadata.json").write_text("")
    with pytest.raises(UserError, match=r"step_00000003 is damaged or incomplete: metadata.json"):
        checkpointer.resolve(str(folder / "step_00000003"))


def test_newer_checkpoints_of_an_abandoned_course_are_set_aside(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=5)
    save(checkpointer, 1, 2, 3)
    aside = tmp_path / "abandoned"
    assert checkpointer.set_aside_after(1) == [aside / "step_00000002", aside / "step_00000003"]
    assert checkpointer.resolve("auto") == tmp_path / "step_00000001"
    save(checkpointer, 2)
    assert checkpointer.set_aside_after(1) == [aside / "step_00000002"]
    assert names(aside) == ["step_00000002", "step_00000003"]
    assert checkpointer.set_aside_after(1) == []
    Checkpointer(tmp_path).load(aside / "step_00000002", {"w": torch.zeros(3)})


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 4)
    path = checkpointer.latest_valid()
    checkpointer.save(4, {"w": torch.full((3,), -1.0)}, {"step": -4})
    target = {"w": torch.zeros(3)}
    assert checkpointer.load(path, target) == {"step": -4}
    assert target["w"].tolist() == [-1, -1, -1]
    assert names(tmp_path) == ["step_00000004"]
