/**
 * The line to the server: JSON both ways, pictures from it as bytes behind a JSON header, pictures to it as raw bytes.
 *
 * @typedef {{pane: number, what: "dream" | "truth" | "gif", blob: Blob}} Picture
 * @typedef {{message: (message: any) => void, pictures: (header: any, pictures: Picture[]) => Promise<void>,
 *   close: (reason: string) => void}} Listener
 */

/** Where to connect, with the token that the page's own address carries (`#token=...`). */
function address() {
  const url = new URL("play", location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  url.hash = "";
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  url.search = token === null ? "" : new URLSearchParams({ token }).toString();
  return url;
}

export class Line {
  #socket;

  constructor(/** @type {Listener} */ listener) {
    this.#socket = new WebSocket(address());
    this.#socket.binaryType = "arraybuffer";
    // One after another, the end included: what came first is drawn first, however long its pictures take to decode.
    let queue = Promise.resolve();
    const next = (job) => (queue = queue.then(job).catch((error) => console.error(error)));
    this.#socket.onmessage = ({ data }) => next(() => read(data, listener));
    this.#socket.onclose = ({ code, reason }) => next(() => listener.close(reason || REASONS[code] || REASONS[1006]));
  }

  get isOpen() {
    return this.#socket.readyState === WebSocket.OPEN;
  }

  send(/** @type {Record<string, any>} */ message) {
    if (this.isOpen) this.#socket.send(JSON.stringify(message));
  }

  /** A frame to begin from: its H * W * C bytes, row by row. */
  sendPicture(/** @type {Uint8Array} */ bytes) {
    if (this.isOpen) this.#socket.send(bytes);
  }
}

/** A listener hears of text at once, and is waited for while it draws. */
async function read(/** @type {string | ArrayBuffer} */ data, /** @type {Listener} */ listener) {
  if (typeof data === "string") return listener.message(JSON.parse(data));
  const length = new DataView(data).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let at = 4 + length;
  const pictures = header.images.map(({ pane, what, bytes, mime }) => {
    const blob = new Blob([new Uint8Array(data, at, bytes)], { type: mime });
    at += bytes;
    return { pane, what, blob };
  });
  await listener.pictures(header, pictures);
}

// Where the server gave no reason of its own.
const REASONS = {
  1000: "The session has ended.",
  1001: "The session has ended.",
  1006:
    "There is no answer from the server: it may have stopped, or it may not know this page. " +
    "If it printed an address with a token, open the page by that address.",
  1009: "What the page sent was too large.",
  1012: "The server is stopping.",
  1013: "All places are taken.",
  4000: "Nothing was played for a while.",
};
