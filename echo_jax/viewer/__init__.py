"""A web page over runs, for echo_jax.view: curves, rollouts, tokens. It reads, and writes nothing.

Whatever the page shows is a document, plain JSON with a name (site.py). A server answers with
documents (server.py), or all of them are written as files (static.py); the page is the same.
"""
