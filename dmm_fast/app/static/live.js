// A camera or a stream: its newest picture, what is known of it, and the steps: take a frame, follow live, stop.

import { api } from './api.js';

const $ = (id) => document.getElementById(id);
const WIDTHS = [320, 1280, 2560]; // of pictures, as the server makes them; 0 is the frame's own
const PAUSE = 40; // milliseconds between pictures, at least

export class Live {
  /** page: {enter, fail, note} of the page. */
  constructor(page) {
    Object.assign(this, { page, state: null, objects: [], some: false, going: false });
    $('live-connect').onclick = () => this.act('connect');
    $('live-back').onclick = () => this.act('back');
  }

  /** 'watching', 'taken', 'following', or '' where the clip is an ordinary one. */
  get phase() { return this.state?.phase ?? ''; }
  get watching() { return this.phase === 'watching' || this.phase === 'following'; }

  set(state, objects, css) {
    Object.assign(this, { state, objects: objects ?? [], css });
    document.body.dataset.live = this.phase;
    $('live').hidden = !this.watching;
    $('live-bar').hidden = !state;
    if (!state) return;
    this.describe();
    if (this.watching) this.watch();
  }

  hear(event) {
    if (event.phase === this.phase) { this.state = event; this.describe(); return; }
    if (this.phase === 'following') this.page.note(this.summary(event));
    this.page.enter();
  }

  summary({ ended, phase, frames, dropped }) {
    const end = ended ? `${sentence(ended)}.` : 'Stopped.';
    return phase === 'done' ? `${end} ${frames + 1} frames are recorded, ${dropped} were dropped.` : `${end} Nothing was recorded.`;
  }

  // ------------------------------------------------------------------------------------------------ steps

  async act(action, body) {
    if (this.acting) return;
    this.acting = true;
    this.describe();
    try { await api.live(action, body); } catch (error) { this.page.fail(error); }
    this.acting = false;
    this.describe();
  }

  /** What the button in the header does. */
  go() {
    if ($('run').disabled) return null;
    if (this.phase === 'taken') return this.act('follow', { record: $('live-record').checked });
    return this.act(this.phase === 'following' ? 'stop' : 'take');
  }

  /** Take a frame, or throw it away. */
  turn() {
    if (this.phase === 'watching') return this.go();
    return this.phase === 'taken' && !$('live-back').disabled ? this.act('back') : null;
  }

  // --------------------------------------------------------------------------------------------- pictures

  /** One request after the other, while anyone looks. */
  async watch() {
    if (this.going) return;
    this.going = true;
    const canvas = $('live-picture'), context = canvas.getContext('2d');
    let after = 0;
    while (this.watching) {
      if (document.hidden) await new Promise((resolve) => document.addEventListener('visibilitychange', resolve, { once: true }));
      const wanted = Math.min(canvas.clientWidth * (devicePixelRatio || 1), this.state.size[1]);
      try {
        const { state, bitmap } = await api.livePicture(after, WIDTHS.find((width) => width >= wanted) ?? 0);
        if (state.phase === this.phase) { this.state = state; this.describe(); }
        if (bitmap) {
          after = state.number;
          if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
          context.drawImage(bitmap, 0, 0);
          bitmap.close();
          document.body.dataset.picture = after;
        }
      } catch { await pause(1000); } // the feed of events says that the server has gone
      await pause(PAUSE);
    }
    this.going = false;
  }

  // ------------------------------------------------------------------------------------------- describing

  /** some: whether the frame that was taken has masks. */
  describe(some = this.some) {
    const { phase, state } = this, run = $('run');
    this.some = some;
    if (!state) return;
    const { ended } = state, busy = Boolean(this.acting);
    run.textContent = { watching: 'Take this frame', taken: 'Follow live', following: 'Stop' }[phase];
    run.title = { watching: 'Freeze this frame, to give objects their masks (T)', following: 'Stop (R)',
      taken: ended ? 'The source has ended' : some ? 'Follow the objects from this frame on (R)' : 'Give an object its mask first' }[phase];
    run.disabled = busy || (phase === 'following' ? false : Boolean(ended) || (phase === 'watching' ? !state.fps : !some));
    run.classList.toggle('busy', phase === 'following');
    for (const id of ['live-back', 'live-record-box']) $(id).hidden = phase !== 'taken';
    $('live-back').disabled = busy || some;
    $('live-back').title = some ? 'This frame has masks; undo them first' : 'Throw this frame away (T)';
    $('live-connect').hidden = !ended || phase === 'following';
    $('live-connect').disabled = busy;
    say('live-text', sentence(ended));
    if (this.watching) this.describePicture();
  }

  describePicture() {
    const { state, phase } = this, { size, fps, latency, mean, frames, dropped, ended, message } = state;
    const ms = (seconds) => `${Math.round(1000 * seconds)} ms`;
    $('live-dot').className = ended ? 'ended' : '';
    say('live-state', ended ? 'Not connected' : phase === 'following' ? message || 'Following' : 'Live');
    const facts = phase === 'watching' ? [`${size[1]} × ${size[0]}`, !ended && fps ? `${fps.toFixed(fps < 10 ? 1 : 0)} FPS` : '']
      : latency === null ? [] : [fps ? `${fps.toFixed(1)} FPS` : '', `latency ${ms(latency)}, on average ${ms(mean)}`, `${dropped} dropped`,
        state.record ? `${frames + 1} frames recorded` : 'not recorded'];
    say('live-facts', facts.filter(Boolean).join(' · '));
    const lost = phase === 'following' ? state.lost : [], key = phase === 'following' ? JSON.stringify([lost, this.objects]) : '';
    if (key === this.key) return;
    this.key = key;
    $('live-objects').replaceChildren(...(key ? this.objects : []).map(({ id, name }) => {
      const item = document.createElement('li');
      item.innerHTML = '<i></i><span></span>';
      item.querySelector('i').style.background = this.css(id);
      item.querySelector('span').textContent = `${id} · ${name}`;
      if (lost.includes(id)) { item.className = 'lost'; item.append(Object.assign(document.createElement('b'), { textContent: 'lost' })); }
      return item;
    }));
  }
}

const sentence = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);
const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

function say(id, text) { // what has not changed is not written, or a screen reader would say it again
  if ($(id).textContent !== text) $(id).textContent = text;
}
