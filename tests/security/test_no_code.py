"""No place in the package runs what was loaded, or builds a shell command: the list of all that could."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import moetrain

ROOT = Path(moetrain.__file__).parent
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
    "torch.load", "torch.jit.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "marshal.loads",
    "numpy.load", "np.load", "joblib.load", "dill.loads", "shelve.open", "runpy.run_path",
}  # fmt: skip
LISTED = {
    ("checkpoint/rows.py", "torch.load"): "weights_only, of an archive whose pickle was looked through",
    ("files.py", "yaml.load"): "the safe loader",
    ("parallel/ranks.py", "pickle.loads"): "between a process and the ranks that it started itself",
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def sources() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if "kernels" not in path.relative_to(ROOT).parts]


def test_what_loads_and_could_run_code():
    found = {
        (str(path.relative_to(ROOT)), name) for path in sources() for name, _ in calls(path) if name in CALLS
    }
    assert found == LISTED.keys()


def test_torch_loads_weights_only_and_yaml_is_safe():
    for path in sources():
        for name, call in calls(path):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name != "torch.load" or given.get("weights_only") == "True", path
            assert name != "yaml.load" or ast.unparse(call.args[1]) == "_LOADER", path
            assert given.get("trust_remote_code", "False") == "False", path
            assert given.get("allow_pickle", "False") == "False", path


def test_no_command_goes_through_a_shell():
    for path in sources():
        for name, call in calls(path):
            assert all(word.arg != "shell" for word in call.keywords), path
            if name.startswith("subprocess.") and call.args:
                assert not isinstance(call.args[0], ast.JoinedStr), path


def test_the_check_sees_what_it_is_for():
    planted = "import os\nos.system('x')\nsubprocess.run('x', shell=True)\ntorch.load(f)\n"
    named = {ast.unparse(n.func) for n in ast.walk(ast.parse(planted)) if isinstance(n, ast.Call)}
    assert named == {"os.system", "subprocess.run", "torch.load"}
