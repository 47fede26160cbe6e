"""Signals and the STOP file in real processes."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moetrain.parallel.watchdog.peer_errors import PeerLostError, peer_lost
from moetrain.train.stopping import StopFlag


def wait_for(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("did not happen")


def test_nobody_asked():
    with StopFlag() as flag:
        assert not flag.requested()
        assert not flag.agree()
        assert flag.reason is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    threads = threading.active_count()
    with StopFlag() as flag:
        os.kill(os.getpid(), number)
        assert flag.requested()
        assert flag.agree()
        assert flag.reason == number.name
        wait_for(lambda: "once more leaves at once" in capfd.readouterr().err)
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads
    assert flag.requested()  # the answer stays after leaving


def test_slurm_repeats_its_signals(monkeypatch, capfd):
    """SIGTERM after the warning, at the end of the time, must not cut the save short."""
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: "stopping after this step and saving\n" in capfd.readouterr().err)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert flag.reason == "SIGUSR1"


@pytest.mark.parametrize(("step", "expected"), [("0", "SIGUSR1"), (None, "-10")])
def test_a_warning_while_a_rank_starts(step, expected):
    """In a step of Slurm it is kept for the stop flag; elsewhere it ends the process, as before."""
    lines = [
        "import os, signal",
        "from moetrain.parallel.early_warning import keep_early_warning",
        "keep_early_warning()",
        "os.kill(os.getpid(), signal.SIGUSR1)",
        "from moetrain.train.stopping import StopFlag",
        "print(StopFlag().reason)",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_STEP_ID"}
    environment |= {} if step is None else {"SLURM_STEP_ID": step}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip() or str(done.returncode)) == expected, done.stderr


def test_handlers_come_back_after_an_error_and_flags_may_follow():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopFlag():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested()
    with StopFlag() as flag:
        assert not flag.requested()


def test_other_signals_are_not_counted():
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with StopFlag() as flag:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.05)
            assert not flag.requested()
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_the_stop_file_asks_and_is_removed_when_obeyed(tmp_path):
    stop = tmp_path / "STOP"
    with StopFlag(stop) as flag:
        assert not flag.agree()
        stop.touch()
        assert flag.requested()
        assert stop.exists()
        assert flag.agree()
        assert not stop.exists()
        assert flag.agree()  # and it stays decided
        assert "STOP exists" in flag.reason


def test_outside_the_main_thread_only_the_file_works(tmp_path):
    found = []

    def run() -> None:
        with StopFlag(tmp_path / "STOP") as flag:
            found.append(flag.agree())
            (tmp_path / "STOP").touch()
            found.append(flag.agree())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, True]
    assert signal.getsignal(signal.SIGTERM) is before


class Child:
    """A forked process that runs ``main``; its standard error comes here. Used as a context manager."""

    def __init__(self, main) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(read)
                os.dup2(write, 2)
                main()
                os._exit(0)
            finally:
                os._exit(99)
        os.close(write)
        self.stderr = os.fdopen(read)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.stderr.close()

    def wait(self) -> int:
        found = []

        def ended() -> bool:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            found.append(status)
            return pid != 0

        wait_for(ended)
        self.pid = 0
        return os.waitstatus_to_exitcode(found[-1])


def say(text: str) -> None:
    os.write(2, f"{text}\n".encode())


def busy_in_c() -> None:
    """In C for minutes, without a look at Python's signal handlers: as in a collective with a dead rank."""
    with StopFlag():
        say("ready")
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 400_000_000)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_leaves_at_once_even_from_inside_c(number, code):
    with Child(busy_in_c) as child:
        assert child.stderr.readline() == "ready\n"
        os.kill(child.pid, number)
        assert "once more leaves at once" in child.stderr.readline()
        assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
        os.kill(child.pid, number)
        assert child.wait() == code
        assert f"{number.name} again: leaving at once" in child.stderr.readline()


def under_torchrun() -> None:
    os.environ["TORCHELASTIC_RUN_ID"] = "1"
    with StopFlag() as flag:
        say("ready")
        while not flag.agree():
            time.sleep(0.01)
        time.sleep(0.5)
        os._exit(7)


def test_torchruns_repeated_signal_counts_as_one():
    """The terminal signals every process, and torchrun then signals its workers again."""
    with Child(under_torchrun) as child:
        assert child.stderr.readline() == "ready\n"
        os.kill(child.pid, signal.SIGINT)
        assert "once more leaves at once" in child.stderr.readline()
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait() == 7


def with_workers() -> None:
    with StopFlag() as flag:
        pids = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        time.sleep(0.1)
        say(f"{codes} {flag.requested()}")


def test_a_forked_workers_signal_does_not_count_for_its_parent():
    with Child(with_workers) as child:
        assert child.stderr.readline() == "[-15, -15] False\n"
        assert child.wait() == 0


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (PeerLostError("x"), True),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"), True),
        (RuntimeError("Read error [127.0.0.1]:5: Connection reset by peer"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 5x7)"), False),
        (ValueError("timed out"), False),
        (TimeoutError("The read operation timed out"), False),
    ],
)
def test_which_errors_mean_a_lost_peer(error, lost):
    assert peer_lost(error) is lost


def test_a_stop_file_that_cannot_be_removed_is_said(tmp_path, caplog):
    stop = tmp_path / "STOP"
    stop.mkdir()  # unlink refuses a folder
    with StopFlag(Path(stop)) as flag:
        assert flag.agree()
    assert "STOP could not be removed" in caplog.text
