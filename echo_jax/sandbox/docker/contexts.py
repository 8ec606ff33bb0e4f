"""What a Dockerfile is built from: the context that Docker would send, and the images it names.

Knows nothing of engines. Dockerfiles are read by hand here, and only for the images that they name:
`dockerfile-parse` knows no heredocs, so it takes a line of Python such as `from flask import Flask`
for a stage. Everything else in a Dockerfile is the builder's to read.
"""

import fnmatch
import pathlib
import re
from collections.abc import Iterator

from docker.utils.build import exclude_paths

from echo_jax.sandbox import channels

_HEREDOC = re.compile(r'<<(-?)(["\']?)([A-Za-z_][A-Za-z0-9_]*)\2')
_VARIABLE = re.compile(r'\$(?:(\w+)|\{(\w+)(?:(:?[-+])([^}]*))?\})')


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


def bases(dockerfile: str) -> list[str]:
    """The images that a Dockerfile names in FROM and COPY --from, in order, each once.

    Stages of its own and `scratch` are not among them, and neither is a name whose variables have
    no value in the file, which the builder refuses.
    """
    found: list[str] = []
    arguments: dict[str, str] = {}
    stages = {'scratch'}
    syntax = re.match(r'#\s*syntax\s*=\s*(\S+)', dockerfile.removeprefix('\ufeff'))
    if syntax:
        found.append(syntax[1])
    in_stage = False
    for word, rest in _instructions(dockerfile):
        if word == 'ARG' and not in_stage:
            for item in rest.split():
                name, _, value = item.partition('=')
                arguments[name] = _substitute(value.strip('"\''), arguments)
        elif word == 'FROM':
            in_stage = True
            words = [w for w in rest.split() if not w.startswith('--')]
            image = _substitute(words[0].strip('"\''), arguments) if words else ''
            if image.lower() not in stages:
                found.append(image)
            if len(words) == 3 and words[1].lower() == 'as':
                stages.add(words[2].lower())
        elif word == 'COPY':
            sources = re.findall(r'(?:^|\s)--from=(\S+)', rest)
            found += [s for s in sources if s.lower() not in stages and not s.isdigit()]
    return [image for image in dict.fromkeys(found) if image and '$' not in image]


def _instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """(instruction in capitals, the rest), continued lines joined, heredocs' bodies left out."""
    lines = iter(dockerfile.removeprefix('\ufeff').splitlines())
    escape = '`' if re.search(r'\A(#.*\n)*#\s*escape\s*=\s*`', dockerfile) else '\\'
    for line in lines:
        text = ''
        while True:
            if not line.lstrip().startswith('#'):  # not even within an instruction
                text += line.rstrip().removesuffix(escape) + ' '
                if not line.rstrip().endswith(escape):
                    break
            elif not text:
                break
            line = next(lines, '')
            if not line and text:
                break
        word, _, rest = text.strip().partition(' ')
        if '\t' in word:
            word, _, rest = text.strip().partition('\t')
        if not word:
            continue
        word = word.upper()
        if word in ('RUN', 'COPY', 'ADD'):
            for dash, _, end in _HEREDOC.findall(rest):
                for body in lines:
                    if (body.lstrip('\t') if dash else body) == end:
                        break
        yield word, rest.strip()


def _substitute(text: str, values: dict[str, str]) -> str:
    """`text` with `$NAME` and `${NAME:-default}` filled in; what has no value stays as it is."""

    def value(match: re.Match) -> str:
        name, sign, other = match[1] or match[2], match[3] or '', match[4] or ''
        is_set = name in values and (values[name] != '' or not sign.startswith(':'))
        if sign.endswith('-'):
            return values[name] if is_set else other
        if sign.endswith('+'):
            return other if is_set else ''
        return values.get(name, match[0])

    return _VARIABLE.sub(value, text)
