// The curves: any metric of metrics.jsonl, one chart each, the runs that are shown over each other.
//
// plotly.js draws them. It is 5 MB, so it comes after the page has been painted. It reads markup in
// texts, so names go to it through `plain`, and titles are elements of our own.
'use strict';

const DEFAULT_METRICS = [
  'rollout/reward', 'train/env_ce/output', 'eval/solve_rate', 'eval/env_ce/output', 'train/entropy',
  'train/grad_norm', 'rollout/tokens', 'rollout/turns',
];
const MOST_DEFAULTS = 6;
const NONE = '-'; // in the address, if no metric is chosen

function plain(text) {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');
}

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// All metrics of these runs, sorted. An interval, NAME/low and NAME/high, is drawn with NAME.
function metricNames(runs) {
  const names = new Set();
  for (const run of runs) for (const name of Object.keys(run.metrics.columns)) names.add(name);
  names.delete('step');
  const edge = /\/(low|high)$/;
  const isEdge = (name) => edge.test(name) && names.has(name.replace(edge, ''));
  return [...names].filter((name) => !isEdge(name)).sort();
}

function chosenMetrics(runs) {
  if (state.m === NONE) return [];
  if (state.m) return state.m.split(',').map(decodeURIComponent);
  const there = new Set(metricNames(runs));
  return DEFAULT_METRICS.filter((name) => there.has(name)).slice(0, MOST_DEFAULTS);
}

// {x, y} without the rows that have no such number.
function points(run, name) {
  const { step, [name]: values } = run.metrics.columns;
  const x = [];
  const y = [];
  for (const [i, value] of (values ?? []).entries()) {
    if (value !== null) { x.push(step[i]); y.push(value); }
  }
  return { x, y };
}

// The mean of each value and up to `width` - 1 before it.
function runningMean(values, width) {
  const means = [];
  let sum = 0;
  for (const [i, value] of values.entries()) {
    sum += value;
    if (i >= width) sum -= values[i - width];
    means.push(sum / Math.min(i + 1, width));
  }
  return means;
}

function traces(runs, name, smooth) {
  const found = [];
  for (const run of runs) {
    const color = cssColor(`--run-${run.index % 6}`);
    const label = plain(run.name);
    const { x, y } = points(run, name);
    const low = points(run, `${name}/low`);
    const high = points(run, `${name}/high`);
    if (low.x.length && high.x.length) {
      const edge = { mode: 'lines', line: { width: 0 }, hoverinfo: 'skip', showlegend: false };
      found.push({ ...edge, ...low });
      found.push({ ...edge, ...high, fill: 'tonexty', fillcolor: `${color}33` });
    }
    const seldom = name.startsWith('eval/'); // few points, each worth seeing
    const isSmooth = smooth > 1 && !seldom;
    if (isSmooth) {
      const line = { color, width: 1 };
      found.push({ x, y, mode: 'lines', line, opacity: 0.25, hoverinfo: 'skip' });
    }
    found.push({
      x, y: isSmooth ? runningMean(y, smooth) : y, name: label,
      mode: seldom ? 'lines+markers' : 'lines',
      marker: { color, size: 7 }, line: { color, width: 2 },
      hovertemplate: `${label}: %{y:.4~g}<extra></extra>`,
    });
  }
  return found;
}

function chartLayout(log) {
  const faint = cssColor('--faint');
  const axis = {
    gridcolor: cssColor('--line'), zerolinecolor: cssColor('--line'), linecolor: cssColor('--line'),
    tickfont: { color: faint, size: 11 }, automargin: true,
  };
  return {
    margin: { l: 44, r: 12, t: 8, b: 30 }, height: 220, showlegend: false, hovermode: 'x unified',
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { family: 'system-ui, sans-serif', color: cssColor('--text') },
    hoverlabel: {
      bgcolor: cssColor('--raised'), bordercolor: cssColor('--line'),
      font: { color: cssColor('--text') },
    },
    xaxis: { ...axis, hoverformat: 'd', tickformat: '~s' },
    yaxis: { ...axis, type: log ? 'log' : 'linear', tickformat: log ? '~g' : '~r' },
  };
}

class Curves {
  constructor() {
    this.charts = new Map(); // metric -> {figure, plot, last}
    this.search = el('input', {
      type: 'search', id: 'metric-search', placeholder: 'search', 'aria-label': 'Search metrics',
      value: state.search,
      oninput: () => { setState({ search: this.search.value }, false); this.list(); },
    });
    this.names = el('div', { class: 'names', role: 'group', 'aria-label': 'Metrics' });
    this.smooth = el('input', {
      type: 'range', min: 1, max: 50, value: state.smooth, id: 'smooth',
      oninput: () => { setState({ smooth: this.smooth.value }, false); this.draw(); },
    });
    this.width = el('output', { for: 'smooth' });
    this.log = el('input', {
      type: 'checkbox', id: 'log', checked: state.log === '1',
      onchange: () => { setState({ log: this.log.checked ? '1' : '' }); this.draw(); },
    });
    this.plots = el('div', { class: 'plots' });
    const reset = el('button', {
      type: 'button', class: 'quiet',
      onclick: () => { setState({ m: '' }); this.update(this.runs); },
    }, 'default set');
    this.element = el('div', { class: 'curves' },
      el('aside', { 'aria-label': 'Which curves' },
        el('div', { class: 'row' },
          el('label', { for: 'smooth' }, 'mean of'), this.smooth, this.width),
        el('div', { class: 'row' }, this.log, el('label', { for: 'log' }, 'log scale'), reset),
        this.search, this.names),
      this.plots);
  }

  update(runs) {
    this.runs = runs;
    this.list();
    return this.draw();
  }

  list() {
    const chosen = chosenMetrics(this.runs);
    const all = metricNames(this.runs);
    const wanted = state.search.toLowerCase();
    const found = all.filter((name) => name.toLowerCase().includes(wanted));
    const isNoneFound = all.length > 0 && !found.length; // without any, `draw` says why
    const signature = JSON.stringify([found, chosen, isNoneFound]);
    if (signature === this.listed) return; // else a row of metrics would take the focus away
    this.listed = signature;
    const { activeElement } = document;
    const focused = this.names.contains(activeElement) ? activeElement.value : null;
    this.names.replaceChildren(...found.map((name) => {
      const box = el('input', {
        type: 'checkbox', value: name, checked: chosen.includes(name),
        onchange: () => { this.choose(name, box.checked); },
      });
      return el('label', {}, box, name);
    }));
    if (isNoneFound) {
      this.names.append(el('p', { class: 'faint' }, 'No metric has this in its name.'));
    }
    [...this.names.querySelectorAll('input')].find((box) => box.value === focused)?.focus();
  }

  choose(name, on) {
    const others = chosenMetrics(this.runs).filter((each) => each !== name);
    const chosen = on ? [...others, name] : others;
    const names = chosen.map((each) => encodeURIComponent(each).replaceAll('%2F', '/'));
    setState({ m: names.join(',') || NONE });
    this.listed = null;
    this.update(this.runs);
  }

  async draw() {
    const smooth = Number(state.smooth);
    this.width.textContent = smooth > 1 ? `${smooth} steps` : 'no smoothing';
    const chosen = chosenMetrics(this.runs);
    for (const [name, chart] of this.charts) {
      if (!chosen.includes(name)) {
        chart.figure.remove();
        this.charts.delete(name);
      }
    }
    for (const name of chosen) this.plots.append(this.chart(name).figure);
    this.empty?.remove();
    if (!chosen.length) {
      const why = metricNames(this.runs).length
        ? 'No metric is chosen.' : 'No row of metrics is there yet.';
      this.empty = el('p', { class: 'faint' }, why);
      this.plots.append(this.empty);
    }
    await new Promise((resolve) => { requestAnimationFrame(() => { setTimeout(resolve); }); });
    await loadScript('plotly.js');
    for (const [name, { plot }] of this.charts) {
      if (!plot.isConnected) continue; // another view is shown by now
      await Plotly.react(plot, traces(this.runs, name, smooth), chartLayout(state.log === '1'), {
        responsive: true, displayModeBar: false, displaylogo: false,
      });
    }
    if (this.charts.size) this.plots.dataset.drawn = 'yes';
  }

  chart(name) {
    if (!this.charts.has(name)) {
      const plot = el('div', { class: 'plot' });
      const last = el('ul', { class: 'last' });
      const figure = el('figure', { 'aria-label': `Curve of ${name}` },
        el('figcaption', {}, el('h3', {}, name), last), plot);
      this.charts.set(name, { figure, plot, last });
    }
    const chart = this.charts.get(name);
    chart.last.replaceChildren(...this.runs.map((run) => {
      const { x, y } = points(run, name);
      const text = y.length ? `${show(y.at(-1))} at ${show(x.at(-1))}` : 'none';
      return el('li', {}, el('span', { class: `dot run-${run.index % 6}` }), text);
    }));
    return chart;
  }
}
