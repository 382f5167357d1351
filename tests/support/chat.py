"""Chat templates of the kinds that models have, and a tiny tokenizer that knows their control tokens.

The templates are short, and keep of their kind what makes supervision hard: where the header and the line ends are,
what happens to system text, to old reasoning, to tools.
"""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CHATML = """\
{%- if tools %}{{ "<|im_start|>system\\n# Tools\\n" }}\
{%- for tool in tools %}{{ (tool | tojson) + "\\n" }}{% endfor %}{{ "<|im_end|>\\n" }}{% endif %}
{%- for message in messages %}
    {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] }}
    {%- for call in message["tool_calls"] or [] %}
        {{- "<tool_call>" + (call["function"] | tojson) + "</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
"""A line end after each turn's end token."""

CHATML_TAGGED = """\
{%- for message in messages %}
    {{- "<|im_start|>" + message["role"] + "\\n" }}
    {%- if message["role"] == "assistant" %}
        {%- generation %}{{- message["content"] }}{% endgeneration %}
    {%- else %}
        {{- message["content"] }}
    {%- endif %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
"""Generation tags that leave the end-of-turn token out."""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
    {%- if loop.first and message["role"] == "system" %}{{ "Today: " + date_string + "\\n\\n" }}{% endif %}
    {{- (message["content"] | trim) + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""
"""BOS in the template, of a tokenizer that adds one too; no line end after turns; today's date."""

QWEN3 = """\
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
    {%- if message["role"] == "user" %}{% set ns.last_query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message["role"] == "assistant" %}
        {%- set content = message["content"] %}
        {%- set reasoning = message["reasoning_content"] or "" %}
        {%- if "</think>" in content %}
            {%- set reasoning = content.split("</think>")[0].split("<think>")[-1].strip("\\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- "<think>\\n" + reasoning + "\\n</think>\\n\\n" }}
        {%- endif %}
        {{- content + "<|im_end|>\\n" }}
    {%- elif message["role"] == "tool" %}
        {{- "<|im_start|>user\\n<tool_response>\\n" + message["content"] + "\\n</tool_response><|im_end|>\\n" }}
    {%- else %}
        {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
"""Reasoning of turns before the last question is dropped; the last answer always has a block of it, if an empty one."""

GEMMA = """\
{{- bos_token }}
{%- if messages[0]["role"] == "system" %}
    {%- set prefix = messages[0]["content"] + "\\n\\n" %}{% set rest = messages[1:] %}
{%- else %}
    {%- set prefix = "" %}{% set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {{- "<start_of_turn>" + ("model" if message["role"] == "assistant" else "user") + "\\n" }}
    {{- (prefix if loop.first else "") + (message["content"] | trim) + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}"""
"""System text goes into the first question; roles have to alternate."""

GEMMA_STRICT = (
    '{%- if messages[0]["role"] == "system" %}{{ raise_exception("System role not supported") }}{% endif %}' + GEMMA
)
"""System text is refused."""

MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system="", last_user=-1) %}
{%- for message in messages %}
    {%- if message["role"] == "system" %}{% set ns.system = message["content"] + "\\n\\n" %}{% endif %}
    {%- if message["role"] == "user" %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {{- "[INST] " + (ns.system if loop.index0 == ns.last_user else "") + message["content"] + " [/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}"""
"""System text stands in the last question; there is no header, and nothing that asks for an answer."""

MISTRAL_ASKED = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- set system = messages[0]["content"] + "\\n\\n" if loop.last and messages[0]["role"] == "system" else "" %}
        {{- "[INST] " + system + message["content"] + " [/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}"""
"""System text stands in the last question while nothing follows it, and nowhere in a whole conversation."""

MISTRAL_ASKED_TAGGED = MISTRAL_ASKED.replace(
    '{{- " " + message["content"] + eos_token }}',
    '{%- generation %}{{- " " + message["content"] + eos_token }}{% endgeneration %}',
)

QWEN3_TAGGED = """\
{%- for message in messages %}
    {%- if message["role"] == "assistant" %}
        {% generation %}
        {{- "<|im_start|>assistant\\n<think>\\n" + (message["reasoning_content"] or "") + "\\n</think>\\n\\n" }}
        {{- message["content"] + "<|im_end|>\\n" }}
        {%- endgeneration %}
    {%- else %}
        {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
"""Generation tags around the header and the end, and a block of reasoning in each answer."""

PHI3 = """\
{%- for message in messages %}{{ "<|" + message["role"] + "|>\\n" + message["content"] + "<|im_end|>\\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>\\n" }}{% else %}{{ eos_token }}{% endif %}"""
"""An end token after the last turn, unless an answer is asked for."""

CALLS_AS_TEXT = CHATML.replace(
    '(call["function"] | tojson)', 'call["function"]["name"] + call["function"]["arguments"]'
)
"""Arguments of calls are put into the text as they are."""

HEADED = """\
{%- for message in messages %}
    {{- "<|" + message["role"] + "|>\\n" + message["content"] + eos_token + "\\n" }}
{%- endfor %}"""
"""A header before each turn, but nothing that asks for an answer."""

OPENED = """\
{%- for message in messages %}
    {%- if message["role"] == "assistant" %}{{ "<|assistant|>" + message["content"] + eos_token }}
    {%- else %}{{ "<|user|>" + message["content"] }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|><think>\\n" }}{% endif %}"""
"""What asks for an answer opens a block of reasoning, which answers in the data need not have."""

CONTROL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
)


def tiny_chat_tokenizer(
    chat_template: str | None = None, *, adds_bos: bool = False, eos: str = "</s>", pad: str = "<pad>"
) -> Any:
    """A PreTrainedTokenizerFast: byte-level BPE of a few hundred tokens, with the control tokens of the templates here.

    `adds_bos`: it begins each text with `<s>`, as Llama's do.
    """
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", *dict.fromkeys([eos, pad]), *CONTROL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["assistant user system model What is it? It is the answer, of the user."] * 3, trainer)
    trimming = processors.ByteLevel(trim_offsets=True)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    backend.post_processor = processors.Sequence([trimming, bos]) if adds_bos else trimming
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=list(CONTROL_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
