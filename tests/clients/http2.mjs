// Node's http2, all on one connection: PORT CA_FILE
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import http2 from "node:http2";

const [port, ca] = process.argv.slice(2);
const session = http2.connect(`https://localhost:${port}`, { ca: readFileSync(ca), maxSessionMemory: 200 });
const period = Buffer.from(Array.from({ length: 251 }, (_, index) => index));
const body = Buffer.concat(Array(41780).fill(period));

function outcome(status, parts, more = {}) {
  const all = Buffer.concat(parts);
  return { status, length: all.length, sha256: createHash("sha256").update(all).digest("hex"), ...more };
}

function ask(method, path, { headers = {}, send = [], length = false, trailers = null } = {}) {
  return new Promise((resolve, reject) => {
    const more = { informed: [], trailers: {} };
    if (length) headers["content-length"] = send.reduce((sum, piece) => sum + piece.length, 0);
    const options = { endStream: !send.length && !trailers, waitForTrailers: trailers !== null };
    const stream = session.request({ ":method": method, ":path": path, ...headers }, options);
    const parts = [];
    let status = 0;
    stream.setTimeout(30000, () => reject(new Error("timeout")));
    stream.on("headers", (fields) => more.informed.push(fields[":status"]));
    stream.on("response", (fields) => (status = fields[":status"]));
    stream.on("trailers", (fields) => (more.trailers = { ...fields }));
    stream.on("wantTrailers", () => stream.sendTrailers(trailers));
    stream.on("data", (part) => parts.push(part));
    stream.on("error", reject);
    stream.on("close", () =>
      stream.rstCode ? reject(new Error(`reset with ${stream.rstCode}`)) : resolve(outcome(status, parts, more)),
    );
    for (const piece of send) stream.write(piece);
    if (!options.endStream) stream.end();
  });
}

async function cancel() {
  const stream = session.request({ ":path": "/large" });
  await new Promise((resolve) => stream.once("data", resolve));
  stream.close(http2.constants.NGHTTP2_CANCEL);
  await new Promise((resolve) => stream.once("close", resolve));
}

async function atOnce(count, run) {
  const outcomes = await Promise.all(Array.from({ length: count }, run));
  const statuses = [...new Set(outcomes.map(({ status }) => status))];
  return { status: statuses.join(), length: outcomes.reduce((sum, { length }) => sum + length, 0) };
}

const pieces = [];
for (let start = 0; start < body.length; start += 256 * 1024) pieces.push(body.subarray(start, start + 256 * 1024));

const cases = {
  get: () => ask("GET", "/hello"),
  reuse: () => ask("GET", "/hello"),
  post: () => ask("POST", "/echo", { send: [body], length: true }),
  chunked: () => ask("POST", "/echo", { send: pieces }),
  head: () => ask("HEAD", "/hello"),
  no_content: () => ask("GET", "/204"),
  not_modified: () => ask("GET", "/304"),
  early_hints: () => ask("GET", "/hints"),
  big_header: () => ask("GET", "/hello", { headers: { "x-big": "x".repeat(40000) } }),
  slow_body: () => ask("GET", "/slow-body"),
  early_response: () => ask("POST", "/early", { send: [body], length: true }),
  dead: () => ask("GET", "/dead"),
  slow: () => ask("GET", "/never"),
  cut_length: () => ask("GET", "/cut-length"),
  cut_chunked: () => ask("GET", "/cut-chunked"),
  many: () => atOnce(90, () => ask("GET", "/hello")),
  uploads: () => atOnce(8, () => ask("POST", "/echo", { send: [body], length: true })),
  trailers: () => ask("POST", "/trailers", { send: [body], headers: { te: "trailers" }, trailers: { "x-sum": "1" } }),
  cancelled: () => Promise.all(Array.from({ length: 20 }, cancel)).then(() => ask("GET", "/hello")),
};

for (const [name, run] of Object.entries(cases)) {
  let seen;
  try {
    seen = await run();
  } catch (error) {
    seen = { error: String(error) };
  }
  console.log(JSON.stringify({ case: name, ...seen }));
}
session.close();
