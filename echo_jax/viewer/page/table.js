// The table of rollouts and of groups: our own, since a grid has to work in plain files too.
//
// Only the rows that can be seen are elements, so 100,000 rows cost what 40 do. The grid is one
// stop of the Tab key; arrows move in it and Enter opens.
'use strict';

const ROW_HEIGHT = 30; // pixels, as in view.css

// One row of the index; `get` gives a field as filter.js and the columns name it.
class Row {
  constructor(run, i) {
    this.run = run;
    this.i = i;
  }

  get(field) {
    if (field === 'run') return this.run.name;
    if (field === 'surprise') return this.run.surprise[this.i] ?? null;
    return this.run.rows.columns[field][this.i];
  }

  get key() { // as the state names a rollout: RUN/STORE/GROUP/SAMPLE
    return `${this.run.name}/${this.get('store')}/${this.get('group')}/${this.get('sample')}`;
  }
}

// The rollouts of one group, as one row with means.
class GroupRow {
  constructor(first) {
    this.first = first;
    this.rows = [first];
  }

  get run() { return this.first.run; }

  get(field) {
    const values = () => this.rows.map((row) => row.get(field)).filter((value) => value !== null);
    switch (field) {
      case 'sample': return this.rows.length;
      case 'reward': case 'turns': case 'tokens': case 'surprise': {
        const all = values();
        return all.length ? all.reduce((a, b) => a + b, 0) / all.length : null;
      }
      case 'status': {
        const ok = this.rows.filter((row) => row.get('status') === 'ok').length;
        return `${ok} of ${this.rows.length} ok`;
      }
      case 'stop': case 'reason': return [...new Set(values().filter((text) => text))].join(', ');
      default: return this.first.get(field);
    }
  }

  get key() { return `${this.first.run.name}/${this.get('store')}/${this.get('group')}`; }

  get filter() { // what shows its rollouts
    return `run="${this.first.run.name}" store=${this.get('store')} group=${this.get('group')}`;
  }
}

function groupRows(rows) {
  const groups = new Map();
  for (const row of rows) {
    const key = `${row.run.index}/${row.get('store')}/${row.get('group')}`;
    const group = groups.get(key);
    if (group) group.rows.push(row);
    else groups.set(key, new GroupRow(row));
  }
  return [...groups.values()];
}

// Sorted by '-reward' or 'reward'; what has no value is last either way. Equal ones are in order of
// newest group, then of run and sample.
function sortRows(rows, sort) {
  const field = sort.replace(/^-/, '');
  const sign = sort.startsWith('-') ? -1 : 1;
  const keyed = rows.map((row) =>
    [row.get(field), row.get('group'), row.run.index, row.get('sample'), row]);
  keyed.sort(([a, g, r, s], [b, h, q, t]) => {
    if (a !== b) {
      if (a === null || a === '') return 1;
      if (b === null || b === '') return -1;
      return sign * (a < b ? -1 : 1);
    }
    return h - g || r - q || s - t;
  });
  return keyed.map((each) => each.at(-1));
}

class Grid {
  // columns: [{field, title, number, text(row), tip}]; `open(row)` is what Enter and a click do.
  constructor(label, columns, open, sorted) {
    Object.assign(this, { columns, open, rows: [], active: 0, shown: [] });
    this.head = el('div', { class: 'grid-head', role: 'row', 'aria-rowindex': 1 });
    for (const column of columns) {
      const button = el('button', {
        type: 'button', tabindex: -1, title: column.tip,
        onclick: () => { sorted(column.field); },
      }, column.title);
      this.head.append(el('div', { role: 'columnheader', class: this.cellClass(column) }, button));
    }
    this.body = el('div', { class: 'grid-body', role: 'rowgroup' });
    this.scroller = el('div', { class: 'grid-scroll' }, this.head, this.body);
    this.element = el('div', {
      class: 'grid', role: 'grid', tabindex: 0, 'aria-label': label,
      onkeydown: (event) => { this.key(event); },
    }, this.scroller);
    this.scroller.addEventListener('scroll', () => { this.draw(); }, { passive: true });
    new ResizeObserver(() => { this.draw(); }).observe(this.scroller);
    this.body.addEventListener('click', (event) => {
      const line = event.target.closest('[role=row]');
      if (line && !String(getSelection())) this.open(this.rows[line.at]);
    });
  }

  cellClass(column) {
    return `c-${column.field}${column.number ? ' number' : ''}`;
  }

  // `top`: whether to begin at the first row, as after a change of the filter.
  setRows(rows, sort, top) {
    const key = this.rows[this.active]?.key;
    this.rows = rows;
    const found = top ? 0 : rows.findIndex((row) => row.key === key);
    this.active = Math.max(found, 0);
    this.element.setAttribute('aria-rowcount', rows.length + 1);
    this.body.style.height = `${rows.length * ROW_HEIGHT}px`;
    for (const [i, column] of this.columns.entries()) {
      const direction = sort === column.field ? 'ascending'
        : sort === `-${column.field}` ? 'descending' : 'none';
      this.head.children[i].setAttribute('aria-sort', direction);
    }
    if (top) this.scroller.scrollTop = 0;
    this.draw();
  }

  draw() {
    const height = this.scroller.clientHeight || 600;
    const first = Math.max(Math.floor(this.scroller.scrollTop / ROW_HEIGHT) - 8, 0);
    const last = Math.min(first + Math.ceil(height / ROW_HEIGHT) + 16, this.rows.length);
    const lines = [];
    for (let at = first; at < last; at++) lines.push(this.line(at));
    this.body.replaceChildren(...lines);
    const active = this.rows.length ? `row-${this.active}` : null;
    if (active) this.element.setAttribute('aria-activedescendant', active);
    else this.element.removeAttribute('aria-activedescendant');
  }

  line(at) {
    const row = this.rows[at];
    const line = el('div', {
      role: 'row', id: `row-${at}`, class: at === this.active ? 'active' : null,
      'aria-rowindex': at + 2, 'aria-selected': String(at === this.active),
    });
    line.at = at;
    line.style.top = `${at * ROW_HEIGHT}px`;
    for (const column of this.columns) {
      const text = column.text(row);
      const cell = el('div', { role: 'gridcell', class: this.cellClass(column) }, text);
      if (column.mark) cell.dataset.mark = column.mark(row);
      if (!column.number && text.length > 12) cell.title = text;
      line.append(cell);
    }
    return line;
  }

  key(event) {
    const page = Math.max(Math.floor(this.scroller.clientHeight / ROW_HEIGHT) - 2, 1);
    const steps = {
      ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity,
    };
    if (event.key === 'Enter' && this.rows.length) {
      this.open(this.rows[this.active]);
    } else if (event.key in steps && !event.ctrlKey && !event.metaKey && !event.altKey) {
      this.active = Math.min(Math.max(this.active + steps[event.key], 0), this.rows.length - 1);
      this.reveal();
    } else {
      return;
    }
    event.preventDefault();
  }

  reveal() {
    const top = this.active * ROW_HEIGHT;
    const height = this.scroller.clientHeight - this.head.offsetHeight;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    else if (top + ROW_HEIGHT > this.scroller.scrollTop + height) {
      this.scroller.scrollTop = top + ROW_HEIGHT - height;
    }
    this.draw();
  }
}

const COLUMNS = [
  { field: 'run', title: 'run', text: (row) => row.get('run') },
  { field: 'store', title: 'store', text: (row) => row.get('store') },
  { field: 'task', title: 'task', text: (row) => row.get('task') },
  { field: 'step', title: 'step', number: true, text: (row) => show(row.get('step')) },
  { field: 'group', title: 'group', number: true, text: (row) => show(row.get('group')) },
  { field: 'sample', title: 'sample', number: true, text: (row) => show(row.get('sample')) },
  { field: 'reward', title: 'reward', number: true, text: (row) => show(row.get('reward')) },
  {
    field: 'status', title: 'status', mark: (row) => row.get('status'),
    text: (row) => [row.get('status'), row.get('reason')].filter((text) => text).join(': '),
  },
  { field: 'turns', title: 'turns', number: true, text: (row) => show(row.get('turns')) },
  { field: 'tokens', title: 'tokens', number: true, text: (row) => show(row.get('tokens')) },
  { field: 'stop', title: 'stop', text: (row) => row.get('stop') },
  {
    field: 'surprise', title: 'surprise', number: true, text: (row) => show(row.get('surprise')),
    tip: "Mean environment CE of the terminal's output, nats a token, where scores are kept",
  },
];

function columnsFor(mode, severalRuns) {
  const columns = severalRuns ? COLUMNS : COLUMNS.slice(1);
  if (mode === 'rollouts') return columns;
  // Numbers are means over the group, but for how many rollouts it has.
  const sized = (column) => (column.field === 'sample' ? { ...column, title: 'size' } : column);
  return columns.map(sized);
}
