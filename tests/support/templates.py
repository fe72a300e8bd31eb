"""Small chat templates with the manners of well-known ones: what they take, what they refuse and what they drop."""

from __future__ import annotations

_REFUSE = "{{ raise_exception('%s') }}"
_ALTERNATE = """\
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}"""

GEMMA2 = f"""\
{{%- if messages[0].role == 'system' %}}{_REFUSE % "System role not supported"}{{% endif %}}\
{{%- for message in messages %}}{_ALTERNATE}\
{{{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}}}\
{{{{ message.content | trim + '<end_of_turn>\\n' }}}}{{% endfor %}}\
{{%- if add_generation_prompt %}}{{{{ '<start_of_turn>model\\n' }}}}{{% endif %}}"""

GEMMA3 = f"""\
{{%- if messages[0].role == 'system' %}}{{%- set first = messages[0].content + '\\n\\n' %}}\
{{%- set rest = messages[1:] %}}{{% else %}}{{%- set first = '' %}}{{%- set rest = messages %}}{{% endif %}}\
{{%- for message in rest %}}{_ALTERNATE}\
{{{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}}}\
{{{{ (first if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}}}{{% endfor %}}\
{{%- if add_generation_prompt %}}{{{{ '<start_of_turn>model\\n' }}}}{{% endif %}}"""

PHI4_MINI = """\
{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}\
{%- if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}\
{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}{{ '<|end|>' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

LLAMA3 = """\
{%- if tools %}{{ 'Respond in the format {"name": function name, "parameters": dictionary of argument name}.' }}\
{{- tools | tojson }}{% endif %}\
{%- for message in messages %}\
{%- if message.role == 'tool' %}{{ '<|ipython|>' + (message.content | tojson) + '<|eot|>' }}\
{%- elif 'tool_calls' in message %}\
{%- if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once!') }}{% endif %}\
{%- set call = message.tool_calls[0].function %}\
{{ '<|assistant|>{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot|>' }}\
{%- else %}{{ '<|' + message.role + '|>' + message.content + '<|eot|>' }}{% endif %}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

MISTRAL = """\
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}\
{%- else %}{%- set rest = messages %}{% endif %}{%- set ns = namespace(index=0) %}\
{%- for message in rest %}{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}\
{%- if (message.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{%- set ns.index = ns.index + 1 %}{% endif %}{% endfor %}\
{%- for message in rest %}{%- if message.role == 'user' %}\
{%- if tools and loop.index0 == rest | length - 1 %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) }}{% endif %}\
{{ '[INST]' + (system + '\\n\\n' if loop.first and system is defined else '') + message.content + '[/INST]' }}\
{%- elif message.tool_calls %}{{ '[TOOL_CALLS][' }}{%- for call in message.tool_calls %}\
{%- if call.id | length != 9 %}{{ raise_exception('Tool call IDs should be strings with length 9!') }}{% endif %}\
{{ (call.function | tojson) + (', ' if not loop.last else ']</s>') }}{% endfor %}\
{%- elif message.role == 'tool' %}{%- if message.tool_call_id | length != 9 %}{{ raise_exception('id') }}{% endif %}\
{{ '[TOOL_RESULTS]' + message.content + message.tool_call_id }}\
{%- elif message.role == 'assistant' %}{{ message.content + '</s>' }}\
{%- else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"""

DEEPSEEK = """\
{%- for message in messages %}{%- if message.role == 'system' %}{{ message.content }}{% endif %}{% endfor %}\
{%- if tools %}{{ tools | tojson }}{% endif %}\
{%- for message in messages %}{%- if message.role == 'user' %}{{ '<User>' + message.content }}\
{%- elif message.role == 'assistant' and message.tool_calls is defined and message.content is none %}\
{%- for call in message.tool_calls %}\
{{ '<call>' + call.function.name + '<sep>' + call.function.arguments + '</call>' }}{% endfor %}\
{%- elif message.role == 'assistant' and message.content %}{{ '<Assistant>' + message.content }}\
{%- elif message.role == 'tool' %}{{ '<out>' + message.content }}{% endif %}{% endfor %}\
{%- if add_generation_prompt %}{{ '<Assistant>' + ('<think>' if thinking else '</think>') }}{% endif %}"""

HARMONY = """\
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}\
{%- if messages[0].role == 'system' %}{%- set developer = messages[0].content %}{%- set rest = messages[1:] %}\
{%- else %}{%- set developer = '' %}{%- set rest = messages %}{% endif %}\
{%- if developer or tools %}{{ '<|start|>developer<|message|># Instructions\\n\\n' + developer }}\
{%- for tool in tools or [] %}{{ 'type ' + tool.function.name + ' = ' }}{% endfor %}{{ '<|end|>' }}{% endif %}\
{%- set last = namespace(name=none) %}\
{%- for message in rest %}{%- if message.role == 'assistant' %}\
{%- if '<|channel|>' in message.content %}{{ raise_exception('channel tags') }}{% endif %}\
{%- if 'tool_calls' in message %}{%- set call = message.tool_calls[0].function %}{%- set last.name = call.name %}\
{%- if message.content and message.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}\
{%- if message.content or message.thinking %}\
{{ '<|start|>assistant<|channel|>analysis<|message|>' + (message.content or message.thinking) + '<|end|>' }}{% endif %}\
{{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}\
{{- (call.arguments | tojson) + '<|call|>' }}\
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{% endif %}\
{%- elif message.role == 'tool' %}{%- if last.name is none %}{{ raise_exception('no previous tool call') }}{% endif %}\
{{ '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}\
{{- (message.content | tojson) + '<|end|>' }}\
{%- elif message.role == 'user' %}{{ '<|start|>user<|message|>' + message.content + '<|end|>' }}{% endif %}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

QWEN3 = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}\
{{ '\\n<tools>' + (tools | tojson) + '</tools> within <tool_call></tool_call> tags<|im_end|>\\n' }}\
{%- elif messages[0].role == 'system' %}\
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}\
{%- for message in messages %}\
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}\
{%- if message.reasoning_content and loop.last %}\
{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}{{ message.content }}\
{%- for call in message.tool_calls or [] %}\
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}\
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}\
{%- elif message.role == 'tool' %}\
{{ '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}{% endif %}\
{%- endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}\
{%- if enable_thinking is defined and enable_thinking is false %}\
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

KIMI = """\
{%- if tools %}{{ '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson) + '<|im_end|>' }}{% endif %}\
{%- for message in messages %}{{ '<|im_' + message.role + '|>' }}\
{%- if message.role == 'tool' %}{{ '## Return of ' + message.tool_call_id + '\\n' }}{% endif %}{{ message.content }}\
{%- if message.tool_calls %}{{ '<|tool_calls_section_begin|>' }}{%- for call in message.tool_calls %}\
{{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' + (call.function.arguments | tojson) }}\
{{- '<|tool_call_end|>' }}{% endfor %}{{ '<|tool_calls_section_end|>' }}{% endif %}{{ '<|im_end|>' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_assistant|>' }}{% endif %}"""

TEMPLATES = {
    "kimi": KIMI,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi4_mini": PHI4_MINI,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "deepseek": DEEPSEEK,
    "harmony": HARMONY,
    "qwen3": QWEN3,
}
