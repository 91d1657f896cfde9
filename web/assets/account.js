function element(name, attributes, text) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

export default function ({ data, parentElement }) {
  const bar = element("div", { class: "account" });
  const who = element("div", { class: "who" });
  who.append(
    element("span", { class: "avatar", "aria-hidden": "true" }, data.initial),
    element("span", { class: "name" }, data.name),
    element("span", { class: "role" }, data.role),
  );
  const actions = element("div", { class: "actions" });
  const here = window.location.pathname + window.location.search;
  const language = element(
    "a",
    { href: `/language?to=${data.other}&next=${encodeURIComponent(here)}`, lang: data.other },
    data.otherName,
  );
  const password = element("a", { href: "/password" }, data.password);
  const form = element("form", { method: "post", action: "/logout" });
  form.append(
    element("input", { type: "hidden", name: "csrf", value: data.csrf }),
    element("button", { type: "submit" }, data.logout),
  );
  actions.append(language, password, form);
  bar.append(who, actions);
  parentElement.querySelector(".account")?.remove();
  parentElement.append(bar);
}
