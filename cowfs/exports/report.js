"use strict";
// All that is shown is made as text, never as markup: names and contents are others'.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows, PAGE = 100;
  const KINDS = { A: "added", M: "modified", D: "deleted", R: "renamed" };
  const KIND = 0, PATH = 1, WHAT = 2, BEFORE = 3, AFTER = 4, SOURCE = 5, DIFF = 6, WHO = 7, TYPE = 8, DETAILS = 9;

  const make = (tag, attributes, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "on") for (const [event, call] of Object.entries(value)) element.addEventListener(event, call);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  const number = (value) => value.toLocaleString("en");
  const size = (bytes) => {
    if (bytes < 0) return "";
    let value = bytes, unit = 0;
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit++; }
    return (unit && value < 10 ? value.toFixed(1) : Math.round(value)) + " " + units[unit];
  };

  // --- summary
  const counts = document.getElementById("counts");
  Object.keys(KINDS).forEach((kind, at) => counts.append(
    make("div", { class: "count " + kind }, make("b", {}, number(data.counts[at])), KINDS[kind])));
  const about = document.getElementById("about");
  if (data.latest) {
    const time = new Date(data.latest * 1000).toISOString().replace("T", " ").slice(0, 19) + " UTC";
    about.append(make("dt", {}, "newest file"), make("dd", {}, time));
  }
  const bars = (place, list, shown) => {
    if (!place || !list.length) return;
    const most = Math.max(1, ...list.map((entry) => entry[1]));
    const grid = make("div", { class: "bars" });
    for (const [name, value] of list) {
      const bar = make("span", { class: "bar" });
      bar.style.width = (100 * value / most) + "%";
      grid.append(make("span", {}, name), make("span", {}, shown(value)), bar);
    }
    place.append(grid);
  };
  bars(document.getElementById("reasons"), data.reasons, size);
  bars(document.getElementById("programs"), data.programs, number);

  // --- table
  const state = { text: "", kinds: new Set("AMDR"), sort: -1, down: false, page: 0, found: [], open: new Set() };
  const place = document.getElementById("table");
  const columns = [["", KIND, "Change", "kind"], ["", PATH, "Path", "path"], ["", WHAT, "What differs", "what"],
    ["", BEFORE, "Before", "num before"], ["", AFTER, "Size", "num"]];
  if (data.recorded) columns.push(["", WHO, "Last by", "who"]);
  const filter = make("input", { type: "search", placeholder: "Filter by path, change or program", id: "filter",
    "aria-label": "Filter by path, change or program", autocomplete: "off", spellcheck: "false",
    on: { input: () => { state.text = filter.value; find(); } } });
  const toggles = Object.keys(KINDS).map((kind, at) => make("button", { type: "button", class: kind,
    "aria-pressed": "true", "data-kind": kind, on: { click: (event) => {
      const is = !state.kinds.delete(kind);
      if (is) state.kinds.add(kind);
      event.currentTarget.setAttribute("aria-pressed", String(is));
      find();
    } } }, KINDS[kind] + " " + number(data.counts[at])));
  const status = make("p", { class: "status", role: "status", id: "status" });
  const heads = columns.map(([, column, name, style]) => make("th", { scope: "col", class: style },
    make("button", { type: "button", on: { click: () => sort(column) } }, name)));
  const body = make("tbody", {});
  const previous = make("button", { type: "button", on: { click: () => turn(-1) } }, "Previous");
  const next = make("button", { type: "button", id: "next", on: { click: () => turn(1) } }, "Next");
  const where = make("span", { id: "where" });
  place.append(make("div", { class: "tools" }, filter, ...toggles), status);
  if (data.left.rows) place.append(make("p", { class: "note" }, number(data.left.rows) +
    " more changes are left out; cowfs diff lists all."));
  if (data.left.diffs) place.append(make("p", { class: "note" }, "Differences left out, because the file is large or the " +
    "report would be: " + number(data.left.diffs) + ". cowfs diff -p shows them."));
  place.append(make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body),
    make("div", { class: "pager" }, previous, next, where));

  const searched = (row) => (row[PATH] + "\n" + row[SOURCE] + "\n" + row[WHAT] + "\n" + row[WHO]).toLowerCase();
  let texts = null;
  function find() {
    const wanted = state.text.toLowerCase();
    if (wanted && !texts) texts = rows.map(searched);
    state.found = [];
    for (let at = 0; at < rows.length; at++) {
      if (state.kinds.has(rows[at][KIND]) && (!wanted || texts[at].includes(wanted))) state.found.push(at);
    }
    order();
  }
  function order() {
    const column = state.sort, sign = state.down ? -1 : 1;
    if (column >= 0) {
      state.found.sort((one, other) => {
        const a = rows[one][column], b = rows[other][column];
        return (a < b ? -1 : a > b ? 1 : 0) * sign || one - other;
      });
    }
    state.page = 0;
    show();
  }
  function sort(column) {
    if (state.sort === column) state.down = !state.down;
    else { state.sort = column; state.down = column === BEFORE || column === AFTER; }
    heads.forEach((head, at) => {
      if (columns[at][1] === column) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
      head.firstChild.textContent = columns[at][2] + (columns[at][1] !== column ? "" : state.down ? " \u2193" : " \u2191");
    });
    find();
  }
  function turn(by) { state.page += by; show(); document.getElementById("changes").scrollIntoView(); }

  function show() {
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    const part = state.found.slice(state.page * PAGE, (state.page + 1) * PAGE);
    body.replaceChildren(...part.flatMap(shown));
    status.textContent = state.found.length === rows.length ? number(rows.length) + " changes"
      : number(state.found.length) + " of " + number(rows.length) + " changes";
    previous.disabled = state.page === 0;
    next.disabled = state.page >= pages - 1;
    where.textContent = "Page " + number(state.page + 1) + " of " + number(pages);
  }
  function shown(at) {
    const row = rows[at];
    const name = row[PATH] || "/";
    const path = make("td", { class: "path" });
    const result = [make("tr", {}, make("td", { class: "kind " + row[KIND] }, KINDS[row[KIND]]), path,
      make("td", { class: "what" }, row[WHAT]), make("td", { class: "num before" }, size(row[BEFORE])),
      make("td", { class: "num" }, row[KIND] === "D" ? "" : size(row[AFTER])))];
    if (data.recorded) result[0].append(make("td", { class: "who" }, row[WHO]));
    if (row[DETAILS] || row[DIFF] >= 0) {
      path.append(make("button", { type: "button", "aria-expanded": String(state.open.has(at)),
        on: { click: (event) => toggle(at, event.currentTarget) } }, name));
    } else path.append(name);
    if (row[SOURCE]) path.append(make("span", { class: "from" }, " \u2190 " + row[SOURCE]));
    if (state.open.has(at)) result.push(details(at));
    return result;
  }
  function toggle(at, button) {
    const line = button.closest("tr");
    if (state.open.delete(at)) line.nextSibling.remove();
    else { state.open.add(at); line.after(details(at)); }
    button.setAttribute("aria-expanded", String(state.open.has(at)));
  }
  function details(at) {
    const row = rows[at];
    const cell = make("td", { colspan: columns.length }, make("div", { class: "hint" },
      [row[TYPE], row[DETAILS]].filter(Boolean).join(", ")));
    if (row[DIFF] >= 0) {
      const styles = { "+": "p", "-": "m", "@": "h", "\\": "n" };
      cell.append(make("pre", { tabindex: "0", "aria-label": "Differences" },
        ...data.diffs[row[DIFF]].replace(/\n$/, "").split("\n").map((line) => make("span", { class: styles[line[0]] || "" }, line || " "))));
    }
    return make("tr", { class: "more" }, cell);
  }

  // --- treemap: an area chosen is a path to filter by
  const map = document.getElementById("map");
  if (map) map.addEventListener("click", (event) => {
    const title = event.target.querySelector && event.target.querySelector("title");
    if (!title || event.target.tagName !== "rect") return;
    const path = title.textContent.slice(0, title.textContent.lastIndexOf(": "));
    filter.value = state.text = path === "/" ? "" : path;
    find();
    document.getElementById("changes").scrollIntoView({ behavior: "smooth" });
  });
  find();
})();
