// The device, updated every second: lenses on the rack, rows in the queue, rows in each batch.
import { get, part } from './api.js';
import { bars, lines } from './charts.js';
import { fill, h, scrolling, section } from './dom.js';
import { bytes, count, percent, short } from './words.js';

const POLL_S = 1;
const CURVE_S = 60;
const MAX_SQUARES = 1024;

export async function show(page, _, signal) {
  let now = await get('/rack', signal);
  const ready = await get('/readyz', signal).catch(() => ({}));
  const figures = h('dl', { class: 'figures many' }), slots = h('div', { class: 'slots' }), seats = h('div', {});
  const rate = { labels: Array.from({ length: CURVE_S }, (_, index) => CURVE_S - 1 - index), lines: [{ label: 'rows per second', data: Array(CURVE_S).fill(null), colour: 'accent', fill: true }] };
  const curve = lines('Rows answered in each of the last 60 seconds', 'seconds ago', rate, { height: 180, from: 0 });
  const rows = batchChart('rows in a batch', now.batch_rows), tasks = batchChart('tasks in a batch', now.batch_tasks);
  const status = h('p', { class: 'muted small' });
  fill(page, h('div', { class: 'head' }, h('h1', {}, 'Rack'), device(ready)), figures, status,
    section('Slots', slots, seats),
    h('div', { class: 'two' }, section('Throughput', curve.box), section('Batch composition', rows.box, tasks.box)));
  const draw = before => {
    fill(figures, rackFigures(now));
    fillSlots(slots, now);
    if (JSON.stringify(before?.seats) !== JSON.stringify(now.seats)) fill(seats, table(now));
    rows.update(chart => setBuckets(chart, now.batch_rows));
    tasks.update(chart => setBuckets(chart, now.batch_tasks));
  };
  draw();
  poll();

  async function poll() {
    let at = performance.now();
    while (!signal.aborted) {
      await new Promise(resolve => setTimeout(resolve, 1000 * POLL_S));
      if (signal.aborted || document.hidden) continue;
      try {
        const before = now;
        now = await get('/rack', signal);
        const took = (performance.now() - at) / 1000;
        at = performance.now();
        status.textContent = '';
        rate.lines[0].data.push(Math.max(0, answered(now) - answered(before)) / took);
        rate.lines[0].data.shift();
        curve.update(() => {});
        draw(before);
      } catch (error) {
        if (error.name !== 'AbortError') status.textContent = `${error.message} Retrying …`;
      }
    }
  }
}

const answered = rack => rack.rows.answered ?? 0;

const device = ({ backbone }) => backbone && h('p', { class: 'muted' }, `${backbone.arch} · ${backbone.device} · ${backbone.dtype}`);

function rackFigures(rack) {
  const lookups = rack.hits + rack.loads;
  const rows = [['Lenses on the rack', `${rack.used_slots} of ${rack.slots}`], ['Memory', `${bytes(rack.used_bytes)} of ${bytes(rack.bytes)}`],
    ['Hit rate', lookups ? percent(rack.hits / lookups, 0) : '–'], ['Loads', rack.loads], ['Evictions', rack.evictions],
    ['Rows in the queue', `${rack.queued} of ${rack.places}`], ['Batches', rack.forwards.toLocaleString('en')], ['Rows answered', answered(rack).toLocaleString('en')]];
  return rows.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, String(value))));
}

// One square for each slot: empty, taken, in use or pinned. The table below has the same information as text.
function fillSlots(place, rack) {
  const taken = new Map(rack.seats.map(seat => [seat.slot, seat]));
  const drawn = Math.min(rack.slots, MAX_SQUARES);
  place.setAttribute('role', 'img');
  place.setAttribute('aria-label', `${rack.used_slots} of ${rack.slots} slots are taken`);
  while (place.children.length < drawn) place.append(h('span', {}));
  for (let slot = 0; slot < drawn; slot++) {
    const seat = taken.get(slot), square = place.children[slot];
    square.className = seat ? seat.in_use ? 'busy' : seat.pinned ? 'pinned' : 'taken' : '';
    square.title = seat ? `${seat.task} ${short(seat.version)}` : '';
  }
}

function table(rack) {
  if (!rack.seats.length) return h('p', { class: 'muted' }, 'No lens is loaded yet. The first request for a task loads its lens.');
  const head = [['Task'], ['Version'], ['Slot', 'number'], ['Memory', 'number'], ['Requests', 'number'], ['']];
  return scrolling('Lenses on the rack', h('table', {},
    h('thead', {}, h('tr', {}, head.map(([title, kind]) => h('th', { scope: 'col', class: kind }, title || h('span', { class: 'hidden' }, 'State'))))),
    h('tbody', {}, rack.seats.toReversed().map(seat => h('tr', {},
      h('th', { scope: 'row' }, h('a', { href: `#/tasks/${part(seat.task)}` }, seat.task)), h('td', {}, h('code', {}, short(seat.version))),
      h('td', { class: 'number' }, seat.slot), h('td', { class: 'number' }, bytes(seat.bytes)), h('td', { class: 'number' }, seat.requests.toLocaleString('en')),
      h('td', {}, seat.pinned && h('span', { class: 'tag on' }, 'pinned'), seat.in_use > 0 && h('span', { class: 'tag' }, `${count(seat.in_use, 'request')} running`)))))));
}

const ranges = buckets => {
  const ends = Object.keys(buckets).sort((a, b) => (a === '+Inf') - (b === '+Inf') || a - b);
  return ends.map(end => [end === '+Inf' ? 'more' : Number(end) > 2 ? `≤ ${end}` : end, buckets[end]]);
};
const batchChart = (what, buckets) => bars(`Batches by the number of ${what}`, ranges(buckets).map(([name]) => name), ranges(buckets).map(([, n]) => n), { height: 150, category: what });

function setBuckets(chart, buckets) {
  chart.data.labels = ranges(buckets).map(([name]) => name);
  chart.data.datasets[0].data = ranges(buckets).map(([, n]) => n);
}
