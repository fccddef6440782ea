// One training job while it runs, what came of it, and asking the new version on the same page.
import { call, get, part } from './api.js';
import { panel } from './answers.js';
import { lines } from './charts.js';
import { doing, say } from './dialogs.js';
import { fill, h, scrolling, section } from './dom.js';
import { figures } from './version.js';
import { ago, count, duration, percent, short } from './words.js';

const FINISHED = ['succeeded', 'failed', 'cancelled'];
const TYPES = ['queued', 'started', 'epoch', 'trial', 'published', 'kept', 'live_unusable', 'retried', 'cancel_requested', ...FINISHED];
const LOOK_S = 1;

export async function show(page, id, signal) {
  const job = await get(`/train/${part(id)}`, signal);
  const head = h('div', { class: 'head' }), state = h('div', { role: 'status' }), result = h('div', {});
  const curve = learning(), trials = searching();
  fill(page, h('p', { class: 'crumb' }, h('a', { href: '#/train' }, 'Train')), head, state, trials.element, curve.element, result);
  const update = now => { fill(head, title(now)); fill(state, progress(now)); };
  update(job);
  let wake = () => {};
  const ended = watch(id, { epoch: curve.add, trial: trials.add, retried: curve.clear, published: event => event.preliminary && say('A first version is live already; the full fit goes on.') }, () => wake(), signal);
  follow();

  async function follow() {
    let now = job;
    while (!signal.aborted && !FINISHED.includes(now.state)) {
      await new Promise(resolve => { wake = resolve; setTimeout(resolve, 1000 * LOOK_S); });
      now = await get(`/train/${part(id)}`, signal).catch(() => now);
      if (!signal.aborted && JSON.stringify(now.progress) + now.state !== state.dataset.last) update(now);
      state.dataset.last = JSON.stringify(now.progress) + now.state;
    }
    if (signal.aborted) return;
    await Promise.race([ended, new Promise(resolve => setTimeout(resolve, 3000 * LOOK_S))]);
    update(now);
    fill(result, outcome(now, signal));
  }
}

// The job's events as they come. EventSource reconnects by itself and goes on after the last it saw.
function watch(id, on, look, signal) {
  return new Promise(resolve => {
    const source = new EventSource(`/train/${part(id)}/events`);
    const stop = () => { source.close(); resolve(); };
    signal.addEventListener('abort', stop);
    for (const type of TYPES) {
      source.addEventListener(type, event => {
        on[type]?.(JSON.parse(event.data));
        if (FINISHED.includes(type)) stop();
        look();
      });
    }
    source.onerror = () => { if (source.readyState === EventSource.CLOSED) stop(); };
  });
}

function title(job) {
  return [h('h1', {}, `Training ${job.task}`),
    h('div', { class: 'actions' }, h('span', { class: `tag ${job.state}` }, job.cancel_requested && !FINISHED.includes(job.state) ? 'stopping' : job.state),
      !FINISHED.includes(job.state) && h('button', { type: 'button', onclick: event => doing(event.currentTarget, () => call('POST', `/train/${part(job.id)}/cancel`)) }, 'Cancel'))];
}

function progress(job) {
  const { progress: at } = job;
  if (job.state === 'queued') return h('p', { class: 'muted' }, 'Waiting for a worker.');
  if (job.state === 'failed') return h('p', { class: 'problem' }, `${job.error?.detail ?? 'It failed.'} (${job.error?.code ?? 'unknown'})`);
  if (job.state === 'cancelled') return h('p', { class: 'muted' }, 'Cancelled. What was live stays live.');
  if (job.state === 'succeeded') return h('p', { class: 'muted' }, `Done ${ago(job.finished_at)}, in ${duration(job.finished_at - job.started_at)}.`);
  const searches = at.trials > 0 && at.trial < at.trials + 1 && !at.eta_s && at.epochs && at.trial;
  const share = at.epochs ? (at.epoch + (at.steps ? at.step / at.steps : 0)) / Math.max(1, at.epochs) : 0;
  const words = [searches && `trial ${at.trial} of ${at.trials}`, at.epochs > 0 && `epoch ${Math.min(at.epoch + 1, at.epochs)} of ${at.epochs}`,
    at.loss !== null && `loss ${at.loss.toFixed(3)}`, at.val_accuracy !== null && `validation accuracy ${percent(at.val_accuracy)}`, at.eta_s !== null && `about ${duration(at.eta_s)} left`].filter(Boolean);
  return [h('progress', { max: 1, value: at.epochs ? Math.min(1, share) : null, 'aria-label': 'Training' }), h('p', { class: 'small muted' }, words.join(' · ') || 'Reading the pictures …')];
}

function learning() {
  const element = h('div', { class: 'learning' });
  let epochs = [], plot = null;
  const series = { labels: [], lines: [{ label: 'loss', data: [], colour: 'muted' }, { label: 'validation accuracy', data: [], colour: 'accent', axis: 'y1', points: 2 }] };
  function draw() {
    epochs.sort((a, b) => a.epoch - b.epoch);
    series.labels.splice(0, Infinity, ...epochs.map(one => one.epoch));
    series.lines[0].data.splice(0, Infinity, ...epochs.map(one => one.loss));
    series.lines[1].data.splice(0, Infinity, ...epochs.map(one => one.val_accuracy));
    const said = `Loss and validation accuracy by epoch; after epoch ${epochs.at(-1).epoch}: ${percent(epochs.at(-1).val_accuracy)}`;
    if (!plot) { plot = lines(said, 'epoch', series, { from: 0 }); fill(element, section('Learning', plot.box)); }
    plot.describe(said);
    plot.update(() => {});
  }
  return {
    element,
    add(event) { epochs = [...epochs.filter(one => one.epoch !== event.epoch), event]; draw(); },
    clear() { epochs = []; },
  };
}

// Trials of a search as they end, in the order in which they are tried.
function searching() {
  const element = h('div', {});
  const found = [];
  return {
    element,
    add(event) {
      if (!found.some(one => one.trial === event.trial)) found.push(event);
      const best = found.reduce((first, one) => (one.val_nll ?? Infinity) < (first.val_nll ?? Infinity) ? one : first);
      fill(element, section(`Search: ${found.length} of ${event.trials} tried`, scrolling('Trials', h('ol', { class: 'trials' }, found.map(one => h('li', { class: one === best ? 'best' : null },
        h('span', {}, one.method), h('span', { class: 'muted small' }, [one.lr && `lr ${one.lr}`, one.prompts && `p ${one.prompts}`, one.optimizer].filter(Boolean).join(' · ')),
        h('span', { class: 'number' }, one.val_accuracy === null ? 'diverged' : percent(one.val_accuracy))))))));
    },
  };
}

function outcome(job, signal) {
  if (job.state !== 'succeeded') return null;
  const judged = job.metrics.test ?? job.metrics.val;
  if (!job.version) return section('Result', h('p', {}, 'Figures only: no version was stored.'), judged && figures(judged, count(judged.images, job.metrics.test ? 'test picture' : 'validation picture')));
  const asking = panel(() => [`${job.task}@${job.version}`], signal);
  return [
    section('Result', h('p', {}, job.metrics.published === false ? 'Kept, but not live: ' : 'Live: ', h('a', { href: `#/tasks/${part(job.task)}` }, `${job.task} ${short(job.version)}`),
      job.metrics.published === false && job.metrics.judged && ` was not better than what is live (${percent(job.metrics.judged.new.accuracy)} against ${percent(job.metrics.judged.live?.accuracy)}).`),
    judged && figures(judged, count(judged.images, job.metrics.test ? 'test picture' : 'validation picture'))),
    section('Ask it', asking.element),
  ];
}

