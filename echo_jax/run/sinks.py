"""Where a run's numbers go besides metrics.jsonl and TensorBoard, if its recipe asks for it.

Both packages are optional: `pip install wandb`, `pip install prometheus-client`.
"""

import importlib.util
import secrets
from collections.abc import Callable, Iterator, Mapping

import ml_collections

from echo_jax.run.workdir import Workdir, write_whole
from echo_jax.store.due import DueStore

Sink = Callable[[int, Mapping[str, float]], None]  # (step, values)
_PACKAGES = {'logging.wandb': 'wandb', 'logging.prometheus_port': 'prometheus_client'}


def check_packages(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if a package is missing that a key needs."""
    logging = config.logging
    wanted = {'logging.wandb': logging.wandb, 'logging.prometheus_port': logging.prometheus_port}
    for key, value in wanted.items():
        package = _PACKAGES[key]
        if value and importlib.util.find_spec(package) is None:
            raise ValueError(
                f'{key}={value} needs {package}; pip install {package.replace("_", "-")}'
            )


def open_sinks(work: Workdir) -> list[Sink]:
    """Those that the recipe of a run asks for."""
    logging, sinks = work.config.logging, []
    if logging.wandb:
        sinks.append(weights_and_biases(work, logging.wandb))
    if logging.prometheus_port:
        sinks.append(prometheus(work, logging.prometheus_port))
    return sinks


def weights_and_biases(work: Workdir, project: str) -> Sink:
    """A run of a project of Weights & Biases, which goes on if the workdir's run is resumed.

    WANDB_MODE=offline, and the other variables that its library reads, hold here too. What a killed
    run has logged beyond its checkpoint is not logged again: the numbers are the same.
    """
    import wandb

    file = work.path / 'wandb_id'
    if not work.take(file.name):
        write_whole(file, secrets.token_hex(8))
        work.share(file.name)
    run = wandb.init(
        project=project,
        id=file.read_text(),
        name=work.url().rstrip('/').rpartition('/')[2],
        resume='allow',
        dir=str(work.path),
        config=work.config.to_dict(),
        allow_val_change=True,  # of what a run may change when it goes on
        settings=wandb.Settings(console='off', silent=True),
    )
    return lambda step, values: run.log(dict(values), step=step)


class _Page:
    """What Prometheus reads: the newest numbers of the learner, and those of its workers.

    `echo_jax{name="train/loss", run="...", worker=""}`, with the names of docs/metrics.md.
    """

    def __init__(self, work: Workdir):
        self._run, self._due = work.url(), DueStore(work.url('fleet'))
        self._newest: Mapping[str, float] = {}

    def set(self, step: int, values: Mapping[str, float]) -> None:
        self._newest = {'step': step, **values}

    def collect(self) -> Iterator:
        """Is called for every look at the page, in a thread of its own."""
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(
            'echo_jax', 'see docs/metrics.md', labels=['name', 'run', 'worker']
        )
        for name, value in self._newest.items():
            family.add_metric([name, self._run, ''], value)
        for report in self._due.reports():
            for name, value in report.items():
                if isinstance(value, int | float):  # not the worker's name, nor what is damaged
                    family.add_metric([name, self._run, report['worker']], value)
        yield family


def prometheus(work: Workdir, port: int) -> Sink:
    """Serves a page for Prometheus at `port` of this machine. Raises OSError if it is taken."""
    import prometheus_client

    page, registry = _Page(work), prometheus_client.CollectorRegistry(auto_describe=False)
    registry.register(page)
    try:
        prometheus_client.start_http_server(port, registry=registry)
    except OSError as error:
        raise OSError(
            f'logging.prometheus_port={port} is not free ({error.strerror}); choose another'
        ) from error
    return page.set
