"""What can be wrong when a training or a generation begins: one line, a code, and nothing half-written."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from moetrain.cli import main
from moetrain.train.log.jsonl import read_metrics

pytestmark = pytest.mark.usefixtures("training")


def refused(capsys, *fragments: str) -> str:
    """The one line of the error."""
    err: str = capsys.readouterr().err
    assert err.startswith("moetrain: error: "), err
    assert err.count("\n") == 1, err
    assert not [fragment for fragment in fragments if fragment not in err], err
    return err


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, whose size the test sets with ``mount -o remount,size=...``."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs here: {error}")
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here (needs root): {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_read_only_run_folder(corpus, disk, capsys):
    remount(disk, "ro")
    assert tiny.train(corpus, disk / "run") == 2
    refused(capsys, f"the run folder {disk}/run cannot be used", "Read-only file system", "run.dir")


def test_a_run_folder_that_became_read_only(corpus, trained, disk, capsys):
    run = disk / "run"
    shutil.copytree(trained, run)
    remount(disk, "ro")
    assert tiny.train(corpus, run, *tiny.TRAINED, "train.steps=20") == 2
    refused(capsys, "Read-only file system", str(run))
    assert tiny.files(run) == tiny.files(trained)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(corpus, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o555)
    assert tiny.train(corpus, tmp_path / "closed" / "run") == 2
    refused(capsys, "Permission denied", "run.dir")


def test_a_run_folder_that_is_a_file(corpus, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert tiny.train(corpus, tmp_path / "run") == 2
    refused(capsys, f"run.dir={tmp_path}/run is a file")
    assert tiny.train(corpus, tmp_path / "run" / "below") == 2
    refused(capsys, f"the run folder {tmp_path}/run/below cannot be used", "Not a directory")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_disk_that_fills_up_while_saving(corpus, trained, disk, tmp_path, capsys):
    """The first checkpoint fits, the second does not; with room again the run goes on from the first."""
    run = disk / "run"
    size = sum(file.stat().st_size for file in tiny.checkpoint(trained, 5).iterdir())
    remount(disk, f"size={int(1.9 * size) // 4096 * 4096 + 40960}")
    assert tiny.train(corpus, run, *tiny.TRAINED) == 2
    line = refused(capsys, "step_00000010 was not saved", "No space left on device", "bytes are free there")
    assert "earlier checkpoints are kept" in line
    assert tiny.checkpoints(run) == [5]
    assert os.listdir(run / "checkpoints") == ["step_00000005"]
    remount(disk, "size=50m")
    assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    assert tiny.steps(run) == tiny.steps(trained)
    tiny.assert_same_state(tiny.checkpoint(run, tiny.STEPS), tiny.checkpoint(trained, tiny.STEPS))


def test_a_disk_that_fills_up_while_writing_metrics(corpus, trained, disk, capsys):
    remount(disk, "size=56k")
    run = disk / "run"
    assert tiny.train(corpus, run, "train.steps=400", "checkpoint.every=0", "train.eval_every=0") == 2
    refused(capsys, f"{run}/metrics.jsonl cannot be written: No space left on device")
    rows = read_metrics(run)
    assert (run / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert 12 <= len(rows) < 400
    assert tiny.steps(run)[:12] == tiny.steps(trained)
    assert not [name for name in tiny.files(run) if "tmp" in name]


def test_a_corrupt_shard_in_the_cache(corpus, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(corpus / "text", own / "text")
    assert tiny.train(own, tmp_path / "first", "train.steps=1") == 0
    (shard,) = (own / "cache").rglob("000-train-tokens-00000.bin")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 4
    shard.write_bytes(content)
    capsys.readouterr()
    assert tiny.train(own, tmp_path / "run") == 2
    refused(capsys, str(shard), "does not match its recorded hash")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("texts", "fragments"),
    [
        ([""], ["data.path="]),
        (["   \n"], ["data.path="]),
        (["short", "too", "shorter"], ["data.path=", "fewer than one sequence", f"data.seq_len={tiny.SEQ}"]),
        (["a single document, " * 40], ["data.path="]),
        (["fine", "not\0text"], ["binary"]),
    ],
)
def test_text_that_cannot_be_trained_on(texts, fragments, tmp_path, capsys):
    folder = tmp_path / "corpus"
    (folder / "text").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    assert tiny.train(folder, tmp_path / "run") == 2
    refused(capsys, *fragments)
    assert not (tmp_path / "run").exists()
    assert not list((folder / "cache").rglob("*.tmp-*"))


RUNS = {
    "named": ["train", "run.root=runs", "run.name=a/b"],
    "unnamed": ["train", "run.root=runs"],
    "comparison": ["train", "run.root=runs", "compare.arms={a: [], b: ['optim.lr=0.01']}"],
    "sweep": ["train", "-m", "run.root=runs", "train.seed=0,1"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_no_folder_is_left_where_there_is_no_text(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.txt").write_text("short")
    line = [argument for argument in tiny.command(tmp_path, tmp_path) if not argument.startswith("run.dir=")]
    assert main([*RUNS[kind], *line[1:]]) == 2
    assert "data.path=" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["cache", "text"]


def test_a_vocabulary_smaller_than_that_of_a_tokenizer_file(corpus, tmp_path, capsys):
    """For bytes and BPE the config shows it; here the file has to be read."""
    bpe = ["data.tokenizer.kind=bpe", "data.tokenizer.vocab_size=300"]
    assert tiny.train(corpus, tmp_path / "first", *bpe, "train.steps=1") == 0
    given = ["data.tokenizer.kind=file", f"data.tokenizer.path={tmp_path}/first/tokenizer"]
    capsys.readouterr()
    assert tiny.train(corpus, tmp_path / "run", *given, "model.vocab_size=299") == 2
    refused(capsys, "model.vocab_size=299", "the tokenizer's 300")
    assert not (tmp_path / "run").exists()
    assert tiny.train(corpus, tmp_path / "run", *given, "model.vocab_size=301", "train.steps=1") == 0


def test_a_checkpoint_to_resume_from_that_is_none(corpus, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert tiny.train(corpus, tmp_path / "run", f"resume={tmp_path}/empty") == 2
    refused(capsys, f"{tmp_path}/empty", "damaged or incomplete")
    assert not (tmp_path / "run").exists()


def broken(trained: Path, run: Path, *names: str) -> Path:
    shutil.copytree(trained, run)
    for name in names:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run


@pytest.mark.parametrize(
    ("missing", "fragments"),
    [
        (["checkpoints"], ["damaged or incomplete"]),
        (["config.yaml"], ["config.yaml"]),
        (["tokenizer"], ["tokenizer"]),
        (
            [f"checkpoints/step_{step:08d}/manifest.json" for step in (5, 10, 12)],
            ["all 3 checkpoint(s)", "damaged"],
        ),
    ],
)
def test_generate_from_a_folder_that_lacks_something(missing, fragments, trained, tmp_path, capsys):
    run = broken(trained, tmp_path / "run", *missing)
    assert main(["generate", f"checkpoint={run}", "prompt=abc"]) == 2
    refused(capsys, *fragments)


def test_generate_with_prompts_that_cannot_be_read(trained, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for prompt in ("binary", "nowhere", "."):
        assert main(["generate", f"checkpoint={trained}", f"prompt_file={tmp_path}/{prompt}"]) == 2
        refused(capsys, f"prompt_file={tmp_path}/{prompt}")
    for both in ([], ["prompt=a", f"prompt_file={tmp_path}/binary"]):
        assert main(["generate", f"checkpoint={trained}", *both]) == 2
        refused(capsys, "exactly one of prompt=... and prompt_file=")


def test_generate_without_the_plug_in_of_its_router(faulty, corpus, tmp_path, capsys, monkeypatch):
    from moetrain.moe.routers import ROUTERS

    assert tiny.train(corpus, tmp_path / "run", *faulty, "train.steps=1") == 0
    capsys.readouterr()
    generate = ["generate", f"checkpoint={tmp_path}/run", "prompt=abc", "max_new_tokens=2"]
    with monkeypatch.context() as patch:
        patch.delitem(ROUTERS, "faulty")
        assert main(generate) == 2
        refused(capsys, "router.name=faulty is not known", "plugins=[package]")
    assert main([*generate, "plugins=[faulty_router]"]) == 0


def test_text_that_the_terminal_cannot_show(corpus, trained, tmp_path, monkeypatch):
    """A sample may hold any character; it is replaced, and neither command ends in a traceback."""
    said = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(said, encoding="ascii", write_through=True))
    prompt = "\N{LATIN SMALL LETTER E WITH ACUTE}\x1b[2J"
    assert main(["generate", f"checkpoint={trained}", f"prompt='{prompt}'", "max_new_tokens=2"]) == 0
    assert said.getvalue().startswith(b"??[2J")
    assert tiny.train(corpus, tmp_path / "run", "train.steps=1", f"train.sample_prompt='{prompt}'") == 0
    assert b"\nsample:\n??[2J" in said.getvalue()
    assert (tmp_path / "run" / "samples" / "step_00000001.txt").read_text().startswith(prompt)
