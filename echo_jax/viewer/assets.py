"""The files of the page itself, which the server and the export both hand out.

page/ is plain HTML, CSS and JavaScript, as it lies there. plotly.js, which draws the curves, comes
out of the Python package plotly.
"""

import importlib.resources

TYPES = {
    '.html': 'text/html; charset=utf-8',
    '.css': 'text/css; charset=utf-8',
    '.js': 'text/javascript; charset=utf-8',
}


def page_files(live: bool) -> dict[str, bytes]:
    """By name. `site.js` tells the page whether a server answers it or files do."""
    folder = importlib.resources.files('echo_jax.viewer') / 'page'
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return files | {'site.js': b'const LIVE = %s;\n' % (b'true' if live else b'false')}


def plotly_script() -> bytes:
    """plotly.js, 5 MB."""
    import plotly.offline  # it takes half a second, which only the curves need

    return plotly.offline.get_plotlyjs().encode()
