"""`python -m tests.golden`: write down what the translator makes of the corpus now; git shows what has changed."""

from tests.golden.rendering import render_all
from tests.golden.test_golden import KEPT

KEPT.write_text(render_all())
