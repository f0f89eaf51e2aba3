/**
 * What is held, and the action that it makes. No DOM here: keys, buttons, sticks and sliders all come down to this.
 *
 * @typedef {{name: string, kind: "categorical" | "continuous" | "binary", size: number, inferred: boolean,
 *   labels: string[] | null, keys: Record<string, any> | null}} Component  as the server's hello has it
 * @typedef {{component: Component, code?: string, target: number | null, value: number}} Binding  what a key or a button
 *   does: `target` is a choice, a switch or an axis, null where the key does something beside others only, and `value`
 *   what the axis is set to
 * @typedef {{codes: string[], target: number}} Chord  keys that make a choice when they are held together
 */

export const ARROWS = ["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"];
// Letters that neither name a command of the page nor stand in for the arrows.
const LETTERS = [..."CEFGHIJKLMOQUVY"].map((letter) => `Key${letter}`);
const DIGITS = [..."123456789"].map((digit) => `Digit${digit}`);

/** The keys of a component by `KeyboardEvent.code`, its own or the page's. @returns {Map<string, Binding>} */
export function keysOf(/** @type {Component} */ component) {
  const keys = new Map();
  const bind = (code, target, value = 1) => keys.set(code, { component, code, target, value });
  for (const [code, said] of Object.entries(component.keys ?? defaultKeys(component))) {
    if (!code.includes("+")) bind(code, ...(Array.isArray(said) ? said : [said]));
  }
  for (const { codes } of chordsOf(component)) for (const code of codes) if (!keys.has(code)) bind(code, null);
  return keys;
}

/** Its choices that several keys make together. @returns {Chord[]} */
export function chordsOf(/** @type {Component} */ { kind, keys }) {
  const chords = Object.entries(keys ?? {}).filter(([code]) => kind === "categorical" && code.includes("+"));
  return chords.map(([code, target]) => ({ codes: code.split("+"), target }));
}

function defaultKeys({ kind, size }) {
  if (kind === "continuous") {
    // Up is +1, as in the recordings that one can make here.
    const across = { ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    return size === 1 ? across : { ...across, ArrowDown: [1, -1], ArrowUp: [1, 1] };
  }
  const first = kind === "categorical" ? ["Digit0"] : [];
  const codes = [...first, ...DIGITS, ...LETTERS].slice(0, size);
  return Object.fromEntries(codes.map((code, target) => [code, target]));
}

/** What the target of a binding is called. */
export function labelOf(/** @type {Component} */ component, /** @type {number} */ target) {
  return component.labels?.[target] ?? (component.kind === "continuous" ? "xyzw"[target] ?? `${target}` : `${target}`);
}

/** Presses in one pane, each by its source: a key, a pointer on a button, a part of a gamepad. */
export class Held {
  /** @type {Map<string, Binding>} */ #presses = new Map(); // in the order in which they were pressed
  /** @type {Map<string, number>} */ #codes = new Map();
  /** @type {Map<string, number[]>} */ #sliders = new Map();

  constructor(/** @type {Component[]} */ components) {
    this.components = components;
    for (const c of components) if (c.kind === "continuous") this.#sliders.set(c.name, Array(c.size).fill(0));
  }

  press(/** @type {string} */ source, /** @type {Binding} */ binding) {
    this.#presses.delete(source); // to the end, where the latest are
    this.#presses.set(source, binding);
    if (binding.component.inferred && binding.target !== null) this.#codes.set(binding.component.name, binding.target);
  }

  release(/** @type {string} */ source) {
    return this.#presses.delete(source);
  }

  releaseAll() {
    this.#presses.clear();
  }

  slide(/** @type {string} */ name, /** @type {number} */ axis, /** @type {number} */ value) {
    this.#sliders.get(name)[axis] = value;
  }

  /** The numbers of a continuous component: a key or a stick goes before a slider, as long as it is held. */
  axes(/** @type {Component} */ component) {
    const values = [...this.#sliders.get(component.name)];
    for (const { target, value } of this.#of(component)) values[target] = value;
    return values;
  }

  /** Whether a button is to be lit. */
  isOn(/** @type {Binding} */ { component, code, target, value }) {
    return this.#of(component).some((b) => b.code === code && b.target === target && b.value * value > 0);
  }

  /** The action as the server takes it; null while nothing is held. */
  action() {
    const idle = this.#presses.size === 0 && [...this.#sliders.values()].flat().every((value) => value === 0);
    return idle ? null : Object.fromEntries(this.components.map((c) => [c.name, this.value(c)]));
  }

  /** The part of the action that a component has. */
  value(/** @type {Component} */ component) {
    if (component.kind === "continuous") return this.axes(component);
    const held = this.#of(component);
    if (component.kind === "binary") {
      return Array.from({ length: component.size }, (_, i) => +held.some((b) => b.target === i));
    }
    // Choice 0 is to do nothing, but a learnt code has no such choice: it stays what it was chosen to be last.
    return choiceOf(component, held) ?? this.#codes.get(component.name) ?? 0;
  }

  #of(component) {
    return [...this.#presses.values()].filter((b) => b.component === component);
  }
}

/**
 * Of the choices whose keys are all held, the one with the most keys; of several such, the one that was pressed last.
 */
function choiceOf(/** @type {Component} */ component, /** @type {Binding[]} */ held) {
  const alone = held.map(({ target }, i) => ({ target, at: [i] }));
  const together = chordsOf(component).map(({ codes, target }) => ({
    target,
    at: codes.map((code) => held.findLastIndex((b) => b.code === code)).sort((a, b) => b - a),
  }));
  const made = [...alone, ...together].filter(({ target, at }) => target !== null && !at.includes(-1));
  const order = (a, b) => b.at.length - a.at.length || b.at.reduce((found, x, i) => found || x - a.at[i], 0);
  return made.sort(order)[0]?.target;
}
