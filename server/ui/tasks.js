// All tasks: what each looks at, how good it is, how much it is asked, whether it sits on the device.
import { get, live, part } from './api.js';
import { fill, h } from './dom.js';
import { strip } from './thumbs.js';
import { count, percent, short } from './words.js';

const PAGE = 50;
const FILTER_FROM = 9;

export async function show(page, _, signal) {
  const { tasks } = await get('/tasks', signal);
  const list = h('ul', { class: 'cards', 'aria-label': 'Tasks' });
  fill(page,
    h('div', { class: 'head' }, h('h1', {}, 'Tasks'), tasks.length > 0 && h('a', { class: 'button primary', href: '#/train' }, 'Train a task')),
    tasks.length ? [tasks.length >= FILTER_FROM && filter(tasks, list), list] : welcome());
  fillList(list, tasks);
}

function filter(tasks, list) {
  const told = h('p', { class: 'muted small', role: 'status' }, count(tasks.length, 'task'));
  const input = h('input', { type: 'search', placeholder: 'Filter by name', 'aria-label': 'Filter tasks by name', oninput() {
    const found = tasks.filter(task => task.task.includes(input.value.trim().toLowerCase()));
    told.textContent = count(found.length, 'task');
    fillList(list, found);
  } });
  return h('div', { class: 'filter' }, input, told);
}

function fillList(list, tasks, most = PAGE) {
  fill(list, tasks.slice(0, most).map(card));
  if (tasks.length <= most) return;
  const more = h('button', { type: 'button', onclick: () => fillList(list, tasks, most + PAGE) }, `Show more of ${tasks.length}`);
  list.append(h('li', { class: 'more' }, more));
}

function card(task) {
  const targets = live(task)?.targets ?? [];
  return h('li', { class: 'card entry' },
    h('div', { class: 'who' },
      h('a', { class: 'name', href: `#/tasks/${part(task.task)}` }, task.task),
      h('span', { class: 'muted small' }, `${task.method ?? 'no live version'} · ${count(task.classes, 'class', 'classes')}`)),
    strip(task.dataset),
    figure('accuracy', percent(task.val_accuracy)),
    figure(task.requests === 1 ? 'request' : 'requests', task.requests.toLocaleString('en')),
    h('div', { class: 'state' },
      task.live && h('code', { title: task.live }, short(task.live)),
      targets.length > 1 && h('span', { class: 'tag' }, 'canary'),
      h('span', { class: task.resident ? 'tag on' : 'tag' }, task.resident ? 'on the rack' : 'stored'),
      h('a', { class: 'button', href: `#/ask/${part(task.task)}`, 'aria-label': `Ask ${task.task}` }, 'Ask')));
}

const figure = (label, value) => h('div', { class: 'figure' }, h('strong', {}, value), h('span', { class: 'muted small' }, label));

function welcome() {
  return h('div', { class: 'empty' },
    h('p', { class: 'lead' }, 'No task yet.'),
    h('p', {}, 'A task learns from folders of pictures, one folder for each answer it may give. Training takes seconds to minutes and never stops what is being served.'),
    h('p', {}, h('a', { class: 'button primary', href: '#/train' }, 'Train the first task')),
    h('p', { class: 'muted small' }, 'No pictures at hand? ', h('code', {}, 'python -m server sample pictures'), ' draws two small sets.'));
}
