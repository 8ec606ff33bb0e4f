// What all of the page stands on: documents by name, the state in the address, and elements.
//
// Nothing here or elsewhere sets innerHTML. Text of rollouts is text of strangers, and it reaches
// the page only as the textContent of elements that are made by `el`.
'use strict';

// ------------------------------------------------------------------------------------ documents

const waiting = new Map(); // name -> resolve, of documents that come as scripts

// Called by the scripts that an export consists of: receive("run-0/glance", {...}).
function receive(name, document) {
  const resolve = waiting.get(name);
  waiting.delete(name); // now: the one who waits may ask for the same name again at once
  resolve?.(document);
}

// The document of that name. It rejects with an Error whose message is for a person.
function load(name) {
  return LIVE ? fetchDocument(name) : runDocument(name);
}

async function fetchDocument(name) {
  let answer;
  try {
    // no-cache: the browser asks each time, and the server says 304 if nothing has changed.
    answer = await fetch(`data/${name}.json`, { cache: 'no-cache' });
  } catch {
    throw new Error('The viewer does not answer: is python -m echo_jax.view still running?');
  }
  if (!answer.ok) {
    throw new Error((await answer.text()).trim() || `${name}: status ${answer.status}`);
  }
  return answer.json();
}

function runDocument(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement('script');
    waiting.set(name, resolve);
    script.src = `data/${name}.js`;
    script.onload = () => { script.remove(); };
    script.onerror = () => {
      waiting.delete(name);
      script.remove();
      reject(new Error(`${name} is not among the files of this page.`));
    };
    document.head.append(script);
  });
}

const scripts = new Map(); // source -> promise
function loadScript(source) {
  if (!scripts.has(source)) {
    scripts.set(source, new Promise((resolve, reject) => {
      const script = document.createElement('script');
      script.src = source;
      script.onload = resolve;
      script.onerror = () => { reject(new Error(`${source} could not be loaded.`)); };
      document.head.append(script);
    }));
  }
  return scripts.get(source);
}

// A log is what only grows (viewer/logs.py). Its columns are kept here and added to.
class Log {
  constructor(run, name) {
    Object.assign(this, { run, name, epoch: null, length: 0, total: 0, columns: {} });
  }

  get behind() { return this.length < this.total; }

  // Takes the next part; true if there was anything. Another epoch means another log: all anew.
  async take() {
    if (!LIVE && this.epoch !== null && !this.behind) return false; // files do not grow
    const part = await load(`run-${this.run}/${this.name}-${this.length}`);
    if (this.epoch !== null && part.epoch !== this.epoch) {
      Object.assign(this, { epoch: part.epoch, length: 0, total: part.total, columns: {} });
      return true;
    }
    Object.assign(this, { epoch: part.epoch, total: part.total });
    for (const [name, values] of Object.entries(part.columns)) {
      // A metric may begin late, or be missing in a part: then it is null there.
      const column = (this.columns[name] ??= new Array(this.length).fill(null));
      for (const value of values) column.push(value);
    }
    this.length += part.count;
    for (const column of Object.values(this.columns)) {
      while (column.length < this.length) column.push(null);
    }
    return part.count > 0;
  }
}

// ---------------------------------------------------------------------------- state in the address

// Every choice is in the address behind '#', so that a link shows what its sender saw. A choice
// that is the default is left out.
const DEFAULTS = {
  tab: 'overview', runs: '', theme: '',
  m: '', smooth: '1', log: '', search: '',
  q: '', sort: '', mode: 'rollouts',
  r: '', color: 'role',
  task: '', a: '', b: '',
};
let state = { ...DEFAULTS };

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) {
    if (given.has(name)) state[name] = given.get(name);
  }
}

// `step`: whether going back should undo it. What is dragged or typed is no step of its own.
function setState(changes, step = true) {
  Object.assign(state, changes);
  const chosen = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== DEFAULTS[name]) chosen.set(name, value);
  }
  const text = chosen.toString().replaceAll('%2F', '/').replaceAll('%2C', ',');
  const address = text ? `#${text}` : location.pathname + location.search;
  if (step) history.pushState(null, '', address);
  else history.replaceState(null, '', address);
}

// ------------------------------------------------------------------------------------- elements

// el('p', {class: 'note', onclick: f}, 'text', child): attributes by name, listeners as onNAME.
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Says something to a screen reader, without moving the focus.
function say(text) {
  document.getElementById('said').textContent = text;
}

// ------------------------------------------------------------------------------------- numbers

function show(value) {
  if (value === null || value === undefined) return '–';
  if (Number.isInteger(value)) return value.toLocaleString('en');
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6)
    ? value.toExponential(2)
    : value.toLocaleString('en', { maximumSignificantDigits: 3 });
}

function percent(value) {
  if (value === null || value === undefined) return '–';
  return `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return '–';
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} days`;
}
