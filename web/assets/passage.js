// The text of a document with one passage marked. Code fences become <pre>, Markdown headings bold
// lines; everything is set as text, never as markup.
function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function fill(target, text, fence) {
  let lines = [];
  let code = fence;
  const flush = () => {
    const block = lines.join("\n");
    lines = [];
    if (block.trim()) target.append(element(code ? "pre" : "div", "block", block));
  };
  for (const line of text.replace(/^\n+|\n+$/g, "").split("\n")) {
    if (/^ {0,3}(```|~~~)/.test(line)) {
      flush();
      code = !code;
    } else if (!code && /^#{1,6} /.test(line)) {
      flush();
      target.append(element("div", "heading", line.replace(/^#+ +/, "")));
    } else {
      lines.push(line);
    }
  }
  flush();
  return code;
}

export default function ({ data, parentElement }) {
  const frame = element("div", "frame");
  frame.tabIndex = 0;
  const before = element("div", "around");
  const mark = element("mark", "passage");
  const after = element("div", "around");
  mark.setAttribute("aria-label", data.label);
  const within = fill(before, data.before, false);
  const beyond = fill(mark, data.passage, within);
  fill(after, data.after, beyond);
  frame.append(before, mark, after);
  parentElement.querySelector(".frame")?.remove();
  parentElement.append(frame);
  const place = () => { frame.scrollTop = Math.max(0, mark.offsetTop - frame.offsetTop - 72); };
  place();
  requestAnimationFrame(place);
}
