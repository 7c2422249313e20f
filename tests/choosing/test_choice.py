"""`choose` reads every form in the help, and explains why it refuses others."""

import pytest

import tiny
from flextron.choosing.choice import choose
from flextron.errors import SubnetError
from flextron.ranking.sensitivity import measure_sensitivity
from flextron.subnet import Subnet


def test_full_and_equal_widths(llama):
    space = llama.search_space
    assert choose(llama, "full") == space.full
    assert choose(llama, "neurons=20") == space.uniform(20)
    assert choose(llama, "kv_groups=2,neurons=20") == space.uniform(20, 2)


def test_file(llama, tmp_path):
    subnet = tiny.random_subnet(llama.search_space, seed=1)
    path = tmp_path / "subnet.json"
    path.write_text(subnet.to_json())
    assert choose(llama, str(path)) == subnet
    path.write_text(Subnet((8,), (1,)).to_json())
    with pytest.raises(SubnetError, match="for a model of 1 layers"):
        choose(llama, str(path))


def test_share_is_the_greedy_choice_of_the_folder(llama, tmp_path):
    sensitivity = measure_sensitivity(llama, tiny.blocks(rows=1))
    sensitivity.save(tmp_path)
    assert choose(llama, "62.5%", tmp_path) == sensitivity.allocate(0.625)
    with pytest.raises(SubnetError, match="120%"):
        choose(llama, "120%", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("60%", "needs the sensitivities"),
        ("many%", "Write a number and %"),
        ("small", "Pass full, a share"),
        ("neurons=many", "cannot read the widths"),
        ("heads=2", "cannot read the widths"),
        ("neurons=21", r"not a choice of the search space; the nearest are 20 and 22"),
        ("neurons=4000", "a layer of this model has 40"),
        ("nowhere.json", r"cannot read a Subnet from nowhere\.json"),
    ],
)
def test_what_cannot_be_read_says_why(llama, tmp_path, name, message):
    with pytest.raises(SubnetError, match=message):
        choose(llama, name, tmp_path)
