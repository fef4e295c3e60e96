"""The status page: one file, no resource from elsewhere.

Names that came over the network reach the document as text (textContent) and in
no other way.  NONCE is replaced for each answer.
"""

from __future__ import annotations

HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>NetProxy</title>
<link rel="icon" href="data:,">
<style nonce="NONCE">
:root { --ground: #f4f5f7; --card: #fff; --ink: #16191d; --soft: #5c6570; --line: #dfe3e8; --down: #1769c4; --up: #b4530a;
        --good: #1a7f3c; --warn: #9a6200; --bad: #c02626; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #111418; --card: #1a1e24; --ink: #e6e9ed; --soft: #98a2ad; --line: #2b313a; --down: #62a8f5; --up: #f0954a;
          --good: #4cc06f; --warn: #e0aa3e; --bad: #f4716d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main, header { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem .8rem; padding-top: 1rem; }
h1 { font-size: 1.3rem; margin: 0; }
h2 { font-size: .95rem; margin: 0 0 .5rem; }
.soft { color: var(--soft); }
.push { margin-left: auto; }
.pill { border-radius: 1rem; padding: .1rem .7rem; font-weight: 600; color: var(--card); background: var(--soft); }
.pill.serving { background: var(--good); } .pill.draining, .pill.starting { background: var(--warn); } .pill.gone { background: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: .85rem; }
section { margin: 0 0 1rem; min-width: 0; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; white-space: nowrap; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.name { overflow-wrap: anywhere; min-width: 8rem; }
.member { padding-left: 1.1rem; }
.up, .good { color: var(--good); } .down, .bad { color: var(--bad); } .failing, .warn { color: var(--warn); }
svg { display: block; width: 100%; height: 9rem; }
.area { fill: var(--down); opacity: .18; } .line { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
.line.d { stroke: var(--down); } .line.u { stroke: var(--up); }
.key { display: flex; gap: 1rem; font-size: .85rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .3rem; }
.key .d { background: var(--down); } .key .u { background: var(--up); }
ul { margin: 0; padding: 0; list-style: none; font-size: .9rem; }
li { padding: .25rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
li:last-child { border-bottom: 0; }
form { max-width: 26rem; margin: 4rem auto; padding: 0 1rem; }
input[type=password] { width: 100%; font: inherit; padding: .6rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--ground); color: inherit; margin: .5rem 0; }
button { font: inherit; padding: .5rem 1rem; border: 1px solid var(--line); border-radius: .4rem; background: var(--card);
  color: inherit; cursor: pointer; }
form button { background: var(--down); color: var(--card); border-color: transparent; width: 100%; margin-top: .7rem; }
[hidden] { display: none !important; }
@media (max-width: 40rem) {
  .stack thead, .spare, td:empty { display: none; }
  .stack tr { display: grid; grid-template-columns: repeat(3, 1fr); border-bottom: 1px solid var(--line); padding: .3rem 0; }
  .stack tr:last-child { border-bottom: 0; }
  .stack td { border: 0; padding: .05rem .4rem .05rem 0; text-align: left; }
  .stack td.spare { display: none; }
  .stack td.member { padding-left: 1.1rem; }
  .stack td.name { grid-column: 1 / -1; }
  .stack td.name:first-child { font-weight: 600; }
  .stack td[data-label]::before { content: attr(data-label) " "; color: var(--soft); }
}
</style>
</head>
<body>
<form id="login" hidden>
<section><h2>NetProxy</h2>
<label for="token">The token of this proxy's status page</label>
<input id="token" type="password" autocomplete="current-password" required>
<label><input id="keep" type="checkbox"> Remember it on this device</label>
<button>Show the status</button>
<p id="wrong" class="bad" role="alert"></p></section>
</form>
<div id="shown" hidden>
<header><h1>NetProxy</h1> <span id="state" class="pill"></span> <span id="about" class="soft"></span>
<button id="leave" class="push" type="button">Forget the token</button></header>
<main>
<div class="tiles" id="tiles"></div>
<section><h2>Throughput <span id="peak" class="soft"></span></h2>
<svg viewBox="0 0 600 100" preserveAspectRatio="none" role="img" aria-label="Throughput over the last minutes">
<path id="area" class="area"></path><path id="lineDown" class="line d"></path><path id="lineUp" class="line u"></path></svg>
<div class="key soft"><span><i class="d"></i>to clients</span><span><i class="u"></i>from clients</span><span id="span"></span></div></section>
<section><h2>Ways out</h2><div class="wide"><table id="ways" class="stack"></table></div></section>
<section><h2>Busiest flows <span id="many" class="soft"></span></h2><div class="wide"><table id="flows" class="stack"></table></div></section>
<div class="two">
<section><h2>Listeners</h2><div class="wide"><table id="listeners"></table></div></section>
<section><h2>Dropped and refused</h2><div class="wide"><table id="drops"></table></div></section>
</div>
<section><h2>Last errors</h2><ul id="trouble"></ul></section>
</main>
</div>
<script nonce="NONCE">
"use strict";
const EVERY = 2000, KEPT = 150, SHOWN = 15;
const at = id => document.getElementById(id);
let token = "", timer = 0, before = null, history = [];

function make(tag, text, look) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (look) node.className = look;
  return node;
}
function scaled(value, unit) {
  const steps = ["", "k", "M", "G", "T"];
  let step = 0;
  while (value >= 1000 && step < 4) { value /= 1000; step++; }
  return (step && value < 100 ? value.toFixed(1) : Math.round(value)) + " " + steps[step] + unit;
}
const bytes = value => scaled(value, "B"), rate = value => scaled(value * 8, "bit/s");
function lasted(seconds) {
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = parts.findIndex(part => seconds >= part[1]);
  if (first < 0) return "0 s";
  const some = Math.floor(seconds / parts[first][1]), rest = seconds % parts[first][1];
  const more = parts[first + 1] && Math.floor(rest / parts[first + 1][1]);
  return some + " " + parts[first][0] + (more ? " " + more + " " + parts[first + 1][0] : "");
}
function table(id, heads, rows, empty) {
  const made = make("tbody"), head = make("thead"), line = make("tr");
  for (const [text, look] of heads) line.append(make("th", text, look));
  head.append(line);
  for (const row of rows) {
    const tr = make("tr");
    row.forEach((cell, column) => {
      const [text, look] = Array.isArray(cell) ? cell : [cell, ""];
      const td = make("td", text, [heads[column][1], look].filter(Boolean).join(" "));
      if (heads[column][2]) td.dataset.label = heads[column][2];
      tr.append(td);
    });
    made.append(tr);
  }
  if (!rows.length) { const tr = make("tr"), td = make("td", empty, "soft"); td.colSpan = heads.length; tr.append(td); made.append(tr); }
  at(id).replaceChildren(...(rows.length ? [head] : []), made);
}
function tile(value, name) {
  const node = make("div", undefined, "tile");
  node.append(make("b", value), make("span", name));
  return node;
}
function wayRow(one, indent) {
  const name = [one.name, indent ? "member" : ""];
  return [name, [one.state, one.state], one.carries.join(", ") || "-", one.live, one.dialled, [one.failed, one.failed ? "warn" : ""],
          one.latency ? (one.latency * 1000).toFixed(1) + " ms" : "-", one.error];
}
function draw() {
  const peak = Math.max(1000, ...history.map(point => Math.max(point.up, point.down)));
  const x = index => 600 - (history.length - 1 - index) * (600 / (Math.max(30, history.length) - 1)), y = value => 99 - value / peak * 96;
  const path = key => history.map((point, index) => (index ? "L" : "M") + x(index).toFixed(1) + " " + y(point[key]).toFixed(1)).join("");
  at("lineDown").setAttribute("d", path("down"));
  at("lineUp").setAttribute("d", path("up"));
  at("area").setAttribute("d", history.length ? path("down") + "L600 99L" + x(0).toFixed(1) + " 99Z" : "");
  at("peak").textContent = history.length ? "peak " + rate(peak) : "";
  at("span").textContent = "last " + lasted(history.length * EVERY / 1000);
}
function show(now) {
  at("state").textContent = now.state;
  at("state").className = "pill " + now.state;
  at("about").textContent = now.version + " on " + now.host + ", up " + lasted(now.uptime);
  const past = before, seconds = past ? now.uptime - past.uptime : 0;
  let up = 0, down = 0, dropped = 0;
  if (past && seconds > 0) {
    up = Math.max(0, now.bytes.up - past.bytes.up) / seconds;
    down = Math.max(0, now.bytes.down - past.bytes.down) / seconds;
    dropped = Math.max(0, now.drops - past.drops) / seconds;
    history.push({up, down});
    history = history.slice(-KEPT);
  }
  at("tiles").replaceChildren(
    tile(rate(down), "to clients"), tile(rate(up), "from clients"), tile(now.connections, "connections"),
    tile(now.sessions, "UDP sessions"), tile(scaled(dropped, "/s"), now.drops + " datagrams dropped"), tile(bytes(now.memory), "memory, " + now.threads + " threads"));
  draw();
  const ways = [];
  for (const one of now.upstreams) {
    ways.push(wayRow(one, false));
    for (const group of one.groups) {
      if (group.name !== one.name) ways.push([[group.name, "member"], group.balance, "", "", "", "", "", ""]);
      for (const member of group.members) ways.push(wayRow(member, true));
    }
  }
  table("ways", [["name", "name"], ["state"], ["carries", "spare"], ["live", "number", "live"], ["dials", "number spare"],
                 ["failed", "number", "failed"], ["latency", "number spare"], ["last error", "name"]], ways, "none");
  const old = new Map((past ? past.flows : []).map(one => [one.id, one]));
  const flows = now.flows.map(one => {
    const then = old.get(one.id), since = then && seconds > 0 ? seconds : 0;
    const speed = key => since ? Math.max(0, one[key] - then[key]) / since : 0;
    return {...one, up: speed("sent"), down: speed("received")};
  }).sort((a, b) => b.up + b.down - a.up - a.down || b.sent + b.received - a.sent - a.received).slice(0, SHOWN);
  at("many").textContent = now.flows_live + " live";
  table("flows", [["client", "name"], ["target", "name"], ["to client", "number", "\u2193"], ["from client", "number", "\u2191"], ["in all", "number", "\u2211"],
                  ["age", "number spare"], ["way out", "name spare"]],
        flows.map(one => [(one.user ? one.user + " at " : "") + one.client, one.network + " " + one.target, rate(one.down), rate(one.up),
                          bytes(one.sent + one.received), lasted(one.age), one.upstream]), "nothing is under way");
  table("listeners", [["name"], ["address", "name"], ["live", "number"], ["accepted", "number spare"]],
        now.listeners.map(one => [one.name, one.network + " " + one.address, one.live, one.accepted]), "none");
  table("drops", [["what", "name"], ["why"], ["number", "number"]], now.trouble, "nothing");
  const trouble = [...now.notices.map(one => ({at: one.at, look: one.level === "error" ? "bad" : "warn", text: one.text})),
                   ...now.failures.map(one => ({at: one.at, look: "", text: one.target + " by " + one.upstream + ": " + one.why}))];
  trouble.sort((a, b) => b.at - a.at);
  at("trouble").replaceChildren(...trouble.slice(0, 20).map(one => {
    const li = make("li");
    li.append(make("span", new Date(one.at * 1000).toLocaleTimeString() + " ", "soft"), make("span", one.text, one.look));
    return li;
  }));
  if (!trouble.length) at("trouble").append(make("li", "none", "soft"));
  before = now;
}
function ask(message) {
  clearTimeout(timer);
  at("shown").hidden = true;
  at("login").hidden = false;
  at("wrong").textContent = message;
  at("token").focus();
}
function forget() {
  token = "";
  before = null;
  history = [];
  for (const store of [localStorage, sessionStorage]) store.removeItem("token");
}
async function look() {
  clearTimeout(timer);
  if (!document.hidden) {
    try {
      const answer = await fetch("status.json", {headers: {Authorization: "Bearer " + token}, cache: "no-store", credentials: "omit"});
      if (answer.status === 401) { forget(); ask("That is not the token."); return; }
      if (!answer.ok) throw new Error("answered " + answer.status);
      const now = await answer.json();
      at("login").hidden = true;
      at("shown").hidden = false;
      show(now);
    } catch (error) {
      at("shown").hidden = false;
      at("state").textContent = "no answer";
      at("state").className = "pill gone";
    }
  }
  timer = setTimeout(look, EVERY);
}
at("login").addEventListener("submit", event => {
  event.preventDefault();
  token = at("token").value.trim();
  (at("keep").checked ? localStorage : sessionStorage).setItem("token", token);
  at("token").value = "";
  look();
});
at("leave").addEventListener("click", () => { forget(); ask(""); });
document.addEventListener("visibilitychange", () => { if (!document.hidden && token) look(); });
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  window.history.replaceState(null, "", location.pathname);
}
token = given || sessionStorage.getItem("token") || localStorage.getItem("token") || "";
if (token) look(); else ask("");
</script>
</body>
</html>
"""
