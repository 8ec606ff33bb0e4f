"""Every key of a recipe, with its meaning and its default. A recipe says what it changes.

The defaults are the released recipe of the paper (arXiv 2605.24517) as far as it sets a key, less
the model, which each recipe chooses. They are not a recipe themselves.

The comment above a key is its only description: docs/configuration.md is made of these comments by
`python -m docs.make_configuration`. A key that can have no effect with the others chosen is refused
when it is set; the table of these is in echo_jax/run/inert.py.
"""

import ml_collections
from ml_collections.config_dict import placeholder

ENV_COEFS = {'echo': 0.05, 'grpo': 0.0}


def get_config(variant: str = 'echo') -> ml_collections.ConfigDict:
    """The defaults, locked: a recipe that misspells a key gets an AttributeError.

    `variant` is 'echo', or 'grpo' for the same without the environment term.
    """
    if variant not in ENV_COEFS:
        raise ValueError(f"a recipe has the variants 'echo' and 'grpo', not {variant!r}")
    c = ml_collections.ConfigDict()
    # Every random number of the run is derived from this one.
    c.seed = 0
    # The number of steps of reinforcement learning, a batch each. The released code takes 2 epochs
    # of 8,770 tasks, 548 whole batches each. The paper's runs take 500 to 1,000; with 8B, ECHO is
    # after 240 where GRPO is at its best, after 460.
    c.num_steps = 1096
    # How often training goes through its tasks, which gives the number of steps in the place of
    # `num_steps`: an epoch has as many as there are whole batches of `batch.groups` tasks.
    c.num_epochs = placeholder(int)
    # The number of rollouts of one task that are drawn together and whose rewards are compared.
    c.group_size = 16
    # How many steps the weights that sample a token may be behind the weights that it trains. Above
    # 0, workers draw groups while the learner learns, and a step takes the oldest groups that are
    # whole and waits for no other, unless `batch.stragglers = 'wait'`. With `policy.backend =
    # 'jax'` it is 0, or 1: the groups of the next step are drawn while this one is learned.
    c.max_staleness = 0

    # How the rollouts of a step become the rows of a batch; see docs/design.md#batch.
    c.batch = ml_collections.ConfigDict()
    # The number of tasks of one step. A step has `batch.groups` x `group_size` rollouts.
    c.batch.groups = 16
    # The number of groups that are drawn beyond those that the steps need, so that a step has more
    # to choose from. Those that are left at the end are trained on by no step. For workers alone.
    c.batch.oversample = 0
    # The seconds that a worker may take to draw a group, before it is dropped; 0 is no limit. For
    # workers alone.
    c.batch.deadline_sec = 0.0
    # What a step does about groups that get too old for `max_staleness`: 'drop', it drops them, and
    # others take their place; 'wait', it waits for a group that would be too old for every later
    # step, so that none is dropped for its age, and long episodes count as much as short ones.
    c.batch.stragglers = 'drop'
    # The number of tokens of one row, at least `protocol.max_total_tokens`. The default is 34,096
    # rounded up to whole blocks of the attention kernel, 68 x 512.
    c.batch.seq_len = 34_816
    # The number of rows in one pass of the step's inner loop, a multiple of `mesh.data` x
    # `mesh.fsdp`. More rows take more memory.
    c.batch.micro_rows = 1
    # Whether several rollouts share a row if they fit into it. They never attend to each other.
    c.batch.pack = True
    # The number of mini-batches that a batch is cut into, each for one update of the optimizer;
    # advantages are those of the whole batch, and each mini-batch is normalised by its own counts.
    # See docs/design.md#updates.
    c.batch.updates = 1
    # How often a batch is gone through. A step has `batch.updates` x `batch.epochs` updates.
    c.batch.epochs = 1
    # What a batch is cut between: 'groups', which stay whole, or 'rollouts'.
    c.batch.mini = 'groups'

    # The objective; see docs/design.md#objective.
    c.loss = ml_collections.ConfigDict()
    # The weight of the environment term, ECHO's lambda. 0 is GRPO; the variant ':grpo' of a recipe
    # sets it.
    c.loss.env_coef = ENV_COEFS[variant]
    # How `loss.env_coef` changes over the steps.
    c.loss.env_schedule = ml_collections.ConfigDict()
    # The schedule: 'constant'; 'linear', from `loss.env_coef` in the first step towards
    # `loss.env_schedule.end`, which a step after the last would have; 'steps', other values from
    # certain steps on.
    c.loss.env_schedule.name = 'constant'
    # The coefficient that 'linear' goes to.
    c.loss.env_schedule.end = 0.0
    # For 'steps': the numbers of steps done at which the coefficient changes, which rise. Before
    # the first, it is `loss.env_coef`.
    c.loss.env_schedule.steps = ()
    # For 'steps': the coefficient from each of these on.
    c.loss.env_schedule.coefs = ()
    # Moves `loss.env_coef` so that the norm of the environment term's gradient keeps a ratio to the
    # norm of the others' gradient.
    c.loss.env_adaptive = ml_collections.ConfigDict()
    # The number of steps between two measurements of the norms, each of which costs two more passes
    # forward and back; 0 turns it off.
    c.loss.env_adaptive.every = 0
    # The ratio that is held: `loss.env_coef` times the norm of the environment term's gradient,
    # over the norm of the others'.
    c.loss.env_adaptive.target = 0.1
    # The part of the old coefficient in the new one, at least 0 and below 1.
    c.loss.env_adaptive.smoothing = 0.9
    # The smallest coefficient, at most `loss.env_coef`.
    c.loss.env_adaptive.low = 0.0
    # The largest coefficient, at least `loss.env_coef`. In the paper 0.2 made the model degenerate.
    c.loss.env_adaptive.high = 0.1
    # The tokens that the environment term learns: 'released', those that the paper's code learns;
    # 'output', only what the terminal wrote; 'warning', only format warnings;
    # 'warning_and_released', these and those of 'released'; 'observation', the whole message with
    # its chat template; see docs/design.md#targets. The environment cross-entropy is measured on
    # the same tokens, also with `loss.env_coef = 0`.
    c.loss.targets = 'released'
    # The number of these tokens of each turn's observation that are learned, the first; 0 is no
    # limit.
    c.loss.max_env_tokens = 0
    # Which rollouts the environment term learns from, the three filters of the paper's code; see
    # docs/design.md#targets. 0 turns a filter off.
    c.loss.env_filter = ml_collections.ConfigDict()
    # The least share of a rollout's turns that parsed.
    c.loss.env_filter.min_parsed = 0.0
    # The least share of a rollout's turns that parsed without a warning.
    c.loss.env_filter.min_clean = 0.0
    # The least share of correct rollouts among those of a group that are left: incorrect ones
    # beyond it are taken out, and all of them in a group without a correct one.
    c.loss.env_filter.min_correct = 0.0
    # Whether tokens of the terminal's output that nobody can predict are left out: times and dates,
    # process ids, hashes, temporary names and their like; see docs/design.md#targets.
    c.loss.drop_unpredictable = False
    # Leaves out the targets of a step that surprise the policy most or least, by their
    # cross-entropy at temperature 1. This costs one more pass forward.
    c.loss.drop_surprising = ml_collections.ConfigDict()
    # The share of the targets that is left out because they surprise most.
    c.loss.drop_surprising.top = 0.0
    # The share that is left out because they surprise least.
    c.loss.drop_surprising.bottom = 0.0
    # Whether targets that `loss.drop_unpredictable` and `loss.drop_surprising` leave out still
    # count in what the environment term is divided by. If not, the others weigh more.
    c.loss.count_dropped = True
    # What the terms are divided by: 'sequence_mean', by each rollout's own count and by the number
    # of rollouts; 'token_mean', by the count of tokens in the batch; 'prompt_mean', by the count of
    # tokens in the rollout's group and by the number of groups; 'dr_grpo', by the number of
    # rollouts times `protocol.max_total_tokens`; see docs/design.md#batch.
    c.loss.reduction = 'sequence_mean'
    # What the environment term of a rollout is divided by: 'full_observation', all its observation
    # tokens; 'selected', only its targets; 'token_mean', the targets of the whole batch, whatever
    # their rollout.
    c.loss.env_normalization = 'full_observation'
    # What the policy term raises, from the ratio of each token's new to its old probability:
    # 'clip', PPO's, with two bounds; 'dual_clip', with a third for negative advantages; 'gspo', the
    # same two bounds on the rollout's ratio; 'cispo', bounds that scale a token's gradient and
    # never take it away; 'dppo', without the tokens whose probability moved too far. With one
    # update a batch all have the same gradient, unless `loss.old_logprobs = 'rollout'`.
    c.loss.policy = 'clip'
    # How far below 1 the ratio is clipped, from 0 to 1. In the released recipe this cannot act: a
    # batch gets one update, in which the ratio is 1.
    c.loss.clip_low = 0.2
    # How far above 1 that ratio is clipped, which cannot act in the same case. The paper says 0.28,
    # its released config 0.2. 'gspo' needs much smaller bounds than the others: its paper has 3e-4
    # below and 4e-4 above.
    c.loss.clip_high = 0.2
    # How many times its negative advantage a token counts at most with 'dual_clip', more than 1.
    c.loss.dual_clip = 3.0
    # How far a token's probability may have moved with 'dppo', between 0 and 1: beyond it a token
    # is left out that would move further away.
    c.loss.dppo_tv = 0.15
    # The old probability of a token: 'current', that of the same forward pass, so that the ratio is
    # 1 in every update; 'recomputed', that before the first update of the batch, which is another
    # one only if a step has several updates; 'rollout', that which the sampler gave.
    c.loss.old_logprobs = 'current'
    # How a token's policy term is corrected for the difference between the learner's probabilities
    # and the sampler's: 'none'; 'token', it is multiplied by the ratio of the two, up to a cap;
    # 'sequence', by the ratio of the whole rollout, up to a cap; 'mask', tokens of a far-off ratio
    # are left out; 'icepop', the same, and the tokens that stay are multiplied by their ratio;
    # 'geometric', a rollout is left out if the geometric mean of its tokens' ratios is far off.
    # `loss.policy = 'gspo'` allows only those of a whole rollout.
    c.loss.mismatch = 'none'
    # The cap of the ratio of `loss.mismatch`, at least 1. 'mask', 'icepop' and 'geometric' leave
    # out what is above the cap or below 1 / cap.
    c.loss.mismatch_cap = 2.0
    # The weight of the KL divergence to the frozen model that reinforcement learning starts from; 0
    # leaves it out.
    c.loss.kl_coef = 0.0
    # How that divergence is estimated from a token's two probabilities: 'k1', 'k2' or 'k3', as in
    # GRPO; see docs/design.md#objective. 'k1' is refused as a loss, where its gradient would not
    # depend on the frozen model.
    c.loss.kl = 'k3'
    # Where it is subtracted: 'loss', from the objective, token by token; 'reward', from the reward
    # of the rollout, summed over its tokens, before advantages are made. 'reward' is refused with
    # `loss.advantages = 'maxrl'`.
    c.loss.kl_in = 'loss'
    # How rewards become advantages within a group: 'grpo', reward minus mean, over the standard
    # deviation; 'dr_grpo', reward minus mean; 'rloo', reward minus the mean of the other rollouts;
    # 'maxrl', reward minus mean, over the mean, which has rare successes count more. It counts a
    # reward below 0 as 0.
    c.loss.advantages = 'grpo'
    # Whether a rollout whose sandbox failed (INFRA_ERROR) counts as one with reward 0, as in the
    # paper's code. If not, it takes no part in its group and in the loss.
    c.loss.count_infra_errors = False
    # What happens to a group of equal rewards, from which the policy term learns nothing: 'keep',
    # it counts in N and trains the environment term; 'drop', it counts in the environment term
    # alone; 'redraw', a group of another task takes its place, which is refused if groups may be
    # late (workers with `max_staleness`, `batch.oversample` or `batch.deadline_sec`). See
    # docs/design.md#eligibility.
    c.loss.equal_groups = 'keep'
    # The number of tasks that one step may draw in the place of such groups, at most.
    c.loss.redraw_limit = 16
    # Whether a rollout that spent a budget (TRUNCATED or AGENT_TIMEOUT) is kept out of the policy
    # gradient; it trains the environment term all the same.
    c.loss.mask_truncated = False
    # Whether such a rollout still counts in its group's mean and in the policy term's N.
    c.loss.count_truncated = True

    # The agent's conversation; see docs/protocol.md.
    c.protocol = ml_collections.ConfigDict()
    # How calls are written: 'qwen3_xml'; see docs/protocol.md#call-format.
    c.protocol.dialect = 'qwen3_xml'
    # The system prompt: 'full', that of the paper, 955 tokens of configs/tiny.py's small tokenizer,
    # or 'brief', 26 of them; see docs/protocol.md#prompt.
    c.protocol.system_prompt = 'full'
    # The number of turns after which an episode ends; see docs/protocol.md#budgets.
    c.protocol.max_turns = 16
    # The number of tokens that are sampled in one turn, at most.
    c.protocol.max_turn_tokens = 2048
    # An episode ends when the tokens that its next turn would be sampled from have reached this.
    c.protocol.max_context_tokens = 16_384
    # The number of tokens of a whole rollout, prompt and observations included, at most.
    c.protocol.max_total_tokens = 34_096
    # What an episode earns that has spent `protocol.max_total_tokens`: 'discard', reward 0 without
    # a test, as in the released code; its tokens are trained on; 'verify', what the tests say.
    c.protocol.at_max_total_tokens = 'discard'
    # What happens to an episode that has spent the agent's time: 'discard', as in the released
    # code: reward 0, no token is trained on, but it counts in its group and in the number of
    # rollouts, and the time covers the sandbox's start and the tests too; 'verify', what the tests
    # say is trained on, and the time is the agent's alone.
    c.protocol.at_agent_timeout = 'discard'
    # A task whose prompt has more tokens is dropped when tasks are read.
    c.protocol.max_prompt_tokens = 1536
    # The number of seconds that a command may run if its call names no timeout.
    c.protocol.command_timeout = 30
    # The number of characters of a command's output that are shown, at most; see
    # docs/protocol.md#truncation.
    c.protocol.max_output_chars = 50_000
    # The part of a longer output that is shown: 'start', 'end', or 'start_end', half of each.
    c.protocol.truncation = 'start'
    # What happens to a turn's thinking afterwards: 'keep_all' keeps it; 'strip_rollout' hides it
    # from the sampler's later turns; 'strip_all' takes it out of the rollout too; see
    # docs/protocol.md#thinking.
    c.protocol.thinking = 'keep_all'
    # Which of a turn's commands run: 'first', 'last', or 'all'; see docs/protocol.md#a-turn.
    c.protocol.command_selection = 'first'
    # The number of commands of a turn that 'first' and 'last' run, at most.
    c.protocol.max_commands_per_turn = 1
    # Whether calls are read only from what follows the last `</think>`. If not, a call that is
    # written within the thinking is run, as in the released code; see docs/protocol.md#a-turn.
    c.protocol.parse_after_think = False
    # The reward that is lost for every 1,000 tokens past `protocol.length_penalty_start`; 0 turns
    # the penalty off; see docs/protocol.md#reward.
    c.protocol.length_penalty_coef = 0.0
    # The number of tokens after the prompt that cost no reward.
    c.protocol.length_penalty_start = 20_000

    # The model. Its sizes have the names of Hugging Face's config.json. A size of None is what
    # config.json of `model.path` says; one that is given must be the same there. Without
    # `model.path` all sizes that its family has must be given.
    c.model = ml_collections.ConfigDict()
    # The Hugging Face directory of a dense Qwen3 that training starts from. If this is empty,
    # training starts from random parameters.
    c.model.path = ''
    # The family of models, as config.json's `model_type` names it. None is what config.json of
    # `model.path` says, or 'qwen3'. A size that the family does not have must be None.
    c.model.model_type = placeholder(str)
    # The number of rows of the embedding. Without `model.path`, a tokenizer of this size is trained
    # on the tasks.
    c.model.vocab_size = placeholder(int)
    # The width of the hidden states.
    c.model.hidden_size = placeholder(int)
    # The inner width of the feed-forward layers.
    c.model.intermediate_size = placeholder(int)
    # The number of decoder layers.
    c.model.num_hidden_layers = placeholder(int)
    # The number of query heads.
    c.model.num_attention_heads = placeholder(int)
    # The number of key-value heads, which divides the number of query heads.
    c.model.num_key_value_heads = placeholder(int)
    # The width of one head, an even number.
    c.model.head_dim = placeholder(int)
    # The base of the rotary position embedding.
    c.model.rope_theta = placeholder(float)
    # The standard deviation of random parameters.
    c.model.initializer_range = placeholder(float)
    # Whether the output layer is the embedding itself.
    c.model.tie_word_embeddings = placeholder(bool)
    # The dtype of activations and of published weights, 'bfloat16' or 'float32'. Parameters are
    # float32 in the learner whatever this is.
    c.model.dtype = 'bfloat16'
    # The attention kernel: 'auto', the platform's; 'splash' on TPU; 'pallas' on CUDA; 'cudnn',
    # which is faster, and right only if every row holds one rollout; 'blocks', plain XLA on any
    # platform.
    c.model.attention = 'auto'
    # What the backward pass finds of a layer: 'none', everything is kept; 'attention', only what
    # attention returned; 'full', nothing, so the layer is computed again; 'offload', the same, with
    # the layers' inputs in the host's memory.
    c.model.remat = 'full'

    # The sizes of the mesh's axes. Their product is the number of devices; one of them may be -1
    # and takes what the others leave.
    c.mesh = ml_collections.ConfigDict()
    # The number of parts of a batch's rows that each have a whole copy of the parameters.
    c.mesh.data = 1
    # The number of parts of a batch's rows that share one copy of the parameters: each holds a part
    # of them and gathers the others.
    c.mesh.fsdp = -1
    # The number of devices that share the tokens of a row, which divides the memory that it takes.
    c.mesh.context = 1
    # The number of devices that share the matrix products of a layer.
    c.mesh.tensor = 1

    # Which mesh axes each logical axis of the parameters is divided over. A logical axis that a
    # recipe leaves out is whole on every device.
    c.sharding = ml_collections.ConfigDict()
    # What divides the vocabulary of the embedding and of the output layer: 'tensor'.
    c.sharding.vocab = 'tensor'
    # What divides the hidden dimension of every matrix: some of 'data', 'fsdp' and 'context'.
    c.sharding.embed = ('fsdp', 'context')
    # What divides the query heads: 'tensor', together with `sharding.kv_heads`.
    c.sharding.heads = 'tensor'
    # What divides the key-value heads: 'tensor', together with `sharding.heads`.
    c.sharding.kv_heads = 'tensor'
    # What divides the inner dimension of the feed-forward layers: 'tensor'.
    c.sharding.mlp = 'tensor'

    # The optimizer of reinforcement learning.
    c.optimizer = ml_collections.ConfigDict()
    # The algorithm: 'adamw', or 'muon', which leaves vectors and embeddings to AdamW.
    c.optimizer.name = 'adamw'
    # The learning rate after the warm-up.
    c.optimizer.learning_rate = 1e-6
    # The number of updates in which the learning rate rises to `learning_rate` linearly. A step has
    # `batch.updates` x `batch.epochs` of them.
    c.optimizer.warmup_steps = 20
    # Where that rise begins: 'zero', the first update's rate is 0, so that it changes nothing, as
    # in the released code; 'one', at one part of `warmup_steps` + 1, so that no update is lost.
    c.optimizer.warmup_from = 'zero'
    # The number of updates after the warm-up in which the learning rate falls linearly to a tenth;
    # 0 means that it stays.
    c.optimizer.decay_steps = 0
    # The decay of AdamW's average of the gradients.
    c.optimizer.b1 = 0.9
    # The decay of AdamW's average of the squared gradients. The paper says 0.95, its released
    # config 0.999.
    c.optimizer.b2 = 0.999
    # The decoupled weight decay, times the learning rate.
    c.optimizer.weight_decay = 0.01
    # A gradient whose norm over all parameters is larger is scaled down to this norm.
    c.optimizer.max_grad_norm = 0.2

    # What samples the rollouts; see docs/design.md#policy-and-sandbox.
    c.policy = ml_collections.ConfigDict()
    # Who samples: 'vllm', workers, which are processes with vLLM that run echo_jax.worker; 'jax',
    # the learner in its own process.
    c.policy.backend = 'vllm'
    # The temperature of training's rollouts, and of the probabilities in the objective.
    c.policy.temperature = 0.8
    # The number of episodes that one engine samples together, at least a whole group.
    c.policy.slots = 256
    # The seconds after which others draw the groups of a worker that has died. A worker that is
    # alive renews its claims three times in this time.
    c.policy.lease_sec = 60.0
    # What new weights do to the turns that a worker samples: 'recompute', the turns pause while the
    # weights load, are read again by the new weights, and go on; 'keep', they go on at once, with
    # what the old weights made of their beginning; 'drain', they end first, and the engine empties.
    # See docs/design.md#swaps.
    c.policy.swap = 'recompute'
    # The number of GPUs of one worker's engine.
    c.policy.tensor_parallel = 1
    # If N > 1, a whole copy of the weights is published at least every N versions, and what changed
    # in between. 1: every version is published whole.
    c.policy.keyframe_every = 1
    # The share of a GPU's memory that vLLM takes.
    c.policy.gpu_memory_utilization = 0.8

    # Where commands run; see docs/design.md#policy-and-sandbox.
    c.sandbox = ml_collections.ConfigDict()
    # The kind of sandbox: 'docker', containers; 'local', Linux namespaces without a daemon;
    # 'harbor', one of Harbor's environments.
    c.sandbox.backend = 'docker'
    # The number of sandboxes that one process has open at a time, at most.
    c.sandbox.at_once = 512
    # How commands are run: 'fresh', each in a new `bash -c` in the working directory, as in the
    # released code; 'persistent', all in one shell, so that `cd` and variables last; see
    # docs/protocol.md#shell.
    c.sandbox.shell = 'fresh'
    # The number of processes of one sandbox, at most.
    c.sandbox.processes = 512
    # The number of CPUs of one sandbox. None is what the task names, as it is for the next four
    # keys. If neither names a limit, there is none for the CPUs, and none for the memory of
    # 'docker' and 'harbor'; the memory is 1,024 MiB with 'local' and with `sandbox.hardening =
    # 'strict'`; the disk is 10 GiB with 'docker', 1 GiB with 'strict', 256 MiB with 'local'; agent
    # and tests have 600 seconds each.
    c.sandbox.cpus = placeholder(float)
    # The memory in MiB of a whole sandbox with 'docker' and 'harbor', of each process with 'local'.
    c.sandbox.memory_mb = placeholder(int)
    # The disk space in MiB that one sandbox may write.
    c.sandbox.disk_mb = placeholder(int)
    # The number of seconds that the agent has for a task.
    c.sandbox.agent_timeout = placeholder(float)
    # The number of seconds that the task's tests have.
    c.sandbox.verifier_timeout = placeholder(float)
    # What a container may do: 'docker', what Docker allows by default, as Harbor's tasks expect;
    # 'strict', no capability, no new privileges, a system that cannot be written, for tasks from
    # strangers that were written for it.
    c.sandbox.hardening = 'docker'
    # The user id that the agent has in a container with `sandbox.hardening = 'strict'`; 0 is root
    # without capabilities.
    c.sandbox.user = 1000
    # Whether commands that build an image reach the network.
    c.sandbox.build_network = True
    # The Docker runtime of the containers, such as 'runsc' (gVisor); None is the engine's default.
    c.sandbox.runtime = placeholder(str)
    # The name of Harbor's environment, such as 'docker', 'modal' or 'daytona'.
    c.sandbox.harbor_environment = 'docker'

    # The task's tests, which give the reward; see docs/protocol.md#verifier.
    c.verifier = ml_collections.ConfigDict()
    # Whether what the agent left running is killed before the tests. Harbor keeps it, since a task
    # may ask for a server. With 'local' and `sandbox.hardening = 'strict'` it is always killed.
    c.verifier.kill_agent_processes = False

    # What is worked on; see docs/protocol.md#tasks.
    c.tasks = ml_collections.ConfigDict()
    # The training tasks: folders of Harbor tasks, .parquet files or a registry.json of Harbor's,
    # with commas between them.
    # ':environment_only' after one keeps its tasks out of the policy term, and their tests are not
    # run. If this is empty, tasks are generated into the workdir.
    c.tasks.train = ''
    # The held-out tasks, likewise. Generated ones have words that training never sees.
    c.tasks.heldout = ''
    # The families of generated tasks, which take turns: some of the ten that are the default, each
    # a small job on files of its own; 'machine', whose tasks of a seed are all on one machine with
    # tools of its own, while the transcripts of the warm start are of other machines;
    # 'new_machine', the same with other tools in every task.
    c.tasks.families = (
        *('copy', 'find', 'rename', 'config', 'count'),
        *('delete', 'after', 'folder', 'join', 'last'),
    )
    # The number of training tasks that are generated.
    c.tasks.train_count = 1500
    # The number of held-out tasks that are generated.
    c.tasks.heldout_count = 128

    # Supervised steps before reinforcement learning, for a model that cannot work in a shell yet.
    c.warm_start = ml_collections.ConfigDict()
    # The number of supervised steps; 0 means that there is no warm start.
    c.warm_start.steps = 0
    # The number of steps at the beginning that learn from transcripts of exploration alone, at most
    # `warm_start.steps`. The steps after them are in turn of practice on training tasks and of
    # exploration.
    c.warm_start.explore_steps = 0
    # The number of rollouts that one step learns from.
    c.warm_start.rollouts = 64
    # The number of transcripts of exploration that are made.
    c.warm_start.explorations = 1500
    # The number of training tasks that practice shows.
    c.warm_start.demonstrations = 900
    # How the agent goes about the tasks of practice, by one habit a task in turn: 'solve', 'guess'
    # (it answers without a look), 'leave' (it leaves after a look).
    c.warm_start.habits = ('solve', 'guess', 'leave')
    # The sandbox in which the transcripts' commands run, a value of `sandbox.backend`.
    c.warm_start.sandbox = 'local'
    # The number of steps between two saves of the warm start.
    c.warm_start.save_every = 50
    # The optimizer of the warm start. Its keys have the meaning of those of `optimizer`.
    c.warm_start.optimizer = c.optimizer.copy_and_resolve_references()

    # How the held-out tasks are measured: before and after training with new rollouts of all, in
    # between with new rollouts of some, and by the environment cross-entropy of those drawn before.
    c.eval = ml_collections.ConfigDict()
    # The temperature of the rollouts of held-out tasks.
    c.eval.temperature = 0.6
    # The number of rollouts of every held-out task that is measured.
    c.eval.samples = 8
    # The number of steps between two measurements: of the environment cross-entropy, of
    # `eval.balance`, and of the solve rate of `eval.tasks`.
    c.eval.every = 20
    # The number of held-out tasks, the first ones, of which new rollouts are drawn every
    # `eval.every` steps; None is all of them, 0 is none. Before and after training all are drawn.
    # Workers draw them beside the next step's rollouts; 'jax' draws them after those.
    c.eval.tasks = placeholder(int)
    # Whether the gradients of the environment term and of the others are measured beside each
    # other, in the first step, in every `eval.every`-th and in the last: their norms and their
    # cosine, also with `loss.env_coef = 0`. It costs two more passes forward and back in these
    # steps, changes no update, and takes the memory of one more gradient.
    c.eval.balance = True

    # What a run writes down for people.
    c.logging = ml_collections.ConfigDict()
    # The learner's log-probabilities and entropies are kept for the viewer for the tokens of so
    # many of the newest steps, 6 bytes a token; 0 keeps none. They are those of the pass that the
    # step learns from, and cost no other.
    c.logging.scores = 20
    # The rollouts of so many of the newest steps are kept, and those of the evaluations between
    # these steps; None keeps all. What steps after the oldest save trained on stays in any case,
    # because a resumed run may need it; so do the held-out rollouts from before and after training.
    c.logging.rollouts = placeholder(int)
    # The project of Weights & Biases that the metrics go to, with the package wandb. If this is
    # empty, none do.
    c.logging.wandb = ''
    # The port of a page for Prometheus, which the learner serves to the network, with its newest
    # metrics and those that its workers report; with the package prometheus-client. 0: no page.
    c.logging.prometheus_port = 0

    # The learner's state on disk, from which a run resumes.
    c.checkpoint = ml_collections.ConfigDict()
    # The number of steps between two saves.
    c.checkpoint.every = 20
    # The number of saves that are kept, the newest.
    c.checkpoint.keep = 2
    # Whether the save of the highest solve rate of `eval.tasks` is kept too. A run then also saves
    # in every `eval.every`-th step.
    c.checkpoint.keep_best = False
    return c.lock()
