// A click on a head sorts by its column; numbers by the first number in a cell, after an arrow where
// there is one; empty cells come last.
const number = text => {
  const found = text.split("→").pop().replace(/−/g, "-").replace(/,(?=\d{3})/g, "").match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/);
  if (!found) return null;
  return parseFloat(found[0]) - (text.trim().startsWith("<") ? 1e-9 : 0);
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0], text = row => row.cells[column].innerText;
    const numeric = head.classList.contains("n");
    const compare = (a, b) => {
      if (!numeric) return text(a).localeCompare(text(b), undefined, { numeric: true }) * (down ? -1 : 1);
      const [x, y] = [number(text(a)), number(text(b))];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x - y) * (down ? -1 : 1);
    };
    [...body.rows].sort(compare).forEach(row => body.append(row));
  }));
}
