"""Prompts: the user turn without an uninvited system turn under many families of chat templates, filled templates, encoding."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fastlora.prompt import PromptError, chat_renderer, encode, fill_template
from tests.tiny import make_tiny_tokenizer


def with_template(template: str | None, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = template, bos
    return tokenizer


QWEN3 = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\n' }}
  {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
  {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
"""As Qwen3's: no default system turn; the last assistant turn is written with a think block, earlier ones without."""

HEADERS = """
{{- bos_token }}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{{- '<h>system</h>\n\nToday: 26 Jul\n\n' + system|trim + '<eot>' }}
{%- for m in messages if m['role'] != 'system' %}
  {{- '<h>' + m['role'] + '</h>\n\n' + m['content']|trim + '<eot>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<h>assistant</h>\n\n' }}{%- endif %}"""
"""As Llama 3.1's: bos, then a system turn with the date, whether asked for or not."""

INST = """
{{- bos_token }}
{%- set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}
{%- for m in messages if m['role'] != 'system' %}
  {%- if m['role'] == 'user' %}{{- '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}
  {%- else %}{{- ' ' + m['content'] + '</s>' }}{%- endif %}
{%- endfor %}"""
"""As Mistral's: the system text goes into the user turn."""

NO_SYSTEM = """
{{- bos_token }}
{%- for m in messages %}
  {%- if m['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
  {{- '<turn>' + m['role'] + '\n' + m['content']|trim + '</turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>model\n' }}{%- endif %}"""
"""As Gemma's."""

PREFIXED = """
{{- '[gMASK]<sop>' }}
{%- for m in messages %}{{- '<|' + m['role'] + '|>\n' + m['content'] }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""
"""As GLM's: opening tokens that are neither bos nor a system turn."""


@pytest.mark.parametrize(
    ("template", "prompt", "with_system"),
    [
        (
            QWEN3,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n",
        ),
        (
            HEADERS,
            "<s><h>user</h>\n\nHi<eot><h>assistant</h>\n\n",
            "<s><h>system</h>\n\nToday: 26 Jul\n\nBe kind<eot><h>user</h>",
        ),
        (INST, "<s>[INST] Hi [/INST]", "<s>[INST] Be kind\n\nHi [/INST]"),
        (NO_SYSTEM, "<s><turn>user\nHi</turn>\n<turn>model\n", None),
        (PREFIXED, "[gMASK]<sop><|user|>\nHi<|assistant|>\n", "[gMASK]<sop><|system|>\nBe kind<|user|>\nHi<|assistant|>\n"),
    ],
    ids=["qwen3", "llama3.1", "mistral", "gemma", "glm"],
)
def test_no_system_turn_whatever_the_template(template: str, prompt: str, with_system: str | None) -> None:
    tokenizer = with_template(template)
    assert chat_renderer(tokenizer, None)("Hi") == prompt
    if with_system is None:
        with pytest.raises(PromptError, match="refuses a conversation of system, user: System role not supported"):
            chat_renderer(tokenizer, "Be kind")("Hi")
    else:
        assert chat_renderer(tokenizer, "Be kind")("Hi").startswith(with_system)


def test_chatml_with_a_default_system_turn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Its bos is also what opens each turn: it must neither be lost nor doubled."""
    assert tiny_tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("<|im_start|>system\nD")
    user = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat_renderer(tiny_tokenizer, None)("Hi") == user
    assert chat_renderer(tiny_tokenizer, "")("Hi") == "<|im_start|>system\n<|im_end|>\n" + user
    no_bos = with_template(tiny_tokenizer.chat_template, None)
    assert chat_renderer(no_bos, None)("Hi") == user


def test_a_template_whose_turns_differ_is_refused() -> None:
    odd = "{% for m in messages %}{{ ('FIRST ' if loop.first else 'THEN ') + m['content'] }}{% endfor %}"
    with pytest.raises(PromptError, match=r"differently from a later one.*set data\.system_prompt"):
        chat_renderer(with_template(odd), None)


def test_without_a_chat_template_the_user_turn_is_plain_text() -> None:
    assert chat_renderer(with_template(None), None)("Q: 2+2\n") == "Q: 2+2\n"
    with pytest.raises(PromptError, match=r"data\.system_prompt is set, but the tokenizer has no chat template"):
        chat_renderer(with_template(None), "Be kind")


def test_encode_adds_no_second_bos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    [written] = encode(tokenizer, ["<|im_start|>a"])
    assert written.count(1) == 1
    tokenizer.chat_template = None
    [plain] = encode(tokenizer, ["a"])
    assert plain == written
    assert encode(tokenizer, []) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{queston}", r"asks for the field \{queston\}; this row has a, question"),
        (r"in \boxed{}", r"empty field \{\}; write literal braces doubled"),
        ("{question", r"expected '}' before end of string; write literal braces doubled"),
    ],
)
def test_templates_that_cannot_be_filled(template: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        fill_template(template, {"question": "q", "a": 1})


def test_filled_template() -> None:
    assert fill_template(r"{question} \boxed{{}} {a}", {"question": "{x}", "a": 1}) == r"{x} \boxed{} 1"
