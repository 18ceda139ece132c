// Where the model is: what each device holds of it, how full the context is, and how quick the last answer was.

const PARTS = [
  ["weight_bytes", "weights", "#56b4e9"],
  ["kv_bytes", "context", "#e69f00"],
  ["compute_bytes", "buffers", "#999999"],
];

/** Show the plan of `meta` within `root`; `stats` are those of the last answer. */
export function showPlacement(root, meta, stats) {
  const devices = meta?.placement?.devices ?? [];
  const most = Math.max(1, ...devices.map(bytesOf));
  root.replaceChildren(...devices.map((device) => deviceElement(device, most)), factList(meta, stats));
}

/** A size of memory, in powers of 1024 with three digits. */
export function memorySize(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let [value, unit] = [bytes, 0];
  while (value >= 1000 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${unit ? Number(value.toPrecision(3)) : value} ${units[unit]}`;
}

function bytesOf(device) {
  return PARTS.reduce((sum, [name]) => sum + device[name], 0);
}

function deviceElement(device, most) {
  const box = document.createElement("div");
  box.className = "device";
  const title = document.createElement("b");
  title.textContent = `${device.name}: ${memorySize(bytesOf(device))}`;
  const bar = document.createElement("span");
  bar.className = "parted";
  bar.setAttribute("aria-hidden", "true");
  let at = 0;
  const stops = PARTS.map(([name, , colour]) => {
    const from = at;
    at += (100 * device[name]) / most;
    return `${colour} ${from}% ${at}%`;
  });
  bar.style.background = `linear-gradient(to right, ${[...stops, `var(--line) ${at}% 100%`].join(", ")})`;
  const parts = PARTS.map(([name, label]) => `${label} ${memorySize(device[name])}`).join(" · ");
  box.append(title, bar, parts, document.createElement("br"), layersOf(device));
  return box;
}

function layersOf({ layers, expert_layers: experts }) {
  const counted = (n, what) => `${what} of ${n} layer${n === 1 ? "" : "s"}`;
  if (!layers && !experts) return "no layers";
  return [layers ? counted(layers, "attention") : "", experts ? counted(experts, "experts") : ""].filter(Boolean).join(", ");
}

function factList(meta, stats) {
  const facts = [];
  if (meta) facts.push(["Context", `${stats?.n_context ?? 0} of ${meta.n_ctx} tokens`]);
  if (stats?.tokens_per_s) facts.push(["Speed", `${stats.tokens_per_s.toFixed(1)} tokens/s`]);
  if (stats?.first_s !== undefined) facts.push(["First token", `after ${stats.first_s.toFixed(2)} s`]);
  if (meta?.routing) facts.push(["Experts", `${meta.routing.n_expert_used} of ${meta.routing.n_expert} for each token`]);
  const list = document.createElement("dl");
  list.className = "facts";
  for (const [name, value] of facts) {
    const term = document.createElement("dt");
    term.textContent = name;
    const text = document.createElement("dd");
    text.textContent = value;
    list.append(term, text);
  }
  return list;
}
