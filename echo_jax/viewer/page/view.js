// The page as a whole: which view is shown, of which runs, in which theme, by which keys.
'use strict';

const TABS = { overview: 'Overview', curves: 'Curves', rollouts: 'Rollouts', compare: 'Compare' };
const THEMES = { '': '◐ system', light: '○ light', dark: '● dark' };
const DARK = matchMedia('(prefers-color-scheme: dark)');
const POLL_SECONDS = 2;
const KEYS = [
  ['1 2 3 4', 'overview, curves, rollouts, compare'],
  ['/', 'the filter, or the search for metrics'],
  ['↑ ↓ PgUp PgDn Home End', 'in the table: another row'],
  ['Enter', 'in the table: open the row'],
  ['j k', 'at a rollout: the next or previous row of the table'],
  ['← → Home End', 'in a conversation: another token, with its numbers'],
  ['↑ ↓', 'in a conversation: the turn before or after'],
  ['n p', 'the next largest surprise, the one before'],
  ['Esc', 'back to the table; hide the numbers of a token'],
  ['t', 'theme: as the system has it, light, dark'],
  ['?', 'these keys'],
];

const main = document.getElementById('main');
let runs = []; // all runs of the page
let shown = {}; // the view in `main`: its element, and what else it keeps; {} while one is loaded
let drawing = 0; // numbers the drawings of views, so that a late one is dropped

function shownRuns() {
  const names = state.runs ? state.runs.split(',').map(decodeURIComponent) : [];
  const chosen = runs.filter((run) => names.includes(run.name));
  return chosen.length ? chosen : runs;
}

function trouble(error) {
  const line = document.getElementById('trouble');
  line.hidden = !error;
  line.textContent = error ? error.message : '';
}

// ---------------------------------------------------------------------------------- what is read

class RunData {
  constructor(index, { name, url }) {
    Object.assign(this, { index, name, url, glance: null, all: [], surprise: [] });
    this.metrics = new Log(index, 'metrics');
    this.rows = new Log(index, 'rows');
    this.scored = new Log(index, 'scored');
  }

  async look() {
    this.glance = await load(`run-${this.index}/glance`);
  }

  // The next part of each log, and what it has changed.
  async follow() {
    const logs = [this.metrics, this.rows, this.scored];
    const [metrics, rows, scored] = await Promise.all(logs.map((log) => log.take()));
    if (this.all.length > this.rows.length) this.all = []; // the viewer was started again
    for (let i = this.all.length; i < this.rows.length; i++) this.all.push(new Row(this, i));
    if (scored) {
      const { row = [], surprise = [] } = this.scored.columns;
      this.surprise = [];
      for (const [i, at] of row.entries()) this.surprise[at] = surprise[i];
    }
    return { metrics, rows: rows || scored, behind: logs.some((log) => log.behind) };
  }
}

// Reads what is new and shows it; long logs come in parts, and each is shown before the next.
async function poll() {
  try {
    await Promise.all(runs.map((run) => run.look()));
    while (await pollParts());
    trouble(null);
  } catch (error) {
    trouble(error);
  }
}

async function pollParts() {
  const changes = await Promise.all(runs.map((run) => run.follow()));
  const metrics = changes.some((change) => change.metrics);
  const rows = changes.some((change) => change.rows);
  if (state.tab === 'overview' && glances() !== shown.glances) draw();
  for (const element of main.querySelectorAll('.ago')) element.tell();
  if (state.tab === 'curves' && metrics) await shown.curves?.update(shownRuns());
  if (state.tab === 'rollouts' && rows && !state.r) fillTable(false);
  if (state.tab === 'rollouts' && !state.r) countRows();
  if (state.tab === 'compare' && rows && !main.firstElementChild?.matches('.compare')) draw();
  return changes.some((change) => change.behind);
}

// What the cards say, apart from the time. To draw them again closes what a person has opened, so
// that is done only when this changes.
function glances() {
  return JSON.stringify(shownRuns().map((run) => ({ ...run.glance, now: 0 })));
}

// ------------------------------------------------------------------------------------ the views

// Each of the functions that draw a view returns {element, ...}, what `shown` is to be, and leaves
// `shown` alone: by the time that a rollout has come, another view may have been asked for. `ready`
// is called when the element stands in the page.
async function draw() {
  const mine = ++drawing;
  const names = shownRuns().map((run) => run.name).join(', ');
  document.title = `${TABS[state.tab] ?? TABS.overview} · ${names} · echo_jax`;
  drawBar();
  const views = { curves: drawCurves, rollouts: drawRollouts, compare: drawCompare };
  try {
    const view = await (views[state.tab] ?? drawOverview)();
    if (mine !== drawing) return;
    shown = view;
    // Who works by keyboard stays at the control that was used, or goes to the new content.
    const { activeElement: focused } = document;
    const inside = main.contains(focused);
    main.replaceChildren(view.element);
    main.dataset.view = state.tab;
    if (inside) (focused.id && document.getElementById(focused.id) || main).focus();
    await view.ready?.();
    trouble(null);
  } catch (error) {
    if (mine !== drawing) return;
    main.replaceChildren(el('p', { class: 'reason', role: 'alert' }, error.message));
  }
}

// The buttons of the bar are made once, so that they keep the focus.
function makeBar() {
  document.getElementById('tabs').append(...Object.entries(TABS).map(([tab, title], i) =>
    el('button', {
      type: 'button', value: tab, title: `${title} (${i + 1})`,
      onclick: () => { go({ tab, r: '' }); },
    }, title)));
  if (runs.length < 2) return;
  document.getElementById('run-choice').append(...runs.map((run) =>
    el('button', { type: 'button', onclick: () => { toggleRun(run); } },
      el('span', { class: `dot run-${run.index % 6}` }), run.name)));
}

function drawBar() {
  for (const button of document.getElementById('tabs').children) {
    if (button.value === state.tab) button.setAttribute('aria-current', 'page');
    else button.removeAttribute('aria-current');
  }
  const chosen = shownRuns();
  for (const [i, button] of [...document.getElementById('run-choice').children].entries()) {
    button.setAttribute('aria-pressed', String(chosen.includes(runs[i])));
  }
  document.getElementById('theme').textContent = THEMES[state.theme] ?? THEMES[''];
  applyTheme();
}

// The style sheet knows light and dark; charts have their colours from it.
function applyTheme() {
  const { dataset } = document.documentElement;
  const before = dataset.theme;
  dataset.theme = state.theme || (DARK.matches ? 'dark' : 'light');
  if (before !== dataset.theme) shown.curves?.draw();
}

function toggleRun(run) {
  const chosen = shownRuns();
  const next = runs.filter((each) => chosen.includes(each) !== (each === run));
  const all = next.length === 0 || next.length === runs.length;
  go({ runs: all ? '' : next.map((each) => encodeURIComponent(each.name)).join(',') });
}

// Another state, as a step that the browser's back button undoes.
function go(changes) {
  setState(changes);
  shown = {};
  return draw();
}

function drawOverview() {
  return { element: overview(shownRuns()), glances: glances() };
}

function drawCurves() {
  const curves = new Curves();
  return { element: curves.element, curves, ready: () => curves.update(shownRuns()) };
}

function drawRollouts() {
  return state.r ? drawRollout() : drawTable();
}

function drawTable() {
  const sorted = (field) => {
    const down = state.sort === `-${field}` || (!state.sort && field === 'step');
    setState({ sort: down ? field : `-${field}` });
    fillTable(true);
  };
  const open = (row) => {
    if (row instanceof GroupRow) go({ mode: 'rollouts', q: row.filter });
    else go({ r: row.key });
  };
  const grid = new Grid('Rollouts', columnsFor(state.mode, runs.length > 1), open, sorted);
  grid.element.classList.toggle('several', runs.length > 1);
  const count = el('output', { class: 'faint', 'aria-live': 'polite' });
  const error = el('p', { class: 'reason', role: 'alert', id: 'filter-error', hidden: true });
  const filter = el('input', {
    type: 'search', id: 'filter', value: state.q, autocomplete: 'off', spellcheck: 'false',
    placeholder: 'reward<0.5 status=ok task~grep step>=10', 'aria-label': 'Filter',
    'aria-describedby': 'filter-error',
    oninput: () => { setState({ q: filter.value }, false); fillTable(true); },
    onkeydown: (event) => {
      if (event.key !== 'ArrowDown') return;
      grid.element.focus();
      event.preventDefault();
    },
  });
  const mode = (name) => el('button', {
    type: 'button', id: `mode-${name}`, 'aria-pressed': String(state.mode === name),
    onclick: () => { go({ mode: name }); },
  }, name);
  const element = el('div', { class: 'table' },
    el('div', { class: 'row tools' }, filter,
      el('div', { class: 'runs', role: 'group', 'aria-label': 'Rows' },
        mode('rollouts'), mode('groups')),
      count),
    error, grid.element);
  return { element, grid, count, error, ready: () => { fillTable(true); } };
}

function fillTable(top) {
  if (!shown.grid) return;
  const { accepts, error } = parseFilter(state.q);
  shown.error.hidden = !error;
  shown.error.textContent = error ?? '';
  if (error) return;
  const all = shownRuns().flatMap((run) => run.all);
  const kept = state.q ? all.filter((row) => accepts((field) => row.get(field))) : all;
  const sort = state.sort || '-step';
  const rows = sortRows(state.mode === 'groups' ? groupRows(kept) : kept, sort);
  shown.kept = kept.length;
  shown.grid.setRows(rows, sort, top);
  countRows();
}

function countRows() {
  const chosen = shownRuns();
  const sum = (name) => chosen.reduce((total, run) => total + run.glance[name], 0);
  const all = chosen.reduce((total, run) => total + run.all.length, 0);
  const bad = sum('problem_count');
  const reading = sum('groups_read') + bad < sum('groups_found')
    ? `; reading ${show(sum('groups_read'))} of ${show(sum('groups_found'))} groups` : '';
  const unread = bad ? `; ${show(bad)} cannot be read: see the overview` : '';
  const text = `${show(shown.kept)} of ${show(all)} rollouts${reading}${unread}`;
  if (shown.count && shown.count.textContent !== text) shown.count.textContent = text;
}

async function drawRollout() {
  const { run, rollout } = await openRollout(runs, state.r);
  const actions = {
    back: () => { go({ r: '' }).then(() => { shown.grid?.element.focus(); }); },
    go: nextRollout,
    compare: () => { go({ tab: 'compare', task: rollout.task, a: state.r, b: '', r: '' }); },
  };
  return { ...rolloutPage(run, rollout, actions), actions };
}

// The next or previous row of the table, as it is filtered and sorted.
function nextRollout(step) {
  const { accepts = () => true } = parseFilter(state.q); // with a wrong filter, all rows
  const all = shownRuns().flatMap((run) => run.all);
  const kept = all.filter((row) => accepts((field) => row.get(field)));
  const rows = sortRows(kept, state.sort || '-step');
  const at = rows.findIndex((row) => row.key === state.r);
  const next = rows[at + step];
  if (next) go({ r: next.key });
  else say('There is no other row.');
}

async function drawCompare() {
  return { element: await comparePage(shownRuns(), draw) };
}

// --------------------------------------------------------------------------------- theme and keys

function nextTheme() {
  const names = Object.keys(THEMES);
  setState({ theme: names[(names.indexOf(state.theme) + 1) % names.length] }, false);
  drawBar();
}

function help() {
  const dialog = document.getElementById('help');
  dialog.replaceChildren(
    el('h2', { id: 'help-title' }, 'Keys'),
    el('dl', { class: 'keys' }, ...KEYS.map(([keys, what]) =>
      el('div', {}, el('dt', {}, keys), el('dd', {}, what)))),
    el('form', { method: 'dialog' }, el('button', {}, 'close')));
  dialog.showModal();
}

function onKey(event) {
  const typing = event.target.matches('input[type=search], input[type=text], select, textarea');
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.getElementById('help').open) return;
  if (typing) {
    if (event.key === 'Escape') event.target.blur();
    return;
  }
  const tabs = Object.keys(TABS);
  const surprise = (step) => () => { shown.conversation?.surprise(step); };
  const actions = {
    '?': help,
    t: nextTheme,
    '/': () => { document.querySelector('#filter, #metric-search, #task')?.focus(); },
    n: surprise(1),
    p: surprise(-1),
    j: () => { shown.actions?.go(1); },
    k: () => { shown.actions?.go(-1); },
    Escape: () => {
      const tips = document.querySelectorAll('.tip:not([hidden])');
      if (!tips.length) shown.actions?.back();
      for (const tip of tips) tip.hidden = true;
    },
  };
  for (const [i, tab] of tabs.entries()) actions[i + 1] = () => { go({ tab, r: '' }); };
  if (event.key in actions) {
    event.preventDefault();
    actions[event.key]();
  }
}

async function begin() {
  readState();
  applyTheme();
  document.getElementById('theme').addEventListener('click', nextTheme);
  document.getElementById('help-open').addEventListener('click', help);
  // The address is the state, so '#main' would replace it.
  document.getElementById('skip').addEventListener('click', (event) => {
    event.preventDefault();
    main.focus();
  });
  document.addEventListener('keydown', onKey);
  addEventListener('popstate', () => { readState(); shown = {}; draw(); });
  DARK.addEventListener('change', applyTheme);
  try {
    const site = await load('site');
    runs = site.runs.map((run, i) => new RunData(i, run));
    await Promise.all(runs.map((run) => run.look()));
  } catch (error) {
    trouble(error);
    return;
  }
  makeBar();
  draw();
  await poll();
  while (LIVE) {
    await new Promise((resolve) => { setTimeout(resolve, 1000 * POLL_SECONDS); });
    if (!document.hidden) await poll();
  }
}

begin();
