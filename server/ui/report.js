// The contents of a dataset: its warnings, and its classes with sample pictures.
import { get, part } from './api.js';
import { fill, h } from './dom.js';
import { picture } from './thumbs.js';
import { bytes, count } from './words.js';

const SAMPLES = 6;
const MOST_CLASSES = 30;
const MOST_SKIPPED = 20;

export async function report(dataset, signal) {
  const { thumbnails } = await get(`/datasets/${part(dataset.id)}/thumbnails?per_label=${SAMPLES}&limit=200`, signal);
  const warnings = dataset.report?.warnings ?? [];
  const splits = Object.keys(dataset.splits);
  return h('div', { class: 'report' },
    h('p', {}, h('strong', {}, dataset.name || 'Unnamed'), ` · ${count(dataset.images, 'picture')} in ${count(dataset.labels.length, 'class', 'classes')} · ${bytes(dataset.bytes)}`,
      sizes(dataset.report), splits.length > 1 && ` · ${splits.join(', ')}`),
    warnings.length > 0 && h('ul', { class: 'warnings', 'aria-label': 'Warnings' }, warnings.map(warning => h('li', {}, warning.text))),
    h('ul', { class: 'classes', 'aria-label': 'Classes' }, dataset.labels.slice(0, MOST_CLASSES).map(label => h('li', {},
      h('div', { class: 'label' }, h('strong', {}, label), h('span', { class: 'muted small' }, splits.map(split => `${dataset.splits[split][label]} ${splits.length > 1 ? split : ''}`).join(' · '))),
      h('div', { class: 'strip' }, thumbnails.filter(thumbnail => thumbnail.label === label).map(thumbnail => picture(dataset.id, thumbnail, 56)))))),
    dataset.labels.length > MOST_CLASSES && h('p', { class: 'muted small' }, `and ${count(dataset.labels.length - MOST_CLASSES, 'more class', 'more classes')}`),
    dataset.skipped.length > 0 && h('details', {}, h('summary', {}, `${count(dataset.skipped.length, 'file')} skipped`),
      h('ul', { class: 'small' }, dataset.skipped.slice(0, MOST_SKIPPED).map(file => h('li', {}, `${file.name}: ${file.reason}`)))));
}

const sizes = summary => {
  if (!summary) return null;
  const { width, height } = summary;
  return ` · ${width.min === width.max && height.min === height.max ? `${width.min}×${height.min} px` : `${width.min}–${width.max} px wide`}`;
};

export const showReport = async (place, dataset, signal) => fill(place, await report(dataset, signal));
