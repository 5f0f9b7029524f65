"""Tasks that are trained short and scored long: python -m eval.length_generalisation."""
