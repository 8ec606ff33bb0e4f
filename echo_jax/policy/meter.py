"""What an engine does with its time, in plain counters that its policy keeps.

It measures no device: an engine counts as idle if no turn is in it, and as swapping if a swap of
weights keeps it still.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Generator
from typing import NamedTuple

_RECENT_SECONDS = 60.0  # what the newest rates and shares are of, at least


class Swap(NamedTuple):
    """How long the last `load` took, and how well its probe agreed."""

    version: int
    probe_gap: float  # nats, mean over the probe's tokens of |engine - learner|
    read_seconds: float  # the engine sampled on meanwhile
    drain_seconds: float  # until the turns that ran had ended, or were paused
    load_seconds: float  # then, until the weights were loaded; the engine sampled nothing
    probe_seconds: float  # then, until the probe agreed; only 'drain' lets turns wait for it


class _Totals(NamedTuple):
    """Since the start."""

    seconds: float = 0.0
    idle: float = 0.0  # seconds
    swapping: float = 0.0  # seconds
    tokens: int = 0


class Meter:
    """Counts tokens, and seconds by what the engine does, whatever number of turns overlap.

    A second is `swapping`, `idle` or neither, and never both. A thread may read it while another
    one samples.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """clock: in seconds."""
        self._clock, self._since, self._lock = clock, clock(), threading.Lock()
        self.turns, self._stills = 0, 0  # that are in the engine; that keep it still
        self._totals = _Totals()
        self._reads = collections.deque([self._totals])

    @contextlib.contextmanager
    def turn(self) -> Generator[None]:
        """Holds a turn, from its entry into the engine to its end."""
        self._change(turns=1)
        try:
            yield
        finally:
            self._change(turns=-1)

    @contextlib.contextmanager
    def still(self) -> Generator[None]:
        """Holds the time in which a swap lets the engine sample nothing."""
        self._change(stills=1)
        try:
            yield
        finally:
            self._change(stills=-1)

    def sampled(self, tokens: int) -> None:
        self._change(tokens=tokens)

    def read(self) -> dict[str, float]:
        """Shares of the time since the start, and `..._now` since the youngest read that is a
        minute old, or the start; docs/metrics.md#workers-reports has the names.
        """
        totals, reads = self._change(), self._reads
        while len(reads) > 1 and totals.seconds - reads[1].seconds >= _RECENT_SECONDS:
            reads.popleft()
        before = reads[0]
        reads.append(totals)
        whole, part = max(totals.seconds, 1e-9), max(totals.seconds - before.seconds, 1e-9)
        return {
            'seconds': totals.seconds,
            'idle': totals.idle / whole,
            'idle_now': (totals.idle - before.idle) / part,
            'swapping': totals.swapping / whole,
            'swapping_now': (totals.swapping - before.swapping) / part,
            'sampled_tokens': totals.tokens,
            'tokens_per_sec': (totals.tokens - before.tokens) / part,
        }

    def _change(self, turns: int = 0, stills: int = 0, tokens: int = 0) -> _Totals:
        """Counts the time since the last change by what the engine did, then changes that."""
        with self._lock:
            now, total = self._clock(), self._totals
            passed, self._since = now - self._since, now
            is_swapping = self._stills > 0
            is_idle = not is_swapping and self.turns == 0
            self._totals = _Totals(
                total.seconds + passed,
                total.idle + passed * is_idle,
                total.swapping + passed * is_swapping,
                total.tokens + tokens,
            )
            self.turns += turns
            self._stills += stills
            return self._totals
