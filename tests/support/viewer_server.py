"""The viewer's own server on a free port, in a thread of the test."""

import contextlib
import threading
from collections.abc import Generator, Sequence

from echo_jax.viewer.server import link, listen, make_server
from echo_jax.viewer.site import Site


@contextlib.contextmanager
def serving(places: Sequence[str], token: str = '', host: str = '127.0.0.1') -> Generator[str]:
    """The link that the program prints; the runs are read as the program reads them."""
    site = Site([str(place) for place in places])
    with listen(host, 0) as listening, site.following():
        server = make_server(site, listening, token)
        thread = threading.Thread(target=server.run, kwargs={'sockets': [listening]})
        thread.start()
        try:
            yield link(host, listening.getsockname()[1], token)
        finally:
            server.should_exit = True
            thread.join()
