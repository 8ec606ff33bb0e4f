"""What a Dockerfile is built from: the context that Docker would send, and the images it names.

Knows nothing of engines. Of a Dockerfile only the images that it names are looked for; everything
else in it is the builder's to read.
"""

import fnmatch
import pathlib
import re

from docker.utils.build import exclude_paths

from echo_jax.sandbox import channels
from echo_jax.sandbox.dockerfiles import lexer, parser

_FROM = re.compile(r'(?:--from=|--mount=(?:.*,)?from=)([^,]+)')
# What BuildKit sets before the first FROM, from the engine's machine.
_OF_THE_PLATFORM = [
    f'{where}{what}'
    for where in ('TARGET', 'BUILD')
    for what in ('ARCH', 'OS', 'OSVERSION', 'PLATFORM', 'VARIANT')
]
_UNKNOWN = '$'  # stands for it; no image has it in its name


def pack(environment: pathlib.Path) -> bytes:
    """`environment` as a tar archive, modes as they are, without what `.dockerignore` names.

    The engine itself would not leave that out. Raises ValueError for a link that leads outside.
    """
    only = None
    for name in ('Dockerfile.dockerignore', '.dockerignore'):
        if (environment / name).is_file():
            text = (environment / name).read_text('utf-8-sig', errors='replace')
            lines = [line.strip() for line in text.splitlines()]
            patterns = [line for line in lines if line and not line.startswith('#')]
            kept = exclude_paths(str(environment), list(patterns))
            if any(fnmatch.fnmatch(name, pattern.removeprefix('**/')) for pattern in patterns):
                kept.discard(name)  # which the SDK keeps, for older engines to read
            parents = (str(p) for path in kept for p in pathlib.PurePath(path).parents)
            only = {*kept, *parents}
            break
    return channels.archive(environment, '.', keep_modes=True, only=only)


def bases(parsed: parser.Parsed) -> list[str]:
    """The images that a Dockerfile names in FROM, COPY and RUN --mount, in order, each once.

    Stages of its own and `scratch` are not among them, and neither is a name that depends on the
    platform or that the builder would refuse: such a one is left to the builder.
    """
    found = [parsed.syntax] if parsed.syntax else []
    arguments = dict.fromkeys(_OF_THE_PLATFORM, _UNKNOWN)
    stages = {'scratch'}
    in_stage = False
    for command in parsed.commands:
        if command.name == 'ARG' and not in_stage:
            for word in lexer.split_words(command.rest, parsed.escape):
                name, given, value = word.partition('=')
                if given:
                    arguments[name] = _expand(value, arguments, parsed.escape)
        elif command.name == 'FROM':
            in_stage = True
            words = [_expand(word, arguments, parsed.escape) for word in command.rest.split()]
            if words and words[0].lower() not in stages:
                found.append(words[0])
            if len(words) == 3 and words[1].lower() == 'as':
                stages.add(words[2].lower())
        elif command.name in ('COPY', 'RUN'):
            sources = [match[1] for flag in command.flags if (match := _FROM.match(flag))]
            found += [s for s in sources if s.lower() not in stages and not s.isdigit()]
    return [image for image in dict.fromkeys(found) if image and '$' not in image]


def _expand(text: str, arguments: dict[str, str], escape: str) -> str:
    try:
        return lexer.expand(text, arguments, escape)
    except ValueError:  # a form that only the builder knows
        return _UNKNOWN
