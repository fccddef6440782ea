// Changes of the alias `live`: each needs a confirmation, and fails if the alias has changed since the page showed it.
import { call, ifUnchanged, liveAlias, part } from './api.js';
import { confirmDialog, notify, run } from './dialogs.js';
import { field, h } from './dom.js';
import { percent, short } from './words.js';

const reload = () => dispatchEvent(new Event('lensrack:reload'));

async function change(button, task, work, message) {
  await run(button, async () => {
    try {
      await work();
      notify(message);
    } catch (error) {
      if (error.status !== 412) throw error;
      const now = error.body.current?.targets?.map(target => `${short(target.version)} at ${percent(target.weight, 0)}`).join(', ');
      notify(`The live version of ${task.task} has changed in the meantime; it is now ${now ?? 'gone'}. Your change was not applied.`, 'bad');
    }
    reload();
  });
}

const point = (task, body) => call('PUT', `/tasks/${part(task.task)}/aliases/live`, {
  json: body, headers: liveAlias(task) ? ifUnchanged(liveAlias(task)) : { 'If-None-Match': '*' },
});

export async function promote(button, task, version) {
  const answer = await confirmDialog(`Promote ${short(version.version)}?`, {
    body: [h('p', {}, `All new requests for ${task.task} are answered by this version (${version.method}, validation accuracy ${percent(version.metrics.val_accuracy)}). The server keeps running.`)],
    action: 'Promote',
  });
  if (answer) await change(button, task, () => point(task, { version: version.version }), `${task.task} now answers with ${short(version.version)}.`);
}

export async function canary(button, task, version, weight) {
  const output = h('output', {});
  const range = h('input', { type: 'range', name: 'share', min: 1, max: 99, value: Math.round(100 * (weight ?? 0.1)), oninput: update });
  function update() { output.textContent = ` ${range.value} %`; }
  update();
  const answer = await confirmDialog(`Canary ${short(version.version)}`, {
    body: [h('p', {}, 'This share of the requests goes to the new version; the rest is answered as before.'),
      field(h('span', {}, 'Share of requests', output), range)],
    action: 'Start canary',
  });
  if (!answer) return;
  const share = Number(answer.share) / 100;
  await change(button, task, () => point(task, { version: version.version, weight: share }), `${percent(share, 0)} of requests now go to ${short(version.version)}.`);
}

export async function rollback(button, task, history) {
  const previous = history.changes.at(-2).targets.map(target => `${short(target.version)}${target.weight < 1 ? ` at ${percent(target.weight, 0)}` : ''}`).join(' and ');
  const answer = await confirmDialog(`Roll back ${task.task}?`, {
    body: [h('p', {}, `The previous live version becomes live again: ${previous}. A second rollback undoes this one.`)],
    action: 'Roll back',
  });
  const work = () => call('POST', `/tasks/${part(task.task)}/rollback`, { json: { alias: 'live' }, headers: ifUnchanged(liveAlias(task)) });
  if (answer) await change(button, task, work, `${task.task} is rolled back to ${previous}.`);
}

export async function remove(button, task) {
  const input = h('input', { name: 'name', required: true, autocomplete: 'off', pattern: task.task.replaceAll('.', '\\.').replaceAll('-', '\\-') });
  const answer = await confirmDialog(`Delete ${task.task}?`, {
    body: [h('p', {}, 'This deletes all its versions, aliases and corrections. Datasets are kept.'), field('Type the task name to confirm', input)],
    action: 'Delete permanently', danger: true,
  });
  if (answer?.name !== task.task) return;
  await run(button, async () => {
    await call('DELETE', `/tasks/${part(task.task)}`);
    notify(`${task.task} is deleted.`);
    location.hash = '#/tasks';
  });
}
