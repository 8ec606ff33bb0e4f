"""Numbers that go to Weights & Biases and to Prometheus: what arrives there."""

import json
import struct
import urllib.request
from collections.abc import Iterator

import ml_collections
import pytest

from configs.tiny import get_config
from echo_jax.run import sinks
from echo_jax.run.workdir import Workdir
from echo_jax.store.due import DueStore
from tests.support.every_option import free_port
from tests.support.small_run import metrics


def workdir(path, **logging) -> Workdir:
    config = get_config()
    config.logging.update(logging)
    return Workdir(path, ml_collections.FrozenConfigDict(config))


def scrape(port: int) -> dict[tuple[str, str], float]:
    """{(name, worker): value} of the page, as Prometheus parses it."""
    parser = pytest.importorskip('prometheus_client.parser')
    with urllib.request.urlopen(f'http://localhost:{port}/metrics') as answer:
        families = list(parser.text_string_to_metric_families(answer.read().decode()))
    assert [family.name for family in families] == ['echo_jax']
    return {(s.labels['name'], s.labels['worker']): s.value for s in families[0].samples}


def test_prometheus_reads_the_learner_and_its_workers(tmp_path):
    port = free_port()
    work = workdir(tmp_path, prometheus_port=port)
    (sink,) = sinks.open_sinks(work)
    assert scrape(port) == {}
    sink(3, {'train/loss': 0.5, 'eval/pass@2': 0.25})
    DueStore(work.url('fleet')).report('host-0', {'groups': 7, 'version': 2, 'damaged': ''})
    found = scrape(port)
    assert found.pop(('at', 'host-0')) > 1e9
    assert found == {
        ('step', ''): 3,
        ('train/loss', ''): 0.5,
        ('eval/pass@2', ''): 0.25,
        ('groups', 'host-0'): 7,
        ('version', 'host-0'): 2,
    }
    sink(4, {'train/loss': 0.25})
    assert scrape(port)[('train/loss', '')] == 0.25
    with pytest.raises(OSError, match=rf'logging.prometheus_port={port} is not free \(Address al'):
        sinks.open_sinks(work)


def test_a_package_that_is_missing_is_named(monkeypatch):
    config = get_config()
    sinks.check_packages(config)
    monkeypatch.setattr(sinks.importlib.util, 'find_spec', lambda name: None)
    sinks.check_packages(config)
    config.logging.wandb = 'project'
    with pytest.raises(ValueError, match=r'^logging.wandb=project needs wandb; pip install wandb$'):
        sinks.check_packages(config)
    config.logging.update(wandb='', prometheus_port=9000)
    with pytest.raises(ValueError, match='needs prometheus_client; pip install prometheus-client'):
        sinks.check_packages(config)


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind a header of 7 bytes, as wandb writes it.

    Blocks of 32 KiB hold chunks: CRC, length, type (1 whole, 2 first, 3 middle, 4 last), bytes.
    """
    place, record = 7, b''
    while place < len(data):
        left = (1 << 15) - place % (1 << 15)
        if left < 7:  # no chunk begins there
            place += left
            continue
        length, kind = struct.unpack_from('<HB', data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b''


@pytest.mark.slow
def test_weights_and_biases_gets_every_row(run_of):
    """The run of the option, offline: what its library would send."""
    Record = pytest.importorskip('wandb.proto.wandb_internal_pb2').Record
    run = run_of('conversation')
    (file,) = (run / 'wandb').glob('offline-run-*/run-*.wandb')
    assert file.stem == f'run-{(run / "wandb_id").read_text()}'
    rows, config = {}, {}
    for data in log_records(file.read_bytes()):
        record = Record.FromString(data)
        items = {item.key or '.'.join(item.nested_key): item for item in record.history.item}
        if items:
            values = {name: json.loads(item.value_json) for name, item in items.items()}
            rows[int(values.pop('_step'))] = values
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    assert config['num_steps'] == 2 and config['eval']['tasks'] == 2
    expected = {row.pop('step'): row for row in metrics(run)}
    ours = {
        step: {name: value for name, value in row.items() if name in expected[step]}
        for step, row in rows.items()
    }
    assert ours == expected and len(expected) == 2
