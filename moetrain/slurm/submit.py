"""``launch/slurm/submit``: checks a run where the user sits, and hands it to sbatch.

The config is composed and validated for the ranks that are asked for, so that a mistake costs no time in the
queue. Nodes that an earlier preflight found bad are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from moetrain.errors import UserError
from moetrain.slurm.job import EXCLUDED, RESUBMIT, RUN, SRUN, without
from moetrain.slurm.plan import Plan, plan
from moetrain.terminal import one_line, show, tell

_PASSED_ON = ("partition", "account", "qos", "time", "constraint", "reservation", "job-name", "output")


def main(argv: Sequence[str] | None = None) -> int:
    """sbatch's exit code; 2 and one line for what is wrong."""
    options = _parser().parse_args(argv)
    try:
        return _submit(options)
    except UserError as error:
        tell(f"moetrain: error: {one_line(str(error))}", sys.stderr)
        return error.exit_code


def _submit(options: argparse.Namespace) -> int:
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    _check_counts(options)
    per_node = options.gpus_per_node or options.ranks_per_node
    ranks = options.nodes * per_node
    made = plan(arguments, ranks, "slurm-JOBID")
    scripts = Path(options.scripts)
    script = scripts / ("sweep.sbatch" if made.jobs > 1 else "train.sbatch")
    if not script.is_file():
        raise UserError(f"--scripts {scripts} has no {script.name}: it is the folder launch/slurm")
    command = ["sbatch", *_resources(options, per_node), *_excluded(options, made), *_array(options, made)]
    own = [f"--max-requeues={options.max_requeues}", f"--spare-nodes={options.spare_nodes}"]
    own += ["--no-preflight"] if options.no_preflight else []
    rest = [str(script), *own, "--", *arguments]
    if options.dry_run:
        show(shlex.join([*_prefix(options), *command, *rest]))
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here: submit from a machine of the cluster, or look with --dry-run"
        )
    environment = dict(word.split("=", 1) for word in _prefix(options))
    again = json.dumps([command, rest])
    return subprocess.run([*command, *rest], env={**os.environ, **environment, RESUBMIT: again}).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/slurm/submit",
        usage="%(prog)s [options] -- <overrides of moetrain train>",
        description=__doc__.split("\n\n")[1],
        allow_abbrev=False,
    )
    where = parser.add_argument_group("what to ask Slurm for")
    where.add_argument("--nodes", type=int, default=1, help="that train; default %(default)s")
    where.add_argument("--gpus-per-node", type=int, default=0, help="one rank each")
    where.add_argument("--ranks-per-node", type=int, default=1, help="without GPUs; default %(default)s")
    where.add_argument("--cpus-per-rank", type=int, help="cores of each rank")
    where.add_argument("--spare-nodes", type=int, default=0, help="more nodes, for those found bad")
    where.add_argument("--exclude", help="nodes to leave out, besides those that were found bad")
    for name in _PASSED_ON:
        where.add_argument(f"--{name}", help="as sbatch takes it")
    where.add_argument(
        "--warn", type=int, default=300, help="seconds before the end of the time; default %(default)s"
    )
    how = parser.add_argument_group("how to run")
    how.add_argument("--container", help="an image: by srun's --container-image (pyxis), else apptainer")
    how.add_argument("--max-requeues", type=int, default=50, help="default %(default)s")
    how.add_argument("--no-preflight", action="store_true", help="take the nodes as they are")
    how.add_argument("--dry-run", action="store_true", help="print the command and submit nothing")
    how.add_argument("--scripts", default="launch/slurm", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _check_counts(options: argparse.Namespace) -> None:
    least = {
        "nodes": 1,
        "ranks_per_node": 1,
        "warn": 1,
        "gpus_per_node": 0,
        "spare_nodes": 0,
        "max_requeues": 0,
    }
    for name, number in least.items():
        if getattr(options, name) < number:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {number}")


def _resources(options: argparse.Namespace, per_node: int) -> list[str]:
    found = [f"--nodes={options.nodes + options.spare_nodes}", f"--ntasks-per-node={per_node}"]
    found += [f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []
    found += [f"--cpus-per-task={options.cpus_per_rank}"] if options.cpus_per_rank else []
    given = {name: getattr(options, name.replace("-", "_")) for name in _PASSED_ON}
    found += [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [*found, f"--signal=B:USR1@{options.warn}"]


def _excluded(options: argparse.Namespace, made: Plan) -> list[str]:
    """The nodes in the file beside the run folders; delete its lines once a node is mended."""
    lines = [f"{options.exclude}"] if options.exclude else []
    with contextlib.suppress(OSError):
        lines += (Path(made.folder).parent / EXCLUDED).read_text().splitlines()
    return without(line.split("\t")[0] for line in lines if line.strip())


def _array(options: argparse.Namespace, made: Plan) -> list[str]:
    return [f"--array=0-{made.jobs - 1}"] if made.jobs > 1 else []


def _prefix(options: argparse.Namespace) -> list[str]:
    """The variables by which the job's steps run in the container."""
    image = options.container
    if image is None:
        return []
    described = subprocess.run(["srun", "--help"], capture_output=True, text=True).stdout
    if "--container-image" in described:
        return [f"{SRUN}=--container-image={shlex.quote(image)}", f"{RUN}=python"]
    if shutil.which("apptainer") is None:
        raise UserError("--container: srun has no --container-image (pyxis), and there is no apptainer")
    gpus = ["--nv"] if options.gpus_per_node else []
    return [f"{RUN}={shlex.join(['apptainer', 'exec', *gpus, image, 'python'])}"]


if __name__ == "__main__":
    sys.exit(main())
