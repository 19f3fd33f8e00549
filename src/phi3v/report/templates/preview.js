// The preview of a data file.

const SUPERVISED = 1, SPECIAL = 2, IMAGE = 4;

(async () => {
  const data = await unpack('preview');
  const page = frame(data.file.split('/').at(-1));
  page.add('overview', 'Overview',
    make('p', { class: 'soft' }, make('span', { class: 'mono' }, data.file), ` · at most ${data.num_crops} crops a page · tokens ${data.tokenizer}`),
    make('div', { class: 'tiles' }, Object.entries(data.counts).map(([name, value]) => make('div', { class: 'tile' }, make('div', { class: 'name' }, name), make('div', { class: 'value' }, figure(value))))));
  if (data.faults.length || data.notes.length) {
    page.add('warnings', 'Warnings',
      data.notes.map((note) => make('div', { class: 'note' }, make('p', {}, note))),
      data.faults.length ? [
        make('p', { class: 'wrong' }, `${data.more_faults ? 'More than ' : ''}${data.faults.length} fault${data.faults.length === 1 ? '' : 's'}; training refuses the file until they are corrected. The lines are left out below.`),
        make('pre', { class: 'log', tabindex: 0 }, data.faults.join('\n'))] : null);
  }
  page.add('samples', 'Samples', make('p', { class: 'soft' }, 'As the model sees them.'), legend(), data.samples.map(sample));
  page.add('sizes', 'Lengths and sizes', make('p', { class: 'soft small' }, `Measured on ${figure(data.measured)} records.`),
    make('div', { class: 'charts' }, data.histograms.map((h) => fill(h.edges ? histogram(h.title, h.edges, h.counts, h.unit) : make('div', { class: 'chart' }, make('h3', {}, h.title)), {}, [make('p', { class: 'soft small' }, h.told)])),
      data.crops.length ? make('div', {}, make('h3', {}, 'Crops of a page, rows × columns'), counted(data.crops)) : null));
  page.add('answers', 'Answers and classes',
    make('p', { class: 'soft small' }, `${figure(data.answer_count)} answers, ${figure(data.distinct_answers)} of them distinct${data.distinct_answers > data.answers.length ? `; the ${data.answers.length} most frequent` : ''}.`),
    make('div', { class: 'columns' }, make('div', {}, counted(data.answers, data.answer_count)),
      make('div', {}, make('h3', {}, 'Sources'), counted(data.sources),
        make('h3', { css: { 'margin-top': '1.2rem' } }, 'Images of a record'), counted(data.images_of_records),
        make('h3', { css: { 'margin-top': '1.2rem' } }, 'Turns of a record'), counted(data.turns_of_records))));
  page.body.append(make('footer', {}, `Written by phi3v ${data.version}. This file holds everything it shows and loads nothing.`));
  document.documentElement.dataset.ready = 'true';
})();

const counted = (entries, total) => bars(entries.map(([label, count]) => [shown(label), count, figure(count) + (total ? ` · ${percent(count / total)}` : '')]));

function legend() {
  return make('div', { class: 'legend' },
    make('span', { class: 'token' }, 'prompt, not supervised'), make('span', { class: 'token supervised' }, 'answer, supervised'),
    make('span', { class: 'token special' }, '<|special|>'), make('span', { class: 'token image' }, 'image'),
    make('span', {}, '⏎ is a line break; a token’s number is shown when it is pointed at.'));
}

function sample(record) {
  const head = make('h3', {}, make('span', { class: 'mono' }, record.id), make('span', { class: 'soft' }, ` · ${record.place}${record.source ? ` · ${record.source}` : ''}${record.longest ? ' · the longest measured' : ''}`));
  if (record.error) return make('article', { class: 'sample' }, head, make('pre', { class: 'log' }, record.error));
  return make('article', { class: 'sample' }, head,
    make('div', { class: 'sheets' }, record.images.map(sheet)),
    make('p', { class: 'soft small' }, `${figure(record.tokens)} tokens, ${figure(record.supervised)} of them supervised, ${figure(record.images.reduce((sum, p) => sum + p.tokens, 0))} of images`),
    make('div', { class: 'tokens', tabindex: 0, role: 'group', 'aria-label': `tokens of ${record.id}` }, record.pieces.map(token),
      record.pieces.reduce((sum, piece) => sum + piece[2], 0) < record.tokens ? ' …' : ''),
    record.judged.length ? make('dl', { class: 'judged' }, record.judged.map(judged)) : null);
}

function judged({ verdict, tokens, score, parts }) {
  const told = `${figure(tokens)} token${tokens === 1 ? '' : 's'}${score === null ? '' : ` · score ${figure(score)}`}`;
  return [make('dt', { class: verdict }, verdict, make('span', { class: 'soft small' }, ` · ${told}`)),
    make('dd', { class: verdict }, parts.map(([text, differs]) => (differs ? make('mark', {}, text) : text)))];
}

function token([text, bits, count, id]) {
  const kinds = [bits & SUPERVISED ? 'supervised' : '', bits & SPECIAL ? 'special' : '', bits & IMAGE ? 'image' : ''].filter(Boolean);
  const label = bits & IMAGE ? `${text}: ${count.toLocaleString('en')} tokens` : text.replaceAll('\n', '⏎');
  const span = make('span', { class: ['token', ...kinds].join(' '), title: bits & IMAGE ? `${count} × ${id}` : count === 1 ? `${id}` : `${id} and ${count - 1} more` }, label);
  return text.endsWith('\n') ? [span, make('br')] : span;
}

// The page cut into its crops, in reading order, and the global view beside it.
function sheet(image) {
  const width = Math.min(560, Math.max(150, 150 * image.columns));
  const grid = make('div', { class: 'cut', css: { 'grid-template-columns': `repeat(${image.columns}, 1fr)`, width: `${width}px`, 'max-width': '100%' } });
  const source = new Image();
  source.onload = () => {
    const w = source.naturalWidth / image.columns, h = source.naturalHeight / image.rows;
    grid.querySelectorAll('canvas').forEach((canvas, i) => {
      canvas.width = Math.round(w);
      canvas.height = Math.round(h);
      canvas.getContext('2d').drawImage(source, (i % image.columns) * w, Math.floor(i / image.columns) * h, w, h, 0, 0, canvas.width, canvas.height);
    });
  };
  for (let i = 0; i < image.rows * image.columns; i++) grid.append(make('div', { class: 'crop' }, make('canvas', { width: 10, height: 10 }), make('span', {}, i + 1)));
  source.src = 'data:image/webp;base64,' + image.page;
  const [w, h] = image.size, [rw, rh] = image.resized, crops = image.rows * image.columns;
  const padded = rw !== image.columns * 336 || rh !== image.rows * 336;
  return [
    make('figure', {}, grid, make('figcaption', {}, make('span', { class: 'mono' }, image.name), make('br'),
      `${w} × ${h} px, resized to ${rw} × ${rh}${padded ? `, padded to ${image.columns * 336} × ${image.rows * 336}` : ''}`, make('br'),
      `${image.rows} × ${image.columns} crop${crops === 1 ? '' : 's'} of 336 px and the global view: ${figure(image.tokens)} tokens`)),
    make('figure', {}, make('div', { class: 'cut', css: { width: '150px' } }, make('div', { class: 'crop' }, make('img', { src: 'data:image/webp;base64,' + image.view, alt: `global view of ${image.name}`, width: 150, height: 150 }))), make('figcaption', {}, 'global view, 336 × 336'))];
}
