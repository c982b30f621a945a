// Tables whose cells are changed in place: a reader's selection and scroll position survive an update.

export class Table {
  // `columns` are headings; one that ends with ">" holds numbers and is aligned to the right.
  constructor(parent, caption, columns, empty) {
    const frame = parent.appendChild(document.createElement("div"));
    frame.className = "table";
    frame.tabIndex = 0;  // scrolled by keyboard where it is wider than the screen
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", caption);
    const table = frame.appendChild(document.createElement("table"));
    table.createCaption().textContent = caption;
    const head = table.createTHead().insertRow();
    this.numeric = columns.map((column) => column.endsWith(">"));
    columns.forEach((column, index) => {
      const cell = head.appendChild(document.createElement("th"));
      cell.scope = "col";
      cell.textContent = column.replace(">", "");
      if (this.numeric[index]) cell.className = "number";
    });
    this.body = table.createTBody();
    this.empty = empty;
  }

  // A row is an array of cells: text, or [text, class].
  show(rows) {
    if (!rows.length) rows = [[[this.empty, "empty"]]];
    while (this.body.rows.length > rows.length) this.body.deleteRow(-1);
    rows.forEach((cells, number) => {
      const row = this.body.rows[number] ?? this.body.insertRow();
      while (row.cells.length > cells.length) row.deleteCell(-1);
      cells.forEach((content, index) => {
        const [text, look] = Array.isArray(content) ? content : [content, ""];
        const cell = row.cells[index] ?? row.insertCell();
        if (cell.textContent !== text) cell.textContent = text;
        const name = [this.numeric[index] ? "number" : "", look].join(" ").trim();
        if (cell.className !== name) cell.className = name;
      });
      row.cells[0].colSpan = cells.length === 1 ? this.numeric.length : 1;
    });
  }
}
