"""The pages of docs/: citations and links lead somewhere, the tables of metrics are complete."""

import ast
import json
import pathlib
import re
from collections.abc import Iterable, Iterator

import pytest

from echo_jax.agent import observations
from echo_jax.agent.observations import describe
from echo_jax.agent.protocol import format_warnings, parse_response
from echo_jax.sandbox import CommandResult
from tests.support.metrics_page import table

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / 'docs').glob('*.md'))
README = ROOT / 'README.md'
# What may cite a page: code, recipes, scripts and the pages themselves.
CITING = ('echo_jax', 'configs', 'tests', 'launch', 'experiments', 'docs')
SUFFIXES = {'.py', '.sh', '.md', '.jinja', '.toml'}

_CITATION = re.compile(r'\bdocs/(\w+\.md)(?:#([\w-]+))?')
_LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')
_HEADING = re.compile(r'^#{1,6} +(.+?)\s*$', re.MULTILINE)
_FENCE = re.compile(r'^(```|~~~).*?^\1[^\n]*$', re.MULTILINE | re.DOTALL)
# How the law was cited while it was not in the repository.
_OLD_LAW = re.compile(r'\b(?:DESIGN|PROTOCOL|PAPER)(?:\.md\b|,? (?:section |rule )?\d)')


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page, the second of a name with -1."""
    found: dict[str, int] = {}
    result = set()
    for heading in _HEADING.findall(_FENCE.sub('', page)):
        text = _LINK.sub(lambda link: link[0][1 : link[0].index(']')], heading)
        anchor = re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-')
        count = found.get(anchor, 0)
        found[anchor] = count + 1
        result.add(f'{anchor}-{count}' if count else anchor)
    return result


def bad_citations(text: str) -> list[str]:
    """The citations docs/PAGE.md#anchor in a text that lead to no page or no heading of it."""
    bad = []
    for citation in _CITATION.finditer(text):
        page, anchor = citation.groups()
        file = ROOT / 'docs' / page
        if not file.is_file() or (anchor and anchor not in anchors(file.read_text())):
            bad.append(citation[0])
    return bad


def bad_links(text: str, folder: pathlib.Path) -> list[str]:
    """The relative links of a Markdown text that lead to no file, or to no heading of a page."""
    bad = []
    for target in _LINK.findall(_FENCE.sub('', text)):
        if re.match(r'[a-z]+:', target):  # https:, mailto:
            continue
        path, _, anchor = target.partition('#')
        file = folder / path
        if path and not file.exists():
            bad.append(target)
        elif anchor:
            page = file.read_text() if path else text
            bad += [target] if anchor not in anchors(page) else []
    return bad


def old_citations(text: str) -> list[str]:
    """Citations of pages that are not in the repository, as "DESIGN" with a section's number."""
    return _OLD_LAW.findall(text)


def texts() -> Iterator[tuple[str, str]]:
    """(name, text) of every file that may cite a page."""
    files = [README] + [file for folder in CITING for file in sorted((ROOT / folder).rglob('*'))]
    for file in files:
        if file.is_file() and file.suffix in SUFFIXES and file != pathlib.Path(__file__):
            yield str(file.relative_to(ROOT)), file.read_text()


def rooms() -> set[str]:
    """The files that are named in the section on rooms of docs/design.md."""
    page = (ROOT / 'docs' / 'design.md').read_text()
    section = page.partition('\n## Rooms\n')[2].partition('\n## ')[0]
    return {name for name in re.findall(r'`([\w/]+\.py)`', section) if 'test' not in name}


def quoted_messages(page: str) -> set[str]:
    """What the first column of a page's tables quotes, in pieces without what a program fills in.

    Upper-case words and `...` stand for that.
    """
    column = re.findall(r'^\| (`.+?) \|', page, re.MULTILINE)
    quotes = [quote for cell in column for quote in re.findall(r'`([^`]+)`', cell)]
    pieces = [re.split(r"\.\.\.|'jax'|\b(?:N|M|KEY)\b", quote) for quote in quotes]
    return {piece.strip(' ;:,') for some in pieces for piece in some if len(piece.strip()) > 8}


def strings_of_the_code() -> str:
    """Every string of echo_jax's Python, one a line, and the launch scripts as they stand."""
    strings = [file.read_text() for file in sorted((ROOT / 'launch').rglob('*.sh'))]
    for file in sorted((ROOT / 'echo_jax').rglob('*.*')):
        if file.suffix == '.sh':
            strings.append(file.read_text())
        for node in ast.walk(ast.parse(file.read_text())) if file.suffix == '.py' else ():
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, 'value', '') for part in node.values]
                strings.append(''.join(part if isinstance(part, str) else '{}' for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return '\n'.join(strings)


def differences(documented: dict[str, str], logged: Iterable[Iterable[str]]) -> list[str]:
    """How the rows that were logged differ from a table; empty if they agree."""
    rows = [set(names) for names in logged]
    some, every = set().union(*rows), set.intersection(*rows)
    always = {name for name, when in documented.items() if when.strip() == 'always'}
    return sorted(
        [f'{name} is logged and not in the table' for name in some - documented.keys()]
        + [f'{name} is not logged in every row' for name in always - every]
    )


# ------------------------------------------------------------------------- the repository


def test_every_citation_leads_to_a_heading():
    cited = [(name, bad) for name, text in texts() for bad in bad_citations(text)]
    assert cited == []


def test_every_link_of_the_pages_leads_to_a_file():
    pages = [README, ROOT / 'launch' / 'README.md', *PAGES]
    assert [
        (page.name, bad) for page in pages for bad in bad_links(page.read_text(), page.parent)
    ] == []


def test_nothing_cites_what_is_not_in_the_repository():
    assert [(name, old) for name, text in texts() for old in old_citations(text)] == []


def test_the_pages_that_the_code_cites_are_there():
    names = {'design', 'protocol', 'configuration', 'metrics', 'adding', 'troubleshooting'}
    assert {page.stem for page in PAGES} >= names | {'deviations'}


def test_the_page_of_the_design_names_every_module():
    named = rooms()
    package = {
        str(file.relative_to(ROOT / 'echo_jax')) for file in (ROOT / 'echo_jax').rglob('*.py')
    }
    modules = {name for name in package if not name.endswith('__init__.py')}
    missing = {name for name in modules if not {name, pathlib.Path(name).name} & named}
    assert missing == set()
    files = package | {pathlib.Path(name).name for name in package}
    assert named - files == set()


def test_the_metrics_are_made_where_the_page_says():
    page = (ROOT / 'docs' / 'metrics.md').read_text()
    places = set(re.findall(r' \| (\w+(?:/\w+)*\.py): ([\w.]+) \| ', page))
    assert len(places) > 10
    wrong = {
        (file, name)
        for file, name in places
        if not re.search(
            rf'(def|class) {name.rpartition(".")[2]}\b', (ROOT / 'echo_jax' / file).read_text()
        )
    }
    assert wrong == set()


def test_the_texts_of_the_protocol_are_those_of_the_code():
    page = (ROOT / 'docs' / 'protocol.md').read_text()
    lines = {line.strip() for line in page.splitlines()}
    ran = CommandResult(stdout='{out}', stderr='', exit_code=0, timed_out=False)
    described = ''.join(span.text for span in describe('{cmd}', ran, 0, 'start'))
    expected = {
        *described.split('\n\n'),
        observations.NO_COMMANDS.text,
        parse_response('').error,
        parse_response('hello').error,
        parse_response('<tool_call></tool_call>').commands[0].error,
        parse_response('<tool_call><function=bash></tool_call>').commands[0].error,
    }
    assert expected - lines == set()
    patterns = [re.sub(r'<(?:TAG|A|B)>', r'<\\w+>', re.escape(line)) for line in lines]
    patterns = [re.sub(r'\bN\b', r'\\d+', pattern) for pattern in patterns]
    warnings = format_warnings('<think><tool_call></tool_call> a <tool_call>')
    assert len(warnings) == 7
    assert [w for w in warnings if not any(re.fullmatch(p, w) for p in patterns)] == []


def test_the_messages_that_are_explained_are_the_codes():
    page = (ROOT / 'docs' / 'troubleshooting.md').read_text().partition('## Flags and config')[2]
    messages, code = quoted_messages(page), strings_of_the_code()
    assert len(messages) > 80
    assert {message for message in messages if message not in code} == set()


# --------------------------------------------------------------------------- what a run logs


@pytest.mark.parametrize('name', ['metrics.jsonl', 'warm_start.jsonl'])
def test_every_metric_that_a_run_logs_is_described(finished, name):
    lines = (finished / name).read_text().splitlines()
    assert differences(table(name), map(json.loads, lines)) == []


def test_the_summary_is_described(finished):
    summary = json.loads((finished / 'summary.json').read_text())
    assert differences(table('summary.json'), [summary]) == []
    output = {f'env_ce_output_{when}' for when in ('before', 'after')}  # if there is any
    assert table('summary.json').keys() - summary.keys() <= output


# ------------------------------------------------------------------------ the checks themselves


def test_anchors_are_githubs():
    page = '# A page\n## Appending an observation\n## `a_b`: what, it is?\n## Twice\n## Twice\n'
    page += '```\n# no heading\n```\n### See [this](that.md)\n'
    assert anchors(page) == {
        *('a-page', 'appending-an-observation', 'a_b-what-it-is', 'twice', 'twice-1', 'see-this')
    }


def test_a_bad_citation_is_found():
    page = 'docs/' + 'design.md'
    assert bad_citations(f'"""See {page}#token-roles, and ({page})."""') == []
    assert bad_citations(f'see {page}#no-such-heading') == [f'{page}#no-such-heading']
    assert bad_citations('see docs/' + 'nothing.md') == ['docs/' + 'nothing.md']


def test_a_bad_link_is_found():
    good = '[a](design.md#rooms) [b](https://arxiv.org) [c](#here) [d](../README.md)\n## Here\n'
    assert bad_links(good, ROOT / 'docs') == []
    bad = '[a](design.md#here) [b](no.md) [c](#there)'
    assert bad_links(bad, ROOT / 'docs') == ['design.md#here', 'no.md', '#there']


def test_an_old_citation_is_found():
    old = [
        '(DESIGN' + ' 3.1)',
        'PROTOCOL' + ' 15 says',
        'of PROTOCOL' + '.md',
        'DESIGN' + ' section 5',
    ]
    assert [len(old_citations(text)) for text in old] == [1, 1, 1, 1]
    assert old_citations('the design, 3 of them; class Protocol: 7 fields') == []


def test_quoted_messages_are_found():
    row = '| `mesh ... does not fit N devices`, `too short` | a cause `of no interest` | a way |'
    assert quoted_messages(f'{row}\n') == {'does not fit', 'too short'}
    assert 'expected a local Hugging Face directory' in strings_of_the_code()


def test_a_metric_that_is_missing_or_too_many_is_found():
    documented = {'a': 'always', 'b': 'if there are any'}
    assert differences(documented, [{'a', 'b'}, {'a'}]) == []
    assert differences(documented, [{'a', 'c'}]) == ['c is logged and not in the table']
    assert differences(documented, [{'a'}, {'b'}]) == ['a is not logged in every row']
