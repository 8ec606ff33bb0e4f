"""A random Qwen3 of transformers, in float32, that publishes itself as the learner does."""

import copy
import pathlib

import numpy as np
import torch
import transformers

from echo_jax.store.weights import WeightStore

VOCAB, EOS = 500, 7  # no multiple of 64, to which vLLM pads
_LAYER = 'model.layers.{}.'
TENSORS = {
    'embedding': 'model.embed_tokens.weight',
    'layers/attention_norm': _LAYER + 'input_layernorm.weight',
    'layers/wq': _LAYER + 'self_attn.q_proj.weight',
    'layers/wk': _LAYER + 'self_attn.k_proj.weight',
    'layers/wv': _LAYER + 'self_attn.v_proj.weight',
    'layers/q_norm': _LAYER + 'self_attn.q_norm.weight',
    'layers/k_norm': _LAYER + 'self_attn.k_norm.weight',
    'layers/wo': _LAYER + 'self_attn.o_proj.weight',
    'layers/mlp_norm': _LAYER + 'post_attention_layernorm.weight',
    'layers/w_gate': _LAYER + 'mlp.gate_proj.weight',
    'layers/w_up': _LAYER + 'mlp.up_proj.weight',
    'layers/w_down': _LAYER + 'mlp.down_proj.weight',
    'final_norm': 'model.norm.weight',
    'head': 'lm_head.weight',
}


class Learner:
    def __init__(self, folder: pathlib.Path, *, tied: bool, kv_heads: int = 2):
        """Writes `folder`/model, a config and no weights; publishes in `folder`/weights."""
        torch.manual_seed(0)
        config = transformers.Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=32,  # the least that vLLM attends with on a CPU
            max_position_embeddings=1024,
            tie_word_embeddings=tied,
            initializer_range=0.15,
            eos_token_id=EOS,
            dtype='float32',
        )
        self.model_dir, self.url = folder / 'model', str(folder / 'weights')
        self.model = transformers.Qwen3ForCausalLM(config).eval()
        config.architectures = ['Qwen3ForCausalLM']
        config.save_pretrained(self.model_dir)
        self.store = WeightStore(self.url, keyframe_every=4)
        self.versions: dict[int, dict] = {}
        self.probe = np.random.default_rng(0).integers(0, VOCAB, 48).tolist()

    def change(self, scale: float) -> None:
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor.add_(scale * torch.randn_like(tensor))

    def publish(self, version: int, probe_error: float = 0.0) -> None:
        state = self.model.state_dict()
        tensors = {k: v for k, v in TENSORS.items() if k != 'head' or not self.tied}
        self.versions[version] = copy.deepcopy(state)
        logprobs = self.logprobs(self.probe) + probe_error
        arrays = {name: _ours(state, theirs) for name, theirs in tensors.items()}
        probe = {'tokens': self.probe, 'logprobs': logprobs.tolist(), 'temperature': 1.0}
        self.store.publish(arrays, version, about={'tensors': tensors, 'probe': probe})

    @property
    def tied(self) -> bool:
        return self.model.config.tie_word_embeddings

    def logits(self, tokens, version: int | None = None) -> torch.Tensor:
        """float32 [n, V], of the weights as they are or as they were published."""
        if version is not None:
            self.model.load_state_dict(self.versions[version])
        with torch.no_grad():
            return self.model(torch.tensor([list(tokens)])).logits[0]

    def logprobs(self, tokens, temperature: float = 1.0, version: int | None = None) -> np.ndarray:
        """float32 [n], the first 0."""
        logprobs = torch.log_softmax(self.logits(tokens, version)[:-1] / temperature, -1)
        chosen = logprobs.gather(1, torch.tensor(list(tokens))[1:, None])[:, 0]
        return np.concatenate([[0.0], chosen.numpy()]).astype(np.float32)


def _ours(state: dict, theirs: str) -> np.ndarray:
    if '{}' not in theirs:
        return state[theirs].numpy().copy()
    layers = [state[theirs.format(layer)].numpy() for layer in range(2)]
    return np.stack([tensor.T for tensor in layers])
