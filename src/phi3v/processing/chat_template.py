"""The text of a chat, in jinja: the published template, and ours, which takes content as blocks too."""

from __future__ import annotations

# In tokenizer_config.json of both released models: content is text, with numbered image tags in it.
OFFICIAL_CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\n' -}}{% endif %}"
)

# Writes what the model is trained on (`conversation.encode_conversation`): BOS first; images that come before all text
# of their turn on a line of their own; after the last answer the end of the text. The marks of generation enclose what
# is supervised there.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set seen = namespace(images=0) -%}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("role '" ~ message['role'] ~ "': this model knows system, user and assistant") -}}
    {%- endif -%}
    {%- if tools or message['tool_calls'] -%}
        {{- raise_exception('this model knows no tools') -}}
    {%- endif -%}
    {%- set part = namespace(images='', text='', inline=false) -%}
    {%- if message['content'] is string -%}
        {%- set part.text = message['content'] -%}
    {%- else -%}
        {%- for block in message['content'] -%}
            {%- if block['type'] == 'text' -%}
                {%- set part.text = part.text ~ block['text'] -%}
            {%- elif block['type'] != 'image' -%}
                {{- raise_exception("content of type '" ~ block['type'] ~ "': this model takes text and image") -}}
            {%- else -%}
                {%- set seen.images = seen.images + 1 -%}
                {%- if part.text -%}
                    {%- set part.text = part.text ~ '<|image|>' -%}
                    {%- set part.inline = true -%}
                {%- else -%}
                    {%- set part.images = part.images ~ '<|image|>' -%}
                {%- endif -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set content = part.images ~ ('\n' if part.images and not part.inline else '') ~ part.text -%}
    {{- '<|' ~ message['role'] ~ '|>\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- content ~ '<|end|>\n' ~ ('<|endoftext|>' if loop.last else '') -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- content ~ '<|end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
    {{- '<|assistant|>\n' -}}
{%- endif -%}
"""

# The same with numbered tags.
NUMBERED_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("'<|image|>'", "'<|image_' ~ seen.images ~ '|>'")
