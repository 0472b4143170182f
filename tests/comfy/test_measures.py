"""The figures of the quality benchmark are what they say."""

import torch
from sefi_ide.benchmarks import measures, methods, subjects

from .learning import learned


def test_leak_is_that_of_the_learned_word(mini):
    look = subjects.Subject(1, 0).look
    known = methods.with_identity(mini, learned(mini, learning_rate=0.05))
    plain = known._replace(word="person")
    of_word, of_class = (measures.leak(mini, word, look, seed=1) for word in (known, plain))
    assert 0 < of_class < 1 and 0 < of_word < 1
    assert abs(of_word - of_class) > 1e-4


def test_a_batch_of_prompts_draws_what_single_ones_do(mini, monkeypatch):
    """With an identity and seeds, to be told apart from the class word and from each other."""
    monkeypatch.setattr(measures.runtime, "STEPS", 6)
    known = methods.with_identity(mini, learned(mini, learning_rate=0.05))
    plain = methods.Learned(mini.model, mini.clip, "person")
    asked = [{"scene": "beach"}, {"object": "cup"}]
    together = measures.draw(mini, known, asked, [1, 2], "person")
    monkeypatch.setattr(measures, "BATCH", 1)
    singly = measures.draw(mini, known, asked, [1, 2], "person")
    torch.testing.assert_close(together, singly, atol=2e-3, rtol=0)
    assert (singly - measures.draw(mini, plain, asked, [1, 2], "person")).abs().mean() > 5e-3
