"use strict";
(() => {
  // Strings of the data reach the page through textContent and attributes alone, never as markup.
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const panel = byId("panel");
  const LISTED = 50;
  const SVG = "http://www.w3.org/2000/svg";

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const draw = (tag, attributes) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const figure = (value) => (value === undefined ? "not measured" : value.toFixed(3));
  const counted = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  // Tokens, in the order of the page: element, rows, document, pair, and where they stand in the document's text.
  const tokens = [];
  const columns = []; // [document][pair] -> tokens
  const tokenOfRow = new Map();
  const pointOfRow = new Map();
  const rings = draw("g", { class: "rings" });
  let pinned = null;
  let shownToken = null;
  let stop = null; // the one token that the Tab key reaches

  const inOneLine = (text) => {
    const line = text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
    return line.trim() === "" ? "\u2423".repeat(line.length) : line;
  };
  const labelOf = (token) => data.rows[token.rows[0]].k;

  function tokenElement(piece, index) {
    const [text, , , , state, rows] = piece;
    const label = data.rows[rows[0]].k;
    const element = make("span", `tok ${state}`, text);
    element.setAttribute("role", "button");
    element.setAttribute("aria-pressed", "false");
    element.tabIndex = -1;
    element.dataset.token = index;
    if (text === "") {
      element.classList.add("chip");
      element.dataset.label = inOneLine(label) || "\u2205";
      element.setAttribute("aria-label", label || "empty token");
    } else if (text.trim() === "") {
      element.classList.add("blank");
      if (text.includes("\n")) element.classList.add("newline");
      element.setAttribute("aria-label", text.includes("\n") ? "line break" : "blank");
    }
    return element;
  }

  function drawColumn(pieces, doc, pair) {
    const column = make("div", "text");
    column.dir = "auto";
    column.setAttribute("role", "group");
    column.setAttribute("aria-label", `Tokens of ${data.documents[doc].title}, ${data.pairs[pair]}`);
    const own = [];
    for (const piece of pieces) {
      if (typeof piece === "string") {
        column.append(make("span", "between", piece));
      } else if (typeof piece === "number") {
        const gap = make("span", "gap");
        gap.dataset.label = `\u2026 ${counted(piece, "character")} \u2026`;
        gap.setAttribute("aria-label", `${counted(piece, "character")} not stored`);
        gap.setAttribute("role", "img");
        column.append(gap);
      } else {
        const [, start, end, order, , rows] = piece;
        const token = { element: tokenElement(piece, tokens.length), rows, doc, pair, start, end, order, at: own.length };
        own.push(token);
        tokens.push(token);
        for (const row of rows) tokenOfRow.set(row, token);
        column.append(token.element);
      }
    }
    columns[doc][pair] = own;
    return column;
  }

  function drawDocuments() {
    const parts = [];
    data.documents.forEach((document_, doc) => {
      columns[doc] = data.pairs.map(() => []);
      if (!document_.whole && (doc === 0 || data.documents[doc - 1].whole)) {
        parts.push(make("h3", "between-documents", "Around the listed rows of other documents"));
      }
      const article = make("article", "document");
      const title = make("h3", "title", document_.title);
      article.append(title);
      if (!document_.same) {
        article.append(make("p", "quiet", "The models read different renderings of this document, so its tokens are not linked."));
      }
      const grid = make("div", data.pairs.length > 1 ? "columns" : "");
      document_.columns.forEach((pieces, pair) => {
        const side = make("div", "side");
        if (data.pairs.length > 1) side.append(make("h4", "", data.pairs[pair]));
        side.append(pieces === null ? make("p", "quiet", "no rows of this document") : drawColumn(pieces, doc, pair));
        grid.append(side);
      });
      article.append(grid);
      parts.push(article);
    });
    byId("documents").append(...(parts.length ? parts : [make("p", "", "No token was explained.")]));
    if (tokens.length) {
      stop = tokens[0];
      stop.element.tabIndex = 0;
    }
  }

  // The same place in another pair: the token that ends there too, or the one that covers it.
  function counterpart(token, pair) {
    if (pair === token.pair) return token;
    if (!data.documents[token.doc].same) return null;
    const others = columns[token.doc][pair];
    return (
      others.find((other) => other.end === token.end && other.order === token.order) ||
      others.find((other) => other.start < token.end && other.end >= token.end) ||
      null
    );
  }

  function describe(row, several) {
    const entry = make("div", "entry");
    if (several) entry.append(make("h5", "", `Sample ${row.i || 0}`));
    if (row.y !== undefined) {
      entry.append(make("p", "state", `Not filled in yet: a copy of row ${row.y}, taken over when the job ends`));
    } else if (row.z === "failed") {
      entry.append(make("p", "state", "In error"));
    } else if (row.x !== undefined) {
      entry.append(make("p", "words", row.x));
    } else {
      entry.append(make("p", "state", `No usable explanation: ${row.s}`));
      if (row.w !== undefined) entry.append(make("p", "words raw", row.w));
    }
    if (row.m !== undefined) entry.append(make("p", "words raw", row.m));
    const score = make("p", "scores");
    const swatch = make("span", `swatch ${row.z}`);
    swatch.setAttribute("aria-hidden", "true");
    const norm = row.n === undefined ? "" : ` \u00b7 norm ${row.n}`;
    const flags = row.f === undefined ? "" : ` \u00b7 ${row.f.join(", ").replace(/_/g, " ")}`;
    score.append(swatch, ` error ${figure(row.v)} \u00b7 cosine ${figure(row.c)}${norm}${flags}`);
    entry.append(score);
    for (const words of entry.querySelectorAll(".words")) words.dir = "auto";
    return entry;
  }

  function fillPanel(token) {
    const head = make("div", "panel-head");
    const label = make("h3", "");
    label.append(make("code", "", inOneLine(labelOf(token))));
    const first = data.rows[token.rows[0]];
    const place = first.p === undefined ? "" : `position ${first.p}, `;
    head.append(label, make("p", "quiet", `${place}${data.documents[token.doc].title}`));
    if (pinned === token) {
      const close = make("button", "close", "Unpin");
      close.type = "button";
      close.addEventListener("click", unpin);
      head.append(close);
    }
    const body = make("div", "panel-body");
    data.pairs.forEach((name, pair) => {
      const other = counterpart(token, pair);
      const block = make("section", "");
      if (data.pairs.length > 1) {
        const heading = make("h4", "", name);
        if (other && other !== token && other.end !== token.end) {
          heading.append(make("span", "quiet", ` its token: ${inOneLine(labelOf(other))}`));
        }
        block.append(heading);
      }
      if (other) block.append(...other.rows.map((i) => describe(data.rows[i], other.rows.length > 1)));
      else block.append(make("p", "quiet", "not explained"));
      body.append(block);
    });
    panel.replaceChildren(head, body);
    panel.classList.add("filled");
    panel.scrollTop = 0;
  }

  // Rings around a token's points on the map, above all points.
  function circle(token) {
    const points = token.rows.map((row) => pointOfRow.get(row)).filter(Boolean);
    rings.replaceChildren(
      ...points.map((point) =>
        draw("circle", { cx: point.getAttribute("cx"), cy: point.getAttribute("cy"), r: Number(point.getAttribute("r")) + 5 }),
      ),
    );
  }

  function mark(token, on) {
    for (let pair = 0; pair < data.pairs.length; pair += 1) {
      const other = counterpart(token, pair);
      if (other) other.element.classList.toggle("current", on);
    }
  }

  function show(token) {
    if (shownToken) mark(shownToken, false);
    shownToken = token;
    mark(token, true);
    circle(token);
    fillPanel(token);
  }

  const preview = (token) => {
    if (!pinned && token !== shownToken) show(token);
  };

  function inWords(row) {
    if (row.y !== undefined) return `not filled in yet, a copy of row ${row.y}`;
    if (row.z === "failed") return `in error, ${row.m}`;
    return (row.x ?? `no usable explanation, ${row.s}`) + (row.m === undefined ? "" : `. ${row.m}`);
  }

  function say(token) {
    const rows = token.rows.map((i) => data.rows[i]);
    const words = rows.map(inWords);
    byId("live").textContent = `${labelOf(token)}: error ${figure(rows[0].v)}. ${words.join(". ")}`;
  }

  function pin(token) {
    if (pinned) pinned.element.setAttribute("aria-pressed", "false");
    pinned = token;
    token.element.setAttribute("aria-pressed", "true");
    show(token);
    say(token);
    const row = data.rows[token.rows[0]];
    history.replaceState(null, "", `#row-${token.pair}-${row.r}`);
  }

  function unpin() {
    if (!pinned) return;
    const token = pinned;
    pinned = null;
    token.element.setAttribute("aria-pressed", "false");
    history.replaceState(null, "", "#tokens");
    fillPanel(token);
    if (document.activeElement === document.body) focus(token); // the button that had the focus is gone
    const pointed = tokenAt(document.querySelector(".tok:hover"));
    if (pointed) preview(pointed);
  }

  function focus(token, settings) {
    if (stop) stop.element.tabIndex = -1;
    stop = token;
    token.element.tabIndex = 0;
    token.element.focus(settings);
  }

  function goTo(token) {
    pin(token);
    focus(token, { preventScroll: true });
    token.element.scrollIntoView({ block: "center" });
  }

  // The token above or below: on the nearest other line, the nearest in it.
  function vertical(token, direction) {
    const own = columns[token.doc][token.pair];
    const visible = (element) => [...element.getClientRects()].filter((box) => box.width > 0);
    const from = visible(token.element)[0];
    if (!from) return undefined;
    const middle = from.left + from.width / 2;
    let line = null;
    let best = null;
    for (let i = token.at + direction; i >= 0 && i < own.length; i += direction) {
      const box = visible(own[i].element).at(direction > 0 ? 0 : -1);
      if (!box || (direction > 0 ? box.top < from.bottom - 4 : box.bottom > from.top + 4)) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > 8) break;
      const distance = Math.abs(box.left + box.width / 2 - middle);
      if (best === null || distance < best.distance) best = { token: own[i], distance };
    }
    return best?.token;
  }

  function onTokenKey(event, token) {
    const own = columns[token.doc][token.pair];
    const next = {
      ArrowRight: () => own[token.at + 1] || columns.slice(token.doc + 1).map((c) => c[token.pair]).find((c) => c.length)?.[0],
      ArrowLeft: () => own[token.at - 1] || columns.slice(0, token.doc).map((c) => c[token.pair]).findLast((c) => c.length)?.at(-1),
      ArrowDown: () => vertical(token, 1),
      ArrowUp: () => vertical(token, -1),
      Home: () => own[0],
      End: () => own.at(-1),
    }[event.key];
    if (next && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      const target = next();
      if (target) focus(target);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (pinned === token) unpin();
      else pin(token);
    }
  }

  const tokenAt = (node) => {
    const element = node instanceof Element ? node.closest("[data-token]") : null;
    return element ? tokens[element.dataset.token] : null;
  };

  function listenToTokens() {
    const area = byId("documents");
    area.addEventListener("mouseover", (event) => {
      const token = tokenAt(event.target);
      if (token) preview(token);
    });
    area.addEventListener("focusin", (event) => {
      const token = tokenAt(event.target);
      if (!token) return;
      if (stop !== token) {
        stop.element.tabIndex = -1;
        stop = token;
        token.element.tabIndex = 0;
      }
      preview(token);
      say(token);
    });
    area.addEventListener("click", (event) => {
      const token = tokenAt(event.target);
      if (!token) return;
      focus(token, { preventScroll: true });
      if (pinned === token) unpin();
      else pin(token);
    });
    area.addEventListener("keydown", (event) => {
      const token = tokenAt(event.target);
      if (token) onTokenKey(event, token);
    });
    document.addEventListener("keydown", (event) => {
      const typing = event.target instanceof HTMLInputElement;
      if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
        event.preventDefault();
        byId("q").focus();
      } else if (event.key === "Escape" && !typing) unpin();
    });
  }

  // Lists: the token's button leads to its place.
  function rowLink(index) {
    const row = data.rows[index];
    const token = tokenOfRow.get(index);
    const label = inOneLine(row.k) || "\u2205";
    if (!token) return make("code", "", label);
    const button = make("button", `jump ${row.z}`, label);
    button.type = "button";
    button.title = "Show this token";
    button.addEventListener("click", () => goTo(token));
    return button;
  }

  function drawLists() {
    for (const body of document.querySelectorAll("tbody[data-list]")) {
      for (const index of data.lists[body.dataset.job][body.dataset.list]) {
        const row = data.rows[index];
        const line = make("tr");
        const token = make("td");
        token.append(rowLink(index));
        const words = make("td", "words", row.m ?? row.x ?? `(${row.s}) ${row.w ?? ""}`);
        words.dir = "auto";
        if (row.f) words.append(make("span", "quiet", ` ${row.f.join(", ").replace(/_/g, " ")}`));
        const place = row.d === undefined ? (row.h ?? "") : data.documents[row.d].title;
        line.append(make("td", "n", figure(row.v)), token, words, make("td", "id", place), make("td", "n", row.p ?? ""));
        body.append(line);
      }
    }
  }

  // Search: every row's token and words, in lower case; what is found is outlined in the text and listed.
  const searched = data.rows.map((row) => `${row.k}\u0000${row.x ?? ""}\u0000${row.w ?? ""}\u0000${row.m ?? ""}`.toLowerCase());
  let hits = [];
  let hit = -1;

  function excerpt(row, query) {
    const text = [row.x, row.w, row.m].find((words) => words?.toLowerCase().includes(query)) ?? row.x ?? row.w ?? row.m ?? "";
    const lower = text.toLowerCase();
    const at = lower.length === text.length ? lower.indexOf(query) : -1;
    const part = make("span", "excerpt");
    part.dir = "auto";
    if (at < 0) part.append(text.slice(0, 160));
    else {
      const begin = Math.max(0, at - 60);
      part.append(
        (begin ? "\u2026" : "") + text.slice(begin, at),
        make("mark", "", text.slice(at, at + query.length)),
        text.slice(at + query.length, at + query.length + 90),
      );
    }
    return part;
  }

  function search() {
    const query = byId("q").value.toLowerCase();
    for (const token of hits) token.element.classList.remove("hit", "hit-now");
    hits = [];
    hit = -1;
    const found = byId("found");
    found.replaceChildren();
    if (query.trim() === "") {
      found.hidden = true;
      byId("hits").textContent = "";
      return;
    }
    const rows = [];
    const seen = new Set();
    searched.forEach((text, i) => {
      const token = tokenOfRow.get(i);
      if (!text.includes(query)) return;
      rows.push(i);
      if (token) seen.add(token);
    });
    hits = tokens.filter((token) => seen.has(token));
    for (const token of hits) token.element.classList.add("hit");
    for (const i of rows.slice(0, LISTED)) {
      const line = make("li");
      line.append(rowLink(i), " ", excerpt(data.rows[i], query));
      found.append(line);
    }
    if (rows.length > LISTED) found.append(make("li", "quiet", `and ${counted(rows.length - LISTED, "more row")}`));
    found.hidden = rows.length === 0;
    const documents = new Set(rows.map((i) => data.rows[i].d)).size;
    byId("hits").textContent = rows.length ? `${counted(rows.length, "row")} in ${counted(documents, "document")}` : "no row";
  }

  function step(direction) {
    if (!hits.length) return;
    if (hit >= 0) hits[hit].element.classList.remove("hit-now");
    hit = hit < 0 && direction < 0 ? hits.length - 1 : (hit + direction + hits.length) % hits.length;
    const token = hits[hit];
    token.element.classList.add("hit-now");
    pin(token);
    token.element.scrollIntoView({ block: "center" });
    byId("hits").textContent = `token ${hit + 1} of ${hits.length}`;
  }

  function listenToSearch() {
    byId("q").addEventListener("input", search);
    byId("search").addEventListener("submit", (event) => event.preventDefault());
    byId("before").addEventListener("click", () => step(-1));
    byId("after").addEventListener("click", () => step(1));
    byId("q").addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        event.preventDefault();
        step(event.shiftKey ? -1 : 1);
      } else if (event.key === "Escape") {
        byId("q").value = "";
        search();
      }
    });
  }

  // The map: a point for a row; one Tab stop, arrows go through the points of a group and on to the next.
  const WIDTH = 800;
  const HEIGHT = 520;
  const EDGE = 16;

  function drawMap() {
    if (!data.map) return;
    const plot = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": "Map of explanations" });
    const points = data.map.points.map(([x, y, group, state, rows]) => {
      const radius = Math.min(4 + Math.sqrt(rows.length), 14);
      const element = draw("circle", {
        cx: (EDGE + x * (WIDTH - 2 * EDGE)).toFixed(1),
        cy: (EDGE + (1 - y) * (HEIGHT - 2 * EDGE)).toFixed(1),
        r: radius.toFixed(1),
        class: `point ${state}`,
        role: "button",
        tabindex: -1,
        "aria-label": `${counted(rows.length, "row")}: ${data.rows[rows[0]].x}`,
      });
      for (const row of rows) pointOfRow.set(row, element);
      return { element, rows, group, x: element.cx.baseVal.value, y: element.cy.baseVal.value };
    });
    const layer = draw("g", {});
    layer.append(...points.map((point) => point.element));
    plot.append(layer, rings);
    data.map.groups.forEach((group, i) => {
      const own = points.filter((point) => point.group === i);
      const middle = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
      const number = draw("text", { x: middle(own.map((p) => p.x)), y: middle(own.map((p) => p.y)) + 9, class: "group-name" });
      number.textContent = i + 1;
      plot.append(number);
      const button = make("button", "group", group.name);
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        for (const other of byId("groups").querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-pressed", String(on));
        for (const point of points) point.element.classList.toggle("faded", on && point.group !== i);
      });
      const line = make("li");
      line.append(button, make("span", "quiet", ` n=${group.n}, mean error ${figure(group.error ?? undefined)}`));
      byId("groups").append(line);
    });
    byId("plot").append(plot);
    listenToMap(plot, points);
  }

  function listenToMap(plot, points) {
    const order = [...points].sort((a, b) => a.group - b.group || a.rows[0] - b.rows[0]);
    const at = new Map(order.map((point, i) => [point.element, i]));
    order[0].element.setAttribute("tabindex", 0);
    // The rows of a point take turns: each click or Enter leads to the next token that has this explanation.
    const tokensOf = (element) => [...new Set(order[at.get(element)].rows.map((row) => tokenOfRow.get(row)))];
    const tokenOf = (element) => (at.has(element) ? tokensOf(element)[0] : null);
    const goOn = (element) => {
      const own = tokensOf(element);
      goTo(own[(own.indexOf(pinned) + 1) % own.length]);
    };
    plot.addEventListener("mouseover", (event) => {
      const token = tokenOf(event.target);
      if (token) preview(token);
    });
    plot.addEventListener("focusin", (event) => {
      const token = tokenOf(event.target);
      if (!token) return;
      preview(token);
      say(token);
    });
    plot.addEventListener("click", (event) => {
      if (at.has(event.target)) goOn(event.target);
    });
    plot.addEventListener("keydown", (event) => {
      const i = at.get(event.target);
      if (i === undefined) return;
      const target = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: order.length - 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        goOn(event.target);
      } else if (order[target]) {
        event.preventDefault();
        order[i].element.setAttribute("tabindex", -1);
        order[target].element.setAttribute("tabindex", 0);
        preview(tokenOf(order[target].element));
        order[target].element.focus();
      }
    });
  }

  function openLink() {
    const found = /^#row-(\d+)-(\d+)$/.exec(location.hash);
    if (!found) return;
    const token = tokens.find((one) => one.pair === Number(found[1]) && one.rows.some((i) => data.rows[i].r === Number(found[2])));
    if (token) goTo(token);
  }

  panel.append(make("p", "quiet", "Point at a token, or move to it with the arrow keys, to read its explanation; click or Enter pins it."));
  drawDocuments();
  drawLists();
  drawMap();
  listenToTokens();
  listenToSearch();
  window.addEventListener("hashchange", openLink);
  openLink();
})();
