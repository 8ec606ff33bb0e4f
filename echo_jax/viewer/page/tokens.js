// One rollout as the conversation that it was, every token with what is known of it.
//
// A token is a <span>; a block is what one side said without a pause. Colours are classes, so that
// a theme is the style sheet's affair. Long blocks show their beginning until asked for more.
'use strict';

const SHOWN_AT_FIRST = 3000; // tokens of a block
const SHOWN_MORE = 20000; // tokens that one press adds
const MOST_SURPRISES = 200;
const ROLES = {
  prompt: 'the task, and everything before it',
  action: 'what the agent wrote',
  scaffold: 'the chat template around it',
  warning: 'a warning about the call\'s format',
  feedback: 'the harness: a call that was wrong',
  wrapper: 'the harness, around an output',
  output: 'what the terminal wrote',
};

function speakerOf(role) {
  return { prompt: 'prompt', action: 'agent' }[role] ?? 'terminal';
}

// Bounds between the eight levels of colour, in nats; what is a surprise has a lot of them.
const NATS = [0.05, 0.2, 0.5, 1, 2, 4, 8];
const ADVANTAGES = [0.25, 0.75, 1.5];

const MEASURES = {
  role: { title: 'role' },
  logprob: { title: 'log-probability', unit: 'nats', level: (x) => heat(-x) },
  entropy: { title: 'entropy', unit: 'nats', level: heat },
  ce: { title: 'environment CE', unit: 'nats', level: heat },
  advantage: { title: 'advantage', unit: '', level: signed },
};

function heat(nats) {
  return `h${NATS.filter((bound) => nats >= bound).length}`;
}

function signed(x) {
  if (x === 0) return 'a0';
  const level = 1 + ADVANTAGES.filter((bound) => Math.abs(x) >= bound).length;
  return `${x > 0 ? 'a' : 'b'}${level}`;
}

// White space of one token, so that it can be seen.
function signs(text) {
  return text.replaceAll('\n', '⏎').replaceAll('\t', '⇥').replaceAll(' ', '␣');
}

function expand(runs) {
  const values = [];
  for (const [value, count] of runs) for (let i = 0; i < count; i++) values.push(value);
  return values;
}

class Conversation {
  constructor(rollout) {
    this.rollout = rollout;
    this.roles = expand(rollout.roles);
    this.versions = expand(rollout.version_runs);
    this.values = this.measureTokens();
    this.spans = new Array(this.roles.length).fill(null);
    this.cursor = -1;
    this.color = 'role';
    this.tip = el('div', { class: 'tip', role: 'tooltip', hidden: true });
    this.element = el('div', {
      class: 'conversation', tabindex: 0, role: 'group',
      'aria-label': 'Tokens of the rollout; the arrow keys go from one to the next',
      onkeydown: (event) => { this.key(event); },
      onblur: () => { this.hideTip(); },
    });
    this.blocks = this.makeBlocks();
    this.element.append(...this.blocks.map((block) => block.element), this.tip);
    this.element.addEventListener('mouseover', (event) => {
      if (event.target.token !== undefined) this.showTip(event.target.token);
    });
    this.element.addEventListener('mouseleave', () => { this.hideTip(); });
    this.element.addEventListener('click', (event) => {
      if (event.target.token !== undefined) this.move(event.target.token, false);
    });
  }

  // Values by measure, null where a token has none; only of measures that there are.
  measureTokens() {
    const { measures, advantage } = this.rollout;
    const values = { logprob: measures.learner ?? measures.sampler };
    if (measures.entropy) Object.assign(values, { entropy: measures.entropy, ce: measures.ce });
    if (advantage !== null) {
      values.advantage = this.roles.map((role) => (role === 'action' ? advantage : null));
    }
    return values;
  }

  makeBlocks() {
    const blocks = [];
    let turn = 0;
    for (let start = 0; start < this.roles.length;) {
      const speaker = speakerOf(this.roles[start]);
      let end = start;
      while (end < this.roles.length && speakerOf(this.roles[end]) === speaker) end++;
      if (speaker === 'agent') turn++;
      blocks.push(this.makeBlock(speaker, turn, start, end));
      start = end;
    }
    return blocks;
  }

  makeBlock(speaker, turn, start, end) {
    const title = speaker === 'agent' ? `turn ${turn}` : speaker;
    const text = el('div', { class: 'text' });
    const block = { speaker, turn, start, end, text, next: start, more: null };
    const facts = [`${show(end - start)} tokens`];
    const ce = this.values.ce?.slice(start, end).filter((value) => value !== null) ?? [];
    if (ce.length) facts.push(`CE ${show(ce.reduce((a, b) => a + b, 0) / ce.length)}`);
    block.element = el('section', { class: `block ${speaker}` },
      el('h4', {}, el('span', {}, title), faint(facts.join(' · '))), text);
    this.extend(block, end - start > SHOWN_AT_FIRST ? SHOWN_AT_FIRST / 2 : end - start);
    return block;
  }

  // Shows so many more tokens of a block, and how much is left.
  extend(block, count) {
    const last = Math.min(block.next + count, block.end);
    const spans = document.createDocumentFragment();
    for (let i = block.next; i < last; i++) {
      const span = document.createElement('span');
      span.textContent = this.rollout.text[i];
      span.token = i;
      span.className = this.classOf(i);
      this.spans[i] = span;
      spans.append(span);
    }
    block.text.append(spans);
    block.next = last;
    block.more?.remove();
    if (last === block.end) return;
    let left = 0;
    for (let i = last; i < block.end; i++) left += this.rollout.text[i].length;
    block.more = el('button', {
      type: 'button', class: 'more', onclick: () => { this.extend(block, SHOWN_MORE); },
    }, `show ${left.toLocaleString('en')} more characters`);
    block.element.append(block.more);
  }

  classOf(i) {
    if (this.color === 'role') return `t r-${this.roles[i]}`;
    const value = this.values[this.color]?.[i] ?? null;
    return value === null ? 't none' : `t ${MEASURES[this.color].level(value)}`;
  }

  paint(color) {
    this.color = color;
    for (const [i, span] of this.spans.entries()) if (span) span.className = this.classOf(i);
    if (this.cursor >= 0) this.mark(this.cursor, true);
  }

  // -------------------------------------------------------------------------------- the cursor

  get length() { return this.roles.length; }

  mark(i, on) {
    this.visibleSpan(i)?.classList.toggle('cursor', on);
  }

  // A character may be cut over tokens; the last of them has it, and stands for the others.
  visibleSpan(i) {
    let at = i;
    while (at < this.length - 1 && this.rollout.text[at] === '') at++;
    return this.spans[at];
  }

  move(i, scroll = true) {
    if (!this.length) return;
    if (this.cursor >= 0) this.mark(this.cursor, false);
    this.cursor = Math.min(Math.max(i, 0), this.length - 1);
    const block = this.blocks.find((each) => this.cursor < each.end);
    if (this.cursor + 1 >= block.next) {
      this.extend(block, Math.min(this.cursor + 200, block.end) - block.next);
    }
    this.mark(this.cursor, true);
    if (scroll) this.visibleSpan(this.cursor)?.scrollIntoView({ block: 'nearest' });
    this.showTip(this.cursor);
    say(this.describe(this.cursor).map((pair) => pair.join(' ')).join(', '));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const turn = (step) => {
      const starts = this.rollout.turn_starts;
      const found = step > 0
        ? starts.find((start) => start > this.cursor)
        : starts.findLast((start) => start < this.cursor);
      return found ?? this.cursor;
    };
    const moves = {
      ArrowRight: () => this.cursor + 1,
      ArrowLeft: () => this.cursor - 1,
      ArrowDown: () => turn(1),
      ArrowUp: () => turn(-1),
      Home: () => 0,
      End: () => this.length - 1,
    };
    if (event.key in moves) {
      event.preventDefault();
      this.move(moves[event.key]());
    }
  }

  // [[name, value], ...] of a token, for a person.
  describe(i) {
    const { id, text, measures } = this.rollout;
    const facts = [['token', `${i} of ${this.length}`], ['role', this.roles[i]]];
    const at = (name, values, unit) => {
      const value = values?.[i] ?? null;
      if (value !== null) facts.push([name, `${show(value)}${unit}`]);
    };
    at('log-probability, learner', measures.learner, ' nats');
    at('log-probability, sampler', measures.sampler, ' nats');
    at('entropy', measures.entropy, ' nats');
    at('environment CE', measures.ce, ' nats');
    at('advantage', this.values.advantage, '');
    if (this.versions[i] >= 0) facts.push(['policy version', show(this.versions[i])]);
    facts.push(['id', id[i]], ['text', signs(text[i]) || 'part of a character']);
    return facts;
  }

  showTip(i) {
    const span = this.visibleSpan(i);
    if (!span) return;
    const rows = this.describe(i).map(([name, value]) =>
      el('div', {}, el('dt', {}, name), el('dd', {}, String(value))));
    this.tip.replaceChildren(el('dl', {}, ...rows));
    this.tip.hidden = false;
    // Below the token's first line, or above it if there is no room, and never beyond the edges.
    const line = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const frame = this.element.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const below = line.bottom + height + 12 < innerHeight;
    const left = Math.min(line.left, Math.min(frame.right, innerWidth) - width - 8);
    this.tip.style.left = `${Math.max(left, frame.left) - frame.left}px`;
    this.tip.style.top = `${(below ? line.bottom + 6 : line.top - height - 6) - frame.top}px`;
  }

  hideTip() {
    this.tip.hidden = true;
  }

  // -------------------------------------------------------------------------------- surprises

  // The tokens with the largest environment CE, largest first.
  get surprises() {
    this.found ??= (this.values.ce ?? [])
      .map((value, i) => [value, i])
      .filter(([value]) => value !== null)
      .sort(([a], [b]) => b - a)
      .slice(0, MOST_SURPRISES)
      .map(([, i]) => i);
    return this.found;
  }

  // Goes to the next surprise (or back, by -1); returns its place from 1, or 0 if there is none.
  jump(step) {
    if (!this.surprises.length) return 0;
    const count = this.surprises.length;
    const first = step > 0 ? 0 : count - 1;
    this.place = this.place === undefined ? first : (this.place + step + count) % count;
    this.element.focus({ preventScroll: true });
    this.move(this.surprises[this.place]);
    this.visibleSpan(this.cursor)?.scrollIntoView({ block: 'center' });
    this.showTip(this.cursor);
    return this.place + 1;
  }
}

// What the colours mean, as a list.
function legend(color) {
  const item = ([name, text, title]) =>
    el('li', { title }, el('span', { class: `t ${name}` }, '■'), ` ${text}`);
  const bounds = [`< ${NATS[0]}`, ...NATS.map((bound) => `≥ ${bound}`)];
  const nats = bounds.map((text, i) => [`h${i}`, text]);
  const levels = {
    role: Object.entries(ROLES).map(([role, title]) => [`r-${role}`, role, title]),
    advantage: [
      ['b3', `≤ −${ADVANTAGES[1]}`], ['b1', 'below 0'], ['a0', '0'], ['a1', 'above 0'],
      ['a3', `≥ ${ADVANTAGES[1]}`],
    ],
  }[color] ?? nats;
  const unit = { role: '', advantage: '', logprob: 'nats below 0' }[color] ?? 'nats';
  return el('ul', { class: 'legend', 'aria-label': 'Colours' },
    ...levels.map(item), unit ? el('li', {}, unit) : null);
}
