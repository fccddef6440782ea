// Train: choose pictures, then the task's name and settings. Submitting leads to the job's page.
import { call, get, liveAlias, part, randomKey } from './api.js';
import { run } from './dialogs.js';
import { field, fill, h, newId, section } from './dom.js';
import { archiveType, fromDrop, fromInput } from './gather.js';
import { report } from './report.js';
import { ago, bytes, count, percent, taskName } from './words.js';
import { upload } from './upload.js';
import { zipOf } from './zip.js';

const RECENT = 8;

export async function show(page, task, signal) {
  const [{ datasets }, { methods }, { jobs }, { tasks }] = await Promise.all([get('/datasets', signal), get('/methods', signal), get(`/train?limit=${RECENT}`, signal), get('/tasks', signal)]);
  const training = h('div', {}), place = h('div', { role: 'status' });
  const ready = async dataset => {
    fill(place, await report(dataset, signal));
    fill(training, settings(dataset, task || taskName(dataset.name), methods, tasks));
  };
  fill(page,
    h('h1', {}, task ? `Train a new version of ${task}` : 'Train'),
    section('1. Pictures', pictures(ready, place, signal), datasets.length > 0 && uploaded(datasets, ready), place),
    training,
    jobs.length > 0 && section('Recent jobs', h('ul', { class: 'rows' }, jobs.map(row))));
  const existing = task && (await get(`/tasks/${part(task)}`, signal).catch(() => null));
  const dataset = existing && datasets.find(candidate => candidate.id === existing.dataset);
  if (dataset) await ready(dataset);
}

// --- 1. pictures ------------------------------------------------------------------------------------------------------

function pictures(ready, place, signal) {
  const zone = h('div', { class: 'drop', ondragover: over, ondragleave: out, async ondrop(event) { event.preventDefault(); out(); await take(() => fromDrop(event.dataTransfer)); } },
    h('p', {}, 'Drop a folder here with one subfolder for each class, or an archive of such a folder'),
    h('div', { class: 'actions' }, chooser('Choose a folder', { webkitdirectory: true }), chooser('Choose an archive', { accept: '.zip,.tar,.tgz,.gz,.zst,.parquet,.npz' })),
    h('p', { class: 'muted small' }, 'For example cats/1.jpg and dogs/7.jpg, optionally inside train, val and test. Archives may be zip, tar, tar.gz, tar.zst, parquet or npz.'));
  return zone;

  function chooser(label, attributes) {
    const id = newId('files');
    const input = h('input', { id, type: 'file', class: 'hidden-input', ...attributes, async onchange() { await take(() => fromInput(input.files)); input.value = ''; } });
    return h('span', {}, input, h('label', { for: id, class: 'button' }, label));
  }
  function over(event) { event.preventDefault(); zone.classList.add('over'); }
  function out() { zone.classList.remove('over'); }
  async function take(readFiles) {
    try {
      await ready(await store(await readFiles(), place, signal));
    } catch (error) {
      if (error.name !== 'AbortError') fill(place, h('p', { class: 'problem', role: 'alert' }, error.message));
    }
  }
}

async function store(files, place, signal) {
  const bar = h('progress', { max: 1, value: 0, 'aria-label': 'Upload' }), status = h('p', { class: 'small muted' });
  fill(place, bar, status);
  const total = files.archive?.size ?? files.files.reduce((sum, { file }) => sum + file.size, 0);
  const step = (what, share, done) => { bar.value = share; status.textContent = `${what} ${bytes(done)} of ${bytes(total)}`; };
  const archive = files.archive ?? await zipOf(files.files, done => step('Packing', 0.15 * done / total, done), signal);
  const type = files.archive ? archiveType(archive.name) : 'application/zip';
  return upload(archive, type, files.name, sent => {
    step('Uploading', 0.15 + 0.85 * sent / archive.size, Math.min(sent, total));
    if (sent >= archive.size) { bar.removeAttribute('value'); status.textContent = 'The server is checking every picture …'; }
  }, signal);
}

function uploaded(datasets, ready) {
  const select = h('select', { onchange: () => { const dataset = datasets.find(candidate => candidate.id === select.value); if (dataset) ready(dataset); } },
    h('option', { value: '' }, 'Choose …'),
    datasets.map(dataset => h('option', { value: dataset.id }, `${dataset.name || dataset.id.slice(0, 10)} · ${count(dataset.images, 'picture')} · ${ago(dataset.created_at)}`)));
  return field('Or choose an uploaded dataset', select);
}

// --- 2. training ------------------------------------------------------------------------------------------------------

const PUBLISH = { always: 'Make it live', if_better: 'Make it live only if it is better than the live version', never: 'Store it without making it live' };
const SEARCH = { auto: 'Search for the best recipe', quick: 'Publish a simple head within seconds, then train in full', none: "No search: use the method's default recipe" };
const NUMBERS = { epochs: 1, prompts: 1, lr: 'any', budget: 1 };

function settings(dataset, name, methods, tasks) {
  const nameInput = h('input', { name: 'task', value: name, required: true, pattern: '[a-z0-9][a-z0-9._\\-]{0,63}', autocomplete: 'off', spellcheck: 'false', maxlength: 64, oninput: noteExisting });
  const note = h('p', { class: 'small muted', role: 'status' });
  const button = h('button', { class: 'primary' }, 'Start training');
  const form = h('form', { onsubmit: event => { event.preventDefault(); run(button, () => submit(form, dataset)); } },
    field('Task name', nameInput, 'Lower-case letters, digits, dots, dashes and underscores. Clients use this name in requests.'), note,
    choice('Method', 'method', { auto: 'auto: try several methods and keep the best', ...Object.fromEntries(methods.map(method => [method.name, `${method.name}: ${method.meaning}`])) }),
    choice('Recipe', 'search', SEARCH), choice('New version', 'publish', PUBLISH),
    h('details', {}, h('summary', {}, 'More settings'), h('div', { class: 'columns' },
      Object.entries(NUMBERS).map(([key, step]) => field(LABELS[key], h('input', { name: key, type: 'number', min: key === 'lr' ? 0 : 1, step, placeholder: 'automatic' }))))),
    button);
  noteExisting();
  return section('2. Training', form);

  function noteExisting() {
    const existing = tasks.find(task => task.task === nameInput.value);
    note.textContent = existing ? `${existing.task} exists already${liveAlias(existing) ? `, with validation accuracy ${percent(existing.val_accuracy)}` : ''}. Training adds a new version to it.` : '';
  }
}

const LABELS = { epochs: 'Epochs', prompts: 'Prompts', lr: 'Learning rate', budget: 'Search budget (forward passes)' };

const choice = (legend, name, options) => h('fieldset', { class: 'choice' }, h('legend', {}, legend),
  Object.entries(options).map(([value, label], index) => h('label', {}, h('input', { type: 'radio', name, value, checked: index === 0 }), label)));

async function submit(form, dataset) {
  const values = Object.fromEntries(new FormData(form));
  // the method `auto` always searches; with "No search" the server chooses the method itself
  const recipe = { search: values.search };
  for (const key of Object.keys(NUMBERS)) if (values[key]) recipe[key] = Number(values[key]);
  const body = { task: values.task, dataset: dataset.id, method: values.method, recipe, publish: values.publish };
  const { data } = await call('POST', '/train', { json: body, headers: { 'Idempotency-Key': randomKey() } });
  location.hash = `#/jobs/${data.id}`;
}

// --- jobs -------------------------------------------------------------------------------------------------------------

const row = job => h('li', {},
  h('a', { href: `#/jobs/${job.id}` }, job.task), h('span', { class: 'muted' }, job.method),
  h('span', { class: `tag ${job.state}` }, job.state), h('span', { class: 'number' }, percent(job.metrics.val_accuracy)), h('span', { class: 'muted small' }, ago(job.created_at)));
