// Files out of a dropped or chosen folder, with their paths inside it.

const WANTED = /\.(jpe?g|png|webp|bmp|csv|tsv|jsonl|json|txt)$/i;
const ARCHIVE = /\.(zip|tar|tgz|tar\.gz|tar\.zst|tzst|parquet|npz)$/i;
const TYPES = { zip: 'application/zip', tar: 'application/x-tar', tgz: 'application/gzip', gz: 'application/gzip', zst: 'application/zstd', tzst: 'application/zstd', parquet: 'application/vnd.apache.parquet' };

export const isArchive = file => ARCHIVE.test(file.name);
export const archiveType = name => TYPES[name.split('.').pop().toLowerCase()] ?? 'application/octet-stream';

// → { name, archive } or { name, files: [{ path, file }] }
export function chosen(files) {
  return sorted([...files].map(file => ({ path: file.webkitRelativePath || file.name, file })));
}

export async function dropped(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry()).filter(Boolean);
  const found = [];
  for (const entry of entries) for await (const one of walk(entry, '')) found.push(one);
  return sorted(found);
}

function sorted(found) {
  if (found.length === 1 && isArchive(found[0].file)) return { name: found[0].file.name.replace(ARCHIVE, ''), archive: found[0].file };
  const files = found.filter(({ path }) => WANTED.test(path) && !path.split('/').some(step => step.startsWith('.')));
  if (!files.length) throw new Error('Expected a folder of class folders with pictures, or an archive of one; found no picture.');
  if (files.every(({ path }) => !path.includes('/'))) throw new Error('Expected a folder for each class, with its pictures inside; found pictures without a folder.');
  const first = files[0].path.split('/')[0];
  const wrapped = files.every(({ path }) => path.startsWith(`${first}/`));
  return { name: wrapped ? first : '', files: wrapped ? files.map(({ path, file }) => ({ path: path.slice(first.length + 1), file })) : files };
}

async function* walk(entry, before) {
  const path = before + entry.name;
  if (entry.isFile) yield { path, file: await new Promise((good, bad) => entry.file(good, bad)) };
  if (!entry.isDirectory) return;
  const reader = entry.createReader();
  for (;;) { // a reader gives its entries in portions, and an empty one at the end
    const some = await new Promise((good, bad) => reader.readEntries(good, bad));
    if (!some.length) return;
    for (const one of some) yield* walk(one, `${path}/`);
  }
}
