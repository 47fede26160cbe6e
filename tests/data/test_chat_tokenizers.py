"""What a tokenizer's own habits do to conversations: trimmed places, words before a text, files of models."""

import json

from chat_cases import CHATML, chat_data, read, tokenizer_folder

from moetrain.convert.exporting import _save_tokenizer
from moetrain.convert.tokenizers import gguf_templates
from moetrain.data.chat.files import TemplateFiles, read_template_files
from moetrain.data.chat.options import ChatData, PromptCompletionData
from moetrain.data.options import TokenizerConfig, TokenizerKind
from moetrain.data.sources import build_parts
from moetrain.data.tokenizer import ByteTokenizer, load_tokenizer

ROWS = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world fox"}]}]


def processed(folder, template, processor):
    """The small tokenizer with a post-processor."""
    tokenizer_folder(folder, template)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["post_processor"] = processor
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def test_a_token_that_begins_before_the_turn_is_the_prompt_s(tmp_path):
    template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    trimming = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    found = []
    for name, processor in (("plain", None), ("trimming", trimming)):
        folder = processed(tmp_path / name, template, processor)
        _, (tokens,) = read(chat_data(tmp_path, ROWS, folder), tmp_path)
        tokenizer = load_tokenizer(folder)
        found.append([tokenizer.decode([int(i)]) for i in tokens.tokens_N[tokens.mask.trains_N]])
        assert " world" in [tokenizer.decode([int(i)]) for i in tokens.tokens_N]
    assert found[0] == found[1] == [" fox", ""]


def test_a_text_begins_with_what_the_tokenizer_puts_before_it(tmp_path):
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single}
    processor["special_tokens"] = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    folder = processed(tmp_path / "bos", None, processor)
    assert load_tokenizer(folder).words.bos == "<s>"
    rows = [{"prompt": "hello", "completion": " world"}]
    (document,), (tokens,) = read(chat_data(tmp_path, rows, folder, cls=PromptCompletionData), tmp_path)
    assert document.text == "<s>hello world</s>"
    assert (int(tokens.tokens_N[0]), int(tokens.tokens_N[-1])) == (0, 1)
    # A template writes its own words, and nothing is put before them.
    (folder / "chat_template.jinja").write_text(CHATML)
    _, (tokens,) = read(chat_data(tmp_path, ROWS, folder), tmp_path)
    assert 0 not in tokens.tokens_N


def test_bytes_take_a_template_from_a_file(tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}")
    rows = [{"messages": [ROWS[0]["messages"][0] | {"content": "é<|endoftext|>"}, ROWS[0]["messages"][1]]}]
    cfg = chat_data(tmp_path, rows, tmp_path)
    cfg = ChatData(
        path=cfg.path, chat_template=str(tmp_path / "t.jinja"), tokenizer=TokenizerConfig(TokenizerKind.bytes)
    )
    (part,) = build_parts(cfg, tmp_path, ByteTokenizer())
    (document,) = part.cleaned()
    (placed,) = ByteTokenizer().encode_marked([document.text], [document.marks.control])
    text = "é<|endoftext|>".encode()
    assert placed.ids_N.tolist() == [*text, 256, *b"world fox", 256]
    assert placed.starts_N.tolist()[:3] == [0, 0, 1]
    assert [document.text[slice(*span)] for span in document.marks.trained] == ["world fox<|endoftext|>"]
    assert document.num_bytes == len(text) + len(b"world fox")


def test_a_gguf_file_s_template_and_words():
    metadata = {"tokenizer.ggml.tokens": ["a", "<s>", "</s>"], "tokenizer.ggml.eos_token_id": 2}
    assert gguf_templates(metadata) == TemplateFiles()
    found = gguf_templates({**metadata, "tokenizer.chat_template": "t", "tokenizer.ggml.bos_token_id": 7})
    assert found == TemplateFiles({"default": "t"}, {"eos_token": "</s>"})


def test_an_export_has_the_template_that_was_trained_with(tmp_path):
    carried = tokenizer_folder(tmp_path / "carried", CHATML)
    own = load_tokenizer(carried)
    _save_tokenizer(own, carried)
    assert not (carried / "chat_template.jinja").exists()
    before = (carried / "tokenizer_config.json").read_text()
    _save_tokenizer(own.with_templates(TemplateFiles({"default": "other"})), carried)
    assert read_template_files(carried).templates == {"default": "other"}
    assert (carried / "tokenizer_config.json").read_text() == before
    _save_tokenizer(ByteTokenizer(TemplateFiles({"default": "t"})), tmp_path / "bytes")
    assert read_template_files(tmp_path / "bytes").templates == {"default": "t"}
