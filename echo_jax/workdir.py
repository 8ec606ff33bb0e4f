"""The folder of a run: what lies where in it, and that it belongs to one config.

config.json      the recipe it was made with; another one is refused
tasks/           generated tasks, where the config names none
tokenizer/       a Hugging Face tokenizer directory
model/           config.json and tokenizer for the workers' engines, where the config names no model
fleet/           which groups are due, and how the workers are
rollouts/, weights/, checkpoints/    the stores and the learner's state
metrics.jsonl, summary.json, curves.png, tensorboard/    what a person reads
"""

import json
import os
import pathlib

import ml_collections
import transformers

from echo_jax.agent.families import generate_tasks
from echo_jax.agent.tasks import load_tasks
from echo_jax.agent.tokenizer import build_tokenizer, training_texts
from echo_jax.types import Task

_CHAT_TEMPLATE = pathlib.Path(__file__).parent / 'agent' / 'chat_template.jinja'
_TOKENIZER_TASKS = 500  # of the training tasks, for the small tokenizer's merges


class Workdir:
    def __init__(self, path: str | os.PathLike, config: ml_collections.ConfigDict):
        """Makes the folder or opens it again; ValueError where it is of another config."""
        if '://' in os.fspath(path):
            raise ValueError(f'{path} is no folder; a run lives in a local or a mounted one as yet')
        self.path = pathlib.Path(path)
        self.config = config
        self.path.mkdir(parents=True, exist_ok=True)
        ours, file = json.loads(config.to_json()), self.path / 'config.json'
        if not file.exists():
            if any(path.name != 'config.json.partial' for path in self.path.iterdir()):
                raise ValueError(
                    f'{self.path} is not empty and holds no run; give another --workdir'
                )
            write_whole(file, json.dumps(ours, indent=1))
        theirs = json.loads(file.read_text())
        if ours != theirs:
            raise ValueError(
                f'{self.path} is a run of another config ({_difference(theirs, ours)}); '
                'resume it with its own, or give another --workdir'
            )

    @staticmethod
    def holds_run(path: str | os.PathLike) -> bool:
        return (pathlib.Path(path) / 'config.json').exists()

    @classmethod
    def open(cls, path: str | os.PathLike) -> 'Workdir':
        """The run that is there, with its own config; ValueError where there is none."""
        file = pathlib.Path(path) / 'config.json'
        if not cls.holds_run(path):
            raise ValueError(f'{path} holds no run; name the --workdir of echo_jax.train')
        return cls(path, ml_collections.FrozenConfigDict(json.loads(file.read_text())))

    def url(self, *parts: str) -> str:
        return str(self.path.joinpath(*parts))

    def served_model(self) -> pathlib.Path:
        """The Hugging Face directory that a worker's engine starts from: sizes and tokenizer.

        Its weights, where it has any, are not used: published ones are.
        """
        return pathlib.Path(self.config.model.path or self.path / 'model')

    def tasks(self, split: str) -> list[Task]:
        """The tasks of 'train', 'heldout' or 'explore': the config's own folder, or generated."""
        tasks = self.config.tasks
        if folder := tasks.get(split, ''):
            return load_tasks(folder, self.path / 'tasks' / 'unpacked')
        count = (
            self.config.warm_start.explorations if split == 'explore' else tasks[f'{split}_count']
        )
        folder = self.path / 'tasks' / split
        generate_tasks(folder, split=split, count=count, seed=self.config.seed)
        return load_tasks(folder)

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        """The model's own, or a small one trained on the training tasks, once."""
        if self.config.model.path:
            return read_tokenizer(self.config.model.path)
        folder = self.path / 'tokenizer'
        if not folder.exists():
            texts = training_texts(
                self.tasks('train')[:_TOKENIZER_TASKS], self.config.protocol.system_prompt
            )
            tokenizer = build_tokenizer(
                texts, self.config.model.vocab_size, _CHAT_TEMPLATE.read_text()
            )
            partial = self.path / 'tokenizer.partial'
            tokenizer.save_pretrained(partial)
            partial.rename(folder)
        return read_tokenizer(folder)


def read_tokenizer(folder: str | os.PathLike) -> transformers.PreTrainedTokenizerFast:
    """Of a Hugging Face directory. ValueError without one: transformers makes up an empty one."""
    if not any((pathlib.Path(folder) / file).exists() for file in ('tokenizer.json', 'vocab.json')):
        raise ValueError(f'{folder} has no tokenizer.json; copy the tokenizer of its model there')
    return transformers.AutoTokenizer.from_pretrained(folder)


def write_whole(file: pathlib.Path, text: str) -> None:
    """Replaces a file at once: a reader and a crash see the old one or the new one."""
    partial = file.with_name(file.name + '.partial')
    partial.write_text(text)
    partial.rename(file)


def _difference(theirs: dict, ours: dict) -> str:
    """The first key in which two configs differ, with both values."""
    theirs, ours = _flat(theirs), _flat(ours)
    key = next(k for k in [*ours, *theirs] if ours.get(k, '-') != theirs.get(k, '-'))
    return f'{key} is {theirs.get(key, "absent")!r} there, {ours.get(key, "absent")!r} here'


def _flat(tree: dict, prefix: str = '') -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f'{prefix}{key}.')
        else:
            flat[f'{prefix}{key}'] = value
    return flat
