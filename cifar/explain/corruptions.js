
// ---- where does it break: on pages that show it ----------------------------------------------------------------------

{
  const sprite = spriteOf(page.flips.sprite, page.flips.spriteColumns);
  for (const figure of document.querySelectorAll(".flips figure")) {
    figure.prepend(sprite.cut(Number(figure.dataset.clean)), sprite.cut(Number(figure.dataset.corrupted)));
  }
}
