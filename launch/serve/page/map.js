// Draws the table of chunks and steps, and what is held of the past. Colours are those of the style sheet.

const NAMES = { c: "--computed", r: "--reused", x: "--reused", ".": "--waiting" };

function prepared(canvas) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return { context, width, height };
}

function colour(canvas, name) {
  const probe = document.createElement("span"); // canvas does not resolve light-dark() by itself
  probe.style.color = `var(${name})`;
  canvas.after(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export function drawMap(canvas, rows) {
  const { context, width, height } = prepared(canvas);
  if (!rows.length) return;
  const colours = Object.fromEntries(Object.entries(NAMES).map(([mark, name]) => [mark, colour(canvas, name)]));
  const [across, down] = [width / rows[0].length, Math.min(24, height / rows.length)];
  const gap = Math.min(across, down) > 4 ? 1 : 0;
  rows.forEach((row, chunk) => row.forEach((mark, step) => {
    context.fillStyle = colours[mark];
    context.fillRect(step * across, chunk * down, across - gap, down - gap);
  }));
}

export function drawKept(canvas, shares) {
  const { context, width, height } = prepared(canvas);
  const words = shares.length ? `of ${shares.length} past chunks ${shares.filter((share) => share > 0).length} are held` : "";
  canvas.setAttribute("aria-label", words || "Nothing of the past is held yet");
  if (!shares.length) return;
  const across = Math.min(24, width / shares.length);
  const [held, gone] = [colour(canvas, "--computed"), colour(canvas, "--waiting")];
  shares.forEach((share, chunk) => {
    context.fillStyle = gone;
    context.fillRect(chunk * across, 0, across - 1, height);
    context.fillStyle = held;
    context.fillRect(chunk * across, height * (1 - share), across - 1, height * share);
  });
}
