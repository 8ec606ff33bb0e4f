"""The training step of another library, in its own process, which learner_step.py starts.

    peer_step.py transformers|tunix FOLDER

FOLDER holds model/ (a Hugging Face directory), batch.npz (the fields of a Batch) and settings.json
(keys of a recipe's loss and optimizer). For each line `step` on stdin it takes one step and answers
on stdout with its seconds, loss and gradient norm. For `products` (transformers only) it times a
layer's matrix products. It imports nothing of echo_jax, because tunix may be installed in another
environment.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

KEYS = ('tokens', 'advantages', 'policy_weight', 'env_weight')


def read(folder: pathlib.Path) -> tuple[dict, list[dict[str, np.ndarray]]]:
    """(settings, micro-batches). In these, a token's values stand where the token is predicted.

    That is one place to the left of the token. So the logits need no copy without the last place;
    there stand the weights of the first token, all 0.
    """
    settings = json.loads((folder / 'settings.json').read_text())
    with np.load(folder / 'batch.npz') as file:
        batch = {key: file[key] for key in KEYS}
    shifted = {key: np.roll(value, -1, axis=1) for key, value in batch.items()}
    arrays = {'inputs': batch['tokens']} | shifted
    rows = settings['micro_rows']
    starts = range(0, len(batch['tokens']), rows)
    return settings, [{k: v[i : i + rows] for k, v in arrays.items()} for i in starts]


def transformers_side(folder: pathlib.Path) -> dict[str, Callable[[], dict]]:
    """PyTorch: scaled_dot_product_attention, fused AdamW, cross_entropy over whole logits."""
    import torch
    import transformers

    settings, micro_batches = read(folder)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / 'model', dtype=torch.float32, attn_implementation='sdpa'
    )
    model.to(device).train()
    if settings['remat'] == 'full':
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        settings['learning_rate'],
        (settings['b1'], settings['b2']),
        weight_decay=settings['weight_decay'],
        fused=True,
    )
    micro_batches = [
        {key: torch.as_tensor(value, device=device) for key, value in micro.items()}
        for micro in micro_batches
    ]
    forward = torch.compile(model) if settings['compile'] else model
    low, high = 1 - settings['clip_low'], 1 + settings['clip_high']

    def loss_of(micro):
        half = settings['dtype'] == 'bfloat16'
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = forward(input_ids=micro['inputs'], use_cache=False).logits
        targets = micro['tokens'].long()
        logprobs = -torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction='none'
        ).view(targets.shape)
        ratio = torch.exp(logprobs - logprobs.detach())
        gain = torch.minimum(
            ratio * micro['advantages'], ratio.clamp(low, high) * micro['advantages']
        )
        policy_loss = -(micro['policy_weight'] * gain).sum()
        return policy_loss - settings['env_coef'] * (micro['env_weight'] * logprobs).sum()

    def synchronize():
        if device == 'cuda':
            torch.cuda.synchronize()

    def step():
        synchronize()
        start = time.perf_counter()
        total = 0.0
        for micro in micro_batches:
            loss = loss_of(micro)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings['max_grad_norm'])
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds = time.perf_counter() - start
        return {'seconds': seconds, 'loss': float(total), 'grad_norm': float(norm)}

    tokens = micro_batches[0]['inputs'].numel()
    dtype = getattr(torch, settings['dtype'])
    weights = [
        module.weight.detach().to(dtype)
        for module in model.model.layers[0].modules()
        if isinstance(module, torch.nn.Linear)
    ]
    arrays = [
        [torch.randn(tokens, n, dtype=dtype, device=device) for n in (w.shape[1], w.shape[0])]
        for w in weights
    ]

    def products():
        synchronize()
        start = time.perf_counter()
        kept = [(x @ w.T, d @ w, d.T @ x) for (x, d), w in zip(arrays, weights)]
        synchronize()
        seconds = time.perf_counter() - start
        del kept
        return {'seconds': seconds}

    return {'step': step, 'products': products}


def tunix_side(folder: pathlib.Path) -> dict[str, Callable[[], dict]]:
    """tunix: its Qwen3, its log-probabilities of whole logits, its trainer's jitted step."""
    import jax
    import jax.numpy as jnp
    import optax
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params
    from tunix.rl.common import selective_log_softmax
    from tunix.sft import peft_trainer, utils

    settings, micro_batches = read(folder)
    sizes = json.loads((folder / 'model' / 'config.json').read_text())
    config = qwen3.ModelConfig(
        num_layers=sizes['num_hidden_layers'],
        vocab_size=sizes['vocab_size'],
        embed_dim=sizes['hidden_size'],
        hidden_dim=sizes['intermediate_size'],
        num_heads=sizes['num_attention_heads'],
        head_dim=sizes['head_dim'],
        num_kv_heads=sizes['num_key_value_heads'],
        norm_eps=sizes['rms_norm_eps'],
        rope_theta=sizes['rope_theta'],
        use_tied_embedding=sizes['tie_word_embeddings'],
        dtype=jnp.dtype(settings['dtype']),
        remat_config=qwen3.RematConfig[{'none': 'NONE', 'full': 'DECODER'}[settings['remat']]],
    )
    model = params.create_model_from_safe_tensors(str(folder / 'model'), config, dtype=jnp.float32)
    low, high = 1 - settings['clip_low'], 1 + settings['clip_high']
    count = len(micro_batches)

    def loss_of(model, inputs, tokens, advantages, policy_weight, env_weight):
        real = jnp.ones(inputs.shape, bool)
        positions = utils.build_positions_from_mask(real)
        logits, _ = model(inputs, positions, None, utils.make_causal_attn_mask(real))
        logprobs = selective_log_softmax(logits, tokens)
        ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
        gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
        policy_loss = -(policy_weight * gain).sum()
        loss = policy_loss - settings['env_coef'] * (env_weight * logprobs).sum()
        return loss * count  # the trainer averages the gradients of micro-batches

    optimizer = optax.chain(
        optax.snapshot('grad_norm', optax.global_norm),
        optax.clip_by_global_norm(settings['max_grad_norm']),
        optax.adamw(
            settings['learning_rate'],
            settings['b1'],
            settings['b2'],
            weight_decay=settings['weight_decay'],
        ),
    )
    trainer = peft_trainer.PeftTrainer(
        model,
        optimizer,
        peft_trainer.TrainingConfig(eval_every_n_steps=1, gradient_accumulation_steps=count),
    ).with_loss_fn(loss_of)
    micro_batches = jax.device_put(micro_batches)
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def step():
        start = time.perf_counter()
        losses = [train_step(micro)[0] for micro in micro_batches]
        norm = optax.tree.get(trainer.optimizer.opt_state, 'grad_norm')
        jax.block_until_ready((losses, norm))
        seconds = time.perf_counter() - start
        return {'seconds': seconds, 'loss': float(sum(losses)) / count, 'grad_norm': float(norm)}

    return {'step': step}


def main() -> None:
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever the libraries print goes to stderr, not among the answers
    sides = {'transformers': transformers_side, 'tunix': tunix_side}
    answer = sides[sys.argv[1]](pathlib.Path(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(answer[line.strip()]()), file=answers, flush=True)


if __name__ == '__main__':
    main()
