// Small changes to a page: nothing is written that is there already, so that an update lays out only what changed.

export const byId = id => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function setText(node, value) {
  const text = String(value);
  const first = node.firstChild;
  if (first === null) node.append(text);
  else if (first.data !== text) first.data = text;
}

// Children of `parent` by key: `create(row)` makes one's parts, `update(parts, row)` shows a row in them; `parts.node`
// is the child. Those whose key is gone are removed; the order is that of the rows. The focus stays on what has it,
// or goes to what holds the rows when that is gone or disabled.
export class Rows {
  constructor(parent, keyOf, create, update) {
    Object.assign(this, { parent, keyOf, create, update });
    this.shown = new Map();
  }

  show(rows) {
    const focused = this.parent.contains(document.activeElement) ? document.activeElement : null;
    const before = this.shown;
    this.shown = new Map();
    for (const row of rows) {
      const key = this.keyOf(row);
      const parts = before.get(key) ?? this.create(row);
      before.delete(key);
      this.shown.set(key, parts);
      this.update(parts, row);
    }
    for (const parts of before.values()) parts.node.remove();
    let next = this.parent.firstChild;
    for (const { node } of this.shown.values()) {
      if (node === next) next = next.nextSibling;
      else this.parent.insertBefore(node, next);
    }
    if (focused === null) return;
    const keeps = focused.isConnected && !focused.disabled;
    (keeps ? focused : this.parent.closest("[tabindex]")).focus({ preventScroll: true });
  }
}
