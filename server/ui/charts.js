// Charts in the colours of the page, redrawn when the colour scheme changes. index.html loads Chart.js as a global.
import { h } from './dom.js';

const probe = document.createElement('span');

// The current value of a colour of style.css.
export function colour(name, share = 1) {
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return share === 1 ? value : value.replace(/rgba?\(([^)]*)\)/, (_, rgb) => `rgba(${rgb.split(',').slice(0, 3).join(',')}, ${share})`);
}

const axis = title => ({
  title: { display: Boolean(title), text: title, color: colour('muted') },
  ticks: { color: colour('muted'), maxRotation: 0, autoSkipPadding: 12 },
  grid: { color: colour('line') }, border: { display: false },
});

const charts = new Set();

// A canvas with its chart. `describe` is its text alternative; `settings()` is called again when the colours change.
export function chart(describe, height, settings) {
  const canvas = h('canvas', { role: 'img', 'aria-label': describe });
  const box = h('div', { class: 'chart', style: { height: `${height}px` } }, canvas);
  const entry = { box, chart: null, settings };
  queueMicrotask(() => draw(entry));
  charts.add(entry);
  return {
    box,
    update(change) { if (entry.chart) { change(entry.chart); entry.chart.update('none'); } },
    describe(text) { canvas.setAttribute('aria-label', text); },
  };
}

function draw(entry) {
  entry.chart?.destroy();
  const { type, data, options = {} } = entry.settings();
  entry.chart = new Chart(entry.box.firstChild, { type, data, options: { animation: false, responsive: true, maintainAspectRatio: false, ...options } });
}

export function recolour() {
  for (const entry of charts) if (entry.box.isConnected) draw(entry);
}

export function destroyCharts() {
  for (const entry of charts) { entry.chart?.destroy(); charts.delete(entry); }
}

export function lines(describe, x, series, { height = 220, percent = false, from, to } = {}) {
  return chart(describe, height, () => ({
    type: 'line',
    data: { labels: series.labels ?? [], datasets: series.lines.map(line => ({
      label: line.label, data: line.data, borderColor: colour(line.colour), backgroundColor: colour(line.colour, 0.12), yAxisID: line.axis ?? 'y',
      borderWidth: 2, clip: 8, pointRadius: line.points ?? 0, pointHoverRadius: 4, tension: 0.25, fill: Boolean(line.fill), spanGaps: true })) },
    options: {
      interaction: { mode: 'index', intersect: false },
      plugins: { legend: { display: series.lines.length > 1, labels: { color: colour('text'), boxWidth: 12, boxHeight: 2 } } },
      scales: {
        x: { ...axis(x), grid: { display: false }, ticks: { ...axis('').ticks, maxTicksLimit: 13 } },
        y: { ...axis(series.lines[0].label), min: from, max: to, ticks: { ...axis('').ticks, ...(percent && { callback: value => `${Math.round(100 * value)} %` }) } },
        ...(series.lines.some(line => line.axis === 'y1') && { y1: { ...axis(series.lines.find(line => line.axis === 'y1').label), position: 'right', min: 0, max: 1, grid: { display: false }, ticks: { ...axis('').ticks, callback: value => `${Math.round(100 * value)} %` } } }),
      },
    },
  }));
}

export function bars(describe, labels, values, { height, percent = false, across = false, category = '' } = {}) {
  const format = value => percent ? `${(100 * value).toFixed(1)} %` : String(value);
  return chart(describe, height ?? (across ? 44 + 28 * labels.length : 200), () => ({
    type: 'bar',
    data: { labels, datasets: [{ data: values, backgroundColor: colour('accent'), borderRadius: 4, maxBarThickness: across ? 16 : 36 }] },
    options: {
      indexAxis: across ? 'y' : 'x',
      plugins: { legend: { display: false }, tooltip: { callbacks: { label: item => format(item.raw) } } },
      scales: {
        [across ? 'x' : 'y']: { ...axis(''), min: 0, max: percent ? 1 : undefined, ticks: { ...axis('').ticks, precision: percent ? undefined : 0, ...(percent && { callback: value => `${Math.round(100 * value)} %` }) } },
        [across ? 'y' : 'x']: { ...axis(category), grid: { display: false }, ticks: { color: colour('text'), autoSkip: labels.length > 60 } },
      },
    },
  }));
}
