"""A run in a bucket is looked at as one in a folder is, and nothing of it is written."""

import pytest

from echo_jax.run.workdir import Workdir
from echo_jax.store.kvstore import open_kvstore
from echo_jax.viewer.site import Site
from tests.support.buckets import serving
from tests.support.viewed_run import make_run, write_group, write_rows

pytestmark = pytest.mark.slow


def test_a_run_in_a_bucket(tmp_path, monkeypatch):
    with serving() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'learner'))
        made = make_run(tmp_path / 'run')
        work = Workdir('gs://bucket/run', made.config)
        write_group(work, 0, scored=True)
        write_rows(work, 1, 2)
        (made.path / 'tokenizer').rename(work.path / 'tokenizer')
        work.share('tokenizer', 'metrics.jsonl')
        bucket = open_kvstore('gs://bucket/run')
        keys = {key: bucket.read(key).result().stamp.generation for key in bucket.list().result()}
        write_rows(work, 3, 3)  # what the learner has not shared yet

        site = Site(['gs://bucket/run'])  # on the learner's own machine
        [run] = site.runs
        run.index.look()
        assert site.document('run-0/rows-0')['total'] == 3
        assert site.document('run-0/scored-0')['total'] == 2
        assert site.document('run-0/metrics-0')['columns']['step'] == [1, 2]
        assert site.document('run-0/glance')['step'] == 2
        text = ''.join(site.document('run-0/rollout-train-0-0')['text'])
        assert 'notes-0.txt' in text
        # The learner's own file, which it goes on writing to, is as it was.
        assert (work.path / 'metrics.jsonl').read_text().count('\n') == 3
        after = {key: bucket.read(key).result().stamp.generation for key in bucket.list().result()}
        assert after == keys

        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'another'))
        [run] = Site(['gs://bucket/run']).runs  # and from another machine
        run.index.look()
        assert 'notes-0.txt' in ''.join(run.document('rollout-train-0-0')['text'])
