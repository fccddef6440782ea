// Predictions of several tasks for one picture, side by side, with attention maps and a form for corrections.
import { call, get, part, post } from './api.js';
import { confirmDialog, notify, run } from './dialogs.js';
import { field, fill, h, newId } from './dom.js';
import { heatmap } from './heatmap.js';
import { pictureFrame, pictureInput } from './pictures.js';
import { count, percent, short } from './words.js';

const TOP = 5;

// `chosenTasks()` returns the names of the tasks to predict with.
export function predictionPanel(chosenTasks, signal) {
  const picture = pictureFrame();
  const answers = h('div', { class: 'answers' });
  const timing = h('p', { class: 'muted small', role: 'status' });
  let current = null;
  const zone = pictureInput(take, signal);

  async function take(blob) {
    current = blob;
    picture.show(blob);
    await repeat();
  }

  async function repeat() {
    if (!current) return;
    picture.clear();
    const names = chosenTasks();
    if (!names.length) { fill(answers, h('p', { class: 'muted' }, 'Choose at least one task.')); timing.textContent = ''; return; }
    try {
      const query = names.map(name => `task=${part(name)}`).join('&');
      const { data, headers } = await call('POST', `/predict?${query}&top_k=${TOP}`, { body: current, headers: { 'Content-Type': current.type || 'application/octet-stream' }, signal });
      timing.textContent = timings(headers.get('Server-Timing') ?? '');
      fill(answers, names.map(name => card(name, data.results[name], current, picture)));
    } catch (error) {
      if (error.name === 'AbortError') return;
      timing.textContent = '';
      fill(answers, h('p', { class: 'problem', role: 'alert' }, error.message));
    }
  }

  const element = h('div', { class: 'prediction' },
    h('div', { class: 'left' }, zone, picture.frame, timing), h('div', { class: 'right', 'aria-live': 'polite' }, answers));
  return { element, repeat };
}

const PHASES = { decode: 'decoding', queue: 'queueing', compute: 'computing' };
const timings = header => header.split(',').map(entry => entry.trim().split(';dur=')).filter(([name]) => name in PHASES)
  .map(([name, ms]) => `${PHASES[name]} ${Number(ms).toFixed(1)}\u00a0ms`).join(' · ');

// `reference` is TASK or TASK@VERSION.
function card(reference, result, blob, picture) {
  const [task] = reference.split('@');
  if (result.error) return h('article', { class: 'card answer', 'aria-label': `Prediction for ${task}` }, h('p', { class: 'task-name' }, task), h('p', { class: 'problem' }, result.error.detail));
  const [scores] = result.predictions;
  const below = h('div', {});
  return h('article', { class: 'card answer', 'aria-label': `Prediction for ${task}` },
    h('div', { class: 'head' }, h('a', { class: 'task-name', href: `#/tasks/${part(task)}` }, task), h('code', { class: 'small', title: result.version }, short(result.version))),
    h('p', { class: 'best' }, scores[0].label),
    h('ol', { class: 'scores' }, scores.map(entry => h('li', {},
      h('span', { class: 'label' }, entry.label),
      h('span', { class: 'meter', 'aria-hidden': 'true' }, h('span', { style: { width: `${100 * entry.score}%` } })),
      h('span', { class: 'number' }, percent(entry.score))))),
    h('div', { class: 'actions' },
      h('button', { type: 'button', onclick: event => showAttention(event.currentTarget, `${task}@${result.version}`, blob, picture, below) }, 'Show attention'),
      h('button', { type: 'button', class: 'quiet', onclick: event => correctionForm(event.currentTarget, task, scores, blob, below) }, 'Correct it')),
    below);
}

// --- attention --------------------------------------------------------------------------------------------------------

const VIEWS = { rollout: 'All layers', last: 'Last layer' };

async function showAttention(button, name, blob, picture, below) {
  const attention = await run(button, async () => (await call('POST', `/tasks/${part(name)}/attention`, { body: blob, headers: { 'Content-Type': blob.type || 'application/octet-stream' } })).data);
  if (!attention) return;
  const group = newId('view');
  const summary = h('p', { class: 'small muted', role: 'status' });
  picture.hold(below);
  const pick = view => {
    picture.lay(heatmap(attention[view].grid, attention, picture.image.naturalWidth, picture.image.naturalHeight));
    summary.textContent = shares(attention[view]);
  };
  fill(below, h('fieldset', { class: 'choice' }, h('legend', {}, 'Attention of the class token'),
    Object.entries(VIEWS).map(([view, label], index) => h('label', {}, h('input', { type: 'radio', name: group, checked: index === 0, onchange: () => pick(view) }), label))), summary,
  h('button', { type: 'button', class: 'quiet', onclick() { picture.clear(); button.focus(); } }, 'Hide attention'));
  pick('rollout');
}

function shares({ prompts, rest, grid }) {
  const patches = grid.flat().reduce((sum, share) => sum + share, 0);
  const learned = prompts > 0 ? `, ${percent(prompts)} to the learned prompts` : '';
  return `${percent(patches)} of the attention goes to the picture${learned} and ${percent(rest)} to the class token.`;
}

// --- corrections ------------------------------------------------------------------------------------------------------

async function correctionForm(button, name, scores, blob, below) {
  const version = await run(button, () => liveVersion(name));
  if (!version) return;
  const list = newId('labels');
  const input = h('input', { list, required: true, autocomplete: 'off', placeholder: 'Class name' });
  const form = h('form', { class: 'correct', onsubmit: event => { event.preventDefault(); saveCorrection(form.querySelector('button'), name, written(input.value, version.labels), version.labels, blob, below); } },
    field('Correct class', input, 'One of the classes of the task, or a new one.'),
    h('datalist', { id: list }, version.labels.filter(label => label !== scores[0].label).map(label => h('option', { value: label }))),
    h('button', { class: 'primary' }, 'Save correction'));
  fill(below, form);
  input.focus();
}

// A class as the task writes it, whose name may have blanks at its ends.
const written = (value, labels) => labels.find(label => label === value) ?? labels.find(label => label.trim() === value.trim()) ?? value.trim();

async function liveVersion(name) {
  const task = await get(`/tasks/${part(name)}`);
  return get(`/tasks/${part(name)}/versions/${part(task.live)}`);
}

async function saveCorrection(button, name, label, labels, blob, below) {
  await run(button, async () => {
    const saved = await sendCorrection(name, label, labels, blob);
    if (!saved) return;
    const { images } = await get(`/tasks/${part(name)}/feedback?limit=1`);
    notify(`Correction saved: ${saved.items[0].label}.`);
    const retrainButton = h('button', { type: 'button', class: 'primary', onclick: event => retrain(event.currentTarget, name) }, 'Retrain with corrections');
    fill(below, h('p', { class: 'small' }, `${name} has ${count(images, 'correction')} for its next version.`), saved.warnings.map(warning => h('p', { class: 'small problem' }, warning.text)), retrainButton);
    retrainButton.focus();
  });
}

// A label that the task does not know may be a typing error: the user decides. Null where the user cancels.
async function sendCorrection(name, label, labels, blob) {
  let chosen = label;
  if (!labels.includes(label)) {
    const near = nearest(label, labels);
    const choices = [...(near ? [[near, `I meant “${near}”`]] : []), [label, `Add the new class “${label}”`]];
    chosen = (await confirmDialog(`${name} has no class “${label}”`, { action: 'Save correction', body: choices
      .map(([value, text], index) => h('p', {}, h('label', {}, h('input', { type: 'radio', name: 'label', value, checked: index === 0 }), ' ', text))) }))?.label;
    if (chosen === undefined) return null;
  }
  const query = `label=${part(chosen)}${labels.includes(chosen) ? '' : '&new_label=true'}`;
  return (await call('POST', `/tasks/${part(name)}/feedback?${query}`, { body: blob, headers: { 'Content-Type': blob.type || 'application/octet-stream' } })).data;
}

// The label that differs in the fewest letters, if these are at most a third; by the edit distance (Levenshtein).
function nearest(label, labels) {
  const distance = (a, b) => [...b].reduce((row, letter, y) => [...a].reduce((next, other, x) => [...next, Math.min(row[x + 1] + 1, next[x] + 1, row[x] + (letter !== other))], [y + 1]), Array.from({ length: [...a].length + 1 }, (_, x) => x)).at(-1);
  const ranked = labels.map(known => [distance(label.toLowerCase(), known.toLowerCase()), known]).sort((a, b) => a[0] - b[0]);
  return ranked.length && ranked[0][0] <= Math.max(1, label.length / 3) ? ranked[0][1] : null;
}

async function retrain(button, name) {
  await run(button, async () => {
    const dataset = await post(`/tasks/${part(name)}/feedback/dataset?name=${part(`${name}, corrected`)}`);
    if (dataset.skipped.length) notify(`Left out: ${count(dataset.skipped.length, 'correction')}. ${dataset.skipped[0].reason}.`, 'bad');
    const version = await liveVersion(name);
    const job = await post('/train', { task: name, dataset: dataset.id, method: version.method, recipe: reusable(version.recipe) });
    location.hash = `#/jobs/${job.id}`;
  });
}

// The fields of the live version's recipe that a user or a search sets. A recipe of a head alone has no prompts.
const FIELDS = ['epochs', 'batch_size', 'optimizer', 'lr', 'weight_decay', 'prompts', 'prompt_layers', 'prompt_dropout', 'label_smoothing', 'class_weights', 'augment', 'patience', 'pool', 'seed'];
const reusable = recipe => Object.fromEntries(Object.entries(recipe).filter(([name, value]) => FIELDS.includes(name) && value !== null && !(name === 'prompts' && value === 0)));
