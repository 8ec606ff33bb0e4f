"""The export as files; tests/viewer/test_page.py opens them in a browser."""

import json
import re

import pytest

from echo_jax.viewer.site import Site
from echo_jax.viewer.static import export
from tests.support.viewed_run import make_run, write_group, write_rows


@pytest.fixture
def site(tmp_path):
    work = make_run(tmp_path / 'run')
    write_group(work, 0, scored=True)
    write_group(work, 0, store='heldout_before')
    write_rows(work, 1, 4)
    site = Site([work.url()])
    site.runs[0].index.look()
    return site


def test_every_document_is_a_file(site, tmp_path):
    seen = []
    count, size = export(site, tmp_path / 'page', seen.append)
    files = {
        file.relative_to(tmp_path / 'page' / 'data').with_suffix('').as_posix(): file.read_text()
        for file in (tmp_path / 'page' / 'data').rglob('*.js')
    }
    rollouts = {f'run-0/rollout-{s}-0-{i}' for s in ('train', 'heldout_before') for i in range(3)}
    logs = {f'run-0/{log}-0' for log in ('metrics', 'rows', 'scored')}
    assert files.keys() == {'site', 'run-0/glance'} | logs | rollouts
    assert (count, seen) == (len(files), [*range(1, count + 1)])
    for name, text in files.items():
        match = re.fullmatch(r'receive\((".*?"),(.*)\);', text)
        assert json.loads(match[1]) == name
        if name != 'run-0/glance':  # which tells the time
            assert json.loads(match[2]) == site.document(name)
    whole = sum(file.stat().st_size for file in (tmp_path / 'page').rglob('*') if file.is_file())
    assert size == whole and (tmp_path / 'page' / 'site.js').read_text() == 'const LIVE = false;\n'


def test_a_group_that_was_damaged_since_is_left_out(site, tmp_path):
    file = tmp_path / 'run' / 'rollouts' / 'train' / 'groups' / f'{0:012d}'
    file.write_bytes(file.read_bytes()[:-9])
    count, _ = export(site, tmp_path / 'page', lambda count: None)
    files = {file.stem for file in (tmp_path / 'page' / 'data').rglob('*.js')}
    assert {name for name in files if name.startswith('rollout-')} == {
        f'rollout-heldout_before-0-{i}' for i in range(3)
    }
    assert count == len(files)


def test_a_folder_that_holds_something_is_refused_by_name(site, tmp_path):
    folder = tmp_path / 'page'
    folder.mkdir()
    (folder / 'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match=r'page is there already and is not empty; name another'):
        export(site, folder, lambda count: None)
    assert [file.name for file in folder.iterdir()] == ['mine.txt']
    (folder / 'mine.txt').unlink()
    export(site, folder, lambda count: None)  # an empty one is not
    assert (folder / 'index.html').exists()


def test_what_a_killed_export_left_is_no_hindrance(site, tmp_path):
    partial = tmp_path / 'page.partial'
    partial.mkdir()
    (partial / 'old.js').write_text('')
    export(site, tmp_path / 'page', lambda count: None)
    assert not partial.exists() and not (tmp_path / 'page' / 'old.js').exists()
