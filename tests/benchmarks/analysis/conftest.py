from tests.eval.conftest import corpus, make_run

__all__ = ["corpus", "make_run"]  # fixtures
