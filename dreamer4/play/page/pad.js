/** The keys of one pane as they lie on the page: they light up when pressed, and can be pressed by thumb or mouse. */

import { ARROWS, chordsOf, keysOf, labelOf } from "./actions.js";

/**
 * @typedef {import("./actions.js").Component} Component
 * @typedef {import("./actions.js").Binding} Binding
 * @typedef {import("./actions.js").Held} Held
 * @typedef {import("./game.js").Game} Game
 */

const GLYPHS = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→" };
const STAND_INS = { ArrowUp: "W", ArrowDown: "S", ArrowLeft: "A", ArrowRight: "D" };

export class Pad {
  /** @type {{cap: HTMLButtonElement, binding: Binding}[]} */ #caps = [];
  /** @type {{button: HTMLButtonElement, component: Component}[]} */ #names = [];

  /**
   * @param {HTMLElement} root
   * @param {number} pane
   * @param {Component[]} components
   * @param {import("./input.js").KeyMap} map
   * @param {Game} game
   */
  constructor(root, pane, components, map, game) {
    Object.assign(this, { pane, components, map, game });
    root.replaceChildren(...components.map((component) => this.#part(component, components.length > 1)));
  }

  /** Shows what is held. */
  light(/** @type {Held} */ held) {
    for (const { cap, binding } of this.#caps) {
      const on = held.isOn(binding);
      // What a learnt code rests at while another component is held.
      const rests = binding.component.inferred && held.components.length > 1;
      cap.classList.toggle("down", on);
      cap.classList.toggle("rests", !on && rests && held.value(binding.component) === binding.target);
      cap.setAttribute("aria-pressed", String(on));
    }
    for (const { button, component } of this.#names) {
      button.setAttribute("aria-pressed", String(component === this.map.chosen));
    }
  }

  /** An action in words. */
  words(/** @type {Record<string, any>} */ action) {
    return this.components.map((component) => inWords(component, action[component.name])).filter(Boolean).join(", ");
  }

  #part(/** @type {Component} */ component, /** @type {boolean} */ isOneOfSeveral) {
    const part = element("div", "part");
    part.setAttribute("role", "group");
    part.setAttribute("aria-label", titleOf(component, isOneOfSeveral));
    if (isOneOfSeveral || component.inferred) part.append(this.#name(component, titleOf(component, isOneOfSeveral)));
    const keys = keysOf(component);
    const arrows = ARROWS.filter((code) => keys.has(code));
    if (arrows.length) {
      const cross = element("div", "cross");
      cross.append(...arrows.map((code) => this.#cap(keys.get(code), code)));
      part.append(cross);
    }
    const others = [...keys].filter(([code]) => !arrows.includes(code));
    const row = element("div", "row");
    row.append(...others.map(([code, binding]) => this.#cap(binding, code)), ...this.#keyless(component, keys));
    if (row.childElementCount) part.append(row);
    if (component.kind === "continuous") part.append(this.#sliders(component));
    return part;
  }

  /** Choices and switches without a key. Where others have theirs, choice 0 is to hold none of them. */
  #keyless(component, keys) {
    if (component.kind === "continuous") return [];
    const taken = [...keys.values(), ...chordsOf(component)].map(({ target }) => target);
    const all = Array.from({ length: component.size }, (_, target) => target);
    const isLeftOut = (target) => component.kind === "categorical" && component.keys && target === 0;
    const left = all.filter((target) => !taken.includes(target) && !isLeftOut(target));
    return left.map((target) => this.#cap({ component, target, value: 1 }, null));
  }

  #name(/** @type {Component} */ component, /** @type {string} */ title) {
    if (!this.map.hasChoice) return element("span", "name", title);
    const button = element("button", "name", title);
    button.type = "button";
    button.title = "The keyboard plays this one";
    button.addEventListener("click", () => this.game.choose(component));
    this.#names.push({ button, component });
    return button;
  }

  #cap(/** @type {Binding} */ binding, /** @type {string | null} */ code) {
    const { component, target, value } = binding;
    const sign = component.kind === "continuous" ? (value < 0 ? " −" : " +") : "";
    const label = target === null ? nameOfKey(code) : labelOf(component, target) + sign;
    const hint = code === null ? "" : this.#hint(code);
    const cap = element("button", `cap ${code in GLYPHS ? code : ""}`);
    cap.type = "button";
    cap.append(element("span", "label", GLYPHS[code] ?? label));
    if (hint && hint !== label) cap.append(element("kbd", "", hint));
    cap.title = `${label} (${hint || "no key"})`;
    cap.setAttribute("aria-label", label);
    Object.assign(cap.dataset, { component: component.name, target: String(target) });
    this.#listen(cap, binding);
    this.#caps.push({ cap, binding });
    return cap;
  }

  #hint(/** @type {string} */ code) {
    if (this.pane === 0) return code in GLYPHS ? "" : nameOfKey(code);
    return this.map.hasStandIns && STAND_INS[code] ? STAND_INS[code] : `⇧ ${nameOfKey(code)}`;
  }

  #listen(cap, binding) {
    const { pane, game } = this;
    const name = `${pane} ${binding.component.name} ${binding.target} ${binding.value}`;
    cap.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      cap.setPointerCapture(event.pointerId); // so that it is heard of when it goes up elsewhere
      game.press(pane, `pointer ${event.pointerId}`, binding);
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
      cap.addEventListener(end, (event) => game.release(`pointer ${event.pointerId}`));
    }
    cap.addEventListener("contextmenu", (event) => event.preventDefault()); // a long press
    cap.addEventListener("keydown", (event) => {
      if (event.key !== " " && event.key !== "Enter") return;
      event.preventDefault();
      if (!event.repeat) game.press(pane, `focus ${name}`, binding);
    });
    for (const end of ["keyup", "blur"]) cap.addEventListener(end, () => game.release(`focus ${name}`));
    // A click without a pointer is one of a screen reader's: a tap.
    cap.addEventListener("click", (event) => {
      if (event.detail !== 0) return;
      game.press(pane, `tap ${name}`, binding);
      game.release(`tap ${name}`);
    });
  }

  #sliders(/** @type {Component} */ component) {
    const box = element("div", "sliders");
    const axes = Array.from({ length: component.size }, (_, axis) => this.#slider(component, axis));
    const centre = element("button", "plain", "centre");
    centre.type = "button";
    centre.addEventListener("click", () => axes.forEach(({ set }) => set(0)));
    box.append(...axes.map(({ row }) => row), centre);
    return box;
  }

  #slider(component, axis) {
    const row = element("label", "slider");
    const range = Object.assign(document.createElement("input"), { type: "range", min: -1, max: 1, step: 0.01 });
    const number = Object.assign(document.createElement("input"), { type: "number", step: 0.1 });
    const label = labelOf(component, axis);
    number.setAttribute("aria-label", `${label}, as a number`);
    const set = (value, from) => {
      if (!Number.isFinite(value)) return;
      if (from !== range) range.value = String(value); // the browser keeps it in range
      if (from !== number) number.value = String(value);
      this.game.slide(this.pane, component.name, axis, value);
    };
    range.addEventListener("input", () => set(range.valueAsNumber, range));
    number.addEventListener("input", () => set(number.valueAsNumber, number));
    [range.value, number.value] = ["0", "0"];
    row.append(element("span", "", label), range, number);
    return { row, set };
  }
}

function inWords(component, value) {
  if (component.kind === "categorical") return labelOf(component, value);
  const named = value.map((x, i) => `${labelOf(component, i)}${component.kind === "binary" ? "" : ` ${x.toFixed(2)}`}`);
  return named.filter((_, i) => value[i] !== 0).join(" ");
}

/** What a component is called. */
export function titleOf(/** @type {Component} */ component, /** @type {boolean} */ isOneOfSeveral) {
  if (!component.inferred) return component.name;
  return isOneOfSeveral ? `learnt action ${component.name.replace(/^latent_?/, "")}` : "learnt action";
}

/** What is written on a key. */
export function nameOfKey(/** @type {string} */ code) {
  return GLYPHS[code] ?? code.replace(/^(Key|Digit)/, "");
}

/** An element with a class and a text, never with markup. */
export function element(/** @type {string} */ name, className = "", text = "") {
  const made = document.createElement(name);
  if (className.trim()) made.className = className.trim();
  if (text) made.textContent = text;
  return made;
}
