"""A small Qwen3 learns to work in a real shell, on one CPU, in minutes.

    make quickstart
    python -m echo_jax.train --config=configs/tiny.py --workdir=runs/tiny  # the same, by hand

Hardware: two CPU cores, 4 GiB of memory, Linux namespaces. Measured, seed 0: 11.4 min;
held-out solve rate 0.27 to 0.85, environment CE 0.82 to 0.33. Other seeds, GRPO: experiments/tiny.
`--config=configs/tiny.py:grpo` is the same run without the environment term.

Every part is the one that large recipes use, only small: Harbor task directories, the qwen3_xml
protocol, sandboxes, both stores, one jitted step.
"""

import ml_collections


def get_config(variant: str = 'echo') -> ml_collections.ConfigDict:
    if variant not in ('echo', 'grpo'):
        raise ValueError(f"configs/tiny.py has the variants 'echo' and 'grpo', not {variant!r}")
    c = ml_collections.ConfigDict()
    c.seed = 0  # every random number of the run is derived from it
    c.num_steps = 80  # learner updates of reinforcement learning
    c.group_size = 8  # rollouts of one task drawn together
    c.max_staleness = 0  # 0: rollouts of a step are sampled from the weights that it updates

    c.batch = ml_collections.ConfigDict()
    c.batch.groups = 8  # tasks a step
    c.batch.seq_len = 288  # tokens a row
    c.batch.micro_rows = 2  # rows in one pass of the step's inner loop; these fit a core's cache
    c.batch.pack = True  # several rollouts in one row where they fit

    c.loss = ml_collections.ConfigDict()
    c.loss.env_coef = 0.05 if variant == 'echo' else 0.0  # ECHO's lambda; 0 is GRPO
    c.loss.targets = 'released'  # or 'output': the terminal's own words only (DESIGN 3.1)
    c.loss.reduction = 'sequence_mean'  # or 'token_mean', 'dr_grpo' (DESIGN 3.3)
    c.loss.env_normalization = 'full_observation'  # or 'selected'
    c.loss.clip_low = 0.2
    c.loss.clip_high = 0.2
    c.loss.old_logprobs = 'current'  # or 'recomputed', 'rollout' (DESIGN 3.4)
    c.loss.mismatch = 'none'  # sampler correction: 'none', 'token', 'sequence', 'mask'
    c.loss.mismatch_cap = 2.0  # truncation of that correction's ratio
    c.loss.kl_coef = 0.0  # KL to the frozen warm-started model
    c.loss.advantages = 'grpo'  # or 'dr_grpo' (no division by the standard deviation)
    c.loss.count_infra_errors = False  # True: an INFRA_ERROR is a reward of 0, as the paper's code

    c.protocol = ml_collections.ConfigDict()  # PROTOCOL.md
    c.protocol.dialect = 'qwen3_xml'
    c.protocol.system_prompt = 'brief'  # 26 tokens of the small tokenizer; 'full' has 955
    c.protocol.max_turns = 5
    c.protocol.max_turn_tokens = 64
    c.protocol.max_context_tokens = 288
    c.protocol.max_total_tokens = 288
    c.protocol.max_prompt_tokens = 128  # longer prompts are dropped when tasks are read
    c.protocol.command_timeout = 30  # seconds, where the call names none
    c.protocol.max_output_chars = 50_000
    c.protocol.truncation = 'start'  # what is shown of longer output: 'start', 'end', 'start_end'
    c.protocol.thinking = 'keep_all'  # or 'strip_rollout', 'strip_all'
    c.protocol.command_selection = 'first'  # or 'last', 'all'
    c.protocol.max_commands_per_turn = 1
    c.protocol.parse_after_think = False
    c.protocol.length_penalty_coef = 0.0  # reward lost for every 1,000 tokens past the start; off
    c.protocol.length_penalty_start = 0  # tokens after the prompt

    c.model = ml_collections.ConfigDict()
    # A Hugging Face directory, of these sizes or in a recipe without any; empty: a random start.
    c.model.path = ''
    c.model.vocab_size = 512  # the tokenizer is trained to this size
    c.model.hidden_size = 128
    c.model.intermediate_size = 384
    c.model.num_hidden_layers = 4
    c.model.num_attention_heads = 4
    c.model.num_key_value_heads = 1
    c.model.head_dim = 32
    c.model.rope_theta = 10_000.0
    c.model.initializer_range = 0.05
    c.model.tie_word_embeddings = True
    c.model.dtype = 'float32'  # of activations; parameters are float32
    c.model.attention = 'auto'  # the platform's kernel; here 'blocks' (model/attention.py)
    c.model.remat = 'full'  # compute a layer again in the backward pass; 'none' keeps it (qwen3.py)

    c.mesh = ml_collections.ConfigDict({'data': 1, 'fsdp': -1, 'context': 1, 'tensor': 1})
    c.sharding = ml_collections.ConfigDict({'embed': 'fsdp'})  # logical axis: mesh axis

    c.optimizer = ml_collections.ConfigDict()  # of reinforcement learning
    c.optimizer.name = 'adamw'  # or 'muon'
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 5
    c.optimizer.decay_steps = 0  # 0: constant after the warm-up
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.01
    c.optimizer.max_grad_norm = 0.2

    c.policy = ml_collections.ConfigDict()
    c.policy.backend = 'jax'  # the embedded sampler; 'vllm': workers (python -m echo_jax.worker)
    c.policy.temperature = 1.0  # of training's rollouts, and of the objective
    c.policy.slots = 64  # episodes that decode together
    c.policy.tensor_parallel = 1  # GPUs of a worker's engine
    c.policy.keyframe_every = 1  # versions from one that is published whole to the next
    c.policy.gpu_memory_utilization = 0.8  # of a GPU's memory, vLLM's share

    c.sandbox = ml_collections.ConfigDict()
    c.sandbox.backend = 'local'  # or 'docker' or 'harbor'
    c.sandbox.at_once = 64  # sandboxes alive at one time
    c.sandbox.processes = 64  # limits of one sandbox
    c.sandbox.memory_mb = 512  # of a process
    c.sandbox.disk_mb = 32
    c.sandbox.user = 1000  # the agent's, in a container; 0: root without capabilities
    c.sandbox.runtime = ml_collections.config_dict.placeholder(str)  # Docker's; None: its default
    c.sandbox.build_network = True  # whether image builds reach the network
    c.sandbox.harbor_environment = 'docker'  # of Harbor's, where the backend is 'harbor'

    c.tasks = ml_collections.ConfigDict()
    # Folders of Harbor tasks or .parquet files, with commas between; ':environment_only' behind one
    # keeps its rewards out of it (agent/tasks.py). Empty: generated into the workdir.
    c.tasks.train = ''
    c.tasks.heldout = ''  # likewise, of words that training never sees
    c.tasks.train_count = 1500  # how many to generate
    c.tasks.heldout_count = 128

    c.warm_start = ml_collections.ConfigDict()  # supervised steps before reinforcement learning
    c.warm_start.steps = 210  # 0: none
    c.warm_start.explore_steps = 140  # the first, on exploration; then in turn with practice
    c.warm_start.rollouts = 64  # a step
    c.warm_start.explorations = 1500  # transcripts
    c.warm_start.demonstrations = 900  # training tasks that are shown
    # How they are gone about, in turn: solved, answered without a look, left after a look.
    c.warm_start.habits = ('solve', 'guess', 'leave')
    c.warm_start.sandbox = 'local'  # where the transcripts' commands run
    c.warm_start.save_every = 50  # steps between two saves
    c.warm_start.optimizer = ml_collections.ConfigDict(c.optimizer.to_dict())
    c.warm_start.optimizer.name = 'muon'
    c.warm_start.optimizer.learning_rate = 3e-3
    c.warm_start.optimizer.max_grad_norm = 1.0

    c.eval = ml_collections.ConfigDict()
    c.eval.temperature = 0.6
    c.eval.samples = 1  # of every held-out task, before and after
    c.eval.every = 5  # steps between two measurements of the held-out environment CE

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 10  # steps between two saves
    c.checkpoint.keep = 2
    return c
