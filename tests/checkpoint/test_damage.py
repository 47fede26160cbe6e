"""A damaged checkpoint is noticed, named, and passed over; a crash at any moment of a save costs nothing."""

import logging
import os
import random
import shutil

import pytest
import torch

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.manifest import verify
from moetrain.checkpoint.read import find_checkpoint, load_checkpoint
from moetrain.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FILES = ["__0_0.distcp", "extra.json", "manifest.json", "metadata.json"]


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "w": torch.full((7, 3), value),
        "b": torch.full((5,), value, dtype=torch.bfloat16),
        "n": torch.tensor(int(value)),
    }


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2."""
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(step, tensors(step), {"step": step})
    return checkpointer


def test_twenty_random_bit_flips_anywhere_are_all_noticed(two, caplog):
    newest = two.dir / "step_00000002"
    whole = {name: (newest / name).read_bytes() for name in FILES}
    rng = random.Random(11)
    bits = 8 * sum(map(len, whole.values()))
    for _ in range(20):
        position = rng.randrange(bits)
        for name in FILES:
            if position < 8 * len(whole[name]):
                break
            position -= 8 * len(whole[name])
        flipped = bytearray(whole[name])
        flipped[position // 8] ^= 1 << (position % 8)
        (newest / name).write_bytes(flipped)
        caplog.clear()
        assert two.latest_valid() == two.dir / "step_00000001"
        assert f"checkpoint {newest} is damaged and is passed over: {name}: " in caplog.text
        with pytest.raises(UserError, match=name):
            Checkpointer(two.dir).load(newest, tensors(0))
        (newest / name).write_bytes(whole[name])
    assert two.latest_valid() == newest


def test_a_checkpoint_under_another_steps_name_is_noticed(two, caplog):
    (two.dir / "step_00000002").rename(two.dir / "step_00000007")
    assert two.latest_valid() == two.dir / "step_00000001"
    assert "step_00000007 is damaged and is passed over: manifest.json: written for step 2" in caplog.text
    with pytest.raises(UserError, match="written for step 2, so the folder was renamed"):
        two.load(two.dir / "step_00000007", tensors(0))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_truncated_file_is_named(two, caplog, name, keep):
    path = two.dir / "step_00000002" / name
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    assert two.latest_valid() == two.dir / "step_00000001"
    assert name in caplog.text
    if name != "manifest.json":
        assert f"{len(data[:keep])} bytes, not the {len(data)} that were written" in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(two, caplog, name):
    (two.dir / "step_00000002" / name).unlink()
    assert two.latest_valid() == two.dir / "step_00000001"
    assert f"{name}: missing" in caplog.text


def test_appended_bytes_and_swapped_files_are_noticed(two):
    newest, older = two.dir / "step_00000002", two.dir / "step_00000001"
    with (newest / "__0_0.distcp").open("ab") as file:
        file.write(b"\0")
    assert two.latest_valid() == older
    shutil.copy(older / "__0_0.distcp", newest / "__0_0.distcp")
    with pytest.raises(UserError, match=r"__0_0\.distcp: its SHA-256 differs"):
        find_checkpoint(newest)


def test_without_hashes_only_sizes_are_checked(tmp_path):
    checkpointer = Checkpointer(tmp_path, hash=False)
    path = checkpointer.save(1, tensors(1), {})
    data = (path / "extra.json").read_bytes()
    (path / "extra.json").write_bytes(b" " * len(data))
    assert checkpointer.latest_valid() == path
    (path / "extra.json").write_bytes(data + b" ")
    assert checkpointer.latest_valid() is None


def test_the_newest_intact_of_several_is_taken(two, caplog):
    two.save(3, tensors(3), {})
    (two.dir / "step_00000003" / "manifest.json").unlink()
    (two.dir / "step_00000002" / "metadata.json").unlink()
    target = tensors(0)
    assert load_checkpoint(two.dir, target) == {"step": 1}
    assert target["w"].unique().tolist() == [1.0]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 2


def test_a_damaged_path_or_no_checkpoint_is_an_error_naming_it(two, tmp_path):
    newest = two.dir / "step_00000002"
    (newest / "extra.json").write_text("{}\n")
    with pytest.raises(UserError, match=f"checkpoint {newest} is damaged or incomplete: extra.json: "):
        two.load(newest, tensors(0))
    with pytest.raises(UserError, match=r"there is no checkpoint at .*nowhere"):
        two.load(tmp_path / "nowhere", tensors(0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is damaged or incomplete: manifest.json: missing"):
        two.load(tmp_path / "empty", tensors(0))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"there is no checkpoint at .*file"):
        two.load(tmp_path / "file", tensors(0))


def test_damage_after_the_check_is_still_no_wrong_load(two):
    """latest_valid() need not be repeated by load(); another step is checked on its own."""
    path = two.latest_valid()
    (two.dir / "step_00000001" / "extra.json").write_text("{}")
    two.load(path, tensors(0))
    with pytest.raises(UserError, match="step_00000001 is damaged"):
        two.load(two.dir / "step_00000001", tensors(0))


def test_a_checkpoint_saved_anew_is_checked_anew(two):
    path = two.latest_valid()
    assert two.save(2, tensors(2), {}) == path
    (path / "extra.json").write_text("[]\n")
    with pytest.raises(UserError, match=r"extra\.json: its SHA-256 differs"):
        two.load(path, tensors(0))


def test_leftovers_of_a_killed_save_are_removed_at_the_start(two):
    for name in (".tmp_step_00000003", ".tmp_delete_step_00000001", ".tmp_old_step_00000002"):
        (two.dir / name).mkdir()
        (two.dir / name / "__0_0.distcp").write_bytes(b"half")
    Checkpointer(two.dir)
    assert sorted(p.name for p in two.dir.iterdir()) == ["step_00000001", "step_00000002"]


def _save_and_die_at(folder, moment: int, step: int) -> int:
    """In a forked process: save, and die at the given call that changes the disk's order of things."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        calls = 0

        def tick():
            nonlocal calls
            calls += 1
            if calls == moment:
                os._exit(9)

        def dying(real):
            def call(*args, **kwargs):
                tick()
                return real(*args, **kwargs)

            return call

        os.fsync = lambda fd: None  # slow, and only a power cut could tell
        for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        Checkpointer(folder, keep_last=1).save(step, tensors(step), {"step": step})
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("again", [False, True])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path, again):
    """``again``: the save replaces a checkpoint of the same step that is there already."""
    before = tmp_path / "before"
    Checkpointer(before).save(1, tensors(1), {"step": 1})
    if again:
        Checkpointer(before).save(2, tensors(5), {"step": 5})
    seen, moment = set(), 1
    while True:
        folder = tmp_path / str(moment)
        shutil.copytree(before, folder)
        code = _save_and_die_at(folder, moment, 2)
        checkpointer = Checkpointer(folder)
        target = tensors(0)
        path = checkpointer.latest_valid()
        value = checkpointer.load(path, target)["step"]
        seen.add(value)
        assert all((t == value).all() for t in target.values())
        assert [verify(p) for p in folder.iterdir() if p.name.startswith("step_")] in ([[]], [[], []])
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".tmp")]
        if code == 0:
            break
        assert code == 9
        moment += 1
    assert moment > 15  # four files, folders, renames, and the removal of the old checkpoint file by file
    assert seen == ({5, 2} if again else {1, 2})
