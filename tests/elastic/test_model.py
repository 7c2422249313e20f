"""Choosing a sub-network: whatever ends the block, the model is as before."""

import pytest


def test_ctrl_c_while_widths_are_set_leaves_the_model_as_it_was(llama, monkeypatch):
    kind = type(llama.layers[1].mlp)
    real = kind.keep

    def interrupted(sub, units):
        real(sub, units)
        if sub is llama.layers[1].mlp and not units:
            raise KeyboardInterrupt

    monkeypatch.setattr(kind, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt), llama.use(llama.search_space.smallest):
        pytest.fail("the block began")
    assert llama.subnet == llama.search_space.full
    assert all(sub.width.kept == sub.width.full for _, _, sub in llama.sub_layers())
