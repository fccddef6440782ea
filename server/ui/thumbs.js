// Small pictures of a dataset. A list of many tasks fetches those that come into sight.
import { get, part } from './api.js';
import { fill, h } from './dom.js';

export const picture = (dataset, one, side = 96) => h('img', {
  src: `/datasets/${part(dataset)}/thumbnails/${one.number}?side=${2 * side}`, alt: one.label, title: one.label,
  width: side, height: side, loading: 'lazy', class: 'thumb',
});

const seen = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); entry.target.load(); }
}, { rootMargin: '200px' });

// One picture of each class, as soon as the row is in sight; nothing where the dataset is gone.
export function strip(dataset, most = 5) {
  const row = h('div', { class: 'strip' });
  if (!dataset) return row;
  row.load = async () => {
    const found = await get(`/datasets/${part(dataset)}/thumbnails?limit=${most}`).catch(() => null);
    if (found) fill(row, found.thumbnails.map(one => picture(dataset, one, 44)));
  };
  seen.observe(row);
  return row;
}
