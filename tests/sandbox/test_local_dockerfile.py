"""What the local sandbox reads in a Dockerfile: instructions, words, variables, refusals."""

import pytest

from echo_jax.sandbox.dockerfiles import lexer, parser
from echo_jax.sandbox.local.dockerfile import Copy, Directory, Run, read_dockerfile

TEXTS = {
    'comment, empty line': b'FROM x\nRUN echo \\\n\n# c\n   b\nENV A=1\n',
    'byte order mark': b'\xef\xbb\xbfFROM x\nRUN a\n',
    'CRLF': b'FROM x\r\nRUN a \\\r\n  b\r\nRUN <<EOF\r\nx\r\nEOF\r\nWORKDIR /a\r\n',
    'escape': b'# escape=`\nFROM x\nRUN a `\n b\\\nENV A=b\n',
    'escaped backslash': b'FROM x\nRUN a\\\\\nRUN \\\n',
    'spaces behind it': b'FROM x\nRUN a \\ \n b\n\\\nENV A 1\n',
    'tab': b'FROM x\nRUN\ta\tb\nWORKDIR\t\t/a b\n',
    'heredocs': b'FROM x\nRUN cat <<A <<-"B C" && echo "<<D" <<<E\na\nA\n\tb\n\tB C\nRUN x\n',
    'quoted heredoc': b"FROM x\nRUN echo $((1<<3)) <<'Q'\n# no comment\n\nq \\\nQ\n",
    'flags': b'FROM x\nRUN --mount=type=cache,target=/x <<E\n\t\\\nE\nCOPY --chmod=6 --link a b\n',
    'json': b'FROM x\nCOPY --chmod=1 ["a <<b", "/x/"]\nRUN ["a", "<<b"]\n',
    'lower case': b'from x as y\nrun a\n',
}


@pytest.mark.parametrize('name', TEXTS)
def test_instructions_are_those_of_buildkits_own_parser(name, tmp_path):
    buildkit = pytest.importorskip('dockerfile')  # BuildKit's parser, in Go
    path = tmp_path / 'Dockerfile'
    path.write_bytes(TEXTS[name])
    ours = [
        (c.line, c.name, c.flags, tuple((h.name, h.content) for h in c.heredocs))
        for c in parser.parse(path).commands
    ]
    theirs = [
        (c.start_line, c.cmd.upper(), c.flags, tuple((h.name, h.content) for h in c.heredocs))
        for c in buildkit.parse_string(TEXTS[name].decode())
    ]
    assert ours == theirs
    rests = [c.rest for c in parser.parse(path).commands if c.name == 'RUN' and c.json() is None]
    assert rests == [
        ''.join(c.value)
        for c in buildkit.parse_string(TEXTS[name].decode())
        if c.cmd.upper() == 'RUN' and not c.json
    ]


def read(tmp_path, text: str):
    path = tmp_path / 'Dockerfile'
    path.write_text(text)
    return read_dockerfile(path)


# Each of these, and what BuildKit (Docker 26.1.5) made of it as ENV V=..., with A=1, EMPTY="" and
# B="two words" before it.
WORDS = {
    'x\\ y': 'x y',
    "'sin$A'": 'sin$A',
    '"d$A"': 'd1',
    '\\$A': '$A',
    '"\\$A\\x\\\\"': '$A\\x\\',
    '$A/bin:${B:-z}': '1/bin:two words',
    '${NONE:-default}': 'default',
    '${NONE-unset}': 'unset',
    '${A:+alt}': 'alt',
    '${NONE:+alt}': '',
    '${NONE+x}': '',
    '${EMPTY:-e1}': 'e1',
    '${EMPTY-e2}': '',
    '${NONE:-${A}}': '1',
    '${NONE:-"q uoted"}': 'q uoted',
    '"${NONE:-in "q"}"': 'in q',
    '$HOME': '',
    '$': '$',
    '$$': '',
    '$1x': 'x',
    '$A.x': '1.x',
    '/opt/x:$PATH': '/opt/x:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
}


@pytest.mark.parametrize('word', WORDS)
def test_variables_are_those_of_buildkit(word, tmp_path):
    before = 'ENV A=1 B="two words" EMPTY=""'
    found = read(tmp_path, f'FROM x\n{before}\nENV V={word}\n')
    assert found.env['V'] == WORDS[word]


def test_a_heredocs_text_keeps_its_quotes():
    # By BuildKit, too.
    text = 'x $A "q" \\$A \\n ${NONE:-d}\n'
    assert lexer.expand(text, {'A': '1'}, quotes=False) == 'x 1 "q" $A n d\n'


def test_env_arg_and_workdir(tmp_path):
    found = read(
        tmp_path,
        'ARG VER=3 BASE=debian\nARG DIR=/opt/${VER}\nFROM ${BASE}\n'
        'ARG VER\nARG DIR\nARG UNSET\nARG OWN="o w n" LATER=${VER}x\n'
        'ENV A=1\nENV A=2 AA=$A\nENV OLD old   "form" $A value\nENV LONG=a\\\nb TAB=a\tTB=2\n'
        "ENV N=${VER} U=${UNSET:-none} q'uo'te=5 O=$OWN$LATER\nENV VER=env\nENV HID=$VER\n"
        'WORKDIR $DIR/./a/../b\nWORKDIR "sub dir"\nRUN x\n',
    )
    assert found.env == {
        'A': '2',
        'AA': '1',
        'OLD': 'old   form 2 value',
        'LONG': 'ab',
        'TAB': 'a',
        'TB': '2',
        'N': '3',
        'U': 'none',
        'quote': '5',
        'O': 'o w n3x',
        'VER': 'env',
        'HID': 'env',
    }
    assert found.workdir == '/opt/3/b/sub dir'
    assert found.steps[:2] == (Directory('/opt/3/b'), Directory('/opt/3/b/sub dir'))
    run = found.steps[2]
    assert run.argv == ('/bin/sh', '-c', 'x') and run.workdir == '/opt/3/b/sub dir'
    # A RUN sees ARG as well; ENV hides an ARG of the same name.
    assert run.env == found.env | {'DIR': '/opt/3', 'OWN': 'o w n', 'LATER': '3x'}


def test_only_the_last_stage_and_its_own_base_count(tmp_path):
    found = read(
        tmp_path,
        'FROM golang AS unused\nUSER nobody\nRUN false\nFROM debian AS Base\nENV A=1\nARG B=2\n'
        'WORKDIR /base\nSHELL ["/bin/bash", "-c"]\nFROM base\nENV C=$A$B\nRUN pwd\n',
    )
    assert (found.workdir, found.env) == ('/base', {'A': '1', 'C': '1'})
    assert found.steps[-1].argv == ('/bin/bash', '-c', 'pwd')
    assert read(tmp_path, 'FROM a AS b\nWORKDIR /src\nFROM c\n').workdir == '/'


def test_run_forms(tmp_path):
    found = read(
        tmp_path,
        'FROM x\nRUN ["a", "b $C"]\nRUN <<EOF\necho $A\nEOF\nRUN <<-EOF\n\techo a\n\tEOF\n'
        "RUN cat <<EOF > /a && cat <<'G' > /b\n$A\nEOF\n$B\nG\nRUN <<EOF\n#!/usr/bin/perl\n1\nEOF\n"
        'RUN --mount=type=tmpfs,target=/mnt --network=none true\n',
    )
    argv = [step.argv for step in found.steps]
    assert argv[0] == ('a', 'b $C')
    assert argv[1][2] == 'echo $A\n'
    assert argv[2][2] == 'echo a\n'
    assert argv[3][2] == "cat <<EOF > /a && cat <<'G' > /b\n$A\nEOF\n$B\nG"
    assert argv[4][-1] == '#!/usr/bin/perl\n1\n'
    assert found.steps[5].empty == ('/mnt',)
    assert all(isinstance(step, Run) for step in found.steps)


def test_copy_forms(tmp_path):
    found = read(
        tmp_path,
        'FROM x\nWORKDIR /w\nENV D=/d\nCOPY a b ./\nCOPY a .\nCOPY ["a b", "$D/c"]\n'
        'COPY --chmod=0640 --chown=root:root a /m\nCOPY <<A <<"B" /t/\n$D\nA\n$D\nB\n'
        'ADD a /z/../y/',
    )
    copies = [step for step in found.steps if isinstance(step, Copy)]
    assert [(c.sources, c.target) for c in copies] == [
        (('a', 'b'), '/w/'),
        (('a',), '/w/'),
        (('a b',), '/d/c'),
        (('a',), '/m'),
        ((), '/t/'),
        (('a',), '/y/'),
    ]
    assert copies[3].mode == 0o640
    assert copies[4].texts == (('A', '/d\n'), ('B', '$D\n'))
    assert copies[5].is_add


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('USER root', 'USER is not followed by the local sandbox: it has one account'),
        ('USER agent', "set sandbox.backend to 'docker'"),
        ('ENTRYPOINT ["/x"]', 'ENTRYPOINT is not followed'),
        ('HEALTHCHECK CMD true', 'environment.healthcheck'),
        ('VOLUME /data', 'VOLUME is not followed'),
        ('ONBUILD RUN x', 'ONBUILD is not followed'),
        ('COPY --from=b /x /y', 'COPY --from=b is not followed.*all stages are its one system'),
        ('COPY --chown=nobody a /y', 'COPY --chown=nobody is not followed.*one account'),
        ('COPY --parents a /y', 'this option is not known'),
        ('COPY a b /y', 'several sources need a target that ends in /'),
        ('COPY a', 'expected COPY SOURCE... TARGET'),
        ('ADD https://example.com/x /y', 'ADD https.* is not followed.*no network'),
        ('RUN --mount=type=secret,id=x true', 'RUN --mount=type=secret.* is not followed'),
        ('RUN --mount=type=bind,target=/x true', 'only mounts of type tmpfs and cache'),
        ('RUN', 'RUN without a command'),
        ('RUN <<EOF\nx', 'the heredoc <<EOF never ends'),
        ('FETCH x', 'FETCH is no instruction'),
        ('ENV A', 'expected ENV NAME=VALUE'),
        ('ENV A="b', 'lacks a "'),
        ('ENV A-B=1', "'A-B' is no name"),
        ('ENV A=${B%x}', 'has a form of'),
        ('ENV A=${B:?wanted}', 'B is not set; wanted'),
        ('WORKDIR $NONE', 'expected a directory'),
        ('SHELL bash', 'expected .*PROGRAM'),
    ],
)
def test_refusals_name_the_line_and_the_reason(line, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, f'FROM x\n{line}\n')
    assert '\n' not in str(caught.value) and 'Dockerfile:2: ' in str(caught.value)


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'FROM x\nRUN echo \xff\n', 'is not UTF-8'),
        (b'', 'has no FROM'),
        (b'RUN x\nFROM y\n', 'RUN comes before FROM'),
        (b'FROM x y\n', 'expected FROM IMAGE'),
        (b'# escape=x\nFROM x\n', 'expected'),
    ],
)
def test_files_that_are_no_dockerfile(data, message, tmp_path):
    (tmp_path / 'Dockerfile').write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_dockerfile(tmp_path / 'Dockerfile')
    assert '\n' not in str(caught.value)


def test_what_has_no_effect_on_a_task_is_read_past(tmp_path):
    lines = 'LABEL a=b\nEXPOSE 80\nMAINTAINER me\nSTOPSIGNAL SIGINT\nCMD ["x"]\nHEALTHCHECK NONE\n'
    assert read(tmp_path, f'FROM x\n{lines}ENTRYPOINT []\n').steps == ()
