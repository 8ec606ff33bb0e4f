// What fills the page: the overview, one rollout, and two of them side by side.
'use strict';

function facts(pairs) {
  return el('dl', { class: 'facts' }, ...pairs
    .filter(([, value]) => value !== null && value !== undefined && value !== '')
    .map(([name, value, tip]) => el('div', { title: tip }, el('dt', {}, name), el('dd', {}, value))));
}

// ------------------------------------------------------------------------------------- overview

function overview(runs) {
  return el('div', { class: 'cards' }, ...runs.map(runCard));
}

function runCard(run) {
  const now = run.glance;
  const solved = now.summary;
  const total = now.steps === null ? '' : ` of ${show(now.steps)}`;
  const statuses = Object.entries(now.statuses).filter(([, count]) => count);
  const stands = now.finished ? 'finished' : now.step ? 'going on, or stopped' : 'no step yet';
  const card = el('section', { class: 'card', 'aria-label': `Run ${run.name}` },
    el('h2', {}, el('span', { class: `dot run-${run.index % 6}` }), run.name),
    el('p', { class: 'faint place' }, run.url));
  const bar = el('progress', { max: now.steps ?? 1, value: now.steps === null ? 0 : now.step, 'aria-label': 'Steps done' });
  card.append(el('div', { class: 'row wide' }, el('strong', {}, `step ${show(now.step)}${total}`), bar,
    el('span', { class: 'faint' }, now.seconds_left === null ? stands : `${duration(now.seconds_left)} left`)));
  card.append(facts([
    ['reward', show(now.reward), 'rollout/reward of the last step'],
    ['environment CE', now.env_ce === null ? '–' : `${show(now.env_ce)} nats`, 'Of the terminal\'s output in the last step, a token'],
    ['solve rate', solvedText(solved), 'Of the held-out tasks, before and after training'],
    ['held-out env CE', changeText(solved, 'env_ce_output', 'env_ce'), 'On the same rollouts, before and after training'],
    ['a step takes', duration(now.seconds_a_step), 'Mean of the last 20 steps'],
    ['last row', now.changed && !now.finished ? `${duration(Math.max(now.now - now.changed, 0))} ago` : null, 'When metrics.jsonl last changed'],
    ['staleness', now.staleness === null ? '–' : `${show(now.staleness)}, at most ${show(now.max_staleness)}`, 'Steps between the weights that sampled and those that are trained'],
  ]));
  if (now.sampling_share !== null) card.append(shares(now));
  if (statuses.length) card.append(failures(now, statuses));
  if (now.workers.length) card.append(workers(now));
  const reading = now.groups_read < now.groups_found ? `, ${show(now.groups_read)} of ${show(now.groups_found)} groups read` : '';
  card.append(el('p', { class: 'faint' }, `${show(now.rollouts)} rollouts${reading}`));
  if (now.problem_count) {
    card.append(el('details', { class: 'problems' }, el('summary', {}, `${show(now.problem_count)} that cannot be read`),
      el('ul', {}, ...now.problems.map((problem) => el('li', {}, problem)))));
  }
  return card;
}

function solvedText(summary) {
  const { solve_rate_before: before, solve_rate_after: after } = summary;
  return after === undefined ? '–' : `${percent(before)} → ${percent(after)}`;
}

function changeText(summary, ...names) {
  const name = names.find((each) => summary[`${each}_after`] !== undefined);
  return name ? `${show(summary[`${name}_before`])} → ${show(summary[`${name}_after`])}` : '–';
}

// Where a step's time goes: half of it is idle wherever one half waits for the other.
function shares(now) {
  const title = now.workers_sample
    ? 'the learner waits for rollouts, and then learns'
    : 'one process samples, and then learns';
  const part = (name, share) => {
    const bar = el('span', { class: `share ${name}` }, `${name} ${percent(share)}`);
    bar.style.flexGrow = Math.max(share, 0.02);
    return bar;
  };
  return el('div', { class: 'panel' }, el('h3', {}, 'Time of a step', el('span', { class: 'faint' }, title)),
    el('div', { class: 'shares' }, part(now.workers_sample ? 'waiting' : 'sampling', now.sampling_share), part('learning', now.learning_share)));
}

function failures(now, statuses) {
  const all = statuses.reduce((sum, [, count]) => sum + count, 0);
  return el('div', { class: 'panel' }, el('h3', {}, 'How rollouts ended', el('span', { class: 'faint' }, `in the last ${now.recent_steps} steps`)),
    el('ul', { class: 'statuses' }, ...statuses.map(([status, count]) =>
      el('li', {}, el('span', { 'data-mark': status }, status), ` ${show(count)} `, el('span', { class: 'faint' }, percent(count / all))))),
    now.reasons.length ? el('details', { open: true }, el('summary', {}, 'reasons, in all rollouts'),
      el('ul', {}, ...now.reasons.map(([status, reason, count]) => el('li', {}, `${show(count)} × ${status}: ${reason}`)))) : null);
}

function workers(now) {
  const cells = (worker) => [
    worker.worker, worker.at === undefined ? '–' : `${duration(Math.max(now.now - worker.at, 0))} ago`,
    show(worker.version), show(worker.drawing), show(worker.groups), show(worker.failed), show(worker.probe_gap)];
  const heads = ['worker', 'reported', 'version', 'drawing', 'groups', 'failed', 'probe gap'];
  return el('div', { class: 'panel scroll' }, el('h3', {}, 'Workers'), el('table', {},
    el('thead', {}, el('tr', {}, ...heads.map((head) => el('th', { scope: 'col' }, head)))),
    el('tbody', {}, ...now.workers.map((worker) => el('tr', {}, ...cells(worker).map((cell) => el('td', {}, cell)))))));
}

// ---------------------------------------------------------------------------------- one rollout

// 'RUN/STORE/GROUP/SAMPLE', as the state has it, for the documents.
function findRollout(runs, key) {
  const parts = key.split('/');
  const [store, group, sample] = parts.slice(-3);
  const name = parts.slice(0, -3).join('/');
  const run = runs.find((each) => each.name === name);
  if (!run) throw new Error(`There is no run ${name} on this page.`);
  return { run, store, group, sample, document: `run-${run.index}/rollout-${store}-${group}-${sample}` };
}

async function openRollout(runs, key) {
  const { run, document } = findRollout(runs, key);
  return { run, rollout: await load(document) };
}

// The controls of one or two conversations; `repaint` is called when another measure is chosen.
function colorChoice(conversations, repaint) {
  const choice = el('select', { id: 'color', onchange: () => { setState({ color: choice.value }); repaint(); } },
    ...Object.entries(MEASURES).map(([name, { title }]) => el('option', {
      value: name, disabled: name !== 'role' && !conversations.some((each) => each.values[name]),
    }, title)));
  choice.value = choice.querySelector(`option[value="${CSS.escape(state.color)}"]:not(:disabled)`) ? state.color : 'role';
  return choice;
}

// `whose`: what a page says elsewhere, which run and which rollout it is, is left out there.
function rolloutFacts(run, rollout, whose = true) {
  const named = [
    ['run', run.name], ['store', rollout.store], ['step', rollout.step && show(rollout.step)],
    ['group', show(rollout.group)], ['sample', show(rollout.sample)], ['reward', show(rollout.reward)],
  ];
  const versions = rollout.versions && [...new Set(rollout.versions)].join(' to ');
  return facts([
    ...(whose ? named : []), ['advantage', rollout.advantage === null ? null : show(rollout.advantage)],
    ['status', rollout.status], ['stop', rollout.stop], ['turns', show(rollout.turn_starts.length)],
    ['tokens', show(rollout.id.length)], ['policy version', versions],
    ['trains', rollout.environment_only ? 'the environment term alone' : null],
  ]);
}

function longText(text) {
  const pre = el('pre', { tabindex: 0 }, text.slice(-20000));
  if (text.length <= 20000) return [pre];
  const button = el('button', { type: 'button', class: 'more', onclick: () => { pre.textContent = text; button.remove(); } },
    `show ${(text.length - 20000).toLocaleString('en')} characters before`);
  return [button, pre];
}

function rolloutAside(rollout) {
  const rewards = rollout.group_rewards.map(([sample, reward, status]) =>
    el('li', { class: sample === rollout.sample ? 'here' : null, title: status }, `${sample}: ${show(reward)}`));
  const metrics = Object.entries(rollout.metrics).map(([name, value]) => [name, show(value)]);
  const named = metrics.filter(([name]) => name.startsWith('reward/'));
  return [
    ...rollout.notes.map((note) => el('p', { class: 'note' }, note)),
    el('details', { open: true }, el('summary', {}, 'the group\'s rewards'), el('ul', { class: 'rewards' }, ...rewards)),
    named.length ? el('details', { open: true }, el('summary', {}, 'reward file'), facts(named)) : null,
    el('details', { open: rollout.tests_output !== '' }, el('summary', {}, 'end of the tests\' output'),
      ...(rollout.tests_output ? longText(rollout.tests_output) : [el('p', { class: 'faint' }, 'none')])),
    el('details', {}, el('summary', {}, 'all its metrics'), facts(metrics.filter(([name]) => !named.some(([other]) => other === name)))),
  ].filter((part) => part);
}

// The page of one rollout. Returns {element, conversation}.
function rolloutPage(run, rollout, actions) {
  const conversation = new Conversation(rollout);
  const place = el('output', { class: 'faint' });
  const key = el('div', { class: 'key' });
  const repaint = () => {
    conversation.paint(choice.value);
    key.replaceChildren(legend(choice.value));
  };
  const choice = colorChoice([conversation], repaint);
  const count = conversation.surprises.length;
  conversation.surprise = (step) => {
    const at = conversation.jump(step);
    if (at) place.textContent = `${at} of ${count}: ${show(conversation.values.ce[conversation.cursor])} nats`;
  };
  const why = count ? 'The tokens that the environment surprised the model most with' : 'Needs the learner\'s scores, which are not kept of this rollout';
  const element = el('article', { class: 'rollout' },
    el('div', { class: 'stick' }, el('div', { class: 'row wide' },
      el('button', { type: 'button', onclick: actions.back }, '← table'),
      el('button', { type: 'button', id: 'row-before', onclick: () => { actions.go(-1); }, title: 'Previous row of the table (k)' }, '↑'),
      el('button', { type: 'button', id: 'row-after', onclick: () => { actions.go(1); }, title: 'Next row of the table (j)' }, '↓'),
      el('button', { type: 'button', onclick: actions.compare }, 'compare'),
      el('span', { class: 'gap' }),
      el('label', { for: 'color' }, 'colour by'), choice,
      el('button', { type: 'button', id: 'next-surprise', disabled: !count, title: `${why} (n)`, onclick: () => { conversation.surprise(1); } }, 'next surprise'),
      place), key),
    el('h2', {}, rollout.task),
    rolloutFacts(run, rollout),
    rollout.reason ? el('p', { class: 'reason' }, rollout.reason) : null,
    el('div', { class: 'split' }, conversation.element, el('aside', { 'aria-label': 'Tests and numbers' }, ...rolloutAside(rollout))));
  repaint();
  return { element, conversation };
}

// -------------------------------------------------------------------------------------- compare

// Two rollouts of one task. Returns {element, conversations}; `changed` redraws the page.
async function comparePage(runs, changed) {
  const tasks = new Map(); // task -> rows of all runs
  for (const run of runs) {
    for (const row of run.all) {
      const task = row.get('task');
      if (!tasks.has(task)) tasks.set(task, []);
      tasks.get(task).push(row);
    }
  }
  const rowOf = (key) => tasks.get(state.task)?.find((row) => row.key === key);
  if (!tasks.has(state.task)) {
    // The task with most rollouts has most to compare.
    const most = [...tasks].sort(([, a], [, b]) => b.length - a.length)[0];
    if (!most) return { element: el('p', { class: 'faint' }, 'No rollouts are there yet.'), conversations: [] };
    setState({ task: most[0] }, false);
  }
  const rows = sortRows(tasks.get(state.task), 'step');
  if (!rowOf(state.a)) setState({ a: rows[0].key }, false);
  if (!rowOf(state.b)) setState({ b: rows.findLast((row) => row.key !== state.a)?.key ?? rows[0].key }, false);

  const input = el('input', {
    type: 'search', id: 'task', list: 'tasks', value: state.task, autocomplete: 'off', spellcheck: 'false',
    onchange: () => {
      if (tasks.has(input.value)) {
        setState({ task: input.value, a: '', b: '' });
        changed();
      } else {
        input.setCustomValidity(`no rollout is of task ${input.value}`);
        input.reportValidity();
      }
    },
    oninput: () => { input.setCustomValidity(''); },
  });
  const options = el('datalist', { id: 'tasks' }, ...[...tasks.keys()].sort().slice(0, 5000).map((task) => el('option', { value: task })));
  const several = runs.length > 1;
  const picker = (side) => {
    const choice = el('select', { id: `pick-${side}`, 'aria-label': `Rollout ${side.toUpperCase()}`, onchange: () => { setState({ [side]: choice.value }); changed(); } },
      ...rows.map((row) => el('option', { value: row.key }, [
        several ? row.get('run') : null, row.get('step') === null ? row.get('store') : `step ${row.get('step')}`,
        `group ${row.get('group')}`, `sample ${row.get('sample')}`, `reward ${show(row.get('reward'))}`,
      ].filter((part) => part).join(' · '))));
    choice.value = state[side];
    return choice;
  };
  const opened = await Promise.all(['a', 'b'].map((side) => openRollout(runs, state[side])));
  const conversations = opened.map(({ rollout }) => new Conversation(rollout));
  const key = el('div', { class: 'key' });
  const repaint = () => {
    for (const each of conversations) each.paint(choice.value);
    key.replaceChildren(legend(choice.value));
  };
  const choice = colorChoice(conversations, repaint);
  repaint();
  const pane = (side, i) => {
    const { run, rollout } = opened[i];
    return el('section', { class: 'pane', 'aria-label': `Rollout ${side.toUpperCase()}` },
      picker(side), rolloutFacts(run, rollout, false), conversations[i].element);
  };
  return {
    conversations,
    element: el('article', { class: 'compare' },
      el('div', { class: 'stick' }, el('div', { class: 'row wide' }, el('label', { for: 'task' }, 'task'), input, options, el('span', { class: 'gap' }),
        el('label', { for: 'color' }, 'colour by'), choice), key),
      el('div', { class: 'panes' }, pane('a', 0), pane('b', 1))),
  };
}
