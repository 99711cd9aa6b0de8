"""Tokenizers of bytes with the control tokens and chat templates of families; TRL brings most of these, Mistral's is written here."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.models.chat import ChatFormat, chat_format

MISTRAL = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{%- set last = namespace(place=0) %}
{%- for m in turns %}{% if m.role == 'user' %}{% set last.place = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- if tools and loop.index0 == last.place %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
        {{- '[INST] ' + (system if loop.index0 == last.place else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for c in m.tool_calls %}
            {%- if c.id is not defined or c.id | length != 9 %}{{ raise_exception('A call needs an id of nine letters') }}{% endif %}
            {{- '{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + ', "id": "' + c.id + '"}' }}
            {{- ', ' if not loop.last }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id | length != 9 %}{{ raise_exception('A result needs an id of nine letters') }}{% endif %}
        {{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Only user, system, assistant and tool roles are supported') }}
    {%- endif %}
{%- endfor %}
"""
"""As v3 of its instruction format is documented: tools before the last question, calls as a list with ids of nine letters."""

_QWEN = "<|endoftext|> <|im_start|> <|im_end|> <tool_call> </tool_call>"
_LLAMA = (
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|> <|finetune_right_pad_id|>"
)
_BAR, _BLOCK = "\uff5c", "\u2581"
_NAMES = (
    "begin_of_sentence end_of_sentence User Assistant tool_calls_begin tool_calls_end tool_call_begin tool_call_end tool_sep "
    "tool_outputs_begin tool_outputs_end tool_output_begin tool_output_end pad"
)
_R1 = " ".join(f"<{_BAR}{name.replace('_', _BLOCK)}{_BAR}>" for name in _NAMES.split())
_GEMMA = "<bos> <eos> <pad> <start_of_turn> <end_of_turn>"
_MISTRAL = "<s> </s> <pad> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
# Template of TRL or text, tokens, the first token, the last, padding.
FAMILIES: dict[str, tuple[str, str, str | None, str, str]] = {
    "qwen2.5": ("qwen2_5", _QWEN, None, "<|im_end|>", "<|endoftext|>"),
    "qwen3": ("qwen3", f"{_QWEN} <tool_response> </tool_response> <think> </think>", None, "<|im_end|>", "<|endoftext|>"),
    "r1-distill": (
        "deepseek_r1_distill",
        f"{_R1} <think> </think>",
        f"<{_BAR}begin{_BLOCK}of{_BLOCK}sentence{_BAR}>",
        f"<{_BAR}end{_BLOCK}of{_BLOCK}sentence{_BAR}>",
        f"<{_BAR}pad{_BAR}>",
    ),
    "deepseek-v3": (
        "deepseekv3",
        f"{_R1} <think> </think>",
        f"<{_BAR}begin{_BLOCK}of{_BLOCK}sentence{_BAR}>",
        f"<{_BAR}end{_BLOCK}of{_BLOCK}sentence{_BAR}>",
        f"<{_BAR}pad{_BAR}>",
    ),
    "llama3": ("llama3", _LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    "llama3.1": ("llama3_1", _LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    "mistral": (MISTRAL, _MISTRAL, "<s>", "</s>", "<pad>"),
    "gemma": ("gemma", _GEMMA, "<bos>", "<eos>", "<pad>"),
    "glm": ("glm4moe", "<|endoftext|> [gMASK] <sop> <|user|> <|assistant|> <|system|> <|observation|> <tool_call> </tool_call> <arg_key> "
            "</arg_key> <arg_value> </arg_value> <tool_response> </tool_response> <think> </think> <pad>", None, "<|user|>", "<pad>"),
}  # fmt: skip


def family(name: str, **kwargs: Any) -> ChatFormat:
    """A made tokenizer with the template of a family."""
    template, tokens, first, last, pad = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*tokens.split(), *alphabet])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(tokens.split())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=first, eos_token=last, pad_token=pad, clean_up_tokenization_spaces=False, name_or_path=name
    )
    tokenizer.chat_template = (
        template if "{" in template else (files("trl") / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    )
    return chat_format(tokenizer, kwargs)
