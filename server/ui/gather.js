// The files of a dropped or chosen folder, with their paths inside it.

const ACCEPTED = /\.(jpe?g|png|webp|bmp|csv|tsv|jsonl|json|txt)$/i;
const ARCHIVE = /\.(zip|tar|tgz|tar\.gz|tar\.zst|tzst|parquet|npz)$/i;
const TYPES = { zip: 'application/zip', tar: 'application/x-tar', tgz: 'application/gzip', gz: 'application/gzip', zst: 'application/zstd', tzst: 'application/zstd', parquet: 'application/vnd.apache.parquet' };

export const isArchive = file => ARCHIVE.test(file.name);
export const archiveType = name => TYPES[name.split('.').pop().toLowerCase()] ?? 'application/octet-stream';

// → { name, archive } or { name, files: [{ path, file }] }
export function fromInput(files) {
  return toUpload([...files].map(file => ({ path: file.webkitRelativePath || file.name, file })));
}

export async function fromDrop(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry()).filter(Boolean);
  const files = [];
  for (const entry of entries) for await (const file of walk(entry, '')) files.push(file);
  return toUpload(files);
}

function toUpload(all) {
  if (all.length === 1 && isArchive(all[0].file)) return { name: all[0].file.name.replace(ARCHIVE, ''), archive: all[0].file };
  const files = all.filter(({ path }) => ACCEPTED.test(path) && !path.split('/').some(name => name.startsWith('.')));
  if (!files.length) throw new Error('No pictures found. Choose a folder with one subfolder for each class, or an archive of such a folder.');
  if (files.every(({ path }) => !path.includes('/'))) throw new Error('These pictures are in no subfolder. Put the pictures of each class into a subfolder named after the class.');
  const first = files[0].path.split('/')[0];
  const wrapped = files.every(({ path }) => path.startsWith(`${first}/`));
  return { name: wrapped ? first : '', files: wrapped ? files.map(({ path, file }) => ({ path: path.slice(first.length + 1), file })) : files };
}

async function* walk(entry, parent) {
  const path = parent + entry.name;
  if (entry.isFile) yield { path, file: await new Promise((good, bad) => entry.file(good, bad)) };
  if (!entry.isDirectory) return;
  const reader = entry.createReader();
  for (;;) { // readEntries returns the entries in portions, and an empty portion at the end
    const portion = await new Promise((good, bad) => reader.readEntries(good, bad));
    if (!portion.length) return;
    for (const child of portion) yield* walk(child, `${path}/`);
  }
}
