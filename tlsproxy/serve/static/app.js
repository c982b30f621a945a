// The live status page: one document a second from /live, shown as tiles, charts and tables.

import { Chart, Linear, Logarithmic } from "/chart.js";
import { Table } from "/table.js";

const PHASES = ["client_hello", "certificate", "queue", "sign", "client", "finish"];
const SILENCE_MS = 5000;

const byId = (id) => document.getElementById(id);
const count = (value) => Math.round(value).toLocaleString("en");
const rate = (value) => (value >= 100 || value === 0 ? count(value) : value.toPrecision(2));

function duration(seconds) {
  if (seconds === 0) return "0 ms";
  if (seconds >= 1) return `${Number(seconds.toPrecision(3))} s`;
  if (seconds >= 0.001) return `${Number((seconds * 1000).toPrecision(3))} ms`;
  return `${(seconds * 1e6).toFixed(0)} µs`;
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString();
const quantiles = (values) => [values === null ? "none" : values.map(duration).join(" / "), "quantiles"];

// The state, in the heading.

const state = byId("state");
let silence = 0, last = null;

function tell(text, look) {
  // Said aloud by screen readers: only when it changes.
  if (state.textContent !== text) {
    state.textContent = text;
    document.title = `${text} - tlsproxy`;
  }
  state.className = `badge ${look}`;
  document.body.classList.toggle("stale", look === "");
}

function lost() {
  tell(last === null ? "Reconnecting" : `Reconnecting; the figures are of ${clock(last.time)}`, "");
}

const upOf = (things) => things.filter((thing) => thing.up).length;
const servers = (d) => d.upstreams.flatMap((u) => u.servers.map((server) => ({ upstream: u.name, ...server })));

function troubles(d) {
  return [["token", d.tokens], ["upstream server", servers(d)]].flatMap(([name, things]) => {
    const down = things.length - upOf(things);
    return down ? [`${down} of ${things.length} ${name}${things.length > 1 ? "s" : ""} down`] : [];
  });
}

function tellState(d) {
  const down = troubles(d);
  if (!d.ready) tell("Not ready: new clients cannot be served", "bad");
  else if (down.length) tell(`Ready; ${down.join(", ")}`, "warn");
  else tell("Ready", "good");
}

// Tiles.

const TILES = {
  "Full handshakes": (d) => [rate(d.handshakes.full), "/s"],
  "Resumed": (d) => [rate(d.handshakes.resumed), "/s"],
  "Failed": (d) => [rate(d.handshakes.failed), "/s"],
  "In flight": (d) => [count(d.handshakes.in_flight), ""],
  "Handshake p99": (d) => [d.handshakes.duration === null ? "none" : duration(d.handshakes.duration[2]), ""],
  "Requests": (d) => [rate(d.requests), "/s"],
  "Connections": (d) => [count(d.connections), ""],
  "Servers up": (d) => {
    const all = servers(d), up = upOf(all);
    return [`${up}`, ` of ${all.length}`, up < all.length ? "bad" : ""];
  },
};

const tiles = Object.entries(TILES).map(([name, read]) => {
  const tile = byId("tiles").appendChild(document.createElement("div"));
  tile.appendChild(document.createElement("dt")).textContent = name;
  const value = tile.appendChild(document.createElement("dd"));
  const number = value.appendChild(document.createElement("span"));
  const unit = value.appendChild(document.createElement("small"));
  number.textContent = "–";
  return (d) => { [number.textContent, unit.textContent, value.className = ""] = read(d); };
});

// Charts.

const rates = new Chart(byId("rates"), {
  label: "Handshakes per second", names: ["full", "resumed", "failed"], format: rate, axis: new Linear(1),
});
const durations = new Chart(byId("duration"), {
  label: "Duration of full handshakes", names: ["p50", "p95", "p99"], format: duration, axis: new Logarithmic(1e-4, 5),
});
const phases = new Chart(byId("phases"), {
  label: "Duration by phase", names: PHASES, format: duration, axis: new Logarithmic(1e-5, 6),
});
const phaseHistory = [];

function phaseValues(document_) {
  const chosen = Number(document.querySelector("input[name=quantile]:checked").value);
  return PHASES.map((phase) => document_.phases[phase]?.[chosen] ?? null);
}

function drawPhases() {
  phases.points = phaseHistory.map((d) => ({ time: d.time, values: phaseValues(d) }));
  if (phaseHistory.length) phases.draw();
}

byId("quantile").addEventListener("change", drawPhases);

// Tables.

const TABLES = [
  [
    "Tokens", ["Name", "State", "Circuit", "Signatures/s>", "Errors/s>", "Pending>", "Queue p50 / p95 / p99>", "Sign p50 / p95 / p99>"],
    (d) => d.tokens.map((t) => [
      t.name, t.up ? ["up", "good"] : ["down", "bad"], circuit(t.circuit), rate(t.signatures),
      trouble(t.errors), count(t.pending), quantiles(t.queue), quantiles(t.sign),
    ]),
  ],
  [
    "Upstreams", ["Name", "Servers", "Requests/s>", "Errors/s>", "Retries/s>", "Waiting>", "Active>", "Idle>"],
    (d) => d.upstreams.map((u) => [
      u.name, serversUp(u.servers), rate(u.requests), trouble(u.errors), rate(u.retries), count(u.waiting),
      count(u.active), count(u.idle),
    ]),
  ],
  [
    "Upstream servers", ["Address", "State", "Upstream", "Ejections, last minute>"],
    // Those that are down come first.
    (d) => servers(d).sort((a, b) => a.up - b.up).map((s) => [
      s.address, [s.state, s.up ? "good" : "bad"], s.upstream, trouble(s.ejections, count),
    ]),
  ],
  [
    "Certificates", ["Name", "Days left>", "Key", "Tokens", "For"],
    (d) => d.certificates.map((c) => [c.name, daysLeft(c.days_left), c.key_type, c.tokens.join(", "), c.names.join(", ")]),
  ],
  [
    "Listeners", ["Address", "Handshakes/s>", "Handshakes>", "Failed>", "Connections>"],
    (d) => d.listeners.map((l) => [l.address, rate(l.ok), count(l.handshakes), count(l.failed), count(l.connections)]),
  ],
  [
    "Proxy workers", ["Number", "Process>", "State"],
    (d) => d.workers.map((w) => [`${w.index}`, w.pid === null ? "none" : `${w.pid}`, w.ready ? ["ready", "good"] : ["not ready", "bad"]]),
  ],
  [
    "Failed handshakes, by result", ["Result", "Per second>"],
    (d) => Object.entries(d.handshakes.failures).map(([result, value]) => [result, trouble(value)]),
  ],
  [
    "Slowest full handshakes of the last minutes",
    ["Ended", "Took>", ...PHASES.map((phase) => `${phase}>`), "Token", "Scheme", "TLS", "Listener"],
    (d) => d.slowest.map((h) => [
      clock(h.ended_s), duration(h.duration_s),
      ...PHASES.map((phase) => duration(h.phases[`${phase}_s`])), h.token, h.scheme, h.tls_version, h.listener,
    ]),
  ],
].map(([caption, columns, rows]) => {
  const table = new Table(byId("tables"), caption, columns, "none yet");
  return (d) => table.show(rows(d));
});

function circuit(states) {
  const worst = ["open", "half_open"].find((name) => states.includes(name));
  return worst ? [worst.replace("_", " "), worst === "open" ? "bad" : "warn"] : states.join(", ") || "none";
}

function daysLeft(days) {
  if (days < 0) return ["expired", "bad"];
  return days < 14 ? [`${days}, renew now`, "warn"] : `${days}`;
}

function trouble(value, format = rate) {
  return value ? [format(value), "bad"] : "0";
}

function serversUp(all) {
  const up = upOf(all);
  return [`${up} of ${all.length} up`, up < all.length ? "bad" : "good"];
}

// The feed.

function show(d) {
  clearTimeout(silence);
  silence = setTimeout(lost, SILENCE_MS);
  // Another version has a page of its own.
  if (last !== null && last.version !== d.version) location.reload();
  last = d;
  byId("version").textContent = d.version;
  tellState(d);
  for (const update of tiles) update(d);
  rates.add(d.time, [d.handshakes.full, d.handshakes.resumed, d.handshakes.failed]);
  durations.add(d.time, d.handshakes.duration ?? [null, null, null]);
  phaseHistory.push({ time: d.time, phases: d.phases });
  while (phaseHistory[0].time < d.time - 120) phaseHistory.shift();
  drawPhases();
  for (const update of TABLES) update(d);
}

function connect() {
  const events = new EventSource("/live");
  events.onmessage = (event) => show(JSON.parse(event.data));
  events.onerror = () => {
    lost();
    // After an answer that is no event stream the browser does not try again by itself.
    if (events.readyState === EventSource.CLOSED) setTimeout(connect, 1000);
  };
}

connect();
