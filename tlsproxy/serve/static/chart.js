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

// An axis from 0 to the least of 1, 2, 5, 10, 20 ... times a power of ten that is not below the greatest value.
export class Linear {
  constructor(least) {
    this.least = this.top = least;
  }

  fit(greatest) {
    const value = Math.max(this.least, greatest);
    const power = 10 ** Math.floor(Math.log10(value));
    this.top = [1, 2, 5, 10].map((factor) => factor * power).find((bound) => bound >= value);
  }

  share(value) {
    return value / this.top;
  }

  get marks() {
    return [0, 0.5, 1].map((share) => share * this.top);
  }
}

// An axis of decades, always the same: what takes microseconds is seen beside what takes seconds.
export class Logarithmic {
  constructor(low, decades) {
    this.low = low;
    this.decades = decades;
    this.marks = Array.from({ length: decades + 1 }, (_, index) => low * 10 ** index);
  }

  fit() {}

  share(value) {
    return Math.min(1, Math.max(0, Math.log10(Math.max(value, this.low) / this.low) / this.decades));
  }
}

export class Chart {
  // `names` are the series; `format` makes a number text.
  constructor(parent, { label, names, format, axis }) {
    this.format = format;
    this.axis = axis;
    this.label = label;
    this.points = [];
    this.svg = svg("svg", { role: "img" }, parent);
    this.marks = axis.marks.map((value) => {
      const y = this.y(value);
      svg("line", { class: "grid", x1: LEFT, x2: "100%", y1: y, y2: y }, this.svg);
      return svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, this.svg);
    });
    svg("text", { x: LEFT, y: HEIGHT - 5 }, this.svg).textContent = `${SECONDS} s ago`;
    svg("text", { x: "100%", y: HEIGHT - 5, "text-anchor": "end" }, this.svg).textContent = "now";
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

  y(value) {
    return TOP + (1 - this.axis.share(value)) * (HEIGHT - TOP - BOTTOM);
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
    this.axis.fit(Math.max(...this.points.flatMap((point) => point.values.map((value) => value ?? 0))));
    this.axis.marks.forEach((value, index) => { this.marks[index].textContent = this.format(value); });
    this.lines.forEach((line, series) => {
      let path = "", pen = "M", previous = null;
      for (const { time, values } of this.points) {
        const value = values[series];
        // A gap in time, such as a restart of the proxy, is a gap in the line.
        if (value === null || (previous !== null && time - previous > 5)) pen = "M";
        previous = time;
        if (value === null) continue;
        const x = LEFT + (1 - (last.time - time) / SECONDS) * width;
        path += `${pen}${x.toFixed(1)} ${this.y(value).toFixed(1)}`;
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
