// Sorting and filtering of tables, and what a mark of a chart is: by mouse, by arrow keys, to a screen reader.
"use strict";

const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;

const compare = (x, y) => {
  const difference = Number(x) - Number(y);
  return Number.isNaN(difference) ? x.localeCompare(y) : difference;
};

const sortBy = (table, heads, column) => {
  const descending = heads[column].getAttribute("aria-sort") === "ascending";
  heads.forEach(head => head.setAttribute("aria-sort", "none"));
  heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a, column), key(b, column)));
  table.tBodies[0].append(...(descending ? rows.reverse() : rows));
};

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sortBy(table, heads, column));
  });
}

for (const form of document.querySelectorAll("form.filters")) {
  const table = document.getElementById(form.dataset.table);
  const count = form.querySelector("output");
  const apply = () => {
    const words = form.elements.words.value.trim().toLowerCase();
    const bound = form.elements.bound.value;
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = !(row.textContent.toLowerCase().includes(words) && (!bound || row.dataset.bound === bound));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${table.tBodies[0].rows.length} layers`;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", event => event.preventDefault());
  apply();
}

// Empty rather than hidden while there is nothing to tell: what is hidden is not announced.
const tip = document.getElementById("tip");
let marked = null;

const leave = () => {
  marked?.classList.remove("at");
  marked = null;
  tip.textContent = "";
};

const tell = mark => {
  leave();
  marked = mark;
  mark.classList.add("at");
  tip.textContent = mark.dataset.words;
  const at = mark.getBoundingClientRect();
  const left = Math.min(at.right + 10, innerWidth - tip.offsetWidth - 8);
  const above = at.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 0 ? above : at.bottom + 8}px`;
};

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

for (const svg of document.querySelectorAll("figure svg")) {
  const marks = [...svg.querySelectorAll(".mark")];
  for (const mark of marks) {
    const title = mark.querySelector("title");
    mark.dataset.words = title.textContent;
    title.remove();
    mark.addEventListener("pointerenter", () => tell(mark));
    mark.addEventListener("pointerleave", leave);
  }
  if (!marks.length) continue;
  svg.tabIndex = 0;
  svg.setAttribute("aria-describedby", "keys");
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    if (event.key === "Escape") leave();
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    const next = marks.indexOf(marked) + STEPS[event.key];
    tell(marks[(next + marks.length) % marks.length]);
  });
}

addEventListener("scroll", leave, { passive: true });

// What is folded away on the screen is wanted on paper.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => { one.open = true; }));
