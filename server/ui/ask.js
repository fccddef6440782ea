// Ask: one picture for any number of tasks at once.
import { get } from './api.js';
import { panel } from './answers.js';
import { fill, h } from './dom.js';

const AT_FIRST = 4;

export async function show(page, wanted, signal) {
  const tasks = (await get('/tasks', signal)).tasks.filter(task => task.live);
  if (!tasks.length) {
    fill(page, h('h1', {}, 'Ask'), h('div', { class: 'empty' }, h('p', { class: 'lead' }, 'There is no task to ask yet.'), h('p', {}, h('a', { class: 'button primary', href: '#/train' }, 'Train one'))));
    return;
  }
  const chosen = new Set(wanted ? [wanted] : tasks.slice(0, AT_FIRST).map(task => task.task));
  const asking = panel(() => tasks.map(task => task.task).filter(name => chosen.has(name)), signal);
  fill(page, h('h1', {}, 'Ask'),
    h('fieldset', { class: 'chips' }, h('legend', {}, tasks.length > 1 ? 'Tasks, all answered in one forward pass' : 'Task'), tasks.map(chip)),
    asking.element);

  function chip({ task }) {
    const box = h('input', { type: 'checkbox', checked: chosen.has(task), onchange() { (box.checked ? chosen.add : chosen.delete).call(chosen, task); asking.again(); } });
    return h('label', { class: 'chip' }, box, task);
  }
}
