"""The pages of ``moetrain train --help`` and of the other Hydra commands."""

from __future__ import annotations

from pathlib import Path

from moetrain.config.hydra.store import CONFIG_DIR, variants

_USAGE = {
    "train": """\
moetrain train [group=option ...] [key=value ...]

Trains a Mixture-of-Experts language model and leaves runs/NAME with checkpoints, metrics and report.html.

  moetrain train                                  the default: a tiny MoE, on the CPU, in minutes
  moetrain train model=small router.top_k=4       another option of a group, another value of a key
  moetrain train run.name=mine train.steps=1000   the same run.name again: goes on where it stopped
  moetrain train -m router.top_k=1,2,4            a sweep, each job in its own folder
  moetrain train --cfg job                        the composed config; nothing is run

Flags: --cfg job|hydra|all [--resolve] [--package KEY], --info, --hydra-help, -m (--multirun),
  --config-dir FOLDER (your own yaml files, searched after the shipped ones), --config-name NAME
""",
    "verify": """\
moetrain verify [group=option ...] [key=value ...]

Proves that a layout trains like one process: a scaled-down twin of the config runs in fp64 on the CPU, on as
many ranks as the layout needs (verify.ranks at most) and on one; losses, every gradient, norms, weights after
steps and a checkpoint moved both ways are compared. Takes what train takes, and verify.world: the ranks of
the run to come. Leaves a certificate below run.root that train finds.

  moetrain verify parallel.ep=2 parallel.dp_shard=4
  moetrain verify experiment=small parallel.ep=8 verify.world=64

Flags: --cfg job|hydra|all [--resolve] [--package KEY], --info, --hydra-help, --config-dir FOLDER,
  --config-name NAME
""",
    "generate": """\
moetrain generate checkpoint=RUN prompt="..." [key=value ...]

Continues a prompt with the newest checkpoint of a run folder, or with the checkpoint that is named.

  moetrain generate checkpoint=runs/mine prompt="def main("
  moetrain generate checkpoint=runs/mine prompt_file=story.txt max_new_tokens=500 temperature=0

Flags: --cfg job|hydra|all [--resolve] [--package KEY], --info, --hydra-help
""",
    "eval": """\
moetrain eval checkpoint=RUN 'data.path=/my/*.txt' [tasks=[...]] [json=FILE] [key=value ...]

Scores whole files with the newest checkpoint of a run, or with a converted or Hugging Face folder: loss,
perplexity and bits per byte of each file and of all. Every token that follows another of its document is
scored once, in windows of data.seq_len tokens. data.kind=chat or prompt_completion: of rows as that data
group reads them, the tokens that would train. tasks: those of lm-eval (pip install 'moetrain[eval]').

  moetrain eval checkpoint=runs/mine 'data.path=/my/**/*.txt' json=figures.json
  moetrain eval checkpoint=runs/mine data.kind=chat data.path=rows.jsonl
  moetrain eval checkpoint=runs/mine 'tasks=[hellaswag,arc_easy]' limit=100
  moetrain eval checkpoint=runs/mine 'tasks=[my_task]' include_path=tasks

Flags: --cfg job|hydra|all [--resolve] [--package KEY], --info, --hydra-help
""",
    "convert": """\
moetrain convert source=FOLDER_OR_FILE target=FOLDER [tokenizer=FILE]

Turns a Hugging Face checkpoint (safetensors) or a GGUF file into a folder that train init_from=, generate,
upcycle and export read. Tensor by tensor; every tensor is used once or nothing is written.

  moetrain convert source=/models/SmolLM2-135M target=smollm2
  moetrain train init_from=smollm2

Flags: --cfg job|hydra|all [--resolve] [--package KEY], --info, --hydra-help
""",
    "upcycle": """\
moetrain upcycle source=FOLDER target=FOLDER model.num_experts=8 router.top_k=2 [method=copy] [key=value ...]

Makes an MoE model of a dense one (a run, a converted or a Hugging Face folder); method=grow makes a larger
one of an MoE. Takes what train takes, of the model to come. Prints the parameters before and after, whether
the method keeps the function and why, and compares both models' logits on held-out text.

  moetrain upcycle source=smollm2 target=moe model.num_experts=8 router.top_k=2
  moetrain upcycle source=dense target=moe method=granular model.num_experts=16 model.d_ff_expert=768 \\
      router.top_k=2
  moetrain upcycle source=en target=moe method=join 'donors=[fr,es]' model.num_experts=6 data=domains

Flags: --cfg job|hydra|all [--resolve] [--package KEY], --info, --hydra-help
""",
    "export": """\
moetrain export checkpoint=RUN target=FOLDER [family=auto] [dtype=keep]

Writes the newest checkpoint of a run, of any layout, as a Hugging Face folder that transformers loads.

  moetrain export checkpoint=runs/mine target=out dtype=bf16
  moetrain export checkpoint=runs/mine target=out family=mixtral

Flags: --cfg job|hydra|all [--resolve] [--package KEY], --info, --hydra-help
""",
}


def app_help(command: str, config_dir: str | None = None) -> str:
    """Usage, flags and groups; the composed config follows it."""
    text = _USAGE[command]
    if command in ("train", "verify", "upcycle"):
        groups = "\n".join(f"  {g:<12}{', '.join(names)}" for g, names in group_options(config_dir).items())
        text += f"\nGroups and their options:\n{groups}\n"
        names = "\n".join(f"  {key:<21}{', '.join(known)}" for key, known in registered().items())
        text += f"\nKeys that hold names, which plugins may add to:\n{names}\n"
    return f"{text}\nKeys and their values:\n"


def registered() -> dict[str, list[str]]:
    """Key -> the names that it may hold, of plugins too."""
    from moetrain.models.attention import ATTENTIONS
    from moetrain.models.feed_forward import FEED_FORWARDS
    from moetrain.moe.balance import CONTROLLERS, LOSSES
    from moetrain.train.task import TASKS

    return {
        "balance.losses": sorted(LOSSES),
        "balance.controllers": sorted(CONTROLLERS),
        "model.attention": sorted(ATTENTIONS),
        "model.feed_forward": sorted(FEED_FORWARDS),
        "train.task": sorted(TASKS),
    }


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """Config group -> its options: shipped, from the user's folder, and routers of plugins."""
    folders = [CONFIG_DIR, *([Path(config_dir)] if config_dir else [])]
    groups: dict[str, set[str]] = {"router": set(variants()["router"])}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            groups.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(groups[group]) for group in sorted(groups)}
