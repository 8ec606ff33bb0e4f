"""The worker extension with faults that its tests call for; it runs in vLLM's processes."""

from echo_jax.policy.vllm_rank import WeightLoader


class FaultyLoader(WeightLoader):
    _faults: tuple[str, ...] = ()

    def fail_at(self, *faults: str) -> None:
        """'head': it is not packed again. 'half': the next load, once, ends after some tensors."""
        self._faults = faults

    def _pack_head(self, model) -> None:
        if 'head' not in self._faults:
            super()._pack_head(model)

    def _their_tensors(self, arrays):
        for number, tensor in enumerate(super()._their_tensors(arrays)):
            if number == 6 and 'half' in self._faults:
                self._faults = ()
                raise OSError('half of it')
            yield tensor
