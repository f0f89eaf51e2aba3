/** One player's game: what the server said last, what is held, and what is said to the server. */

import { Held } from "./actions.js";
import { describe } from "./help.js";
import { KeyMap } from "./input.js";
import { Pad } from "./pad.js";
import { $, Rate, WIDE, download, isAwake, mark, say, toast, wake } from "./show.js";
import { showFigures, showHello, showRecorded, showStatus, showUndo } from "./show.js";
import { Line } from "./socket.js";
import { View } from "./view.js";

export class Game {
  /** What the server said last; null until it did. */
  hello = null;
  status = null;
  /** @type {KeyMap | null} */ map = null;
  /** Whether frames have come since the last command. */
  isAnswered = true;
  rate = new Rate();

  #view = new View();
  /** @type {Line} */ #line;
  /** @type {Held[]} */ #hands = [];
  /** @type {Pad[]} */ #pads = [];
  /** What each pane was last said to hold, as JSON. @type {string[]} */ #told = [];
  #truthIsWanted = matchMedia(WIDE).matches; // on a phone it would take half the room
  /** Whether one of two panes is to be kept, of which the server has not heard yet. */
  #isKeeping = false;
  /** The pictures that a hidden tab has not drawn. */
  #undrawn = null;

  connect() {
    mark({ state: "connecting" });
    delete document.body.dataset.tick;
    [this.hello, this.status, this.map, this.#hands, this.#pads] = [null, null, null, [], []];
    this.#isKeeping = false;
    $("closed").hidden = true;
    wake(null);
    this.#line = new Line({
      message: (message) => this.#hear(message),
      pictures: (header, pictures) => this.#receive(header, pictures),
      close: (reason) => this.#end(reason),
    });
  }

  /** Whether there is somebody to command. */
  get isPlaying() {
    return this.status !== null && this.#line.isOpen;
  }

  get panes() {
    return this.#isKeeping ? 1 : (this.status?.panes ?? 1);
  }

  send(/** @type {Record<string, any>} */ message) {
    this.isAnswered = false;
    this.#line.send(message);
  }

  sendPicture(/** @type {Uint8Array} */ bytes) {
    this.#line.sendPicture(bytes);
  }

  // --- what the server says

  #hear(message) {
    if (message.type === "hello") this.#begin(message);
    else if (message.type === "status") this.#update(message);
    else if (message.type === "error") toast(message.text);
  }

  #begin(hello) {
    this.hello = hello;
    this.map = new KeyMap(hello.actions);
    this.#hands = [0, 1].map(() => new Held(hello.actions));
    this.#told = ["null", "null"];
    this.#pads = [0, 1].map((pane) => new Pad($(`pad-${pane}`), pane, hello.actions, this.map, this));
    this.#view.setFrame(hello.frame[0], hello.frame[1]);
    showHello(hello);
    describe(hello, this.map);
    this.#light();
  }

  #update(status) {
    const before = this.status ?? status;
    this.status = status;
    if (status.panes === 1) this.#isKeeping = false;
    this.#show();
    if (status.busy) wake(status.busy);
    else if (document.body.dataset.tick) isAwake();
    if (before.paused !== status.paused) this.#sayPaused();
    if (before.panes !== status.panes) {
      say(status.panes > 1 ? "Two dreams side by side" : "One dream");
      this.#told = []; // who holds what may have changed at the server: say it all again
    }
    this.#tell();
  }

  #show() {
    showStatus(this.status, this.#truthIsWanted);
    showRecorded(this.status.recorded);
    this.#view.show(this.panes, this.status.truth && this.#truthIsWanted);
  }

  /** Draws what came. A hidden tab only keeps the latest, and says that it has seen it, or the stream would stop. */
  async #receive(header, pictures) {
    if (header.type === "gif") return pictures.forEach(({ blob }) => download(blob, "dream.gif"));
    this.#undrawn = document.hidden ? pictures : null;
    if (!document.hidden) {
      await this.#view.draw(pictures).catch(() => toast("A frame could not be drawn."));
      this.rate.count();
    }
    this.#line.send({ type: "seen", tick: header.tick });
    this.isAnswered = true;
    showFigures(header);
    showUndo(header.undo);
    showRecorded(header.recorded);
    if (!this.status?.busy) isAwake();
  }

  /** What a tab missed while it was hidden. */
  catchUp() {
    if (this.#undrawn) this.#view.draw(this.#undrawn).catch(() => {}); // the next frame will do
    this.#undrawn = null;
  }

  #end(reason) {
    mark({ state: "closed" });
    this.releaseAll();
    isAwake();
    $("closed-reason").textContent = reason;
    $("closed").hidden = false;
    if (!$("help").open) $("connect").focus();
  }

  // --- what is held

  press(/** @type {number} */ pane, /** @type {string} */ source, binding) {
    this.#hands[pane]?.press(source, binding);
    this.#tell();
  }

  release(/** @type {string} */ source) {
    if (this.#hands.filter((hand) => hand.release(source)).length) this.#tell();
  }

  releaseAll() {
    for (const hand of this.#hands) hand.releaseAll();
    this.#tell();
  }

  #tellSoon = throttle(() => this.#tell());
  /** Sets the slider of an axis. */
  slide(/** @type {number} */ pane, /** @type {string} */ name, axis, /** @type {number} */ value) {
    this.#hands[pane]?.slide(name, axis, value);
    this.#tellSoon();
  }

  /** Gives the keyboard to one of several components. */
  choose(component) {
    if (this.map) this.map.chosen = component;
    this.#light();
  }

  /** Says what is held where that has changed, and shows it. */
  #tell() {
    this.#light();
    this.#hands.slice(0, this.panes).forEach((hand, pane) => {
      const action = hand.action();
      const json = JSON.stringify(action);
      if (json !== this.#told[pane]) this.#line.send({ type: "hold", pane, action });
      this.#told[pane] = json;
    });
  }

  #light() {
    this.#pads.forEach((pad, pane) => {
      const action = this.#hands[pane].action();
      pad.light(this.#hands[pane]);
      $(`told-${pane}`).textContent = action ? pad.words(action) : "";
    });
  }

  // --- what a command does that is more than a message

  togglePause() {
    this.status.paused = !this.status.paused; // at once, so that two quick pushes are two
    this.#sayPaused();
    this.send({ type: "pause", on: this.status.paused });
  }

  undo() {
    // Time that runs on would do at once what was undone.
    if (this.status.clock === "always" && !this.status.paused) this.togglePause();
    this.send({ type: "undo", steps: 1 });
  }

  branch() {
    if (this.panes > 1) return;
    this.status.panes = 2; // at once, so that a second push is none
    this.#told = [];
    say("Two dreams side by side");
    this.send({ type: "branch" });
  }

  keep(/** @type {number} */ pane) {
    if (this.panes === 1) return;
    this.releaseAll(); // while both panes are there to be told
    this.#isKeeping = true;
    this.#told = [];
    this.send({ type: "keep", pane });
  }

  #sayPaused() {
    say(this.status.paused ? "Paused" : "Going on");
  }

  toggleTruth() {
    this.#truthIsWanted = !this.#truthIsWanted;
    this.#show();
  }
}

const PER_SECOND = 20;

/** Calls at once and then at most so many times a second, the last time included. */
export function throttle(/** @type {() => void} */ call) {
  let timer = 0;
  let isDue = false;
  return () => {
    isDue = true;
    if (timer) return;
    call();
    isDue = false;
    timer = setTimeout(() => {
      timer = 0;
      if (isDue) call();
    }, 1000 / PER_SECOND);
  };
}
