"use strict";
// Tables that sort and filter, and links that open what they lead to. Without this script all of a
// page is there, in the order in which it was written.
(() => {
  const LEAST = 8; // rows from which on a section is worth a filter

  const make = (tag, more) => Object.assign(document.createElement(tag), more);
  const titles = (table) => [...table.tHead.rows].at(-1); // above it may be those of groups
  const text = (row, column) => row.cells[column].textContent.trim();

  function number(said) {
    const found = said.replace("−", "-").match(/-?\d+(\.\d+)?(e[+-]?\d+)?/i);
    return found ? Number(found[0]) : NaN;
  }

  function compare(one, other, numbers, sign) {
    if (!numbers) return sign * one.localeCompare(other, undefined, { numeric: true });
    const [a, b] = [number(one), number(other)];
    // What has no number comes last, whichever way.
    return isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : sign * (a - b);
  }

  function sort(table, column) {
    const heads = [...titles(table).cells];
    const head = heads[column];
    const numbers = !head.classList.contains("text");
    const first = numbers ? "descending" : "ascending";
    const other = numbers ? "ascending" : "descending";
    const way = head.ariaSort === first ? other : first;
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    head.ariaSort = way;
    const sign = way === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(text(a, column), text(b, column), numbers, sign));
    table.tBodies[0].append(...rows);
  }

  function sortable(table) {
    [...titles(table).cells].forEach((head, column) => {
      if (!head.textContent) return;
      const button = make("button", { type: "button", title: "sort" });
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, column));
      head.append(button);
    });
  }

  function filterable(section) {
    // Rows of tables, or, where these are parts of something that links lead to, all of that.
    const named = [...section.querySelectorAll("details[id]")];
    const rows = named.length ? named : [...section.querySelectorAll("table.data > tbody > tr")];
    if (rows.length < LEAST) return;
    const groups = named.length ? [] : [...section.querySelectorAll("details")];
    const input = make("input", { type: "search", autocomplete: "off" });
    const said = make("output", { className: "quiet" });
    const label = make("label", { className: "filter" });
    label.append("Filter", input, said);
    const show = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const fits = (row) => words.every((word) => row.textContent.toLowerCase().includes(word));
      rows.forEach((row) => (row.hidden = !fits(row)));
      groups.forEach((group) => {
        const own = [...group.querySelectorAll("table.data > tbody > tr")];
        group.hidden = own.length > 0 && own.every((row) => row.hidden);
      });
      said.value = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    };
    input.addEventListener("input", show);
    show();
    let first = rows[0];
    while (first.parentElement !== section) first = first.parentElement;
    first.before(label);
  }

  function reveal(id) {
    const found = id && document.getElementById(id);
    if (!found) return;
    for (let at = found; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    found.scrollIntoView();
    const focused = found.querySelector("summary") ?? found;
    focused.focus({ preventScroll: true });
  }

  document.querySelectorAll("table.data").forEach(sortable);
  document.querySelectorAll("section").forEach(filterable);
  addEventListener("hashchange", () => reveal(location.hash.slice(1)));
  // In a frame that was handed its document a browser takes "#x" for a place on another page.
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (!link || location.protocol !== "about:") return;
    event.preventDefault();
    reveal(link.hash.slice(1));
  });
  reveal(location.hash.slice(1));
})();
