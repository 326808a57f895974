// Galleries with a threshold, a choice of regions and filters; tables with a filter. Without this script the page
// shows the same pictures, still, and every row.
for (const gallery of document.querySelectorAll(".gallery")) {
  const controls = gallery.querySelector(".controls");
  const slider = controls.querySelector("input.threshold");
  const told = controls.querySelector("output");
  const figures = [...gallery.querySelectorAll("figure[data-map]")];
  const soft = told.textContent;
  const pixels = new Map();
  let waiting = false;

  const read = async (picture, width, height) => {
    if (!picture.complete) await new Promise((done) => picture.addEventListener("load", done, { once: true }));
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  };

  const load = async (figure) => {
    const still = figure.querySelector("img");
    const base = figure.closest(".row").querySelector("img");
    const [width, height] = [base.naturalWidth, base.naturalHeight];
    const map = Object.assign(new Image(), { src: figure.dataset.map });
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    canvas.style.display = "none";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", still.alt);
    still.after(canvas);
    const [under, field] = await Promise.all([read(base, width, height), read(map, width, height)]);
    return { still, canvas, under, field, colour: figure.dataset.rgb.split(",").map(Number) };
  };

  const draw = ({ still, canvas, under, field, colour }, figure, threshold) => {
    still.style.display = threshold ? "none" : "";
    canvas.style.display = threshold ? "block" : "none";
    const share = figure.querySelector(".share");
    if (share && !share.dataset.still) share.dataset.still = share.textContent;
    if (!threshold) {
      if (share) share.textContent = share.dataset.still;
      return;
    }
    const out = new ImageData(new Uint8ClampedArray(under.data), under.width, under.height);
    const limit = threshold * 254;
    const inside = (i) => field.data[4 * i] >= limit;
    let count = 0;
    for (let i = 0; i < field.data.length / 4; i += 1) {
      if (!inside(i)) continue;
      count += 1;
      const edge = !inside(i - 1) || !inside(i + 1) || !inside(i - under.width) || !inside(i + under.width);
      const strength = edge ? 1 : 0.42;
      for (let c = 0; c < 3; c += 1) out.data[4 * i + c] += strength * (colour[c] - out.data[4 * i + c]);
    }
    canvas.getContext("2d").putImageData(out, 0, 0);
    if (share) share.textContent = `${((100 * count) / (under.width * under.height)).toFixed(1)}%`;
  };

  const show = async () => {
    waiting = false;
    const threshold = Number(slider.value) / 100;
    told.textContent = threshold ? `probability of ${threshold.toFixed(2)} or more` : soft;
    for (const figure of figures) {
      if (!pixels.has(figure)) pixels.set(figure, load(figure));
      draw(await pixels.get(figure), figure, threshold);
    }
  };

  slider.addEventListener("input", () => {
    if (!waiting) requestAnimationFrame(show);
    waiting = true;
  });
  const boxes = [...controls.querySelectorAll("input[type=checkbox]")];
  const least = controls.querySelector("input.least");
  const reason = controls.querySelector("select");
  const count = controls.querySelector("output.count");
  const cards = [...gallery.querySelectorAll(".case")];

  const filter = () => {
    const score = least ? Number(least.value) / 100 : 0;
    if (least) controls.querySelector(".least-told").textContent = score ? `best of ${score.toFixed(2)} or more` : "any score";
    const left = new Set(boxes.filter((box) => !box.checked).map((box) => box.value));
    for (const card of cards) {
      // The best score of the regions that are looked at.
      const scores = [...card.querySelectorAll("figure[data-score]")].filter((item) => !left.has(item.dataset.region));
      const best = Math.max(0, ...scores.map((item) => Number(item.dataset.score)));
      const named = [...card.querySelectorAll("[data-why]")].map((item) => item.dataset.why);
      card.hidden = best < score || Boolean(reason && reason.value && !named.includes(reason.value));
    }
    if (count) count.textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length} shown`;
  };

  for (const box of boxes) {
    box.addEventListener("change", () => {
      for (const figure of gallery.querySelectorAll("figure[data-region]")) {
        if (figure.dataset.region === box.value) figure.style.display = box.checked ? "" : "none";
      }
      filter();
    });
  }
  if (least) least.addEventListener("input", filter);
  if (reason) reason.addEventListener("change", filter);
  filter();
  controls.hidden = false;
}
for (const listing of document.querySelectorAll(".listing")) {
  const controls = listing.querySelector(".controls");
  if (!controls) continue;
  const chosen = controls.querySelector("select");
  const rows = [...listing.querySelectorAll("tbody tr")];
  const filter = () => {
    for (const row of rows) {
      row.hidden = Boolean(chosen.value) && row.cells[Number(listing.dataset.by)].textContent !== chosen.value;
    }
    controls.querySelector("output").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
  };
  chosen.addEventListener("change", filter);
  filter();
  controls.hidden = false;
}
