"""What the policy is told before the task (PROTOCOL 1, 2): constants and one function.

Worded afresh with the released prompt's content and tags; knows no tokenizer and no template.
"""

import json

_CALL_FORMAT = """\
To call a function, end your answer with a call of exactly this form:

<tool_call>
<function=example_function>
<parameter=example_parameter>
value
</parameter>
<parameter=another_parameter>
a value that
spans several lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
- A call is an inner <function=...></function> block inside <tool_call></tool_call> tags.
- Required parameters must be given.
- Reason in plain language before a call if you need to, never after it.
</IMPORTANT>"""

_BASE = """\
You are a highly capable Linux terminal agent. You complete the user's task by running commands in \
a shell, one step at a time, and by reading what they print. Check that the task is solved before \
you stop, then call done."""

_BRIEF = 'Solve the task in bash.'

_USER_PREFIX = """\
Think first inside <think></think>, then make your call. The result of a command comes back before \
your next turn. Call done only when you have seen that the task is complete; nothing can be done \
after it.

Task: """


def _tools(command_timeout: int) -> list[dict]:
    """The JSON schemas of `bash` and `done`."""
    command = {'type': 'string', 'description': 'The command to run in the shell.'}
    timeout = {
        'type': 'integer',
        'description': f'Seconds until the command is killed (default {command_timeout}).',
        'default': command_timeout,
    }
    bash = {
        'name': 'bash',
        'description': 'Run a command in the bash shell of the terminal and return its output.',
        'parameters': {
            'type': 'object',
            'properties': {'command': command, 'timeout': timeout},
            'required': ['command'],
        },
    }
    done = {
        'name': 'done',
        'description': 'Say that the task is complete. It takes no parameters.',
        'parameters': {'type': 'object', 'properties': {}, 'required': []},
    }
    return [{'type': 'function', 'function': function} for function in (bash, done)]


def messages(instruction: str, style: str, command_timeout: int) -> list[dict[str, str]]:
    """System and user message of a task; style 'full' (some 400 tokens) or 'brief' (a dozen)."""
    if style == 'brief':
        system, prefix = _BRIEF, ''
    elif style == 'full':
        schemas = '\n'.join(json.dumps(tool) for tool in _tools(command_timeout))
        system = (
            '# Tools\n\nYou have these functions:\n\n'
            f'<tools>\n{schemas}\n</tools>\n\n{_CALL_FORMAT}\n\n{_BASE}'
        )
        prefix = _USER_PREFIX
    else:
        raise ValueError(f"protocol.system_prompt is 'full' or 'brief', not {style!r}")
    return [
        {'role': 'system', 'content': system},
        {'role': 'user', 'content': prefix + instruction},
    ]
