// SPDX-License-Identifier: Apache-2.0
// The slice viewer of a report. Its state is that of its controls; everything drawn follows from them and the data.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { width, height, count, raterCount } = data;
  const LAYERS = ["contours", "sample", "mean", "disagreement", "raters"];
  const canvas = $("canvas");

  // ------------------------------------------------------------------ slices

  /** Masks of a slice from runs of 0, 1, 0, ...: `masks` arrays of width * height zeros and ones. */
  function decode(text, masks) {
    const bytes = atob(text);
    const bits = new Uint8Array(masks * width * height);
    for (let i = 0, at = 0, one = false; i < bytes.length; one = !one) {
      let run = 0, scale = 1, byte;
      do {
        byte = bytes.charCodeAt(i++);
        run += (byte & 127) * scale;
        scale *= 128;
      } while (byte & 128);
      if (one) bits.fill(1, at, at + run);
      at += run;
    }
    return Array.from({ length: masks }, (_, k) => bits.subarray(k * width * height, (k + 1) * width * height));
  }

  // Nothing is marked outside of these columns and rows, in any slice.
  const [left, top, right, bottom] = data.box ?? [0, 0, 0, 0];

  /** Closed lines along the pixel edges of a mask, in pixels from the top left corner. */
  function outline(mask) {
    // Bit d of a corner: an edge leaves it to the right (0), down (1), left (2), up (3), with the mask on its right.
    const across = width + 1;
    const ways = new Uint8Array(across * (height + 1));
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const i = y * width + x;
        if (!mask[i]) continue;
        const corner = y * across + x;
        if (y === 0 || !mask[i - width]) ways[corner] |= 1;
        if (x === width - 1 || !mask[i + 1]) ways[corner + 1] |= 2;
        if (y === height - 1 || !mask[i + width]) ways[corner + across + 1] |= 4;
        if (x === 0 || !mask[i - 1]) ways[corner + across] |= 8;
      }
    }
    const path = new Path2D();
    const step = [1, across, -1, -across];
    for (let start = top * across; start < (bottom + 1) * across; start++) {
      if (!ways[start]) continue;
      let at = start, way = Math.log2(ways[start] & -ways[start]);
      path.moveTo(at % across, Math.floor(at / across));
      while (way !== undefined) {
        ways[at] &= ~(1 << way);
        at += step[way];
        // As many edges reach a corner as leave it, so the walk can only end where it began. To the right first:
        // pixels that touch at a corner alone stay apart.
        const next = [(way + 1) & 3, way, (way + 3) & 3].find((d) => ways[at] & (1 << d));
        if (next !== way) path.lineTo(at % across, Math.floor(at / across));
        way = next;
      }
      path.closePath();
      start--; // another line may begin at the same corner
    }
    return path;
  }

  /** A canvas of a map: the colour of `value(votes)`, in [0, 1], where that is not 0. */
  function paint(votes, value, stops) {
    const rgb = stops.map((color) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16)));
    const table = new Uint32Array(count + 1);
    const bytes = new Uint8ClampedArray(table.buffer);
    for (let k = 0; k <= count; k++) {
      const v = value(k);
      const at = v * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
      for (let c = 0; c < 3; c++) bytes[4 * k + c] = rgb[low][c] + (at - low) * (rgb[low + 1][c] - rgb[low][c]);
      bytes[4 * k + 3] = v > 0 ? 255 : 0;
    }
    const picture = document.createElement("canvas");
    picture.width = width;
    picture.height = height;
    const context = picture.getContext("2d");
    const pixels = context.createImageData(width, height);
    new Uint32Array(pixels.data.buffer).set(Uint32Array.from(votes, (k) => table[k]));
    context.putImageData(pixels, 0, 0);
    return picture;
  }

  const mean = (votes) => votes / count;
  const entropy = (votes) => {
    const p = votes / count;
    return p > 0 && p < 1 ? -(p * Math.log2(p) + (1 - p) * Math.log2(1 - p)) : 0;
  };

  const once = (make) => {
    let made;
    return () => (made ??= make());
  };

  /** How many masks mark each pixel, and how many pixels each mask marks. */
  function tally(masks) {
    const votes = new Uint16Array(width * height);
    const areas = masks.map((mask) => {
      let area = 0;
      for (let i = top * width; i < bottom * width; i++) {
        votes[i] += mask[i];
        area += mask[i];
      }
      return area;
    });
    return { votes, areas };
  }

  function load(index) {
    const masks = decode(data.masks[index], count);
    const raters = raterCount ? decode(data.raters[index], raterCount) : [];
    const { votes, areas } = tally(masks);
    return {
      votes,
      areas,
      rated: tally(raters).votes,
      outlines: once(() => masks.map(outline)),
      raters: once(() => raters.map(outline)),
      majority: once(() => outline(votes.map((k) => (2 * k > count ? 1 : 0)))),
      mean: once(() => paint(votes, mean, data.ramps.mean)),
      disagreement: once(() => paint(votes, entropy, data.ramps.disagreement)),
    };
  }

  /** Of the slices visited last: hundreds of masks of a large slice take tens of megabytes. */
  const visited = new Map();
  function slice(index) {
    const found = visited.get(index) ?? load(index);
    visited.delete(index);
    visited.set(index, found);
    if (visited.size > 4) visited.delete(visited.keys().next().value);
    return found;
  }

  // ------------------------------------------------------------------ intensities

  /** Of the slices visited last: null while it is on its way, then what can be drawn, or the levels of its pixels. */
  const read = new Map();
  function fetched(index, make) {
    if (!read.has(index)) {
      read.set(index, null);
      if (read.size > 16) read.delete(read.keys().next().value);
      make().then((found) => {
        read.set(index, found);
        requestDraw();
      });
    }
    return read.get(index);
  }

  async function decodePicture(index) {
    const picture = new Image();
    picture.src = data.images[index];
    await picture.decode();
    return picture;
  }

  /** Levels of a slice: of each row the first, then differences, as `packed` in encoding.py describes. */
  async function decodeLevels(index) {
    const packed = Uint8Array.from(atob(data.values[index]), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const pixels = width * height;
    const levels = new Uint16Array(pixels);
    for (let i = 0, before = 0; i < pixels; i++) {
      const number = bytes[i] + 256 * bytes[pixels + i];
      const difference = (number >>> 1) ^ -(number & 1);
      before = (i % width ? before : 0) + difference;
      levels[i] = before; // modulo 2^16
    }
    return levels;
  }

  const channel = () => Number($("channel").value) || 0;
  /** Of the channel that is chosen; pictures lie channel after channel. */
  const pixelsOf = (index) => {
    const at = channel() * data.slices.length + index;
    return fetched(at, () => (data.values.length ? decodeLevels(at) : decodePicture(at)));
  };

  const intensity = (level) => data.lowest + data.step * level;

  /** [low, high] that are shown black and white. */
  function windowed() {
    const level = $("level").valueAsNumber, size = $("width").valueAsNumber;
    if (!Number.isFinite(level) || !(size > 0)) return [data.windows[0].low, data.windows[0].high];
    return [level - size / 2, level + size / 2];
  }

  const greys = document.createElement("canvas");
  Object.assign(greys, { width, height });
  /** A canvas of levels in the window of now. */
  function shade(levels) {
    const [low, high] = windowed();
    const context = greys.getContext("2d");
    const pixels = context.createImageData(width, height);
    const rgba = new Uint32Array(pixels.data.buffer);
    for (let i = 0; i < levels.length; i++) {
      const part = high > low ? (intensity(levels[i]) - low) / (high - low) : 0.5;
      const grey = Math.round(255 * Math.min(1, Math.max(0, part)));
      rgba[i] = (0xff000000 | (grey * 0x010101)) >>> 0;
    }
    context.putImageData(pixels, 0, 0);
    return greys;
  }

  /** What is to be drawn of a slice, or null: then it is on its way, and everything is drawn again when it is there. */
  function image(index) {
    const found = pixelsOf(index);
    return found instanceof Uint16Array ? shade(found) : found;
  }

  // ------------------------------------------------------------------ drawing

  /** The part of the slice that is shown, in pixels: all, or what anyone marked anywhere, in the same proportions. */
  function region() {
    if (!pressed("zoom") || !data.box) return { x: 0, y: 0, w: width, h: height };
    const part = Math.min(1, 1.4 * Math.max((right - left) / width, (bottom - top) / height, 6 / Math.min(width, height)));
    const w = part * width, h = part * height;
    const within = (middle, size, whole) => Math.max(0, Math.min(whole - size, middle - size / 2));
    return { x: within((left + right) / 2, w, width), y: within((top + bottom) / 2, h, height), w, h };
  }

  /** Draw the current slice on a canvas, `unit` of whose pixels make one of the screen. */
  function draw(target, layers, unit) {
    const picture = image(current().slice);
    if (!picture) return false; // and it will be called again
    const here = slice(current().slice), sample = current().sample;
    const { x, y, w, h } = region();
    const context = target.getContext("2d");
    const sx = target.width / w, sy = target.height / h;
    const place = new DOMMatrix([sx, 0, 0, sy, -x * sx, -y * sy]);
    // Thinner where pixels are small, or lines would hide what they surround.
    const pen = unit * Math.min(1, Math.max(0.55, Math.min(sx, sy) / (5 * unit)));
    const stroke = (path, color, size, dash = []) => {
      // The path is scaled and the pen is not: pixels need not be square.
      const scaled = new Path2D();
      scaled.addPath(path, place);
      context.strokeStyle = color;
      context.lineWidth = size * pen;
      context.setLineDash(dash.map((part) => part * pen));
      context.stroke(scaled);
    };

    context.globalAlpha = 1;
    context.lineJoin = "round";
    context.fillStyle = "#000";
    context.fillRect(0, 0, target.width, target.height);
    context.save();
    context.transform(sx, 0, 0, sy, -x * sx, -y * sy);
    context.imageSmoothingEnabled = pressed("smooth");
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, 0, 0);
    context.imageSmoothingEnabled = false;
    context.globalAlpha = current().opacity;
    if (layers.has("mean")) context.drawImage(here.mean(), 0, 0);
    if (layers.has("disagreement")) context.drawImage(here.disagreement(), 0, 0);
    if (layers.has("sample") && !layers.has("mean") && !layers.has("disagreement")) { // which it would hide
      context.fillStyle = data.colors[sample];
      context.fill(here.outlines()[sample]);
    }
    context.restore();
    if (layers.has("contours")) {
      const over = layers.has("mean") || layers.has("disagreement");
      context.globalAlpha = over ? 0.35 : count > 24 ? 0.45 : 0.85;
      here.outlines().forEach((path, k) => stroke(path, data.colors[k], 1.25));
      context.globalAlpha = 1;
      stroke(here.majority(), "#000a", 4.5);
      stroke(here.majority(), "#fff", 2.75);
    }
    context.globalAlpha = 1;
    if (layers.has("raters")) {
      for (const path of here.raters()) {
        stroke(path, "#000a", 3);
        stroke(path, data.raterColor, 1.75, [6, 4]);
      }
    }
    if (layers.has("sample") || layers.has("contours")) stroke(here.outlines()[sample], data.colors[sample], 2.25);
    if (data.spacing) ruler(context, sx / data.spacing[1], unit, target);
    return true;
  }

  /** Say what a canvas shows, for who reads the page by a program. */
  function label(target, layers) {
    target.dataset.shows = [data.slices[current().slice], current().sample, ...layers].join(" ");
    target.dataset.window = windowed().join(" ");
  }

  /** A bar of a round number of millimetres. */
  function ruler(context, perMillimetre, unit, target) {
    const fits = [1, 2, 5, 10, 20, 50, 100].filter((mm) => mm * perMillimetre < target.width / 4);
    if (!fits.length) return;
    const mm = fits[fits.length - 1], length = mm * perMillimetre;
    const left = 14 * unit, bottom = target.height - 14 * unit;
    context.lineJoin = "miter";
    for (const [color, size] of [["#000", 4], ["#fff", 2]]) {
      context.beginPath();
      context.moveTo(left, bottom - 5 * unit);
      context.lineTo(left, bottom);
      context.lineTo(left + length, bottom);
      context.lineTo(left + length, bottom - 5 * unit);
      context.setLineDash([]);
      context.strokeStyle = color;
      context.lineWidth = size * unit;
      context.stroke();
    }
    context.font = `${12 * unit}px system-ui, sans-serif`;
    context.lineWidth = 3 * unit;
    context.strokeStyle = "#000";
    context.fillStyle = "#fff";
    context.strokeText(`${mm} mm`, left, bottom - 9 * unit);
    context.fillText(`${mm} mm`, left, bottom - 9 * unit);
  }

  let waiting = false;
  function requestDraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const density = window.devicePixelRatio || 1;
      const w = Math.round(canvas.clientWidth * density), h = Math.round(canvas.clientHeight * density);
      if (w && h) { // not in print
        if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
        if (draw(canvas, current().layers, density)) label(canvas, current().layers);
      }
      if (printing.matches) drawContact();
    });
  }

  /** The printed page has pictures of its own, since nobody can switch layers there. */
  const printing = window.matchMedia("print");
  function drawContact() {
    for (const target of document.querySelectorAll("#contact canvas")) {
      const layers = new Set(target.dataset.layers.split(" "));
      // A picture, not what was drawn: Chromium prints the strokes of a canvas at a scale that is 3 % off.
      const page = new OffscreenCanvas(900, Math.max(1, Math.round(900 / data.aspect)));
      if (!draw(page, layers, 900 / 420)) continue;
      Object.assign(target, { width: page.width, height: page.height });
      target.getContext("bitmaprenderer").transferFromImageBitmap(page.transferToImageBitmap());
      label(target, layers);
    }
    document.querySelector("[data-caption]").textContent = `${sliceName()}${place()}; ${windowName()}`;
  }

  // ------------------------------------------------------------------ controls

  const pressed = (id) => $(id).getAttribute("aria-pressed") === "true";
  const press = (id) => {
    $(id).setAttribute("aria-pressed", String(!pressed(id)));
    update();
  };

  function current() {
    return {
      slice: $("slice").valueAsNumber,
      sample: $("sample").valueAsNumber,
      opacity: $("opacity").valueAsNumber / 100,
      layers: new Set(LAYERS.filter((name) => $(`layer-${name}`).checked)),
    };
  }

  /** Whole, or with four significant digits. */
  const number = (value) =>
    value.toLocaleString("en", value < 1000 ? { maximumSignificantDigits: 4 } : { maximumFractionDigits: 0 });
  /** Counted from 0: " of 0–15", or nothing where there is one. */
  const range = (many) => (many > 1 ? ` of 0–${many - 1}` : "");
  const sliceName = () => `Slice ${data.slices[current().slice]}${range(data.total)}`;
  const place = () => {
    const words = data.places[current().slice];
    return words && `, ${words}`;
  };
  const channelName = () => (data.channels.length > 1 ? `${data.channels[channel()]}, ` : "");
  const windowName = () => {
    const [low, high] = windowed();
    const chosen = $("window").selectedOptions[0].value;
    const name = chosen === "own" ? "" : `${data.windows[chosen].name}, `;
    return `window ${name}${number(low)} to ${number(high)} ${data.intensity}`.trim();
  };

  /** Words follow the controls at once, the picture with the next frame. */
  function update() {
    const { slice: index, sample, opacity } = current();
    const here = slice(index);
    const marking = here.areas.filter((area) => area > 0).length;
    const pixels = here.areas[sample];
    const area = data.spacing ? `${number(pixels * data.spacing[0] * data.spacing[1])} mm²` : `${number(pixels)} ${data.unit}`;
    const color = data.colors[sample];
    $("status").textContent =
      `${channelName()}${sliceName()}${place()}, sample ${sample}${range(count)}: ${area} here. ` +
      `${marking} of ${count} ${count === 1 ? "sample marks" : "samples mark"} this slice.`;
    $("slice-value").textContent = `${data.slices[index]}${range(data.total)}`;
    $("slice").setAttribute("aria-valuetext", sliceName() + place());
    $("sample-value").textContent = `${sample}${range(count)}`;
    $("sample").setAttribute("aria-valuetext", `Sample ${sample}${range(count)}`);
    $("sample-name").textContent = `sample ${sample}`;
    $("opacity-value").textContent = `${Math.round(100 * opacity)} %`;
    $("sample-swatch").style.setProperty("--color", color);
    document.documentElement.style.setProperty("--chosen", color);
    const [low, lowX, high, highX] = data.axis;
    const at = lowX + ((data.sizes[sample] - low) / (high - low)) * (highX - lowX);
    $("marker").setAttribute("transform", `translate(${at} 0)`);
    $("marker").setAttribute("visibility", "visible");
    document.querySelectorAll("#sizes [data-sample]").forEach((button, k) => {
      button.closest("tr").toggleAttribute("aria-current", k === sample);
    });
    requestDraw();
    for (const near of [index - 1, index + 1]) if (data.slices[near] !== undefined) pixelsOf(near);
  }

  function move(id, by) {
    $(id).valueAsNumber += by; // the control keeps to its range
    update();
  }

  function toggle(name) {
    const box = $(`layer-${name}`);
    if (box.closest("[hidden]")) return;
    box.checked = !box.checked;
    changed(name);
  }

  /** Two maps on top of each other would have colours of neither. */
  function changed(name) {
    const other = { mean: "disagreement", disagreement: "mean" }[name];
    if (other && $(`layer-${name}`).checked) $(`layer-${other}`).checked = false;
    update();
  }

  /** Level and width follow the window that is chosen; numbers that are typed make one of the reader's own. */
  function choose() {
    const chosen = data.windows[$("window").value];
    if (chosen) {
      const { low, high } = chosen;
      $("level").value = +((low + high) / 2).toPrecision(6);
      $("width").value = +(high - low).toPrecision(6);
    }
    requestDraw();
  }

  function nextWindow() {
    if (!data.values.length) return;
    $("window").value = String(((Number($("window").value) || 0) + 1) % data.windows.length);
    choose();
  }

  function nextChannel() {
    if (data.channels.length < 2) return;
    $("channel").value = String((channel() + 1) % data.channels.length);
    update();
  }

  function help() {
    const open = $("help").hidden;
    $("help").hidden = !open;
    $("keys").setAttribute("aria-expanded", String(open));
  }

  const shortcuts = {
    ArrowLeft: () => move("sample", -1),
    ArrowRight: () => move("sample", 1),
    w: nextWindow,
    c: nextChannel,
    z: () => press("zoom"),
    "?": help,
  };
  LAYERS.forEach((name, i) => { shortcuts[i + 1] = () => toggle(name); });
  if (data.slices.length > 1) {
    // Up is further on, as on a slider.
    shortcuts.ArrowUp = shortcuts.PageUp = () => move("slice", 1);
    shortcuts.ArrowDown = shortcuts.PageDown = () => move("slice", -1);
  }

  document.addEventListener("keydown", (event) => {
    const act = shortcuts[event.key];
    if (!act || event.ctrlKey || event.altKey || event.metaKey) return;
    const elsewhere = event.target !== document.body && !$("viewer").contains(event.target);
    // A slider has its own arrows, and with the picture out of sight they scroll.
    const taken = event.key.length > 1 && (event.target.type === "range" || canvas.getBoundingClientRect().bottom < 0);
    if (elsewhere || taken) return;
    event.preventDefault();
    act();
  });

  for (const id of ["slice", "sample", "opacity"]) $(id).addEventListener("input", update);
  $("window").addEventListener("change", choose);
  $("channel").addEventListener("change", update);
  for (const id of ["level", "width"]) {
    $(id).addEventListener("input", () => {
      $("window").value = "own";
      requestDraw();
    });
  }
  for (const name of LAYERS) $(`layer-${name}`).addEventListener("change", () => changed(name));
  $("zoom").addEventListener("click", () => press("zoom"));
  $("smooth").addEventListener("click", () => press("smooth"));
  $("keys").addEventListener("click", help);
  $("sizes").addEventListener("click", (event) => {
    const button = event.target.closest("[data-sample]");
    if (button) move("sample", Number(button.dataset.sample) - current().sample);
  });

  /** The row and column of the array that a pixel of the picture is. */
  function stored(row, column) {
    const [transposed, upsideDown, mirrored] = data.turned;
    const at = [upsideDown ? height - 1 - row : row, mirrored ? width - 1 - column : column];
    return transposed ? at.reverse() : at;
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), { x, y, w, h } = region(), here = slice(current().slice);
    const column = Math.floor(x + ((event.clientX - box.left) / box.width) * w);
    const row = Math.floor(y + ((event.clientY - box.top) / box.height) * h);
    if (column < 0 || row < 0 || column >= width || row >= height) return;
    const at = row * width + column, votes = here.votes[at], found = pixelsOf(current().slice);
    const value = found instanceof Uint16Array ? `, ${number(intensity(found[at]))} ${data.intensity}`.trimEnd() : "";
    const [storedRow, storedColumn] = stored(row, column);
    $("readout").textContent =
      `Row ${storedRow}, column ${storedColumn}${value}: in ${votes} of ${count} samples, ` +
      `${entropy(votes).toFixed(2)} bits` + (raterCount ? `, in ${here.rated[at]} of ${raterCount} raters` : "");
  });
  canvas.addEventListener("pointerleave", () => { $("readout").textContent = ""; });

  if (!("DecompressionStream" in window && "OffscreenCanvas" in window)) {
    $("old").hidden = false;
    return;
  }
  $("viewer").hidden = false;
  $("zoom").disabled = !data.box;
  $("contact").style.setProperty("--aspect", data.aspect);
  document.querySelector(".slices-only").hidden = data.slices.length === 1;
  choose();
  new ResizeObserver(requestDraw).observe(canvas);
  window.addEventListener("beforeprint", drawContact);
  printing.addEventListener("change", requestDraw);
  update();
})();
