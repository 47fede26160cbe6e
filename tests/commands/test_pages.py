"""Pages that a command prints: its config, its help, the versions; and nothing else happens."""

import logging
import os
import re
import shlex
from pathlib import Path

import yaml

import moetrain
from moetrain.cli import HELP, main
from moetrain.config.help import group_options
from moetrain.config.hydra.compose import compose_train, load_yaml
from moetrain.config.validate import validate
from moetrain.ops.experts import table


def test_the_printed_config_is_accepted_back(capsys, tmp_path):
    overrides = [
        "router=deepseek_v3",
        "model.num_experts=16",
        "optim=muon",
        "train.precision=bf16",
        "parallel=ddp",
    ]
    assert main(["train", "--cfg", "job", *overrides]) == 0
    text = capsys.readouterr().out
    plain = yaml.safe_load(text)
    assert "hydra" not in plain
    assert plain["train"]["precision"] == "bf16"
    assert plain["router"]["score"] == "sigmoid"
    assert os.listdir(".") == []
    Path("printed.yaml").write_text(text)
    assert main(["train", "--cfg", "job", "--resolve", *overrides]) == 0
    Path("values.yaml").write_text(capsys.readouterr().out)
    assert load_yaml("values.yaml") == compose_train(overrides)
    assert main(["train", "--config-dir", ".", "--config-name", "printed", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == plain


def test_a_part_of_the_config_resolved(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "parallel=ddp", "--cfg", "job", "--package", "parallel", "--resolve"]) == 0
    assert "dp_replicate: 4" in capsys.readouterr().out.splitlines()
    assert main(["train", "data=local", "--cfg", "job", "-p", "data"]) == 0
    assert "path: ???" in capsys.readouterr().out


def test_the_help_of_train_lists_groups_and_keys(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for group, names in group_options().items():
        assert re.search(rf"^  {group} +{', '.join(names)}$", out, re.M)
    assert " _topk" not in out
    assert "moetrain train -m router.top_k=1,2,4" in out
    assert "micro_batch_size: " in out
    assert main(["generate", "--help"]) == 0
    assert "max_new_tokens: 128" in capsys.readouterr().out
    assert main(["train", "--hydra-help"]) == 0
    assert "hydra" in capsys.readouterr().out.lower()
    assert os.listdir(".") == []


def test_info_prints_and_leaves_the_loggers_alone(capsys):
    before = logging.getLogger().handlers[:]
    assert main(["train", "--info", "defaults"]) == 0
    assert "router/topk" in capsys.readouterr().out
    assert logging.getLogger().handlers == before
    assert not logging.getLogger("hydra").disabled


def test_only_rank_0_prints_pages(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--cfg", "job"]) == 0
    assert capsys.readouterr().out == ""


def test_plain_pages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moetrain {moetrain.__version__}\n"
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == HELP
    assert len(re.findall(r"^  (moetrain|torchrun) ", HELP, re.M)) == 16
    assert main([]) == 2
    assert capsys.readouterr().out == HELP
    for command in ("report", "status", "data"):
        assert main([command, "--help"]) == 0
        assert f"moetrain {command}" in capsys.readouterr().out


def test_doctor_tells_versions_and_devices(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("moetrain", "python", "torch", "hydra-core", "wandb", "C++ compiler", "cpu", "gpu"):
        assert re.search(rf"^{re.escape(name)} .*\S", out, re.M), name
    assert re.search(r"^experts, bf16 cpu, then loop$", out, re.M)
    for backend in ("triton_block_sparse", "megablocks", "scattermoe"):
        assert re.search(rf"^  by its name {backend}: .*\S", out, re.M), backend


def test_doctor_tells_why_a_backend_is_passed_over(capsys, monkeypatch):
    monkeypatch.setattr(table, "_self_test", lambda name, case: "its output is off")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^experts, fp32 not cpu \(its output is off\), then loop$", out, re.M)


def test_the_commands_on_the_help_page_are_valid():
    lines = [line for line in HELP.splitlines()[2:] if "moetrain train" in line and "init_from" not in line]
    trains = [line.split("  ")[1] for line in lines if not line.startswith("Also")]
    assert len(trains) == 7
    Path("my").mkdir()
    Path("my/text.txt").write_text("text")
    for command in trains:
        overrides = shlex.split(command.partition("moetrain train")[2].replace("/my/", "my/"))
        cfg = compose_train([o for o in overrides if not o.startswith(("-m", "router.top_k=1,"))])
        validate(cfg, 8 if "--nproc-per-node 8" in command else 1)
