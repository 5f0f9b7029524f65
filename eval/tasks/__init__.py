"""Tasks of lm-eval: python -m eval.tasks."""
