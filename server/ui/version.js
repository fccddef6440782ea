// One version: its metrics, accuracy by class, confusion matrix, learning curves, search trials and recipe.
import { bars, lines } from './charts.js';
import { h, scrolling, section } from './dom.js';
import { strip } from './thumbs.js';
import { count, percent, range, short, withInterval } from './words.js';

const MOST_BARS = 30;

export function details(version) {
  const { metrics, labels } = version;
  const split = metrics.test ? 'test' : 'val';
  const evaluation = metrics[split];
  const where = evaluation && `${count(evaluation.images, split === 'test' ? 'test picture' : 'validation picture')}`;
  return [
    section(`Version ${short(version.version)}`,
      h('p', { class: 'muted' }, [version.method, prompts(version), count(labels.length, 'class', 'classes')].filter(Boolean).join(' · ')),
      strip(version.dataset, 12), evaluation && figures(evaluation, where)),
    evaluation?.per_class && perClass(labels, evaluation, where),
    evaluation?.confusion ? matrix(labels, evaluation.confusion) : evaluation?.confused && confusions(labels, evaluation.confused),
    metrics.curve && curves(metrics.curve),
    metrics.search && searchTrials(metrics.search),
    section('Recipe', h('dl', { class: 'facts' }, Object.entries(version.recipe).filter(([, value]) => value !== null)
      .map(([name, value]) => h('div', {}, h('dt', {}, name.replaceAll('_', ' ')), h('dd', {}, String(value)))))),
  ];
}

const prompts = version => {
  const total = version.prompt_lengths.reduce((sum, length) => sum + length, 0);
  return total > 0 && `${count(total, 'prompt')} in ${count(version.prompt_lengths.filter(Boolean).length, 'layer')}`;
};

export function figures(evaluation, where) {
  const rows = [['Accuracy', evaluation.accuracy], ['Macro accuracy', evaluation.macro_accuracy], ['Calibration error', evaluation.ece]];
  return h('div', {}, h('dl', { class: 'figures' }, rows.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, percent(value))))),
    h('p', { class: 'muted small' }, `Measured on ${where}${evaluation.interval ? `; the accuracy's 95 % interval is ${range(evaluation.interval)}` : ''}.`));
}

function perClass(labels, evaluation, where) {
  const ranked = labels.map((label, index) => [label, evaluation.per_class[index]]).filter(([, value]) => value !== null);
  const shown = ranked.length > MOST_BARS ? ranked.sort((a, b) => a[1] - b[1]).slice(0, MOST_BARS) : ranked;
  const title = ranked.length > MOST_BARS ? `Accuracy by class: the lowest ${MOST_BARS}` : 'Accuracy by class';
  const summary = shown.slice(0, 12).map(([label, value]) => `${label} ${percent(value, 0)}`).join(', ');
  return section(title,
    bars(`Accuracy by class: ${summary}`, shown.map(([label]) => cut(label)), shown.map(([, value]) => value), { across: true, percent: true }).box,
    h('p', { class: 'muted small' }, `Share of each class that is classified correctly, measured on ${where}.`));
}

const cut = label => label.length > 24 ? `${label.slice(0, 23)}…` : label;

function matrix(labels, rows) {
  const table = h('table', { class: 'matrix' },
    h('thead', {}, h('tr', {}, h('th', { scope: 'col', class: 'corner' }, 'actual \\ predicted'), labels.map(label => h('th', { scope: 'col' }, h('span', {}, cut(label)))))),
    h('tbody', {}, rows.map((row, truth) => {
      const sum = Math.max(1, row.reduce((total, n) => total + n, 0));
      return h('tr', {}, h('th', { scope: 'row' }, cut(labels[truth])), row.map((n, answer) => h('td', {
        class: n === 0 ? 'none' : answer === truth ? 'right' : 'wrong', style: { '--share': `${Math.round(36 * n / sum)}%` },
        title: `${count(n, 'picture')} of ${labels[truth]} predicted as ${labels[answer]}`,
      }, n || '·')));
    })));
  return section('Confusion matrix', scrolling('Actual and predicted classes', table));
}

function confusions(labels, triples) {
  return section('Most frequent confusions', scrolling('Actual and predicted classes', h('table', {},
    h('thead', {}, h('tr', {}, ['Actual', 'Predicted', 'Pictures'].map(title => h('th', { scope: 'col' }, title)))),
    h('tbody', {}, triples.slice(0, 20).map(([truth, answer, n]) => h('tr', {}, h('th', { scope: 'row' }, labels[truth]), h('td', {}, labels[answer]), h('td', { class: 'number' }, n)))))));
}

function curves(metrics) {
  const epochs = (metrics.val_accuracy ?? metrics.loss ?? []).map((_, index) => index + 1);
  if (epochs.length < 2) return null;
  const description = `Training loss and validation accuracy over ${epochs.length} epochs; the accuracy ends at ${percent(metrics.val_accuracy?.at(-1))}`;
  return section('Learning curves', lines(description, 'epoch', { labels: epochs, lines: [
    { label: 'loss', data: metrics.loss, colour: 'muted' },
    { label: 'validation accuracy', data: metrics.val_accuracy, colour: 'accent', axis: 'y1' }] }).box);
}

function searchTrials(search) {
  return section('Search trials', trialTable(search.trials, search.chosen));
}

// The trials of a search with the settings in which they differ. `chosen` is the number of the trial whose recipe was
// fitted in full; without it, the best of the highest rung so far is marked.
export function trialTable(trials, chosen) {
  const settings = ['optimizer', 'lr', 'weight_decay', ...Object.keys(trials[0]).filter(name => !COMMON.includes(name))].filter((name, at, all) => all.indexOf(name) === at);
  const shown = settings.filter(name => new Set(trials.map(trial => String(trial[name] ?? '–'))).size > 1);
  const rung = Math.max(...trials.map(trial => trial.rung ?? 0));
  const best = trials.filter(trial => (trial.rung ?? 0) === rung).reduce((first, trial) => (trial.val_nll ?? Infinity) < (first.val_nll ?? Infinity) ? trial : first);
  const marked = (trial, index) => chosen ? index + 1 === chosen : trial === best;
  const images = Math.max(0, ...trials.map(trial => trial.val_images ?? 0));
  return [
    h('p', { class: 'small muted' }, `The search goes by the validation loss, among trials of one rung.${images ? ` On ${count(images, 'validation picture')} an accuracy is uncertain by up to ± ${Math.round(98 / Math.sqrt(images + 3.84))} points.` : ''}`),
    scrolling('Trials', h('table', {},
      h('thead', {}, h('tr', {}, ['#', 'rung', 'method', ...shown.map(name => name.replaceAll('_', ' '))].map(title => h('th', { scope: 'col' }, title)), ['validation loss', 'validation accuracy'].map(title => h('th', { scope: 'col', class: 'number' }, title)))),
      h('tbody', {}, trials.map((trial, index) => h('tr', { class: marked(trial, index) ? 'best' : null }, h('th', { scope: 'row' }, index + 1),
        ['rung', 'method', ...shown].map(name => h('td', {}, String(trial[name] ?? '–'))),
        h('td', { class: 'number' }, trial.val_nll?.toFixed(4) ?? '–'),
        h('td', { class: 'number' }, trial.val_accuracy === null ? 'diverged' : withInterval(trial.val_accuracy, trial.val_interval))))))),
  ];
}

// Fields of a trial that are no settings, or that are shown anyway. A trial of a job's event has its number, too.
const COMMON = ['at', 'trial', 'trials', 'method', 'rung', 'images', 'epochs', 'val_images', 'val_accuracy', 'val_interval', 'val_nll', 'forward_passes', 'prompt_lengths', 'test_accuracy', 'parameters', 'bundle_bytes', 'fit_s', 'cpu_s'];
