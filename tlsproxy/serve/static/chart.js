// A moving line chart as SVG. The drawing is for the eye; the legend beside it has the same as text.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 176, LEFT = 58, BOTTOM = 18, TOP = 8;
const SECONDS = 120;

function svg(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

// The least of 1, 2, 5, 10, 20 ... times a power of ten that is not below `value`.
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((bound) => bound >= value);
}

export class Chart {
  // `names` are the series; `format` makes a number text; `least` is the smallest upper end of the axis.
  constructor(parent, { label, names, format, least }) {
    this.format = format;
    this.least = least;
    this.label = label;
    this.points = [];
    this.svg = svg("svg", { role: "img" }, parent);
    this.marks = [0, 0.5, 1].map((share) => {
      const y = this.y(share);
      svg("line", { class: "grid", x1: LEFT, x2: "100%", y1: y, y2: y }, this.svg);
      return { share, text: svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, this.svg) };
    });
    svg("text", { x: LEFT, y: HEIGHT - 2 }, this.svg).textContent = `${SECONDS} s ago`;
    svg("text", { x: "100%", y: HEIGHT - 2, "text-anchor": "end" }, this.svg).textContent = "now";
    this.lines = names.map((_, index) => svg("path", { class: `series s${index}` }, this.svg));
    const list = parent.appendChild(document.createElement("ul"));
    list.className = "legend";
    this.values = names.map((name, index) => {
      const item = list.appendChild(document.createElement("li"));
      const sample = svg("svg", { viewBox: "0 0 28 8", "aria-hidden": "true" }, item);
      svg("line", { class: `series s${index}`, x1: 0, x2: 28, y1: 4, y2: 4 }, sample);
      item.append(`${name} `);
      return item.appendChild(document.createElement("b"));
    });
    this.names = names;
  }

  y(share) {
    return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM);
  }

  // Add what was measured at `time` (seconds): one number, or null for nothing, for each series.
  add(time, values) {
    this.points.push({ time, values });
    while (this.points[0].time < time - SECONDS) this.points.shift();
    this.draw();
  }

  // Draw `points`.
  draw() {
    const last = this.points.at(-1);
    const width = this.svg.clientWidth - LEFT;
    const greatest = Math.max(this.least, ...this.points.flatMap((point) => point.values.map((value) => value ?? 0)));
    const top = ceiling(greatest);
    for (const { share, text } of this.marks) text.textContent = this.format(share * top);
    this.lines.forEach((line, series) => {
      let path = "", pen = "M", previous = null;
      for (const { time, values } of this.points) {
        const value = values[series];
        // A gap in time, such as a restart of the proxy, is a gap in the line.
        if (value === null || (previous !== null && time - previous > 5)) pen = "M";
        previous = time;
        if (value === null) continue;
        const x = LEFT + (1 - (last.time - time) / SECONDS) * width;
        path += `${pen}${x.toFixed(1)} ${this.y(value / top).toFixed(1)}`;
        pen = "L";
      }
      line.setAttribute("d", path);
    });
    const texts = last.values.map((value) => (value === null ? "none" : this.format(value)));
    this.values.forEach((element, series) => { element.textContent = texts[series]; });
    const spoken = this.names.map((name, series) => `${name} ${texts[series]}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.label}: ${spoken}`);
  }
}
