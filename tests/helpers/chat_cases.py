"""Chat templates written to the published rules of public models, tokenizers of their words, conversations.

The templates are worded here: each writes what its model's documentation says of turns, and no more of tools
than a call.
"""

import json
import random

from data_cases import jsonl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moetrain.data.chat.options import ChatData
from moetrain.data.ingest import Loss, tokenised
from moetrain.data.options import TokenizerConfig, TokenizerKind
from moetrain.data.sources import build_parts
from moetrain.data.tokenizer import load_tokenizer

_CALLS = """
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}"""

CHATML = """
{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}<CALLS>{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""".replace("<CALLS>", _CALLS)

_DEFAULT_SYSTEM = """
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}"""

# An earlier turn's thoughts are left out; what follows the last question keeps them, or gets empty ones.
_QWEN3 = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content }}<CALLS>
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}""".replace("<CALLS>", _CALLS)

_LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ (m.content | trim) ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_MISTRAL = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content ~ '\\n\\n' %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant') }}
{%- endif %}
{%- if m.role == 'user' %}{{ '[INST] ' ~ (system if loop.first else '') ~ m.content ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}
{%- endfor %}"""

_GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' }}
{{- (m.content | trim) ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

_PHI4 = """
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '<|im_sep|>' ~ m.content ~ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

_DEEPSEEK = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<\uff5cUser\uff5c>' ~ m.content }}
{%- else %}{{ '<\uff5cAssistant\uff5c>' ~ m.content ~ '<\uff5cend\u2581of\u2581sentence\uff5c>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"""

# The last answer ends with <|return|>, earlier ones with <|end|>.
_HARMONY = """
{{- '<|start|>system<|message|>You are ChatGPT.\\nCurrent date: ' ~ strftime_now('%Y-%m-%d') ~ '<|end|>' }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' ~ m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}{{ '<|start|>' ~ ('developer' if m.role == 'system' else m.role) }}
{{- '<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

_GLM4 = """
{{- '[gMASK]<sop>' }}
{%- for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

_ZEPHYR = """
{%- for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ eos_token ~ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

TEMPLATES = {
    "qwen25": _DEFAULT_SYSTEM + CHATML,
    "qwen3": _QWEN3,
    "smollm2": _DEFAULT_SYSTEM.replace("assistant.", "assistant named SmolLM.") + CHATML,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "phi4": _PHI4,
    "deepseek": _DEEPSEEK,
    "harmony": _HARMONY,
    "glm4": _GLM4,
    "zephyr": _ZEPHYR,
}
LATER_TURNS = ("qwen3", "harmony")  # they write a turn in another way once others follow
PIECES = ("mistral", "gemma", "zephyr")  # whose models have sentencepiece's vocabularies
WORDS = [  # bos first, eos second
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_sep|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ),
    *(
        "<|eot_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<\uff5cUser\uff5c>",
        "<\uff5cAssistant\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    *("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "[gMASK]", "<sop>", "<|system|>"),
    *("<|user|>", "<|assistant|>"),
]
PLAIN_WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # known whole, and not special
_LINES_APART = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3's
)
_TEXT = [
    "user assistant system model final hello world the quick brown fox jumps over lazy dogs [INST] é ü 中\n\n"
] * 9


def tokenizer_folder(folder, template=None, pieces=False):
    """A small tokenizer of the words of all templates, byte-level or in sentencepiece's manner."""
    folder.mkdir(parents=True, exist_ok=True)
    if pieces:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        replaced = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        tokenizer.decoder = decoders.Sequence(replaced)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # while it is trained: no piece has two words
        alphabet, extra = [], [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer = Tokenizer(models.BPE())
        parts = [
            pre_tokenizers.Split(Regex(_LINES_APART), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, extra = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = trainers.BpeTrainer(
        vocab_size=700 if pieces else 420,
        special_tokens=WORDS + extra,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_tokens(PLAIN_WORDS)
    if pieces:
        tokenizer.pre_tokenizer = None
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in extra]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


_PARTS = [
    "hello",
    " world",
    "\n",
    " the quick",
    "é",
    "中文",
    " fox",
    "  ",
    "\n\n",
    "x",
    ". ",
    "<b>",
    "{}",
    "</s",
    "😀",
]


def conversations(count, seed, system=True, longest=4):
    """Random ones: one to ``longest`` rounds, any text, with or without a system's turn."""
    draw = random.Random(seed)

    def text():
        return "".join(draw.choices(_PARTS, k=draw.randint(1, 9)))

    found = []
    for _ in range(count):
        messages = [{"role": "system", "content": text()}] if system and draw.random() < 0.4 else []
        for _ in range(draw.randint(1, longest)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        found.append(messages)
    return found


def chat_data(tmp_path, rows, tokenizer, **settings):
    """``rows``: the text of a file, bytes, or objects."""
    path = tmp_path / "rows.jsonl"
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        jsonl(path, rows)
    file = TokenizerConfig(kind=TokenizerKind.file, path=str(tokenizer))
    cls = settings.pop("cls", ChatData)
    given = {"seq_len": 64, "val_fraction": 0.2, "cache_dir": str(tmp_path / "cache"), **settings}
    return cls(path=str(path), tokenizer=file, **given)


def read(cfg, tmp_path):
    """(documents, tokenised ones) of the rows."""
    tokenizer = load_tokenizer(cfg.tokenizer.path)
    (part,) = build_parts(cfg, tmp_path, tokenizer)
    return list(part.cleaned()), list(tokenised(part, tokenizer, Loss()))
