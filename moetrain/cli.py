"""The ``moetrain`` command: subcommands, exit codes, and one line for every error that the user can mend.

Exit codes: 0 done, 1 a failure (of the machine in one line, of the program with its traceback), 2 a mistake
in the command or its input, 3 a run folder that another process uses, 75 asked to stop before the last step
and saved, 130 Ctrl-C before the first step. Of several ranks only rank 0 prints errors; torchrun shows those
of the others from its error file.
"""

from __future__ import annotations

import importlib
import sys

import moetrain
from moetrain.errors import UserError, write_error_file
from moetrain.machine_errors import machine_error
from moetrain.nearest import nearest
from moetrain.parallel.cores import choose_waiting
from moetrain.parallel.early_warning import keep_early_warning
from moetrain.parallel.environment import adopt_launcher, is_rank_0, local_ranks
from moetrain.parallel.launcher import end_with_launcher
from moetrain.terminal import finish, one_line, set_up, show, tell
from moetrain.writing import keep_others_out

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
      moetrain data fetch domains | moetrain data write python_questions FILE.jsonl
      moetrain doctor | moetrain --version | moetrain COMMAND --help

Exit codes: 0 done, 1 a failure, 2 a mistake in the command or its input, 3 a run folder in use, 75 asked to
stop before the last step and saved: the same command goes on; 128 and more: ended by the signal less 128
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    adopt_launcher()
    keep_early_warning()
    end_with_launcher()
    set_up()
    keep_others_out()
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
        if (machine := machine_error(e)) is None:
            raise
        return _fail(machine, 1)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        show(HELP, end="")
        return 0 if args else 2
    if args[0] == "--version":
        show(f"moetrain {moetrain.__version__}")
        return 0
    if args[0] not in COMMANDS:
        raise UserError(_unknown(args[0]))
    if args[0] in _COMPUTES:
        choose_waiting(local_ranks())  # which OpenMP reads once, and the import below brings torch
    command = importlib.import_module(f"moetrain.commands.{args[0]}")
    code: int = command.run(args[1:])
    return code


def _unknown(word: str) -> str:
    if word.startswith("-"):
        return f"unknown option {word}{nearest(word, ['--help', '--version'])}"
    if "=" in word:
        return f"{word}: the subcommand comes first, as in moetrain train {word}{nearest('', COMMANDS)}"
    return f"unknown subcommand {word}{nearest(word, COMMANDS)}"


COMMANDS = (
    *("train", "verify", "generate", "eval", "convert", "upcycle", "export", "report", "status", "router"),
    *("data", "doctor"),
)

_COMPUTES = ("train", "eval", "generate")  # in this process, with threads


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


if __name__ == "__main__":
    sys.exit(main())
