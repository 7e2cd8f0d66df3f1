"use strict";
const proofs = JSON.parse(document.getElementById("proofs").textContent);
const tip = document.getElementById("tip"), proof = document.getElementById("proof"), said = document.getElementById("said");

// tables: a click on a title sorts by its column, numbers as numbers, empty fields last; a second click turns it around
function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
}
function order(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return typeof a === "number" ? -1 : 1;
}
for (const button of document.querySelectorAll(".sort")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort(([a], [b]) => (a === "" || b === "" || !down ? order(a, b) : order(b, a)));
    body.append(...rows.map(([, row]) => row));
  });
}

// numbers: what stands behind them
function line(list, name, text) {
  if (text === undefined || text === "") return;
  list.append(Object.assign(document.createElement("dt"), { textContent: name }));
  list.append(Object.assign(document.createElement("dd"), { textContent: text }));
}
function show(button) {
  const data = button.dataset, list = document.createElement("dl");
  said.replaceChildren(Object.assign(document.createElement("h4"), { textContent: `${data.metric}: ${button.textContent.trim()}` }), list);
  line(list, "exactly", data.exact && [data.exact, data.unit].filter(Boolean).join(" "));
  line(list, "interval", data.interval);
  line(list, "n", data.n);
  for (const place of JSON.parse(data.runs)) {
    const run = proofs[place], facts = document.createElement("dl");
    line(facts, "run", run.label);
    line(facts, "seed", String(run.seed));
    line(facts, "commit", run.commit);
    line(facts, "device", run.device);
    line(facts, "date", run.date);
    line(facts, "folder", run.place);
    said.append(facts, Object.assign(document.createElement("pre"), { textContent: run.command }));
  }
  proof.hidden = false;
}
document.addEventListener("click", (event) => {
  const button = event.target.closest(".num");
  if (button) show(button);
  else if (!event.target.closest("#proof") || event.target.id === "close") proof.hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") proof.hidden = tip.hidden = true;
});

// charts: what a point or a part of a bar says
function point(event) {
  const mark = event.target.closest && event.target.closest("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const box = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.left + box.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 4);
  tip.style.left = `${left}px`;
  tip.style.top = `${box.top - own.height - 6 > 0 ? box.top - own.height - 6 : box.bottom + 6}px`;
}
for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, point);
document.addEventListener("focusout", () => { tip.hidden = true; });
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
