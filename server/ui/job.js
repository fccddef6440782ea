// One training job: its progress, its result, and predictions with the new version.
import { at, call, get, part } from './api.js';
import { predictionPanel } from './answers.js';
import { lines } from './charts.js';
import { notify, run } from './dialogs.js';
import { fill, h, scrolling, section } from './dom.js';
import { figures } from './version.js';
import { ago, count, duration, percent, short } from './words.js';

const FINISHED = ['succeeded', 'failed', 'cancelled'];
const TYPES = ['queued', 'started', 'epoch', 'trial', 'published', 'kept', 'live_unusable', 'retried', 'cancel_requested', ...FINISHED];
const POLL_S = 1;

export async function show(page, id, signal) {
  const job = await get(`/train/${part(id)}`, signal);
  const head = h('div', { class: 'head' }), state = h('div', { role: 'status' }), result = h('div', {});
  const curve = learningCurves(), trials = trialList();
  fill(page, h('p', { class: 'crumb' }, h('a', { href: '#/train' }, 'Train')), head, state, trials.element, curve.element, result);
  const update = now => { fill(head, title(now)); fill(state, progress(now)); };
  update(job);
  let wake = () => {};
  const ended = listen(id, { epoch: curve.add, trial: trials.add, retried: curve.clear, published: event => event.preliminary && notify('A preliminary version is live. The full training continues.') }, () => wake(), signal);
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
  if (job.state === 'cancelled') return h('p', { class: 'muted' }, 'Cancelled. The live version has not changed.');
  if (job.state === 'succeeded') return h('p', { class: 'muted' }, `Finished ${ago(job.finished_at)}; training took ${duration(job.finished_at - job.started_at)}.`);
  const searching = now.trials > 0 && now.trial < now.trials + 1 && !now.eta_s && now.epochs && now.trial;
  const share = now.epochs ? (now.epoch + (now.steps ? now.step / now.steps : 0)) / Math.max(1, now.epochs) : 0;
  const parts = [searching && `trial ${now.trial} of ${now.trials}`, now.epochs > 0 && `epoch ${Math.min(now.epoch + 1, now.epochs)} of ${now.epochs}`,
    now.loss !== null && `loss ${now.loss.toFixed(3)}`, now.val_accuracy !== null && `validation accuracy ${percent(now.val_accuracy)}`, now.eta_s !== null && `about ${duration(now.eta_s)} left`].filter(Boolean);
  return [h('progress', { max: 1, value: now.epochs ? Math.min(1, share) : null, 'aria-label': 'Training' }), h('p', { class: 'small muted' }, parts.join(' · ') || 'Loading the pictures …')];
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
      const best = finished.reduce((first, trial) => (trial.val_nll ?? Infinity) < (first.val_nll ?? Infinity) ? trial : first);
      fill(element, section(`Search: ${finished.length} of ${event.trials} trials`, scrolling('Trials', h('ol', { class: 'trials' }, finished.map(trial => h('li', { class: trial === best ? 'best' : null },
        h('span', {}, trial.method), h('span', { class: 'muted small' }, [trial.lr && `lr ${trial.lr}`, trial.prompts && `${trial.prompts} prompts`, trial.optimizer].filter(Boolean).join(' · ')),
        h('span', { class: 'number' }, trial.val_accuracy === null ? 'diverged' : percent(trial.val_accuracy))))))));
    },
  };
}

function outcome(job, signal) {
  if (job.state !== 'succeeded') return null;
  const evaluation = job.metrics.test ?? job.metrics.val;
  if (!job.version) return section('Result', h('p', {}, 'This job reports metrics only; it stores no version.'), evaluation && figures(evaluation, count(evaluation.images, job.metrics.test ? 'test picture' : 'validation picture')));
  const predictions = predictionPanel(() => [`${job.task}@${job.version}`], signal);
  return [
    section('Result', h('p', {}, job.metrics.published === false ? 'Stored, not live: ' : 'Live: ', h('a', { href: `#/tasks/${part(job.task)}` }, `${job.task} ${short(job.version)}`),
      job.metrics.published === false && job.metrics.judged && ` is not better than the live version (validation accuracy ${percent(job.metrics.judged.new.accuracy)} against ${percent(job.metrics.judged.live?.accuracy)}).`),
    evaluation && figures(evaluation, count(evaluation.images, job.metrics.test ? 'test picture' : 'validation picture'))),
    section('Try it', predictions.element),
  ];
}

