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
    if (answer.status === 410) api.moved();
    const told = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(told.error || `${answer.status} ${answer.statusText}`), { status: answer.status });
  }
  return answer;
}

const json = async (path, options) => (await ask(path, options)).json();
const send = (method, path, body) =>
  json(path, { method, body: body === undefined ? undefined : JSON.stringify(body), headers: { 'Content-Type': 'application/json' } });

/** The server refuses (410) what is asked of another clip than the one that it has open. */
const of = () => `of=${api.opened}`;

export const api = {
  page,
  opened: '', // the clip that the page shows
  moved: () => {}, // called where the server has another
  state: () => json('/api/state'),
  picture: async (frame, width) => createImageBitmap(await (await ask(`/api/frames/${frame}/picture?width=${width}&${of()}`)).blob()),
  async mask(frame) {
    const answer = await ask(`/api/frames/${frame}/mask?${of()}`);
    return { about: JSON.parse(answer.headers.get('X-Frame')), runs: new Uint32Array(await answer.arrayBuffer()) };
  },
  /** opened: the clip that was painted, which need not be the one that is shown by now. */
  paint: (frame, { runs, given, ends }, opened) =>
    json(`/api/frames/${frame}/mask?given=${given}&ends=${ends}&by=${page}&of=${opened}`, { method: 'PUT', body: runs }),
  proposals: (frame) => json(`/api/frames/${frame}/proposals?${of()}`),
  proposal: async (frame, number) => new Uint32Array(await (await ask(`/api/frames/${frame}/proposals/${number}?${of()}`)).arrayBuffer()),
  addObject: () => send('POST', `/api/objects?${of()}`),
  rename: (id, name) => send('PATCH', `/api/objects/${id}?${of()}`, { name }),
  remove: (id) => send('DELETE', `/api/objects/${id}?${of()}`),
  run: () => send('POST', `/api/run?${of()}`),
  stop: () => send('POST', `/api/stop?${of()}`),
  live: (action, body) => send('POST', `/api/live/${action}`, body),
  /** The next picture after number `after`, or null where none came within a second, and what is known of the source. */
  async livePicture(after, width) {
    const answer = await ask(`/api/live/picture?after=${after}&width=${width}`);
    return { state: JSON.parse(answer.headers.get('X-Live')), bitmap: answer.status === 204 ? null : await createImageBitmap(await answer.blob()) };
  },
  export: (kind) => send('POST', `/api/exports/${kind}?${of()}`),
  exported: (kind) => `/api/exports/${kind}?${of()}`, // where it is
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
  /** Hear of the events after number `since`; lost: called with true when the connection goes, with false when there is one. */
  listen(since, hear, lost) {
    const again = () => setTimeout(() => api.state().then(({ seq }) => api.listen(seq, hear, lost), again), 2000);
    const source = new EventSource(`/api/events?since=${since}`);
    source.onmessage = (event) => hear(JSON.parse(event.data));
    source.onopen = () => lost(false);
    source.onerror = () => {
      lost(true);
      if (source.readyState === EventSource.CLOSED) again(); // refused, as by a server that was started again until its address is opened
    };
  },
};
