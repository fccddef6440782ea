// One task: its live version, all versions with their metrics, and buttons to promote, canary and roll back.
import { get, liveAlias, part } from './api.js';
import { fill, h, scrolling, section } from './dom.js';
import { canary, promote, remove, rollback } from './moves.js';
import { details } from './version.js';
import { ago, bytes, count, percent, short } from './words.js';

export async function show(page, name, signal) {
  const [task, { versions }, history] = await Promise.all([
    get(`/tasks/${part(name)}`, signal), get(`/tasks/${part(name)}/versions`, signal),
    get(`/tasks/${part(name)}/aliases/live/history`, signal).catch(() => ({ changes: [] }))]);
  const detail = h('div', { class: 'details' });
  const choose = version => { select(version); fill(detail, details(version)); };
  const table = versionTable(task, versions, choose);
  fill(page,
    h('p', { class: 'crumb' }, h('a', { href: '#/tasks' }, 'Tasks')),
    h('div', { class: 'head' }, h('h1', {}, task.task),
      h('div', { class: 'actions' },
        h('button', { type: 'button', class: 'quiet', onclick: event => remove(event.currentTarget, task) }, 'Delete'),
        history.changes.length > 1 && h('button', { type: 'button', onclick: event => rollback(event.currentTarget, task, history) }, 'Roll back'),
        h('a', { class: 'button', href: `#/train/${part(task.task)}` }, 'Train a new version'),
        h('a', { class: 'button primary', href: `#/ask/${part(task.task)}` }, 'Try it'))),
    h('p', { class: 'muted' }, `${count(task.requests, 'request')} since the server started · ${task.resident ? 'on the rack' : 'not on the rack'}`),
    liveVersion(task),
    section('Versions', table),
    detail);
  choose(versions.find(version => version.version === task.live) ?? versions[0]);

  function select(version) {
    for (const row of table.querySelectorAll('tbody tr')) {
      const selected = row.dataset.version === version.version;
      row.classList.toggle('chosen', selected);
      row.querySelector('button.link').setAttribute('aria-pressed', String(selected));
    }
  }
}

function liveVersion(task) {
  const alias = liveAlias(task);
  if (!alias) return h('p', { class: 'problem' }, 'No version is live: requests are refused until one is promoted.');
  if (alias.targets.length === 1) return null;
  return section('Live version',
    h('ul', { class: 'split' }, alias.targets.map(target => h('li', {},
      h('code', { title: target.version }, short(target.version)),
      h('span', { class: 'meter', 'aria-hidden': 'true' }, h('span', { style: { width: `${100 * target.weight}%` } })),
      h('span', {}, percent(target.weight, 0))))),
    h('p', { class: 'muted small' }, 'Requests with the same Lensrack-Key header always get the same version.'));
}

function versionTable(task, versions, choose) {
  const weights = new Map((liveAlias(task)?.targets ?? []).map(target => [target.version, target.weight]));
  const otherAliases = version => task.aliases.filter(alias => alias.name !== 'live' && alias.targets.some(target => target.version === version)).map(alias => alias.name);
  const head = [['Version'], ['Method'], ['Validation', 'number'], ['Test', 'number'], ['Calibration error', 'number'], ['Size', 'number'], ['Created'], ['']];
  return scrolling('All versions', h('table', { class: 'versions' },
    h('thead', {}, h('tr', {}, head.map(([title, kind]) => h('th', { scope: 'col', class: kind }, title || h('span', { class: 'hidden' }, 'Actions'))))),
    h('tbody', {}, versions.map(version => {
      const weight = weights.get(version.version);
      return h('tr', { 'data-version': version.version },
        h('th', { scope: 'row' },
          h('button', { type: 'button', class: 'link', 'aria-pressed': 'false', title: version.version, onclick: () => choose(version) }, short(version.version)), ' ',
          weight !== undefined && h('span', { class: 'tag on' }, weight < 1 ? `live ${percent(weight, 0)}` : 'live'),
          otherAliases(version.version).map(alias => h('span', { class: 'tag' }, alias)),
          version.metrics.preliminary && h('span', { class: 'tag' }, 'preliminary')),
        h('td', {}, version.method),
        h('td', { class: 'number' }, percent(version.metrics.val_accuracy)),
        h('td', { class: 'number' }, percent(version.metrics.test_accuracy)),
        h('td', { class: 'number' }, percent((version.metrics.test ?? version.metrics.val)?.ece)),
        h('td', { class: 'number' }, bytes(version.bytes)),
        h('td', { title: new Date(1000 * version.created_at).toLocaleString() }, ago(version.created_at)),
        h('td', { class: 'moves' },
          weight !== 1 && h('button', { type: 'button', 'aria-label': `Promote ${short(version.version)}`, onclick: event => promote(event.currentTarget, task, version) }, 'Promote'),
          weights.size > 0 && weight !== 1 && h('button', { type: 'button', 'aria-label': `Canary ${short(version.version)}`, onclick: event => canary(event.currentTarget, task, version, weight) }, 'Canary')));
    }))));
}

