// Numbers and names formatted for people.

export const percent = (share, digits = 1) => share === null || share === undefined ? '–' : `${(100 * share).toFixed(digits)} %`;
export const range = ([low, high]) => `${(100 * low).toFixed(0)}–${(100 * high).toFixed(0)} %`;
export const withInterval = (share, interval) => interval ? `${percent(share)} (${range(interval)})` : percent(share);
export const short = version => version.slice(0, 10);
export const count = (n, singular, plural = `${singular}s`) => `${n.toLocaleString('en')} ${n === 1 ? singular : plural}`;

export function bytes(n) {
  const units = ['B', 'KB', 'MB', 'GB'];
  const power = Math.min(3, n > 0 ? Math.floor(Math.log10(n) / 3) : 0);
  return `${(n / 1000 ** power).toFixed(power && n / 1000 ** power < 10 ? 1 : 0)} ${units[power]}`;
}

export function ago(seconds) {
  const age = Date.now() / 1000 - seconds;
  const steps = [[60, 'second', 1], [3600, 'minute', 60], [86400, 'hour', 3600], [Infinity, 'day', 86400]];
  const [, unit, size] = steps.find(([limit]) => age < limit);
  return age < 5 ? 'just now' : `${count(Math.floor(age / size), unit)} ago`;
}

export function duration(seconds) {
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  return seconds < 3600 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s` : `${(seconds / 3600).toFixed(1)} h`;
}

// Folder names that say nothing about their pictures.
const GENERIC = ['train', 'training', 'data', 'dataset', 'images', 'pictures', 'photos'];

// A valid task name from the name of a folder; empty for a generic one.
export const taskName = text => text.toLowerCase().replace(/[^a-z0-9._-]+/g, '-').replace(/^[^a-z0-9]+|-+$/g, '').slice(0, 64).replace(/^.*$/, name => GENERIC.includes(name) ? '' : name);
