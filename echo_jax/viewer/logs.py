"""What only grows, read from where a page stands: the rows of metrics, and those of the table.

A page asks for what follows the first n entries. An `epoch` tells it that its entries are of
another log, so that it has to begin again: the viewer was restarted, or a resumed run has taken
rows back.
"""

import array
import json
import threading
import time

import tensorstore as ts

from echo_jax.viewer.text import number, visible

# So many entries are in one document: a page shows the first before it asks for the next.
CHUNK = 10_000
_STARTED = f'{time.time_ns():x}'


def chunk(epoch: int, total: int, start: int, columns: dict[str, list]) -> dict:
    """A document of a log: `columns`, by name, of the entries from `start` on."""
    count = len(next(iter(columns.values()), ()))
    return {
        'epoch': f'{_STARTED}-{epoch}',
        'total': total,
        'start': start,
        'count': count,
        'columns': columns,
    }


class Table:
    """Rows of named columns, which one thread appends and others read."""

    def __init__(self, *columns: str):
        self.columns = columns
        self._rows: list[tuple] = []

    def append(self, *row: object) -> None:
        self._rows.append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> list[tuple]:
        return list(self._rows)

    def document(self, start: int) -> dict:
        rows = self._rows[start : start + CHUNK]
        columns = {name: [row[i] for row in rows] for i, name in enumerate(self.columns)}
        return chunk(0, len(self._rows), start, columns)


class MetricsLog:
    """metrics.jsonl of a run, read again whenever it has changed."""

    CHUNK = 1000  # rows; each has about a hundred numbers

    def __init__(self, kvstore: ts.KvStore):
        self._kvstore = kvstore
        self._lock = threading.Lock()
        self._epoch, self._text = 0, b''
        self._stamp: bytes | None = None
        self.changed = 0.0  # when it was last seen to change, seconds since 1970
        self._clear()

    def _clear(self) -> None:
        # Columns of doubles, NaN where a row has no such number: ten times smaller than objects.
        self._steps: list[int] = []
        self._columns: dict[str, array.array] = {}

    def _look(self) -> None:
        """Reads what is new. Rows are only ever appended, or taken back by a run that resumes."""
        found = self._kvstore.read('metrics.jsonl', if_not_equal=self._stamp).result()
        if found.state == 'unspecified':  # it is as it was
            return
        # A line without its end is still being written.
        text = found.value[: found.value.rfind(b'\n') + 1] if found.state == 'value' else b''
        self._stamp = found.stamp.generation if found.state == 'value' else None
        if text == self._text:
            return
        if not text.startswith(self._text):
            self._clear()
            self._epoch, self._text = self._epoch + 1, b''
        for line in text[len(self._text) :].splitlines():
            row = json.loads(line)
            self._steps.append(int(row.pop('step')))
            for name, value in row.items():
                column = self._columns.setdefault(visible(name), array.array('d'))
                column.extend([float('nan')] * (len(self._steps) - 1 - len(column)))
                column.append(value)
        for column in self._columns.values():
            column.extend([float('nan')] * (len(self._steps) - len(column)))
        self._text, self.changed = text, time.time()

    def document(self, start: int) -> dict:
        with self._lock:
            self._look()
            end = start + self.CHUNK
            columns: dict[str, list] = {'step': self._steps[start:end]}
            for name, column in self._columns.items():
                values = [number(value) for value in column[start:end]]
                if any(value is not None for value in values):
                    columns[name] = values
            return chunk(self._epoch, len(self._steps), start, columns)

    def last(self, count: int) -> tuple[list[int], dict[str, list[float]]]:
        """(steps, columns) of the last rows; a column has only the numbers that are there."""
        with self._lock:
            self._look()
            present = {
                name: [value for value in column[-count:] if value == value]
                for name, column in self._columns.items()
            }
            return self._steps[-count:], {name: v for name, v in present.items() if v}
