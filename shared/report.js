// Galleries with a threshold and a choice of regions. Without this script the page shows the same pictures, still.
for (const gallery of document.querySelectorAll(".gallery")) {
  const controls = gallery.querySelector(".controls");
  const slider = controls.querySelector("input[type=range]");
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
  for (const box of controls.querySelectorAll("input[type=checkbox]")) {
    box.addEventListener("change", () => {
      for (const figure of gallery.querySelectorAll("figure[data-region]")) {
        if (figure.dataset.region === box.value) figure.style.display = box.checked ? "" : "none";
      }
    });
  }
  controls.hidden = false;
}
