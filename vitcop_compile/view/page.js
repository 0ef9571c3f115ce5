"use strict";
(() => {
  const record = JSON.parse(document.getElementById("record").textContent);
  const names = Object.keys(record.runs);
  const at = (id) => document.getElementById(id);
  const make = (kind, text, kindOf) => {
    const node = document.createElement(kind);
    if (text !== undefined) node.textContent = text;
    if (kindOf) node.className = kindOf;
    return node;
  };
  const state = { method: names[0], retention: 0, view: "kept", score: 0 };
  const DARK = "rgba(9,11,17,", LAST = "#ffd23f", BEFORE = ["#7fd6ff", "#c9a7ff", "#8be0a4"];
  const RAMP = [[13, 8, 60], [84, 15, 110], [158, 42, 99], [214, 81, 57], [246, 145, 30], [252, 210, 60], [252, 255, 164]];
  const HINT = "Point at a patch to read what became of it.";
  const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
  // A number that is not finite is null in JSON.
  const short = (value) => (value === null ? "-" : value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3));

  // What a run says of each token: how many stages it stays in, its cluster, and the group it is in at last.
  const derived = new Map();
  const derive = (run) => {
    if (derived.has(run)) return derived.get(run);
    const stays = new Int32Array(record.patches), before = run.steps.filter((step) => step.side !== "decoder");
    for (const step of run.steps) for (const token of step.kept) stays[token] += 1;
    const cluster = new Map();
    if (run.clusters) before[before.length - 1].kept.forEach((token, i) => cluster.set(token, run.clusters[i]));
    // A row holds what its members held before.
    let holds = new Map(Array.from({ length: record.patches }, (_, token) => [token, [token]]));
    let merged = null;
    for (const step of run.steps) {
      const after = new Map();
      step.kept.forEach((token, i) => {
        const group = step.groups ? step.groups[i] : [token];
        after.set(token, [...new Set(group.flatMap((member) => holds.get(member)))]);
      });
      holds = after;
      if (step.groups) merged = { where: step.where, holds };
    }
    const scores = run.steps.flatMap((step, number) => {
      const entering = number ? run.steps[number - 1].kept : Array.from({ length: record.patches }, (_, token) => token);
      return Object.entries(step.scores).map(([name, values]) => ({
        name: `${name}, ${step.where}`, kept: new Set(step.kept),
        values: new Map(entering.map((token, i) => [token, values[i]])),
      }));
    });
    const found = { stays, cluster, merged, scores, colors: clusterColors(run.clusters) };
    derived.set(run, found);
    return found;
  };
  const hue = (i, alpha) => `hsla(${(200 + i * 222.492) % 360}, ${[78, 62, 88][i % 3]}%, ${[58, 66, 52][i % 3]}%, ${alpha})`;
  const clusterColors = (labels) => {
    const sizes = new Map();
    for (const label of labels || []) if (label >= 0) sizes.set(label, (sizes.get(label) || 0) + 1);
    return new Map([...sizes].sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([label], i) => [label, i]));
  };
  const bounds = (values) => {
    const sorted = [...values].filter((v) => v !== null).sort((a, b) => a - b);
    const low = sorted[Math.floor(0.01 * (sorted.length - 1))], high = sorted[Math.ceil(0.98 * (sorted.length - 1))];
    return [low, high > low ? high : low + 1];
  };
  const heat = (share) => {
    const x = Math.min(1, Math.max(0, share)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(x));
    return `rgb(${RAMP[i].map((low, k) => Math.round(low + (RAMP[i + 1][k] - low) * (x - i))).join(",")})`;
  };
  const has = (run, view) => {
    if (run.left_out) return view === "kept";
    if (view === "clusters") return Boolean(run.clusters);
    if (view === "merged") return Boolean(derive(run).merged);
    return view === "heat" ? derive(run).scores.length > 0 : true;
  };

  // Pictures are decoded once; what is drawn waits for them.
  const pictures = record.pictures.map((uri) => Object.assign(new Image(), { src: uri }));
  const draw = (canvas, panel, run, view, width, small = false) => {
    const picture = pictures[panel.picture], pen = canvas.getContext("2d");
    canvas.width = width;
    canvas.height = Math.round(width * (picture.naturalHeight / picture.naturalWidth));
    pen.imageSmoothingQuality = "high";
    pen.filter = view === "heat" ? "grayscale(1)" : "none";
    pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    pen.filter = "none";
    if (run.left_out) {
      pen.fillStyle = DARK + ".6)";
      return pen.fillRect(0, 0, canvas.width, canvas.height);
    }
    const told = derive(run), high = canvas.height / panel.rows, wide = canvas.width / panel.columns;
    const place = (token) => {
      const row = Math.floor((token - panel.first) / panel.columns), column = (token - panel.first) % panel.columns;
      const x = Math.round(column * wide), y = Math.round(row * high);
      return [x, y, Math.round((column + 1) * wide) - x, Math.round((row + 1) * high) - y];
    };
    const fill = (token, color) => { pen.fillStyle = color; pen.fillRect(...place(token)); };
    const edge = (token, color, line) => {
      const [x, y, w, h] = place(token);
      pen.strokeStyle = color; pen.lineWidth = line;
      pen.strokeRect(x + line / 2, y + line / 2, w - line, h - line);
    };
    const own = Array.from({ length: panel.rows * panel.columns }, (_, i) => panel.first + i);
    const thin = Math.max(1, wide / 22), thick = Math.max(1.5, wide / 9);
    if (view === "clusters") {
      for (const token of own) {
        const label = told.cluster.get(token);
        fill(token, label === undefined ? DARK + ".84)" : label < 0 ? "rgba(170,174,182,.72)" : hue(told.colors.get(label), 0.68));
      }
    } else if (view === "merged") {
      const inside = new Map();
      [...told.merged.holds].filter(([, all]) => all.length > 1).forEach(([, all], i) => all.forEach((t) => inside.set(t, i)));
      for (const token of own) {
        if (inside.has(token)) fill(token, hue(inside.get(token), 0.62));
        else if (told.merged.holds.has(token)) edge(token, "rgba(255,255,255,.8)", thin);
        else fill(token, DARK + ".84)");
      }
      for (const token of own) {
        if (!told.merged.holds.has(token) || !inside.has(token)) continue;
        const [x, y, w, h] = place(token);
        pen.beginPath(); pen.arc(x + w / 2, y + h / 2, Math.min(w, h) / 4, 0, 7);
        pen.fillStyle = "#fff"; pen.fill(); pen.lineWidth = thin; pen.strokeStyle = "#101216"; pen.stroke();
      }
    } else if (view === "heat") {
      const score = told.scores[Math.min(state.score, told.scores.length - 1)], [low, top] = bounds(score.values.values());
      pen.globalAlpha = 0.78;
      for (const token of own) {
        const value = score.values.get(token);
        fill(token, value === undefined || value === null ? "#000" : heat(Math.sqrt(Math.max(0, value - low) / (top - low))));
      }
      pen.globalAlpha = 1;
      for (const token of own) if (score.kept.has(token)) edge(token, "rgba(255,255,255,.85)", thin);
    } else {
      const last = run.steps.length;
      for (const token of own) if (told.stays[token] < last) fill(token, `${DARK}${(0.86 - 0.5 * (told.stays[token] / last)).toFixed(2)})`);
      if (!small && last > 1 && last <= BEFORE.length + 1) {
        for (const token of own) if (told.stays[token] > 0 && told.stays[token] < last) edge(token, BEFORE[last - 1 - told.stays[token]], thin);
      }
      if (small ? last > 1 : last) for (const token of own) if (told.stays[token] === last) edge(token, LAST, thick);
    }
  };

  const legend = (run, view) => {
    const box = at("legend");
    box.replaceChildren();
    if (run.left_out) return;
    const entry = (text, back, border) => {
      const item = make("span"), chip = make("i");
      chip.style.background = back; chip.style.borderColor = border || back;
      item.append(chip, text); box.append(item);
    };
    if (view === "clusters") {
      entry("a color for each cluster", hue(0, 1)); entry("gone", "#14161c", "#59606e");
      if (run.clusters.includes(-1)) entry("kept, in no cluster", "#aaaeb6");
    } else if (view === "merged") {
      entry(`merged into the token with the dot, ${derive(run).merged.where}`, hue(0, 1));
      entry("stays as it is", "transparent", "#98a0ae"); entry("gone", "#14161c", "#59606e");
    } else if (view === "heat") {
      const score = derive(run).scores[Math.min(state.score, derive(run).scores.length - 1)], ramp = make("i", undefined, "ramp");
      ramp.style.background = `linear-gradient(90deg, ${RAMP.map((rgb) => `rgb(${rgb})`).join(",")})`;
      const item = make("span");
      item.append(`${score.name}: low`, ramp, "high"); box.append(item);
      entry("kept there", "transparent", "#98a0ae");
    } else {
      const last = run.steps.length;
      if (last) entry(`left at the end, ${run.steps[last - 1].where}`, "transparent", LAST);
      if (last <= BEFORE.length + 1) for (let i = last - 2; i >= 0; i--) entry(`leaves ${run.steps[i + 1].where}`, "transparent", BEFORE[last - 2 - i]);
      entry("gone", "#14161c", "#59606e");
    }
  };

  const chips = (box, answer, differs, longer) => {
    box.replaceChildren();
    answer.pieces.forEach((piece, i) => {
      const chip = make("span", piece === "" ? "∅" : piece.replace(/\n/g, "↵"), "token");
      chip.title = `token ${i + 1}, id ${answer.tokens[i]}`;
      if (differs !== null && i === differs) { chip.classList.add("first"); chip.append(make("span", " (first that differs)", "unseen")); }
      if (differs !== null && i > differs) chip.classList.add("after");
      box.append(chip);
    });
    if (differs !== null && differs >= answer.tokens.length && longer) box.append(make("span", "(nothing more)", "token first end"));
  };
  const agreed = (run) => `${run.differs === null ? record.dense.tokens.length : run.differs} of ${record.dense.tokens.length}`;
  const counts = (run) => [record.patches, ...(run.steps.length < 7 ? run.steps : [run.steps[0], null, ...run.steps.slice(-2)])
    .map((step) => (step ? step.kept.length : "…"))].join(" → ");

  const bar = (count, text, id) => {
    const item = make("li"), track = make("span", undefined, "bar"), part = make("i"), number = make("b", String(count));
    if (id) number.id = id;
    part.style.width = `${(100 * count) / record.patches}%`;
    track.append(part); item.append(number, track, make("small", text));
    return item;
  };
  const tell = (run) => {
    at("steps").replaceChildren();
    at("facts").replaceChildren();
    const note = at("note"), name = `${state.method} at ${record.retentions[state.retention]}`;
    note.className = run.left_out ? "note bad" : "note";
    at("pruned-title").textContent = name;
    at("verdict").className = "verdict";
    if (run.left_out) {
      note.textContent = `${name} is left out: ${run.left_out}`;
      at("verdict").textContent = "";
      chips(at("dense"), record.dense, null, false);
      return at("pruned").replaceChildren("left out");
    }
    note.textContent = `${name}: ${counts(run)} visual tokens` + (record.random ? "; random weights, so that answers mean nothing" : "");
    at("steps").append(bar(record.patches, "patches of the picture, all that a dense model sees", "count-all"));
    run.steps.forEach((step, i) => at("steps").append(bar(step.kept.length, `${step.where} (${step.policy})`, `count-${i}`)));
    const fact = (title, value, id) => {
      const data = make("dd", value), row = make("div");
      data.id = id; row.append(make("dt", title), data); at("facts").append(row);
    };
    fact("mean over the decoder's layers", `${run.mean_tokens.toFixed(1)} (${percent(run.mean_tokens / record.patches)})`, "mean");
    if (run.clusters) fact("clusters", String(derive(run).colors.size), "clusters");
    if (derive(run).merged) {
      const groups = [...derive(run).merged.holds.values()].filter((all) => all.length > 1);
      fact("merged", `${groups.reduce((sum, all) => sum + all.length, 0)} into ${groups.length}`, "merged");
    }
    if (run.saliency !== null) fact("of the attention, kept", percent(run.saliency), "saliency");
    fact("first token, KL to dense", `${short(run.kl)} nats`, "kl");
    chips(at("dense"), record.dense, run.differs, run.answer.tokens.length > record.dense.tokens.length);
    chips(at("pruned"), run.answer, run.differs, record.dense.tokens.length > run.answer.tokens.length);
    at("verdict").classList.add(run.differs === null ? "good" : "bad");
    at("verdict").textContent = run.differs === null
      ? `The same ${record.dense.tokens.length} tokens.` : `The first token that differs is number ${run.differs + 1}.`;
  };

  const beside = () => {
    at("cards").replaceChildren();
    for (const name of names) {
      const run = record.runs[name][state.retention], card = make("div", undefined, name === state.method ? "card shown" : "card");
      const button = make("button", name), small = make("div", undefined, "small");
      button.type = "button";
      button.setAttribute("aria-pressed", String(name === state.method));
      button.addEventListener("click", () => { state.method = at("method").value = name; show(); });
      for (const panel of record.panels.slice(0, 3)) {
        const canvas = make("canvas");
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `${name}: ${run.left_out ? "left out" : counts(run)} ${panel.label}`);
        draw(canvas, panel, run, has(run, state.view) ? state.view : "kept", 300, true);
        small.append(canvas);
      }
      card.dataset.method = name;
      card.append(button, small);
      if (run.left_out) card.append(make("p", `left out: ${run.left_out}`, "out"));
      else {
        const said = make("p", undefined, "said");
        const text = run.answer.text || run.answer.pieces.join(" ");
        said.append(text.length > 90 ? `${text.slice(0, 90)}…` : text);
        card.append(make("p", counts(run), "counts"), said);
        card.append(make("p", run.differs === null ? "as the dense answer" : `differs from token ${run.differs + 1} on`, run.differs === null ? "good" : "bad"));
      }
      at("cards").append(card);
    }
  };
  const table = () => {
    const head = make("tr"), body = make("tbody"), top = make("thead");
    head.append(make("th", "method"), ...record.retentions.map((text) => make("th", text)));
    top.append(head);
    for (const name of names) {
      const row = make("tr"), title = make("th", name);
      title.scope = "row";
      row.append(title);
      record.runs[name].forEach((run, i) => {
        const cell = make("td", run.left_out ? "left out" : agreed(run), run.left_out ? "out" : run.differs === null ? "good" : "");
        if (run.left_out) cell.title = run.left_out;
        if (name === state.method && i === state.retention) cell.classList.add("at");
        row.append(cell);
      });
      body.append(row);
    }
    at("table").replaceChildren(top, body);
  };

  const show = () => {
    const run = record.runs[state.method][state.retention];
    const view = has(run, state.view) ? state.view : "kept";
    for (const input of at("controls").elements.view) {
      input.disabled = !has(run, input.value);
      input.checked = input.value === view;
      input.parentElement.title = input.disabled ? `${state.method} has none of these here` : "";
    }
    const scores = view === "heat" ? derive(run).scores : [];
    at("score-field").hidden = scores.length < 2;
    at("score").replaceChildren(...scores.map((score, i) => Object.assign(make("option", score.name), { value: i, selected: i === state.score })));
    at("retention-value").textContent = record.retentions[state.retention];
    at("retention").setAttribute("aria-valuetext", record.retentions[state.retention]);
    tell(run);
    legend(run, view);
    canvases.forEach((canvas, i) => {
      draw(canvas, record.panels[i], run, view, canvases.length > 1 ? 480 : 840);
      canvas.setAttribute("aria-label", `${record.panels[i].label || "the picture"}: ${view}, ${run.left_out ? "left out" : counts(run)}`);
    });
    at("hover").textContent = HINT;
    beside();
    table();
  };

  const about = (token, panel) => {
    const run = record.runs[state.method][state.retention];
    if (run.left_out) return "";
    const told = derive(run), place = (t) => `row ${Math.floor((t - panel.first) / panel.columns) + 1}, column ${((t - panel.first) % panel.columns) + 1}`;
    const words = [place(token)];
    for (const score of told.scores) if (score.values.has(token)) words.push(`${score.name} ${short(score.values.get(token))}`);
    if (told.cluster.has(token)) words.push(told.cluster.get(token) < 0 ? "in no cluster" : `cluster ${told.cluster.get(token)}`);
    const into = told.merged && [...told.merged.holds].find(([seat, all]) => all.length > 1 && seat !== token && all.includes(token));
    if (into) words.push(`merged into ${place(into[0])}`);
    const gone = told.stays[token];
    if (!into) words.push(gone === run.steps.length ? "stays to the end" : `leaves ${run.steps[gone].where}`);
    return words.join(" · ");
  };
  const canvases = record.panels.map((panel) => {
    const box = make("div"), canvas = make("canvas");
    canvas.setAttribute("role", "img");
    canvas.addEventListener("pointermove", (event) => {
      const size = canvas.getBoundingClientRect();
      const row = Math.floor(((event.clientY - size.top) / size.height) * panel.rows);
      const column = Math.floor(((event.clientX - size.left) / size.width) * panel.columns);
      if (row >= 0 && row < panel.rows && column >= 0 && column < panel.columns) at("hover").textContent = about(panel.first + row * panel.columns + column, panel);
    });
    canvas.addEventListener("pointerleave", () => { at("hover").textContent = HINT; });
    if (panel.label) box.append(make("p", panel.label));
    box.append(canvas);
    at("panels").append(box);
    return canvas;
  });

  at("model").textContent = record.model;
  at("prompt").textContent = record.prompt;
  at("method").append(...names.map((name) => Object.assign(make("option", name), { value: name })));
  at("retention").max = record.retentions.length - 1;
  at("ticks").append(...record.retentions.map((text) => make("span", text)));
  at("method").addEventListener("change", (event) => { state.method = event.target.value; show(); });
  at("retention").addEventListener("input", (event) => { state.retention = Number(event.target.value); show(); });
  at("score").addEventListener("change", (event) => { state.score = Number(event.target.value); show(); });
  at("controls").addEventListener("change", (event) => { if (event.target.name === "view") { state.view = event.target.value; show(); } });
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  Promise.all(pictures.map((picture) => picture.decode())).then(() => { show(); document.body.dataset.ready = "yes"; });
})();
