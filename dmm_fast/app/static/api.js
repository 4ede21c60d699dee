// Talking to the server: errors become exceptions with its own words, and a feed of events.

const page = Math.random().toString(36).slice(2, 10); // tells this page's own changes from another's

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error('The server does not answer. Start dmm-fast app again, and open the address that it prints.');
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(told.error || `${answer.status} ${answer.statusText}`), { status: answer.status });
  }
  return answer;
}

const json = async (path, options) => (await ask(path, options)).json();
const send = (method, path, body) =>
  json(path, { method, body: body === undefined ? undefined : JSON.stringify(body), headers: { 'Content-Type': 'application/json' } });

let opened = ''; // tells the pictures of what is open from those that the browser has kept of another clip

export const api = {
  page,
  async state() {
    const state = await json('/api/state');
    opened = state.clip?.opened ?? '';
    return state;
  },
  picture: async (frame, width) => createImageBitmap(await (await ask(`/api/frames/${frame}/picture?width=${width}&of=${opened}`)).blob()),
  async mask(frame) {
    const answer = await ask(`/api/frames/${frame}/mask`);
    return { about: JSON.parse(answer.headers.get('X-Frame')), runs: new Uint32Array(await answer.arrayBuffer()) };
  },
  paint: (frame, runs, given, ends) =>
    json(`/api/frames/${frame}/mask?given=${given}&ends=${ends}&by=${page}`, { method: 'PUT', body: runs }),
  proposals: (frame) => json(`/api/frames/${frame}/proposals`),
  proposal: async (frame, number) => new Uint32Array(await (await ask(`/api/frames/${frame}/proposals/${number}`)).arrayBuffer()),
  addObject: (name) => send('POST', '/api/objects', name ? { name } : {}),
  rename: (id, name) => send('PATCH', `/api/objects/${id}`, { name }),
  remove: (id) => send('DELETE', `/api/objects/${id}`),
  run: () => send('POST', '/api/run'),
  stop: () => send('POST', '/api/stop'),
  live: (action, body) => send('POST', `/api/live/${action}`, body),
  /** The next picture after number `after`, or null where none came within a second, and what is known of the source. */
  async livePicture(after, width) {
    const answer = await ask(`/api/live/picture?after=${after}&width=${width}`);
    return { state: JSON.parse(answer.headers.get('X-Live')), bitmap: answer.status === 204 ? null : await createImageBitmap(await answer.blob()) };
  },
  export: (kind) => send('POST', `/api/exports/${kind}`),
  upload(file, progress) { // fetch says nothing of how far an upload is
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open('POST', `/api/clip?name=${encodeURIComponent(file.name)}`);
      request.upload.onprogress = (event) => progress(event.loaded / file.size);
      request.onload = () => {
        if (request.status === 200) resolve();
        else {
          let told = request.statusText;
          try { told = JSON.parse(request.responseText).error; } catch { /* not from our server */ }
          reject(new Error(told));
        }
      };
      request.onerror = () => reject(new Error('The upload broke off.'));
      request.send(file);
    });
  },
  listen(since, hear, lost) {
    const source = new EventSource(`/api/events?since=${since}`);
    source.onmessage = (event) => hear(JSON.parse(event.data));
    source.onopen = () => lost(false);
    source.onerror = () => lost(true);
  },
};
