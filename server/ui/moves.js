// Moving an alias: always asked first, and always on the condition that nobody else has moved it since it was shown.
import { call, condition, live, part } from './api.js';
import { ask, doing, say } from './dialogs.js';
import { field, h } from './dom.js';
import { percent, short } from './words.js';

const again = () => dispatchEvent(new Event('lensrack:again'));

async function moved(button, task, work, done) {
  await doing(button, async () => {
    try {
      await work();
      say(done);
    } catch (error) {
      if (error.status !== 412) throw error;
      const now = error.body.current?.targets?.map(one => `${short(one.version)} at ${percent(one.weight, 0)}`).join(', ');
      say(`Somebody else has moved ${task.task} meanwhile: live is now ${now ?? 'gone'}. Nothing was changed; look again and decide.`, 'bad');
    }
    again();
  });
}

const point = (task, body) => call('PUT', `/tasks/${part(task.task)}/aliases/live`, {
  json: body, headers: live(task) ? condition(live(task)) : { 'If-None-Match': '*' },
});

export async function promote(button, task, version) {
  const sure = await ask(`Promote ${short(version.version)}?`, {
    body: [h('p', {}, `From the next request on, every answer of ${task.task} comes from this version (${version.method}, validation accuracy ${percent(version.metrics.val_accuracy)}). Nothing is restarted.`)],
    action: 'Promote',
  });
  if (sure) await moved(button, task, () => point(task, { version: version.version }), `${task.task} now answers with ${short(version.version)}.`);
}

export async function canary(button, task, version, weight) {
  const shown = h('output', {});
  const range = h('input', { type: 'range', name: 'share', min: 1, max: 99, value: Math.round(100 * (weight ?? 0.1)), oninput: tell });
  function tell() { shown.textContent = ` ${range.value} %`; }
  tell();
  const sure = await ask(`Canary ${short(version.version)}`, {
    body: [h('p', {}, 'A share of the requests goes to this version; the others stay where they are.'),
      field(h('span', {}, 'Share of the requests', shown), range)],
    action: 'Start the canary',
  });
  if (!sure) return;
  const share = Number(sure.share) / 100;
  await moved(button, task, () => point(task, { version: version.version, weight: share }), `${percent(share, 0)} of the requests go to ${short(version.version)}.`);
}

export async function rollback(button, task, history) {
  const before = history.changes.at(-2).targets.map(one => `${short(one.version)}${one.weight < 1 ? ` at ${percent(one.weight, 0)}` : ''}`).join(' and ');
  const sure = await ask(`Roll ${task.task} back?`, {
    body: [h('p', {}, `Live goes back to where it pointed before: ${before}. A second rollback undoes this one.`)],
    action: 'Roll back',
  });
  const work = () => call('POST', `/tasks/${part(task.task)}/rollback`, { json: { alias: 'live' }, headers: condition(live(task)) });
  if (sure) await moved(button, task, work, `${task.task} answers as before.`);
}

export async function remove(button, task) {
  const input = h('input', { name: 'name', required: true, autocomplete: 'off', pattern: task.task.replaceAll('.', '\\.').replaceAll('-', '\\-') });
  const sure = await ask(`Delete ${task.task}?`, {
    body: [h('p', {}, 'All its versions, aliases and corrections are forgotten. Datasets stay.'), field('To be sure, type its name', input)],
    action: 'Delete for ever', danger: true,
  });
  if (sure?.name !== task.task) return;
  await doing(button, async () => {
    await call('DELETE', `/tasks/${part(task.task)}`);
    say(`${task.task} is deleted.`);
    location.hash = '#/tasks';
  });
}
