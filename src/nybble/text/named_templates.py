"""Chat templates that a user can choose by name when a model's file has none."""

from __future__ import annotations

# The system message of formats without a system role goes before the first user message.
_FOLD_SYSTEM = (
    "{%- if messages and messages[0].role == 'system' -%}"
    "{%- set system = messages[0].content + '\n\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
)

TEMPLATES = {
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    "llama2": (
        "{%- if messages and messages[0].role == 'system' -%}"
        "{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}"
        "{%- set turns = messages[1:] -%}"
        "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
        "{%- for message in turns -%}"
        "{%- if message.role == 'user' -%}"
        "{{- bos_token + '[INST] ' + (system if loop.first else '')"
        " + message.content.strip() + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + message.content.strip() + ' ' + eos_token -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n'"
        " + message.content.strip() + '<|eot_id|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}"
        "{%- endif -%}"
    ),
    "phi3": (
        "{%- for message in messages -%}"
        "{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
    ),
    "gemma": (
        "{{- bos_token -}}" + _FOLD_SYSTEM + "{%- for message in turns -%}"
        "{%- set role = 'model' if message.role == 'assistant' else message.role -%}"
        "{{- '<start_of_turn>' + role + '\n' + (system if loop.first else '')"
        " + message.content.strip() + '<end_of_turn>\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
    ),
    "mistral": (
        "{{- bos_token -}}" + _FOLD_SYSTEM + "{%- for message in turns -%}"
        "{%- if message.role == 'user' -%}"
        "{{- '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + message.content.strip() + eos_token -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "zephyr": (
        "{%- for message in messages -%}"
        "{{- '<|' + message.role + '|>\n' + message.content + eos_token + '\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
    ),
}
