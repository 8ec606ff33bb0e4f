// What fills the page: the overview, one rollout, and two of them side by side.
'use strict';

function faint(text) {
  return el('span', { class: 'faint' }, text);
}

function list(items) {
  return el('ul', {}, ...items.map((item) => el('li', {}, item)));
}

function fold(title, open, ...children) {
  return el('details', { open }, el('summary', {}, title), ...children);
}

// [[name, value, tip], ...] as a list, without those that have no value.
function facts(pairs) {
  const there = pairs.filter(([, value]) => value !== null && value !== undefined && value !== '');
  return el('dl', { class: 'facts' }, ...there.map(([name, value, tip]) =>
    el('div', { title: tip }, el('dt', {}, name), el('dd', {}, value))));
}

// ------------------------------------------------------------------------------------- overview

function overview(runs) {
  return el('div', { class: 'cards' }, ...runs.map(runCard));
}

function runCard(run) {
  const now = run.glance;
  const statuses = Object.entries(now.statuses).filter(([, count]) => count);
  const isReading = now.groups_read + now.problem_count < now.groups_found;
  const reading = isReading
    ? `, ${show(now.groups_read)} of ${show(now.groups_found)} groups read` : '';
  const kept = now.rollouts_of === null
    ? '' : `; those older than ${show(now.rollouts_of)} steps are removed`;
  return el('section', { class: 'card', 'aria-label': `Run ${run.name}` },
    el('h2', {}, el('span', { class: `dot run-${run.index % 6}` }), run.name),
    el('p', { class: 'faint place' }, run.url),
    progress(now),
    headline(run),
    now.sampling_share === null ? null : shares(now),
    statuses.length ? failures(now, statuses) : null,
    now.workers.length ? workers(run) : null,
    el('p', { class: 'faint' }, `${show(now.rollouts)} rollouts${kept}${reading}`),
    now.problem_count
      ? fold(`${show(now.problem_count)} that cannot be read`, false, list(now.problems)) : null);
}

function progress(now) {
  const stands = now.finished ? 'finished' : now.step ? 'going on, or stopped' : 'no step yet';
  const left = now.seconds_left === null ? stands : `${duration(now.seconds_left)} left`;
  const total = now.steps === null ? '' : ` of ${show(now.steps)}`;
  const done = now.steps === null ? 0 : now.step;
  return el('div', { class: 'row' },
    el('strong', {}, `step ${show(now.step)}${total}`),
    el('progress', { max: now.steps ?? 1, value: done, 'aria-label': 'Steps done' }),
    faint(left));
}

// How long ago that was. A poll has it said again, since it leaves the rest of the card as it is.
function ago(run, at) {
  const element = el('span', { class: 'ago' });
  element.tell = () => {
    element.textContent = `${duration(Math.max(run.glance.now - at, 0))} ago`;
  };
  element.tell();
  return element;
}

function headline(run) {
  const now = run.glance;
  const { summary } = now;
  const ce = ['env_ce_output', 'env_ce'].find((name) => summary[`${name}_after`] !== undefined);
  const change = (name, text) => (summary[`${name}_after`] === undefined
    ? '–' : `${text(summary[`${name}_before`])} → ${text(summary[`${name}_after`])}`);
  const row = now.changed && !now.finished ? ago(run, now.changed) : null;
  const staleness = now.staleness === null
    ? '–' : `${show(now.staleness)}, at most ${show(now.max_staleness)}`;
  const nats = now.env_ce === null ? '–' : `${show(now.env_ce)} nats`;
  const both = 'of the held-out tasks, before and after training';
  return facts([
    ['reward', show(now.reward), 'rollout/reward of the last step'],
    ['environment CE', nats, "Of the terminal's output in the last step, a token"],
    ['solve rate', change('solve_rate', percent), `The share solved ${both}`],
    ['held-out env CE', change(ce, show), `On the same rollouts ${both}`],
    ['a step takes', duration(now.seconds_a_step), 'Mean of the last 20 steps'],
    ['last row', row, 'When metrics.jsonl last changed'],
    ['staleness', staleness, 'Steps between the weights that sampled and those that are trained'],
  ]);
}

// Where the time of a step goes. With workers, the learner is idle while it waits for rollouts.
function shares(now) {
  const [name, title] = now.workers_sample
    ? ['waiting', 'the learner waits for rollouts, then it learns']
    : ['sampling', 'one process samples, then it learns'];
  const part = (what, share) => {
    const bar = el('span', { class: `share ${what}` }, `${what} ${percent(share)}`);
    bar.style.flexGrow = Math.max(share, 0.02);
    return bar;
  };
  return el('div', { class: 'panel' },
    el('h3', {}, 'Time of a step', faint(title)),
    el('div', { class: 'shares' },
      part(name, now.sampling_share), part('learning', now.learning_share)));
}

function failures(now, statuses) {
  const all = statuses.reduce((sum, [, count]) => sum + count, 0);
  const ends = statuses.map(([status, count]) => el('li', {},
    el('span', { 'data-mark': status }, status), ` ${show(count)} `, faint(percent(count / all))));
  const reasons = now.reasons.map(([status, reason, count]) =>
    `${show(count)} × ${status}: ${reason}`);
  return el('div', { class: 'panel' },
    el('h3', {}, 'How rollouts ended', faint(`in the last ${now.recent_steps} steps`)),
    el('ul', { class: 'statuses' }, ...ends),
    reasons.length ? fold('reasons, in all rollouts', true, list(reasons)) : null);
}

function workers(run) {
  const columns = {
    worker: (report) => report.worker,
    reported: (report) => (report.at === undefined ? '–' : ago(run, report.at)),
    version: (report) => show(report.version),
    drawing: (report) => show(report.drawing),
    groups: (report) => show(report.groups),
    failed: (report) => show(report.failed),
    'probe gap': (report) => show(report.probe_gap),
  };
  const head = Object.keys(columns).map((name) => el('th', { scope: 'col' }, name));
  const rows = run.glance.workers.map((report) =>
    el('tr', {}, ...Object.values(columns).map((text) => el('td', {}, text(report)))));
  return el('div', { class: 'panel scroll' },
    el('h3', {}, 'Workers'),
    el('table', {}, el('thead', {}, el('tr', {}, ...head)), el('tbody', {}, ...rows)));
}

// ---------------------------------------------------------------------------------- one rollout

// The rollout 'RUN/STORE/GROUP/SAMPLE', as the state names it, and its run.
async function openRollout(runs, key) {
  const parts = key.split('/');
  const [store, group, sample] = parts.slice(-3);
  const name = parts.slice(0, -3).join('/');
  const run = runs.find((each) => each.name === name);
  if (!run) throw new Error(`There is no run ${name} on this page.`);
  return { run, rollout: await load(`run-${run.index}/rollout-${store}-${group}-${sample}`) };
}

// A choice of colours and their legend, for one or two conversations.
function colorChoice(conversations) {
  const key = el('div', { class: 'key' });
  const repaint = () => {
    for (const each of conversations) each.paint(choice.value);
    key.replaceChildren(legend(choice.value));
  };
  const hasAny = (name) => name === 'role' || conversations.some((each) => each.values[name]);
  const options = Object.entries(MEASURES).map(([name, { title }]) =>
    el('option', { value: name, disabled: !hasAny(name) }, title));
  const choice = el('select', {
    id: 'color', onchange: () => { setState({ color: choice.value }); repaint(); },
  }, ...options);
  choice.value = state.color in MEASURES && hasAny(state.color) ? state.color : 'role';
  repaint();
  return { key, controls: [el('label', { for: 'color' }, 'colour by'), choice] };
}

// `whose`: whether it is said which run and rollout these are, which a page may say elsewhere.
function rolloutFacts(run, rollout, whose = true) {
  const names = [
    ['run', run.name], ['store', rollout.store], ['step', rollout.step && show(rollout.step)],
    ['group', show(rollout.group)], ['sample', show(rollout.sample)],
    ['reward', show(rollout.reward)],
  ];
  return facts([
    ...(whose ? names : []),
    ['advantage', rollout.advantage === null ? null : show(rollout.advantage)],
    ['status', rollout.status],
    ['stop', rollout.stop],
    ['turns', show(rollout.turn_starts.length)],
    ['tokens', show(rollout.id.length)],
    ['policy version', rollout.versions && [...new Set(rollout.versions)].join(' to ')],
    ['trains', rollout.environment_only ? 'the environment term alone' : null],
  ]);
}

const END = 20000; // characters of a long text that are shown at first, its end

function longText(text) {
  const pre = el('pre', { tabindex: 0 }, text.slice(-END));
  if (text.length <= END) return [pre];
  const before = (text.length - END).toLocaleString('en');
  const button = el('button', {
    type: 'button', class: 'more', onclick: () => { pre.textContent = text; button.remove(); },
  }, `show ${before} characters before`);
  return [button, pre];
}

function rolloutAside(rollout) {
  const { tests_output: output } = rollout;
  const rewards = rollout.group_rewards.map(([sample, reward, status]) =>
    el('li', { class: sample === rollout.sample ? 'here' : null, title: status },
      `${sample}: ${show(reward)}`));
  const isReward = ([name]) => name.startsWith('reward/');
  const metrics = Object.entries(rollout.metrics).map(([name, value]) => [name, show(value)]);
  const file = metrics.filter(isReward);
  return el('aside', { 'aria-label': 'Tests and numbers' },
    ...rollout.notes.map((note) => el('p', { class: 'note' }, note)),
    fold("the group's rewards", true, el('ul', { class: 'rewards' }, ...rewards)),
    file.length ? fold('reward file', true, facts(file)) : null,
    fold("end of the tests' output", output !== '',
      ...(output ? longText(output) : [el('p', { class: 'faint' }, 'none')])),
    fold('all its metrics', false, facts(metrics.filter((metric) => !isReward(metric)))));
}

// The page of one rollout. `actions`: back, compare, go(step).
function rolloutPage(run, rollout, actions) {
  const conversation = new Conversation(rollout);
  const { key, controls } = colorChoice([conversation]);
  const count = conversation.surprises.length;
  const place = el('output', { class: 'faint' });
  conversation.surprise = (step) => {
    const at = conversation.jump(step);
    const ce = conversation.values.ce?.[conversation.cursor];
    if (at) place.textContent = `${at} of ${count}: ${show(ce)} nats`;
  };
  const button = (text, onclick, more = {}) =>
    el('button', { type: 'button', onclick, ...more }, text);
  const surprise = {
    id: 'next-surprise',
    disabled: !count,
    title: count
      ? 'The tokens that the environment surprised the model most with (n)'
      : "It needs the learner's scores, and none of this rollout are kept",
  };
  const up = { id: 'row-before', title: 'Previous row of the table (k)' };
  const down = { id: 'row-after', title: 'Next row of the table (j)' };
  const element = el('article', { class: 'rollout' },
    el('div', { class: 'stick' },
      el('div', { class: 'row' },
        button('← table', actions.back),
        button('↑', () => { actions.go(-1); }, up),
        button('↓', () => { actions.go(1); }, down),
        button('compare', actions.compare),
        el('span', { class: 'gap' }),
        ...controls,
        button('next surprise', () => { conversation.surprise(1); }, surprise),
        place),
      key),
    el('h2', {}, rollout.task),
    rolloutFacts(run, rollout),
    rollout.reason ? el('p', { class: 'reason' }, rollout.reason) : null,
    el('div', { class: 'split' }, conversation.element, rolloutAside(rollout)));
  return { element, conversation };
}

// -------------------------------------------------------------------------------------- compare

// The rollouts of all runs by task.
function rowsByTask(runs) {
  const tasks = new Map();
  for (const row of runs.flatMap((run) => run.all)) {
    const task = row.get('task');
    if (!tasks.has(task)) tasks.set(task, []);
    tasks.get(task).push(row);
  }
  return tasks;
}

// Fills in what the state leaves open: the task with most rollouts, its first and last rollout.
function choosePair(tasks) {
  if (!tasks.has(state.task)) {
    const [[task]] = [...tasks].sort(([, a], [, b]) => b.length - a.length);
    setState({ task }, false);
  }
  const rows = sortRows(tasks.get(state.task), 'step');
  const isThere = (key) => rows.some((row) => row.key === key);
  if (!isThere(state.a)) setState({ a: rows[0].key }, false);
  if (!isThere(state.b)) {
    setState({ b: (rows.findLast((row) => row.key !== state.a) ?? rows[0]).key }, false);
  }
  return rows;
}

function taskChoice(tasks, changed) {
  const input = el('input', {
    type: 'search', id: 'task', list: 'tasks', value: state.task,
    autocomplete: 'off', spellcheck: 'false',
    oninput: () => { input.setCustomValidity(''); },
    onchange: () => {
      if (tasks.has(input.value)) {
        setState({ task: input.value, a: '', b: '' });
        changed();
      } else {
        input.setCustomValidity(`no rollout is of task ${input.value}`);
        input.reportValidity();
      }
    },
  });
  // More than that no list can show; any task can be typed.
  const offered = [...tasks.keys()].sort().slice(0, 2000);
  const options = offered.map((task) => el('option', { value: task }));
  return [el('label', { for: 'task' }, 'task'), input,
    el('datalist', { id: 'tasks' }, ...options)];
}

function rolloutChoice(side, rows, several, changed) {
  const text = (row) => [
    several ? row.get('run') : null,
    row.get('step') === null ? row.get('store') : `step ${row.get('step')}`,
    `group ${row.get('group')}`, `sample ${row.get('sample')}`, `reward ${show(row.get('reward'))}`,
  ].filter((part) => part).join(' · ');
  const choice = el('select', {
    id: `pick-${side}`, 'aria-label': `Rollout ${side.toUpperCase()}`,
    onchange: () => { setState({ [side]: choice.value }); changed(); },
  }, ...rows.map((row) => el('option', { value: row.key }, text(row))));
  choice.value = state[side];
  return choice;
}

// Two rollouts of one task. `changed` draws the page again.
async function comparePage(runs, changed) {
  const tasks = rowsByTask(runs);
  if (!tasks.size) return el('p', { class: 'faint' }, 'No rollouts are there yet.');
  const rows = choosePair(tasks);
  const sides = ['a', 'b'];
  const opened = await Promise.all(sides.map((side) => openRollout(runs, state[side])));
  const conversations = opened.map(({ rollout }) => new Conversation(rollout));
  const { key, controls } = colorChoice(conversations);
  const panes = sides.map((side, i) =>
    el('section', { class: 'pane', 'aria-label': `Rollout ${side.toUpperCase()}` },
      rolloutChoice(side, rows, runs.length > 1, changed),
      rolloutFacts(opened[i].run, opened[i].rollout, false),
      conversations[i].element));
  return el('article', { class: 'compare' },
    el('div', { class: 'stick' },
      el('div', { class: 'row' },
        ...taskChoice(tasks, changed), el('span', { class: 'gap' }), ...controls),
      key),
    el('div', { class: 'panes' }, ...panes));
}
