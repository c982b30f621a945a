// Tables whose cells are changed in place: a reader's selection and scroll position survive an update.

export class Table {
  // `columns` are headings; one that ends with ">" holds numbers and is aligned to the right.
  constructor(parent, caption, columns, empty) {
    const card = parent.appendChild(document.createElement("div"));
    card.className = "card";
    card.appendChild(document.createElement("h2")).textContent = caption;
    const frame = card.appendChild(document.createElement("div"));
    frame.className = "scrolled";
    frame.tabIndex = 0;  // by keyboard too, where the table is wider than the screen
    frame.setAttribute("role", "region");
    const table = frame.appendChild(document.createElement("table"));
    for (const named of [frame, table]) named.setAttribute("aria-label", caption);
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

  // A row is an array of cells: text, or [text, class]. The first says what the row is about.
  show(rows) {
    if (!rows.length) rows = [[[this.empty, "empty"]]];
    while (this.body.rows.length > rows.length) this.body.deleteRow(-1);
    rows.forEach((cells, number) => {
      const row = this.body.rows[number] ?? this.body.insertRow();
      if (row.cells.length !== cells.length) this.makeCells(row, cells.length);
      cells.forEach((content, index) => {
        const [text, look] = Array.isArray(content) ? content : [content, ""];
        const cell = row.cells[index];
        if (cell.textContent !== text) cell.textContent = text;
        const name = [this.numeric[index] ? "number" : "", look].join(" ").trim();
        if (cell.className !== name) cell.className = name;
      });
    });
  }

  makeCells(row, count) {
    row.replaceChildren();
    if (count === 1) {
      row.insertCell().colSpan = this.numeric.length;
      return;
    }
    row.appendChild(document.createElement("th")).scope = "row";
    for (let index = 1; index < count; index++) row.insertCell();
  }
}
