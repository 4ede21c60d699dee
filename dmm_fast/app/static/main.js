// The page: what is shown, what is saved, and what keys and buttons do.

import { api } from './api.js';
import { Live } from './live.js';
import { Mask } from './mask.js';
import { Stage } from './stage.js';
import { Timeline } from './timeline.js';

const $ = (id) => document.getElementById(id);
const OPEN = 0, STALE = 2;
const KEPT = 24; // pictures

const app = {
  clip: null, folder: '', objects: [], colours: [], current: 0, frame: 0, about: null, mask: null, bitmap: null,
  tool: 'pick', size: 12, mode: 'give', overlay: true, running: false, saves: 0,
  rgb: (id) => app.colours[id] ?? [200, 200, 200],
  css: (id, alpha = 1) => `rgb(${app.rgb(id).join(' ')} / ${alpha})`,
  goto, stroke, giveProposal, addObject, pointed, zoomed, fail,
};
const pictures = new Map(); // 'frame width' -> ImageBitmap
let stage, timeline, target = 0, loading = null, shown = null;
let changes = 0, seen = 0; // of the frame that is shown: those heard of, and those loaded
const live = new Live({ enter, fail, note: (text) => toast(text, 'note') });

// ------------------------------------------------------------------------------------------------ frames

/** Show a frame; of many asked for at once only the last is loaded. */
function goto(frame, { byHand = false } = {}) {
  target = Math.min(app.clip.frames - 1, Math.max(0, frame));
  if (byHand) app.following = false;
  if (target !== app.frame) { app.frame = target; describeFrame(); timeline.redraw(); }
  loading ??= load().catch(fail).finally(() => { loading = null; });
  return loading;
}

async function load() {
  while (shown !== target || seen !== changes) {
    const frame = target, { clip } = app, sent = saving, version = changes;
    const held = () => stage.busy && (shown === frame || app.following); // by a stroke in hand, unless someone leaves the frame
    if (held()) { await new Promise(requestAnimationFrame); continue; }
    await sent; // what is painted goes first
    const [bitmap, { about, runs }] = await Promise.all([picture(frame, 1280), api.mask(frame)]);
    if (clip !== app.clip || sent !== saving || held()) continue;
    stage.dropStroke();
    const kept = failed.get(frame);
    app.bitmap = bitmap;
    app.about = kept ? { ...about, given: kept.given, ends: kept.ends } : about;
    app.mask.load(kept?.runs ?? runs);
    shown = frame;
    seen = version;
    if (stage.of !== frame) stage.show(null);
    describeFrame();
    stage.redraw();
  }
  settle();
}

function reload() { changes++; return goto(app.frame); }

/** From the server, or from those used lately. */
async function picture(frame, width) {
  const key = `${frame} ${width}`, { clip } = app, bitmap = pictures.get(key) ?? await api.picture(frame, width);
  if (clip !== app.clip) return bitmap;
  pictures.delete(key);
  pictures.set(key, bitmap); // the newest is last
  if (pictures.size > KEPT) forget(pictures.keys().next().value);
  return bitmap;
}

function forget(key) {
  const bitmap = pictures.get(key);
  pictures.delete(key);
  if (bitmap !== app.bitmap) bitmap.close(); // a large one would else stay until the next garbage collection
}

/** When a frame has stayed for a moment: a sharper picture if the view shows more, and its proposals. */
function settle() {
  clearTimeout(settle.timer);
  settle.timer = setTimeout(async () => {
    const frame = shown, { clip } = app, wanted = stage.scale * clip.width * (devicePixelRatio || 1);
    const still = () => shown === frame && clip === app.clip;
    if (frame === null) return; // it is being loaded, and settles then
    try {
      if (app.bitmap.width < app.clip.width && wanted > 1.2 * app.bitmap.width) {
        const bitmap = await picture(frame, wanted > 2560 ? 0 : 2560);
        if (still()) { app.bitmap = bitmap; stage.redraw(); }
      }
      if (app.tool === 'pick' && !app.running && !playing && stage.of !== frame) {
        hint('Looking for objects…');
        const found = await api.proposals(frame);
        if (still()) { stage.show(found, frame); document.body.dataset.proposals = frame; }
      }
    } catch (error) { if (clip === app.clip && !live.watching) fail(error); }
  }, 180);
}

function zoomed() {
  $('zoom-value').textContent = `${Math.round(stage.scale * 100)} %`;
  if (shown !== null) settle();
}

// -------------------------------------------------------------------------------- strokes, undo, saving

const history = { done: [], undone: [] };
const failed = new Map(); // frame -> what could not be saved of it, to be tried again
let saving = Promise.resolve(), unsaved = 0;

/** Something was painted over `before` within `rect`. */
function stroke(before, rect) {
  const change = app.mask.change(before, rect);
  app.mask.draw(rect);
  if (!change || shown === null) return;
  const was = { given: app.about.given, ends: app.about.ends };
  const given = new Set(was.given), ends = new Set(was.ends);
  for (const id of change.labels) {
    if (app.mask.has(id)) { given.add(id); ends.delete(id); }
    else { given.delete(id); if (app.about.status !== OPEN) ends.add(id); }
  }
  commit({ frame: shown, ...change, was, is: { given: [...given], ends: [...ends] } });
}

function commit(entry) {
  history.done.push(entry);
  if (history.done.length > 200) history.done.shift();
  history.undone = [];
  save(entry.is);
}

function save({ given, ends }) {
  if (app.following) goto(shown, { byHand: true }); // this stops the run, and the page stays here
  app.about = { ...app.about, given, ends };
  send(shown, { runs: app.mask.runs(), given, ends });
  describeFrame();
  describeButtons();
}

function send(frame, painted) {
  const { opened } = api, { folder } = app;
  unsaved++;
  describeSaved();
  saving = saving.then(() => api.paint(frame, painted, opened)).then(
    (about) => {
      failed.delete(frame);
      if (shown === frame && unsaved === 1) app.about = about;
    },
    (error) => {
      const final = [400, 404, 413].includes(error.status); // it would be refused again
      if (final || !failed.has(frame)) fail(new Error(`Not saved: ${error.message}`)); // once, not at each try
      if (final) { failed.delete(frame); if (shown === frame) reload(); } else if (folder === app.folder) failed.set(frame, painted);
    },
  ).finally(() => {
    unsaved--;
    app.saves++;
    describeSaved();
    if (!unsaved) { describeFrame(); describeButtons(); }
  });
}

/** What could not be saved is sent again, once nothing newer is on its way. A run, which that would stop, ends first. */
function sendAgain() { if (!unsaved && !app.running) for (const [frame, painted] of failed) send(frame, painted); }

function describeSaved() {
  const text = failed.size ? 'Not saved' : unsaved ? 'Saving…' : 'Saved';
  if ($('saved').textContent !== text) $('saved').textContent = text;
  $('saved').classList.toggle('failed', failed.size > 0);
}

/** One after the other, since each may have to show another frame first. */
let turning = Promise.resolve();
function turnBack(from, to, side, other, state) {
  turning = turning.then(async () => {
    if (stage.busy) { stage.dropStroke(); return; }
    const entry = history[from].at(-1);
    if (!entry) return;
    if (shown !== entry.frame || seen !== changes) await goto(entry.frame, { byHand: true });
    if (shown !== entry.frame || entry !== history[from].at(-1)) return; // someone went on
    history[from].pop();
    history[to].push(entry);
    app.mask.paste(entry[side], entry[other], entry.rect);
    stage.redraw();
    save(entry[state]);
  }).catch(fail);
}
const undo = () => turnBack('done', 'undone', 'before', 'after', 'was');
const redo = () => turnBack('undone', 'done', 'after', 'before', 'is');

async function giveProposal(number, how) {
  const frame = shown, runs = await api.proposal(frame, number);
  if (!app.current) await addObject();
  if (shown !== frame) return;
  const before = app.mask.ids.slice(), take = how === 'take';
  if (how === 'replace') app.mask.erase(app.current);
  const rect = app.mask.stamp(runs, take ? 0 : app.current, take ? app.current : -1);
  stroke(before, rect);
  stage.redraw();
}

function endHere() {
  if (!app.current || shown === null) return;
  const before = app.mask.ids.slice(), rect = app.mask.erase(app.current);
  const was = { given: app.about.given, ends: app.about.ends };
  const is = { given: was.given.filter((id) => id !== app.current), ends: [...new Set([...was.ends, app.current])] };
  const change = app.mask.change(before, rect) ?? { rect: [0, 0, 1, 1], before: before.slice(0, 1), after: before.slice(0, 1) };
  app.mask.draw();
  commit({ frame: shown, ...change, was, is });
  stage.redraw();
}

function ungive() {
  const was = { given: app.about.given, ends: app.about.ends }, pixel = app.mask.ids.slice(0, 1);
  commit({ frame: shown, rect: [0, 0, 1, 1], before: pixel, after: pixel, was, is: { given: [], ends: [] } });
}

// ----------------------------------------------------------------------------------------------- objects

async function addObject() {
  try {
    const { id, name } = await api.addObject();
    app.objects = [...app.objects.filter((o) => o.id !== id), { id, name }].sort((a, b) => a.id - b.id);
    timeline.timeline.scores[id] ??= new Array(timeline.timeline.status.length).fill(null);
    choose(id);
  } catch (error) { fail(error); }
}

function choose(id) {
  app.current = id;
  describeObjects();
  timeline.redraw();
  stage.choose();
  describeTool();
}

async function removeObject(id) {
  const { name } = app.objects.find((object) => object.id === id);
  $('confirm-text').textContent = `Remove ${name} from every frame? Its masks and results go; this cannot be undone.`;
  $('confirm').returnValue = ''; // or an earlier answer would hold where this dialog is only closed
  $('confirm').showModal();
  await new Promise((resolve) => $('confirm').addEventListener('close', resolve, { once: true }));
  if ($('confirm').returnValue !== 'yes') return;
  try {
    sendAgain();
    await saving;
    await api.remove(id);
    history.done = [];
    history.undone = [];
    await reload();
  } catch (error) { fail(error); }
}

function rename(id) {
  const box = document.querySelector(`#objects li[data-id="${id}"] .name`);
  if (!box) return;
  box.readOnly = false;
  box.focus();
  box.select();
}

/** A line for each object, made once: a focus, a click that has begun and a name that is being written outlast what a run tells. */
function describeObjects() {
  const list = $('objects'), { about } = app;
  for (const item of [...list.children]) if (!app.objects.some(({ id }) => id === +item.dataset.id)) item.remove();
  app.objects.forEach(({ id, name }, k) => { // in the order of their ids, as the lines are
    const old = list.children[k], item = +old?.dataset.id === id ? old : list.insertBefore(objectLine(id), old ?? null);
    item.setAttribute('aria-current', id === app.current);
    const box = item.querySelector('.name'), score = item.querySelector('.score'), entry = about?.objects.find((object) => object.id === id);
    box.setAttribute('aria-label', `Object ${id}, ${name}`);
    if (box.readOnly) box.value = name;
    score.textContent = about?.ends.includes(id) ? 'ends' : about?.given.includes(id) ? 'given' : entry?.lost ? 'lost' : entry?.score?.toFixed(2) ?? '';
    score.classList.toggle('lost', score.textContent === 'lost');
  });
  for (const act of ['rename', 'end', 'remove']) $(act).disabled = !app.current;
}

function objectLine(id) {
  const item = document.createElement('li'), name = () => app.objects.find((object) => object.id === id)?.name;
  item.dataset.id = id;
  item.innerHTML = '<span class="dot"></span><input class="name" readonly maxlength="60"><span class="score"></span>';
  item.querySelector('.dot').style.background = app.css(id);
  item.onclick = () => choose(id);
  const box = item.querySelector('.name');
  box.ondblclick = () => rename(id);
  box.onfocus = () => { if (app.current !== id && box.readOnly) choose(id); };
  box.onblur = async () => {
    if (box.readOnly) return;
    box.readOnly = true;
    try { if (box.value.trim() !== name()) app.objects = (await api.rename(id, box.value)).objects; } catch (error) { fail(error); }
    describeObjects();
  };
  box.onkeydown = (event) => {
    if (box.readOnly) return;
    if (event.key === 'Escape') box.value = name();
    if (event.key === 'Enter' || event.key === 'Escape') stage.canvas.focus(); // which ends it
    event.stopPropagation();
  };
  return item;
}

// ---------------------------------------------------------------------------------------------- describing

function describeFrame() {
  const { about, clip, frame } = app, here = about?.frame === frame ? about : null;
  if (document.activeElement !== $('jump')) $('jump').value = frame + 1;
  $('count').textContent = `of ${clip.frames}${clip.fps ? `  ·  ${clock(frame / clip.fps)}` : ''}`;
  const given = here?.given.length || here?.ends.length, status = here?.status;
  $('frame-status').className = `chip ${given ? 'given' : status === STALE ? 'stale' : ''}`;
  $('frame-status').textContent = !here ? '…' : given ? 'given' : status === STALE ? 'to follow again' : status === OPEN ? 'not run yet' : 'followed';
  $('frame-text').textContent = !here ? '' : given
    ? 'Your masks hold here; the run follows on from them.'
    : status === STALE ? 'A correction has not reached this frame yet. Run follows it again.'
      : status === OPEN ? 'Paint an object here, or run.' : 'Paint here to correct it, then run to follow on from here.';
  $('ungive').disabled = !given;
  const any = Object.keys(timeline.timeline.given).length || given;
  $('empty').hidden = Boolean(any);
  document.body.dataset.shown = here ? frame : '';
  describeObjects();
}

function describeButtons() {
  $('undo').disabled = !history.done.length;
  $('redo').disabled = !history.undone.length;
  const waiting = timeline.timeline.status.some((status) => status !== 1);
  const some = Object.keys(timeline.timeline.given).length || app.about?.given.length;
  if (live.phase) { live.describe(Boolean(app.about ? app.about.given.length : some)); return; }
  $('run').textContent = app.running ? 'Stop' : waiting && timeline.timeline.status.some((s) => s !== OPEN) ? 'Run on' : 'Run';
  $('run').classList.toggle('busy', app.running);
  $('run').disabled = !app.running && (!some || !waiting);
  $('run').title = app.running ? 'Stop (R)' : !some ? 'Give an object its mask first' : !waiting ? 'Every frame is done' : 'Follow the objects (R)';
}

function describeTool() {
  for (const button of document.querySelectorAll('[data-tool]')) button.setAttribute('aria-pressed', button.dataset.tool === app.tool);
  const painting = app.tool === 'brush' || app.tool === 'eraser';
  $('size-box').hidden = !painting;
  $('mode-box').hidden = app.tool === 'eraser' || app.tool === 'hand';
  $('replace').hidden = app.tool !== 'pick';
  if (app.mode === 'replace' && app.tool !== 'pick') mode('give');
  $('give').textContent = app.tool === 'pick' ? 'Give' : 'Add';
  stage.canvas.style.cursor = { pick: 'pointer', hand: 'grab', polygon: 'crosshair' }[app.tool] ?? 'none';
  pointed(null);
}

function pointed(found) {
  const name = app.objects.find((object) => object.id === app.current)?.name ?? 'a new object';
  if (app.tool === 'pick') {
    if (found) hint(found.count > 1 ? `<b>${found.place} of ${found.count}</b> here · wheel or Tab for the next` : '<b>Click</b> to give it', name);
    else hint(stage.items.length ? 'Point at something' : app.running ? 'The run goes on' : 'Looking for objects…', name);
  } else hint({ brush: 'Paints', eraser: 'Erases', polygon: 'Outlines', hand: 'Drag to move the view' }[app.tool], app.tool === 'hand' ? '' : name);
}

function hint(text, name = '') {
  $('hint').innerHTML = text;
  if (name) {
    const bold = document.createElement('b');
    bold.textContent = name;
    $('hint').append(' · ', bold);
  }
}

function describeRun(run) {
  app.running = run.running;
  $('progress').hidden = !run.running && !run.message;
  const { frames } = app.clip;
  $('progress-bar').max = frames;
  $('progress-bar').value = run.done;
  const speed = run.running && run.fps ? `${run.fps.toFixed(run.fps < 10 ? 1 : 0)} FPS · ${clock(run.left)} left` : '';
  const counted = `${run.done} of ${frames}`;
  $('progress-text').textContent = run.running ? [speed ? counted : '', run.message === 'following' ? '' : run.message, speed].filter(Boolean).join(' · ')
    : run.message === 'done' ? `All ${frames} frames done` : `${counted} frames done`;
  document.body.dataset.run = run.running ? 'running' : run.message;
  if (run.error) fail(new Error(run.error));
  describeButtons();
}

const clock = (seconds) => {
  const whole = Math.ceil(seconds), parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return (parts[0] ? parts : parts.slice(1)).map((part, k) => (k ? String(part).padStart(2, '0') : part)).join(':');
};

function toast(text, kind = '') {
  const line = document.createElement('div');
  line.textContent = text;
  line.className = kind;
  $('toasts').append(line);
  setTimeout(() => line.remove(), 8000);
}
function fail(error) { console.error(error); toast(error.message); }

// ------------------------------------------------------------------------------------------------- the run

async function run() {
  try {
    sendAgain();
    await saving;
    if (live.phase) await live.go();
    else if (app.running) await api.stop();
    else {
      app.following = $('along').checked;
      await api.run();
    }
  } catch (error) { fail(error); }
}

function hear(event) {
  if (event.kind === 'live') live.hear(event);
  else if (live.watching || !app.clip) return;
  else if (event.kind === 'run') {
    const ended = app.running && !event.running;
    describeRun(event);
    if (ended) { refresh(); settle(); }
  } else if (event.kind === 'frame') {
    timeline.record(event.frame, event.objects);
    if (event.frame === shown) changes++;
    if (app.following && !stage.busy) goto(event.frame); else if (seen !== changes) goto(app.frame);
  } else if (event.kind === 'objects' || event.kind === 'changed') {
    if (event.objects) {
      app.objects = event.objects;
      if (!app.objects.some((object) => object.id === app.current)) app.current = app.objects[0]?.id ?? 0;
    }
    timeline.timeline = event.timeline;
    if (event.kind === 'changed' && event.by !== api.page) changes++;
    goto(app.frame);
    describeFrame();
    describeButtons();
    timeline.redraw();
  } else if (event.kind === 'export') exported(event);
}

async function refresh() {
  const state = await api.state();
  timeline.timeline = state.timeline;
  timeline.redraw();
  describeButtons();
  return state;
}

// ------------------------------------------------------------------------------------------------- playing

let playing = null;
function play() {
  if (playing) { clearInterval(playing); playing = null; settle(); } else {
    if (app.frame === app.clip.frames - 1) goto(0, { byHand: true });
    app.following = false;
    playing = setInterval(() => {
      if (loading) return;
      if (app.frame >= app.clip.frames - 1) play(); else goto(app.frame + 1);
    }, 1000 / Math.min(30, app.clip.fps || 24));
  }
  $('play').querySelector('path').setAttribute('d', playing ? 'M6 4h3v12H6zM11 4h3v12h-3z' : 'M6 4v12l10-6z');
  $('play').setAttribute('aria-label', playing ? 'Pause' : 'Play');
}

const step = (by) => goto(app.frame + by, { byHand: true });

function jumpTo(frames, back = false) {
  const sorted = [...new Set(frames)].sort((a, b) => a - b);
  const found = back ? sorted.filter((f) => f < app.frame).pop() : sorted.find((f) => f > app.frame);
  if (found !== undefined) goto(found, { byHand: true });
}
const givenFrames = () => [...Object.keys(timeline.timeline.given), ...Object.keys(timeline.timeline.ends)].map(Number);

// ------------------------------------------------------------------------------------------------- exports

let making = null; // what was told last of the export that is under way

/** made: whether masks have changed since, of each kind that was exported. */
function drawExports(made) {
  for (const item of document.querySelectorAll('#exports li')) {
    const { kind } = item.dataset, box = document.createElement('div'), button = document.createElement('button');
    box.className = 'do';
    button.textContent = 'Export';
    button.onclick = async () => {
      try { await saving; await api.export(kind); } catch (error) { fail(error); }
    };
    if (kind in made) box.append(download(kind, made[kind]));
    box.append(button);
    item.querySelector('.do')?.remove();
    item.append(box);
  }
  if (making) exported(making);
  const left = timeline.timeline.status.filter((status) => status !== 1).length;
  $('exports-note').textContent = left ? 'Some frames have not been run, or are to be followed again: they are exported as they are now.' : '';
}

function download(kind, outdated = false) {
  const link = document.createElement('a');
  Object.assign(link, { href: api.exported(kind), textContent: `Download${outdated ? ' (before the last change)' : ''}`, download: '' });
  return link;
}

function exported(event) {
  making = event.ready || event.error ? null : event;
  const box = document.querySelector(`#exports li[data-kind="${event.name}"] .do`);
  if (!box) return;
  const button = box.querySelector('button');
  button.disabled = Boolean(making);
  button.textContent = making ? `${Math.round((100 * event.done) / event.of)} %` : 'Export';
  if (event.error) fail(new Error(event.error));
  if (!event.ready) return;
  box.querySelector('a')?.remove();
  box.prepend(download(event.name));
}

async function openExports() {
  drawExports((await refresh()).exports);
  $('exports').showModal();
}

// ---------------------------------------------------------------------------------------- keys and buttons

function tool(name) {
  stage.dropStroke();
  app.tool = name;
  describeTool();
  if (name === 'pick') settle();
  stage.redraw();
}

function resize(size) {
  app.size = Math.min(120, Math.max(1, Math.round(size)));
  $('size').value = app.size;
  $('size-value').textContent = `${app.size} px`;
  stage.redraw();
}

function strength(value) {
  $('strength').value = value;
  $('strength-value').textContent = `${value} %`;
  app.overlay = value > 0;
  app.mask.colour(app.colours, value / 100);
  stage.redraw();
}

function mode(name) {
  app.mode = name;
  for (const each of ['give', 'take', 'replace']) $(each).setAttribute('aria-pressed', each === name);
}

const KEYS = {
  v: () => tool('pick'), b: () => tool('brush'), e: () => tool('eraser'), p: () => tool('polygon'), h: () => tool('hand'),
  g: () => stage.give(), G: () => stage.give('take'), c: () => stage.give('replace'), n: () => addObject(), x: () => endHere(), r: run, f: () => stage.fit(),
  o: () => { app.overlay = !app.overlay; stage.redraw(); }, l: () => jumpTo(timeline.timeline.lost), '?': () => $('help').showModal(),
  '[': () => resize(app.size / 1.25 - 0.5), ']': () => resize(app.size * 1.25 + 0.5), '+': () => stage.zoom(1.25), '=': () => stage.zoom(1.25),
  '-': () => stage.zoom(0.8), ' ': play, ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => step(-Infinity), End: () => step(Infinity),
  ArrowUp: () => jumpTo(givenFrames(), true), ArrowDown: () => jumpTo(givenFrames()), F2: () => rename(app.current),
  Delete: () => app.current && removeObject(app.current), Escape: () => stage.dropStroke(),
  Enter: () => (stage.points.length ? stage.closePolygon() : document.activeElement === stage.canvas && stage.give()),
  Backspace: () => { stage.points.pop(); stage.redraw(); }, t: () => live.turn(),
};
const LIVE_KEYS = { r: KEYS.r, t: KEYS.t, '?': KEYS['?'] };

function key(event) {
  const { target: at } = event;
  if (!(app.clip || live.watching) || document.querySelector('dialog[open]') || at.matches('input:not([type=range]):not([type=checkbox]):not([readonly])')) return;
  const control = event.ctrlKey || event.metaKey;
  if (live.watching) { if (!control && !event.altKey) LIVE_KEYS[event.key.toLowerCase()]?.(); return; }
  if (control && event.key.toLowerCase() === 'z') { event.preventDefault(); (event.shiftKey ? redo : undo)(); return; }
  if (control && event.key.toLowerCase() === 'y') { event.preventDefault(); redo(); return; }
  if (control || event.altKey) return;
  if (event.key === 'Tab') {
    if (at === stage.canvas && app.tool === 'pick' && stage.items.length && stage.choose(event.shiftKey ? -1 : 1)) event.preventDefault();
    return;
  }
  if ((event.key === 'Enter' || event.key === ' ') && at.matches('button, summary, a, input[type=checkbox]')) return;
  if (at.matches('input[type=range]') && /^(Arrow|Home|End)/.test(event.key)) return;
  if (/^[1-9]$/.test(event.key)) {
    const object = app.objects[event.key - 1];
    if (object) choose(object.id);
    return;
  }
  if (event.shiftKey && /^Arrow(Left|Right)$/.test(event.key)) { event.preventDefault(); step(event.key === 'ArrowLeft' ? -10 : 10); return; }
  const act = KEYS[event.key] ?? (event.shiftKey ? null : KEYS[event.key.toLowerCase()]);
  if (act) { event.preventDefault(); act(); }
}

function wire() {
  for (const button of document.querySelectorAll('[data-tool]')) button.onclick = () => tool(button.dataset.tool);
  const on = { undo, redo, run, add: addObject, rename: () => rename(app.current), end: endHere, remove: () => removeObject(app.current),
    ungive, play, previous: () => step(-1), next: () => step(1), give: () => mode('give'),
    take: () => mode('take'), replace: () => mode('replace'), fit: () => stage.fit(), 'zoom-in': () => stage.zoom(1.25), 'zoom-out': () => stage.zoom(0.8),
    'help-open': () => $('help').showModal(), 'export-open': openExports };
  for (const [id, act] of Object.entries(on)) $(id).onclick = act;
  for (const dialog of document.querySelectorAll('dialog')) {
    dialog.querySelector('.close')?.addEventListener('click', () => dialog.close());
    dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });
  }
  $('size').oninput = () => resize(+$('size').value);
  $('strength').oninput = () => strength(+$('strength').value);
  $('along').onchange = () => { app.following = $('along').checked && app.running; };
  $('jump').onchange = () => { const frame = parseInt($('jump').value, 10); if (frame) goto(frame - 1, { byHand: true }); $('jump').blur(); describeFrame(); };
  $('choose').onclick = () => $('file').click();
  $('file').onchange = () => upload($('file').files[0]);
  for (const name of ['dragover', 'dragleave', 'drop']) {
    addEventListener(name, (event) => {
      event.preventDefault(); // or the browser would show the file in place of this page
      $('drop').classList.toggle('over', name === 'dragover');
      if (name === 'drop' && !$('welcome').hidden) upload(event.dataTransfer.files[0]);
    });
  }
  addEventListener('keydown', key);
  addEventListener('beforeunload', (event) => { if (unsaved || failed.size) event.preventDefault(); });
  addEventListener('online', sendAgain);
  setInterval(sendAgain, 5000);
}

// -------------------------------------------------------------------------------------------------- opening

async function upload(file) {
  if (!file) return;
  if (file.size > app.limit) { fail(new Error(`${file.name} is larger than the limit; start dmm-fast app with its path instead.`)); return; }
  try {
    await api.upload(file, (part) => { $('upload-text').textContent = `${file.name}: ${Math.round(100 * part)} %`; });
    await enter();
  } catch (error) { $('upload-text').textContent = ''; fail(error); }
}

/** A clip's own: what was shown, painted or undone before belongs to another. */
async function open(state) {
  const { clip, folder } = state;
  if (live.phase || folder !== app.folder) failed.clear();
  stage.dropStroke();
  api.opened = clip.opened;
  app.following = false;
  making = null;
  Object.assign(app, { clip, folder, objects: state.objects, colours: state.colours, current: state.objects[0]?.id ?? 0, frame: 0, about: null, bitmap: null });
  Object.assign(history, { done: [], undone: [] });
  for (const key of [...pictures.keys()]) forget(key);
  shown = null;
  document.body.dataset.shown = document.body.dataset.proposals = '';
  stage.show(null);
  $('clip-facts').textContent = `${clip.width} × ${clip.height} · ${live.phase ? 'the frame that was taken' : `${clip.frames} frames`}${clip.fps ? ` · ${+clip.fps.toFixed(2)} FPS` : ''}`;
  app.mask = new Mask(clip.width, clip.height);
  timeline.timeline = state.timeline;
  strength(+$('strength').value);
  resize(Math.max(4, Math.round(Math.min(clip.width, clip.height) / 24)));
  describeRun(state.run);
  describeTool();
  const first = Object.keys(state.timeline.given).map(Number)[0] ?? 0;
  await goto(first);
  stage.fit();
  describeButtons();
  describeSaved();
  sendAgain();
}

/** Show what the server has: a live source, a clip, or the choice of one. */
let entering = Promise.resolve();
function enter() {
  entering = entering.then(async () => {
    await saving;
    const state = await api.state(), named = state.live?.source ?? state.clip?.name ?? 'dmm-fast';
    app.colours = state.colours ?? [];
    live.set(state.live, state.objects, app.css);
    document.title = state.clip || state.live ? `${named} · dmm-fast` : named;
    $('clip-name').textContent = named;
    $('clip-name').title = state.folder ?? '';
    $('then').textContent = live.phase ? 'follow live' : 'run';
    $('studio').hidden = live.watching || !state.clip;
    $('welcome').hidden = Boolean(state.clip || state.live);
    document.querySelector('.actions').hidden = !$('welcome').hidden;
    app.limit = state.limit;
    if (live.watching) $('clip-facts').textContent = '';
    else if (state.clip) await open(state);
    return state;
  }).catch(fail);
  return entering;
}

async function begin() {
  if (location.search.includes('token=')) window.history.replaceState(null, '', '/'); // kept by the cookie from here on
  stage = new Stage($('stage'), app);
  timeline = new Timeline($('timeline'), app);
  wire();
  Object.assign(window, { studio: app, stageView: () => stage }); // for the console, and tests
  let moving = null;
  api.moved = () => { moving ??= enter().finally(() => { moving = null; }); }; // once for all that notice it
  const state = await enter();
  let away = false;
  if (state) api.listen(state.seq, hear, async (lost) => {
    if (lost && !away) toast('The connection to the server is lost; trying again.', 'note');
    if (!lost && away) {
      const now = await api.state();
      if (live.phase || now.live || !app.clip || now.clip?.opened !== app.clip.opened) api.moved();
      else { hear({ ...now, kind: 'objects' }); describeRun(now.run); reload(); }
    }
    away = lost;
  });
}

begin();
