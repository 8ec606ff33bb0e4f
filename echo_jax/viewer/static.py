"""The page and all its documents as files, which a browser opens without a server.

A page from a file may not fetch other files, but it may run scripts beside it. So each document is
a script that hands it over: `receive("run-0/glance", {...});`
"""

import json
import pathlib
import shutil
from collections.abc import Callable

from echo_jax.viewer.assets import page_files, plotly_script
from echo_jax.viewer.site import Site


def check_folder(folder: pathlib.Path) -> None:
    """Raises ValueError unless the folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} is there already and is not empty; name another --export')


def export(site: Site, folder: pathlib.Path, show: Callable[[int], None]) -> tuple[int, int]:
    """Writes everything of `site` into `folder`; returns the numbers of documents and of bytes.

    `show(documents)` is called as it goes on. The folder appears when all of it is written.
    """
    check_folder(folder)
    partial = folder.with_name(folder.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    size, count = 0, 0
    for name, body in {**page_files(live=False), 'plotly.js': plotly_script()}.items():
        size += _write(partial / name, body)
    for name in site.names():
        document = site.document(name)
        if document is None:
            continue  # the group was removed, or damaged, since it was read
        text = json.dumps(document, allow_nan=False, separators=(',', ':'))
        size += _write(
            partial / 'data' / f'{name}.js', f'receive({json.dumps(name)},{text});'.encode()
        )
        count += 1
        show(count)
    partial.rename(folder)
    return count, size


def _write(file: pathlib.Path, body: bytes) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.write_bytes(body)
