"""A random Qwen3 of transformers, in float32, that publishes itself as the learner does."""

import copy
import pathlib

import numpy as np
import torch
import transformers

from echo_jax.store.weights import WeightStore

VOCAB, EOS = 500, 7  # no multiple of 64, to which vLLM pads


def published(kv_heads: int, tied: bool) -> dict[str, dict]:
    """What the learner says of the arrays of `Learner`'s model, written out.

    4 heads of 32 over `kv_heads`, an inner axis of 128.
    """

    def matrix(name, axis, length, units):
        split = {'axis': axis, 'length': length, 'units': units, 'padded': False}
        name = f'model.layers.{{}}.{name}.weight'
        return {'name': name, 'stacked': True, 'transposed': True, 'split': split}

    def norm(name, stacked=True):
        name = f'model.layers.{{}}.{name}.weight' if stacked else name
        return {'name': name, 'stacked': stacked, 'transposed': False, 'split': None}

    def words(name):
        split = {'axis': 0, 'length': VOCAB, 'units': VOCAB, 'padded': True}
        return {'name': name, 'stacked': False, 'transposed': False, 'split': split}

    arrays = {
        'embedding': words('model.embed_tokens.weight'),
        'layers/attention_norm': norm('input_layernorm'),
        'layers/wq': matrix('self_attn.q_proj', 0, 128, 4),
        'layers/wk': matrix('self_attn.k_proj', 0, 32 * kv_heads, kv_heads),
        'layers/wv': matrix('self_attn.v_proj', 0, 32 * kv_heads, kv_heads),
        'layers/q_norm': norm('self_attn.q_norm'),
        'layers/k_norm': norm('self_attn.k_norm'),
        'layers/wo': matrix('self_attn.o_proj', 1, 128, 4),
        'layers/mlp_norm': norm('post_attention_layernorm'),
        'layers/w_gate': matrix('mlp.gate_proj', 0, 128, 128),
        'layers/w_up': matrix('mlp.up_proj', 0, 128, 128),
        'layers/w_down': matrix('mlp.down_proj', 1, 128, 128),
        'final_norm': norm('model.norm.weight', stacked=False),
    }
    return arrays if tied else arrays | {'head': words('lm_head.weight')}


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
        about = published(self.model.config.num_key_value_heads, self.tied)
        self.versions[version] = copy.deepcopy(state)
        logprobs = self.logprobs(self.probe) + probe_error
        arrays = {name: _ours(state, said['name']) for name, said in about.items()}
        probe = {'tokens': self.probe, 'logprobs': logprobs.tolist(), 'temperature': 1.0}
        self.store.publish(arrays, version, about={'arrays': about, 'probe': probe})

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
