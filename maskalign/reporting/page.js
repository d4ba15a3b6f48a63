"use strict";
// Curves with a cursor, and the slider of the samples. All other parts of the page work without a script.
(() => {
  const data = JSON.parse(document.getElementById("numbers").textContent);
  const PALETTE = 8, SVG = "http://www.w3.org/2000/svg";
  const shown = data.runs.map(() => true);
  let axis = "step", smooth = true;
  const charts = [];

  const make = (name, attributes = {}, parent = null) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (parent) parent.append(element);
    return element;
  };
  const look = (run) => ({ class: `line c${run % PALETTE}`, ...(run >= PALETTE && { "stroke-dasharray": "6 4" }) });
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  };
  const tick = (value) => {
    const size = Math.abs(value);
    if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
    if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
    return size !== 0 && size < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(4)));
  };
  const niceTicks = (low, high, count) => {
    const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) ticks.push(k * step);
    return ticks;
  };
  const logTicks = (low, high) => {
    const ticks = [], wide = Math.log10(high / low) > 2.5;
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const factor of wide ? [1] : [1, 2, 5]) {
        const value = factor * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) ticks.push(value);
      }
    return ticks.length > 1 ? ticks : niceTicks(low, high, 4);
  };
  const smoothed = (values) => {
    // A centered mean over a thirtieth of the curve. At the ends it covers only the points that exist.
    const reach = Math.max(1, Math.round(values.length / 60));
    return values.map((value, index) => {
      if (value === null) return null;
      const near = values.slice(Math.max(0, index - reach), index + reach + 1).filter((other) => other !== null);
      return near.reduce((sum, other) => sum + other, 0) / near.length;
    });
  };

  class Chart {
    constructor(figure, spec) {
      this.figure = figure;
      this.spec = spec;
      this.svg = make("svg", { role: "img", tabindex: "0" });
      this.svg.setAttribute("aria-label", `${spec.title}; arrow keys move the cursor`);
      this.tip = document.createElement("div");
      this.tip.className = "tip";
      this.tip.setAttribute("role", "status");
      this.tip.hidden = true;
      figure.append(this.svg, this.tip);
      this.svg.addEventListener("pointermove", (event) => this.point(event.clientX - this.svg.getBoundingClientRect().left));
      this.svg.addEventListener("pointerdown", (event) => this.point(event.clientX - this.svg.getBoundingClientRect().left));
      this.svg.addEventListener("pointerleave", () => this.leave());
      this.svg.addEventListener("blur", () => this.leave());
      this.svg.addEventListener("keydown", (event) => this.key(event));
      new ResizeObserver(() => this.draw()).observe(figure);
    }

    series() {
      const { bins, series, log, exact } = this.spec;
      return series.filter((line) => shown[line.run]).map((line) => {
        const x = bins ? bins.map((_, index) => index) : line[axis];
        const y = smooth && !bins && !exact ? smoothed(line.value) : line.value;
        const raw = log ? line.value.map((value) => (value > 0 ? value : null)) : line.value;
        return { run: line.run, x, y: log ? y.map((value) => (value > 0 ? value : null)) : y, raw };
      });
    }

    range(lines) {
      // In the first per cent of a run the losses are so large that the rest of the curve would be flat. The scale is
      // therefore set by the later part, and the lines start above the visible range.
      const xs = lines.flatMap((line) => line.x.filter((value) => value !== null));
      const ys = lines.flatMap((line) => {
        const skip = this.spec.bins ? 0 : Math.floor(line.y.length * 0.04);
        return line.y.slice(skip).filter((value) => value !== null);
      });
      let [low, high] = [Math.min(...ys), Math.max(...ys)];
      if (!(high > low)) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
      const room = this.spec.log ? (high / low) ** 0.06 : (high - low) * 0.06;
      if (this.spec.log) [low, high] = [low / room, high * room];
      else [low, high] = [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
      return { x: [this.spec.bins ? -0.25 : Math.min(0, ...xs), Math.max(...xs) + (this.spec.bins ? 0.25 : 0)], y: [low, high] };
    }

    draw() {
      const width = this.svg.clientWidth, height = this.svg.clientHeight;
      if (!width) return;
      this.svg.replaceChildren();
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.lines = this.series().filter((line) => line.x.some((value) => value !== null));
      if (!this.lines.length) {
        make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.svg).textContent = "nothing to show";
        return;
      }
      const { x, y } = this.range(this.lines), { log, bins, exact } = this.spec;
      const left = 60, right = width - 12, top = 10, bottom = height - 38;
      const scale = log ? Math.log : (value) => value;
      this.toX = (value) => left + ((value - x[0]) / (x[1] - x[0] || 1)) * (right - left);
      this.toY = (value) => bottom - ((scale(value) - scale(y[0])) / (scale(y[1]) - scale(y[0]))) * (bottom - top);
      for (const value of log ? logTicks(...y) : niceTicks(...y, 4)) {
        make("line", { class: "grid", x1: left, x2: right, y1: this.toY(value), y2: this.toY(value) }, this.svg);
        make("text", { x: left - 8, y: this.toY(value) + 4, "text-anchor": "end" }, this.svg).textContent = tick(value);
      }
      const room = Math.max(2, Math.floor((right - left) / 90));
      const every = bins ? Math.ceil(bins.length / Math.max(2, Math.floor((right - left) / 58))) : 1;
      for (const value of bins ? bins.map((_, index) => index).filter((index) => index % every === 0) : niceTicks(...x, room)) {
        const words = bins ? bins[value] : tick(value);
        make("text", { x: this.toX(value), y: bottom + 18, "text-anchor": "middle" }, this.svg).textContent = words;
      }
      const name = bins ? "time step" : axis === "step" ? "step" : "seconds of training";
      make("text", { x: right, y: height - 4, "text-anchor": "end" }, this.svg).textContent = name;
      const frame = make("clipPath", { id: `clip-${this.spec.id}` }, this.svg);
      make("rect", { x: left, y: top - 4, width: right - left + 4, height: bottom - top + 8 }, frame);
      const group = make("g", { "clip-path": `url(#clip-${this.spec.id})` }, this.svg);
      for (const line of this.lines) {
        if (smooth && !bins && !exact) {
          const faint = make("path", { ...look(line.run), d: this.path(line.x, line.raw) }, group);
          faint.classList.add("faint");
        }
        make("path", { ...look(line.run), d: this.path(line.x, line.y) }, group);
        if (bins) line.x.forEach((value, index) => line.y[index] !== null && make("circle", { class: `c${line.run % PALETTE}`, cx: this.toX(value), cy: this.toY(line.y[index]), r: 4 }, group));
      }
      this.edges = { left, right, top, bottom };
      this.cursor = make("g", {}, this.svg);
      this.leave();
    }

    path(xs, ys) {
      let pen = "M", text = "";
      xs.forEach((x, index) => {
        if (x === null || ys[index] === null) { pen = "M"; return; }
        text += `${pen}${this.toX(x).toFixed(1)},${this.toY(ys[index]).toFixed(1)}`;
        pen = "L";
      });
      return text;
    }

    /** All x at which a line has a value, ascending. */
    stops() {
      return [...new Set(this.lines.flatMap((line) => line.x.filter((x, index) => x !== null && line.y[index] !== null)))].sort((a, b) => a - b);
    }

    point(pixel) {
      if (!this.lines?.length) return;
      const stops = this.stops();
      this.show(stops.reduce((best, x) => (Math.abs(this.toX(x) - pixel) < Math.abs(this.toX(best) - pixel) ? x : best), stops[0]));
    }

    key(event) {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move || !this.lines?.length) return;
      event.preventDefault();
      const stops = this.stops(), now = this.at === undefined ? stops.length - 1 : stops.indexOf(this.at) + move * Math.max(1, Math.round(stops.length / 100));
      this.show(stops[Math.min(stops.length - 1, Math.max(0, now))]);
    }

    show(at) {
      this.at = at;
      this.cursor.replaceChildren();
      const { left, right, top, bottom } = this.edges, x = this.toX(at);
      make("line", { class: "cross", x1: x, x2: x, y1: top, y2: bottom }, this.cursor);
      const head = document.createElement("b");
      head.textContent = this.spec.bins ? this.spec.bins[at] : axis === "step" ? `step ${number(at)}` : `${number(at)} s`;
      this.tip.replaceChildren(head);
      for (const line of this.lines) {
        let best = -1;
        line.x.forEach((value, index) => {
          if (value === null || line.y[index] === null) return;
          if (best < 0 || Math.abs(value - at) < Math.abs(line.x[best] - at)) best = index;
        });
        if (best < 0) continue;
        const y = this.toY(line.y[best]);
        if (y >= top - 4) make("circle", { class: `c${line.run % PALETTE}`, cx: this.toX(line.x[best]), cy: y, r: 4.5 }, this.cursor);
        const row = document.createElement("div"), dot = document.createElement("span"), value = document.createElement("span");
        dot.className = `dot c${line.run % PALETTE}${line.run >= PALETTE ? " dashed" : ""}`;
        value.className = "value";
        value.textContent = number(line.y[best]);
        row.append(dot, value, data.runs.length > 1 ? data.runs[line.run] : "");
        this.tip.append(row);
      }
      this.tip.hidden = false;
      const wide = this.tip.offsetWidth, from = this.svg.offsetLeft ?? 12;
      const place = x + 16 + wide > right + 12 ? x - wide - 4 : x + 24;
      this.tip.style.transform = `translate(${Math.max(4, Math.min(place, this.figure.clientWidth - wide - 4))}px, 46px)`;
    }

    leave() {
      this.at = undefined;
      this.tip.hidden = true;
      this.cursor?.replaceChildren();
    }
  }

  for (const spec of data.charts) charts.push(new Chart(document.querySelector(`[data-chart="${spec.id}"]`), spec));
  for (const spec of data.heldOut) charts.push(new Chart(document.querySelector(`[data-held="${spec.id}"]`), spec));
  const redraw = () => charts.forEach((chart) => chart.draw());

  const controls = document.querySelector(".controls");
  if (controls) {
    controls.hidden = false;
    for (const choice of controls.querySelectorAll("[name=axis]"))
      choice.addEventListener("change", () => { axis = choice.value; redraw(); });
    const box = controls.querySelector("#smooth");
    box.addEventListener("change", () => { smooth = box.checked; redraw(); });
    for (const button of controls.querySelectorAll("[data-run]"))
      button.addEventListener("click", () => {
        const run = Number(button.dataset.run);
        shown[run] = !shown[run];
        button.setAttribute("aria-pressed", shown[run]);
        redraw();
      });
  }

  const player = document.querySelector(".player");
  if (player) {
    player.hidden = false;
    const slider = player.querySelector("input"), output = player.querySelector("output"), play = player.querySelector("button");
    const steps = slider.dataset.steps.split(",").map(Number);
    const sheets = [...document.querySelectorAll(".sheet")];
    const show = () => {
      const step = steps[slider.value], words = `step ${step.toLocaleString("en")}`;
      output.textContent = words;
      slider.setAttribute("aria-valuetext", words);
      for (const sheet of sheets) {
        const images = [...sheet.querySelectorAll("img")];
        // Show each run's newest grid up to this step, or its first grid.
        const now = images.filter((image) => Number(image.dataset.step) <= step).pop() ?? images[0];
        for (const image of images) image.hidden = image !== now;
        sheet.querySelector("small").textContent = `step ${Number(now.dataset.step).toLocaleString("en")}`;
      }
    };
    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      player.classList.remove("playing");
      play.setAttribute("aria-label", "Play");
    };
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (Number(slider.value) === steps.length - 1) slider.value = 0;
      player.classList.add("playing");
      play.setAttribute("aria-label", "Pause");
      const next = () => {
        slider.value = Number(slider.value) + 1;
        show();
        if (Number(slider.value) === steps.length - 1) stop();
      };
      show();
      timer = setInterval(next, 700);
    });
    slider.addEventListener("input", () => { stop(); show(); });
    show();
  }
})();
