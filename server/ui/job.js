// One training job: its progress, its result, and predictions with the new version.
import { at, call, get, part } from './api.js';
import { predictionPanel } from './answers.js';
import { lines } from './charts.js';
import { notify, run } from './dialogs.js';
import { fill, h, section } from './dom.js';
import { figures, trialTable } from './version.js';
import { ago, count, duration, percent, short, withInterval } from './words.js';

const FINISHED = ['succeeded', 'failed', 'cancelled'];
const TYPES = ['queued', 'started', 'epoch', 'trial', 'published', 'kept', 'live_unusable', 'retried', 'cancel_requested', ...FINISHED];
const POLL_S = 1;
const PHASES = { reading: 'reading the pictures', features: 'caching features', head: 'fitting a preliminary head', publish: 'evaluating and publishing' };

export async function show(page, id, signal) {
  const job = await get(`/train/${part(id)}`, signal);
  const head = h('div', { class: 'head' }), state = h('div', { role: 'status' }), result = h('div', {}), early = h('div', {});
  const curve = learningCurves(), trials = trialList();
  fill(page, h('p', { class: 'crumb' }, h('a', { href: '#/train' }, 'Train')), head, state, early, trials.element, curve.element, result);
  const update = now => { fill(head, title(now)); fill(state, progress(now)); };
  const published = event => {
    if (!event.preliminary) return;
    notify('A preliminary version is live. The full training continues.');
    fill(early, h('p', { class: 'small' }, 'A preliminary version answers meanwhile: ', h('a', { href: `#/ask/${part(job.task)}` }, `try ${job.task}`), event.val_accuracy != null && ` (validation accuracy ${withInterval(event.val_accuracy, event.val_interval)})`));
  };
  update(job);
  let wake = () => {};
  const ended = listen(id, { epoch: curve.add, trial: trials.add, retried: curve.clear, published }, () => wake(), signal);
  follow();

  async function follow() {
    let now = job;
    while (!signal.aborted && !FINISHED.includes(now.state)) {
      await new Promise(resolve => { wake = resolve; setTimeout(resolve, 1000 * POLL_S); });
      now = await get(`/train/${part(id)}`, signal).catch(() => now);
      if (!signal.aborted && JSON.stringify(now.progress) + now.state !== state.dataset.last) update(now);
      state.dataset.last = JSON.stringify(now.progress) + now.state;
    }
    if (signal.aborted) return;
    await Promise.race([ended, new Promise(resolve => setTimeout(resolve, 3000 * POLL_S))]);
    update(now);
    trials.choose(now.metrics.search?.chosen);
    if (now.state === 'succeeded') fill(early);
    fill(result, outcome(now, signal));
  }
}

// Calls `on[type]` for each event of the job. EventSource reconnects by itself and resumes after the last event.
function listen(id, on, refresh, signal) {
  return new Promise(resolve => {
    const source = new EventSource(at(`/train/${part(id)}/events`));
    const stop = () => { source.close(); resolve(); };
    signal.addEventListener('abort', stop);
    for (const type of TYPES) {
      source.addEventListener(type, event => {
        on[type]?.(JSON.parse(event.data));
        if (FINISHED.includes(type)) stop();
        refresh();
      });
    }
    source.onerror = () => { if (source.readyState === EventSource.CLOSED) stop(); };
  });
}

function title(job) {
  return [h('h1', {}, `Training ${job.task}`),
    h('div', { class: 'actions' }, h('span', { class: `tag ${job.state}` }, job.cancel_requested && !FINISHED.includes(job.state) ? 'cancelling' : job.state),
      !FINISHED.includes(job.state) && h('button', { type: 'button', onclick: event => run(event.currentTarget, () => call('POST', `/train/${part(job.id)}/cancel`)) }, 'Cancel'))];
}

function progress(job) {
  const now = job.progress;
  if (job.state === 'queued') return h('p', { class: 'muted' }, 'Waiting for a worker.');
  if (job.state === 'failed') return h('p', { class: 'problem' }, `${job.error?.detail ?? 'Training failed.'} (${job.error?.code ?? 'unknown'})`);
  if (job.state === 'cancelled') return h('p', { class: 'muted' }, 'Cancelled. The full fit has published no version.');
  if (job.state === 'succeeded') return h('p', { class: 'muted' }, `Finished ${ago(job.finished_at)}; training took ${duration(job.finished_at - job.started_at)}.`);
  const epochs = now.epochs > 0 && !(now.phase in PHASES) && `epoch ${Math.max(1, now.epoch)} of ${now.epochs}`;
  const parts = [now.trials > 0 && now.trial > 0 && `${now.phase === 'compare' ? 'fit' : 'trial'} ${now.trial} of ${now.trials}`, PHASES[now.phase], epochs,
    now.loss !== null && `loss ${now.loss.toFixed(3)}`, now.val_nll !== null && `validation loss ${now.val_nll.toFixed(3)}`, now.val_accuracy !== null && `validation accuracy ${percent(now.val_accuracy)}`,
    now.share !== null && `${percent(now.share, 0)} done`, now.eta_s !== null && `about ${duration(now.eta_s)} left`].filter(Boolean);
  return [h('progress', { max: 1, value: now.share, 'aria-label': 'Training' }), h('p', { class: 'small muted' }, parts.join(' · ') || 'Loading the pictures …')];
}

function learningCurves() {
  const element = h('div', { class: 'learning' });
  let epochs = [], plot = null;
  const series = { labels: [], lines: [{ label: 'loss', data: [], colour: 'muted' }, { label: 'validation accuracy', data: [], colour: 'accent', axis: 'y1', points: 2 }] };
  function draw() {
    epochs.sort((a, b) => a.epoch - b.epoch);
    series.labels.splice(0, Infinity, ...epochs.map(entry => entry.epoch));
    series.lines[0].data.splice(0, Infinity, ...epochs.map(entry => entry.loss));
    series.lines[1].data.splice(0, Infinity, ...epochs.map(entry => entry.val_accuracy));
    const description = `Loss and validation accuracy by epoch; after epoch ${epochs.at(-1).epoch}: ${percent(epochs.at(-1).val_accuracy)}`;
    if (!plot) { plot = lines(description, 'epoch', series, { from: 0 }); fill(element, section('Learning curves', plot.box)); }
    plot.describe(description);
    plot.update(() => {});
  }
  return {
    element,
    add(event) { epochs = [...epochs.filter(entry => entry.epoch !== event.epoch), event]; draw(); },
    clear() { epochs = []; },
  };
}

// The finished trials of a search, in the order of their end.
function trialList() {
  const element = h('div', {});
  const finished = [];
  return {
    element,
    add(event) {
      if (!finished.some(trial => trial.trial === event.trial)) finished.push(event);
      draw(null);
    },
    choose: draw,
  };

  function draw(chosen) {
    if (finished.length) fill(element, section(`Search: ${finished.length} of ${finished[0].trials} trials`, trialTable(finished, chosen)));
  }
}

function outcome(job, signal) {
  if (job.state !== 'succeeded') return null;
  const evaluation = job.metrics.test ?? job.metrics.val;
  if (!job.version) return section('Result', h('p', {}, 'This job reports metrics only; it stores no version.'), evaluation && figures(evaluation, count(evaluation.images, job.metrics.test ? 'test picture' : 'validation picture')));
  const predictions = predictionPanel(() => [`${job.task}@${job.version}`], signal);
  return [
    section('Result', h('p', {}, job.metrics.published === false ? 'Stored, not live: ' : 'Live: ', h('a', { href: `#/tasks/${part(job.task)}` }, `${job.task} ${short(job.version)}`),
      job.metrics.published === false && job.metrics.judged && ` is not better than the live version (validation accuracy ${percent(job.metrics.judged.new.accuracy)} against ${percent(job.metrics.judged.live?.accuracy)}, on the same ${count(job.metrics.judged.new.images ?? 0, 'validation picture')}).`,
      job.metrics.published && job.metrics.judged?.live && `, better than the version before (validation accuracy ${percent(job.metrics.judged.new.accuracy)} against ${percent(job.metrics.judged.live.accuracy)}, on the same ${count(job.metrics.judged.new.images ?? 0, 'validation picture')}).`),
    evaluation && figures(evaluation, count(evaluation.images, job.metrics.test ? 'test picture' : 'validation picture'))),
    section('Try it', predictions.element),
  ];
}

