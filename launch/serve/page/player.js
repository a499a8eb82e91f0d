// Plays a fragmented MP4 while it comes, by MediaSource: its beginning says which codec it is of.

const hex = (byte) => byte.toString(16).padStart(2, "0");

function codecOf(bytes) {
  for (let at = 0; at + 8 < bytes.length; at += 1) { // the box avcC: its name, a version, then profile and level
    if (bytes[at] === 97 && bytes[at + 1] === 118 && bytes[at + 2] === 99 && bytes[at + 3] === 67) {
      return `avc1.${hex(bytes[at + 5])}${hex(bytes[at + 6])}${hex(bytes[at + 7])}`;
    }
  }
  return null;
}

const once = (target, name) => new Promise((resolve) => target.addEventListener(name, resolve, { once: true }));

async function append(buffer, bytes) {
  const done = once(buffer, "updateend");
  buffer.appendBuffer(bytes);
  await done;
}

// Shows in `video` what `request` answers with, until it ends. An error says why it cannot be played.
export async function play(video, request) {
  const answer = await request();
  const source = new MediaSource();
  const opened = once(source, "sourceopen");
  video.src = URL.createObjectURL(source);
  await opened;
  URL.revokeObjectURL(video.src);
  const reader = answer.body.getReader();
  let buffer = null;
  let begun = new Uint8Array();
  for (;;) {
    const { value, done } = await reader.read();
    if (source.readyState !== "open") return; // another video is shown
    if (done) break;
    if (buffer) { await append(buffer, value); continue; }
    begun = Uint8Array.of(...begun, ...value);
    const codec = codecOf(begun);
    if (!codec) continue;
    const kind = `video/mp4; codecs="${codec}"`;
    if (!MediaSource.isTypeSupported(kind)) throw new Error(`This browser cannot play ${kind}.`);
    buffer = source.addSourceBuffer(kind);
    await append(buffer, begun);
  }
  if (source.readyState === "open") source.endOfStream();
}
