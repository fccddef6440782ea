// All tasks: sample pictures, accuracy, number of requests, and whether the task is on the rack.
import { get, liveAlias, part } from './api.js';
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
  const matches = h('p', { class: 'muted small', role: 'status' }, count(tasks.length, 'task'));
  const input = h('input', { type: 'search', placeholder: 'Filter by name', 'aria-label': 'Filter tasks by name', oninput() {
    const filtered = tasks.filter(task => task.task.includes(input.value.trim().toLowerCase()));
    matches.textContent = count(filtered.length, 'task');
    fillList(list, filtered);
  } });
  return h('div', { class: 'filter' }, input, matches);
}

function fillList(list, tasks, most = PAGE) {
  fill(list, tasks.slice(0, most).map(card));
  if (tasks.length <= most) return;
  const more = h('button', { type: 'button', onclick: () => fillList(list, tasks, most + PAGE) }, `Show more (${tasks.length} in total)`);
  list.append(h('li', { class: 'more' }, more));
}

function card(task) {
  const targets = liveAlias(task)?.targets ?? [];
  return h('li', { class: 'card entry' },
    h('div', { class: 'heading' },
      h('a', { class: 'name', href: `#/tasks/${part(task.task)}` }, task.task),
      h('span', { class: 'muted small' }, `${task.method ?? 'no live version'} · ${count(task.classes, 'class', 'classes')}`)),
    strip(task.dataset),
    figure('accuracy', percent(task.val_accuracy)),
    figure(task.requests === 1 ? 'request' : 'requests', task.requests.toLocaleString('en')),
    h('div', { class: 'state' },
      task.live && h('code', { title: task.live }, short(task.live)),
      targets.length > 1 && h('span', { class: 'tag' }, 'canary'),
      h('span', { class: task.resident ? 'tag on' : 'tag' }, task.resident ? 'on the rack' : 'not on the rack'),
      h('a', { class: 'button', href: `#/ask/${part(task.task)}`, 'aria-label': `Try it: ${task.task}` }, 'Try it')));
}

const figure = (label, value) => h('div', { class: 'figure' }, h('strong', {}, value), h('span', { class: 'muted small' }, label));

function welcome() {
  return h('div', { class: 'empty' },
    h('p', { class: 'lead' }, 'No tasks yet'),
    h('p', {}, 'A task is trained on a folder of pictures with one subfolder for each class. Training takes seconds to minutes, and the server answers requests meanwhile.'),
    h('p', {}, h('a', { class: 'button primary', href: '#/train' }, 'Train your first task')),
    h('p', { class: 'muted small' }, 'No pictures to start with? ', h('code', {}, 'python -m server sample pictures'), ' creates two small sample datasets.'));
}
