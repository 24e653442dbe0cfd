"use strict";
// Sorts tables by a click on a heading. Long tables are filtered, and shown in steps, from embedded JSON.
(() => {
  const STEP = 200;
  const SHOTS = ["many", "medium", "few"];
  document.documentElement.classList.add("script");

  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };

  // Text of a cell as a value to sort by; cells without a value are last in both directions.
  const keyOf = (text, kind) => {
    if (kind === "shot") return SHOTS.indexOf(text);
    if (kind !== "number") return text.toLocaleLowerCase();
    const found = text.replace(/,/g, "").replace(/\u2212/g, "-").match(/^[-+]?[\d.]+/);
    return found ? Number(found[0]) : null;
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    const kinds = headings.map((heading) => heading.dataset.kind);
    const source = table.dataset.rows && document.getElementById(table.dataset.rows);
    const rows = source
      ? JSON.parse(source.textContent)
      : [...body.rows].map((row) => [...row.cells].map((cell) => cell.textContent));
    let visible = rows;
    let search = "";
    let limit = source ? STEP : rows.length;
    const status = make("span", { role: "status" });
    const more = make("button", { type: "button", textContent: `Show ${STEP} more` });

    const select = () => {
      visible = search ? rows.filter((row) => row[0].toLocaleLowerCase().includes(search)) : rows;
    };
    const draw = () => {
      body.replaceChildren(
        ...visible.slice(0, limit).map((row) =>
          make("tr", {}, ...row.map((text, column) => {
            const name = make("bdi", { textContent: text });
            return column ? make("td", { className: kinds[column] }, name) : make("th", { scope: "row" }, name);
          }))));
      status.textContent = `${Math.min(limit, visible.length).toLocaleString("en")} of ${visible.length.toLocaleString("en")} rows`;
      more.hidden = limit >= visible.length;
    };

    headings.forEach((heading, column) => {
      const button = make("button", { type: "button", textContent: heading.textContent });
      heading.replaceChildren(button);
      heading.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach((other) => other.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const keys = new Map(rows.map((row) => [row, keyOf(row[column], kinds[column])]));
        const compare = (first, second) => {
          const [a, b] = [keys.get(first), keys.get(second)];
          if (a === null || b === null) return (a === null) - (b === null);
          const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
          return descending ? -order : order;
        };
        rows.sort(compare);
        select();
        draw();
      });
    });

    if (source) {
      const filter = make("input", { type: "search" });
      filter.addEventListener("input", () => {
        search = filter.value.toLocaleLowerCase();
        select();
        limit = STEP;
        draw();
      });
      more.addEventListener("click", () => { limit += STEP; draw(); });
      table.closest(".scroll").before(make("p", { className: "tools" }, make("label", {}, "Filter by name: ", filter), status));
      table.closest(".scroll").after(make("p", { className: "tools" }, more));
      draw();
    }
  }
})();
