// The table's filter: `reward<0.5 status=ok task~grep step>=10 timeout`, all of which must hold.
//
// A word without an operator is searched in the task's id and in the reason. Quotes hold spaces
// together: task="two words". Comparisons of text ignore case.
'use strict';

const FIELDS = [
  'run', 'store', 'task', 'step', 'group', 'sample', 'reward', 'status', 'reason', 'turns',
  'tokens', 'stop', 'surprise',
];
const NUMBERS = new Set(['step', 'group', 'sample', 'reward', 'turns', 'tokens', 'surprise']);

// {accepts(row)} for a correct expression, {error} with one line for a wrong one. `row` is called
// with a field's name and gives its value.
function parseFilter(text) {
  const parts = text.match(/(?:[^\s"]|"[^"]*"?)+/g) ?? [];
  const tests = [];
  for (const part of parts) {
    if ((part.split('"').length - 1) % 2) return { error: `${part}: the quote is not closed` };
    const bare = part.replaceAll('"', '');
    const match = /^([a-z_]+)(!=|<=|>=|!~|=|<|>|~)(.*)$/is.exec(bare);
    if (match === null) {
      const stray = /^(!=|<=|>=|!~|=|<|>|~)|(!=|<=|>=|!~|=|<|>|~)/.exec(bare);
      if (stray) return { error: `${part}: expected FIELD${stray[0]}VALUE, as in reward<0.5` };
      const word = bare.toLowerCase();
      tests.push((row) => holds(row('task'), word) || holds(row('reason'), word));
      continue;
    }
    const [, name, operator, value] = match;
    const field = name.toLowerCase();
    if (!FIELDS.includes(field)) {
      return { error: `${name} is no column; expected one of ${FIELDS.join(', ')}` };
    }
    const compare = NUMBERS.has(field) ? compareNumbers : compareTexts;
    const test = compare(operator, value);
    if (test.error) return { error: `${part}: ${test.error}` };
    tests.push((row) => test.accepts(row(field)));
  }
  return { accepts: (row) => tests.every((test) => test(row)) };
}

function holds(text, part) {
  return text !== null && text.toLowerCase().includes(part);
}

function compareNumbers(operator, value) {
  if (value === '' && (operator === '=' || operator === '!=')) { // surprise= finds rows without one
    return { accepts: (x) => (x === null) === (operator === '=') };
  }
  const limit = Number(value);
  if (value === '' || Number.isNaN(limit)) return { error: `${value || 'nothing'} is no number` };
  const compare = {
    '=': (x) => x === limit,
    '!=': (x) => x !== limit,
    '<': (x) => x < limit,
    '<=': (x) => x <= limit,
    '>': (x) => x > limit,
    '>=': (x) => x >= limit,
  }[operator];
  if (!compare) return { error: `${operator} compares text; expected = != < <= > >=` };
  return { accepts: (x) => x !== null && compare(x) };
}

function compareTexts(operator, value) {
  const wanted = value.toLowerCase();
  const compare = {
    '=': (x) => x.toLowerCase() === wanted,
    '!=': (x) => x.toLowerCase() !== wanted,
    '~': (x) => x.toLowerCase().includes(wanted),
    '!~': (x) => !x.toLowerCase().includes(wanted),
  }[operator];
  if (!compare) return { error: `${operator} compares numbers; expected = != ~ (holds) or !~` };
  return { accepts: (x) => compare(x ?? '') };
}
