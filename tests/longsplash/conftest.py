import pytest


@pytest.fixture
def registered() -> None:
    import longsplash

    longsplash.register(backend="torch")
