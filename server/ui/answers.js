// What tasks answer about a picture, side by side; where they looked; and the right answer where they were wrong.
import { call, get, part, post } from './api.js';
import { doing, say } from './dialogs.js';
import { field, fill, h, newId } from './dom.js';
import { heatmap } from './heatmap.js';
import { framed, intake } from './pictures.js';
import { count, percent, short } from './words.js';

const TOP = 5;

// `chosen()` are the names of the tasks to ask.
export function panel(chosen, signal) {
  const picture = framed();
  const answers = h('div', { class: 'answers' });
  const timing = h('p', { class: 'muted small', role: 'status' });
  let shown = null;
  const zone = intake(take, signal);

  async function take(blob) {
    shown = blob;
    picture.show(blob);
    await again();
  }

  async function again() {
    if (!shown) return;
    picture.clear();
    const names = chosen();
    if (!names.length) { fill(answers, h('p', { class: 'muted' }, 'Choose a task to ask.')); timing.textContent = ''; return; }
    try {
      const query = names.map(name => `task=${part(name)}`).join('&');
      const { data, headers } = await call('POST', `/predict?${query}&top_k=${TOP}`, { body: shown, headers: { 'Content-Type': shown.type || 'application/octet-stream' }, signal });
      timing.textContent = timings(headers.get('Server-Timing') ?? '');
      fill(answers, names.map(name => card(name, data.results[name], shown, picture)));
    } catch (error) {
      if (error.name === 'AbortError') return;
      timing.textContent = '';
      fill(answers, h('p', { class: 'problem', role: 'alert' }, error.message));
    }
  }

  const element = h('div', { class: 'asking' },
    h('div', { class: 'left' }, zone, picture.frame, timing), h('div', { class: 'right', 'aria-live': 'polite' }, answers));
  return { element, again };
}

const MEANING = { decode: 'decoded', queue: 'waited', compute: 'computed' };
const timings = header => header.split(',').map(each => each.trim().split(';dur=')).filter(([name]) => name in MEANING)
  .map(([name, ms]) => `${MEANING[name]} ${Number(ms).toFixed(1)}\u00a0ms`).join(' · ');

// `asked` is a task, or a task and a version.
function card(asked, result, blob, picture) {
  const [task] = asked.split('@');
  if (result.error) return h('article', { class: 'card answer', 'aria-label': `Answer of ${task}` }, h('p', { class: 'asked' }, task), h('p', { class: 'problem' }, result.error.detail));
  const [scored] = result.predictions;
  const below = h('div', {});
  return h('article', { class: 'card answer', 'aria-label': `Answer of ${task}` },
    h('div', { class: 'head' }, h('a', { class: 'asked', href: `#/tasks/${part(task)}` }, task), h('code', { class: 'small', title: result.version }, short(result.version))),
    h('p', { class: 'best' }, scored[0].label),
    h('ol', { class: 'scores' }, scored.map(one => h('li', {},
      h('span', { class: 'label' }, one.label),
      h('span', { class: 'meter', 'aria-hidden': 'true' }, h('span', { style: { width: `${100 * one.score}%` } })),
      h('span', { class: 'number' }, percent(one.score))))),
    h('div', { class: 'actions' },
      h('button', { type: 'button', onclick: event => looked(event.currentTarget, `${task}@${result.version}`, blob, picture, below) }, 'Where it looked'),
      h('button', { type: 'button', class: 'quiet', onclick: event => correct(event.currentTarget, task, scored, blob, below) }, 'Wrong?')),
    below);
}

// --- where it looked --------------------------------------------------------------------------------------------------

const VIEWS = { rollout: 'Through all layers', last: 'Last layer' };

async function looked(button, name, blob, picture, below) {
  const found = await doing(button, async () => (await call('POST', `/tasks/${part(name)}/attention`, { body: blob, headers: { 'Content-Type': blob.type || 'application/octet-stream' } })).data);
  if (!found) return;
  const group = newId('view');
  const told = h('p', { class: 'small muted', role: 'status' });
  picture.hold(below);
  const pick = view => {
    picture.lay(heatmap(found[view].grid, found, picture.image.naturalWidth, picture.image.naturalHeight));
    told.textContent = shares(found[view]);
  };
  fill(below, h('fieldset', { class: 'choice' }, h('legend', {}, 'Attention of the class token'),
    Object.entries(VIEWS).map(([view, label], index) => h('label', {}, h('input', { type: 'radio', name: group, checked: index === 0, onchange: () => pick(view) }), label))), told,
  h('button', { type: 'button', class: 'quiet', onclick() { picture.clear(); button.focus(); } }, 'Hide it'));
  pick('rollout');
}

function shares({ prompts, rest, grid }) {
  const patches = grid.flat().reduce((sum, one) => sum + one, 0);
  const learned = prompts > 0 ? `${percent(prompts)} to the learned prompts, ` : 'there are no prompts, ';
  return `${percent(patches)} of it goes to the picture, ${learned}${percent(rest)} to the class token itself.`;
}

// --- the right answer -------------------------------------------------------------------------------------------------

async function correct(button, name, scored, blob, below) {
  const version = await doing(button, () => liveVersion(name));
  if (!version) return;
  const list = newId('labels');
  const input = h('input', { list, required: true, autocomplete: 'off', placeholder: 'What it shows' });
  const form = h('form', { class: 'correct', onsubmit: event => { event.preventDefault(); give(form.querySelector('button'), name, input.value.trim(), version.labels, blob, below); } },
    field('The right answer', input, 'A class it knows, or a new one.'),
    h('datalist', { id: list }, version.labels.filter(label => label !== scored[0].label).map(label => h('option', { value: label }))),
    h('button', { class: 'primary' }, 'Remember it'));
  fill(below, form);
  input.focus();
}

async function liveVersion(name) {
  const task = await get(`/tasks/${part(name)}`);
  return get(`/tasks/${part(name)}/versions/${part(task.live)}`);
}

async function give(button, name, label, known, blob, below) {
  await doing(button, async () => {
    const query = `label=${part(label)}${known.includes(label) ? '' : '&new_label=true'}`;
    await call('POST', `/tasks/${part(name)}/feedback?${query}`, { body: blob, headers: { 'Content-Type': blob.type } });
    const { images } = await get(`/tasks/${part(name)}/feedback?limit=1`);
    say(`Remembered: this is ${label}.`);
    const retrain = h('button', { type: 'button', class: 'primary', onclick: event => again(event.currentTarget, name) }, 'Retrain with the corrections');
    fill(below, h('p', { class: 'small' }, `${name} has ${count(images, 'correction')} that its next version can learn from.`), retrain);
    retrain.focus();
  });
}

async function again(button, name) {
  await doing(button, async () => {
    const dataset = await post(`/tasks/${part(name)}/feedback/dataset?name=${part(`${name}, corrected`)}`);
    const version = await liveVersion(name);
    const job = await post('/train', { task: name, dataset: dataset.id, method: version.method, recipe: fittable(version.recipe) });
    location.hash = `#/jobs/${job.id}`;
  });
}

// The live version's own recipe, in the fields that people choose or a search finds. A head alone has no prompts.
const FIELDS = ['epochs', 'batch_size', 'optimizer', 'lr', 'weight_decay', 'prompts', 'prompt_layers', 'prompt_dropout', 'label_smoothing', 'class_weights', 'augment', 'patience', 'pool', 'seed'];
const fittable = recipe => Object.fromEntries(Object.entries(recipe).filter(([name, value]) => FIELDS.includes(name) && value !== null && !(name === 'prompts' && value === 0)));
