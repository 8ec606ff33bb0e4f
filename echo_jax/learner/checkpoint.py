"""The learner's state on disk: asynchronous, atomic, verified saves through Orbax.

The weights that workers sample with go through store/weights.py, not through here. The program that
saves decides what `extra` holds (such as its position in the tasks and the seconds spent).
"""

import ctypes
import gc
import importlib.util
import json
import os
import zlib
from collections.abc import Collection
from typing import Any, overload

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers


class CheckpointError(RuntimeError):
    """A checkpoint cannot be restored. The message is one line and says what to do."""


class Checkpointer:
    """The last `keep` checkpoints of one run, in `directory`, a path or a gs:// URL.

    A step's folder appears whole or not at all, whenever the process dies. Orbax notices a file
    that is missing or cut short, but not a flipped bit of an array. So at every save the devices
    compute a fingerprint of each array, which is compared when the step is restored.

    Every process of a multi-host run has to make the same calls. Programs other than the learner
    open it `read_only`: only the learner may clear away what an interrupted save has left.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, read_only: bool = False):
        self._directory = _absolute(directory)
        check_reach(self._directory)
        self._saved = None
        self._kept = _NewestAndSome(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def keep_also(self, steps: Collection[int]) -> None:
        """From now on keeps these steps, if they are saved, beside the last ones."""
        self._kept.also = steps

    def save(self, step: int, state: Any, extra: dict) -> None:
        """Begins to save `state`, a pytree of jax.Array, and `extra`, plain JSON, as `step`.

        Returns when the state is copied to the host, so that the caller may donate it. A thread
        does the rest; its error is raised by the next `save`, `wait` or `close`. Saving a step
        again in the same process does nothing. Raises ValueError if a later step is there.
        """
        if step == self._saved:
            return
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f'cannot save step {step}: {self._directory} holds step {latest}; '
                'to go back, remove the folders of the later steps'
            )
        # Its crc32 is taken of what JSON will give back, with lists for tuples and text for keys.
        record = json.loads(json.dumps({'extra': extra, 'arrays': _describe(state)}))
        _release_copies()
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            extra=ocp.args.JsonSave(record | {'crc32': _crc32(record)}),
        )
        self._manager.save(step, args=args, force=True)
        self._saved = step

    @overload
    def restore(
        self, abstract_state: Any, step: int, partial: bool = False
    ) -> tuple[Any, dict, int]: ...

    @overload
    def restore(self, abstract_state: Any) -> tuple[Any, dict, int] | None: ...

    def restore(
        self, abstract_state: Any, step: int | None = None, partial: bool = False
    ) -> tuple[Any, dict, int] | None:
        """(state, extra, step) of `step`, by default the last; None if no step is saved at all.

        `abstract_state` holds ShapeDtypeStructs. Their shardings need not be those of the save; one
        without a sharding is restored to the first local device. Entries that its top level lacks
        are not read; with `partial`, an entry may be lacking at any level.

        Raises CheckpointError if the checkpoint is damaged or is of another model or optimizer.
        """
        steps = self._manager.all_steps()
        if step is None:
            if not steps:
                return None
            step = max(steps)
        elif step not in steps:
            raise CheckpointError(f'{self._directory} has no step {step}, only {sorted(steps)}')
        record = self._read(step, 'extra', ocp.args.JsonRestore())
        crc32 = record.pop('crc32', None) if isinstance(record, dict) else None
        if crc32 != _crc32(record):
            raise self._damaged(step, 'extra does not match its checksum')
        self._check_same_arrays(step, record['arrays'], abstract_state, partial)
        placed = jax.tree.map(_placed, abstract_state)
        restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
        args = ocp.args.PyTreeRestore(placed, restore_args=restore_args, partial_restore=True)
        state = self._read(step, 'state', args)
        for name, described in _describe(state).items():
            if described != record['arrays'][name]:
                raise self._damaged(step, f'{name} does not match its fingerprint')
        return state, record['extra'], step

    def latest(self) -> int | None:
        """The last step that is saved, or by this process being saved; None if there is none."""
        return self._manager.latest_step()

    def oldest(self) -> int | None:
        """The first step that is on disk whole, or None; a save that is under way is not there."""
        directory = epath.Path(self._directory)
        return min(ocp.utils.checkpoint_steps(directory), default=None)

    def wait(self) -> None:
        """Returns when every save that was begun is on disk."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        _release_copies()

    def close(self) -> None:
        self._manager.close()
        _release_copies()

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        # Depending on where the damage is, Orbax raises anything from KeyError to a bare Exception,
        # so only `Exception` catches them all. None is swallowed: each is the cause of ours.
        except Exception as error:
            reason = str(error).partition('\n')[0][:200]
            raise self._damaged(step, f'{item}: {type(error).__name__}: {reason}') from error

    def _damaged(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f'cannot restore step {step} of {self._directory}: {reason}; if its files are damaged, '
            f'remove the folder {self._directory}/{step} to fall back to the step before it'
        )

    def _check_same_arrays(
        self, step: int, saved: dict[str, list], abstract_state: Any, partial: bool
    ) -> None:
        wanted = {name: _dtype_and_shape(leaf) for name, leaf in _named_leaves(abstract_state)}
        found = {name: (dtype, shape) for name, (dtype, shape, _) in saved.items()}
        names = set(wanted)
        if not partial:  # all that is saved under a top-level entry has to be wanted
            entries = {name.partition('/')[0] for name in wanted}
            names |= {name for name in found if name.partition('/')[0] in entries}
        for name in sorted(names):
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f'step {step} of {self._directory} is of another model or optimizer: {name} is '
                    f'{found.get(name, "absent")} there, {wanted.get(name, "absent")} in this '
                    "config; use the run's own config, or another workdir"
                )


class _NewestAndSome(checkpoint_managers.PreservationPolicy):
    """What Orbax keeps: the last `keep` steps, and those that are in `also`."""

    def __init__(self, keep: int):
        self._keep = keep
        self.also: Collection[int] = ()

    def should_preserve(self, checkpoints, *, context):
        newest = [info.step for info in checkpoints[-self._keep :]]
        return [info.step in newest or info.step in self.also for info in checkpoints]


def open_saved(directory: str | os.PathLike, step: int | None = None) -> tuple[Checkpointer, int]:
    """The checkpoints in `directory`, to read, and `step`, by default the last that is saved.

    Raises ValueError if nothing is saved there.
    """
    check_reach(directory)
    if epath.Path(_absolute(directory)).is_dir():  # Orbax raises an error of its own if it is not
        checkpointer = Checkpointer(directory, read_only=True)
        latest = checkpointer.latest()
        if latest is not None:
            return checkpointer, latest if step is None else step
    raise ValueError(
        f'no checkpoint is saved in {directory}; run echo_jax.train until it saves one'
    )


def check_reach(directory: str | os.PathLike) -> None:
    """Raises ValueError if Orbax lacks a package that it needs to save in `directory`."""
    if os.fspath(directory).startswith('gs://') and importlib.util.find_spec('gcsfs') is None:
        raise ValueError(f'to save to {directory} Orbax needs gcsfs; pip install gcsfs')


def _absolute(directory: str | os.PathLike) -> str:
    directory = os.fspath(directory).removeprefix('file://')
    return directory if '://' in directory else os.path.abspath(directory)


def _release_copies() -> None:
    """Returns the memory of earlier saves to the operating system.

    Orbax's copy of the state is part of a reference cycle, and stays until that is collected. Then
    glibc keeps freed arrays below 32 MiB for the thread that allocated them, and the next save may
    run in another: a learner of 0.7 GiB grew to 2.2 GiB in thirty saves of 0.5 GiB
    (experiments/benchmarks/checkpoint_memory.py). Other C libraries have no malloc_trim.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]


def _dtype_and_shape(leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[str, list[int]]:
    return str(leaf.dtype), list(leaf.shape)


def _describe(state: Any) -> dict[str, list]:
    """{flat name: [dtype, shape, fingerprint]} of every array, the same on every mesh."""
    leaves = _named_leaves(state)
    fingerprints = jax.device_get([_fingerprint(leaf) for _, leaf in leaves])
    return {
        name: [*_dtype_and_shape(leaf), int(fingerprint)]
        for (name, leaf), fingerprint in zip(leaves, fingerprints)
    }


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return leaf.update(sharding=leaf.sharding or first)


def _crc32(record: Any) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


@jax.jit
def _fingerprint(array: jax.Array) -> jax.Array:
    """uint32 scalar: the sum modulo 2**32 of hashed elements, so that their order does not matter.

    An element is hashed together with its place, by a bijection: a change of one always shows, and
    changes of several stay unseen with a chance of 2**-32.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    if array.dtype.itemsize == 8:
        array = jax.lax.bitcast_convert_type(array, jnp.uint32)  # adds an axis of length 2
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f'uint{8 * array.dtype.itemsize}'))
    # The flat index modulo 2**32, by axes: unlike a reshaped arange it is split as the array is.
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + iota * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B9))
    # MurmurHash3's finalizer.
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
