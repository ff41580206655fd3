"use strict";
// The page's one script. In order: the data, the state and its address, filters, the grid, the matrix and the bins,
// verdicts, the open mistake, keys. A "row" counts the mistakes, most confident first, and after them the companions
// (correct images of the same pair); an "index" is a position in the test set.
//
// Text from outside (class names, files, imported CSV) only ever becomes textContent; nothing here writes HTML.

const byId = (id) => document.getElementById(id);
const page = JSON.parse(byId("data").textContent);
const { classes, mistakes, runs, epochs } = page;
const named = page.names; // the classes as they are shown; `classes` are their true names, in addresses and in files

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function drawing(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---- data ----------------------------------------------------------------------------------------------------------

function bytes(base64) {
  const text = atob(base64);
  const result = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) result[i] = text.charCodeAt(i);
  return result;
}

/** Typed arrays are decoded when they are first asked for: most are needed only once a mistake is open. */
function arraysOf(packed) {
  const types = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };
  const decoded = {};
  return (name) => (decoded[name] ??= new types[packed[name].type](bytes(packed[name].base64).buffer));
}

const array = arraysOf(page.arrays);
const indices = array("index");
const rowOf = new Map(Array.from(indices.subarray(0, mistakes), (index, row) => [index, row]));
const truth = (row) => array("labels")[indices[row]];
const said = (row) => array("predictions")[indices[row]];
const sure = (row) => array("confidences")[indices[row]];
const doubtRank = (row) => array("doubtRank")[row]; // 0: not in doubt
const wrongIn = (row) => runs.reduce((count, _, run) => count + array("wrong")[run * mistakes + row], 0);

const number = (value) => value.toLocaleString("en");
const counted = (value, word) => `${number(value)} ${word}${value === 1 ? "" : "s"}`;
/** 0.9997 is not "100.0 %": what is short of certain never looks certain. */
function percent(value, digits = 1) {
  const text = (100 * value).toFixed(digits);
  return value < 1 && Number(text) === 100 && digits ? `> ${(100 - 10 ** -digits).toFixed(digits)} %` : `${text} %`;
}
const signed = (value, digits = 2) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
const significant = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString().replace("-", "−"));

/** A mistake's predicted class in each evaluation during training, and one word for their pattern. */
function historyOf(row) {
  const seen = epochs.map((_, epoch) => array("history")[epoch * mistakes + row]);
  const right = seen.map((label) => label === truth(row));
  const lost = right.filter((now, epoch) => epoch && right[epoch - 1] && !now).length;
  const word = !right.includes(true) ? "never" : right.at(-1) ? "last" : lost > 1 ? "flickering" : "forgotten";
  return { seen, right, lost, word };
}

const historyWords = {
  never: "never learned",
  forgotten: "forgotten",
  flickering: "flickering",
  last: "right at the last evaluation",
};
const histories = Array.from({ length: epochs.length ? mistakes : 0 }, (_, row) => historyOf(row).word);

/** One image with all pictures of a kind; `cut` shows one of them as a background, `pixels` reads one. */
function spriteOf(base64, columns) {
  const address = URL.createObjectURL(new Blob([bytes(base64)], { type: "image/webp" }));
  const image = new Image();
  image.src = address;
  const canvas = make("canvas", { width: page.side, height: page.side });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const sheet = new CSSStyleSheet();
  const name = `sprite${columns}-${document.adoptedStyleSheets.length}`;
  sheet.replaceSync(`.${name} { background-image: url("${address}"); background-size: calc(${columns} * var(--cell)) auto; }`);
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  return {
    ready: image.decode(),
    cut(slot) {
      const span = make("span", { className: `cut ${name}` });
      const x = slot % columns, y = Math.floor(slot / columns);
      span.style.backgroundPosition = `calc(${-x} * var(--cell)) calc(${-y} * var(--cell))`;
      return span;
    },
    pixels(slot) {
      const x = (slot % columns) * page.side, y = Math.floor(slot / columns) * page.side;
      context.drawImage(image, x, y, page.side, page.side, 0, 0, page.side, page.side);
      return context.getImageData(0, 0, page.side, page.side).data;
    },
  };
}

const pictures = spriteOf(byId("sprite").textContent, page.spriteColumns);

// ---- state and address ---------------------------------------------------------------------------------------------
// The address after # names the filters, the order and the open mistake. `read` turns its text into a value, or into
// undefined where it means nothing here.

const verdictWords = { network: "the network’s fault", unnameable: "nobody could name it", other: "other" };
const sortWords = { confident: "most confident first", uncertain: "least confident first", doubt: "most doubt first", index: "by index" };

const oneOf = (values) => (text) => (values.includes(text) ? text : undefined);
const whole = (least, most) => (text) =>
  /^\d{1,9}$/.test(text) && Number(text) >= least && Number(text) <= most ? Number(text) : undefined;
const className = {
  start: null,
  read: (text) => (classes.includes(text) ? classes.indexOf(text) : undefined),
  write: (label) => classes[label],
};
const settings = {
  true: className,
  predicted: className,
  confidence: {
    start: null,
    read(text) {
      const ends = /^(\d{1,3}(?:\.\d+)?)-(\d{1,3}(?:\.\d+)?)$/.exec(text)?.slice(1).map(Number);
      return ends && ends[0] <= ends[1] && ends[1] <= 100 ? ends : undefined;
    },
    write: (ends) => ends.join("-"),
  },
  bin: { start: null, read: whole(1, page.bins.length), write: String }, // counted from 1, as on the page
  learned: { start: null, read: epochs.length ? oneOf(Object.keys(historyWords)) : () => undefined, write: String },
  runs: { start: null, read: runs.length ? whole(0, runs.length) : () => undefined, write: String },
  label: { start: null, read: oneOf(["doubt"]), write: String },
  verdict: { start: null, read: oneOf(["none", ...Object.keys(verdictWords)]), write: String },
  find: { start: "", read: (text) => text.slice(0, 200), write: String },
  sort: { start: "confident", read: oneOf(Object.keys(sortWords)), write: String },
  judge: { start: false, read: (text) => (text === "1" ? true : undefined), write: () => "1" },
  open: {
    start: null,
    read: (text) => (/^\d{1,9}$/.test(text) && rowOf.has(Number(text)) ? rowOf.get(Number(text)) : undefined),
    write: (row) => String(indices[row]),
  },
};
const filterNames = ["true", "predicted", "confidence", "bin", "learned", "runs", "label", "verdict", "find"];
const state = {};

function readAddress() {
  for (const [name, setting] of Object.entries(settings)) state[name] = setting.start;
  const refused = [];
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    const value = Object.hasOwn(settings, name) ? settings[name].read(text) : undefined;
    if (value === undefined) refused.push(text ? `${name}=${text}` : name);
    else state[name] = value;
  }
  tell(refused.length ? `The link has settings that this page does not know; ignored: ${refused.join(", ")}` : "");
}

function addressOfState() {
  const parts = new URLSearchParams();
  for (const [name, setting] of Object.entries(settings)) {
    if (state[name] !== setting.start) parts.set(name, setting.write(state[name]));
  }
  return parts.size ? `#${parts}` : "";
}

let later; // a pending address: sliders and typing must not flood the history
let leaving = false; // history.back() answers later; until then the address is not ours to write

function writeAddress(replace = false) {
  clearTimeout(later);
  if (leaving || addressOfState() === location.hash) return;
  const opened = state.open !== null && (!replace || history.state?.opened === true);
  history[replace ? "replaceState" : "pushState"]({ opened }, "", addressOfState() || "#");
}

/** The one way in which the reader changes what is shown. */
function change(changes, how = "at once") {
  if (!byId("view").open) leaveView(); // a dialog that was closed says so a moment later
  Object.assign(state, changes);
  show();
  clearTimeout(later);
  if (how === "later") later = setTimeout(writeAddress, 300);
  else writeAddress(how === "replace");
}

addEventListener("popstate", () => {
  if (leaving) {
    leaving = false;
    writeAddress(); // whatever was chosen while the browser went back
  } else {
    readAddress();
    show();
  }
});

function tell(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

// ---- filters -------------------------------------------------------------------------------------------------------

const passes = {
  true: (row) => truth(row) === state.true,
  predicted: (row) => said(row) === state.predicted,
  confidence: (row) => 100 * sure(row) >= state.confidence[0] && 100 * sure(row) <= state.confidence[1],
  bin: (row) => array("bin")[row] === state.bin - 1,
  learned: (row) => histories[row] === state.learned,
  runs: (row) => wrongIn(row) === state.runs,
  label: (row) => doubtRank(row) > 0,
  verdict: (row) => (verdicts.get(row)?.verdict ?? "none") === state.verdict,
  find: (row) => found(row),
};

let wanted = { text: null, indices: null };
/** Numbers are indices; anything else is looked for in the file names. */
function found(row) {
  if (wanted.text !== state.find) {
    const numeric = /^[\d\s,;]+$/.test(state.find);
    wanted = { text: state.find, indices: numeric ? new Set(state.find.match(/\d+/g)?.map(Number)) : null };
  }
  return wanted.indices ? wanted.indices.has(indices[row]) : (page.files[row] ?? "").includes(state.find.trim());
}

/** Mistakes that every filter leaves, but for those named. Matrix and bins count without their own filter. */
function rowsWithout(...ignored) {
  const active = filterNames.filter((name) => state[name] !== settings[name].start && !ignored.includes(name));
  const rows = [];
  for (let row = 0; row < mistakes; row++) if (active.every((name) => passes[name](row))) rows.push(row);
  return rows;
}

const wordsOfFilter = {
  true: () => `true: ${named[state.true]}`,
  predicted: () => `predicted: ${named[state.predicted]}`,
  confidence: () => `confidence ${state.confidence[0]} to ${state.confidence[1]} %`,
  bin: () => `bin ${binRange(state.bin - 1)}`,
  learned: () => historyWords[state.learned],
  runs: () => `wrong in ${state.runs} of ${counted(runs.length, "run")}`,
  label: () => "label in doubt",
  verdict: () => (state.verdict === "none" ? "no verdict yet" : verdictWords[state.verdict]),
  find: () => `find “${state.find}”`,
};

function options(id, entries, name) {
  const select = byId(id);
  if (!select) return;
  select.append(...entries.map(([value, text]) => make("option", { value, textContent: text })));
  select.addEventListener("change", () => change({ [name]: select.value ? settings[name].read(select.value) : null }));
}

function prepareFilters() {
  const anyClass = [["", "any"], ...classes.map((name, label) => [name, named[label]])];
  options("true", anyClass, "true");
  options("predicted", anyClass, "predicted");
  options("learned", [["", "any history"], ...Object.entries(historyWords)], "learned");
  options("runs", [["", "any number of runs"], ...[...runs, 0].map((_, count) => [String(count), ""])], "runs");
  options("label", [["", "any"], ["doubt", ""]], "label");
  options("verdict", [["", "any"], ["none", "not judged yet"], ...Object.entries(verdictWords)], "verdict");
  options("sort", Object.entries(sortWords), "sort");
  for (const id of ["low", "high"]) {
    byId(id).addEventListener("input", () => {
      const low = Math.min(100, Math.max(0, byId("low").valueAsNumber || 0));
      const high = Math.min(100, Math.max(0, Number.isNaN(byId("high").valueAsNumber) ? 100 : byId("high").valueAsNumber));
      change({ confidence: low <= 0 && high >= 100 ? null : [low, high] }, "later");
    });
  }
  byId("find").addEventListener("input", () => change({ find: byId("find").value }, "later"));
  byId("judge").addEventListener("change", () => change({ judge: byId("judge").checked }));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
}

/** Controls follow the state, except the one that is being typed in. */
function drawFilters() {
  const values = {
    true: classes[state.true] ?? "", predicted: classes[state.predicted] ?? "", learned: state.learned ?? "",
    runs: state.runs === null ? "" : String(state.runs), label: state.label ?? "",
    verdict: state.verdict ?? "", sort: state.sort,
    low: String(state.confidence?.[0] ?? 0), high: String(state.confidence?.[1] ?? 100), find: state.find,
  };
  for (const [id, value] of Object.entries(values)) {
    const control = byId(id);
    const typing = control === document.activeElement && control.tagName === "INPUT";
    if (control && !typing) control.value = value;
  }
  byId("judge").checked = state.judge;
  if (runs.length) {
    const counts = new Array(runs.length + 1).fill(0);
    for (const row of rowsWithout("runs")) counts[wrongIn(row)]++;
    counts.forEach((count, k) => (byId("runs").options[k + 1].textContent = `${k} of ${counted(runs.length, "run")} (${number(count)})`));
  }
  byId("label").options[1].textContent = `in doubt (${number(rowsWithout("label").filter(passes.label).length)})`;
  if (epochs.length) {
    const counts = {};
    for (const row of rowsWithout("learned")) counts[histories[row]] = (counts[histories[row]] ?? 0) + 1;
    for (const option of [...byId("learned").options].slice(1)) {
      option.textContent = `${historyWords[option.value]} (${number(counts[option.value] ?? 0)})`;
    }
  }
  const active = filterNames.filter((name) => state[name] !== settings[name].start);
  const chips = active.map((name) => {
    const chip = make("button", { type: "button", textContent: `${wordsOfFilter[name]()} ×` });
    chip.setAttribute("aria-label", `Remove the filter ${wordsOfFilter[name]()}`);
    chip.addEventListener("click", () => change({ [name]: settings[name].start }));
    return chip;
  });
  if (active.length) {
    const clear = make("button", { type: "button", id: "clear", textContent: "Clear all" });
    clear.addEventListener("click", () => change(Object.fromEntries(active.map((name) => [name, settings[name].start]))));
    chips.push(clear);
  }
  byId("active").replaceChildren(...chips);
}

// ---- one tab stop, arrows inside -----------------------------------------------------------------------------------

/** `items()` may hold gaps (null), which the arrows step over. */
function roving(container, items, columns) {
  const steps = { ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: () => -columns(), ArrowDown: () => columns() };
  container.addEventListener("keydown", (event) => {
    const all = items();
    const at = all.indexOf(event.target);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    let to;
    if (event.key in steps) {
      const step = steps[event.key]();
      to = at + step;
      while (to >= 0 && to < all.length && !all[to]) to += step;
    } else if (event.key === "Home") to = all.findIndex(Boolean);
    else if (event.key === "End") to = all.findLastIndex(Boolean);
    else return;
    event.preventDefault();
    all[to]?.focus();
  });
  const stop = (item) => {
    for (const other of items()) if (other) other.tabIndex = other === item ? 0 : -1;
  };
  container.addEventListener("focusin", (event) => items().includes(event.target) && stop(event.target));
  /** After a redraw: the same stop if it is still there, else the first. */
  return () => {
    const there = items().filter(Boolean);
    stop(there.find((item) => item.getAttribute("tabindex") === "0") ?? there[0]);
  };
}

// ---- the grid ------------------------------------------------------------------------------------------------------

let visible = []; // rows in the order of the page
const tiles = [];
const hidden = (row) => state.judge && !verdicts.has(row); // its classes are not to be seen yet

function tileOf(row) {
  if (!tiles[row]) {
    tiles[row] = make("button", { type: "button", className: "tile" }, pictures.cut(row));
    tiles[row].dataset.index = indices[row];
    for (const part of ["truth", "said", "sure"]) tiles[row].append(make("span", { className: part }));
    labelTile(row);
  }
  return tiles[row];
}

function labelTile(row) {
  const tile = tiles[row];
  if (!tile) return;
  const [, first, second, third] = tile.children;
  const verdict = verdicts.get(row)?.verdict;
  tile.querySelector(".verdict-mark")?.remove();
  if (hidden(row)) {
    first.textContent = `image ${indices[row]}`;
    second.textContent = "?";
    third.textContent = "not judged yet";
    tile.setAttribute("aria-label", `Image ${indices[row]}, not judged yet`);
  } else {
    first.textContent = named[truth(row)];
    second.textContent = `→ ${named[said(row)]}`;
    third.textContent = percent(sure(row));
    const doubt = doubtRank(row);
    if (doubt) third.append(" ", make("span", { className: "doubt-mark", textContent: `?${doubt}` }));
    if (verdict) tile.append(make("span", { className: "verdict-mark", textContent: { network: "F", unnameable: "U", other: "O" }[verdict] }));
    tile.setAttribute("aria-label", `Image ${indices[row]}: true ${named[truth(row)]}, predicted ${named[said(row)]}, confidence ${percent(sure(row))}${doubt ? `, label in doubt, number ${doubt}` : ""}${verdict ? `, verdict: ${verdictWords[verdict]}` : ""}`);
  }
}

const settleGrid = roving(
  byId("grid"),
  () => visible.map((row) => tiles[row]),
  () => getComputedStyle(byId("grid")).gridTemplateColumns.split(" ").length,
);

const orders = {
  confident: (rows) => rows,
  uncertain: (rows) => rows.reverse(),
  doubt: (rows) => rows.sort((a, b) => array("doubt")[b] - array("doubt")[a]), // alike: most confident first
  index: (rows) => rows.sort((a, b) => indices[a] - indices[b]),
};

/** Calls back after the next frame has been painted. */
function afterFrame(callback) {
  requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = callback;
    channel.port2.postMessage(null);
  });
}

const atOnce = 240; // tiles in the frame that answers a filter: more than a screen holds; the others follow
let following; // the rows that are still to come

function drawGrid() {
  visible = orders[state.sort](rowsWithout());
  const grid = byId("grid");
  const rest = (following = visible.slice(atOnce));
  grid.style.minHeight = rest.length ? `${grid.offsetHeight}px` : ""; // else a reader far down would be thrown upwards
  grid.replaceChildren(...visible.slice(0, atOnce).map(tileOf));
  if (rest.length) {
    afterFrame(() => {
      if (following !== rest) return; // another filter was faster
      grid.append(...rest.map(tileOf));
      grid.style.minHeight = "";
      settleGrid();
    });
  }
  byId("nothing").hidden = visible.length > 0;
  byId("count").textContent =
    visible.length === mistakes
      ? counted(mistakes, "mistake")
      : `${number(visible.length)} of ${counted(mistakes, "mistake")}`;
  settleGrid();
}

byId("grid").addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (tile) change({ open: rowOf.get(Number(tile.dataset.index)) });
});

// ---- confusion matrix ----------------------------------------------------------------------------------------------

const cells = []; // by row of the table, headers first, null where nothing can be chosen
let settleMatrix;

function chooser(label, changes) {
  const button = make("button", { type: "button" });
  button.setAttribute("aria-label", label);
  button.addEventListener("click", () => {
    const again = Object.entries(changes).every(([name, value]) => state[name] === value);
    change(again ? Object.fromEntries(Object.keys(changes).map((name) => [name, null])) : changes);
  });
  button.changes = changes;
  return button;
}

function prepareMatrix() {
  const shown = page.matrixClasses;
  const correct = new Array(classes.length).fill(0);
  array("labels").forEach((label, index) => (correct[label] += label === array("predictions")[index] ? 1 : 0));
  const header = (label, changes, words) => {
    const button = chooser(`${words} ${named[label]}`, changes);
    button.textContent = named[label];
    button.title = classes[label];
    return button;
  };
  cells.push(null, ...shown.map((label) => header(label, { predicted: label }, "Predicted class")));
  const head = make("tr", {}, make("td"), ...cells.slice(1).map((button) => make("th", { scope: "col" }, button)));
  const body = shown.map((actual) => {
    const first = header(actual, { true: actual }, "True class");
    const line = make("tr", {}, make("th", { scope: "row" }, first));
    cells.push(first);
    for (const label of shown) {
      if (label === actual) {
        line.append(make("td", { className: "right", textContent: correct[label], title: `${correct[label]} right` }));
        cells.push(null);
      } else {
        const cell = chooser("", { true: actual, predicted: label });
        line.append(make("td", {}, cell));
        cells.push(cell);
      }
    }
    return line;
  });
  byId("matrix").append(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
  byId("matrix").style.setProperty("--longest", Math.max(...shown.map((label) => named[label].length)));
  byId("matrix").classList.toggle("many", shown.length > 12);
  settleMatrix = roving(byId("matrix"), () => cells, () => shown.length + 1);
}

function drawMatrix() {
  const counts = new Int32Array(classes.length ** 2);
  for (const row of rowsWithout("true", "predicted")) counts[truth(row) * classes.length + said(row)]++;
  const most = Math.max(1, ...counts);
  for (const cell of cells) {
    if (!cell) continue;
    const { true: actual, predicted } = cell.changes;
    if (actual !== undefined && predicted !== undefined) {
      const count = counts[actual * classes.length + predicted];
      cell.textContent = count || "";
      cell.style.setProperty("--share", count / most);
      cell.setAttribute("aria-label", `True ${named[actual]}, predicted ${named[predicted]}: ${count}`);
      cell.title = `true ${named[actual]}, predicted ${named[predicted]}: ${count}`;
      cell.dataset.count = count;
    }
    const pressed = (state.true ?? undefined) === actual && (state.predicted ?? undefined) === predicted;
    cell.setAttribute("aria-pressed", pressed);
  }
  settleMatrix();
}

// ---- calibration ---------------------------------------------------------------------------------------------------

const binButtons = [];
let settleBins;
const binRange = (bin) => `${percent(bin / page.bins.length, 0).slice(0, -2)} to ${percent((bin + 1) / page.bins.length, 0)}`;

function prepareBins() {
  const left = 30, top = 8, width = 340, height = 190, step = width / page.bins.length;
  const x = (share) => left + share * width, y = (share) => top + (1 - share) * height;
  const plot = byId("bins");
  plot.setAttribute("viewBox", `0 0 ${left + width + 6} ${top + height + 60}`);
  plot.append(
    drawing("rect", { class: "frame", x: left, y: top, width, height }),
    drawing("line", { class: "perfect", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }),
  );
  for (const share of [0, 0.5, 1]) plot.append(drawing("text", { class: "end", x: left - 5, y: y(share) + 3 }, `${100 * share}%`));
  for (const share of [0, 0.5, 1]) plot.append(drawing("text", { x: x(share), y: y(0) + 13 }, share === 0.5 ? "confidence 50%" : `${100 * share}%`));
  for (const [text, line] of [["n", 32], ["✗", 48]]) plot.append(drawing("text", { class: "start", x: 4, y: y(0) + line }, text));
  page.bins.forEach((bin, at) => {
    const middle = left + (at + 0.5) * step;
    const group = drawing("g", { class: "bin", role: "button", tabindex: "-1" },
      drawing("rect", { class: "hit", x: left + at * step, y: top, width: step, height: height + 54, rx: 3 }));
    if (bin.counts) {
      group.append(
        drawing("line", { class: "interval", x1: x(bin.confidence), x2: x(bin.confidence), y1: y(bin.low), y2: y(bin.high) }),
        drawing("circle", { cx: x(bin.confidence), cy: y(bin.accuracy), r: 4 }),
      );
    }
    group.append(
      drawing("text", { x: middle, y: y(0) + 32 }, number(bin.counts)),
      drawing("text", { class: "mistakes", x: middle, y: y(0) + 48 }),
    );
    const choose = () => change({ bin: state.bin === at + 1 ? null : at + 1 });
    group.addEventListener("click", choose);
    group.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose();
    });
    for (const kind of ["pointerenter", "focus"]) group.addEventListener(kind, () => describeBin(at));
    group.addEventListener("pointerleave", () => describeBin(state.bin === null ? null : state.bin - 1));
    binButtons.push(group);
    plot.append(group);
  });
  settleBins = roving(plot, () => binButtons, () => binButtons.length);
}

function wordsOfBin(at) {
  const bin = page.bins[at];
  if (!bin.counts) return `Confidence ${binRange(at)}: no image.`;
  return `Confidence ${binRange(at)}: ${counted(bin.counts, "image")}, mean confidence ${percent(bin.confidence)}, ${percent(bin.accuracy)} right (95 % interval ${percent(bin.low).slice(0, -2)} to ${percent(bin.high)}); ${counted(Number(binButtons[at].dataset.count), "mistake")} here.`;
}

function describeBin(at) {
  byId("bin-line").textContent = at === null ? "n: test images in the bin. ✗: its mistakes." : wordsOfBin(at);
}

function drawBins() {
  const counts = new Array(page.bins.length).fill(0);
  for (const row of rowsWithout("bin")) counts[array("bin")[row]]++;
  binButtons.forEach((group, at) => {
    group.dataset.count = counts[at];
    group.querySelector(".mistakes").textContent = number(counts[at]);
    group.setAttribute("aria-label", wordsOfBin(at));
    group.setAttribute("aria-pressed", state.bin === at + 1);
  });
  describeBin(state.bin === null ? null : state.bin - 1);
  settleBins();
}

// ---- verdicts ------------------------------------------------------------------------------------------------------
// row -> { saw: class, null (could not tell) or undefined (not asked), verdict }. Kept in the browser, where it lets
// a file keep anything, and as CSV.

const verdicts = new Map();
let cannotTell = "?"; // in a file; never a class's name
while (classes.includes(cannotTell)) cannotTell += "?";

// A spreadsheet takes what begins with one of these for a formula: in the file an apostrophe stands before it.
const formula = /^'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/;
const guarded = (text) => (formula.test(text) ? `'${text}` : text);
const unguarded = (text) => (text.startsWith("'") && formula.test(text) ? text.slice(1) : text);

const shelf = `cifar-verdicts-${page.identity}`;

function csvOfVerdicts() {
  const quote = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = [["index", "true", "predicted", "saw", "verdict"]];
  for (const [row, { saw, verdict }] of [...verdicts].sort(([a], [b]) => indices[a] - indices[b])) {
    const seen = saw === undefined ? "" : saw === null ? cannotTell : guarded(classes[saw]);
    lines.push([String(indices[row]), guarded(classes[truth(row)]), guarded(classes[said(row)]), seen, verdict ?? ""]);
  }
  return lines.map((line) => line.map(quote).join(",") + "\r\n").join("");
}

function linesOfCsv(text) {
  const lines = [[]];
  const field = /"((?:[^"]|"")*)"|([^",\r\n]*)/y;
  text = text.replace(/^\uFEFF/, "");
  for (let at = 0; at <= text.length;) {
    field.lastIndex = at;
    const [all, quoted, plain] = field.exec(text);
    lines.at(-1).push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
    at += all.length;
    const end = /^(\r\n|\n|\r)/.exec(text.slice(at, at + 2));
    if (end) lines.push([]), (at += end[0].length);
    else at += 1; // a comma, the end, or what a broken file has there
  }
  return lines.filter((line) => line.length > 1 || line[0]);
}

/** Takes what fits this page and says what does not. */
function readVerdicts(text) {
  const [header = [], ...lines] = linesOfCsv(text);
  const column = (name) => header.indexOf(name);
  if (["index", "true", "saw", "verdict"].some((name) => column(name) < 0)) return null;
  let taken = 0;
  for (const line of lines) {
    const row = /^\d+$/.test(line[column("index")]) ? rowOf.get(Number(line[column("index")])) : undefined;
    const seen = line[column("saw")] ?? "", verdict = line[column("verdict")] || undefined;
    const saw = seen === "" ? undefined : seen === cannotTell ? null : classes.indexOf(unguarded(seen));
    const fits = row !== undefined && unguarded(line[column("true")] ?? "") === classes[truth(row)] && saw !== -1;
    if (!fits || (verdict !== undefined && !Object.hasOwn(verdictWords, verdict))) continue;
    verdicts.set(row, { saw, verdict });
    taken++;
  }
  return { taken, refused: lines.length - taken };
}

function keepVerdicts() {
  try {
    localStorage.setItem(shelf, csvOfVerdicts());
  } catch {
    tell("This browser stores nothing for this file: save your verdicts as CSV before you leave.");
  }
}

function judge(row, changes) {
  const before = verdicts.get(row) ?? {};
  const after = { ...before, ...changes };
  if (changes.saw !== undefined) {
    // Only a proposal; the buttons beneath change it.
    after.verdict = changes.saw === null ? "unnameable" : changes.saw === truth(row) ? "network" : "other";
  }
  if (after.saw === undefined && after.verdict === undefined) verdicts.delete(row);
  else verdicts.set(row, after);
  keepVerdicts();
  labelTile(row);
  drawTally();
  fillView(row);
}

function drawTally() {
  const counts = { network: 0, unnameable: 0, other: 0 };
  let asked = 0, agreed = 0;
  for (const [row, { saw, verdict }] of verdicts) {
    if (verdict) counts[verdict]++;
    if (saw !== undefined) asked++;
    if (saw === truth(row)) agreed++;
  }
  const parts = Object.entries(verdictWords).map(([name, words]) => `${words} ${counts[name]}`);
  byId("tally").textContent = verdicts.size
    ? `${number(verdicts.size)} of ${number(mistakes)} judged: ${parts.join(", ")}.${asked ? ` You saw the true class in ${agreed} of ${asked}.` : ""}`
    : "Say what you see before you are told.";
}

function prepareVerdicts() {
  try {
    readVerdicts(localStorage.getItem(shelf) ?? "");
  } catch {
    // A browser that gives files no storage: said when there is something to keep.
  }
  byId("save").addEventListener("click", () => {
    const address = URL.createObjectURL(new Blob([csvOfVerdicts()], { type: "text/csv" }));
    make("a", { href: address, download: "verdicts.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  });
  byId("load").addEventListener("click", () => byId("load-file").click());
  byId("load-file").addEventListener("change", async () => {
    const [file] = byId("load-file").files;
    if (!file) return;
    const result = readVerdicts(await file.text());
    byId("load-file").value = ""; // the same file may be read again
    if (!result) return tell(`${file.name} has no columns index, true, saw and verdict; nothing was read.`);
    keepVerdicts();
    tiles.forEach((_, row) => labelTile(row));
    show();
    tell(`${counted(result.taken, "verdict")} read from ${file.name}${result.refused ? `; ${counted(result.refused, "line")} ignored: no such mistake on this page` : ""}.`);
  });
  named.forEach((name, label) => {
    const button = make("button", { type: "button", textContent: name });
    if (label < 10) button.prepend(make("kbd", { textContent: (label + 1) % 10 }), " ");
    button.addEventListener("click", () => judge(state.open, { saw: label }));
    byId("answers").append(button);
  });
  const unsure = make("button", { type: "button" }, make("kbd", { textContent: "u" }), " I cannot tell");
  unsure.addEventListener("click", () => judge(state.open, { saw: null }));
  byId("answers").append(unsure);
  for (const [name, words] of Object.entries(verdictWords)) {
    const button = make("button", { type: "button", textContent: words });
    button.dataset.verdict = name;
    button.addEventListener("click", () => chooseVerdict(name));
    byId("verdict-buttons").append(button);
  }
}

function chooseVerdict(name) {
  judge(state.open, { verdict: verdicts.get(state.open)?.verdict === name ? undefined : name });
}

// ---- the open mistake: pictures --------------------------------------------------------------------------------------

const colours = { unsigned: (value) => Math.min(255, Math.floor(256 * value)), signed: (value) => Math.round(127 + 127 * value) };

/** Colour of a value in 0..1 (unsigned) or -1..1 (signed). */
function colourOf(table, value) {
  const at = 3 * colours[table](Math.max(table === "signed" ? -1 : 0, Math.min(1, value)));
  return array(table).subarray(at, at + 3);
}

/** Draws a picture, and on it each cell of a map in one colour: true alpha blending, no interpolation. A pixel that no
    cell lies over (-1 in `mapCells`) stays as it is. */
function paint(canvas, slot, map = null, opacity = 0) {
  const side = page.side;
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const picture = pictures.pixels(slot);
  const image = context.createImageData(side, side);
  const columns = page.mapShape[1];
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      const at = 4 * (y * side + x);
      const down = page.mapCells[y], across = page.mapCells[x];
      const value = map?.values[down * columns + across];
      const colour = map && down >= 0 && across >= 0 && colourOf(map.table, map.limit > 0 ? value / map.limit : 0);
      for (let channel = 0; channel < 3; channel++) {
        const below = picture[at + channel];
        image.data[at + channel] = colour ? Math.round((1 - opacity) * below + opacity * colour[channel]) : below;
      }
      image.data[at + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

/** The maps of a row for its two targets, in the network's own units; null where the page has no room for them. */
function mapsOf(row) {
  const at = row < page.mapped ? row : row >= mistakes ? row - mistakes + page.mapped : null;
  if (at === null) return null;
  const size = page.mapShape[0] * page.mapShape[1];
  return [0, 1].map((target) => {
    const top = array("tops")[2 * at + target];
    const from = (2 * at + target) * size;
    return { top, values: Float32Array.from(array("levels").subarray(from, from + size), (level) => (level / 255) * top) };
  });
}

/** "raw maximum 0.31", or that nothing spoke for the class. */
function peakWords(row, target) {
  const peak = array("peaks")[2 * row + target];
  const name = named[array("targets")[2 * row + target]];
  return peak > 0 ? `Raw maximum ${significant(peak)}.` : `No positive evidence for ${name} (raw maximum ${significant(peak)}).`;
}

/** What a map shows: of a method that does not depend on the class, nothing of any class. */
function mapWords(row, target, part = "") {
  if (page.ofNoClass) return `Where the layer was most active. Raw maximum ${significant(array("peaks")[2 * row])}.`;
  return `Raised the score of ${named[array("targets")[2 * row + target]]}${part}. ${peakWords(row, target)}`;
}

let mapLine; // what the template says of the maps

function drawMaps() {
  const row = state.open;
  const maps = mapsOf(row);
  const opacity = byId("opacity").valueAsNumber;
  byId("opacity-shown").textContent = percent(opacity, 0);
  const pageWide = document.querySelector("input[name=scale]:checked").value === "page";
  drawCompanion(row, opacity, pageWide);
  byId("maps").querySelector(".figures").hidden = !maps;
  mapLine ??= byId("map-line").textContent;
  byId("map-line").textContent = maps ? mapLine : `The page has room for the maps of the ${number(page.mapped)} most confident mistakes; this one is not among them.`;
  if (!maps) return;
  const limit = pageWide ? page.pageTop : Math.max(maps[0].top, maps[1].top);
  const difference = maps[0].values.map((value, cell) => value - maps[1].values[cell]);
  const reach = pageWide ? page.pageDifference : Math.max(...difference.map(Math.abs));
  const names = [0, 1].map((target) => named[array("targets")[2 * row + target]]);
  const panels = [
    ["map-predicted", { table: "unsigned", values: maps[0].values, limit }, mapWords(row, 0, " (predicted)"), ["0", significant(limit)]],
    ["map-true", { table: "unsigned", values: maps[1].values, limit }, mapWords(row, 1, " (true)"), ["0", significant(limit)]],
    ["map-difference", { table: "signed", values: difference, limit: reach }, `Difference. Red: raised ${names[0]} more. Blue: raised ${names[1]} more.`, [`−${significant(reach)}`, "0", significant(reach)]],
  ];
  paint(byId("map-none"), row);
  for (const [id, map, words, ends] of panels) {
    paint(byId(id), row, map, opacity);
    const figure = byId(id).parentElement;
    figure.querySelector(".ends")?.remove();
    figure.querySelector(".legend").after(make("div", { className: "ends" }, ...ends.map((text) => make("span", { textContent: text }))));
    figure.querySelector("figcaption").textContent = words;
    byId(id).setAttribute("role", "img");
    byId(id).setAttribute("aria-label", words);
  }
}

function drawCompanion(row, opacity, pageWide) {
  const companion = array("companion")[row];
  byId("companion").hidden = companion < 0;
  if (companion < 0) {
    byId("companion-line").textContent = "There is no right answer for this pair to compare with.";
    return;
  }
  const other = mistakes + companion;
  const maps = mapsOf(other);
  const limit = pageWide ? page.pageTop : Math.max(maps[0].top, maps[1].top);
  byId("companion-line").textContent = `Image ${indices[other]} is ${named[truth(other)]}, and the network says ${named[said(other)]} (${percent(sure(other))}). If its maps look like those above, they explain little. Colours go from 0 to ${significant(limit)}.`;
  const words = ["The picture.", mapWords(other, 0), mapWords(other, 1)];
  ["companion-picture", "companion-predicted", "companion-other"].forEach((id, at) => {
    const map = at ? { table: "unsigned", values: maps[at - 1].values, limit } : null;
    paint(byId(id), other, map, opacity);
    byId(id).parentElement.querySelector("figcaption").textContent = words[at];
    byId(id).setAttribute("role", "img");
    byId(id).setAttribute("aria-label", words[at]);
  });
}

function drawLegends() {
  for (const canvas of document.querySelectorAll(".legend")) {
    canvas.width = 255;
    canvas.height = 1;
    const context = canvas.getContext("2d");
    const image = context.createImageData(255, 1);
    for (let x = 0; x < 255; x++) {
      const value = canvas.dataset.table === "signed" ? x / 127 - 1 : x / 254;
      image.data.set([...colourOf(canvas.dataset.table, value), 255], 4 * x);
    }
    context.putImageData(image, 0, 0);
  }
}

/** Black or white, whichever reads better on a colour (WCAG relative luminance). */
function inkOn(colour) {
  const [red, green, blue] = [...colour].map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000" : "#fff";
}

function drawVotes(row) {
  const [rows, columns] = page.voteShape;
  const votes = array("votes").subarray(row * rows * columns, (row + 1) * rows * columns);
  const most = Math.max(...votes.map(Math.abs));
  // The table lies in its square as the cells lie on the picture; a cell that is not cut by an edge is --vote wide.
  const long = (pixels) => `calc(var(--vote) * ${pixels / page.voteStride})`;
  const [before] = page.voteSpans[0], [start, pixels] = page.voteSpans.at(-1);
  const square = byId("votes").parentElement;
  square.style.width = square.style.height = long(page.side);
  byId("votes").style.width = long(start + pixels - before);
  byId("votes").style.margin = `${long(before)} 0 0 ${long(before)}`;
  byId("votes").replaceChildren(...Array.from({ length: rows }, (_, y) =>
    make("tr", {}, ...Array.from({ length: columns }, (_, x) => {
      const vote = votes[y * columns + x];
      const cell = make("td", { textContent: signed(vote) });
      const colour = colourOf("signed", most > 0 ? vote / most : 0);
      cell.style.backgroundColor = `rgb(${colour.join(" ")})`;
      cell.style.color = inkOn(colour);
      cell.style.width = long(page.voteSpans[x][1]);
      cell.style.height = long(page.voteSpans[y][1]);
      cell.dataset.vote = vote;
      return cell;
    }))));
  const sum = votes.reduce((total, vote) => total + vote, 0);
  const bias = array("bias")[row], margin = array("margins")[row];
  const [predicted, actual] = [0, 1].map((target) => named[array("targets")[2 * row + target]]);
  const strong = make("b", { textContent: signed(margin, 3) });
  strong.id = "margin";
  byId("sum").replaceChildren(`cells ${signed(sum, 3)}, bias ${signed(bias, 3)}: margin `, strong);
  const off = Math.abs(sum + bias - margin);
  byId("sum-words").textContent = off > 1e-3 * Math.max(1, Math.abs(margin))
    ? `These do not add up: the cells and the bias give ${signed(sum + bias, 3)}. Trust the margin, not the cells.`
    : `The margin is the score of ${predicted} less that of ${actual}. Each number is what its cell of the last stage (${rows} × ${columns}) added to it, exactly: red for ${predicted}, blue for ${actual}. Numbers are rounded as shown.`;
}

// ---- the open mistake: words and numbers -----------------------------------------------------------------------------

function drawProbabilities(row) {
  const values = array("probabilities").subarray(row * classes.length, (row + 1) * classes.length);
  const sorted = [...classes.keys()].sort((a, b) => values[b] - values[a]);
  const shown = sorted.filter((label, at) => at < 12 || label === truth(row));
  const lines = shown.map((label) => {
    const part = label === said(row) ? "predicted" : label === truth(row) ? "true" : "";
    const bar = make("div", { className: "bar" });
    bar.style.setProperty("--share", values[label]);
    const name = make("div", { className: "named" }, make("span", { textContent: named[label] }), make("b", { textContent: part }));
    return make("tr", { className: part }, make("th", { scope: "row", title: classes[label] }, name), make("td", {}, bar), make("td", { textContent: percent(values[label], 2) }));
  });
  if (shown.length < classes.length) {
    const rest = sorted.filter((label) => !shown.includes(label)).reduce((sum, label) => sum + values[label], 0);
    lines.push(make("tr", {}, make("th", { scope: "row", textContent: `${classes.length - shown.length} others` }), make("td"), make("td", { textContent: percent(rest, 2) })));
  }
  byId("probabilities").replaceChildren(...lines);
}

// Three letters where they tell the classes apart, else the class's number; the whole name is in the title.
const beginnings = named.map((name) => [...name.replace(/[\u2068\u2069]/g, "")].slice(0, 3).join(""));
const shortNames = new Set(beginnings).size === classes.length ? beginnings : classes.map((_, label) => `#${label}`);

function drawHistory(row) {
  if (!epochs.length) {
    byId("history-line").textContent = "The run has no predictions by epoch.";
    return;
  }
  const { seen, right, lost, word } = historyOf(row);
  const times = right.filter(Boolean).length;
  const sentences = {
    never: `Never learned: right after none of ${counted(epochs.length, "evaluated epoch")}.`,
    forgotten: `Forgotten: right after ${times} of ${counted(epochs.length, "evaluated epoch")}, the last time after epoch ${epochs[right.lastIndexOf(true)]}.`,
    flickering: `Flickering: right after ${times} of ${counted(epochs.length, "evaluated epoch")}, and lost ${lost} times.`,
    last: `Right after ${times} of ${counted(epochs.length, "evaluated epoch")}, the last among them; the answer here differs from that evaluation.`,
  };
  byId("history-line").textContent = sentences[word];
  byId("history").replaceChildren(...seen.map((label, at) => {
    const words = `Epoch ${epochs[at]}: ${right[at] ? "right" : named[label]}`;
    const item = make("li", { className: right[at] ? "right" : "", title: words }, make("span", { textContent: epochs[at] }), right[at] ? "✓" : shortNames[label]);
    item.setAttribute("aria-label", words);
    return item;
  }));
}

function drawRuns(row) {
  byId("runs-line").hidden = !runs.length;
  if (!runs.length) return;
  const parts = runs.map((run, at) => `${run} ${array("wrong")[at * mistakes + row] ? "wrong" : "right"}`);
  byId("runs-line").textContent = `Wrong in ${wrongIn(row)} of ${counted(runs.length, "compared run")}: ${parts.join(", ")}.`;
}

function drawDoubt(row) {
  const rank = doubtRank(row), doubt = array("doubt")[row].toFixed(2);
  const all = array("doubtRank").reduce((count, other) => count + (other > 0), 0);
  const several = page.doubtParts.length > 1 ? ", the mean of" : "";
  byId("doubt-line").textContent = rank
    ? `In doubt, number ${number(rank)} of ${number(all)}. Doubt ${doubt}${several}:`
    : `Not in doubt, which begins at ${page.doubtful}. Doubt ${doubt}${several}:`;
  const own = array("probabilities")[row * classes.length + truth(row)];
  const reasons = {
    network: () => `The network’s probability of ${named[truth(row)]} is ${percent(own, 2)}; the average for images with this label is ${percent(page.usual[truth(row)], 2)}.`,
    neighbours: (part) => `${Math.round(part * page.nearest.compared)} of the ${page.nearest.compared} nearest training images have another label.`,
    runs: () => `${wrongIn(row)} of ${counted(runs.length, "compared run")} predict another class.`,
  };
  byId("doubt-parts").replaceChildren(...page.doubtParts.map((name, at) => {
    const part = array("doubtParts")[at * mistakes + row];
    return make("li", {}, make("b", { textContent: part.toFixed(2) }), ` ${reasons[name](part)}`);
  }));
}

let nearest; // built when a mistake is first opened: it has a sprite of its own
function drawNeighbours(row) {
  byId("neighbours").hidden = !page.nearest;
  if (!page.nearest) return;
  const { depth } = page.nearest;
  nearest ??= { array: arraysOf(page.nearest.arrays), sprite: spriteOf(page.nearest.sprite, page.nearest.spriteColumns) };
  const at = (name, place) => nearest.array(name)[row * depth + place];
  const places = Array.from({ length: depth }, (_, place) => place).filter((place) => at("index", place) >= 0);
  byId("nearest").replaceChildren(...places.map((place) => {
    const label = at("labels", place);
    const part = label === truth(row) ? " true-word" : label === said(row) ? " said-word" : "";
    return make("figure", { title: `training image ${at("index", place)}` },
      nearest.sprite.cut(at("slot", place)),
      make("span", { className: part, textContent: named[label] }),
      make("span", { className: "quiet", textContent: at("distances", place).toFixed(3) }));
  }));
  const labels = places.map((place) => at("labels", place));
  const count = (label) => labels.filter((other) => other === label).length;
  const fewer = depth < page.nearest.found ? ` The page has room for ${depth} of ${page.nearest.found}.` : "";
  const twin = page.nearest.nearDuplicates.includes(indices[row]) ? " This image has a near-duplicate among the training images." : "";
  byId("nearest-line").textContent = `Nearest first, with their labels and distances (1 − cosine) in the network’s feature space: ${count(truth(row))} of ${places.length} are ${named[truth(row)]}, ${count(said(row))} are ${named[said(row)]}.${twin}${fewer}`;
}

function fillView(row) {
  const secret = hidden(row);
  const view = byId("view");
  view.classList.toggle("judging", secret);
  const title = secret
    ? [`Image ${indices[row]}`]
    : [`Image ${indices[row]}: true `, make("span", { className: "true-word", textContent: named[truth(row)] }), ", predicted ", make("span", { className: "said-word", textContent: named[said(row)] }), `, confidence ${percent(sure(row))}`];
  byId("view-title").replaceChildren(...title);
  const place = visible.indexOf(row);
  byId("place").textContent = place < 0 ? "outside the filters" : `${number(place + 1)} of ${number(visible.length)}`;
  byId("previous").setAttribute("aria-disabled", place <= 0);
  byId("next").setAttribute("aria-disabled", place === visible.length - 1 || !visible.length);
  paint(byId("picture"), row);
  byId("picture").setAttribute("role", "img");
  byId("picture").setAttribute("aria-label", `Test image ${indices[row]}`);
  byId("origin").textContent = secret ? "" : `Test image ${indices[row]}${page.files[row] ? `, ${page.files[row]}` : ""}`;
  if (secret) return; // what would tell the class is neither drawn nor shown
  const mine = verdicts.get(row);
  const saw = mine?.saw === undefined ? "" : mine.saw === null ? "You could not tell. " : `You saw ${named[mine.saw]}. `;
  byId("saw").textContent = saw && `${saw}The label says ${named[truth(row)]}, the network ${named[said(row)]}.`;
  for (const button of byId("verdict-buttons").children) button.setAttribute("aria-pressed", mine?.verdict === button.dataset.verdict);
  drawProbabilities(row);
  drawNeighbours(row);
  drawDoubt(row);
  drawHistory(row);
  drawRuns(row);
  drawMaps();
  drawVotes(row);
}

function walk(step) {
  const place = visible.indexOf(state.open);
  const to = visible[place < 0 ? 0 : place + step];
  if (to !== undefined && to !== state.open) change({ open: to }, "replace");
}

let lastOpen = null;
function drawView() {
  const view = byId("view");
  if (state.open === null) {
    if (view.open) view.close();
    return;
  }
  lastOpen = state.open;
  fillView(state.open);
  if (!view.open) {
    view.showModal();
    byId("view-title").focus();
  }
}

/** The reader closed the dialog: go back in history if opening it added an entry. */
function leaveView() {
  if (state.open === null) return;
  state.open = null;
  clearTimeout(later);
  if (history.state?.opened) {
    leaving = true;
    history.back();
  } else writeAddress(true);
}

function prepareView() {
  const view = byId("view");
  view.addEventListener("close", () => {
    leaveView();
    const tile = tiles[lastOpen];
    if (tile?.isConnected) tile.focus();
    else byId("count").scrollIntoView();
  });
  byId("close").addEventListener("click", () => view.close());
  byId("previous").addEventListener("click", () => walk(-1));
  byId("next").addEventListener("click", () => walk(1));
  byId("opacity").addEventListener("input", drawMaps);
  for (const choice of document.querySelectorAll("input[name=scale]")) choice.addEventListener("change", drawMaps);
  // One map is all that there is to see of a method that does not depend on the class.
  for (const id of ["map-true", "map-difference", "companion-other"]) byId(id).parentElement.hidden = page.ofNoClass;
  drawLegends();
}

// ---- all together --------------------------------------------------------------------------------------------------

let drawn = null; // the state that grid, matrix and bins show

/** Draws what has changed, and records as a performance measure how long a filter takes until it is painted. */
function show() {
  const shape = JSON.stringify({ ...state, open: null, judged: [...verdicts] });
  if (shape !== drawn) {
    const start = performance.now();
    if (drawn === null || JSON.parse(drawn).judge !== state.judge) tiles.forEach((_, row) => labelTile(row));
    if (mistakes) {
      drawGrid();
      drawFilters();
      drawTally();
    }
    drawMatrix();
    drawBins();
    const name = drawn === null ? "first-tile" : "filter";
    drawn = shape;
    afterFrame(() => performance.measure(name, { start: name === "filter" ? start : 0, end: performance.now() }));
  }
  if (mistakes) drawView();
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const typing = event.target.matches?.("input:not([type=checkbox], [type=radio], [type=range]), select");
  if (event.key === "?" && !typing) {
    if (!byId("help").open) byId("help").showModal();
    return event.preventDefault();
  }
  if (byId("help").open || typing) return;
  if (state.open !== null) {
    const arrows = event.target.matches?.("input");
    const answer = "1234567890".indexOf(event.key);
    const chosen = { f: "network", u: "unnameable", o: "other" }[event.key];
    if (!arrows && event.key === "ArrowLeft") walk(-1);
    else if (!arrows && event.key === "ArrowRight") walk(1);
    else if (hidden(state.open) && answer >= 0 && answer < classes.length) judge(state.open, { saw: answer });
    else if (hidden(state.open) && event.key === "u") judge(state.open, { saw: null });
    else if (!hidden(state.open) && chosen) chooseVerdict(chosen);
    else return;
    event.preventDefault();
  } else if (mistakes && event.key === "/") {
    byId("find").focus();
    event.preventDefault();
  } else if (mistakes && event.key === "j") change({ judge: !state.judge });
});

byId("ask-help").addEventListener("click", () => byId("help").showModal());
byId("page").hidden = false;
prepareMatrix();
prepareBins();
if (mistakes) {
  prepareFilters();
  prepareVerdicts();
  prepareView();
}
readAddress();
// The pictures are decoded before the first frame, so that the mark "first-tile" means a tile with its picture.
pictures.ready.then(show, () => {
  tell("This browser cannot read the pictures (WebP); the rest of the page works.");
  show();
});
