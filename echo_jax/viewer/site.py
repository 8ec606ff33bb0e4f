"""The documents of a page, by name: what the server answers with and the export writes.

site                                  the runs
run-0/glance                          how the first run is
run-0/metrics-N, rows-N, scored-N     what follows the first N entries of a log (logs.py)
run-0/rollout-STORE-GROUP-SAMPLE      one rollout
"""

import collections
import contextlib
import pathlib
import re
import threading
import time
from collections.abc import Generator, Iterator, Sequence

import transformers

from echo_jax.learner.unpredictable import token_bytes
from echo_jax.run.workdir import Workdir, read_tokenizer
from echo_jax.store.kvstore import CorruptError, MissingError, open_kvstore
from echo_jax.types import Rollout
from echo_jax.viewer.glance import glance
from echo_jax.viewer.index import Index
from echo_jax.viewer.logs import CHUNK, MetricsLog
from echo_jax.viewer.rollout import rollout_document
from echo_jax.viewer.text import visible

_KEPT_GROUPS = 8  # of one run, whole, for whoever looks at one rollout after another of a group
_ROLLOUT = re.compile(r'rollout-([\w.-]+)-(\d{1,12})-(-?\d{1,18})', re.ASCII)
_LOG = re.compile(r'(metrics|rows|scored)-(\d{1,12})', re.ASCII)


class Run:
    """What a page shows of one run; it never writes to it."""

    def __init__(self, place: str, name: str):
        """Raises ValueError if there is no run at `place`, a folder or a gs:// URL."""
        self.name = name
        self.work = Workdir.open(place)
        # Not through Workdir.take: in a bucket that would replace the files of a learner here.
        self._kvstore = open_kvstore(self.work.url())
        self.metrics, self.index = MetricsLog(self._kvstore), Index(self.work)
        self._groups: collections.OrderedDict[tuple[str, int], list[Rollout]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()
        self._table: list[bytes] = []

    def document(self, name: str) -> dict | None:
        if name == 'glance':
            return glance(self.work, self._kvstore, self.metrics, self.index, time.time())
        if match := _LOG.fullmatch(name):
            log = {'metrics': self.metrics, 'rows': self.index.rows, 'scored': self.index.surprises}
            return log[match[1]].document(int(match[2]))
        if match := _ROLLOUT.fullmatch(name):
            return self._rollout(match[1], int(match[2]), int(match[3]))
        return None

    def names(self) -> Iterator[str]:
        """The documents of the run as it is now; those of rollouts one group after another."""
        yield 'glance'
        logs = (
            ('metrics', self.metrics.document(0)['total'], self.metrics.CHUNK),
            ('rows', len(self.index.rows), CHUNK),
            ('scored', len(self.index.surprises), CHUNK),
        )
        for log, total, size in logs:
            yield from (f'{log}-{start}' for start in range(0, max(total, 1), size))
        for row in self.index.rows.rows():
            named = dict(zip(self.index.rows.columns, row))
            yield 'rollout-{store}-{group}-{sample}'.format_map(named)

    def _rollout(self, store: str, group_id: int, sample_id: int) -> dict | None:
        try:
            group = self._group(store, group_id)
        except (MissingError, CorruptError):
            return None
        for rollout in group:
            if rollout.sample_id == sample_id:
                table, no_table = self._token_table()
                scores, no_scores = self._scores(store, group_id)
                step = self.index.steps[group_id] if store == 'train' else None
                document = rollout_document(
                    store, group, rollout, scores.get(sample_id), step, self.work.config, table
                )
                document['notes'] += [note for note in (no_table, no_scores) if note]
                return document
        return None

    def _scores(self, store: str, group_id: int) -> tuple[dict, str]:
        try:
            kept = self.index.scores.read_group(group_id) if store == 'train' else None
        except (CorruptError, ValueError) as error:
            return {}, visible(str(error))
        return kept or {}, ''

    def _group(self, store: str, group_id: int) -> list[Rollout]:
        key = (store, group_id)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
        [group] = self.index.store(store).read_groups([group_id])
        with self._lock:
            self._groups[key] = group
            while len(self._groups) > _KEPT_GROUPS:
                self._groups.popitem(last=False)
        return group

    def _token_table(self) -> tuple[list[bytes], str]:
        """The bytes of each token id; ([], why not) if there is no tokenizer here (yet)."""
        with self._lock:
            if self._table:
                return self._table, ''
            path = self.work.config.model.path
            try:
                # Workdir.tokenizer would make one, if the run has none yet.
                if not path and not self.work.take('tokenizer'):
                    raise ValueError(f'{self.work.url()} has no tokenizer yet')
                folder = pathlib.Path(path or self.work.path / 'tokenizer')
                self._table = token_bytes(_tokenizer(folder))
            except (ValueError, OSError) as error:
                return [], f'Tokens are shown as numbers: {visible(str(error))}.'
            return self._table, ''


def _tokenizer(folder: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    file = folder / 'tokenizer.json'
    if not file.exists():
        return read_tokenizer(folder)
    # The same vocabulary in 10 ms. AutoTokenizer takes seconds, and loads PyTorch if it is there.
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))


class Site:
    """All runs of a page."""

    def __init__(self, places: Sequence[str]):
        """Raises ValueError for a place without a run, and for the same place twice."""
        if len({*places}) != len(places):
            raise ValueError(f'--workdir={",".join(places)} names a run twice')
        names: list[str] = []
        for place in places:
            last = visible(place.rstrip('/').rpartition('/')[2]) or 'run'
            names.append(last if last not in names else f'{last} ({len(names) + 1})')
        self.runs = [Run(place, name) for place, name in zip(places, names)]

    @contextlib.contextmanager
    def following(self) -> Generator[None]:
        """Reads the runs, as they go on, for as long as the block runs."""
        with contextlib.ExitStack() as indexes:
            for run in self.runs:
                indexes.enter_context(run.index.following())
            yield

    def document(self, name: str) -> dict | None:
        """None if there is no such document."""
        if name == 'site':
            return {
                'runs': [{'name': run.name, 'url': visible(run.work.url())} for run in self.runs]
            }
        match = re.fullmatch(r'run-(\d{1,4})/(.+)', name, re.ASCII)
        if match is None or int(match[1]) >= len(self.runs):
            return None
        return self.runs[int(match[1])].document(match[2])

    def names(self) -> Iterator[str]:
        """Every document that there is now."""
        yield 'site'
        for i, run in enumerate(self.runs):
            yield from (f'run-{i}/{name}' for name in run.names())
