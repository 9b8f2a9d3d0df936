"""The conjectures of the article, tested: ``python -m studies run``. What came out is in ``docs/studies.md``."""
