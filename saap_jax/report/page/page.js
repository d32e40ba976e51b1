// Sorts a table by the clicked column; a second click turns the order. What is no number goes last either way.
for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("thead th")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const number = (row) => value(row) === "inf" ? Infinity : Number(value(row) || NaN);
    const words = column < Number(/\bw(\d+)/.exec(table.className)[1]);
    const order = (a, b) => words ? value(a).localeCompare(value(b)) : Math.sign(number(a) - number(b)) || 0;
    const last = (row) => !words && Number.isNaN(number(row));
    const rows = [...body.rows].sort((a, b) => last(a) - last(b) || (down ? order(b, a) : order(a, b)));
    body.append(...rows);
  });
}
// Puts a button before each text for a machine that copies it; where the clipboard is closed, it selects the text.
for (const code of document.querySelectorAll(".code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "copy";
  button.setAttribute("aria-label", `copy: ${code.getAttribute("aria-label")}`);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "selected";
    }
  });
  code.before(button);
}
// Opens the run that an address leads to.
const show = () => document.getElementById(decodeURIComponent(location.hash.slice(1)))?.closest("details")?.setAttribute("open", "");
addEventListener("hashchange", show);
show();
