// A steady load in HTTP/2, until stdin ends: PORT CA_FILE. As browsers do, requests go to another connection once the
// server has said GOAWAY; those under way are waited for.
import { readFileSync } from "node:fs";
import http2 from "node:http2";

const [port, ca] = process.argv.slice(2);
const AT_ONCE = 20;
const seen = { answered: 0, connections: 0, refused: 0, retried: 0, failures: [] };
let stopping = false;
let session = null;

function connected() {
  if (session && !session.closed && !session.destroyed) return session;
  const fresh = http2.connect(`https://localhost:${port}`, { ca: readFileSync(ca) });
  fresh.on("connect", () => (seen.connections += 1));
  fresh.on("goaway", () => session === fresh && (session = null));
  fresh.on("error", () => {});
  session = fresh;
  return fresh;
}

function ask() {
  return new Promise((resolve) => {
    const used = connected();
    const stream = used.request({ ":path": "/" });
    let status = 0;
    let body = "";
    stream.on("response", (fields) => (status = fields[":status"]));
    stream.on("data", (part) => (body += part));
    stream.on("error", () => {});
    stream.on("close", () => {
      if (status === 200 && body === "hello") seen.answered += 1;
      // What the client has not sent any more, or a server has not begun with (RFC 9113 section 8.7).
      else if (stream.rstCode === http2.constants.NGHTTP2_REFUSED_STREAM) seen.retried += 1;
      else if (used.connecting || used.socket?.connecting !== false) seen.refused += 1;
      else seen.failures.push(`${status} ${body} ${stream.rstCode}`);
      resolve();
    });
  });
}

async function keepAsking() {
  while (!stopping) {
    await ask();
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

process.stdin.on("end", () => (stopping = true)).resume();
await Promise.all(Array.from({ length: AT_ONCE }, keepAsking));
console.log(JSON.stringify(seen));
process.exit(0);
