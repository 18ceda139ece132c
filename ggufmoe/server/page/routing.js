// Which experts each token of an answer went to: collected as it comes, summed up, packed for keeping.
//
// No document: how it is shown is in experts.js.

const NEAR = 16; // characters within which a token that does not follow at once is looked for

/** The experts of one answer; `facts` are `{layers, n_expert, names}` as the server tells them. */
export class Routing {
  constructor({ layers, n_expert: nExpert, names }) {
    this.layers = layers;
    this.nExpert = nExpert;
    this.names = names ?? Array.from({ length: nExpert }, (_, expert) => `expert ${expert}`);
    this.tokens = []; // {text, start, end, experts, weights}: the latter two with `used` places for each layer
    this.used = 0;
    this.placed = 0;
    this.at = 0;
  }

  /** Add tokens as the server sends them: `{text, layers: [[[expert, share], ...], ...]}`. */
  push(entries) {
    for (const { text, layers } of entries) {
      this.used = Math.max(this.used, ...layers.map((row) => row.length));
      const experts = new Uint16Array(this.layers.length * this.used);
      const weights = new Float32Array(this.layers.length * this.used);
      layers.slice(0, this.layers.length).forEach((row, layer) => {
        row.forEach(([expert, weight], i) => {
          experts[layer * this.used + i] = expert;
          weights[layer * this.used + i] = weight;
        });
      });
      this.tokens.push({ text: String(text), start: 0, end: 0, used: this.used, experts, weights });
    }
  }

  /**
   * Find where in `text` each token stands. Text comes later than its tokens, and a part of it may not come at all: marks
   * of reasoning, spaces that are cut off, what follows a stop.
   */
  place(text, isComplete) {
    while (this.placed < this.tokens.length) {
      const token = this.tokens[this.placed];
      const found = placeOf(token.text, text, this.at, isComplete);
      if (found === null) return;
      [token.start, token.end] = found;
      this.at = token.end;
      this.placed += 1;
    }
  }

  /** The tokens that stand between two places of the text, as `{start, end, index}` counted from the first place. */
  within(from, to) {
    const found = [];
    for (let index = 0; index < this.placed; index += 1) {
      const { start, end } = this.tokens[index];
      if (end > start && start >= from && start < to) found.push({ start: start - from, end: end - from, index });
    }
    return found;
  }

  /** Share of each expert in a token: in the layer of row `row`, or in the mean of all layers (null). */
  shares(index, row = null) {
    const { used, experts, weights } = this.tokens[index];
    const sums = new Float32Array(this.nExpert);
    const [begin, end] = row === null ? [0, weights.length] : [row * used, (row + 1) * used];
    const part = row === null ? 1 / this.layers.length : 1;
    for (let i = begin; i < end; i += 1) sums[experts[i]] += weights[i] * part;
    return sums;
  }

  /** Share of each expert in all tokens; tokens that were summed up before are not looked at again. */
  totals(row = null) {
    if (this.summed?.row !== row) this.summed = { row, n: 0, sums: new Float64Array(this.nExpert) };
    const { sums } = this.summed;
    for (; this.summed.n < this.tokens.length; this.summed.n += 1) {
      this.shares(this.summed.n, row).forEach((share, expert) => { sums[expert] += share; });
    }
    return sums.map((sum) => sum / Math.max(1, this.tokens.length));
  }

  /** What the store keeps. */
  packed() {
    const { layers, nExpert, names } = this;
    const tokens = this.tokens.map(({ text, used, experts, weights }) => ({ text, used, experts, weights }));
    return { facts: { layers, n_expert: nExpert, names }, used: this.used, tokens };
  }

  static unpacked({ facts, used, tokens }) {
    const routing = new Routing(facts);
    routing.used = used;
    routing.tokens = tokens.map((token) => ({ ...token, start: 0, end: 0 }));
    return routing;
  }
}

/** [start, end] of a token in `text` from `at` on, with no length where it is not shown; null while that is open. */
export function placeOf(token, text, at, isComplete) {
  if (token === "") return [at, at];
  if (text.startsWith(token, at)) return [at, at + token.length];
  const rest = text.slice(at, at + token.length + NEAR);
  if (!isComplete && token.startsWith(rest)) return null;
  const core = token.trim();
  const found = core ? text.slice(at, at + NEAR + token.length).indexOf(core) : -1;
  if (found >= 0) return [at + found, at + found + core.length];
  return core && !isComplete && rest.length < NEAR ? null : [at, at];
}

/** The experts with the largest shares, the largest first. */
export function leading(shares, n) {
  return [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, n);
}

/** How clearly a share leads: 0 at the even share, 1 when it is all. */
export function lead(share, nExpert) {
  const even = 1 / nExpert;
  return nExpert > 1 ? Math.min(1, Math.max(0, (share - even) / (1 - even))) : 1;
}
