"use strict";
(() => {
  const root = document.documentElement;
  const KEY = "relock-theme";

  const remembered = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // Some browsers keep nothing for a local file.
    }
  };

  const remember = (theme) => {
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // The choice then holds until the page is left.
    }
  };

  // Before anything is drawn, so that the page doesn't flash in the other theme.
  const kept = remembered();
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;

  const button = (text, action) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.addEventListener("click", () => action(made));
    return made;
  };

  const isDark = () =>
    root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;

  const addToggle = () => {
    const name = () => (isDark() ? "Light" : "Dark");
    const toggle = button(name(), () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      remember(root.dataset.theme);
      toggle.textContent = name();
    });
    toggle.className = "theme";
    toggle.title = "Light or dark page";
    document.querySelector("header").append(toggle);
  };

  const compare = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // Nothing comes last either way.
    const numbers = [Number(a), Number(b)];
    const order = numbers.some(Number.isNaN)
      ? a.localeCompare(b, "en", { numeric: true })
      : numbers[0] - numbers[1];
    return sign * order;
  };

  const sort = (table, column) => {
    const heads = [...table.tHead.rows[0].cells];
    const up = heads[column].getAttribute("aria-sort") !== "ascending";
    const by = (row) => row.cells[column].dataset.by;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(by(a), by(b), up ? 1 : -1));
    table.tBodies[0].append(...rows);
    for (const head of heads) head.setAttribute("aria-sort", "none");
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  };

  const makeSortable = (table) => {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const text = head.textContent;
      head.textContent = "";
      head.append(button(text, () => sort(table, column)));
    });
  };

  const select = (element) => {
    const range = document.createRange();
    range.selectNodeContents(element);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };

  const addCopy = (block) => {
    const code = block.querySelector("code");
    const made = button("Copy", async (clicked) => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        clicked.textContent = "Copied";
      } catch {
        select(code); // Where the browser lets no page write, the reader copies what is selected.
        clicked.textContent = "Selected";
      }
    });
    made.className = "copy";
    made.setAttribute("aria-label", "Copy this command");
    block.prepend(made);
  };

  document.addEventListener("DOMContentLoaded", () => {
    addToggle();
    document.querySelectorAll("table.sortable").forEach(makeSortable);
    document.querySelectorAll(".runs pre").forEach(addCopy);
  });
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
