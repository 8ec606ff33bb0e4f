"""A local web page over one or several runs, finished or going on: curves, rollouts, tokens.

    python -m echo_jax.view --workdir=runs/machine
    python -m echo_jax.view --workdir=runs/machine,gs://bucket/run --port=8010
    python -m echo_jax.view --workdir=runs/machine --export=runs/machine-page

It prints a link to open, and reads the runs again as they go on; it writes nothing to them.
Whatever is looked at is in the page's address, so that it can be sent. It listens on this machine
alone unless --host says otherwise, and then whoever opens it needs the token that is in the link.
--export writes the same page as files, which a browser opens without a server. It needs no
accelerator and no JAX.
"""

import pathlib
import secrets
from collections.abc import Sequence

from absl import flags

from echo_jax.run import entry
from echo_jax.run.report import CONSOLE, Progress
from echo_jax.viewer.server import LOOPBACK, link, listen, make_server
from echo_jax.viewer.site import Site
from echo_jax.viewer.static import check_folder, export

_BYTES_A_TOKEN = 20  # of an exported rollout, roughly; twice that if scores are kept

_WORKDIR = flags.DEFINE_list(
    'workdir', None, 'Folders or gs:// URLs of runs, with commas between them.', required=True
)
_PORT = flags.DEFINE_integer(
    'port', 8008, 'Port to listen on; 0: any that is free.', lower_bound=0, upper_bound=65535
)
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on; 0.0.0.0: all of them.')
_TOKEN = flags.DEFINE_string(
    'token', '', 'What a browser has to know; empty: none on loopback, elsewhere one is made.'
)
_EXPORT = flags.DEFINE_string('export', '', 'Folder to write the page to as files, instead.')


def _export(site: Site, folder: pathlib.Path) -> None:
    for run in site.runs:
        more = run.index.look()
        with Progress(f'read {run.name}', run.index.found) as progress:
            while more:
                progress.show(run.index.read)
                more = run.index.look()
        for problem in run.index.problems.values():
            CONSOLE.print(f'left out: {problem}', markup=False, soft_wrap=True)
    rows = [row for run in site.runs for row in run.index.rows.rows()]
    tokens = sum(row[site.runs[0].index.rows.columns.index('tokens')] for row in rows)
    CONSOLE.print(
        f'{len(rows):,} rollouts of {tokens:,} tokens, a file each: about '
        f'{(5e6 + tokens * _BYTES_A_TOKEN) / 1e6:,.0f} MB'
    )
    documents = sum(1 for _ in site.names())
    with Progress('write', documents) as progress:
        count, size = export(site, folder, progress.show)
    CONSOLE.print(
        f'{count:,} documents, {size / 1e6:,.0f} MB: open {folder / "index.html"}', soft_wrap=True
    )


def main(argv: Sequence[str]) -> None:
    del argv
    places = [place for place in _WORKDIR.value if place]
    if not places:
        raise ValueError('--workdir names no run; give a folder or a gs:// URL')
    if _EXPORT.value:
        given = [name for name in ('port', 'host', 'token') if flags.FLAGS[name].present]
        if given:
            raise ValueError(f'--{given[0]} has no effect with --export, which serves nothing')
        folder = pathlib.Path(_EXPORT.value)
        check_folder(folder)  # now, not after all the reading
        _export(Site(places), folder)
        return
    if _TOKEN.value and len(_TOKEN.value) < 8:
        raise ValueError('--token has fewer than 8 characters; leave it out to have one made')
    site = Site(places)
    token = _TOKEN.value or ('' if _HOST.value in LOOPBACK else secrets.token_urlsafe(24))
    with listen(_HOST.value, _PORT.value) as listening, site.following():
        where = link(_HOST.value, listening.getsockname()[1], token)
        CONSOLE.print(f'open {where} (Ctrl-C ends it)', markup=False, soft_wrap=True)
        make_server(site, listening, token).run(sockets=[listening])


if __name__ == '__main__':
    entry.run(main)
