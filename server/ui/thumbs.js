// Thumbnails of a dataset, fetched when they scroll into view.
import { at, get, part } from './api.js';
import { fill, h } from './dom.js';

export const picture = (dataset, thumbnail, side = 96) => h('img', {
  src: at(`/datasets/${part(dataset)}/thumbnails/${thumbnail.number}?side=${2 * side}`), alt: thumbnail.label, title: thumbnail.label,
  width: side, height: side, loading: 'lazy', class: 'thumb',
});

const inView = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) { inView.unobserve(entry.target); entry.target.load(); }
}, { rootMargin: '200px' });

// One picture of each class, loaded when the row scrolls into view; empty when the dataset was deleted.
export function strip(dataset, most = 5) {
  const row = h('div', { class: 'strip' });
  if (!dataset) return row;
  row.load = async () => {
    const page = await get(`/datasets/${part(dataset)}/thumbnails?limit=${most}`).catch(() => null);
    if (page) fill(row, page.thumbnails.map(thumbnail => picture(dataset, thumbnail, 44)));
  };
  inView.observe(row);
  return row;
}
