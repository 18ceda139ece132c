// The experts of answers, shown: the colour of each token, the share of each expert, the picture of tokens by layers.
//
// Owns the panel's part on experts. Colours are those of the palette that the server's other pictures have.

import { colours } from "./palette.js";
import { lead, leading, Routing } from "./routing.js";
import { keepSetting, setting } from "./store.js";

const MOST_NAMED = 10; // experts with a bar of their own, unless all are asked for
const MOST_IN_TIP = 4;
const CELL = 10; // width of a token in the picture, in CSS pixels
const BAND_HEIGHT = 84;
const MOST_CELL_HEIGHT = 16;
const BAND_GAP = 10;

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const rgb = (colour, alpha = 1) => `rgb(${colour.map(Math.round).join(" ")} / ${alpha.toFixed(3)})`;
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

/** The parts of a bar as the value of a CSS background: the largest shares in their colours, then the others in grey. */
function parted(shares, direction = "to right") {
  const shown = shares.length <= MOST_NAMED ? [...shares.keys()] : leading(shares, MOST_IN_TIP);
  let at = 0;
  const stops = shown.filter((expert) => shares[expert] > 0.004).map((expert) => {
    const from = at;
    at += 100 * shares[expert];
    return `${rgb(colours[expert])} ${from.toFixed(1)}% ${at.toFixed(1)}%`;
  });
  return `linear-gradient(${direction}, ${[...stops, `var(--others) ${at.toFixed(1)}% 100%`].join(", ")})`;
}

export class ExpertView {
  /** `list` is the MessageList whose tokens are coloured. */
  constructor(list) {
    this.list = list;
    this.facts = null; // of the model that is served
    this.routings = new WeakMap(); // by message
    this.message = null; // whose experts the panel shows
    this.row = null; // the layer's row, or null for the mean of all
    this.focus = null; // an expert that is looked at alone
    this.token = null;
    this.isOn = setting("experts", true);
    this.showsAll = false;
    this.drawn = 0;
    $("watch").checked = this.isOn;
    this.#listen();
  }

  /** What the server tells of the model's experts; undefined for a dense model. */
  setModel(facts) {
    this.facts = facts ?? null;
    this.refresh();
  }

  /** Whether answers should come with their routing. */
  get isWanted() {
    return this.isOn && this.facts !== null;
  }

  routing(message) {
    return this.routings.get(message);
  }

  /** A message is about to come with its routing. */
  begin(message) {
    if (!this.isWanted) return;
    this.routings.set(message, new Routing(this.facts));
    this.show(message);
  }

  /** What was kept of a message's routing. */
  restore(message, packed) {
    const routing = Routing.unpacked(packed);
    routing.place((message.reasoning ?? "") + message.content, true);
    this.routings.set(message, routing);
  }

  /** Tokens have come; `message` has the text as far as it has come too. */
  push(message, entries) {
    this.routings.get(message)?.push(entries);
  }

  /** Say where in the message's text its tokens stand. */
  place(message, isComplete) {
    this.routings.get(message)?.place((message.reasoning ?? "") + message.content, isComplete);
  }

  /** Show the experts of a message in the panel; null: of none. */
  show(message) {
    if (message === this.message) return;
    this.message = message;
    this.token = null;
    this.refresh();
  }

  /** Show all anew. */
  refresh() {
    const routing = this.#shown();
    $("experts-box").hidden = this.facts === null && !routing;
    const hasExperts = !$("experts-box").hidden;
    $("panel-title").textContent = hasExperts ? "Experts" : "Model";
    $("show-panel").setAttribute("aria-label", hasExperts ? "Experts and model" : "Model");
    $("messages").classList.toggle("coloured", this.isOn);
    $("routed").hidden = !routing?.tokens.length || !this.isOn;
    $("unrouted").hidden = !$("routed").hidden;
    $("unrouted").textContent = this.isOn
      ? "Each token of an answer is coloured by the experts that made it. Ask something, or point at an answer."
      : "Answers come without their experts, and a little faster.";
    if (routing?.tokens.length) {
      this.#showLayers(routing);
      this.grow();
    }
    this.paint($("messages"));
  }

  /** Show what has come since. */
  grow() {
    const routing = this.#shown();
    if (!routing?.tokens.length || !this.isOn) return;
    if ($("routed").hidden) {
      this.refresh();
      return;
    }
    const words = (this.message.content || this.message.reasoning || "").trim().slice(0, 40);
    $("shown-answer").textContent = `The answer “${words}${words.length < 40 ? "" : "…"}”`;
    this.#showShares(routing);
    this.#draw(routing);
    this.#showToken(routing);
  }

  /** Colour the tokens within `root` that belong to messages with a routing. */
  paint(root) {
    for (const element of root.querySelectorAll(".t")) {
      const routing = this.#routingAt(element);
      if (routing) this.#paintToken(element, routing, Number(element.dataset.i));
    }
  }

  /** Colour the tokens within elements of a message. */
  paintMessage(message, elements) {
    const routing = this.routings.get(message);
    for (const element of elements) {
      for (const token of element.querySelectorAll(".t")) this.#paintToken(token, routing, Number(token.dataset.i));
    }
  }

  /** Say in a few coloured words what will be seen. */
  showWelcome(element) {
    element.hidden = !this.isWanted;
    const words = ["Each", " word", " is", " coloured", " by", " the", " experts", " that", " made", " it", "."];
    element.replaceChildren(...words.map((word, i) => {
      const token = document.createElement("span");
      token.className = "t";
      token.textContent = word;
      const expert = (i * 7 + (i >> 1)) % Math.max(1, Math.min(8, this.facts?.n_expert ?? 1));
      token.style.setProperty("--c", colours[expert].join(" "));
      token.style.setProperty("--a", "0.4");
      token.style.setProperty("--bar", `linear-gradient(${rgb(colours[expert])}, ${rgb(colours[expert])})`);
      return token;
    }));
  }

  #shown() {
    return this.message ? this.routings.get(this.message) : undefined;
  }

  #messageAt(element) {
    const id = element.closest(".message")?.dataset.id;
    return this.list.views.get(id)?.message;
  }

  #routingAt(element) {
    const message = this.#messageAt(element);
    return message ? this.routings.get(message) : undefined;
  }

  // ---- the text

  #paintToken(element, routing, index) {
    const row = this.row !== null && this.row < routing.layers.length ? this.row : null;
    const shares = routing.shares(index, row);
    const expert = this.focus ?? leading(shares, 1)[0];
    const strength = this.focus === null ? lead(shares[expert], routing.nExpert) : shares[expert];
    const alpha = this.focus === null ? 0.1 + 0.42 * Math.sqrt(strength) : 0.55 * Math.sqrt(strength);
    element.style.setProperty("--c", colours[expert].join(" "));
    element.style.setProperty("--a", alpha.toFixed(3));
    element.style.setProperty("--bar", parted(shares));
  }

  // ---- layers and shares

  #showLayers(routing) {
    const select = $("layer");
    const wanted = ["mean of all layers", ...routing.layers.map((layer) => `layer ${layer}`)];
    if (select.options.length !== wanted.length || select.options[1]?.textContent !== wanted[1]) {
      select.replaceChildren(...wanted.map((text, i) => new Option(text, i - 1)));
    }
    if (this.row !== null && this.row >= routing.layers.length) this.row = null;
    select.value = this.row ?? -1;
  }

  #showShares(routing) {
    const totals = routing.totals(this.row);
    const many = routing.nExpert > MOST_NAMED;
    const shown = !many ? [...totals.keys()] : leading(totals, this.showsAll ? routing.nExpert : MOST_NAMED);
    const list = $("shares");
    while (list.children.length > shown.length) list.lastChild.remove();
    while (list.children.length < shown.length) list.append(this.#shareRow());
    const most = Math.max(...totals);
    shown.forEach((expert, i) => {
      const item = list.children[i].firstChild;
      const [swatch, name, bar, value] = item.children;
      item.dataset.expert = expert;
      item.setAttribute("aria-pressed", String(this.focus === expert));
      swatch.style.background = rgb(colours[expert]);
      name.textContent = routing.names[expert];
      bar.firstChild.style.width = `${(100 * totals[expert]) / (many ? most : 1)}%`;
      bar.firstChild.style.background = rgb(colours[expert]);
      value.textContent = percent(totals[expert]);
    });
    const others = 1 - shown.reduce((sum, expert) => sum + totals[expert], 0);
    $("more-experts").hidden = !many;
    $("more-experts").textContent = this.showsAll
      ? "Show fewer"
      : `and ${routing.nExpert - MOST_NAMED} more with ${percent(Math.max(0, others))}`;
  }

  #shareRow() {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "share";
    button.title = "Look at this expert alone";
    for (const name of ["swatch", "name", "bar", "value"]) {
      const part = document.createElement("span");
      part.className = name;
      button.append(part);
    }
    button.children[2].append(document.createElement("span"));
    button.addEventListener("click", () => {
      const expert = Number(button.dataset.expert);
      this.focus = this.focus === expert ? null : expert;
      this.refresh();
    });
    item.append(button);
    return item;
  }

  // ---- the picture

  /** How the picture is laid out: tokens in bands, a row for each layer. */
  #layout(routing) {
    const width = Math.max(CELL * 8, $("picture-box").clientWidth);
    const columns = Math.floor(width / CELL);
    const cell = Math.min(MOST_CELL_HEIGHT, Math.max(2, BAND_HEIGHT / routing.layers.length));
    const band = Math.round(cell * routing.layers.length);
    const bands = Math.ceil(routing.tokens.length / columns);
    return { width: columns * CELL, columns, cell, band, height: bands * (band + BAND_GAP) - BAND_GAP };
  }

  #draw(routing, whole = false) {
    const canvas = $("picture");
    const layout = this.#layout(routing);
    const ratio = window.devicePixelRatio || 1;
    const size = [Math.round(layout.width * ratio), Math.round(layout.height * ratio)];
    const isSame = canvas.width === size[0] && canvas.height === size[1] && canvas.message === this.message;
    const from = isSame && !whole && this.drawnLook === this.#look() ? this.drawn : 0;
    if (!isSame) {
      [canvas.width, canvas.height] = size;
      canvas.style.width = `${layout.width}px`;
      canvas.style.height = `${layout.height}px`;
      canvas.message = this.message;
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (from === 0) context.clearRect(0, 0, layout.width, layout.height);
    for (let index = from; index < routing.tokens.length; index += 1) this.#drawToken(context, routing, layout, index);
    this.drawn = routing.tokens.length;
    this.drawnLook = this.#look();
    if (this.token !== null) this.#drawMark(context, layout, this.token);
    if (from < this.drawn && this.token === null) $("picture-box").scrollTop = $("picture-box").scrollHeight;
  }

  /** What the picture looks like depends on these. */
  #look() {
    return `${this.row} ${this.focus} ${this.token}`;
  }

  #drawToken(context, routing, { columns, cell, band }, index) {
    const x = (index % columns) * CELL;
    const top = Math.floor(index / columns) * (band + BAND_GAP);
    for (let row = 0; row < routing.layers.length; row += 1) {
      const [colour, alpha] = this.#cellColour(routing.shares(index, row), routing.nExpert);
      context.fillStyle = rgb(colour, this.row === null || this.row === row ? alpha : 0.25 * alpha);
      context.fillRect(x, top + row * cell, CELL - 1, cell >= 4 ? cell - 0.6 : cell);
    }
  }

  /** Of few experts the mixture of their colours; of many the colour of that which leads, as strong as it leads. */
  #cellColour(shares, nExpert) {
    if (this.focus !== null) return [colours[this.focus], Math.sqrt(shares[this.focus])];
    if (nExpert <= 3) {
      const mixed = [0, 1, 2].map((i) => shares.reduce((sum, share, expert) => sum + share * colours[expert][i], 0));
      return [mixed, 1];
    }
    const [expert] = leading(shares, 1);
    return [colours[expert], 0.3 + 0.7 * Math.sqrt(lead(shares[expert], nExpert))];
  }

  #drawMark(context, { columns, band }, index) {
    context.strokeStyle = getComputedStyle($("picture")).color;
    context.lineWidth = 1.5;
    context.strokeRect((index % columns) * CELL - 0.5, Math.floor(index / columns) * (band + BAND_GAP), CELL, band);
  }

  /** The token, and the row of the layer, at a place of the picture; null where there is none. */
  #at(routing, event) {
    const { columns, cell, band } = this.#layout(routing);
    const box = $("picture").getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const index = Math.floor(y / (band + BAND_GAP)) * columns + Math.floor(x / CELL);
    const row = Math.floor((y % (band + BAND_GAP)) / cell);
    const isThere = x >= 0 && x < columns * CELL && index >= 0 && index < routing.tokens.length && row < routing.layers.length;
    return isThere ? { index, row } : null;
  }

  // ---- one token

  #select(index) {
    this.token = index;
    const routing = this.#shown();
    this.#draw(routing, true);
    this.#showToken(routing);
    for (const old of document.querySelectorAll(".t.current")) old.classList.remove("current");
    const view = this.list.views.get(this.message.id);
    const elements = [...(view?.element.querySelectorAll(`.t[data-i="${index}"]`) ?? [])];
    for (const element of elements) element.classList.add("current");
    elements[0]?.scrollIntoView({ block: "nearest" });
  }

  #showToken(routing) {
    const picture = $("picture");
    const at = this.token ?? routing.tokens.length - 1;
    picture.setAttribute("aria-valuemin", "1");
    picture.setAttribute("aria-valuemax", String(routing.tokens.length));
    picture.setAttribute("aria-valuenow", String(at + 1));
    const where = this.row === null ? "mean of all layers" : `layer ${routing.layers[this.row]}`;
    const shares = routing.shares(at, this.row);
    picture.setAttribute("aria-valuetext", `Token ${at + 1}, “${visible(routing.tokens[at].text)}”: ${this.#named(routing, shares)}; ${where}`);
    $("token-box").hidden = this.token === null;
    if (this.token === null) return;
    $("token-title").textContent = `Token ${at + 1} of ${routing.tokens.length}: “${visible(routing.tokens[at].text)}”`;
    const rows = [...routing.layers.keys()].map((row) => this.#layerRow(`${routing.layers[row]}`, routing, routing.shares(at, row)));
    $("token-layers").replaceChildren(...rows, this.#layerRow("mean", routing, routing.shares(at)));
  }

  #layerRow(name, routing, shares) {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    const bar = row.insertCell();
    const inside = document.createElement("span");
    inside.className = "parted";
    inside.style.background = parted(shares);
    bar.append(inside);
    row.prepend(head);
    row.insertCell().textContent = this.#named(routing, shares, routing.nExpert > 2 ? 2 : 1);
    return row;
  }

  #named(routing, shares, most = MOST_IN_TIP) {
    return leading(shares, most).filter((expert) => shares[expert] > 0)
      .map((expert) => `${routing.names[expert]} ${percent(shares[expert])}`).join(", ");
  }

  // ---- pointing

  #showTip(event, routing, index, row) {
    const shares = routing.shares(index, row);
    const tip = $("tip");
    const lines = leading(shares, MOST_IN_TIP).filter((expert) => shares[expert] > 0).map((expert) => {
      const line = document.createElement("span");
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = rgb(colours[expert]);
      line.append(swatch, `${routing.names[expert]} ${percent(shares[expert])}`);
      return line;
    });
    const title = document.createElement("b");
    title.textContent = `“${visible(routing.tokens[index].text)}”`;
    const where = document.createElement("i");
    where.textContent = row === null ? "mean of all layers" : `layer ${routing.layers[row]}`;
    tip.replaceChildren(title, ...lines, where);
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    tip.style.left = `${Math.max(6, Math.min(event.clientX + 12, innerWidth - width - 6))}px`;
    tip.style.top = `${event.clientY + 22 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
  }

  #listen() {
    const hide = () => { $("tip").hidden = true; };
    $("messages").addEventListener("pointerover", (event) => {
      const element = event.target.closest?.(".t");
      const routing = element && this.isOn ? this.#routingAt(element) : undefined;
      if (routing) this.#showTip(event, routing, Number(element.dataset.i), this.row);
      else hide();
    });
    $("messages").addEventListener("click", (event) => {
      const element = event.target.closest?.(".t");
      if (!element || !this.isOn || !this.#routingAt(element) || !getSelection().isCollapsed) return;
      this.show(this.#messageAt(element));
      this.#select(Number(element.dataset.i));
    });
    for (const id of ["messages", "picture"]) $(id).addEventListener("pointerleave", hide);
    $("scroller").addEventListener("scroll", hide);
    $("picture").addEventListener("pointermove", (event) => {
      const routing = this.#shown();
      const found = routing && this.#at(routing, event);
      if (found) this.#showTip(event, routing, found.index, found.row);
      else hide();
    });
    $("picture").addEventListener("click", (event) => {
      const found = this.#at(this.#shown(), event);
      if (found) this.#select(found.index);
    });
    $("picture").addEventListener("keydown", (event) => this.#walk(event));
    $("layer").addEventListener("change", (event) => this.#chooseLayer(Number(event.target.value)));
    $("watch").addEventListener("change", (event) => {
      this.isOn = event.target.checked;
      keepSetting("experts", this.isOn);
      this.refresh();
    });
    $("more-experts").addEventListener("click", () => {
      this.showsAll = !this.showsAll;
      this.refresh();
    });
    new ResizeObserver(() => this.grow()).observe($("picture-box"));
  }

  #chooseLayer(row) {
    this.row = row < 0 ? null : row;
    this.refresh();
  }

  /** Arrow keys on the picture: along the tokens, and through the layers. */
  #walk(event) {
    const routing = this.#shown();
    const last = routing.tokens.length - 1;
    const at = this.token ?? last;
    const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last };
    const rows = { ArrowUp: -1, ArrowDown: 1 };
    if (event.key in steps) this.#select(Math.min(last, Math.max(0, steps[event.key])));
    else if (event.key in rows) {
      this.#chooseLayer(Math.min(routing.layers.length - 1, Math.max(-1, (this.row ?? -1) + rows[event.key])));
    } else return;
    event.preventDefault();
  }
}
