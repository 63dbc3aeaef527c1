// A browser lets no page from a folder start the search: say so where one would type.
document.addEventListener("DOMContentLoaded", () => {
  const box = document.querySelector(".md-search__input");
  if (location.protocol !== "file:" || !box) return;
  box.disabled = true;
  box.placeholder = "Search needs a server: python -m http.server -d site";
});
