"""What docs/metrics.md says of the metrics of a run."""

import re

from tests.support.small_run import ROOT


def table(heading: str) -> dict[str, str]:
    """{name: when it is logged} of the table below a heading of docs/metrics.md."""
    page = (ROOT / 'docs' / 'metrics.md').read_text()
    section = page.partition(f'\n## {heading}\n')[2].partition('\n## ')[0]
    rows = re.findall(r'^\| `([^`]+)` \| [^|]+ \| ([^|]+) \|', section, re.MULTILINE)
    assert rows, f'docs/metrics.md has no table below {heading!r}'
    assert len(rows) == len(dict(rows)), f'a name stands twice below {heading!r}'
    return dict(rows)
