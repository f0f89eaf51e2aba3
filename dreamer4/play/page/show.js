/** What the page shows beside the frames: figures, fields, veils and toasts. Nothing here speaks to the server. */

import { element } from "./pad.js";

const RATE_WINDOW = 1000; // milliseconds
const TOAST_SECONDS = 7;
const TOASTS = 3;
const SYSTEMS = { dynamics: "Dreamer 4", maskgit: "TinyWorlds", next_frame: "TinyDreams" };

/** Where there is room for all at once, which a phone has not. */
export const WIDE = "(min-width: 720px) and (min-height: 480px)";

export const $ = (/** @type {string} */ id) => document.getElementById(id);

/** The state of the page as tests read it. */
export function mark(/** @type {Record<string, any>} */ state) {
  Object.assign(document.body.dataset, state);
}

export function showHello(/** @type {any} */ hello) {
  document.title = `${hello.title} - dreamer4`;
  $("title").textContent = hello.title;
  const what = `dreamt by ${SYSTEMS[hello.kind] ?? hello.kind}`;
  $("what").textContent = hello.calibration ? `${what}; ${hello.calibration}` : what;
  $("speed").max = hello.max_rate;
  $("record").title = `Record a GIF of up to ${hello.max_recording} frames (R)`;
  $("clip").max = Math.max(0, hello.starts - 1);
  $("from-data").hidden = hello.starts === 0;
  $("another").disabled = hello.starts < 2;
  for (const [id, values] of [["k", hello.ks], ["context", hello.contexts]]) {
    $(`${id}-group`).hidden = values.length === 0;
    $(id).replaceChildren(...values.map((value) => new Option(value, value)));
  }
}

export function showStatus(/** @type {any} */ status, /** @type {boolean} */ truthIsWanted) {
  mark({ paused: status.paused, panes: status.panes });
  press("truth", truthIsWanted);
  press("record", status.recording);
  $("pause-text").textContent = status.paused ? "go on" : "pause";
  $("branch").disabled = status.panes > 1;
  $("keep-0").hidden = status.panes < 2;
  $("truth").hidden = !status.truth;
  $("record-count").hidden = !status.recording;
  for (const id of ["clip", "seed", "k", "context"]) setField(id, status[id]);
  setField("speed", status.rate);
  $("speed-text").textContent = `${Math.round(status.rate)}/s`;
  $("clock-always").checked = status.clock === "always";
  $("clock-held").checked = status.clock === "held";
  showUndo(status.undo);
}

export function showFigures(/** @type {{tick: number, step: number, ms: number}} */ { tick, step, ms }) {
  mark({ state: "playing", tick, step, ms: ms.toFixed(1) });
  $("figure-step").textContent = String(step);
  if (ms) $("figure-ms").textContent = ms.toFixed(ms < 10 ? 1 : 0);
}

export function showUndo(/** @type {number} */ count) {
  mark({ undo: count });
  $("undo-count").textContent = String(count);
  $("undo").disabled = count === 0;
}

export function showRecorded(/** @type {number} */ count) {
  $("record-count").textContent = String(count);
}

/** Frames a second, over about the last one. */
export class Rate {
  #times = [];

  count() {
    this.#times.push(performance.now());
    this.show();
  }

  show() {
    const now = performance.now();
    this.#times = this.#times.filter((time) => now - time <= RATE_WINDOW);
    const span = this.#times.at(-1) - this.#times[0];
    const rate = span > 0 ? (1000 * (this.#times.length - 1)) / span : 0;
    mark({ rate: rate.toFixed(1) });
    $("figure-rate").textContent = rate.toFixed(0);
  }
}

/** Lays a veil over the dream that says what is waited for. */
export function wake(/** @type {string | null} */ why) {
  $("waking-text").textContent = why ? `waking the world… (${why})` : "waking the world…";
  $("waking").hidden = false;
}

export function isAwake() {
  $("waking").hidden = true;
}

/** A sentence that goes by itself; always as text, whoever wrote it. */
export function toast(/** @type {string} */ text) {
  const shown = element("p", "toast", text);
  $("toasts").append(shown);
  while ($("toasts").childElementCount > TOASTS) $("toasts").firstElementChild.remove();
  setTimeout(() => shown.remove(), 1000 * TOAST_SECONDS);
}

/** For those who listen to the page. */
export function say(/** @type {string} */ text) {
  $("said").textContent = text;
}

export function download(/** @type {Blob} */ blob, /** @type {string} */ name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // once it is surely saved
}

function press(/** @type {string} */ id, /** @type {boolean} */ isPressed) {
  $(id).setAttribute("aria-pressed", String(isPressed));
}

/** A field shows what is so, unless somebody is changing it. */
function setField(/** @type {string} */ id, /** @type {number | null} */ value) {
  if (document.activeElement !== $(id)) $(id).value = value ?? "";
}
