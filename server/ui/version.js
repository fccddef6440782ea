// How good one version is: figures, classes, what is taken for what, and how it was found.
import { bars, lines } from './charts.js';
import { h, scrolling, section } from './dom.js';
import { strip } from './thumbs.js';
import { count, percent, short } from './words.js';

const MOST_BARS = 30;

export function details(version) {
  const { metrics, labels } = version;
  const split = metrics.test ? 'test' : 'val';
  const judged = metrics[split];
  const where = judged && `${count(judged.images, split === 'test' ? 'test picture' : 'validation picture')}`;
  return [
    section(`Version ${short(version.version)}`,
      h('p', { class: 'muted' }, [version.method, prompts(version), count(labels.length, 'class', 'classes')].filter(Boolean).join(' · ')),
      strip(version.dataset, 12), judged && figures(judged, where)),
    judged?.per_class && perClass(labels, judged, where),
    judged?.confusion ? matrix(labels, judged.confusion) : judged?.confused && confused(labels, judged.confused),
    metrics.curves && curves(metrics.curves),
    metrics.search && tried(metrics.search),
    section('Recipe', h('dl', { class: 'facts' }, Object.entries(version.recipe).filter(([, value]) => value !== null)
      .map(([name, value]) => h('div', {}, h('dt', {}, name.replaceAll('_', ' ')), h('dd', {}, String(value)))))),
  ];
}

const prompts = version => {
  const total = version.prompt_lengths.reduce((sum, one) => sum + one, 0);
  return total > 0 && `${count(total, 'prompt')} in ${count(version.prompt_lengths.filter(Boolean).length, 'layer')}`;
};

export function figures(judged, where) {
  const shown = [['Accuracy', judged.accuracy], ['Mean over classes', judged.macro_accuracy], ['Calibration error', judged.ece]];
  return h('div', {}, h('dl', { class: 'figures' }, shown.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, percent(value))))),
    h('p', { class: 'muted small' }, `On ${where}.`));
}

function perClass(labels, judged, where) {
  const ranked = labels.map((label, index) => [label, judged.per_class[index]]).filter(([, value]) => value !== null);
  const shown = ranked.length > MOST_BARS ? ranked.sort((a, b) => a[1] - b[1]).slice(0, MOST_BARS) : ranked;
  const title = ranked.length > MOST_BARS ? `The ${MOST_BARS} weakest classes` : 'Class by class';
  const told = shown.slice(0, 12).map(([label, value]) => `${label} ${percent(value, 0)}`).join(', ');
  return section(title,
    bars(`Accuracy of each class: ${told}`, shown.map(([label]) => cut(label)), shown.map(([, value]) => value), { across: true, percent: true }).box,
    h('p', { class: 'muted small' }, `Share of each class's pictures that got the right answer, on ${where}.`));
}

const cut = label => label.length > 24 ? `${label.slice(0, 23)}…` : label;

function matrix(labels, rows) {
  const table = h('table', { class: 'matrix' },
    h('thead', {}, h('tr', {}, h('th', { scope: 'col', class: 'corner' }, 'is \\ was called'), labels.map(label => h('th', { scope: 'col' }, h('span', {}, cut(label)))))),
    h('tbody', {}, rows.map((row, truth) => {
      const sum = Math.max(1, row.reduce((all, one) => all + one, 0));
      return h('tr', {}, h('th', { scope: 'row' }, cut(labels[truth])), row.map((n, answer) => h('td', {
        class: n === 0 ? 'none' : answer === truth ? 'right' : 'wrong', style: { '--share': `${Math.round(36 * n / sum)}%` },
        title: `${count(n, 'picture')} of ${labels[truth]} called ${labels[answer]}`,
      }, n || '·')));
    })));
  return section('What is taken for what', scrolling('Confusion matrix', table));
}

function confused(labels, triples) {
  return section('What is taken for what', scrolling('Commonest confusions', h('table', {},
    h('thead', {}, h('tr', {}, ['Is', 'Was called', 'Pictures'].map(title => h('th', { scope: 'col' }, title)))),
    h('tbody', {}, triples.slice(0, 20).map(([truth, answer, n]) => h('tr', {}, h('th', { scope: 'row' }, labels[truth]), h('td', {}, labels[answer]), h('td', { class: 'number' }, n)))))));
}

function curves(found) {
  const epochs = (found.val_accuracy ?? found.loss ?? []).map((_, index) => index + 1);
  if (epochs.length < 2) return null;
  const said = `Training loss and validation accuracy over ${epochs.length} epochs; the accuracy ends at ${percent(found.val_accuracy?.at(-1))}`;
  return section('Learning', lines(said, 'epoch', { labels: epochs, lines: [
    { label: 'loss', data: found.loss, colour: 'muted' },
    { label: 'validation accuracy', data: found.val_accuracy, colour: 'accent', axis: 'y1' }] }).box);
}

export function tried(search) {
  const columns = ['method', 'optimizer', 'lr', 'weight_decay', 'prompts', 'epochs'].filter(name => search.trials.some(trial => trial[name] !== undefined && trial[name] !== null));
  const best = search.trials.reduce((one, trial) => (trial.val_nll ?? Infinity) < (one.val_nll ?? Infinity) ? trial : one);
  return section('What the search tried', scrolling('Trials', h('table', {},
    h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, '#'), columns.map(name => h('th', { scope: 'col' }, name.replaceAll('_', ' '))), h('th', { scope: 'col', class: 'number' }, 'validation'))),
    h('tbody', {}, search.trials.map((trial, index) => h('tr', { class: trial === best ? 'best' : null }, h('th', { scope: 'row' }, index + 1),
      columns.map(name => h('td', {}, String(trial[name] ?? '–'))), h('td', { class: 'number' }, trial.val_accuracy === null ? 'diverged' : percent(trial.val_accuracy))))))));
}
