"""What users get wrong, as tables: a row is a command as it is typed and what its one error line must say.

A module an area, each with its CASES; tests/test_bad_input.py runs them all.
"""
