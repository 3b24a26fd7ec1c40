// Pictures and videos that are attached: checked where they are dropped, sent as data URLs.

const PICTURES = { PNG: "image/png", JPEG: "image/jpeg", WEBP: "image/webp", BMP: "image/bmp", GIF: "image/gif" };
const VIDEOS = {
  mp4: ["video/mp4", "video/quicktime"],
  matroska: ["video/webm", "video/x-matroska", "video/matroska"],
  avi: ["video/x-msvideo", "video/avi"],
  asf: ["video/x-ms-wmv", "video/x-ms-asf"],
};

export const isVideo = (medium) => medium.type.startsWith("video/");

export function acceptedTypes(config) {
  const videos = config.takes_video ? config.containers.flatMap((name) => VIDEOS[name] ?? []) : [];
  return [...config.formats.map((name) => PICTURES[name]), ...videos];
}

// -> {name, type, blob}; throws an Error that says what is wrong with the file.
export async function readMedium(file, config) {
  const name = file.name || "pasted picture";
  if (!acceptedTypes(config).includes(file.type)) {
    const videos = config.takes_video ? ` or a video (${config.containers.join(", ")})` : "";
    throw new Error(`${name}: expected a picture (${config.formats.join(", ")})${videos}.`);
  }
  if (file.size > config.max_media_bytes) {
    throw new Error(`${name}: ${megabytes(file.size)} are more than the ${megabytes(config.max_media_bytes)} this server takes.`);
  }
  if (!isVideo(file)) await checkPixels(file, name, config.max_image_pixels);
  return { name, type: file.type, blob: new Blob([await file.arrayBuffer()], { type: file.type }) };
}

async function checkPixels(file, name, most) {
  const url = URL.createObjectURL(file);
  const picture = new Image();
  picture.src = url;
  try {
    await picture.decode();
  } catch {
    throw new Error(`${name}: this picture cannot be read.`);
  } finally {
    URL.revokeObjectURL(url);
  }
  const { naturalWidth: width, naturalHeight: height } = picture;
  if (width * height > most) {
    throw new Error(`${name}: ${width} × ${height} pixels are more than the ${most.toLocaleString("en")} this server takes.`);
  }
}

export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

// A part of a message's content.
export async function asPart(medium) {
  const kind = isVideo(medium) ? "video_url" : "image_url";
  return { type: kind, [kind]: { url: await dataUrl(medium.blob) } };
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
