// Predict: one picture, any number of tasks at once.
import { get } from './api.js';
import { predictionPanel } from './answers.js';
import { fill, h } from './dom.js';

const CHOSEN_AT_FIRST = 4;

export async function show(page, task, signal) {
  const tasks = (await get('/tasks', signal)).tasks.filter(task => task.live);
  if (!tasks.length) {
    fill(page, h('h1', {}, 'Predict'), h('div', { class: 'empty' }, h('p', { class: 'lead' }, 'No task has a live version yet.'), h('p', {}, h('a', { class: 'button primary', href: '#/train' }, 'Train a task'))));
    return;
  }
  const chosen = new Set(task ? [task] : tasks.slice(0, CHOSEN_AT_FIRST).map(task => task.task));
  const predictions = predictionPanel(() => tasks.map(task => task.task).filter(name => chosen.has(name)), signal);
  fill(page, h('h1', {}, 'Predict'),
    h('fieldset', { class: 'chips' }, h('legend', {}, tasks.length > 1 ? 'Tasks (all run in one forward pass)' : 'Task'), tasks.map(chip)),
    predictions.element);

  function chip({ task }) {
    const box = h('input', { type: 'checkbox', checked: chosen.has(task), onchange() { (box.checked ? chosen.add : chosen.delete).call(chosen, task); predictions.repeat(); } });
    return h('label', { class: 'chip' }, box, task);
  }
}
