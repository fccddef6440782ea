// Train, in the order in which one does it: pictures, what they are called, how it is fitted; then the job's own page.
import { call, get, live, part, randomKey } from './api.js';
import { doing } from './dialogs.js';
import { field, fill, h, newId, section } from './dom.js';
import { archiveType, chosen, dropped } from './gather.js';
import { report } from './report.js';
import { ago, bytes, count, percent, taskName } from './words.js';
import { upload } from './upload.js';
import { zipOf } from './zip.js';

const RECENT = 8;

export async function show(page, task, signal) {
  const [{ datasets }, { methods }, { jobs }, { tasks }] = await Promise.all([get('/datasets', signal), get('/methods', signal), get(`/train?limit=${RECENT}`, signal), get('/tasks', signal)]);
  const second = h('div', {}), place = h('div', { role: 'status' });
  const ready = async dataset => {
    fill(place, await report(dataset, signal));
    fill(second, settings(dataset, task || taskName(dataset.name), methods, tasks));
  };
  fill(page,
    h('h1', {}, task ? `Train ${task} again` : 'Train'),
    section('1. Pictures', pictures(ready, place, signal), datasets.length > 0 && earlier(datasets, ready), place),
    second,
    jobs.length > 0 && section('Recent jobs', h('ul', { class: 'rows' }, jobs.map(row))));
  const again = task && (await get(`/tasks/${part(task)}`, signal).catch(() => null));
  const mine = again && datasets.find(one => one.id === again.dataset);
  if (mine) await ready(mine);
}

// --- 1. pictures ------------------------------------------------------------------------------------------------------

function pictures(ready, place, signal) {
  const zone = h('div', { class: 'drop', ondragover: over, ondragleave: out, async ondrop(event) { event.preventDefault(); out(); await take(() => dropped(event.dataTransfer)); } },
    h('p', {}, 'Drop a folder of class folders here, or an archive of one'),
    h('div', { class: 'actions' }, chooser('Choose a folder', { webkitdirectory: true }), chooser('Choose an archive', { accept: '.zip,.tar,.tgz,.gz,.zst,.parquet,.npz' })),
    h('p', { class: 'muted small' }, 'cats/1.jpg, dogs/7.jpg, … optionally under train, val and test. Also zip, tar, tar.gz, tar.zst, parquet, npz.'));
  return zone;

  function chooser(label, attributes) {
    const id = newId('files');
    const input = h('input', { id, type: 'file', class: 'hidden-input', ...attributes, async onchange() { await take(() => chosen(input.files)); input.value = ''; } });
    return h('span', {}, input, h('label', { for: id, class: 'button' }, label));
  }
  function over(event) { event.preventDefault(); zone.classList.add('over'); }
  function out() { zone.classList.remove('over'); }
  async function take(found) {
    try {
      await ready(await stored(await found(), place, signal));
    } catch (error) {
      if (error.name !== 'AbortError') fill(place, h('p', { class: 'problem', role: 'alert' }, error.message));
    }
  }
}

async function stored(found, place, signal) {
  const bar = h('progress', { max: 1, value: 0, 'aria-label': 'Upload' }), told = h('p', { class: 'small muted' });
  fill(place, bar, told);
  const total = found.archive?.size ?? found.files.reduce((sum, { file }) => sum + file.size, 0);
  const step = (what, share, done) => { bar.value = share; told.textContent = `${what} ${bytes(done)} of ${bytes(total)}`; };
  const archive = found.archive ?? await zipOf(found.files, done => step('Packing', 0.15 * done / total, done), signal);
  const type = found.archive ? archiveType(archive.name) : 'application/zip';
  return upload(archive, type, found.name, sent => {
    step('Sending', 0.15 + 0.85 * sent / archive.size, Math.min(sent, total));
    if (sent >= archive.size) { bar.removeAttribute('value'); told.textContent = 'The server looks at every picture …'; }
  }, signal);
}

function earlier(datasets, ready) {
  const select = h('select', { onchange: () => { const one = datasets.find(each => each.id === select.value); if (one) ready(one); } },
    h('option', { value: '' }, 'Choose …'),
    datasets.map(one => h('option', { value: one.id }, `${one.name || one.id.slice(0, 10)} · ${count(one.images, 'picture')} · ${ago(one.created_at)}`)));
  return field('Or pictures that are here already', select);
}

// --- 2. how -----------------------------------------------------------------------------------------------------------

const PUBLISH = { always: 'Goes live when it is done', if_better: 'Goes live only if it is better than what is live', never: 'Is kept and does not go live' };
const SEARCH = { auto: 'Search for the best recipe', quick: 'A first answer in seconds, the full fit afterwards', none: "Just fit, with the method's own recipe" };
const NUMBERS = { epochs: 1, prompts: 1, lr: 'any', budget: 1 };

function settings(dataset, name, methods, tasks) {
  const named = h('input', { name: 'task', value: name, required: true, pattern: '[a-z0-9][a-z0-9._\\-]{0,63}', autocomplete: 'off', spellcheck: 'false', maxlength: 64, oninput: exists });
  const note = h('p', { class: 'small muted', role: 'status' });
  const button = h('button', { class: 'primary' }, 'Start training');
  const form = h('form', { onsubmit: event => { event.preventDefault(); doing(button, () => submit(form, dataset)); } },
    field('Name of the task', named, 'Small letters, digits, dots and dashes: what a client asks for.'), note,
    choice('Method', 'method', { auto: 'auto: the server tries them and takes the best', ...Object.fromEntries(methods.map(one => [one.name, `${one.name}: ${one.meaning}`])) }),
    choice('Recipe', 'search', SEARCH), choice('When it is done', 'publish', PUBLISH),
    h('details', {}, h('summary', {}, 'More settings'), h('div', { class: 'columns' },
      Object.entries(NUMBERS).map(([key, step]) => field(LABELS[key], h('input', { name: key, type: 'number', min: key === 'lr' ? 0 : 1, step, placeholder: 'found by the server' }))))),
    button);
  exists();
  return section('2. How', form);

  function exists() {
    const known = tasks.find(task => task.task === named.value);
    note.textContent = known ? `${known.task} is there already${live(known) ? `, with validation accuracy ${percent(known.val_accuracy)}` : ''}: this makes a new version of it.` : '';
  }
}

const LABELS = { epochs: 'Epochs', prompts: 'Prompts', lr: 'Learning rate', budget: 'Pictures the search may use' };

const choice = (legend, name, options) => h('fieldset', { class: 'choice' }, h('legend', {}, legend),
  Object.entries(options).map(([value, label], index) => h('label', {}, h('input', { type: 'radio', name, value, checked: index === 0 }), label)));

async function submit(form, dataset) {
  const given = Object.fromEntries(new FormData(form));
  // the method `auto` is a search by itself; "just fit" then means the server's own choice of method
  const recipe = { search: given.search };
  for (const key of Object.keys(NUMBERS)) if (given[key]) recipe[key] = Number(given[key]);
  const body = { task: given.task, dataset: dataset.id, method: given.method, recipe, publish: given.publish };
  const { data } = await call('POST', '/train', { json: body, headers: { 'Idempotency-Key': randomKey() } });
  location.hash = `#/jobs/${data.id}`;
}

// --- jobs -------------------------------------------------------------------------------------------------------------

const row = job => h('li', {},
  h('a', { href: `#/jobs/${job.id}` }, job.task), h('span', { class: 'muted' }, job.method),
  h('span', { class: `tag ${job.state}` }, job.state), h('span', { class: 'number' }, percent(job.metrics.val_accuracy)), h('span', { class: 'muted small' }, ago(job.created_at)));
