// A click on a head sorts a table: by the first number of each cell where a column has numbers, else by its text. What is
// in the order that was asked for before keeps it among equals. A second click turns the order.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-article table.docutils, .bd-article table.table")) {
    const heads = [...(table.tHead?.rows[0]?.cells ?? [])], body = table.tBodies[0];
    if (!body || body.rows.length < 6 || !table.querySelector("th.text-right")) continue;
    heads.forEach((head, at) => {
      const text = row => (row.cells[at]?.querySelector("summary") ?? row.cells[at])?.textContent.trim() ?? "";
      const value = row => parseFloat(text(row).replace(/^[~×]\s*|\*\*/g, "").replace("−", "-"));
      const sort = () => {
        const rows = [...body.rows], up = head.ariaSort !== "ascending", sign = up ? 1 : -1;
        const numbers = rows.some(row => !Number.isNaN(value(row)));
        const missing = row => numbers && Number.isNaN(value(row));
        rows.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 :
          sign * (numbers ? value(a) - value(b) : text(a).localeCompare(text(b)))));
        heads.forEach(each => each.removeAttribute("aria-sort"));
        head.ariaSort = up ? "ascending" : "descending";
        body.append(...rows);
      };
      head.tabIndex = 0;
      head.classList.add("sorts");
      head.addEventListener("click", sort);
      head.addEventListener("keydown", event => event.key === "Enter" && sort());
    });
  }
});
