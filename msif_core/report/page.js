// Keyboard navigation and finding a query. The page is whole without it.
(() => {
  const sections = [...document.querySelectorAll("section.query")];
  const find = document.getElementById("find");
  const visible = () => sections.filter((section) => !section.hidden);

  const current = () => {
    const list = visible();
    const active = document.activeElement.closest("section.query");
    if (active) return active;
    return list.findLast((section) => section.getBoundingClientRect().top < 120) || list[0];
  };
  const step = (items, item, by) => items[Math.min(items.length - 1, Math.max(0, items.indexOf(item) + by))];
  const show = (element, focus) => {
    if (!element) return;
    focus.focus({ preventScroll: true });
    element.scrollIntoView({ block: "start" });
  };
  const moveQuery = (by) => {
    const list = visible();
    const inside = document.activeElement.closest("section.query");
    const next = !inside && window.scrollY < 200 && by > 0 ? list[0] : step(list, current(), by);
    show(next, next);
  };
  const moveDocument = (by) => {
    const section = current();
    if (!section) return;
    const items = [...section.querySelectorAll("li.document summary")].filter((item) => item.checkVisibility());
    const next = step(items, document.activeElement, by);
    if (next) show(next, next);
  };
  const toggleAll = () => {
    const all = [...(current()?.querySelectorAll("details") || [])];
    const open = all.some((details) => !details.open);
    all.forEach((details) => (details.open = open));
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === find) {
      if (event.key === "Escape") find.blur();
      return;
    }
    const act = {
      j: () => moveQuery(1), k: () => moveQuery(-1),
      n: () => moveDocument(1), p: () => moveDocument(-1),
      x: toggleAll, "/": () => find.focus(),
      // Arrows scroll the page, unless a document of the ranking has the focus.
      ...(document.activeElement.matches("li.document summary") && {
        ArrowDown: () => moveDocument(1), ArrowUp: () => moveDocument(-1),
      }),
    }[event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  find.addEventListener("input", () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    sections.forEach((section) => {
      const text = section.querySelector("h2").textContent + section.querySelector(".asked").textContent;
      const hit = words.every((word) => text.toLowerCase().includes(word));
      section.hidden = !hit;
      document.querySelector(`nav a[href="#${section.id}"]`).parentElement.hidden = !hit;
    });
  });
})();
