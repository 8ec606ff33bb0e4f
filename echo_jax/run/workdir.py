"""The folder or bucket of a run: what lies where in it, and that it belongs to one config.

config.json      the recipe that the run goes by; another one is refused, but for what changes.py
                 allows, and config_history.jsonl says what has changed since the run was made
tasks/           generated tasks, if the config names none
tokenizer/       a Hugging Face tokenizer directory
model/           config.json and tokenizer for the workers' engines, if the config names no model
learner.lock     is locked by the learner's process
fleet/, workers/ which groups are due and how the workers are; locks of the workers' names
groups.jsonl     which groups each step took, if steps do not wait for those of their number
rollouts/, weights/, checkpoints/, scores/    the stores and the learner's state
metrics.jsonl, warm_start.jsonl, summary.json, curves.png, tensorboard/    what a person reads

Stores and checkpoints are used where they lie. Everything else is files. If the run is in a bucket,
each machine keeps the files that it needs in a folder of its cache, and `share` and `take` move
them. Tasks are not moved: every machine makes the same ones.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
import tempfile
import time
from collections.abc import Generator
from typing import Any

import ml_collections
import tensorstore as ts
import transformers

from echo_jax.agent.dialects import find_dialect
from echo_jax.agent.tokenizer import build_tokenizer, chat_template, training_texts
from echo_jax.run import changes, tasksets
from echo_jax.store.kvstore import inside, open_kvstore, write_once
from echo_jax.tasks.generate import generate_tasks
from echo_jax.types import Task

_WHOLE = '.whole'  # is written last when a folder is shared
_MADE = 'made'  # in a bucket whose config has changed: the generation of its first config.json
_TAKING, _TAKING_SECONDS = 'taking-', 3600.0  # after which nobody takes into that folder any more
TOKENIZER_TASKS = 500  # training tasks that the small tokenizer is trained on


class Workdir:
    """`path` is the folder of its files on this machine; `url` leads to what others reach too."""

    def __init__(
        self, place: str | os.PathLike, config: ml_collections.ConfigDict, is_learner: bool = False
    ):
        """Makes the run at `place`, a folder or a gs:// URL, or opens it again.

        `config` may differ from the run's in what changes.py allows; each program goes by its own.
        Raises ValueError if it is of another config, or this machine may not write there, or if
        `is_learner` and the run cannot go on by this config.
        """
        self.config = config
        self._read: dict[str, tasksets.Read] = {}
        self._root, self._bucket = _locate(place)
        ours = json.loads(config.to_json())
        document = json.dumps(ours, indent=1)
        if self._bucket is None:
            self.path = pathlib.Path(self._root)
            found = self._in_folder(document)
        else:
            found, made = self._in_bucket(self._bucket, document)
            # A run that is deleted and made again at the same place finds nothing of the old one.
            name = hashlib.sha256(self._root.encode() + made).hexdigest()[:16]
            self.path = _cache() / name
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(f'{_TAKING}*'):  # by a process that was killed
                if time.time() - left.stat().st_mtime > _TAKING_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        self._changes = changes.find_changes(json.loads(found), ours, self._root)
        if is_learner:
            changes.check_longer(self._changes, ours, self._root)

    def go_on(self, step: int) -> changes.Changes:
        """Makes this config the run's from `step` on, and returns what it changes.

        For the leading process of a learner. The history is written first, so that no config is
        without its row if the process is killed in between.
        """
        changed, self._changes = self._changes, {}
        if changed:
            self.take(changes.HISTORY)
            history = self.path / changes.HISTORY
            text = history.read_text() if history.exists() else ''
            write_whole(history, changes.history_with(text, step, changed))
            self.share(changes.HISTORY)
            document = json.dumps(json.loads(self.config.to_json()), indent=1)
            if self._bucket is None:
                write_whole(self.path / 'config.json', document)
            else:
                found = _config_in(self._root, self._bucket)
                write_once(self._bucket, _MADE, found.stamp.generation)
                self._bucket['config.json'] = document.encode()
        return changed

    @contextlib.contextmanager
    def only_learner(self) -> Generator[None]:
        """Keeps other learners out: of two, each would take back what the other publishes.

        Raises ValueError if there is one, as far as this machine's lock tells; in a bucket, that is
        one on this machine.
        """
        with (self.path / 'learner.lock').open('a+') as file:
            try:
                # Unlike flock's, it is not a fork's too, and so ends with this process.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise ValueError(
                    f'{self._root} has a learner already, {file.read().strip()}; stop it (SIGTERM '
                    'saves the run and ends it) or let it go on'
                ) from None
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
            file.flush()
            yield

    def remove(self, *names: str) -> None:
        """Removes files of the run, here and where other machines find them."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
            if self._bucket is not None:
                del self._bucket[name]

    def _in_folder(self, document: str) -> str:
        """The config that is there, after `document` was written if there was none."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / 'config.json'
        if not file.exists():
            if any(path.name != 'config.json.partial' for path in self.path.iterdir()):
                raise self._strange()
            write_whole(file, document)
        return file.read_text()

    def _in_bucket(self, bucket: ts.KvStore, document: str) -> tuple[bytes, bytes]:
        """The same in a bucket, with what tells when the run was made."""
        found = _config_in(self._root, bucket)
        if found.state == 'missing':
            if bucket.list().result():
                raise self._strange()
            try:
                write_once(bucket, 'config.json', document.encode())
            except ValueError as error:
                raise _refused(self._root, error) from error
            found = _config_in(self._root, bucket)
        made = bucket.read(_MADE).result()  # after the config, which is written after it
        return found.value, made.value if made.state == 'value' else found.stamp.generation

    def _strange(self) -> ValueError:
        return ValueError(f'{self._root} is not empty and holds no run; give another --workdir')

    @staticmethod
    def holds_run(place: str | os.PathLike) -> bool:
        root, bucket = _locate(place)
        if bucket is None:
            return (pathlib.Path(root) / 'config.json').exists()
        return _config_in(root, bucket).state == 'value'

    @classmethod
    def open(cls, place: str | os.PathLike) -> 'Workdir':
        """Opens the run that is there with its own config; raises ValueError if there is none."""
        root, bucket = _locate(place)
        if not cls.holds_run(place):
            raise ValueError(f'{root} holds no run; name the --workdir of echo_jax.train')
        file = pathlib.Path(root, 'config.json')
        document = file.read_text() if bucket is None else _config_in(root, bucket).value
        return cls(place, ml_collections.FrozenConfigDict(json.loads(document)))

    def url(self, *parts: str) -> str:
        """The URL of a store, for any machine of the run."""
        return '/'.join([self._root, *parts])

    @property
    def poll_seconds(self) -> float:
        """Seconds between two looks for what others write; a look into a bucket costs money."""
        return 0.1 if self._bucket is None else 1.0

    def share(self, *names: str) -> None:
        """Copies files and folders of `path`, as they are now, to where other machines find them.

        What is not here is left out. Others see a file whole or not at all, and a folder only when
        all of it is there.
        """
        if self._bucket is None:
            return
        for name in names:
            local = self.path / name
            if local.is_dir():
                files = [file for file in sorted(local.rglob('*')) if file.is_file()]
                keys = [file.relative_to(self.path).as_posix() for file in files]
                writes = [self._bucket.write(k, f.read_bytes()) for k, f in zip(keys, files)]
                for write in writes:
                    write.result()
                self._bucket[f'{name}/{_WHOLE}'] = b''
            elif local.exists():
                self._bucket[name] = local.read_bytes()

    def take(self, name: str) -> bool:
        """Brings what was shared as `name` to `path`; returns whether it is there now.

        A file replaces the one that is here; a folder that is here stays.
        """
        local = self.path / name
        if self._bucket is None or local.is_dir():
            return local.exists()
        keys = [key.decode() for key in self._bucket.list(inside(name)).result()]
        if keys and f'{name}/{_WHOLE}' not in keys:
            return False
        partial = pathlib.Path(tempfile.mkdtemp(prefix=_TAKING, dir=self.path))
        try:
            for key in keys or [name]:
                found = self._bucket.read(key).result()
                if found.state == 'missing':
                    return local.exists()
                (partial / key).parent.mkdir(parents=True, exist_ok=True)
                (partial / key).write_bytes(found.value)
            (partial / name).replace(local)
        except OSError:
            if not local.is_dir():  # else another process has taken the folder meanwhile
                raise
        finally:
            shutil.rmtree(partial)
        return True

    def served_model(self) -> pathlib.Path:
        """The Hugging Face directory that a worker's engine starts from: sizes and tokenizer.

        If it has weights they are not used: the published ones are.
        """
        if self.config.model.path:
            return pathlib.Path(self.config.model.path)
        self.take('model')
        return self.path / 'model'

    def tasks(self, split: str) -> list[Task]:
        """The tasks of 'train', 'heldout' or 'explore': the config's own folder, or generated.

        They are read once. What is left out then is named in a warning.
        """
        return self.read_tasks(split).tasks

    def read_tasks(self, split: str) -> tasksets.Read:
        """The same, with the tasks that were left out and why."""
        if split not in self._read:
            self._read[split] = self._read_tasks(split)
        return self._read[split]

    def _read_tasks(self, split: str) -> tasksets.Read:
        tasks, cache = self.config.tasks, self.path / 'tasks' / 'unpacked'
        if tasks.get(split, ''):  # no recipe names tasks of 'explore'
            return tasksets.read(tasks[split], self.config, cache)
        counts = {
            'train': tasks.train_count,
            'heldout': tasks.heldout_count,
            'explore': self.config.warm_start.explorations,
        }
        count, folder = counts[split], self.path / 'tasks' / split
        seed, families = self.config.seed, list(tasks.families)
        generate_tasks(folder, split=split, count=count, seed=seed, families=families)
        return tasksets.read(folder, self.config, cache)

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        """The model's own, or a small one trained on the training tasks, once."""
        if self.config.model.path:
            return read_tokenizer(self.config.model.path)
        folder = self.path / 'tokenizer'
        if not self.take('tokenizer'):
            protocol = self.config.protocol
            texts = training_texts(
                self.tasks('train')[:TOKENIZER_TASKS],
                protocol.system_prompt,
                find_dialect(protocol.dialect),
            )
            tokenizer = build_tokenizer(texts, self.config.model.vocab_size, chat_template())
            partial = self.path / 'tokenizer.partial'
            tokenizer.save_pretrained(partial)
            partial.rename(folder)
            self.share('tokenizer')
        return read_tokenizer(folder)


def _locate(place: str | os.PathLike) -> tuple[str, ts.KvStore | None]:
    """Where a run is, as a person names it, and its store if that is a bucket."""
    root = os.fspath(place).removeprefix('file://')
    if '://' not in root:
        return str(pathlib.Path(root)), None  # without a slash at its end
    if not root.startswith('gs://'):
        raise ValueError(f'{root}: a run lives in a folder or at gs://, where Orbax can save')
    return root.rstrip('/'), open_kvstore(root)


def _config_in(root: str, bucket: ts.KvStore) -> ts.KvStore.ReadResult:
    try:
        return bucket.read('config.json').result()
    except ValueError as error:
        raise _refused(root, error) from error


def _refused(root: str, error: ValueError) -> ValueError:
    return ValueError(
        f'{root}: {str(error).partition(" [")[0]}; give a bucket that exists and credentials that '
        'may read and write it (gcloud auth application-default login)'
    )


def _cache() -> pathlib.Path:
    home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    return pathlib.Path(home, 'echo_jax', 'runs')


@contextlib.contextmanager
def unpacked(work: Workdir | None) -> Generator[pathlib.Path]:
    """The folder for the archives of a .parquet: the run's, or one that is removed afterwards."""
    if work is not None:
        yield work.path / 'tasks' / 'unpacked'
        return
    with tempfile.TemporaryDirectory(prefix='echo_jax-tasks-') as folder:
        yield pathlib.Path(folder)


def read_tokenizer(folder: str | os.PathLike) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory.

    Raises ValueError if there is none, for which transformers would make up an empty one, and if it
    cannot write a conversation.
    """
    if not any((pathlib.Path(folder) / file).exists() for file in ('tokenizer.json', 'vocab.json')):
        raise ValueError(f'{folder} has no tokenizer.json; copy the tokenizer of its model there')
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        raise ValueError(f'{folder} has no fast tokenizer; save it with its tokenizer.json')
    if not tokenizer.chat_template:
        raise ValueError(
            f'{folder} (model.path) has a tokenizer without a chat template; copy the '
            'chat_template.jinja of its model there, or echo_jax/agent/chat_template.jinja'
        )
    return tokenizer


def whole_rows(text: str) -> list[Any]:
    """The rows of a JSON lines file, without one that a killed program began at its end."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]


def write_whole(file: pathlib.Path, text: str) -> None:
    """Replaces a file in one go: a reader, or a crash, finds the old text or the new one."""
    partial = file.with_name(file.name + '.partial')
    partial.write_text(text)
    partial.rename(file)
