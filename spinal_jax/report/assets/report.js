"use strict";
// A link to a folded section opens it; on paper every section is open.
const sections = [...document.querySelectorAll("details.section")];
const reveal = () => {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = target && target.closest("details");
  if (folded && !folded.open) {
    folded.open = true;
    target.scrollIntoView();
  }
};
addEventListener("hashchange", reveal);
reveal();
for (const link of document.querySelectorAll("nav a")) {
  link.addEventListener("click", () => { document.getElementById(link.hash.slice(1)).closest("details").open = true; });
}
addEventListener("beforeprint", () => { for (const section of sections) section.open = true; });
{
  const all = document.createElement("button");
  all.textContent = "Open all";
  all.addEventListener("click", () => {
    const open = sections.some((section) => !section.open);
    for (const section of sections) section.open = open;
    all.textContent = open ? "Fold all" : "Open all";
  });
  document.querySelector("nav").append(all);
}
// The hover targets of a figure write into the line below it.
for (const figure of document.querySelectorAll("figure")) {
  const out = figure.querySelector(":scope > .read-out");
  if (out) out.textContent = out.dataset.hint;
  for (const strip of figure.querySelectorAll(".hit")) {
    const title = strip.querySelector("title");
    const text = title.textContent;
    if (!out) continue;
    title.remove(); // the browser's own tooltip is for readers without scripts
    strip.addEventListener("pointerenter", () => { out.textContent = text; out.classList.add("on"); });
    strip.addEventListener("pointerleave", () => { out.textContent = out.dataset.hint; out.classList.remove("on"); });
  }
}
// A frame says on which side of it columns wait.
for (const scroll of document.querySelectorAll(".scroll")) {
  const frame = scroll.parentElement;
  const look = () => {
    frame.classList.toggle("before", scroll.scrollLeft > 1);
    frame.classList.toggle("after", scroll.scrollLeft + scroll.clientWidth < scroll.scrollWidth - 1);
  };
  scroll.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(scroll);
  look();
}
// A column's name sorts the rows by it, the other way the next time; rows without a value stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const key = (row) => row.cells[column].dataset.key;
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const order = (a, b) => {
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        const difference = key(a) - key(b);
        return (Number.isNaN(difference) ? key(a).localeCompare(key(b)) : difference) * (down ? -1 : 1);
      };
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    };
    const name = head.querySelector("[role=button]"); // not a <button>: browsers lose those in a head repeated in print
    name.addEventListener("click", sort);
    name.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort();
    });
  });
}
// A field over a table keeps the rows that hold all of its words, and the lines of the same names in the charts.
for (const frame of document.querySelectorAll(".frame.filtered")) {
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "Filter runs: words that a row must hold";
  field.setAttribute("aria-label", field.placeholder);
  const count = document.createElement("output");
  const bar = document.createElement("div");
  bar.className = "filter";
  bar.append(field, count);
  frame.before(bar);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...frame.querySelectorAll("tbody tr")];
    const kept = new Set();
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      if (!row.hidden) kept.add(row.cells[0].dataset.key);
    }
    count.textContent = words.length ? `${kept.size} of ${rows.length}` : "";
    for (const chart of document.querySelectorAll(".live")) if (chart.keep) chart.keep((name) => kept.has(name));
  });
}
