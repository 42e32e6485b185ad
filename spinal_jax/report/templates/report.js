"use strict";
// The hover strips of a figure write into the line below it.
for (const figure of document.querySelectorAll("figure")) {
  const out = figure.querySelector(".read-out");
  if (out) out.textContent = out.dataset.hint;
  for (const strip of figure.querySelectorAll(".hit")) {
    const title = strip.querySelector("title");
    const text = title.textContent;
    title.remove(); // the browser's own tooltip is for readers without scripts
    strip.addEventListener("pointerenter", () => { out.textContent = text; out.classList.add("live"); });
    strip.addEventListener("pointerleave", () => { out.textContent = out.dataset.hint; out.classList.remove("live"); });
  }
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
