"use strict";
(() => {
  const data = JSON.parse(document.getElementById("routing-data").textContent);
  const nExperts = data.colours.length;
  const mostRows = 12;
  if (data.sparse) {
    const dense = (pairs) => {
      const row = new Array(nExperts).fill(0);
      for (let i = 0; i < pairs.length; i += 2) row[pairs[i]] = pairs[i + 1];
      return row;
    };
    data.texts = data.texts.map((tokens) => new Proxy(tokens, {
      get: (all, key) => (typeof key === "string" && /^\d+$/.test(key) ? all[key].map(dense) : all[key]),
    }));
  }
  const even = 1 / data.colours.length;
  const percent = (w) => (w / 10).toFixed(1) + " %";
  const mean = (rows) => rows[0].map((_, e) => rows.reduce((sum, row) => sum + row[e], 0) / rows.length);
  // all experts, or of many those with the largest shares, the largest first
  const leading = (w) => {
    const all = [...w.keys()];
    return nExperts <= mostRows ? all : all.sort((a, b) => w[b] - w[a]).slice(0, 8);
  };
  const tint = (element, e, w) => {
    const lead = even < 1 ? Math.min(1, Math.max(0, (w / 1000 - even) / (1 - even))) : 1;
    element.style.setProperty("--c", data.colours[e].join(" "));
    element.style.setProperty("--a", (0.12 + 0.43 * Math.sqrt(lead)).toFixed(3));
  };

  document.querySelectorAll("[data-number]").forEach((section) => {
    const weights = data.texts[Number(section.dataset.number)];
    const tokens = [...section.querySelectorAll(".t")];
    const detail = section.querySelector(".detail");
    const select = section.querySelector("select");
    const choice = () => (select.value === "mean" ? null : Number(select.value));

    const paint = () => tokens.forEach((token, i) => {
      const w = choice() === null ? mean(weights[i]) : weights[i][choice()];
      const top = w.indexOf(Math.max(...w));
      token.dataset.e = top;
      tint(token, top, w[top]);
      if (nExperts === 2) token.style.setProperty("--s", percent(w[0]).replace(" ", ""));
      token.title = leading(w).map((e) => `${data.names[e]}: ${percent(w[e])}`).join(", ");
    });

    const cell = (row, kind, text) => {
      const made = row.appendChild(document.createElement(kind));
      made.textContent = text;
      if (kind === "th") made.scope = row.parentNode.tagName === "THEAD" ? "col" : "row";
    };
    const show = (i) => {
      tokens.forEach((token, j) => token.classList.toggle("current", i === j));
      const table = document.createElement("table");
      const head = table.createTHead().insertRow();
      cell(head, "th", "layer");
      data.layers.forEach((layer) => cell(head, "th", layer));
      cell(head, "th", "mean");
      const average = mean(weights[i]);
      leading(average).forEach((e) => {
        const row = table.insertRow();
        cell(row, "th", data.names[e]);
        weights[i].forEach((w) => {
          cell(row, "td", w[e] ? percent(w[e]) : "–");
          if (w[e]) tint(row.lastChild, e, w[e]);
        });
        cell(row, "td", percent(average[e]));
      });
      const title = document.createElement("strong");
      title.textContent = `Token ${i + 1}: “${tokens[i].dataset.text}”`;
      detail.replaceChildren(title, table);
    };

    section.querySelector(".tokens").addEventListener("pointerover", (event) => {
      const i = tokens.indexOf(event.target);
      if (i >= 0) show(i);
    });
    section.querySelector(".tokens").addEventListener("focusin", (event) => show(Math.max(0, tokens.indexOf(event.target))));
    section.querySelector(".tokens").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = step && tokens[tokens.indexOf(document.activeElement) + step];
      if (!next) return;
      event.preventDefault();
      tokens.forEach((token) => { token.tabIndex = token === next ? 0 : -1; });
      next.focus();
    });
    select.addEventListener("change", paint);
    section.querySelector(".controls").hidden = false;
    detail.hidden = false;
    paint();
  });
})();
