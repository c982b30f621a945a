// Node's https: PORT CA_FILE
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import https from "node:https";

const [port, ca] = process.argv.slice(2);
const agent = new https.Agent({ keepAlive: true, maxSockets: 1, ca: readFileSync(ca) });
const period = Buffer.from(Array.from({ length: 251 }, (_, index) => index));
const body = Buffer.concat(Array(41780).fill(period));

function outcome(response, parts, more = {}) {
  const all = Buffer.concat(parts);
  return { status: response.statusCode, length: all.length, sha256: createHash("sha256").update(all).digest("hex"), ...more };
}

function ask(method, path, { headers = {}, send = [], length = false } = {}) {
  return new Promise((resolve, reject) => {
    const more = { informed: [] };
    if (length) headers["Content-Length"] = send.reduce((sum, piece) => sum + piece.length, 0);
    const request = https.request({ host: "localhost", port, path, method, headers, agent, timeout: 30000 });
    let answered = false;
    request.on("information", (info) => more.informed.push(info.statusCode));
    request.on("response", (response) => {
      answered = true;
      more.reused = request.reusedSocket;
      const parts = [];
      response.on("data", (part) => parts.push(part));
      response.on("end", () => (response.complete ? resolve(outcome(response, parts, more)) : reject(new Error("incomplete"))));
      response.on("error", reject);
    });
    request.on("upgrade", (response, socket, head) => {
      const parts = [head];
      socket.on("data", (part) => parts.push(part));
      socket.on("end", () => resolve(outcome(response, parts)));
      socket.on("error", reject);
    });
    request.on("error", (error) => answered || reject(error));
    for (const piece of send) request.write(piece);
    request.end();
  });
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
  big_header: () => ask("GET", "/hello", { headers: { "X-Big": "x".repeat(40000) } }),
  slow_body: () => ask("GET", "/slow-body"),
  early_response: () => ask("POST", "/early", { send: [body], length: true }),
  dead: () => ask("GET", "/dead"),
  slow: () => ask("GET", "/never"),
  cut_length: () => ask("GET", "/cut-length"),
  cut_chunked: () => ask("GET", "/cut-chunked"),
  upgrade: () => ask("GET", "/upgrade", { headers: { Connection: "Upgrade", Upgrade: "echo" } }),
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
agent.destroy();
